"""A step of a super-network: several sub-networks on one batch, the largest network their teacher.

For each of K sub-networks on a batch of images x with labels y:

    loss_k = cross entropy(f_k(x), y) + ratio * KL(softmax(teacher(x)) || softmax(f_k(x)))

and the step descends the mean of the K losses. The teacher is a frozen copy of the largest network as it was at the end
of its training alone; like the sub-networks it normalizes by the batch, since the batches' resolution changes.

Source: Cai et al., "Once-for-All" (ICLR 2020, arXiv 1908.09791), section 3.3; Hinton et al., "Distilling the Knowledge
in a Neural Network" (arXiv 1503.02531), at temperature 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinytl.backbones.once_for_all import OfaArchitecture, largest

from .elastic import ElasticNet


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL divergence of the student's distribution from the teacher's, mean over images, in nats.

    Args:
        logits: the student's (N, C).
        teacher_logits: (N, C); no gradient flows into them.
    """
    target = F.log_softmax(teacher_logits.detach(), dim=1)
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean", log_target=True)


def teacher_of(net: ElasticNet) -> ElasticNet:
    """A frozen copy of the largest network, which normalizes by its batch and remembers nothing of it."""
    teacher = copy.deepcopy(net)
    teacher.choose(largest(net.space))
    teacher.requires_grad_(False)
    teacher.train()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    return teacher


def accumulate(
    net: ElasticNet,
    teacher: ElasticNet | None,
    architectures: Sequence[OfaArchitecture],
    images: Tensor,
    labels: Tensor,
    *,
    kd_ratio: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[float, int]:
    """Add the gradients of a step's mean loss to ``net``; return that loss and how many answers were right.

    Args:
        net: in training mode; left with the last of the ``architectures``.
        teacher: see `teacher_of`; None: labels alone.
        architectures: K sub-networks.
        images: (N, 3, R, R).
        labels: int64 (N,).
        kd_ratio: weight of the teacher's part.
        label_smoothing: of the cross entropy.

    Returns:
        The mean over the sub-networks of their losses, and of K N answers how many were right.
    """
    target = None
    if teacher is not None and kd_ratio > 0:
        with torch.no_grad():
            target = teacher(images)  # (N, C)
    total, correct = 0.0, 0
    for architecture in architectures:
        net.choose(architecture)
        logits = net(images)  # (N, C)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if target is not None:
            loss = loss + kd_ratio * distillation_loss(logits, target)
        loss = loss / len(architectures)
        loss.backward()
        total += loss.item()
        correct += int((logits.detach().argmax(1) == labels).sum())
    return total, correct


def make_sgd(net: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov's momentum; only the weights of convolutions and of the classifier decay.

    A kernel matrix begins as the identity, and decay would draw it towards zero while no smaller kernel uses it.
    """
    named = list(net.named_parameters())
    decays = [name.endswith(".weight") and parameter.dim() > 1 for name, parameter in named]
    groups = [
        {"params": [p for (_, p), d in zip(named, decays, strict=True) if d], "weight_decay": weight_decay},
        {"params": [p for (_, p), d in zip(named, decays, strict=True) if not d], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def names_in_order(net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The parameters' names in the order in which the optimizer counts them."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return tuple(names[id(p)] for p in _parameters(optimizer))


def first_bad_gradient(net: nn.Module) -> str | None:
    """The name of a parameter whose gradient holds NaN or infinity; None: there is none."""
    for name, parameter in net.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return None


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
