"""Run the steps of a program over values.

Neighbouring lean steps, those of lean children too, run as one chain; a segment keeps what goes into it and runs again
in backward; everything else is called as it was. Children are called as modules, so their hooks run. A value is let
go behind the last step that takes it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinytl.errors import InputError
from tinytl.nn.lean import image_dropout, stages_of
from tinytl.ops.batch_norm import FrozenBatchNorm
from tinytl.ops.chain import Stage, chain
from tinytl.ops.conv import Conv2d
from tinytl.ops.region import inside_region, region

from .program import (
    ADDITIONS,
    ARITHMETIC,
    Attr,
    Call,
    Check,
    Device,
    Function,
    Lean,
    Ref,
    Segment,
    Size,
    Step,
    function,
    leaves,
    replace_leaves,
    uses,
    value_of,
)

Values = dict[int, Any]


class Body:
    """Steps with what running them needs: how often each value is taken, and when it can be let go."""

    def __init__(self, steps: Sequence[Step], results: Any) -> None:
        self.steps = tuple(steps)
        self.uses = uses(steps, results)
        self.inner = [Body(s.steps, [Ref(out) for out in s.outs]) if isinstance(s, Segment) else None for s in steps]
        stay = {leaf.index for leaf in leaves(results) if isinstance(leaf, Ref)}
        last: dict[int, int] = {}
        for at, step in enumerate(steps):
            last.update(dict.fromkeys((*(ref.index for ref in step.refs()), *step.outs), at))
        self.drops: list[list[int]] = [[] for _ in steps]
        for index, at in last.items():
            if index not in stay:
                self.drops[at].append(index)


class Runner:
    """One run of a body, over `values`, which it changes: at the end they hold the results."""

    def __init__(self, module: nn.Module, body: Body, values: Values, name: str) -> None:
        self._module, self._body, self._values, self._name = module, body, values, name
        first = next((value for value in values.values() if isinstance(value, Tensor)), None)
        first = next(iter(module.parameters()), None) if first is None else first
        self._device = torch.device("cpu") if first is None else first.device
        self._x: Tensor | None = None  # of the chain that is being put together
        self._line: list[Stage] = []
        self._out = -1  # the value that the chain will make
        self._owned = False
        self._fresh: set[int] = set()  # values made here that nobody else holds, nor autograd keeps

    def run(self) -> None:
        """All steps."""
        body, values = self._body, self._values
        for at, step in enumerate(body.steps):
            stages = stages_of_step(self._module, step, self._value)
            if stages is not None:
                self._append(step, stages)
            else:
                self._other(at, step)
            for index in body.drops[at]:
                values.pop(index, None)
        self._flush()

    # ------------------------------------------------------------ chains

    def _append(self, step: Step, stages: list[Stage]) -> None:
        source, out = step.args[0].index, step.outs[0]
        alone = self._body.uses[source] == 1
        if self._line and source == self._out and alone:
            self._line = extended(self._line, stages)
        else:
            self._flush()
            if not stages:  # an identity: the same tensor under another number
                self._values[out] = self._values[source]
                if alone and source in self._fresh:
                    self._fresh.add(out)
                return
            self._x, self._line = self._values[source], extended([], stages)
            self._owned = alone and source in self._fresh
        self._out = out

    def _flush(self) -> None:
        if not self._line:
            return
        assert self._x is not None
        (x, self._x), (line, self._line) = (self._x, None), (self._line, [])
        y = chain(x, line, owned=self._owned)
        self._values[self._out] = y
        if y is not x:
            self._fresh.add(self._out)
        self._out = -1

    # ------------------------------------------------------------ other steps

    def _other(self, at: int, step: Step) -> None:
        if self._line and (not isinstance(step, Function) or step.random or Ref(self._out) in step.refs()):
            self._flush()
        if isinstance(step, Segment):
            self._segment(at, step)
            return
        args, kwargs = replace_leaves(step.args, self._value), replace_leaves(step.kwargs, self._value)
        if isinstance(step, Check):
            if ARITHMETIC[step.op](*args) is not step.outcome:
                raise InputError(
                    f"{self._name}: takes another way for inputs of this size than for those it was adapted with; "
                    "adapt the network with resolution= of the images"
                )
            return
        if isinstance(step, Call):
            output = operator.attrgetter(step.path)(self._module)(*args, **kwargs)
        elif isinstance(step, Lean):  # a function of constants, which no chain runs
            assert step.op is not None
            output = chain(args[0], [(step.op, args[1])])
        else:
            assert isinstance(step, Function)
            output = self._function(step, args, kwargs)
        results = [output] if isinstance(output, Tensor) else [v for v in leaves(output) if isinstance(v, Tensor)]
        self._values.update(zip(step.outs, results, strict=True))

    def _function(self, step: Function, args: Any, kwargs: Any) -> Any:
        name = step.name
        if name in ADDITIONS and not kwargs and len(args) == 2:
            return self._add(step, args)
        if name == "torch.nn.functional.dropout":
            return _dropout(*args, **kwargs)
        # Chains leave images in another layout than the one that was traced: where it counts, it does so no more.
        if name == "torch.Tensor.contiguous" and not kwargs:
            return args[0]
        if name == "torch.Tensor.view" and not any(isinstance(arg, torch.dtype) for arg in args):
            name = "torch.Tensor.reshape"
        output = function(name)(*args, **kwargs)
        if self._device.type == "meta" and isinstance(output, Tensor):  # made from numbers, without a device named
            output = output.to("meta")
        return args[0] if output is None else output

    def _add(self, step: Function, args: Any) -> Tensor:
        """A sum, in a summand that a chain has just made and nobody else takes."""
        self._fresh.add(step.outs[0])
        for own, other in ((0, 1), (1, 0)):
            ref, a, b = step.args[own], args[own], args[other]
            fresh = isinstance(ref, Ref) and ref.index in self._fresh and self._body.uses[ref.index] == 1
            if fresh and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
                return a.add_(b)
        return args[0] + args[1]

    def _segment(self, at: int, step: Segment) -> None:
        body, module, name = self._body.inner[at], self._module, self._name
        assert body is not None
        given = {ref.index: self._values[ref.index] for ref in step.args}
        tensors = {index: value for index, value in given.items() if isinstance(value, Tensor)}

        def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
            values = {**given, **dict(zip(tensors, inputs, strict=True))}
            Runner(module, body, values, name).run()
            return tuple(values[out] for out in step.outs)

        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors.values(), *trained))
        inputs = list(tensors.values())
        alone = not wanted or inside_region()
        outputs = run(inputs) if alone else region(run, inputs, trained, random=step.random, name=name)
        self._values.update(zip(step.outs, outputs, strict=True))

    def _value(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return self._values[leaf.index]
        if isinstance(leaf, Attr):
            return operator.attrgetter(leaf.path)(self._module)
        if isinstance(leaf, Size):
            return value_of(leaf, self._values)
        return self._device if isinstance(leaf, Device) else leaf


def stages_of_step(module: nn.Module, step: Step, value: Any) -> list[Stage] | None:
    """The lean stages of a step, or None if it is none that a chain can run; `value` finds its tensors."""
    if isinstance(step, Lean):
        if not isinstance(step.args[0], Ref) or step.op is None:
            return None
        return [(step.op, tuple(value(tensor) for tensor in step.args[1]))]
    if isinstance(step, Call) and len(step.args) == 1 and not step.kwargs and isinstance(step.args[0], Ref):
        return stages_of(operator.attrgetter(step.path)(module)) if len(step.outs) == 1 else None
    return None


def extended(line: list[Stage], stages: list[Stage]) -> list[Stage]:
    """`line` with `stages` behind it; a frozen normalization becomes part of the convolution in front of it."""
    line = list(line)
    for op, tensors in stages:
        last = line[-1] if line else None
        if (
            last is not None
            and isinstance(op, FrozenBatchNorm)
            and isinstance(last[0], Conv2d)
            and _folds(last, tensors)
        ):
            line[-1] = (_normalized(last[0], op.eps), (*last[1], *tensors))
        else:
            line.append((op, tensors))
    return line


def _folds(conv: Stage, norm: Sequence[Tensor | None]) -> bool:
    """Not where a scale trains behind a frozen weight: its gradient would then need the weight's."""
    op, gamma, weight = conv[0], norm[0], conv[1][0]
    assert isinstance(op, Conv2d)
    assert weight is not None
    plain = op.activation is None and op.recipe.norm_eps is None
    return plain and (weight.requires_grad or gamma is None or not gamma.requires_grad)


@functools.lru_cache(maxsize=1024)
def _normalized(conv: Conv2d, eps: float) -> Conv2d:
    return dataclasses.replace(conv, recipe=dataclasses.replace(conv.recipe, norm_eps=eps))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return image_dropout(input, p) if training else input
