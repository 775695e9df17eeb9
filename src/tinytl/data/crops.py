"""What is done to a photograph's pixels, all in Pillow, at 8 bits a channel: crop, resize, mirror, distort the colours.

The geometry and the operations alone; where the random numbers come from is the caller's choice, and nothing here
imports numpy. `tinytl.data.transforms` makes the transforms of these that a `Loader` takes.

The random resized crop is chosen on the photograph's full size, before the pixels are read: a large JPEG is
then decoded at the fraction of its size that the crop needs. Evaluation always decodes at full size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image

from tinytl.data.decode import Photo, Size

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels
Range = tuple[float, float]

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
RATIO: Range = (3 / 4, 4 / 3)
"""Of a training crop's width to its height, unless something else is asked for."""
# Decode a JPEG at no less than this many times the resolution wanted, then filter: no visible difference.
_DECODE_GAP = 2.0
_CROP_TRIES = 10


def random_crop(
    size: Size,
    scale: Range,
    ratio: Range,
    uniform: Callable[[float, float], float],
    below: Callable[[int], int],
) -> Box:
    """Draw a crop of a photograph of ``size`` (width, height), in whole pixels and within it.

    ``scale``: range of its share of the area, uniform. ``ratio``: range of its width/height, uniform in the logarithm.
    Ten are tried; where none fits, the largest centred one of an allowed ratio is taken. ``uniform(low, high)`` draws
    a float, ``below(n)`` a whole number from 0 to n - 1.
    """
    width, height = size
    for _ in range(_CROP_TRIES):
        area = width * height * uniform(*scale)
        shape = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(below(width - crop_width + 1))
            upper = int(below(height - crop_height + 1))
            return left, upper, left + crop_width, upper + crop_height
    shape = min(max(width / height, ratio[0]), ratio[1])
    crop_width = min(width, max(round(height * shape), 1))
    crop_height = min(height, max(round(width / shape), 1))
    return _centred(size, crop_width, crop_height)


def train_pixels(photo: Photo, box: Box, resolution: int, interpolation: str) -> Image.Image:
    """Read what lies in ``box`` and resize it to R x R (RGB). Raises PhotoError where it cannot be read."""
    side = min(box[2] - box[0], box[3] - box[1])
    image, factor = photo.reduced(side / (_DECODE_GAP * resolution))
    return _cut(image, tuple(edge / factor for edge in box), resolution, interpolation)


def mirrored(image: Image.Image) -> Image.Image:
    """Return it with left and right exchanged."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def distorted(image: Image.Image, brightness: float, saturation: float) -> Image.Image:
    """Change brightness by 1 +- 32/255, then saturation by 1 +- 0.5; both given in [0, 1], where 0.5 changes nothing.

    The paper's, for Cars and Aircraft only.
    """
    from PIL import ImageEnhance  # for those alone who ask for it

    image = ImageEnhance.Brightness(image).enhance(1 + (2 * brightness - 1) * 32 / 255)
    return ImageEnhance.Color(image).enhance(1 + (2 * saturation - 1) * 0.5)


def eval_box(size: Size, fraction: float) -> Box:
    """Return the centred square of ``fraction`` of the short side that is evaluated, in whole pixels.

    The square is cut before it is resized, as in EfficientNet's own evaluation (there R / (R + 32), rounded
    down); a long, narrow photograph then costs no more than another.
    """
    side = max(int(min(size) * fraction), 1)
    return _centred(size, side, side)


def eval_pixels(photo: Photo, box: Box, resolution: int, interpolation: str) -> Image.Image:
    """Read what lies in ``box``, at full size, and resize it to R x R (RGB). Raises PhotoError as `train_pixels`."""
    key = (box, resolution, interpolation)
    return photo.memo(key, resolution * resolution, lambda: _cut(photo.rgb(), box, resolution, interpolation))


def _centred(size: Size, width: int, height: int) -> Box:
    left, upper = (size[0] - width + 1) // 2, (size[1] - height + 1) // 2
    return left, upper, left + width, upper + height


def _cut(image: Image.Image, box: tuple[float, ...], resolution: int, interpolation: str) -> Image.Image:
    """Cut out ``box`` and resize it to R x R.

    Cut first: Pillow's ``resize(box=...)`` alone would let the filter see beyond the edge of the box.
    """
    left, upper, right, lower = box
    x, y = math.floor(left), math.floor(upper)
    image = image.crop((x, y, min(math.ceil(right), image.width), min(math.ceil(lower), image.height)))
    # What is left of the box's fractions, after a decoding at reduced size; else this is the whole image.
    inner = (left - x, upper - y, min(right - x, image.width), min(lower - y, image.height))
    return image.resize((resolution, resolution), INTERPOLATIONS[interpolation], box=inner)
