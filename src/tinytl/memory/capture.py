"""One training step described without running it: its operations, the memory they touch, and how long each piece lives.

The step's own code runs on tensors that have shapes and strides and no memory. Every operator that it calls is written
down with the storages that it reads and makes; a storage dies when the last reference to it does, which on the CPU is
the very moment at which the allocator gets its memory back. So the description is not a model of the step beside the
step: a line changed there changes it here. What an operator allocates inside and frees before it returns cannot be seen
this way and is stated by `tinytl.memory.workspace`.

    step = capture_step(adapted_model, (8, 3, 224, 224), micro_batch=2)
    step.peak_bytes, step.at_peak()      # how much, and who

The values of the network are never read, so it may as well lie on the meta device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tinytl.engine.block_code import CODE_BYTES
from tinytl.engine.eight_bit import BlockWise
from tinytl.engine.step import StepObserver, run_step
from tinytl.errors import InputError
from tinytl.nn.execution import set_execution_
from tinytl.nn.meta import meta_copy
from tinytl.ops._ghost import Ghost

from .description import RESIDENT, ROLES, Operation, StepDescription, Storage
from .plan import StepPlan
from .recorder import Recorder
from .step import pieces_of, trained_dtype

__all__ = ["RESIDENT", "ROLES", "Operation", "StepDescription", "Storage", "capture_step"]

_NOTHING_TRAINS = "nothing to train: no parameter requires gradients; adapt the model with adapt_ first"

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def capture_step(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    plan: StepPlan | None = None,
    micro_batch: int | None = None,
    optimizer: Optimizer | None = None,
    label_smoothing: float = 0.0,
    beside_bytes: int = 0,
    passes_only: bool = False,
) -> StepDescription:
    """Describe one training step of `model` (adapted or stock, in any mode) on a batch of images, held as bytes.

    The first micro-batch makes the gradients, the second adds to them, and any further one of the same size does what
    the second did: it is not described again.

    Args:
        model: left untouched.
        input_shape: of the whole batch, (N, 3, H, W).
        plan: how the step is carried out; None: as `micro_batch` says, and else as the model is.
        micro_batch: images at a time; None: all.
        optimizer: makes the optimizer from the trained parameters; its state is resident, as after a first step.
            None: no update.
        label_smoothing: of the cross entropy.
        beside_bytes: what is alive beside the step all the while: batches that a loader has read ahead.
        passes_only: leave the update out; the optimizer's state is there.

    Raises:
        InputError: nothing trains, or a micro-batch below 1.
    """
    return Capture(model).step(
        input_shape,
        StepPlan(input_shape[0] if micro_batch is None else micro_batch) if plan is None else plan,
        optimizer=optimizer,
        label_smoothing=label_smoothing,
        beside_bytes=beside_bytes,
        passes_only=passes_only,
    )


class Capture:
    """Describes steps of one network, which is copied once, without its memory.

    Args:
        model: left untouched, but for `throw_away`.
        throw_away: it is on the meta device and nobody needs it any more: it is not copied.
    """

    def __init__(self, model: nn.Module, *, throw_away: bool = False) -> None:
        self._model = (model if throw_away else meta_copy(model)).train()

    def step(
        self,
        input_shape: Sequence[int],
        plan: StepPlan,
        *,
        optimizer: Optimizer | None = None,
        label_smoothing: float = 0.0,
        beside_bytes: int = 0,
        passes_only: bool = False,
        later_only: bool = False,
    ) -> StepDescription:
        """As `capture_step`; with `later_only`, of several micro-batches only one that adds to gradients.

        Its peak is that of the whole step: the first micro-batch has no gradients to begin with.
        """
        if plan.micro_batch < 1:
            raise InputError(f"micro_batch is {plan.micro_batch}: expected 1 or more")
        if plan.parts:
            set_execution_(self._model, plan.policies)
        recorder = Recorder()
        images, labels = _held(recorder, input_shape)
        beside = recorder.resident(torch.empty((beside_bytes,), dtype=torch.uint8, device="meta"), "input", "")
        ghosts = _resident(self._model, recorder)
        paths = {id(module): path for path, module in self._model.named_modules()}
        try:
            with no_collector(), recorder, _watching(paths, recorder), _in_place(self._model, ghosts):
                trained = [p for p in self._model.parameters() if p.requires_grad]
                if not trained:
                    raise InputError(
                        "nothing to train: no parameter requires gradients; adapt the model with adapt_ first"
                    )
                update = None if optimizer is None else _stepped(optimizer(trained), trained, recorder)
                tables = torch.empty(_table_bytes(update), dtype=torch.uint8)
                recorder.call([tables], "optimizer state", before=True)
                pieces = _distinct(images, labels, plan.micro_batch, trained_dtype(self._model))
                if later_only and plan.micro_batch < input_shape[0]:
                    pieces = _later(pieces, trained, recorder)
                recorder.enter("forward")
                run_step(
                    self._model,
                    None if passes_only else update,
                    pieces,
                    input_shape[0],
                    label_smoothing=label_smoothing,
                    update=plan.update,
                    observer=_Phases(recorder, trained),
                )
                del beside, tables
                return recorder.description()
        finally:
            if plan.parts:
                set_execution_(self._model, {})


class _Phases(StepObserver):
    """Tells the recorder where the step is."""

    def __init__(self, recorder: Recorder, trained: list[nn.Parameter]) -> None:
        self._recorder, self._trained = recorder, trained

    def before_backward(self, loss: Tensor) -> None:
        self._recorder.enter("backward")

    def after_backward(self) -> None:
        self._name_gradients()
        self._recorder.enter("forward")

    def before_parameter(self, parameter: Tensor) -> None:
        self._recorder.call([parameter.grad], "gradient")

    def before_update(self, loss: Tensor) -> None:
        self._recorder.enter("update")

    def _name_gradients(self) -> None:
        self._recorder.call([parameter.grad for parameter in self._trained], "gradient")


def _held(recorder: Recorder, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch as a loader holds it."""
    images = torch.empty(tuple(shape), dtype=torch.uint8, device="meta", memory_format=torch.channels_last)
    labels = torch.empty((shape[0],), dtype=torch.int64, device="meta")
    return recorder.resident(images, "input", ""), recorder.resident(labels, "input", "")


def _table_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Of the tables of an 8-bit state's codes."""
    return len(optimizer.codes) * CODE_BYTES if isinstance(optimizer, BlockWise) else 0


def _stepped(
    optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], recorder: Recorder
) -> torch.optim.Optimizer:
    """The optimizer with its state as it is after a first step."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        recorder.call(state.values(), "optimizer state", before=True)
    return optimizer


def _resident(model: nn.Module, recorder: Recorder) -> dict[int, Ghost]:
    """The ghosts of a meta model's tensors, by the id of the tensor; tensors that share memory go on doing so."""
    made: dict[int, Ghost] = {}
    for role, named in (("weight", model.named_parameters()), ("statistics", model.named_buffers())):
        for name, tensor in named:
            meta = tensor.detach()
            path, _, own = name.rpartition(".")
            packed = own.startswith("weight_")  # a frozen weight held in fewer bits is no parameter
            made[id(tensor)] = recorder.resident(meta, "weight" if packed else role, path)
    return made


@contextmanager
def no_collector() -> Iterator[None]:
    """No collection of cycles: a step makes none that hold memory, and looking for them takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _in_place(model: nn.Module, ghosts: dict[int, Ghost]) -> Iterator[None]:
    """Ghosts in the place of the model's meta tensors."""
    made: dict[int, Tensor] = {}
    before: list[tuple[Any, str, Tensor]] = []
    for module in model.modules():
        table: Any
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    ghost = ghosts[id(tensor)]
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(ghost, tensor.requires_grad) if is_parameter else ghost
                before.append((table, name, tensor))
                table[name] = made[id(tensor)]
    try:
        yield
    finally:
        for table, name, tensor in before:
            table[name] = tensor


def _distinct(images: Tensor, labels: Tensor, size: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The first two micro-batches, and the last one where that is smaller."""
    count = len(labels)
    two = min(2 * size, count)
    yield from pieces_of(images[:two], labels[:two], size, dtype)
    rest = count % size
    if rest and count > two:
        yield from pieces_of(images[-rest:], labels[-rest:], size, dtype)


def _later(
    pieces: Iterator[tuple[Tensor, Tensor]], trained: list[nn.Parameter], recorder: Recorder
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first of the pieces, as one that comes after others: the gradients are there."""
    for parameter in trained:  # here, since a step begins by dropping gradients
        parameter.grad = torch.empty_like(parameter)
    recorder.call([parameter.grad for parameter in trained], "gradient", before=True)
    yield next(pieces)


@contextmanager
def _watching(paths: dict[int, str], recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which layer is running in the forward pass."""

    def enter(module: nn.Module, args: Any) -> None:
        recorder.layer = paths.get(id(module), recorder.layer)

    # not a hook of each module: a module with hooks is called as a module, and no longer part of a chain
    handle = register_module_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()
