"""Trace a network: run a copy without memory once, and write down what each module's own forward does.

Every torch function passes through a `TorchFunctionMode`, every call of a child through a stand-in for its forward:
so the forward runs as ordinary Python on ordinary (meta) tensors, and may look at shapes, types and options as it
likes. Only what it does to values is recorded. What cannot be recorded faithfully is refused here, by the path of the
module that does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinytl.errors import UnsupportedLayerError
from tinytl.ops._made import made

from .frame import Frame, Trace, Traced, refuse
from .outcome import run_leaf
from .program import Call, Program, Ref, Size, leaves, replace_leaves
from .recorder import Recorder
from .sizes import KnownInt, known


def trace(ghost: nn.Module, args: tuple[Any, ...], is_leaf: Callable[[nn.Module], bool]) -> Trace:
    """Run `ghost`, a network on the meta device, on `args`, and return what its modules do.

    Args:
        ghost: gets stand-ins for its forwards while it is traced; in the mode (training or not) that is asked about.
        args: of its forward, on the meta device.
        is_leaf: modules that are called as they are.

    Raises:
        UnsupportedLayerError: a module that cannot be traced stands where a gradient flows.
    """
    with torch.enable_grad():
        return _Tracer(ghost, is_leaf).run(args)


class _Tracer(Recorder):
    def __init__(self, ghost: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__(ghost)
        self._ghost, self._is_leaf = ghost, is_leaf

    def run(self, args: tuple[Any, ...]) -> Trace:
        modules = list(self._ghost.modules())
        before = [vars(module).get("forward") for module in modules]
        for module in modules:
            module._backward_hooks.clear()  # they would run functions of their own
            module._backward_pre_hooks.clear()
            if self._traceable(module):
                vars(module)["forward"] = _StandIn(self, module)
        try:
            with self, _Unseen(self):
                self._ghost(*args)
        finally:
            for module, had in zip(modules, before, strict=True):
                vars(module).pop("forward", None)
                if had is not None:
                    vars(module)["forward"] = had
        return self.trace

    @staticmethod
    def _traceable(module: nn.Module) -> bool:
        return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or type(module).forward is not nn.Module.forward

    # ------------------------------------------------------------ modules

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the place of a module's forward."""
        if self._paused:
            return type(module).forward(module, *args, **kwargs)
        self._paused = True
        try:
            return self._call(module, args, kwargs)
        finally:
            self._paused = False

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = type(module).forward.__get__(module)
        path = self.names.paths[id(module)][0]
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outer = self.frames[-1] if self.frames else None
        template = None if outer is None else replace_leaves((args, kwargs), lambda leaf: self.names.name(outer, leaf))
        entry = self._enter(path, tensors)
        before = [(t, t._version) for t in tensors]
        if self._is_leaf(module):
            output, program = run_leaf(module, forward, args, kwargs), None
            self._use(path, module)
        else:
            output, program = self._forward(module, path, forward, args, kwargs)
        entry.plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        self._leave(path, module, entry, program, output)
        if outer is not None:
            assert template is not None
            self.mark_changed([t for t, version in before if t._version != version])
            self._record_call(outer, module, path, template, output, program)
        return output

    def _enter(self, path: str, tensors: list[Tensor]) -> Traced:
        shapes = [tuple(map(int, t.shape)) for t in tensors]
        return Traced(None, shapes, [], 1, False)

    def _leave(self, path: str, module: nn.Module, entry: Traced, program: Program | None, output: Any) -> None:
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        entry.outputs = [tuple(map(int, t.shape)) for t in tensors]
        entry.flows = any(t.requires_grad for t in tensors)
        entry.program = program
        entry.opaque = program is None and not self._is_leaf(module)
        known_already = self.trace.modules.get(path)
        if known_already is None:
            self.trace.modules[path] = entry
            return
        known_already.calls += 1
        known_already.flows |= entry.flows
        if known_already.program != program:
            refuse(path, module, "it is called in two different ways; make it two modules")

    def _forward(
        self,
        module: nn.Module,
        path: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Program | None]:
        seen, used = dict(self.trace.modules), dict(self.trace.parameters)
        held = dict(vars(module))
        try:
            made = self._record(module, path, forward, args, kwargs)
            changed = [name for name, value in vars(module).items() if held.get(name, self) is not value]
            if changed:
                refuse(path, module, f"its forward sets {changed[0]!r}, which a traced forward would not")
            return made
        except UnsupportedLayerError as refusal:
            tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            frozen = not any(t.requires_grad for t in tensors)
            if path == "" or not frozen or any(p.requires_grad for p in module.parameters()):
                raise
            # No gradient comes here: it stays as it is, and so does all that it calls.
            self.trace.modules, self.trace.parameters = seen, used
            self._use(path, module)
            return self._left_alone(module, forward, args, kwargs, refusal), None

    def _left_alone(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, refusal: UnsupportedLayerError
    ) -> Any:
        """Run what could not be traced: it must run without values, and change nothing of its own."""
        versions = [(buffer, buffer._version) for buffer in module.buffers()]
        try:
            output = forward(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            raise refusal from None
        if any(buffer._version != version for buffer, version in versions):
            raise refusal
        return output

    def _record(
        self,
        module: nn.Module,
        path: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Program]:
        frame = Frame(module, path)
        inputs: Any = replace_leaves((args, kwargs), lambda leaf: self._enter_value(frame, leaf)[0])
        inner_args, inner_kwargs = replace_leaves((args, kwargs), lambda leaf: self._enter_value(frame, leaf)[1])
        self.frames.append(frame)
        try:
            self._paused = False
            output = forward(*inner_args, **inner_kwargs)
            self._paused = True
            named = replace_leaves(output, lambda leaf: self.names.name(frame, leaf))
        except (RuntimeError, NotImplementedError) as error:
            if "meta tensor" in str(error) and "item" in str(error):
                reason = "its forward depends on values (a branch, a loop or an index by what a tensor holds)"
                refuse(path, module, reason)
            raise
        finally:
            self._paused = True
            self.frames.pop()
        return output, Program(inputs, tuple(frame.steps), named)

    def _enter_value(self, frame: Frame, leaf: Any) -> tuple[Any, Any]:
        """For a leaf of the arguments: what stands for it in the program, and what the forward is given."""
        if isinstance(leaf, Tensor):
            if id(leaf) not in frame.values:
                frame.bind(leaf)
            return frame.values[id(leaf)], leaf
        if isinstance(leaf, KnownInt):
            if id(leaf) not in frame.numbers:
                frame.numbers[id(leaf)] = Ref(frame.count)
                frame.count += 1
            ref = frame.numbers[id(leaf)]
            return ref, known(int.__int__(leaf), Size("number", (ref,)), frame)
        return leaf, leaf

    def _record_call(
        self, frame: Frame, module: nn.Module, path: str, template: Any, output: Any, program: Program | None
    ) -> None:
        relative = self.names.relative(frame, self.names.paths[id(module)])
        if relative is None:
            refuse(frame.path, frame.module, f"it calls {path!r}, which is not inside it")
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        outs = tuple(frame.bind(t) for t in tensors)
        flows = any(t.requires_grad for t in tensors)
        args, kwargs = template
        frame.steps.append(Call(args, kwargs, outs, flows=flows, path=relative))

    def _use(self, path: str, module: nn.Module) -> None:
        for name, _ in module.named_parameters(prefix=path):
            self.trace.parameters.setdefault(name, len(self.trace.parameters))


class _Unseen(TorchDispatchMode):
    """Operations that no torch function called (a scripted function's) leave no step, and so neither do their parts.

    Whoever uses what they make is refused then.
    """

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.tracer.paused():
            return made(func, args, kwargs or {})


@dataclass(eq=False)
class _StandIn:
    tracer: _Tracer
    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.call(self.module, args, kwargs)
