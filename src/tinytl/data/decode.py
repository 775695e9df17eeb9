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

import functools
import importlib
import os
import stat
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from tinytl.errors import PhotoError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # JPEG opens the two-picture MPO of phones too
# How a file of each begins, and the module of Pillow that reads it.
_SIGNATURES = (
    ("JPEG", (b"\xff\xd8\xff",), "JpegImagePlugin"),
    ("PNG", (b"\x89PNG\r\n\x1a\n",), "PngImagePlugin"),
    ("WEBP", (b"RIFF",), "WebPImagePlugin"),
    ("BMP", (b"BM",), "BmpImagePlugin"),
    ("GIF", (b"GIF8",), "GifImagePlugin"),
    ("TIFF", (b"II", b"MM"), "TiffImagePlugin"),
)
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

    ``size``: width and height in pixels as seen upright, at full resolution. ``shrinks``: whether the file can
    be decoded at a reduced size (a JPEG).
    """

    def __init__(self, image: Image.Image, name: str = "in memory") -> None:
        self._image, self._name = image, name
        self._png = image.format == "PNG"
        self._factor = 1
        # Only JPEG decodes at a reduced size, so only there is it worth knowing the size before the pixels.
        self.shrinks = image.format in ("JPEG", "MPO")
        if not self.shrinks:
            self._image = _upright(image)
        width, height = self._image.size
        turned = self.shrinks and _orientation(image) in (5, 6, 7, 8)
        self.size: Size = (height, width) if turned else (width, height)

    def rgb(self) -> Image.Image:
        """Read the pixels at full size: mode RGB, upright. Raises PhotoError as `open_photo` does."""
        return self.reduced(1)[0]

    def factor(self, shrink: float) -> int:
        """Return by how much `reduced` divides the size for this ``shrink``: 1, 2, 4 or 8."""
        return next((f for f in (8, 4, 2) if self.shrinks and f <= min(shrink, *self.size)), 1)

    def reduced(self, shrink: float) -> tuple[Image.Image, int]:
        """Read the pixels, a JPEG at 1/2, 1/4 or 1/8 of its size where that is not below 1/``shrink``.

        That is libjpeg's scaled inverse cosine transform: several times faster, and a function of nothing but
        the file and ``shrink``. Returns the image (RGB, upright) and how many pixels of the photograph one of
        its pixels is wide and high: 1, 2, 4 or 8. A photograph is read once: a second call gives the first
        one's size.

        Raises PhotoError as `open_photo` does.
        """
        with _naming(self._name):
            if not self.shrinks:
                return _to_rgb(self._image, self._png), 1
            width, height = self._image.size
            factor = self.factor(shrink)
            if factor > 1 and self._image.draft(None, (width // factor, height // factor)) is not None:
                self._factor = factor
            return _to_rgb(_upright(self._image), self._png), self._factor

    def memo(self, key: Hashable, pixels: int, make: Callable[[], Image.Image]) -> Image.Image:
        """Return ``make()``, an RGB image of so many pixels that depends on this photograph and ``key`` alone.

        A photograph out of a `PhotoCache` may return what it made before; this one makes it.
        """
        return make()


@contextmanager
def open_photo(path: str | Path) -> Iterator[Photo]:
    """Open a photograph; the file is closed at the end of the ``with`` block.

    Raises PhotoError (a DataError), naming the file, for a file that is missing, unreadable, empty, truncated, no
    image of a known format, or larger than `MAX_PIXELS`: here, or when the pixels are read.
    """
    with ExitStack() as stack:
        with _naming(str(path)):
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError
            if not stat.S_ISREG(status.st_mode):  # to open a pipe would be to wait for whoever writes to it
                raise _Unsupported("is a device or a pipe: expected a file", "no file")
            if status.st_size == 0:
                raise _Unsupported("is empty: replace or remove it", "empty")
            image = stack.enter_context(Image.open(path, formats=(_format(path),)))
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            photo = Photo(image, str(path))
        yield photo


def read_rgb(path: str | Path) -> Image.Image:
    """Read one photograph at full size: mode RGB, upright. Raises PhotoError as `open_photo` does."""
    with open_photo(path) as photo:
        return photo.rgb()


def _format(path: str | Path) -> str:
    """The format of a file by its first bytes, its reader imported: asked for all, Pillow would import all it has."""
    with open(path, "rb") as file:
        begin = file.read(16)
    for name, signatures, module in _SIGNATURES:
        if begin.startswith(signatures):
            importlib.import_module(f"PIL.{module}")
            return name
    raise UnidentifiedImageError


class _Unsupported(Exception):
    """What lies there is whole but no photograph; in a sentence's end, and in a word or two."""

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn what Pillow raises on opening and reading ``path`` into one line that names it."""
    try:
        yield
    except MemoryError:  # the machine's fault, not the file's
        raise
    except Exception as error:
        sentence, reason = _explained(error)
        raise PhotoError(f"image {path!r} {sentence}", reason) from error


def _explained(error: Exception) -> tuple[str, str]:
    """Return what is wrong with an image, as the end of a sentence that holds the mend, and in a word or two."""
    if isinstance(error, _Unsupported):
        return str(error), error.reason
    if isinstance(error, FileNotFoundError):
        return "is not there: check the path", "missing"
    if isinstance(error, IsADirectoryError):
        return "is a folder: expected an image", "a folder"
    if isinstance(error, PermissionError):
        return "cannot be read (permission denied): allow reading it", "permission denied"
    if isinstance(error, UnidentifiedImageError):
        known = ", ".join(FORMATS)
        return f"is damaged or of an unknown format: expected one of {known}; convert or remove it", "no known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"holds more than {MAX_PIXELS:,} pixels, which may be a decompression bomb: scale it down or remove it",
            "too many pixels",
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:  # the system's; Pillow's own have no number
        return f"cannot be read ({error.strerror}): check the path and the disk", str(error.strerror).lower()
    # Pillow's readers answer damage with nearly every kind of exception: OSError, SyntaxError, ValueError,
    # struct.error, EOFError, IndexError, ...
    return f"is damaged ({reason}): replace or remove it", "truncated" if "truncated" in reason.lower() else "damaged"


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block does not make the photograph unusable
        return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # before asking for the orientation: the TIFF reader applies it here and drops the tag
    turn = _TURN.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


@functools.cache
def _eight_bits() -> list[int]:
    """For each of 16 bits the nearest of 8."""
    return [(grey * 255 + 32767) // 65535 for grey in range(65536)]


def _to_rgb(image: Image.Image, png: bool) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and png):
        # A PNG has at most 16 bits, which older versions of Pillow give as mode I.
        grey = image if image.mode == "I" else image.convert("I")
        return grey.point(_eight_bits(), "L").convert("RGB")
    if image.mode in ("I", "F"):
        raise _Unsupported(
            f"has 32-bit pixels (mode {image.mode}), whose range is unknown: convert it to 8 or 16 bits",
            "32-bit pixels",
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
