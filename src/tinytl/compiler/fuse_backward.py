"""Instructions of backward that become part of the one that makes their input.

    conv_dx, pool gradients     then add                     on top of the other part of that gradient
    conv_dx                     then act_grad                behind it the mask, and the sum for the bias before
    conv_dx, act_grad           then bias_grad               the sum as well

A derived weight is then made right before the instruction that takes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .program import Instruction
from .row import Row
from .step_builder import StepBuilder, acts

_ON_TOP = ("conv_dx", "avg_pool_grad", "adaptive_pool_grad")


def fuse_backward(builder: StepBuilder, micro: Sequence[Instruction]) -> list[Instruction]:
    """Fuse what can be, in forward and backward of one micro-batch."""
    row = Row(micro)
    for op, fuse in (("add", _add), ("act_grad", _act_grad), ("bias_grad", _bias_grad)):
        for at in range(len(row)):
            one = row[at]
            if one is not None and one.op == op and one.phase == "backward":
                fuse(builder, row, at, one)
    return sink_derived(builder, [one for at in range(len(row)) if (one := row[at]) is not None])


def _add(builder: StepBuilder, row: Row, at: int, add: Instruction) -> None:
    """On top of the other part where that is there before; a mask or a sum behind the maker would come too early."""
    for part, rest in (("b", "a"), ("a", "b")):
        number, other = add.operand(part), add.operand(rest)
        place, before = row.maker(number), row.maker(other)
        one = None if place is None else row[place]
        if number is None or place is None or one is None or one.op not in _ON_TOP or acts(add):
            continue
        there = before is None or before < place
        if row.read_once(number) and there and one.operand("other") is None and not _finished(one):
            row.put(at, None)
            row.put(place, one.with_operands(other=other, y=add.operand("y")))
            return


def _finished(one: Instruction) -> bool:
    """Whether a mask or a sum stands behind an instruction already."""
    return one.op == "conv_dx" and (one.operand("mask") is not None or one.operand("bias") is not None)


def _act_grad(builder: StepBuilder, row: Row, at: int, act: Instruction) -> None:
    """Where the mask is made again between the two, the convolution waits for it, if its input is no larger."""
    number, mask = act.operand("grad"), act.operand("mask")
    place, made = row.maker(number), row.maker(mask)
    one = None if place is None else row[place]
    if number is None or place is None or made is None or one is None or one.op != "conv_dx":
        return
    grad = one.operand("grad")
    assert grad is not None
    waits = made > place
    if _finished(one) or not row.read_once(number) or (waits and _bytes(builder, grad) > _bytes(builder, number)):
        return
    fused = one.with_operands(mask=mask, bias=act.operand("bias"), y=act.operand("y"))
    stands, empty = (at, place) if waits else (place, at)
    row.put(empty, None)
    row.put(stands, fused.with_attributes(slope=act.attributes["slope"]))


def _bytes(builder: StepBuilder, number: int) -> int:
    return builder.tensors[number].image_bytes


def _bias_grad(builder: StepBuilder, row: Row, at: int, total: Instruction) -> None:
    place = row.maker(total.operand("grad"))
    one = None if place is None else row[place]
    if place is None or one is None or one.op not in ("conv_dx", "act_grad") or one.operand("bias") is not None:
        return
    row.put(at, None)
    row.put(place, one.with_operands(bias=total.operand("bias")))


def sink_derived(builder: StepBuilder, row: Sequence[Instruction]) -> list[Instruction]:
    """Each instruction that makes a derived weight right before the first that takes it."""
    found: list[Instruction] = []
    waiting: dict[int, Instruction] = {}

    def append(one: Instruction) -> None:
        for number in one.reads():
            if number in waiting:
                append(waiting.pop(number))
        found.append(one)

    for one in row:
        derived = [number for number in one.makes() if builder.role(number) == "derived"]
        if derived:
            waiting[derived[0]] = one
        else:
            append(one)
    return found
