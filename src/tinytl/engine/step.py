"""One optimizer step on one batch, in micro-batches, taken only where everything that goes into it is finite."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tinytl.errors import NotFiniteError
from tinytl.spec import FitOptions

from .evaluation import LabelledBatch
from .finite import bad_gradient, origin
from .optimizer import match_strides

MEND = "start again with a lower learning rate (--lr), since a resumed run comes to the same step"


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: LabelledBatch,
    lr: float,
    options: FitOptions,
    where: str = "this step",
) -> tuple[float, int]:
    """Take one optimizer step on one batch; return its mean loss and how many images were right before it.

    Raises NotFiniteError, naming ``where`` and where it comes from, when the loss or a gradient is NaN or infinite. No
    parameter and no slot of the optimizer has changed then.
    """
    device = next(model.parameters()).device
    count = len(batch.labels)
    size = options.micro_batch or count
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    optimizer.zero_grad(set_to_none=True)
    for images, labels in zip(batch.images.split(size), batch.labels.split(size), strict=True):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = model(images)  # (n, classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
        loss = loss * (len(labels) / count)
        loss.backward()
        total += loss.detach()
        correct += (logits.detach().argmax(1) == labels).sum()
        del images, logits, loss  # or this micro-batch's graph would live on beside the next one's
    value = total.item()
    fault = bad_gradient(model) if math.isfinite(value) else None
    if not math.isfinite(value) or fault:
        optimizer.zero_grad(set_to_none=True)
        fault = fault or origin(model, batch.images.split(size))
        raise NotFiniteError(f"the loss is {value:.4g} at {where}, learning rate {lr:.3g}: {fault}; {MEND}")
    for group in optimizer.param_groups:
        group["lr"] = lr
        for parameter in group["params"]:
            match_strides(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # no gradient is alive between steps
    return value, int(correct.item())
