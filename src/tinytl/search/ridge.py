"""Ridge regression whose strength is chosen by leave-one-out error."""

from __future__ import annotations

import numpy as np

STRENGTHS = tuple(float(strength) for strength in np.logspace(-1, 4, 16))


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit y - mean(y) to centred features.

    Both come from one singular value decomposition: leaving a pair out raises its residual by 1 / (1 - h), with h its
    diagonal entry of the hat matrix, so no fit is ever repeated.

    Args:
        x: (n, F), each column of mean 0.
        y: (n,).

    Returns:
        weights (F,) of the strength with the least leave-one-out error, and what each pair is predicted to be by the
        fit to all the others, (n,).
    """
    mean = y.mean()
    u, s, v = np.linalg.svd(x, full_matrices=False)  # (n, r), (r,), (r, F)
    projected = u.T @ (y - mean)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for strength in STRENGTHS:
        kept = s**2 / (s**2 + strength)
        residual = y - mean - u @ (kept * projected)
        hat = (u**2) @ kept + 1 / len(y)  # the mean is fitted, too
        errors = residual / np.maximum(1 - hat, 1e-9)
        mean_square = float(errors @ errors)
        if best is None or mean_square < best[0]:
            best = mean_square, v.T @ (s / (s**2 + strength) * projected), y - errors
    assert best is not None
    return best[1], best[2]
