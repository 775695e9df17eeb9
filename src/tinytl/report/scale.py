"""Round numbers along an axis."""

from __future__ import annotations


def ticks(highest: float, lowest: float = 0.0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from `lowest` up to `highest`: three to six of them."""
    span = highest - lowest
    if not span > 0:
        return [lowest]
    sizes = (factor * 10.0**power for power in range(-12, 300) for factor in (1, 2, 5))
    size = next(size for size in sizes if span <= 5.0001 * size)
    first, last = -int(-lowest // size), int(highest / size + 1e-9)
    return [round(size * i, 12) for i in range(first, last + 1)]
