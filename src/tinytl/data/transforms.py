"""From a photograph to a network's input: bytes (3, R, R), and ``(x / 255 - mean) / std`` of them in float32.

All that is done to a photograph is done in Pillow, at 8 bits a channel (see `tinytl.data.crops`). So `pixels` has
everything in a quarter of the memory, and calling a transform only normalizes that.

A training transform is random, but its draws come from ``sample_rng(seed, epoch, index)`` only. So a
photograph looks the same in an epoch whichever worker reads it, in whatever order, and whether or not the run
was interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from tinytl.data import crops
from tinytl.data.crops import INTERPOLATIONS, RATIO, Box
from tinytl.data.decode import Photo, Size
from tinytl.data.normalize import ByteArray, FloatArray, Normalize, Triple
from tinytl.errors import InputError, UnknownNameError

# The streams drawn from one seed. Never 0: SeedSequence pads with zeros, so that [s, 0] would repeat [s].
_ORDER_STREAM, _SAMPLE_STREAM = 1, 2


class Transform(Protocol):
    """What a `Loader` needs: a photograph and a generator in, float32 (3, R, R) out."""

    @property
    def resolution(self) -> int:
        """R, in pixels."""
        ...

    def __call__(self, photo: Photo, rng: np.random.Generator) -> FloatArray:
        """Return the network's input."""
        ...


class PixelTransform(Transform, Protocol):
    """A transform that ends in bytes: its input is ``normalize.array(pixels(photo, rng))``, no more and no less."""

    @property
    def normalize(self) -> Normalize:
        """What makes float32 of the bytes."""
        ...

    def pixels(self, photo: Photo, rng: np.random.Generator) -> ByteArray:
        """Return uint8 (3, R, R)."""
        ...


def in_pixels(transform: Transform) -> PixelTransform | None:
    """Return a transform whose bytes say all that calling it would; None where only its floats do.

    It is one that has `pixels` and a `normalize`, unless a subclass has given it another ``__call__`` and left `pixels`
    as it was: then what the subclass does is in the floats alone.
    """
    ancestry = type(transform).__mro__

    def depth(name: str) -> int:
        return next((at for at, kind in enumerate(ancestry) if name in vars(kind)), len(ancestry))

    known = isinstance(getattr(transform, "normalize", None), Normalize) and depth("pixels") < len(ancestry)
    return cast("PixelTransform", transform) if known and depth("pixels") <= depth("__call__") else None


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of photograph ``index`` in an epoch. All three are at least 0."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_SAMPLE_STREAM, seed, epoch, index])))


def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return a permutation of ``range(count)``.

    Made by sorting raw 64-bit draws, which numpy guarantees never to change, as it does not for
    ``permutation``.
    """
    draws = np.random.Philox(np.random.SeedSequence([_ORDER_STREAM, seed, epoch, 0])).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, flip and, where asked, colour distortion (paper's recipe: scale from 0.22).

    ``resolution``: R in pixels. ``mean``, ``std``: per channel, in units of x/255. ``scale``: range of the
    crop's share of the area, uniform. ``ratio``: range of its width/height, uniform in the logarithm.
    ``flip``: mirror half of the photographs. ``color``: brightness by 1 +- 32/255, then saturation by 1 +-
    0.5, both uniform (the paper: for Cars and Aircraft only). Ten crops are tried; where none fits, the
    largest centred one of an allowed ratio is taken.

    Raises InputError for a value out of range, UnknownNameError for the interpolation.
    """

    resolution: int
    mean: Triple
    std: Triple
    scale: tuple[float, float] = (0.22, 1.0)
    ratio: tuple[float, float] = RATIO
    flip: bool = True
    color: bool = False
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check_common(self.resolution, self.mean, self.std, self.interpolation)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"crop scale {self.scale!r} is out of range: expected 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise InputError(f"crop ratio {self.ratio!r} is out of range: expected 0 < low <= high")

    @property
    def normalize(self) -> Normalize:
        """What makes float32 of the bytes."""
        return Normalize(self.mean, self.std)

    def __call__(self, photo: Photo, rng: np.random.Generator) -> FloatArray:
        """Return float32 (3, R, R). Raises DataError where the photograph cannot be read."""
        return self.normalize.array(self.pixels(photo, rng))

    def pixels(self, photo: Photo, rng: np.random.Generator) -> ByteArray:
        """Return uint8 (3, R, R), to be read only. Raises DataError where the photograph cannot be read."""
        image = crops.train_pixels(photo, self.crop(photo.size, rng), self.resolution, self.interpolation)
        # Drawn whether used or not, so that an option does not change what the others draw.
        side, brightness, saturation = rng.random(3)
        if self.flip and side < 0.5:
            image = crops.mirrored(image)
        if self.color:
            image = crops.distorted(image, brightness, saturation)
        return _bytes_of(image)

    def crop(self, size: Size, rng: np.random.Generator) -> Box:
        """Draw a crop of a photograph of ``size`` (width, height), in whole pixels and within it."""
        return crops.random_crop(size, self.scale, self.ratio, rng.uniform, lambda count: int(rng.integers(count)))


@dataclass(frozen=True)
class EvalTransform:
    """The centre of the photograph: a square of ``crop_fraction`` of its short side, resized to R x R.

    The square is cut before it is resized, as in EfficientNet's own evaluation (there R / (R + 32), rounded
    down); a long, narrow photograph then costs no more than another. ``resolution``, ``mean``, ``std``: as
    for `TrainTransform`.

    Raises InputError for a value out of range, UnknownNameError for the interpolation.
    """

    resolution: int
    mean: Triple
    std: Triple
    crop_fraction: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check_common(self.resolution, self.mean, self.std, self.interpolation)
        if not 0 < self.crop_fraction <= 1:
            raise InputError(f"crop fraction {self.crop_fraction!r} is out of range: expected 0 < fraction <= 1")

    @property
    def normalize(self) -> Normalize:
        """What makes float32 of the bytes."""
        return Normalize(self.mean, self.std)

    def __call__(self, photo: Photo, rng: np.random.Generator | None = None) -> FloatArray:
        """Return float32 (3, R, R); draws nothing. Raises DataError where the photograph cannot be read."""
        return self.normalize.array(self.pixels(photo, rng))

    def pixels(self, photo: Photo, rng: np.random.Generator | None = None) -> ByteArray:
        """Return uint8 (3, R, R), to be read only; draws nothing. Raises as calling it does."""
        return _bytes_of(crops.eval_pixels(photo, self.crop(photo.size), self.resolution, self.interpolation))

    def crop(self, size: Size) -> Box:
        """Return the square that is evaluated of a photograph of ``size``, in whole pixels."""
        return crops.eval_box(size, self.crop_fraction)


def _bytes_of(image: Image.Image) -> ByteArray:
    """RGB, R x R -> uint8 (3, R, R), with the channel innermost in memory (channels last)."""
    return np.asarray(image).transpose(2, 0, 1)


def _check_common(resolution: int, mean: Triple, std: Triple, interpolation: str) -> None:
    if resolution < 1:
        raise InputError(f"resolution {resolution!r} is out of range: expected at least 1 pixel")
    Normalize(mean, std)  # refuses what is out of range
    if interpolation not in INTERPOLATIONS:
        raise UnknownNameError("interpolation", interpolation, INTERPOLATIONS)
