"""Which stretches of which forwards keep only what goes into them.

A step for which autograd would save whole images, and which is no lean operation (a gate, a layer norm, an attention),
runs inside a region. The larger the region the less is kept between the passes, and the more lives while it runs again.
So the region is the block that the step belongs to: the network's own unit of depth. Where it belongs to no block, it
is the module whose forward has the step; and in a module that itself holds blocks, as short a stretch as can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from torch import nn

from .frame import Trace
from .program import Call, Program, Ref, Segment, Step, uses


def with_regions(
    network: nn.Module, trace: Trace, blocks: Collection[str], fixed_forward: Collection[type[nn.Module]]
) -> dict[str, Program]:
    """The programs of `trace` by path, with segments where they are needed.

    Args:
        network: what was traced.
        blocks: paths of its blocks.
        fixed_forward: types of modules that do not run their program: a region is not there but inside.
    """
    programs = {path: entry.program for path, entry in trace.modules.items() if entry.program is not None}
    plan = _Plan(network, programs, trace.first, fixed_forward)
    whole = {path for path in blocks if plan.can_be_region(path) and plan.keeps(path)}
    done = {}
    for path, program in programs.items():
        if any(path.startswith(f"{block}.") for block in whole):
            done[path] = program  # part of that region
        elif path in whole or (plan.keeps_itself(path) and plan.can_be_region(path)):
            holds_blocks = path not in whole and (path == "" or any(_inside(block, path) for block in blocks))
            done[path] = plan.stretches(path, blocks) if holds_blocks else plan.whole(path)
        else:
            done[path] = program
    return done


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}." if outer else "")


class _Plan:
    def __init__(
        self,
        network: nn.Module,
        programs: dict[str, Program],
        first: dict[str, str],
        fixed_forward: Collection[type[nn.Module]],
    ) -> None:
        self._modules = dict(network.named_modules(remove_duplicate=False))
        self._programs = programs
        self._first = first
        self._fixed_forward = tuple(fixed_forward)

    def _child(self, path: str, call: Call) -> str:
        child = f"{path}.{call.path}" if path else call.path
        return self._first.get(child, child)

    def can_be_region(self, path: str) -> bool:
        return path in self._programs and type(self._modules[path]) not in self._fixed_forward

    def keeps_itself(self, path: str) -> bool:
        return any(step.keeps and step.flows for step in self._programs[path].steps)

    def keeps(self, path: str) -> bool:
        """Whether a step in this forward, or in one that it calls, would keep images."""
        if path not in self._programs:
            return False
        return self.keeps_itself(path) or any(self.keeps(self._child(path, c)) for c in self._programs[path].calls())

    def _random(self, path: str, step: Step) -> bool:
        if not isinstance(step, Call):
            return step.random
        inner = self._child(path, step)
        module = self._modules[inner]
        if isinstance(module, nn.Dropout) and module.p > 0.0:
            return True
        program = self._programs.get(inner)
        return program is not None and any(self._random(inner, s) for s in program.steps)

    def whole(self, path: str) -> Program:
        """All of a forward as one region, but for what depends on nothing that comes in."""
        program = self._programs[path]
        first = [step for step in program.steps if step.constant and not step.flows]
        rest = [step for step in program.steps if not (step.constant and not step.flows)]
        return dataclasses.replace(program, steps=(*first, self._segment(path, program, rest, first, [])))

    def stretches(self, path: str, blocks: Collection[str]) -> Program:
        """Between two calls that hold blocks, from the first step that would keep images to the last."""
        program = self._programs[path]
        steps = list(program.steps)
        runs: list[list[int]] = [[]]
        for at, step in enumerate(steps):
            if isinstance(step, Call) and any(_inside(block, self._child(path, step)) for block in blocks):
                runs.append([])
            elif step.keeps and step.flows:
                runs[-1].append(at)
        for run in reversed([run for run in runs if run]):
            first, last = run[0], run[-1] + 1
            segment = self._segment(path, program, steps[first:last], steps[:first], steps[last:])
            steps[first:last] = [segment]
        return dataclasses.replace(program, steps=tuple(steps))

    def _segment(
        self, path: str, program: Program, steps: Sequence[Step], before: Sequence[Step], after: Sequence[Step]
    ) -> Segment:
        made = {out for step in steps for out in step.outs}
        taken = dict.fromkeys(ref.index for step in steps for ref in step.refs() if ref.index not in made)
        wanted = uses(after, program.output)
        return Segment(
            args=tuple(Ref(index) for index in taken),
            kwargs={},
            outs=tuple(out for step in steps for out in step.outs if out in wanted),
            flows=True,
            random=any(self._random(path, step) for step in steps),
            steps=tuple(steps),
        )
