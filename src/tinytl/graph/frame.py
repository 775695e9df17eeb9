"""What a trace consists of: the frames of running forwards, and names for what is in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tinytl.errors import UnsupportedLayerError

from .program import Attr, Check, Device, Program, Ref, Step
from .sizes import KnownFloat, KnownInt


@dataclass
class Traced:
    """One module's trace.

    Attributes:
        program: None for a leaf, and for a module without gradients that could not be traced (`opaque`).
        inputs, outputs: shapes of the tensors that its first call took and gave.
        calls: how often it was called.
        flows: whether a gradient flows through its output.
        plain: it takes one tensor, by position, and gives one.
    """

    program: Program | None
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    calls: int
    flows: bool
    opaque: bool = False
    plain: bool = False


@dataclass
class Trace:
    """What a run of the whole network showed.

    Attributes:
        modules: every module that was called, by path, the network itself at ''; one that has several paths stands
            at the first.
        first: any path of a module -> its first one, for those that have several.
        lent: paths of modules whose tensors are used by a forward other than their own.
        parameters: paths of the parameters and buffers, in the order in which they were first used.
    """

    modules: dict[str, Traced] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    lent: set[str] = field(default_factory=set)
    parameters: dict[str, int] = field(default_factory=dict)

    def get(self, path: str) -> Traced | None:
        """The trace of the module at `path`, None if it was not called."""
        return self.modules.get(self.first.get(path, path))

    def leave_alone(self, path: str) -> None:
        """The module at `path` stays as it is, with all that is in it."""
        entry = self.modules[path]
        entry.program, entry.opaque = None, True
        for inner in [inner for inner in self.modules if inner.startswith(f"{path}.")]:
            del self.modules[inner]


class Frame:
    """One running forward."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path = module, path
        self.values: dict[int, Ref] = {}  # by id of the tensor, which `alive` holds
        self.alive: list[Tensor] = []
        self.count = 0
        self.steps: list[Step] = []
        self.constant: set[int] = set()  # values that depend on the module's own tensors alone
        self.stale: dict[int, str] = {}
        self.numbers: dict[int, Ref] = {}  # by id of the number

    def check(self, op: str, args: tuple[Any, ...], outcome: bool) -> None:
        """The forward compared sizes."""
        step = Check(args, {}, (), op=op, outcome=outcome)
        if step not in self.steps:
            self.steps.append(step)

    def bind(self, tensor: Tensor) -> int:
        """Give the tensor a number: a new one if it has one, since what is in it is new."""
        self.values[id(tensor)] = Ref(self.count)
        self.stale.pop(id(tensor), None)
        self.alive.append(tensor)
        self.count += 1
        return self.count - 1


def label(path: str, module: nn.Module) -> str:
    """How a module is named in a message."""
    return f"{path} ({type(module).__name__})" if path else f"the network itself ({type(module).__name__})"


def refuse(path: str, module: nn.Module, reason: str) -> NoReturn:
    """Raise UnsupportedLayerError for that module."""
    raise UnsupportedLayerError(f"{label(path, module)}: cannot be adapted exactly: {reason}")


class Names:
    """Where the modules and tensors of a network are in it, and what stands for a value in a program."""

    def __init__(self, ghost: nn.Module, trace: Trace) -> None:
        self._trace = trace
        self.paths: dict[int, list[str]] = {}  # of a module, by its id
        self.owners: dict[int, list[str]] = {}  # of a tensor of the network
        for path, module in ghost.named_modules(remove_duplicate=False):
            paths = self.paths.setdefault(id(module), [])
            paths.append(path)
            trace.first.update({path: paths[0]} if len(paths) > 1 else {})
            for name, tensor in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
                if isinstance(tensor, Tensor):
                    self.owners.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)

    def name(self, frame: Frame, leaf: Any) -> Any:
        """What stands for `leaf` in the frame's program."""
        if isinstance(leaf, Tensor):
            return self._tensor(frame, leaf)
        if isinstance(leaf, (KnownInt, KnownFloat)):
            if leaf.frame is not frame:  # from a forward outside: it came in as it is
                return int(leaf) if isinstance(leaf, int) else float(leaf)
            return leaf.expression
        if isinstance(leaf, (torch.device, str)) and str(leaf) == "meta":
            return Device()
        if isinstance(leaf, nn.Module):
            refuse(frame.path, frame.module, "it hands a module on as an argument")
        return leaf

    def _tensor(self, frame: Frame, tensor: Tensor) -> Ref | Attr:
        if id(tensor) in frame.stale:
            refuse(frame.path, frame.module, f"it uses {frame.stale[id(tensor)]}; write it without in-place steps")
        if isinstance(tensor.grad_fn, torch.autograd.function.BackwardCFunction):
            refuse(frame.path, frame.module, "it calls an autograd.Function of its own, whose backward is not known")
        if id(tensor) in frame.values:
            return frame.values[id(tensor)]
        owners = self.owners.get(id(tensor))
        if owners is None:
            refuse(
                frame.path,
                frame.module,
                "it uses a tensor that is neither its input, parameter or buffer nor made by a torch function (a "
                "scripted one is none); register it as a buffer",
            )
        relative = self.relative(frame, owners)
        if relative is None:
            refuse(frame.path, frame.module, f"it uses {owners[0]!r}, which is not inside it")
        self._trace.parameters.setdefault(owners[0], len(self._trace.parameters))
        if "." in relative:
            holder = f"{frame.path}.{relative}" if frame.path else relative
            self._trace.lent.add(holder.rpartition(".")[0])
        return Attr(relative)

    @staticmethod
    def relative(frame: Frame, paths: list[str]) -> str | None:
        """The shortest of the paths that are inside the frame's module, as seen from there."""
        start = len(frame.path) + 1 if frame.path else 0
        inside = [path[start:] for path in paths if not frame.path or path.startswith(f"{frame.path}.")]
        return min(inside, key=lambda path: path.count("."), default=None)
