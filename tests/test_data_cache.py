"""The cache changes no bit, never holds more than it may, and says what it did."""

from __future__ import annotations

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinytl.data import Batch, EvalTransform, Loader, PhotoCache, PhotoSet, TrainTransform, open_photo, scan
from tinytl.data import cache as cache_module
from tinytl.data.cache import ENTRY_BYTES
from tinytl.errors import DataError, InputError
from tinytl.run import train
from tinytl.spec import FitOptions, RunOptions, TrainSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 16
AUGMENT, PLAIN = TrainTransform(SIDE, MEAN, STD, color=True), EvalTransform(SIDE, MEAN, STD)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoSet:
    """Large JPEGs (decoded at several reduced sizes, some turned), small ones, PNGs; 12 in two classes."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(12):
        folder = root / ("even" if number % 2 == 0 else "odd")
        folder.mkdir(exist_ok=True)
        small = Image.fromarray(noise.integers(0, 256, (5, 6, 3), np.uint8))
        size = (12, 9) if number % 4 == 3 else (120 + 20 * number, 300 - 10 * number)
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        suffix = "png" if number % 3 == 0 else "jpg"
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.{suffix}", exif=exif)
    return scan(root)


def loader(photos: PhotoSet, cache: PhotoCache | None, **options: object) -> Loader:
    return Loader(photos, AUGMENT, 5, **{"shuffle": True, "seed": 3, "cache": cache, **options})  # type: ignore[arg-type]


def plain(photos: PhotoSet, cache: PhotoCache | None) -> Loader:
    return Loader(photos, PLAIN, 5, shuffle=False, cache=cache)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in ((a.images, b.images), (a.labels, b.labels), (a.indices, b.indices)))


def held(cache: PhotoCache) -> int:
    images = [image for file in cache._files.values() for image in file.images.values()]
    assert all(len(image.pixels) == 3 * image.size[0] * image.size[1] for image in images)
    return sum(len(image.pixels) + ENTRY_BYTES for image in images)


@pytest.mark.parametrize("limit", [0, 50_000, 400_000, 10**8])
@pytest.mark.parametrize("workers", [0, 3])
def test_every_bit_is_as_without(photos: PhotoSet, limit: int, workers: int) -> None:
    cache = PhotoCache(limit)
    for epoch in range(4):
        expected, got = (loader(photos, c, workers=workers).epoch(epoch) for c in (None, cache))
        for a, b in zip(expected, got, strict=True):
            assert same(a, b)
        for a, b in zip(plain(photos, None).epoch(epoch), plain(photos, cache).epoch(epoch), strict=True):
            assert same(a, b)
        assert cache.held_bytes == held(cache) <= limit
    if limit == 0:
        assert (len(cache), cache.hits) == (0, 0)
    else:
        assert cache.hits > 0


def test_when_all_fits_no_file_is_opened_again(photos: PhotoSet, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PhotoCache(10**8)
    for epoch in range(12):  # until every size that a crop may ask for has come
        list(loader(photos, cache).epoch(epoch))
    list(plain(photos, cache).epoch(0))
    wanted = list(loader(photos, None).epoch(0)), list(plain(photos, None).epoch(0))

    def refuse(path: Path) -> object:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(cache_module, "open_photo", refuse)
    got = list(loader(photos, cache).epoch(0)), list(plain(photos, cache).epoch(0))
    for expected, found in zip(wanted, got, strict=True):
        assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_of_evaluation_the_smaller_is_held(photos: PhotoSet) -> None:
    cache = PhotoCache(10**8)
    list(plain(photos, cache).epoch(0))
    sizes = []
    for path, _ in photos.items:
        with open_photo(path) as photo:
            sizes.append(min(SIDE * SIDE, photo.size[0] * photo.size[1]))
    assert len(set(sizes)) == 2  # some photographs are smaller than what is cut of them
    assert cache.held_bytes == sum(3 * size + ENTRY_BYTES for size in sizes)
    assert (cache.reads, cache.hits) == (12, 0)
    list(plain(photos, cache).epoch(1))
    assert (cache.reads, cache.hits) == (24, 12)
    assert cache.describe() == (
        f"cache: 12 images in {cache.held_bytes / 1e6:.1f} of 100.0 MB; 12 of 24 reads (50%) came from it"
    )


def test_another_transform_is_another_image(photos: PhotoSet) -> None:
    """One cache for evaluation at two sizes and crops: none gets the other's."""
    cache = PhotoCache(10**8)
    for transform in (PLAIN, EvalTransform(SIDE, MEAN, STD, 0.5), EvalTransform(8, MEAN, STD), PLAIN):
        with_cache, without = (Loader(photos, transform, 12, shuffle=False, cache=c) for c in (cache, None))
        assert same(next(iter(with_cache.epoch(0))), next(iter(without.epoch(0))))


def test_what_is_counted_covers_what_is_held(photos: PhotoSet) -> None:
    """By Python's own account of its memory: the bytes that are charged are at least those that are taken."""
    cache = PhotoCache(10**8)

    def read_all() -> None:
        for path, _ in photos.items:
            for shrink in (1, 2, 4, 8):
                with cache.open(path) as photo:
                    photo.reduced(shrink)

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        read_all()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    pixels = cache.held_bytes - ENTRY_BYTES * len(cache)
    assert len(cache) > 30
    assert pixels < grown <= cache.held_bytes


def test_many_threads_one_account(photos: PhotoSet) -> None:
    """All ask for the same photographs at once: each is held once, and the bound holds at every moment."""
    cache, gate, over = PhotoCache(150_000), threading.Barrier(8), []

    def read(number: int) -> None:
        gate.wait()
        for path, _ in photos.items:
            with cache.open(path) as photo:
                photo.rgb()
            over.append(cache.held_bytes > cache.limit_bytes)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert not any(over)
    assert cache.held_bytes == held(cache) > 0


def test_room_is_given_back_when_a_copy_fails(photos: PhotoSet, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PhotoCache(10**8)

    def refuse(image: Image.Image) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "tobytes", refuse)
    with pytest.raises(MemoryError), cache.open(photos.items[0][0]) as photo:
        photo.rgb()
    assert (cache.held_bytes, len(cache)) == (0, 0)


def test_unreadable_photographs_are_named_as_without(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no photograph")
    with pytest.raises(DataError, match=r"x\.jpg"), PhotoCache(10**6).open(tmp_path / "x.jpg"):
        pass


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(InputError, match="cache of -1 bytes"):
        PhotoCache(-1)


def test_a_run_with_a_cache_learns_the_same_bits(photos: PhotoSet, tmp_path: Path) -> None:
    fit = FitOptions(epochs=2, lr=1e-3)
    spec = TrainSpec(
        str(photos.root), "proxylessnas_mobile", "ft-last", pretrained=False, resolution=32, batch_size=4, fit=fit
    )
    plain, cached = (train(spec, tmp_path / str(size), options=RunOptions(cache=size)) for size in (0, 10**7))
    assert plain.cache is None
    assert cached.cache is not None
    assert cached.cache.hits > 0
    assert (tmp_path / "0" / "delta.safetensors").read_bytes() == (
        tmp_path / str(10**7) / "delta.safetensors"
    ).read_bytes()
