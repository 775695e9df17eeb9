"""Writes down every operator that runs while it is entered, on tensors without memory.

Each storage has one token, which all ghosts of it hold (`tinytl.ops._ghost`): when the last of them dies, on the CPU at
the very moment at which the allocator would get the memory back, so does the token, and says so here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinytl.ops._ghost import Ghost
from tinytl.ops._made import made

from .description import Operation, StepDescription, Storage
from .shape_rules import RULES, multiply_adds
from .workspace import has_workspace, workspace_bytes

_CPU, _META = torch.device("cpu"), torch.device("meta")
_DEVICE = torch.ops.prim.device.default


class _Token:
    """Dies with its storage."""

    __slots__ = ("buried", "cdata", "number")

    def __init__(self, number: int, cdata: int, buried: Callable[[int, int], None]) -> None:
        self.number, self.cdata, self.buried = number, cdata, buried

    def __del__(self) -> None:
        self.buried(self.number, self.cdata)


@dataclass
class _Record:
    """A storage while its step is being written down."""

    __slots__ = ("born", "bytes", "layer", "role")
    bytes: int
    role: str
    layer: str
    born: int


class Recorder(TorchDispatchMode):
    """The mode in which a step runs to be described."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []  # the fields of each `Operation`
        self.layer = ""
        self._storages: list[_Record] = []
        self._phase = ""  # '': nothing is written down yet
        self._tokens: dict[int, Any] = {}  # address of a living storage -> a weak hold on its token's number
        self._dies: dict[int, int] = {}
        self._layers: dict[int, str] = {}  # number of a resident storage -> its layer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: the guard that PyTorch would put around every call costs as much as the call."""
        return False

    def resident(self, meta: Tensor, role: str, layer: str) -> Ghost:
        """A ghost of a tensor that is alive before the step."""
        ghost = self._new(meta, role, layer, -1)
        self._layers[ghost.token.number] = layer  # pyright: ignore[reportAttributeAccessIssue]
        return ghost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return _CPU
        read: list[Ghost] = []
        operator = _operator(func)
        plain = [_plain(value, read) for value in args]
        named = {key: _plain(value, read) for key, value in kwargs.items()} if kwargs else {}
        if operator.rule is not None:
            out = operator.rule(*plain, **named)
        else:
            if operator.takes_device and (not read or named.get("device") is not None):
                named["device"] = _META
            out = made(func, plain, named)
        extra = workspace_bytes(func, args) if operator.has_workspace else 0
        born: list[int] = []
        out = self._haunt(out, read, born)
        if self._phase and (born or extra):  # a view, or an operation in place, changes no byte
            inputs = tuple(dict.fromkeys(ghost.token.number for ghost in read))  # pyright: ignore
            self.layer = next((self._layers[n] for n in inputs if self._layers.get(n)), self.layer)
            for number in born:
                self._storages[number].layer = self.layer
            work = multiply_adds(func, plain, out)
            self.operations.append((operator.name, self._phase, self.layer, inputs, tuple(born), extra, work))
        return out

    def enter(self, phase: str) -> None:
        """What comes now is of that phase; what is alive where backward begins was kept for it."""
        if phase == "backward":
            for number in self._tokens.values():
                if self._storages[number].role == "working":
                    self._storages[number].role = "kept"
        self._phase = phase

    def call(self, tensors: Iterable[Tensor | None], role: str, *, before: bool = False) -> None:
        """Give the tensors' storages that role; `before`: they are as if they had been alive before the step."""
        for tensor in tensors:
            if isinstance(tensor, Ghost):
                record = self._storages[tensor.token.number]  # pyright: ignore[reportAttributeAccessIssue]
                record.role, record.born = role, -1 if before else record.born

    def description(self) -> StepDescription:
        """What was written down: operations, and storages that were alive while one of them ran."""
        last = len(self.operations)
        numbers, storages = {}, []
        for number, record in enumerate(self._storages):
            dies = self._dies.get(number)
            if record.born < 0 and dies == 0:
                continue  # made and gone before the step
            numbers[number] = len(storages)
            dies = dies if dies is None or dies < last else last
            storages.append(Storage(record.bytes, record.role, record.layer, record.born, dies))
        operations = tuple(
            Operation(name, phase, layer, _renumbered(inputs, numbers), _renumbered(outputs, numbers), extra, work)
            for name, phase, layer, inputs, outputs, extra, work in self.operations
        )
        return StepDescription(operations, tuple(storages))

    def _new(self, meta: Tensor, role: str, layer: str, born: int) -> Ghost:
        storage = meta.untyped_storage()
        number = self._tokens[storage._cdata] = len(self._storages)
        self._storages.append(_Record(storage.nbytes(), role, layer, born))
        return Ghost(meta, _Token(number, storage._cdata, self._bury))

    def _bury(self, number: int, cdata: int) -> None:
        self._dies[number] = len(self.operations) if self._phase else 0
        self._tokens.pop(cdata, None)

    def _haunt(self, out: Any, read: list[Ghost], born: list[int]) -> Any:
        """`out` with ghosts in the place of meta tensors: the one given, a view of it, or a new one."""
        if isinstance(out, Tensor):
            for ghost in reversed(read):
                if ghost.elem is out:
                    return ghost
            cdata = out.untyped_storage()._cdata
            for ghost in read:
                if ghost.token.cdata == cdata:  # pyright: ignore[reportAttributeAccessIssue]
                    return Ghost(out, ghost.token)
            new = self._new(out, "working", self.layer, len(self.operations) if self._phase else -1)
            born.append(new.token.number)  # pyright: ignore[reportAttributeAccessIssue]
            return new
        if isinstance(out, (tuple, list)):
            return type(out)(self._haunt(value, read, born) for value in out)
        return out


class _Operator(NamedTuple):
    """What is looked up of an operator at each of its calls."""

    name: str
    rule: Callable[..., Any] | None
    takes_device: bool
    has_workspace: bool


_operators: dict[int, tuple[Any, _Operator]] = {}  # by id, and holding what has it: an operator's own hash is slow


def _operator(func: Any) -> _Operator:
    found = _operators.get(id(func))
    if found is None:
        takes_device = any(argument.name == "device" for argument in func._schema.arguments)
        found = func, _Operator(str(func), RULES.get(func), takes_device, has_workspace(func))
        _operators[id(func)] = found
    return found[1]


def _plain(value: Any, read: list[Ghost]) -> Any:
    """`value` with the meta tensors behind its ghosts, which are noted."""
    if isinstance(value, Ghost):
        read.append(value)
        return value.elem
    if isinstance(value, Tensor) and value.device.type == "cpu":  # a constant, made of numbers outside the step
        return torch.empty_like(value, device="meta")
    if isinstance(value, (tuple, list)) and any(isinstance(item, Ghost) for item in value):
        return type(value)(_plain(item, read) for item in value)
    return value


def _renumbered(inputs: tuple[int, ...], numbers: dict[int, int]) -> tuple[int, ...]:
    return tuple(numbers[number] for number in inputs if number in numbers)
