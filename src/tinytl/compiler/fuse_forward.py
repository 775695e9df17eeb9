"""Instructions of forward that become part of a neighbour: one pass over memory instead of two.

    conv, group norm, affine or add, then an activation     the activation's numbers become the instruction's
    upsample, then add of another image                     upsample on top of that image
    conv, then add of another image                         convolution on top of that image

Each is the same sum. It is done where nobody else reads what lay between, both instructions belong to one stretch (one
may run again without the other otherwise), and the other image is there before the instruction that takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .again import Placed
from .program import Instruction
from .row import Row
from .step_builder import acts

Fusion = Callable[[Instruction, Instruction], Instruction | None]
"""(maker, the only reader of what it makes) -> both in one; None where they cannot be."""


def fuse_activations(forward: Sequence[Placed], logits: int) -> list[Placed]:
    """Activations into the instruction before them."""

    def fused(one: Instruction, act: Instruction) -> Instruction | None:
        fits = act.op == "activation" and one.op in ("conv", "group_norm", "affine", "add") and not acts(one)
        return _with_activation(one, act) if fits else None

    return _pairwise(forward, logits, {"activation": ("x",)}, fused, at_second=False)


def fuse_upsampled(forward: Sequence[Placed], logits: int) -> list[Placed]:
    """The addition behind an upsampling into it, which then stands where the addition stood: its input is smaller."""

    def fused(one: Instruction, add: Instruction) -> Instruction | None:
        fits = one.op == "upsample" and one.operand("residual") is None and not acts(add)
        return _on_top(one, add) if fits else None

    return _pairwise(forward, logits, {"add": ("a", "b")}, fused, at_second=True)


def fuse_convolved(forward: Sequence[Placed], logits: int) -> list[Placed]:
    """The addition behind a convolution into it, where the other image was made before the convolution's."""

    def fused(one: Instruction, add: Instruction) -> Instruction | None:
        fits = one.op == "conv" and one.operand("residual") is None and not acts(one)
        return _with_activation(_on_top(one, add), add) if fits else None

    return _pairwise(forward, logits, {"add": ("a", "b")}, fused, at_second=False)


def _with_activation(one: Instruction, second: Instruction) -> Instruction:
    """The first instruction with the activation and the output of the second."""
    numbers = {name: second.attributes[name] for name in ("lo", "hi", "slope")}
    return one.with_operands(y=second.operand("y")).with_attributes(**numbers)


def _on_top(one: Instruction, add: Instruction) -> Instruction:
    """The first instruction on top of what the second adds to it."""
    a, b = add.operand("a"), add.operand("b")
    return one.with_operands(residual=b if a == one.operand("y") else a, y=add.operand("y"))


def _pairwise(
    forward: Sequence[Placed], logits: int, readers: dict[str, tuple[str, ...]], fused: Fusion, at_second: bool
) -> list[Placed]:
    """Replace pairs (maker of one of those operands of a reader, that reader) by one, in the place of either."""
    row, stretch = Row(placed.one for placed in forward), [placed.stretch for placed in forward]
    for at in range(len(row)):
        second = row[at]
        for name in () if second is None else readers.get(second.op, ()):
            assert second is not None
            number = second.operand(name)
            place = row.maker(number)
            if number is None or place is None or number == logits or stretch[place] != stretch[at]:
                continue
            first = row[place]
            made = fused(first, second) if first is not None and row.read_once(number) else None
            stands, empty = (at, place) if at_second else (place, at)
            if made is None or any((-1 if (by := row.maker(read)) is None else by) >= stands for read in made.reads()):
                continue
            row.put(empty, None)
            row.put(stands, made)
            break
    return [Placed(one, stretch[at]) for at in range(len(row)) if (one := row[at]) is not None]
