"""Write down what a running forward does to values: a `TorchFunctionMode` that sees every torch function."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from .frame import Frame, Names, Trace, refuse
from .lean_steps import lean_call
from .outcome import has_effect, resized, shape_of
from .program import Function, Lean, Size, Step, function, leaves, replace_leaves
from .sizes import known
from .watch import Watch


class Recorder(TorchFunctionMode):
    """Records into the innermost frame, unless paused.

    Attributes:
        trace: of the whole network.
        names: of its modules and tensors.
        frames: the running forwards, the innermost last.
    """

    def __init__(self, ghost: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.names = Names(ghost, self.trace)
        self.frames: list[Frame] = []
        self._resident = {t.untyped_storage()._cdata for t in (*ghost.parameters(), *ghost.buffers())}
        self._paused = False  # what is called now is not the network's own forward

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is called meanwhile is not the network's own forward."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or not self.frames:
            return func(*args, **kwargs)
        self._paused = True
        frame = self.frames[-1]
        try:
            name = _public_name(func)
            sizes = self._sizes(frame, name, args, kwargs)
            return self._function(frame, name, func, args, kwargs) if sizes is None else sizes
        finally:
            self._paused = False

    def _sizes(self, frame: Frame, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A question about the shape of a tensor of the frame, answered with numbers that remember it."""
        if name not in _SHAPE or not isinstance(args[0], Tensor) or id(args[0]) not in frame.values:
            return None
        tensor, ref = args[0], frame.values[id(args[0])]
        shape = tuple(tensor.shape)
        # Axis 1 of images and of feature vectors is channels: a property of the network.
        told = [
            size if axis == 1 and len(shape) in (2, 4) else known(size, Size("size", (ref, axis)), frame)
            for axis, size in enumerate(shape)
        ]
        if name == "torch.Tensor.__len__":
            return int(shape[0])
        if name == "torch.Tensor.numel":
            total: Any = 1
            for size in told:
                total = size * total
            return total
        axis = args[1] if len(args) > 1 else kwargs.get("dim")
        return torch.Size(told) if axis is None else told[axis]

    def _function(self, frame: Frame, name: str | None, func: Any, args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        template = replace_leaves((args, kwargs), lambda leaf: self.names.name(frame, leaf)) if given else None
        versions = [t._version for t in given]
        watch = Watch(self._resident)
        lean = lean_call(name, args, kwargs) if name is not None else None
        if lean is not None and not has_effect(name, lean):
            output = shape_of(lean)
        else:
            output = resized(name, args, kwargs)
            if output is None:
                with watch:
                    output = func(*args, **kwargs)
        changed = [t for t, version in zip(given, versions, strict=True) if t._version != version]
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        if not tensors and not changed:
            return output
        if name is None or name.endswith(".__set__") or name in _REFUSED:
            spelled = name or getattr(func, "__name__", str(func))
            refuse(frame.path, frame.module, f"it calls {spelled}, which cannot be traced")
        if name == "torch.nn.functional.batch_norm" and lean is None:
            refuse(frame.path, frame.module, "it normalizes by the batch that it sees; use running statistics")
        if template is None:  # it makes a tensor from numbers
            template = replace_leaves((args, kwargs), lambda leaf: self.names.name(frame, leaf))
            if any(t.device.type != "meta" for t in tensors):
                output = replace_leaves(output, lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf)
                tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        for t in changed:
            if id(t) in self.names.owners:
                refuse(frame.path, frame.module, f"its forward changes {self.names.owners[id(t)][0]!r}")
        self.mark_changed(changed)
        results = tensors or changed[:1]
        step = self._step(frame, name, lean, template, watch)
        refs = [ref.index for ref in step.refs()]
        constant = bool(results) and not watch.random and all(i in frame.constant for i in refs)
        constant = constant and not any(isinstance(leaf, Size) for leaf in _numbers(template))
        outs = tuple(frame.bind(t) for t in results)
        frame.constant.update(outs if constant else ())
        flows = any(t.requires_grad for t in results)
        keeps = step.keeps and not constant
        flags = {"flows": flows, "keeps": keeps, "random": watch.random, "constant": constant}
        frame.steps.append(dataclasses.replace(step, outs=outs, **flags))
        return output

    def _step(self, frame: Frame, name: str, lean: Any, template: Any, watch: Watch) -> Step:
        if lean is not None and id(lean[1]["input"]) in frame.values:
            (op, tensors), bound = lean
            named = tuple(None if t is None or bound[t] is None else self.names.name(frame, bound[t]) for t in tensors)
            return Lean((self.names.name(frame, bound["input"]), named), {}, (), op=op)
        args, kwargs = template
        spelled, kwargs = _out_of_place(name, kwargs)
        return Function(args, kwargs, (), keeps=watch.keeps_images, name=spelled)

    def mark_changed(self, changed: list[Tensor]) -> None:
        """A tensor was written to: older names of the same memory, here and outside, no longer say what is in it."""
        for t in changed:
            storage = t.untyped_storage()._cdata
            for depth, frame in enumerate(self.frames):
                inner = depth == len(self.frames) - 1
                for other in frame.alive:
                    if other.untyped_storage()._cdata == storage and not (inner and other is t):
                        frame.stale[id(other)] = "a value that was overwritten through another name for it"


_SHAPE = ("torch.Tensor.shape.__get__", "torch.Tensor.size", "torch.Tensor.__len__", "torch.Tensor.numel")
_REFUSED = ("torch.as_strided", "torch.Tensor.as_strided", "torch.Tensor.set_", "torch.Tensor.data_ptr")


def _public_name(func: Any) -> str | None:
    """What a program calls the function; None if it cannot be found again by a name."""
    name = resolve_name(func)
    if name is None:
        guess = f"torch.{getattr(func, '__name__', '')}"
        name = guess if getattr(torch, guess[6:], None) is func else None
    return name


def _numbers(template: Any) -> Iterator[Any]:
    """The expressions of sizes in a template."""
    found: list[Any] = []
    replace_leaves(template, lambda leaf: found.append(leaf) or leaf)
    return (leaf for leaf in found if isinstance(leaf, Size))


def _out_of_place(name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The same function without overwriting, where there is one: what it would overwrite may be needed."""
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
    if name.endswith("_") and not name.endswith("__"):
        with contextlib.suppress(AttributeError):
            function(name[:-1])
            return name[:-1], kwargs
    return name, kwargs
