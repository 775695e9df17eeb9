"""One optimizer step on one batch, in micro-batches, taken only where everything that goes into it is finite.

`run_step` is the step itself, the same for training, for measuring its memory and for describing it; `train_step` is
the step with the checks around it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.errors import InputError, NotFiniteError
from tinytl.spec import FitOptions

from .batches import LabelledBatch, images_of, pieces
from .finite import bad_gradient, bad_gradient_of, origin
from .in_backward import updates_in_backward
from .optimizer import match_strides

MEND = "start again with a lower learning rate (--lr), since a resumed run comes to the same step"


class StepObserver:
    """Told where a step is; here nothing is done with it. What a method raises ends the step.

    A step of two micro-batches: ``before_backward``, ``after_backward``, ``before_backward``, ``after_backward``,
    ``before_update``. With updates in backward: ``before_backward``, ``before_parameter`` for each, ``after_backward``.
    """

    def before_backward(self, loss: Tensor) -> None:
        """A forward pass is over; ``loss`` () is this micro-batch's share of the batch's mean."""

    def after_backward(self) -> None:
        """A backward pass is over and its graph gone."""

    def before_parameter(self, parameter: Tensor) -> None:
        """The gradient of ``parameter`` is complete, and it is updated next, in backward."""

    def before_update(self, loss: Tensor) -> None:
        """All gradients are complete and nothing is updated yet; ``loss`` () float64 is the batch's mean."""


def run_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    parts: Iterable[tuple[Tensor, Tensor]],
    count: int,
    *,
    label_smoothing: float = 0.0,
    update: str = "end",
    observer: StepObserver | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step on ``count`` images; return their mean loss () float64 and how many were right () int64, before it.

    Nothing is fetched from the device, so that a step can be described without being run. No gradient is alive
    afterwards, and of ``parts`` nothing is alive longer than one micro-batch's forward pass.

    Args:
        model: in whatever mode it is.
        optimizer: over the parameters that train; None: no update, and the gradients are left.
        parts: images (n, 3, R, R) and labels (n,) of each micro-batch in turn.
        count: images of all parts together, by which the loss is divided.
        label_smoothing: of the cross entropy.
        update: 'end', or 'backward' (see `tinytl.engine.in_backward`; one part only).
        observer: told where the step is.

    Raises:
        InputError: update 'backward' and a part that is not the whole batch; nothing has changed then.
    """
    device = next(model.parameters()).device
    told = observer or StepObserver()
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    at_once = optimizer is not None and update == "backward"
    with contextlib.ExitStack() as stack:
        if optimizer is not None and at_once:
            stack.enter_context(updates_in_backward(optimizer, told.before_parameter))
        for images, labels in parts:
            n = len(labels)
            if at_once and n != count:
                raise InputError(
                    f"update is 'backward' and a micro-batch of {n} of {count} images: gradients that are accumulated "
                    "are complete at the end of the step only; take update 'end', or the batch in one piece"
                )
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits = model(images)  # (n, classes)
            del images  # what backward needs of them, the graph holds
            correct += (logits.detach().argmax(1) == labels).sum()
            loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing) * (n / count)
            del logits
            told.before_backward(loss.detach())
            loss.backward()
            total += loss.detach()
            del loss  # or this micro-batch's graph would live on beside the next one's
            told.after_backward()
    if optimizer is not None and not at_once:
        told.before_update(total)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                match_strides(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # no gradient is alive between steps
    return total, correct


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: LabelledBatch,
    lr: float,
    options: FitOptions,
    where: str = "this step",
    before_change: Callable[[], object] | None = None,
) -> tuple[float, int]:
    """Take one optimizer step on one batch; return its mean loss and how many images were right before it.

    ``before_change`` is called when everything that can be refused before has been, and the first parameter changes
    next.

    Raises NotFiniteError, naming ``where`` and where it comes from, when the loss or a gradient is NaN or infinite. No
    parameter and no slot of the optimizer has changed then, but for one case: with ``options.update`` 'backward' a
    gradient is seen when those nearer to the loss have been applied. The message says so, and ``before_change`` has
    been called.
    """
    count = len(batch.labels)
    size = options.micro_batch or count
    checks = _Checks(model, optimizer, batch, size, f"at {where}, learning rate {lr:.3g}", before_change)
    checks.in_backward = options.update == "backward"
    for group in optimizer.param_groups:
        group["lr"] = lr
    total, correct = run_step(
        model,
        optimizer,
        pieces(batch, size),
        count,
        label_smoothing=options.label_smoothing,
        update=options.update,
        observer=checks,
    )
    return total.item(), int(correct.item())


class _Checks(StepObserver):
    """Refuses what is NaN or infinite, before anything that it would spoil is changed."""

    in_backward = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: LabelledBatch,
        size: int,
        where: str,
        before_change: Callable[[], object] | None,
    ) -> None:
        self._model, self._optimizer, self._batch, self._size = model, optimizer, batch, size
        self._where, self._before_change = where, before_change
        self._value, self._updated = math.nan, 0

    def before_backward(self, loss: Tensor) -> None:
        if self.in_backward:  # in one piece: it is the batch's
            self._judge_loss(loss)

    def before_update(self, loss: Tensor) -> None:
        self._judge_loss(loss)
        fault = bad_gradient(self._model)
        if fault:
            self._refuse(fault)
        self._changes()

    def before_parameter(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        fault = bad_gradient_of(parameter.grad)  # on CUDA this waits for the device, once a parameter
        if fault:
            name = next(name for name, candidate in self._model.named_parameters() if candidate is parameter)
            behind = (
                f"the {self._updated} parameters whose gradients came first were updated already (update 'backward'), "
                "so the network is not as before this step"
                if self._updated
                else "it came first, so nothing was updated"
            )
            self._refuse(f"the gradient of {name} {fault}; {behind}")
        if not self._updated:
            self._changes()
        self._updated += 1

    def _judge_loss(self, loss: Tensor) -> None:
        self._value = loss.item()
        if not math.isfinite(self._value):
            self._optimizer.zero_grad(set_to_none=True)  # or they would be alive beside the pass that looks for it
            self._refuse(origin(self._model, images_of(self._batch, self._size)))

    def _changes(self) -> None:
        if self._before_change is not None:
            self._before_change()

    def _refuse(self, fault: str) -> NoReturn:
        self._optimizer.zero_grad(set_to_none=True)
        raise NotFiniteError(f"the loss is {self._value:.4g} {self._where}: {fault}; {MEND}")
