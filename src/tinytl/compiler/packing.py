"""Packing buffers into the least height: an offset for each, by when they are alive.

Packing intervals is NP-hard; the largest sum of bytes that are alive together is a bound that no packing passes under.
What is alive through a whole span (gradients that accumulate) is stacked first. The others are placed one after the
other, each as low as it fits: every packing that cannot be pressed down comes of some order, so that the search is for
an order. The best of several is changed, one buffer at a time, as long as that raises nothing; of the large buffers
alone, as they are few, and the small ones find room between them. That begins anew, with other draws, until the height
is close to the bound; it mostly ends within a thousandth.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .liveness import Buffer, Interval
from .program import ALIGN

ATTEMPTS = 8
ROUNDS = 400
"""Searches at most, and changes of an order that each tries."""
SHARES = (0.01, 0.02)
"""What counts as large: at least that share of the bound; in turn."""
CLOSE = 1.001
"""Times the bound: nothing better is looked for."""


@dataclass(frozen=True)
class Packing:
    """Where buffers lie.

    Attributes:
        offsets: of each buffer, from where the first may begin.
        bytes: the height: where the last one ends.
        bound: the largest sum of bytes alive together; no packing takes less.
    """

    offsets: tuple[int, ...]
    bytes: int
    bound: int


def aligned(size: int) -> int:
    """The next multiple of `ALIGN`."""
    return -(-size // ALIGN) * ALIGN


def bound(held: Sequence[Buffer]) -> int:
    """The largest sum of bytes that are alive together."""
    change: dict[int, int] = {}
    for buffer in held:
        for first, last in buffer.intervals:
            change[first] = change.get(first, 0) + aligned(buffer.bytes)
            change[last + 1] = change.get(last + 1, 0) - aligned(buffer.bytes)
    most = live = 0
    for at in sorted(change):
        live += change[at]
        most = max(most, live)
    return most


def pack(held: Sequence[Buffer], span: Interval | None = None, attempts: int = ATTEMPTS) -> Packing:
    """An offset for every buffer, such that no two that are alive together overlap; the same for the same buffers.

    Args:
        held: the buffers.
        span: what is alive through all of these instructions lies below all that is alive with it.
        attempts: searches at most; 0: the best of the orders that each begins with.
    """
    least = bound(held)
    search = _Search(held, span)
    best = search.whole([])
    for attempt in range(attempts):
        if best[0] <= CLOSE * least:
            break
        share = SHARES[attempt % len(SHARES)] * least
        order = search.order_of({n for n in search.loose if search.sizes[n] >= share}, random.Random(attempt))
        best = min(best, search.whole(order), key=lambda found: found[0])
    return Packing(tuple(best[1]), best[0], least)


class _Search:
    """For an order of the buffers that packs them low.

    Attributes:
        sizes: of each buffer, aligned.
        loose: numbers of those that are not stacked first.
    """

    def __init__(self, held: Sequence[Buffer], span: Interval | None) -> None:
        self.sizes = [aligned(buffer.bytes) for buffer in held]
        self._held = held
        self._rivals = _rivals(held)
        self._floor = [0] * len(held)  # where each may begin
        self._offsets = [-1] * len(held)
        end = 0
        for number, buffer in enumerate(held):
            if span is not None and any(first <= span[0] and span[1] <= last for first, last in buffer.intervals):
                self._offsets[number] = end
                end += self.sizes[number]
                for other in self._rivals[number]:
                    self._floor[other] = end
        self._height = end
        self.loose = [number for number, offset in enumerate(self._offsets) if offset < 0]
        self._orders = _orders(held, self.sizes, self.loose)

    def order_of(self, large: set[int], draw: random.Random) -> list[int]:
        """An order of these buffers that packs them low."""
        least = bound([buffer for n, buffer in enumerate(self._held) if n in large or self._offsets[n] >= 0])
        rivals = [[other for other in mine if other in large] for mine in self._rivals]
        starts = [[n for n in order if n in large] for order in self._orders]
        (height, offsets), order = min(((self._place(o, rivals), o) for o in starts), key=lambda found: found[0][0])
        for _ in range(ROUNDS):
            if height == least or not order:
                break
            changed = self._changed(order, offsets, height, rivals, draw)
            found, placed = self._place(changed, rivals, height)
            if found <= height:
                height, offsets, order = found, placed, changed
        return order

    def whole(self, first: list[int]) -> tuple[int, list[int]]:
        """Height and offsets of all buffers: these first, in that order, and the others in the best of a few."""
        held = set(first)
        rest = [[n for n in order if n not in held] for order in self._orders]
        return min((self._place(first + others, self._rivals) for others in rest), key=lambda found: found[0])

    def _changed(
        self,
        order: list[int],
        offsets: list[int],
        height: int,
        rivals: Sequence[Sequence[int]],
        draw: random.Random,
    ) -> list[int]:
        """The order with one buffer elsewhere: one that reaches the top, or one that is alive with it."""
        top = draw.choice([n for n in order if offsets[n] + self.sizes[n] == height] or order)
        moved = top if not rivals[top] or draw.random() < 0.5 else draw.choice(rivals[top])
        rest = [n for n in order if n != moved]
        rest.insert(draw.randrange(len(order)), moved)
        return rest

    def _place(
        self, order: Sequence[int], rivals: Sequence[Sequence[int]], most: int = 1 << 62
    ) -> tuple[int, list[int]]:
        """Each buffer in turn as low as it fits; the height and the offsets (unfinished where it passes `most`)."""
        offsets, sizes, height = self._offsets.copy(), self.sizes, self._height
        for number in order:
            at, size = self._floor[number], sizes[number]
            taken = sorted([(offsets[n], offsets[n] + sizes[n]) for n in rivals[number] if offsets[n] >= 0])
            for begin, end in taken:
                if begin - at >= size:
                    break
                if end > at:
                    at = end
            offsets[number] = at
            if at + size > height:
                height = at + size
                if height > most:
                    break
        return height, offsets


def _rivals(held: Sequence[Buffer]) -> list[list[int]]:
    """For each buffer, those that are alive together with it."""
    times = sorted({at for buffer in held for span in buffer.intervals for at in span})
    column = {at: index for index, at in enumerate(times)}
    alive = np.zeros((len(held), len(times)), np.float32)
    for row, buffer in enumerate(held):
        for first, last in buffer.intervals:
            alive[row, column[first] : column[last] + 1] = 1
    together = alive @ alive.T > 0
    np.fill_diagonal(together, val=False)
    return [np.flatnonzero(row).tolist() for row in together]


def _orders(held: Sequence[Buffer], sizes: Sequence[int], numbers: Sequence[int]) -> list[list[int]]:
    """Orders to begin with."""
    length = [sum(last - first + 1 for first, last in buffer.intervals) for buffer in held]
    keys = (
        lambda n: (-length[n], -sizes[n], n),
        lambda n: (-sizes[n], -length[n], n),
        lambda n: (-sizes[n] * length[n], n),
    )
    return [sorted(numbers, key=key) for key in keys]
