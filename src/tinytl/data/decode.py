"""One photograph, decoded right: upright, RGB, 8 bits, or an error that names the file.

What becomes of each kind of image:

- a camera's EXIF orientation is applied (an unreadable EXIF block counts as none, as in image viewers);
- 1-bit, grey, palette and CMYK become RGB; CMYK without its colour profile, as everywhere in Pillow;
- alpha, also a palette's or PNG's transparent colour, is composed on white;
- 16-bit grey is scaled from its full range, 0..65535, to 0..255 (Pillow's own conversion would clip it at
  255); 16-bit colour keeps its high byte;
- of an animation, the first frame;
- 32-bit integers and floats have no known white: refused.

Only formats that are photographs are tried, whatever the file is called: Pillow can also open formats that
run other programs (EPS), and nothing here should.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tinytl.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # JPEG opens the two-picture MPO of phones too
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs; 268 MB as RGB

Size = tuple[int, int]  # width, height: Pillow's order

_TURN = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Photo:
    """An opened photograph whose pixels are read when asked for; `open_photo` makes it.

    ``size``: width and height in pixels as seen upright, at full resolution.
    """

    def __init__(self, image: Image.Image, name: str = "in memory") -> None:
        self._image, self._name = image, name
        self._png = image.format == "PNG"
        self._factor = 1
        # Only JPEG decodes at a reduced size, so only there is it worth knowing the size before the pixels.
        self._can_shrink = image.format in ("JPEG", "MPO")
        if not self._can_shrink:
            self._image = _upright(image)
        width, height = self._image.size
        turned = self._can_shrink and _orientation(image) in (5, 6, 7, 8)
        self.size: Size = (height, width) if turned else (width, height)

    def rgb(self) -> Image.Image:
        """Read the pixels at full size: mode RGB, upright. Raises DataError as `open_photo` does."""
        return self.reduced(1)[0]

    def reduced(self, shrink: float) -> tuple[Image.Image, int]:
        """Read the pixels, a JPEG at 1/2, 1/4 or 1/8 of its size where that is not below 1/``shrink``.

        That is libjpeg's scaled inverse cosine transform: several times faster, and a function of nothing but
        the file and ``shrink``. Returns the image (RGB, upright) and how many pixels of the photograph one of
        its pixels is wide and high: 1, 2, 4 or 8. A photograph is read once: a second call gives the first
        one's size.

        Raises DataError as `open_photo` does.
        """
        with _naming(self._name):
            if not self._can_shrink:
                return _to_rgb(self._image, self._png), 1
            width, height = self._image.size
            factor = next((f for f in (8, 4, 2) if f <= min(shrink, width, height)), 1)
            if factor > 1 and self._image.draft(None, (width // factor, height // factor)) is not None:
                self._factor = factor
            return _to_rgb(_upright(self._image), self._png), self._factor


@contextmanager
def open_photo(path: str | Path) -> Iterator[Photo]:
    """Open a photograph; the file is closed at the end of the ``with`` block.

    Raises DataError, naming the file, for a file that is missing, unreadable, truncated, no image of a known
    format, or larger than `MAX_PIXELS`: here, or when the pixels are read.
    """
    with ExitStack() as stack:
        with _naming(str(path)):
            image = stack.enter_context(Image.open(path, formats=FORMATS))
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            photo = Photo(image, str(path))
        yield photo


def read_rgb(path: str | Path) -> Image.Image:
    """Read one photograph at full size: mode RGB, upright. Raises DataError as `open_photo` does."""
    with open_photo(path) as photo:
        return photo.rgb()


class _Unsupported(Exception):
    """The pixels are intact but mean nothing that can be shown as RGB."""


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn what Pillow raises on opening and reading ``path`` into one line that names it."""
    try:
        yield
    except MemoryError:  # the machine's fault, not the file's
        raise
    except FileNotFoundError as error:
        raise DataError(f"no image {path!r}: check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"{path!r} is a folder: expected an image") from error
    except PermissionError as error:
        raise DataError(f"image {path!r} cannot be read (permission denied): allow reading it") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"image {path!r} is empty, damaged or of an unknown format: expected one of "
            f"{', '.join(FORMATS)}; convert or remove it"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"image {path!r} holds more than {MAX_PIXELS:,} pixels, which may be a decompression bomb: "
            "scale it down or remove it"
        ) from error
    except _Unsupported as error:
        raise DataError(f"image {path!r} {error}") from error
    except Exception as error:
        # Pillow's readers answer damage with nearly every kind of exception: OSError, SyntaxError,
        # ValueError, struct.error, EOFError, IndexError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"image {path!r} is damaged ({reason}): replace or remove it") from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block does not make the photograph unusable
        return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # before asking for the orientation: the TIFF reader applies it here and drops the tag
    turn = _TURN.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, png: bool) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and png):
        # A PNG has at most 16 bits, which older versions of Pillow give as mode I.
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _Unsupported(f"has 32-bit pixels (mode {image.mode}), whose range is unknown: convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
