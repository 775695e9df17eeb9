"""Find a network's blocks and its classifier in its trace: by how values flow, not by what things are called.

The *spine* of a forward is what every path from its input to its output goes through. A *block* is a module on the
spine of every forward around it, with one image in and one out, in whose own forward

- a convolution lies off the spine, and what goes around it is added to or concatenated with what went through
  (a residual block, an inception or dense block; where it is multiplied, it is a gate, and part of its block);
- or, without such a shortcut, two or more convolutions follow one another, and the module is of the type of a block,
  or stands in one sequence with blocks, or is one of several alike where the network has no shortcut at all.

What holds blocks is a stage. A single convolution on the spine (stem, transition, head) is no block, and neither is
what stands beside the stages in the network's outermost forward.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .frame import Trace
from .program import ADDITIONS, Call, Function, Lean, Program, Ref, Step

_JOINS = (*ADDITIONS, "torch.cat", "torch.concat", "torch.concatenate", "torch.stack", "torch.sum", "torch.Tensor.sub")


def find_blocks(network: nn.Module, trace: Trace) -> list[str]:
    """Paths of the blocks in forward order; none if there are none by the rule above."""
    finder = _Finder(network, trace)
    found = finder.with_shortcut("")
    kinds = {type(finder.module(path)) for path in found} - {nn.Sequential}
    if not found:
        found = finder.alike("")
        kinds = {type(finder.module(path)) for path in found} - {nn.Sequential}
    return finder.all_blocks("", set(found), kinds) if found else []


def find_classifier(network: nn.Module, trace: Trace) -> str | None:
    """Path of the layer that makes the output: the last with parameters, if it is linear or a 1x1 convolution."""
    if not trace.parameters:
        return None
    path = list(trace.parameters)[-1].rpartition(".")[0]
    layer = network.get_submodule(path)
    pointwise = isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) == (1, 1)
    return path if path and (pointwise or isinstance(layer, nn.Linear)) else None


def find_shape(trace: Trace, path: str) -> tuple[int, int, int] | None:
    """(in channels, out channels, stride) of the block at `path`, as measured; None unless it maps image to image."""
    entry = trace.get(path)
    if entry is None or not entry.plain or [len(shape) for shape in (*entry.inputs, *entry.outputs)] != [4, 4]:
        return None
    (_, channels, height, width), (_, out, small, narrow) = entry.inputs[0], entry.outputs[0]
    return channels, out, max(1, round(max(height / small, width / narrow)))


class _Finder:
    def __init__(self, network: nn.Module, trace: Trace) -> None:
        self._modules = dict(network.named_modules(remove_duplicate=False))
        self._trace = trace
        self._counts: dict[str, int] = {}

    def module(self, path: str) -> nn.Module:
        return self._modules[path]

    def with_shortcut(self, path: str) -> list[str]:
        """Blocks of the first kind at or under `path`."""
        program = self._program(path)
        if program is None or not self._convolutions(path):
            return []
        spine = _spine(program)
        if path and self._images(path):
            off = sum(self._weight(path, s) for s, on in zip(program.steps, spine, strict=True) if not on)
            joined = any(isinstance(s, Function) and s.name in _JOINS and len(_flow(s)) > 1 for s in program.steps)
            if off:
                return [path] if joined else []
        return [found for child in self._children(path) for found in self.with_shortcut(child)]

    def alike(self, path: str) -> list[str]:
        """Where there is no shortcut: several of one type, with two convolutions or more each, in one sequence."""
        children = self._children(path)
        deeper = [found for child in children for found in self.alike(child)]
        if deeper:
            return deeper
        several = [child for child in children if self._convolutions(child) > 1 and self._images(child)]
        kinds = [type(self.module(child)) for child in several]
        return [self._innermost(child) for child, kind in zip(several, kinds, strict=True) if kinds.count(kind) > 1]

    def all_blocks(self, path: str, known: set[str], kinds: set[type[nn.Module]]) -> list[str]:
        """`known`, and the blocks without a shortcut among them."""
        found: list[str] = []
        children = self._children(path)
        holding = {child for child in children if any(b == child or b.startswith(f"{child}.") for b in known)}
        for child in children:
            if child in known or (type(self.module(child)) in kinds and self._images(child)):
                found.append(child)
            elif child in holding:
                found += self.all_blocks(child, known, kinds)
            elif path and holding and self._convolutions(child) > 1 and self._images(child):
                found += self.all_blocks(child, known, kinds) or [self._innermost(child)]
            else:
                found += self.all_blocks(child, known, kinds)
        return found

    def _innermost(self, path: str) -> str:
        """Through sequences of one: the module that is all that is in them."""
        children = self._children(path)
        alone = len(children) == 1 and isinstance(self.module(path), nn.Sequential)
        return self._innermost(children[0]) if alone and self._convolutions(children[0]) > 1 else path

    def _children(self, path: str) -> list[str]:
        """Children with convolutions on the spine of a forward, in forward order, each called once."""
        program = self._program(path)
        if program is None:
            return []
        steps = zip(program.steps, _spine(program), strict=True)
        paths = [_join(path, step.path) for step, on in steps if on and isinstance(step, Call)]
        return [p for p in paths if self._convolutions(p) and self._calls(p) == 1]

    def _calls(self, path: str) -> int:
        entry = self._trace.get(path)
        return 0 if entry is None else entry.calls

    def _images(self, path: str) -> bool:
        return find_shape(self._trace, path) is not None

    def _program(self, path: str) -> Program | None:
        entry = self._trace.get(path)
        return None if entry is None else entry.program

    def _convolutions(self, path: str) -> int:
        """How many convolutions the forward at `path` runs."""
        if path not in self._counts:
            program = self._program(path)
            if program is None:
                layers = self.module(path).modules() if self._trace.get(path) is not None else ()
                self._counts[path] = sum(isinstance(m, nn.Conv2d) for m in layers)
            else:
                self._counts[path] = sum(self._weight(path, step) for step in program.steps)
        return self._counts[path]

    def _weight(self, path: str, step: Step) -> int:
        if isinstance(step, Call):
            return self._convolutions(_join(path, step.path))
        return int(isinstance(step, Lean) and type(step.op).__name__ == "Conv2d")


def _spine(program: Program) -> list[bool]:
    """For each step whether every path from the inputs to the output goes through it: by counting paths."""
    made = {out: at for at, step in enumerate(program.steps) for out in step.outs}
    inputs = set(_indices(program.inputs))
    into: list[int] = []
    for step in program.steps:
        into.append(sum(1 if i in inputs else into[made[i]] for i in _flow(step) if i in inputs or i in made))
    onward = [0] * len(program.steps)
    results = _indices(program.output)
    for i in results:
        if i in made:
            onward[made[i]] += 1
    for at in reversed(range(len(program.steps))):
        for i in _flow(program.steps[at]):
            if i in made:
                onward[made[i]] += onward[at]
    total = sum(1 if i in inputs else into[made[i]] for i in results if i in inputs or i in made)
    return [bool(total) and a * b == total for a, b in zip(into, onward, strict=True)]


def _flow(step: Step) -> list[int]:
    """Values that a step takes, sizes of others left out."""
    return _indices((step.args, step.kwargs))


def _indices(structure: Any) -> list[int]:
    if isinstance(structure, Ref):
        return [structure.index]
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    return [i for entry in structure for i in _indices(entry)] if isinstance(structure, (tuple, list)) else []


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
