"""Genomes as numbers that a regression can use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def one_hot(genomes: np.ndarray, cardinalities: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n, G) genomes as (n, sum of cardinalities) float64: a one for each gene's value, genes side by side.

    Raises ValueError for genomes of another length, or genes out of range.
    """
    counts = np.asarray(cardinalities, np.int64)
    genomes = np.asarray(genomes, np.int64)
    if genomes.ndim != 2 or genomes.shape[1] != counts.size:
        raise ValueError(f"genomes of shape {genomes.shape}: expected (n, {counts.size})")
    if (genomes < 0).any() or (genomes >= counts).any():
        raise ValueError(f"a gene is out of range: the cardinalities are {counts.tolist()}")
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    found = np.zeros((len(genomes), int(counts.sum())))
    np.put_along_axis(found, genomes + first, 1.0, axis=1)
    return found
