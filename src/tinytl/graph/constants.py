"""Values that depend on nothing but frozen tensors are computed once.

A subclassed convolution may make its weight anew in each forward pass (weight standardization, a mask, a
reparametrization). Where all that goes into it is frozen, the result is too: it is computed when the network is
adapted and becomes a buffer of the module. The buffer is not part of the state dict: it can be made again from what
is, so that paths, base hash and delta stay those of the network.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .program import Attr, Program, Ref, Segment, Step, replace_leaves, uses
from .runner import Body, Runner

PREFIX = "_constant"


def freeze_constants_(module: nn.Module, program: Program) -> Program:
    """Give `module` a buffer for each frozen value that `program` computes; the program that takes it from there."""
    made = [step for step in program.steps if step.constant and not step.flows]
    rest = [step for step in program.steps if not (step.constant and not step.flows)]
    produced = {out for step in made for out in step.outs}
    wanted = [index for index in uses(_flat(rest), program.output) if index in produced]
    if not wanted:
        return dataclasses.replace(program, steps=tuple(rest))
    values: dict[int, Any] = {}
    with torch.no_grad():
        Runner(module, Body(made, [Ref(index) for index in wanted]), values, "").run()
    buffers: dict[int, Attr] = {}
    for index in wanted:
        name = f"{PREFIX}{sum(name.startswith(PREFIX) for name in module._buffers)}"
        module.register_buffer(name, _own(values[index]), persistent=False)
        buffers[index] = Attr(name)

    def change(leaf: Any) -> Any:
        return buffers.get(leaf.index, leaf) if isinstance(leaf, Ref) else leaf

    return dataclasses.replace(
        program,
        steps=tuple(_changed(step, change) for step in rest),
        output=replace_leaves(program.output, change),
    )


def _own(value: Tensor) -> Tensor:
    """A copy with memory of its own, in the layout that convolutions compute in."""
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    return value.detach().clone(memory_format=layout)


def _flat(steps: list[Step]) -> list[Step]:
    return [inner for step in steps for inner in ((*step.steps, step) if isinstance(step, Segment) else (step,))]


def _changed(step: Step, change: Any) -> Step:
    step = dataclasses.replace(step, kwargs=replace_leaves(step.kwargs, change))
    if isinstance(step, Segment):
        args = tuple(leaf for leaf in step.args if isinstance(change(leaf), Ref))
        return dataclasses.replace(step, args=args, steps=tuple(_changed(inner, change) for inner in step.steps))
    return dataclasses.replace(step, args=replace_leaves(step.args, change))
