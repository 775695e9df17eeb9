"""Which instructions of forward run again in backward, instead of what they made being kept.

The network is a row of stretches: its blocks, and what lies before, between and behind them. A stretch that is listed
keeps what comes into it, and drops what it makes inside; the first rule of backward that asks for such a value has the
instructions that lead to it run again, and no others. What is read outside of the stretch is kept by that reader's
account. Statistics of a group norm (two numbers a group), and the mask of the instruction that ends a stretch, are kept
as well: to make them again would cost that instruction, for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from .program import Instruction, Program, Tensor
from .step_builder import StepBuilder

DERIVING = ("standardize", "scale_weight", "shift_bias")
"""Ops that make the weights of one instruction from trained ones."""


class Placed(NamedTuple):
    """A forward instruction and the number of its stretch."""

    one: Instruction
    stretch: int


def stretches(captured: Program) -> tuple[int, ...]:
    """The stretch of each instruction of the stream `evaluate`, numbered from 0 in forward order.

    A block is one stretch, wherever its instructions stand; a run of instructions outside of any block is another.
    """
    found: list[int] = []
    of_block: dict[int, int] = {}
    count = gap = 0
    before: int | None = None
    for one in captured.streams["evaluate"]:
        if one.block < 0:
            if before != -1:
                gap, count = count, count + 1
            found.append(gap)
        else:
            if one.block not in of_block:
                of_block[one.block], count = count, count + 1
            found.append(of_block[one.block])
        before = one.block
    return tuple(found)


class Values:
    """Values of forward for backward: kept where they were made, or made again.

    Attributes:
        backward: instructions of backward so far, to which those that run again are appended.
        extras: (place in forward, optional output) -> tensor: what forward has to make beside its outputs.
    """

    def __init__(self, builder: StepBuilder, forward: Sequence[Placed], logits: int, recompute: frozenset[int]) -> None:
        self.backward: list[Instruction] = []
        self.extras: dict[tuple[int, str], int] = {}
        self._builder, self._forward, self._recompute = builder, forward, recompute
        self._makes = {number: at for at, (one, _) in enumerate(forward) for number in one.makes()}
        self._again: dict[int, int] = {}
        readers: dict[int, set[int]] = {logits: {-1}}
        for one, stretch in forward:
            for number in one.reads():
                readers.setdefault(number, set()).add(stretch)
        self._ends = {
            at
            for at, (one, stretch) in enumerate(forward)
            if any(readers.get(number, set()) - {stretch} for number in one.makes())
        }

    def value(self, number: int, stretch: int) -> int:
        """The tensor that holds this one's value in the backward of that stretch."""
        if self._builder.role(number) == "derived":
            return derive(self._builder, self._forward, self._makes, number, self.backward, "again")
        at = self._makes.get(number)
        if at is None:
            return number
        one, own = self._forward[at]
        if one.op == "normalize" or (own == stretch and own in self._recompute):
            return self._run_again(at)
        return number

    def extra(self, at: int, output: str) -> int:
        """The tensor of an optional output of the instruction at that place of forward."""
        one, stretch = self._forward[at]
        keep = stretch not in self._recompute or output == "stats" or at in self._ends
        if keep:
            if (at, output) not in self.extras:
                self.extras[at, output] = extra_output(self._builder, one, output)
            return self.extras[at, output]
        self._run_again(at)
        place = self._again[at]
        clone = self.backward[place]
        found = clone.operand(output)
        if found is None:
            found = extra_output(self._builder, clone, output)
            self.backward[place] = clone.with_operands(**{output: found})
        return found

    def _run_again(self, at: int) -> int:
        """Make the output of that instruction once more, and before it what it reads."""
        one, stretch = self._forward[at]
        y = one.operand("y")
        assert y is not None
        if at not in self._again:
            operands = {
                name: self.value(number, stretch) if mode == "in" else self._builder.like(number, "again")
                for number, (name, mode, _) in zip(one.operands, one.kind.operands, strict=True)
                if number is not None
            }
            self.backward.append(replace(one.with_operands(**operands), phase="again"))
            self._again[at] = len(self.backward) - 1
        found = self.backward[self._again[at]].operand("y")
        assert found is not None
        return found


def derive(
    builder: StepBuilder,
    forward: Sequence[Placed],
    makes: dict[int, int],
    number: int,
    into: list[Instruction],
    phase: str,
) -> int:
    """Append the instructions that make a derived weight, from what trains on, to `into`; return the new tensor.

    They run once for each use, so that a derived weight is alive for one instruction only.
    """
    one = forward[makes[number]].one
    assert one.op in DERIVING, f"{builder.tensors[number].name} is derived by {one.op}"
    new: dict[str, int | None] = {"y": builder.like(number, phase)}
    for (name, mode, _), source in zip(one.kind.operands, one.operands, strict=True):
        if mode == "in" and source is not None and builder.role(source) == "derived":
            new[name] = derive(builder, forward, makes, source, into, phase)
    into.append(replace(one.with_operands(**new), phase=phase))
    assert new["y"] is not None
    return new["y"]


def extra_output(builder: StepBuilder, one: Instruction, output: str) -> int:
    """A new tensor for an optional output: mask (bits), which (u8), stats (groups, 2)."""
    y = one.operand("y")
    assert y is not None
    model = builder.tensors[y]
    name = f"{model.name}/{output}"
    if output == "stats":
        return builder.add(Tensor(name, "activation", "f32", (one.attributes["groups"], 2), model.scope))
    return builder.add(Tensor(name, "mask", {"mask": "bits", "which": "u8"}[output], model.shape, model.scope))
