"""What was measured in turns, compared turn by turn: the median ratio and its quartiles.

One turn is one measurement of each side, one after the other. A machine whose speed drifts drifts for both sides of a
turn, so their ratio says more than the ratio of two medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tinytl.report import Column


def ratios(mine: Sequence[float], other: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Median and quartiles of mine / other, as `ratio`, `ratio_low` and `ratio_high` behind `prefix`.

    Raises ValueError when one side had more turns than the other.
    """
    low, middle, high = statistics.quantiles([a / b for a, b in zip(mine, other, strict=True)], n=4)
    return {f"{prefix}ratio": middle, f"{prefix}ratio_low": low, f"{prefix}ratio_high": high}


def ratio_columns(heading: str, prefix: str = "") -> list[Column]:
    """The columns of a table that hold what `ratios` found."""
    return [
        Column(f"{prefix}ratio", heading, "x", 2),
        Column(f"{prefix}ratio_low", "quartile", "x", 2),
        Column(f"{prefix}ratio_high", "quartile", "x", 2),
    ]
