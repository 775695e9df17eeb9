"""The order of branches: where two meet again, the one is computed first after which less memory is alive.

A lite residual module beside a block is the case: its result is a pooled image, a quarter of the block's or less, and
what the block makes inside is the largest there is. So the lite branch comes first, and its small result waits; in
backward, which goes the other way, the block is done before the small gradient that waits is spread over the image.
Where both results are of one size (a network's own branches), what is alive in either order is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from .again import Placed
from .step_builder import StepBuilder

_MEET = {"add": ("a", "b"), "upsample": ("x", "residual")}


def order_branches(builder: StepBuilder, forward: Sequence[Placed], logits: int) -> list[Placed]:
    """Forward with the two branches before each meeting point in the better order, inner ones first."""
    found = list(forward)
    for at in range(len(found)):
        one, stretch = found[at]
        inputs = [number for name in _MEET.get(one.op, ()) if (number := one.operand(name)) is not None]
        if len(inputs) != 2:
            continue
        left, right = (_leading_to(found[:at], number, stretch) for number in inputs)
        first, second = sorted(left - right), sorted(right - left)
        both = sorted(first + second)
        if not first or not second or both != list(range(at - len(both), at)):
            continue
        after = {number for later, _ in found[at:] for number in later.reads()} | {logits}
        orders = [[found[place] for place in (*a, *b)] for a, b in ((first, second), (second, first))]
        sizes = [_image_bytes(builder, number) for number in inputs]
        if sizes[0] == sizes[1]:
            orders.sort(key=lambda order: _cost(builder, order, after))
        elif sizes[0] > sizes[1]:
            orders.reverse()
        found[at - len(both) : at] = orders[0]
    return found


def _leading_to(before: Sequence[Placed], number: int, stretch: int) -> set[int]:
    """Places of the instructions of that stretch on which a tensor depends."""
    wanted, found = {number}, set()
    for place in reversed(range(len(before))):
        one, own = before[place]
        if own == stretch and not wanted.isdisjoint(one.makes()):
            found.add(place)
            wanted.update(one.reads())
    return found


def _cost(builder: StepBuilder, order: Sequence[Placed], after: set[int]) -> tuple[int, int]:
    """Most bytes of an image alive while these instructions run, and the sum over them."""
    last = {number: at for at, (one, _) in enumerate(order) for number in one.operands if number is not None}
    made = {number for one, _ in order for number in one.makes()}
    alive = {number for number in last if number not in made}
    bytes_: list[int] = []
    for at, (one, _) in enumerate(order):
        alive.update(one.makes())
        bytes_.append(sum(_image_bytes(builder, number) for number in alive))
        alive -= {number for number in one.operands if number is not None and last[number] == at} - after
    return max(bytes_), sum(bytes_)


def _image_bytes(builder: StepBuilder, number: int) -> int:
    tensor = builder.tensors[number]
    return tensor.image_bytes if tensor.scope == "micro" else 0
