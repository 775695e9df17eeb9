"""Small photographs made on the spot: coloured noise, one tint a class, so that a network can tell them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TINTS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def make_photographs(root: Path, each: int = 6, size: tuple[int, int] = (48, 40), seed: int = 0) -> Path:
    """Write ROOT/CLASS/N.jpg for each of `TINTS` and return ROOT."""
    rng = np.random.default_rng(seed)
    for name, tint in TINTS.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(each):
            noise = rng.integers(-40, 40, (size[1], size[0], 3))
            pixels = np.clip(np.array(tint) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.jpg", quality=95)
    return root
