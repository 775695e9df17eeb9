"""Instructions that nobody needs: copies of the same shape, and what no result depends on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .again import Placed
from .step_builder import StepBuilder, renamed


def without_copies(builder: StepBuilder, forward: Sequence[Placed], logits: int) -> tuple[list[Placed], int]:
    """Forward without copies into the same shape, and the logits' number then."""
    new: dict[int, int] = {}
    found: list[Placed] = []
    for one, stretch in forward:
        one = renamed(one, new)
        x, y = (one.operand("x"), one.operand("y")) if one.op == "copy" else (None, None)
        if x is not None and y is not None and _alike(builder, x, y):
            new[y] = x
        else:
            found.append(Placed(one, stretch))
    return found, new.get(logits, logits)


def _alike(builder: StepBuilder, x: int, y: int) -> bool:
    a, b = builder.tensors[x], builder.tensors[y]
    return (a.shape, a.dtype, a.scope) == (b.shape, b.dtype, b.scope)


def without_dead(placed: Sequence[Placed], results: Iterable[int]) -> list[Placed]:
    """The instructions on which `results` depend; optional outputs that nobody reads are absent."""
    live = set(results)
    found: list[Placed] = []
    for one, stretch in reversed(placed):
        if live.isdisjoint(one.writes()):
            continue
        unread = {
            name: None
            for number, (name, mode, optional) in zip(one.operands, one.kind.operands, strict=True)
            if number is not None and mode != "in" and optional and number not in live
        }
        one = one.with_operands(**unread)
        live.difference_update(one.makes())
        live.update(one.reads())
        found.append(Placed(one, stretch))
    return found[::-1]
