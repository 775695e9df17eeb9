"""How well two orders agree."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def kendall_tau(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Kendall's tau-b of two rows of n numbers: 1 for the same order, -1 for the reverse, ties allowed for.

    (concordant - discordant pairs) / sqrt(pairs not tied in a * pairs not tied in b). 0.0 where either is constant or
    there are fewer than two numbers: no order agrees with none. Raises ValueError for rows of unlike length, and for
    numbers that are not finite.
    """
    one, other = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(f"rows of shapes {one.shape} and {other.shape}: expected two of one length")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("a number to rank is not finite")
    left, right = np.sign(one[:, None] - one), np.sign(other[:, None] - other)
    untied = np.sqrt(np.abs(left).sum() * np.abs(right).sum())
    return float((left * right).sum() / untied) if untied else 0.0
