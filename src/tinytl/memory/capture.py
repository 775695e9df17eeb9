"""One training step described without running it: its operations, the memory they touch, and how long each piece lives.

The step's own code runs on tensors that have shapes and strides and no memory (PyTorch's fake tensors). Every operator
that it calls is written down with the storages that it reads and makes; a storage dies when the last reference to it
does, which on the CPU is the very moment at which the allocator gets its memory back. So the description is not a model
of the step beside the step: a line changed there changes it here. What an operator allocates inside and frees before it
returns cannot be seen this way and is stated by `tinytl.memory.workspace`.

    step = capture_step(adapted_model, (8, 3, 224, 224), micro_batch=2)
    step.peak_bytes, step.at_peak()      # how much, and who

The values of the network are never read, so it may as well lie on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tinytl.errors import InputError
from tinytl.nn.kept import meta_copy

from .workspace import workspace_bytes

RESIDENT = ("weight", "statistics", "optimizer state", "input")
ROLES = (*RESIDENT, "gradient", "kept", "working")


@dataclass(frozen=True)
class Storage:
    """One piece of memory.

    Attributes:
        bytes: its size.
        role: one of `ROLES`. 'kept': alive when a micro-batch's forward pass is over; 'working': any other of the step.
        layer: path of the layer that made it ('' where that is unknown).
        born: number of the operation that makes it; -1: alive before the step.
        dies: number of the first operation before which it is gone; None: alive after the step.
    """

    bytes: int
    role: str
    layer: str
    born: int
    dies: int | None


@dataclass(frozen=True)
class Operation:
    """One operator call.

    Attributes:
        name: PyTorch's, e.g. 'aten.convolution.default'.
        phase: 'forward', 'backward' or 'update'.
        layer: path of the layer on whose behalf it runs, as far as the tensors that it reads tell.
        inputs, outputs: numbers of the storages that it reads and makes.
        workspace_bytes: allocated inside and freed before it returns (see `tinytl.memory.workspace`).
    """

    name: str
    phase: str
    layer: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    workspace_bytes: int


@dataclass(frozen=True, eq=False)
class StepDescription:
    """The operations of one training step in order, and the storages that they read and make."""

    operations: tuple[Operation, ...]
    storages: tuple[Storage, ...]

    @cached_property
    def live_bytes(self) -> np.ndarray:
        """(operations,) int64: bytes alive while each operation runs, its workspace included."""
        change = np.zeros(len(self.operations) + 1, dtype=np.int64)
        for storage in self.storages:
            change[max(storage.born, 0)] += storage.bytes
            if storage.dies is not None:
                change[storage.dies] -= storage.bytes
        return np.cumsum(change)[:-1] + np.array([op.workspace_bytes for op in self.operations], dtype=np.int64)

    @property
    def resident_bytes(self) -> int:
        """Weights, statistics, optimizer state and input: what is alive before and after the step."""
        return sum(storage.bytes for storage in self.storages if storage.born < 0)

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once, everything included."""
        return int(self.live_bytes.max())

    @property
    def step_peak_bytes(self) -> int:
        """The most that the step adds to what is resident."""
        return self.peak_bytes - self.resident_bytes

    def alive_at(self, operation: int) -> list[int]:
        """Numbers of the storages that are alive while that operation runs."""
        return [
            number
            for number, storage in enumerate(self.storages)
            if storage.born <= operation and (storage.dies is None or operation < storage.dies)
        ]

    def at_peak(self) -> dict[str, int]:
        """Bytes of each role, and of the workspace, at the operation where the peak is."""
        peak = int(self.live_bytes.argmax())
        found: dict[str, int] = dict.fromkeys((*ROLES, "workspace"), 0)
        for number in self.alive_at(peak):
            found[self.storages[number].role] += self.storages[number].bytes
        found["workspace"] = self.operations[peak].workspace_bytes
        return found


Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def capture_step(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    micro_batch: int | None = None,
    optimizer: Optimizer | None = None,
    label_smoothing: float = 0.0,
) -> StepDescription:
    """Describe one training step of `model` (adapted or stock, in any mode) on images (N, 3, H, W).

    The first micro-batch makes the gradients, the second adds to them, and any further one of the same size does what
    the second did: it is not described again.

    Args:
        model: left untouched.
        input_shape: of the whole batch.
        micro_batch: images at a time; None: all.
        optimizer: makes the optimizer from the trained parameters; its state is resident, as after a first step.
            None: no update.
        label_smoothing: of the cross entropy.

    Raises:
        InputError: nothing trains, or a micro-batch below 1.
    """
    size = input_shape[0] if micro_batch is None else micro_batch
    if size < 1:
        raise InputError(f"micro_batch is {size}: expected 1 or more")
    ghost = meta_copy(model).train()
    with FakeTensorMode():
        _make_fake_(ghost)
        trained = [p for p in ghost.parameters() if p.requires_grad]
        if not trained:
            raise InputError("nothing to train: no parameter requires gradients; adapt the model with adapt_ first")
        dtype = trained[0].dtype
        images = torch.empty(tuple(input_shape), dtype=dtype, memory_format=torch.channels_last)  # as a Loader's
        labels = torch.empty((input_shape[0],), dtype=torch.int64)
        update = None if optimizer is None else optimizer(trained)
        if update is not None:  # its state as it is after a first step
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            update.step()
            update.zero_grad(set_to_none=True)
        recorder = _Recorder(ghost, _resident(ghost, update, images, labels))
        with recorder, _watching(ghost, recorder):
            for x, target in _distinct(images.split(size), labels.split(size)):
                loss = len(x) / input_shape[0] * F.cross_entropy(ghost(x), target, label_smoothing=label_smoothing)
                recorder.enter("backward")
                loss.backward()
                del loss
                recorder.enter("forward")
            recorder.gradients(trained)
            recorder.enter("update")
            if update is not None:
                update.step()
    return recorder.description()


def _distinct(images: Sequence[Tensor], labels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The first two micro-batches, and the last one where that is smaller."""
    pieces = list(zip(images, labels, strict=True))
    return pieces[:2] + [piece for piece in pieces[2:] if len(piece[0]) != len(images[0])]


def _resident(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, *inputs: Tensor
) -> Iterator[tuple[Tensor, str, str]]:
    for name, parameter in model.named_parameters():
        yield parameter, "weight", name.rpartition(".")[0]
    for name, buffer in model.named_buffers():
        yield buffer, "statistics", name.rpartition(".")[0]
    for tensor in inputs:
        yield tensor, "input", ""
    names = {id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()}
    for parameter, state in () if optimizer is None else optimizer.state.items():
        for value in state.values():
            if isinstance(value, Tensor):
                yield value, "optimizer state", names.get(id(parameter), "")


class _Recorder(TorchDispatchMode):
    """Writes down every operator that is called while it is entered."""

    def __init__(self, model: nn.Module, resident: Iterable[tuple[Tensor, str, str]]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.storages: list[Storage] = []
        self.layer, self._phase = "", "forward"
        self._known: dict[int, int] = {}  # address of a living storage -> its number
        self._references: dict[int, StorageWeakRef] = {}  # of the step's own living storages
        self._held: list[Any] = []  # so that no resident storage's address is used again
        self._layers: dict[int, str] = {}  # number of a weight's storage -> its layer
        for tensor, role, layer in resident:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._held.append(storage)
                number = self._known[storage._cdata] = len(self.storages)
                self.storages.append(Storage(storage.nbytes(), role, layer, -1, None))
                self._layers[number] = layer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._bury()
        out = func(*args, **(kwargs or {}))
        made = tree_flatten(out)[0]
        if func is torch.ops.aten.native_group_norm.default:
            _stride_single_image_(made[0])
        extra = workspace_bytes(func, args)
        if not extra and not any(isinstance(value, Tensor) for value in made):
            return out
        read = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        inputs = tuple(dict.fromkeys(self._number(value) for value in read))
        here = len(self.operations)
        layer = self._owner(inputs)
        outputs = []
        for value in made:
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                storage = value.untyped_storage()
                number = self._known[storage._cdata] = len(self.storages)
                self._references[number] = StorageWeakRef(storage)
                self.storages.append(Storage(storage.nbytes(), "working", layer, here, None))
                outputs.append(number)
        if outputs or extra:  # a view, or an operation in place, changes no byte
            self.operations.append(Operation(str(func), self._phase, layer, inputs, tuple(outputs), extra))
        return out

    def enter(self, phase: str) -> None:
        """What comes now is of that phase; what is alive where backward begins was kept for it."""
        self._bury()
        if phase == "backward":
            for number in self._references:
                if self.storages[number].role == "working":
                    self.storages[number] = replace(self.storages[number], role="kept")
        self._phase = phase

    def gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Name the storages that hold the parameters' gradients now."""
        for parameter in parameters:
            if parameter.grad is not None:
                number = self._number(parameter.grad)
                self.storages[number] = replace(self.storages[number], role="gradient")

    def description(self) -> StepDescription:
        """What was written down."""
        return StepDescription(tuple(self.operations), tuple(self.storages))

    def _number(self, tensor: Tensor) -> int:
        return self._known.get(tensor.untyped_storage()._cdata, -1)

    def _owner(self, inputs: tuple[int, ...]) -> str:
        return next((self._layers[number] for number in inputs if self._layers.get(number)), self.layer)

    def _bury(self) -> None:
        """Note the storages that nobody refers to any more."""
        gone = [number for number, reference in self._references.items() if reference.expired()]
        for number in gone:
            reference = self._references.pop(number)
            del self._known[reference.cdata]
            self.storages[number] = replace(self.storages[number], dies=len(self.operations))


def _stride_single_image_(out: Tensor) -> None:
    """Give one channels-last image the strides that the CPU's operator gives it.

    PyTorch's shape rule of group norm leaves a batch stride there that convolutions, as shapes, do not take for
    channels-last: their outputs would be laid out otherwise, and copied, which no real step does.
    """
    if out.dim() == 4 and out.shape[0] == 1 and out.is_contiguous(memory_format=torch.channels_last):
        _, c, h, w = out.shape
        out.as_strided_(out.shape, (c * h * w, 1, w * c, c))


def _make_fake_(ghost: nn.Module) -> None:
    """Put fake tensors, on the CPU, of the same shapes, strides and types in the place of the meta ones."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in ghost.modules():
        table: Any
        for table in (module._parameters, module._buffers):
            table.update({name: fake(tensor) for name, tensor in table.items() if tensor is not None})


@contextmanager
def _watching(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder which layer is running in the forward pass."""
    paths = {module: path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        recorder.layer = paths.get(module, recorder.layer)

    # not a hook of each module: a module with hooks is called as a module, and no longer part of a chain
    handle = register_module_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()
