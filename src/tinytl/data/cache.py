"""Decoded photographs held in memory, within a stated bound.

What is held is what decoding gives, before anything random: RGB at 8 bits, upright, at the reduced size that a crop
asked for (see `Photo.reduced`). A photograph may be held at two or three sizes, since another crop may ask for another
one. Of evaluation, which cuts the same square each time, the square at the network's resolution is held where that is
smaller than the photograph. Either way a hit gives the very pixels that decoding would give, so a batch has the same
bits with a cache and without.

The first that come are held until nothing more fits, and are not given up for others: in an epoch every photograph
comes once, so a cache that pushed out the oldest would always push out the one needed next. Files are not cached as
they are on the disk: the operating system does that.

A file that changes while a cache holds it is not read again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tinytl.data.decode import Photo, Size, open_photo
from tinytl.errors import InputError

ENTRY_BYTES = 1024  # charged for each held image beside its pixels: keys, tuples, tables


@dataclass(frozen=True)
class _Held:
    """One image: its size in pixels, what `Photo.reduced` divided by, and 3 bytes a pixel, row by row."""

    size: Size
    factor: int
    pixels: bytes


@dataclass
class _File:
    """What is held of one file: what `Photo` knows before reading pixels, and images by what was asked for."""

    size: Size
    shrinks: bool
    images: dict[Hashable, _Held] = field(default_factory=dict)


class PhotoCache:
    """Holds decoded photographs for any number of loaders and threads; ``Loader(..., cache=cache)``.

    ``limit_bytes`` is never passed; ``held_bytes`` is 3 for each pixel held and `ENTRY_BYTES` for each image.

    Raises InputError for a negative bound.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise InputError(f"cache of {limit_bytes} bytes: expected 0 or more")
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.reads, self.hits = 0, 0
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of images held."""
        with self._lock:
            return sum(len(file.images) for file in self._files.values())

    @contextmanager
    def open(self, path: Path) -> Iterator[Photo]:
        """Open a photograph as `open_photo` does; the file itself only when something is not held."""
        with ExitStack() as stack:
            yield _CachedPhoto(self, path, stack)

    def describe(self) -> str:
        """Say in one line what is held and how many reads it served."""
        share = f" ({self.hits / self.reads:.0%})" if self.reads else ""
        return (
            f"cache: {len(self):,} images in {self.held_bytes / 1e6:.1f} of {self.limit_bytes / 1e6:.1f} MB; "
            f"{self.hits:,} of {self.reads:,} reads{share} came from it"
        )

    def _known(self, path: Path) -> tuple[Size, bool] | None:
        with self._lock:
            file = self._files.get(path)
            return None if file is None else (file.size, file.shrinks)

    def _get(self, path: Path, key: Hashable) -> _Held | None:
        with self._lock:
            file = self._files.get(path)
            held = None if file is None else file.images.get(key)
            self.reads += 1
            self.hits += held is not None
            return held

    def _put(self, path: Path, photo: Photo, key: Hashable, image: Image.Image, factor: int) -> None:
        """Hold a copy of ``image``, if it fits; the room is taken before the copy is made."""
        cost = 3 * image.width * image.height + ENTRY_BYTES
        with self._lock:
            if self.held_bytes + cost > self.limit_bytes:
                return
            self.held_bytes += cost
        kept = False
        try:
            held = _Held(image.size, factor, image.tobytes())
            with self._lock:
                file = self._files.setdefault(path, _File(photo.size, photo.shrinks))
                kept = file.images.setdefault(key, held) is held  # another thread may have been first
        finally:
            if not kept:
                with self._lock:
                    self.held_bytes -= cost


class _CachedPhoto(Photo):
    """A photograph whose pixels come from the cache, or from the file and then into the cache."""

    def __init__(self, cache: PhotoCache, path: Path, stack: ExitStack) -> None:
        self._cache, self._path, self._stack = cache, path, stack
        self._file: Photo | None = None
        self._read: tuple[Image.Image, int] | None = None
        known = cache._known(path)
        self.size, self.shrinks = known or (self._opened().size, self._opened().shrinks)

    def _opened(self) -> Photo:
        if self._file is None:
            self._file = self._stack.enter_context(open_photo(self._path))
        return self._file

    def reduced(self, shrink: float) -> tuple[Image.Image, int]:
        if self._read is None:  # read once, as in Photo
            wanted = self.factor(shrink)
            held = self._cache._get(self._path, wanted)
            if held is not None:
                self._read = _image(held), held.factor
            else:
                self._read = self._opened().reduced(wanted)
                self._cache._put(self._path, self, wanted, *self._read)
        return self._read

    def memo(self, key: Hashable, pixels: int, make: Callable[[], Image.Image]) -> Image.Image:
        if pixels >= self.size[0] * self.size[1]:  # the photograph takes less room, and `make` reads it from here
            return make()
        held = self._cache._get(self._path, key)
        if held is not None:
            return _image(held)
        self._read = self._opened().reduced(1)  # not by way of the cache: it need not hold both
        image = make()
        self._cache._put(self._path, self, key, image, 1)
        return image


def _image(held: _Held) -> Image.Image:
    return Image.frombytes("RGB", held.size, held.pixels)
