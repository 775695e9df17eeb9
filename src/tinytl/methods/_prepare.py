"""The network made ready in stock PyTorch: lite residual modules in, statistics frozen, requires_grad set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tinytl.nn.frozen_norm import FrozenStatsBatchNorm2d, StaysInEvaluation
from tinytl.nn.lite_residual import LiteBlock, insert_lite_blocks_

from .method import Bias, Full, LastBlocks, LiteResidual, Method, Norm


@dataclass(frozen=True)
class Plan:
    """What will be done to a network.

    Attributes:
        method: what trains.
        blocks: paths of the blocks in forward order.
        classifier: path of the classifier.
        shapes: (in channels, out channels, stride) of the blocks but the first; None: read off their layers.
        order: names of the parameters (and buffers) in the order in which the network uses them.
        seed: of the lite modules' random weights.
    """

    method: Method
    blocks: Sequence[str]
    classifier: str
    shapes: Sequence[tuple[int, int, int]] | None
    order: Sequence[str]
    seed: int


def prepare_(model: nn.Module, plan: Plan) -> list[str]:
    """Insert lite residual modules, freeze statistics, say what trains; the paths of what was inserted."""
    existing = {name for name, module in model.named_modules() if type(module) is LiteBlock}
    inserted: list[str] = []
    lite: LiteResidual | None = plan.method.part(LiteResidual)
    new = [(at, path) for at, path in enumerate(plan.blocks[1:]) if path not in existing]
    if lite is not None and new:
        norm = "gn" if any(type(m) is nn.GroupNorm for m in model.modules()) else "bn"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(plan.seed)  # torch.manual_seed would set the CUDA generators as well
            inserted = insert_lite_blocks_(
                model,
                [path for _, path in new],
                norm=norm,
                groups=lite.groups,
                kernel_size=lite.kernel_size,
                shapes=None if plan.shapes is None else [plan.shapes[at] for at, _ in new],
            )
    _freeze_statistics_(model)
    _set_trained_(model, plan)
    return inserted


def _freeze_statistics_(model: nn.Module) -> None:
    frozen: dict[int, nn.Module] = {}  # a batch norm used in two places stays one module
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, _NormBase) and child.running_mean is not None:
                if id(child) not in frozen:
                    frozen[id(child)] = _frozen(child)
                setattr(module, name, frozen[id(child)])


def _frozen(norm: _NormBase) -> nn.Module:
    """A plain batch norm becomes one with frozen statistics; any other stays what it is, in evaluation mode."""
    if isinstance(norm, nn.BatchNorm2d) and type(norm) in (nn.BatchNorm2d, FrozenStatsBatchNorm2d):
        return FrozenStatsBatchNorm2d.of(norm)
    vars(norm)["train"] = StaysInEvaluation(norm)
    return norm.train(norm.training)


def _set_trained_(model: nn.Module, plan: Plan) -> None:
    """Set requires_grad of every parameter."""
    method = plan.method
    full = method.part(Full) is not None
    for parameter in model.parameters():
        parameter.requires_grad_(full)
    for parameter in model.get_submodule(plan.classifier).parameters():
        parameter.requires_grad_()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            norm = method.part(Norm) is not None and isinstance(module, _NORMS)
            bias = method.part(Bias) is not None and name == "bias"
            if norm or bias:
                parameter.requires_grad_()
    lite = [module for module in model.modules() if type(module) is LiteBlock]
    if method.part(LiteResidual) is not None:
        for both in lite:
            both.lite.requires_grad_()
    last: LastBlocks | None = method.part(LastBlocks)
    if last is not None and last.count:
        _train_last_(model, plan, plan.blocks[-last.count :])
    if method.part(LiteResidual) is not None and method.part(Bias) is not None and not full:
        for both in lite:
            # The main branch's bias does its work (PAPER.md, "Lite residual module").
            both.lite.get_submodule("norm2").bias.requires_grad_(False)  # pyright: ignore


def _train_last_(model: nn.Module, plan: Plan, blocks: Sequence[str]) -> None:
    """Train every parameter of the last blocks, and of all that the network uses after the first of them begins."""
    starts = [at for at, name in enumerate(plan.order) if name.startswith(f"{blocks[0]}.")]
    behind = set(plan.order[starts[0] :]) if starts else set()
    within = tuple(f"{path}." for path in blocks)
    lite = {path for path, module in model.named_modules() if type(module) is LiteBlock}
    for name, parameter in model.named_parameters():
        before = name  # what it was called before a lite module was put beside its block
        for path in lite:
            before = before.replace(f"{path}.block.", f"{path}.", 1) if name.startswith(f"{path}.block.") else before
        if name in behind or before in behind or name.startswith(within):
            parameter.requires_grad_()


_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
