"""Lowering of modules with a forward of their own: it is replaced, on the instance, by the program that was traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from tinytl.graph.capture import Captured
from tinytl.graph.constants import freeze_constants_
from tinytl.graph.forward import TracedForward
from tinytl.graph.frame import label
from tinytl.graph.program import Attr, Call, Lean, Program, Ref, Segment, Step, replace_leaves, uses
from tinytl.graph.regions import with_regions
from tinytl.nn.layers import Residual, ShortcutBlock, SqueezeExcite
from tinytl.nn.lean import is_hooked
from tinytl.nn.lite_residual import LiteBlock
from tinytl.ops.batch_norm import FrozenBatchNorm

OWN_CONTAINERS = (Residual, ShortcutBlock, LiteBlock, SqueezeExcite)
"""Exact types whose lean form is a module of ours."""

Programs = dict[str, Program]


class TracedModules:
    """The programs of one network, for `Lowering`.

    Args:
        network: what they were traced from, or a copy of it.
        captured: its traces.
        blocks: paths of its blocks.
    """

    def __init__(self, network: nn.Module, captured: Captured, blocks: Sequence[str]) -> None:
        inner = [_inside_lite(network, path) for path in blocks]
        self.training: Programs = with_regions(network, captured.training, inner, OWN_CONTAINERS)
        self.evaluation: Programs = self.training
        if captured.evaluation is not captured.training:
            self.evaluation = with_regions(network, captured.evaluation, inner, OWN_CONTAINERS)
        self._traces = (captured.training, captured.evaluation)

    def calls(self, path: str) -> tuple[int, ...]:
        """How often the module at `path` is called: in training, and in evaluation mode."""
        found = [trace.get(path) for trace in self._traces]
        return tuple(0 if entry is None else entry.calls for entry in found)

    def is_opaque(self, path: str) -> bool:
        """Whether it could not be traced and has no gradient: it stays as it is, with all that is in it."""
        return any(entry is not None and entry.opaque for entry in (trace.get(path) for trace in self._traces))

    def has(self, path: str) -> bool:
        """Whether the module at `path` runs a program."""
        return path in self.training and path in self.evaluation

    def has_region(self, path: str) -> bool:
        """Whether that program has a region of its own, which no container of ours would run."""
        return self.has(path) and any(isinstance(step, Segment) for step in self._steps(path))

    def is_lent(self, path: str) -> bool:
        """Whether a forward other than its own uses the tensors of the module at `path`: they must not change."""
        return any(path in trace.lent for trace in self._traces)

    def attach_(self, module: nn.Module, path: str) -> None:
        """Put the program in the place of the module's forward."""
        training = freeze_constants_(module, self.training[path])
        same = self.evaluation[path] == self.training[path]
        evaluation = training if same else freeze_constants_(module, self.evaluation[path])
        vars(module)["forward"] = TracedForward(module, label(path, module), training, evaluation)

    def pairs(self, module: nn.Module, path: str) -> list[tuple[str, str]]:
        """Names of children that are always called one right after the other, and nowhere else: (first, second)."""
        if not self.has(path):
            return []
        found = _neighbours(self.training[path])
        if self.evaluation[path] != self.training[path]:
            found = [pair for pair in _neighbours(self.evaluation[path]) if pair in found]
        return [pair for pair in found if all(self._is_free(module, path, name) for name in pair)]

    def _is_free(self, module: nn.Module, path: str, name: str) -> bool:
        full = f"{path}.{name}" if path else name
        return (
            self.calls(full) == self.calls(path)
            and not self.is_lent(full)
            and not is_hooked(module.get_submodule(name))
        )

    def starts_with_its_norm(self, norm: nn.Module, path: str) -> bool:
        """Whether the forward at `path` is that of a batch norm, with perhaps more behind it."""
        if not self.has(path) or not isinstance(norm, nn.BatchNorm2d):
            return False
        return all(_is_norm(programs[path], norm) for programs in (self.training, self.evaluation))

    def without_its_norm_(self, norm: Any, path: str) -> None:
        """Take the normalization out of that forward, and its tensors out of the module: a convolution has both."""
        for programs in (self.training, self.evaluation):
            if _is_norm(programs[path], norm):  # both may be one
                programs[path] = _without_first(programs[path])
        for name in ("weight", "bias"):
            norm._parameters[name] = None
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            norm._buffers[name] = None

    def _steps(self, path: str) -> tuple[Step, ...]:
        return (*self.training[path].steps, *self.evaluation[path].steps)


def _inside_lite(network: nn.Module, path: str) -> str:
    return f"{path}.block" if type(network.get_submodule(path)) is LiteBlock else path


def _neighbours(program: Program) -> list[tuple[str, str]]:
    """Children of which the second takes what the first makes, and nobody else does."""
    steps = [inner for s in program.steps for inner in (s.steps if isinstance(s, Segment) else (s,))]
    counts = uses(steps, program.output)
    makers = {s.outs[0]: s.path for s in steps if isinstance(s, Call) and len(s.outs) == 1}
    found = []
    for step in steps:
        if not isinstance(step, Call) or step.kwargs or len(step.args) != 1:
            continue
        ref = step.args[0]
        if isinstance(ref, Ref) and ref.index in makers and counts[ref.index] == 1:
            found.append((makers[ref.index], step.path))
    return found


_OWN_TENSORS = (Attr("weight"), Attr("bias"), Attr("running_mean"), Attr("running_var"))


def _is_norm(program: Program, norm: nn.BatchNorm2d) -> bool:
    given = program.only_input
    if not program.steps or given is None:
        return False
    first = program.steps[0]
    if not isinstance(first, Lean) or first.op != FrozenBatchNorm(norm.eps) or first.args[0] != given:
        return False
    expected = tuple(None if getattr(norm, attr.path) is None else attr for attr in _OWN_TENSORS)
    return first.args[1] == expected and uses(program.steps, program.output)[given.index] == 1


def _without_first(program: Program) -> Program:
    first = program.steps[0]

    def change(leaf: Any) -> Any:
        return program.only_input if leaf == Ref(first.outs[0]) else leaf

    steps = tuple(
        dataclasses.replace(step, args=replace_leaves(step.args, change), kwargs=replace_leaves(step.kwargs, change))
        for step in program.steps[1:]
    )
    return dataclasses.replace(program, steps=steps, output=replace_leaves(program.output, change))
