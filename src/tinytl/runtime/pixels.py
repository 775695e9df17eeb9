"""Photographs as a program takes them: bytes (H, W, 3), by the lab's recipe of crops, mirroring and colours.

Evaluation gives the lab's very bytes. In training the recipe is the lab's and the draws are not (numpy's generator is
not here): each is a hash of (seed, epoch, photograph, number of the draw). So a photograph looks the same in an epoch
whoever reads it, on any version of Python, and whether or not the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from tinytl._digest import sha256
from tinytl.data.crops import (
    INTERPOLATIONS,
    RATIO,
    distorted,
    eval_box,
    eval_pixels,
    mirrored,
    random_crop,
    train_pixels,
)
from tinytl.data.decode import Photo
from tinytl.errors import ProgramError

from .settings import Settings


class Recipe:
    """What is done to a photograph, for a network of that preprocessing (of the program's META)."""

    def __init__(self, preprocessing: Mapping[str, Any], settings: Settings | None = None) -> None:
        """Read the preprocessing; `settings` are needed to train.

        Raises:
            ProgramError: it is none.
        """
        try:
            self.resolution = int(preprocessing["resolution"])
            self._crop_fraction = float(preprocessing["crop_fraction"])
            self._interpolation = preprocessing["interpolation"]
        except (KeyError, TypeError, ValueError) as error:
            raise ProgramError(f"the program's preprocessing has no {error}: compile it again") from error
        if self._interpolation not in INTERPOLATIONS:
            raise ProgramError(
                f"the program's preprocessing has the interpolation {self._interpolation!r}: compile it again"
            )
        self._settings = settings or Settings()

    def training(self, photo: Photo, epoch: int, index: int) -> Image.Image:
        """Return photograph `index` of the training set as it is seen in an epoch (from 0): RGB, R x R."""
        chosen = self._settings
        draws = Draws("sample", chosen.seed, epoch, index)
        box = random_crop(photo.size, (chosen.min_scale, 1.0), RATIO, draws.uniform, draws.below)
        image = train_pixels(photo, box, self.resolution, self._interpolation)
        # drawn whether used or not, so that an option does not change what the others draw
        side, brightness, saturation = draws.next(), draws.next(), draws.next()
        if chosen.flip and side < 0.5:
            image = mirrored(image)
        return distorted(image, brightness, saturation) if chosen.color else image

    def evaluation(self, photo: Photo) -> Image.Image:
        """Return a photograph as it is evaluated: RGB, R x R."""
        return eval_pixels(photo, eval_box(photo.size, self._crop_fraction), self.resolution, self._interpolation)


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """Return a permutation of ``range(count)``, from (seed, epoch) alone."""
    draws = Draws("order", seed, epoch, 0)
    keys = [draws.next() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


class Draws:
    """Random numbers that depend on a purpose, a seed and two numbers: equal ones, equal draws."""

    def __init__(self, purpose: str, seed: int, epoch: int, index: int) -> None:
        self._name, self._count = f"{purpose}/{seed}/{epoch}/{index}", 0

    def next(self) -> float:
        """Draw from [0, 1): 53 bits of the SHA-256 of the name and of how many were drawn before."""
        digest = sha256(f"{self._name}/{self._count}".encode()).digest()
        self._count += 1
        return (int.from_bytes(digest[:8], "little") >> 11) / 2**53

    def uniform(self, low: float, high: float) -> float:
        """Draw from [low, high]."""
        return low + (high - low) * self.next()

    def below(self, count: int) -> int:
        """Draw a whole number from 0 to count - 1."""
        return int(self.next() * count)
