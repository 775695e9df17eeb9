"""A careful guess at planned memory, so that the planner is not asked about what cannot be on the front.

Ridge regression of the logarithm of the bytes on the one-hot genome: a choice changes memory by a factor more nearly
than by a sum (resolution multiplies what every block keeps). What it errs by is seen from its leave-one-out residuals,
which ridge regression has in closed form, and a genome is only passed over if the guess less that error says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .encoding import one_hot

RIDGE = 1.0
QUANTILE = 0.98  # of the leave-one-out errors: what a guess is lowered by
LEAST_PAIRS = 50


@dataclass(frozen=True)
class MemoryScreen:
    """A guess at the bytes of genomes, from those that were planned."""

    cardinalities: tuple[int, ...]
    weights: np.ndarray
    centre: np.ndarray
    mean: float
    margin: float

    @staticmethod
    def fit(
        genomes: np.ndarray, memory_bytes: np.ndarray, cardinalities: Sequence[int] | np.ndarray
    ) -> MemoryScreen | None:
        """Fit (n, G) genomes to n planned bytes. None where they are too few to guess from."""
        if len(genomes) < LEAST_PAIRS:
            return None
        x = one_hot(genomes, cardinalities)
        y = np.log(np.maximum(memory_bytes, 1.0))
        centre, mean = x.mean(0), float(y.mean())
        x, y = x - centre, y - mean
        solved = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T)  # (features, n)
        weights = solved @ y
        hat = np.einsum("nf,fn->n", x, solved) + 1 / len(y)  # the centring takes one degree of freedom
        errors = np.abs(y - x @ weights) / np.maximum(1 - hat, 1e-6)
        margin = float(np.quantile(errors, QUANTILE))
        return MemoryScreen(tuple(int(count) for count in cardinalities), weights, centre, mean, margin)

    def least_bytes(self, genomes: np.ndarray) -> np.ndarray:
        """The least bytes that (n, G) genomes may well take, (n,)."""
        x = one_hot(genomes, self.cardinalities) - self.centre
        return np.exp(x @ self.weights + self.mean - self.margin)
