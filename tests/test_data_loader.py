"""Transforms and batches: what a batch depends on, and what is left when nobody wants more of them."""

from __future__ import annotations

import gc
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinytl.data import (
    Batch,
    EvalTransform,
    Loader,
    Photo,
    PhotoSet,
    TrainTransform,
    open_photo,
    sample_rng,
    scan,
)
from tinytl.data.transforms import epoch_order
from tinytl.errors import DataError, InputError, UnknownNameError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SIDE = 16
# Written by the calls in test_draws_are_the_same_everywhere (numpy 2.4.6).
GOLDEN_ORDER = [2, 0, 1, 4, 5, 6, 7, 3]
GOLDEN_DRAWS = [0.6781078683721724, 0.8130775552240744]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoSet:
    """11 photographs in two classes, some large enough that a JPEG is decoded at a reduced size."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(11):
        folder = root / ("even" if number % 2 == 0 else "odd")
        folder.mkdir(exist_ok=True)
        small = noise.integers(0, 256, (5, 6, 3), np.uint8)
        image = Image.fromarray(small).resize((90 + 20 * number, 160 - 10 * number), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.{'jpg' if number % 3 else 'png'}")
    return scan(root)


def train(**options: object) -> TrainTransform:
    return TrainTransform(SIDE, MEAN, STD, **options)  # type: ignore[arg-type]


def loader(photos: PhotoSet, **options: object) -> Loader:
    return Loader(photos, train(color=True), 3, **{"shuffle": True, "seed": 5, **options})  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in ((a.images, b.images), (a.labels, b.labels), (a.indices, b.indices)))


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tinytl-decode")]


# Transforms


def by_hand(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image).astype(np.float64)
    return ((pixels / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)


def test_evaluation_by_hand():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 65, 3), np.uint8))
    got = EvalTransform(SIDE, MEAN, STD, 0.8)(Photo(image))
    # 0.8 of 40 is 32; (65 - 32 + 1) // 2 = 17 from the left, (40 - 32 + 1) // 2 = 4 from the top.
    expected = by_hand(image.crop((17, 4, 49, 36)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert got.dtype == np.float32
    assert got.shape == (3, SIDE, SIDE)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_bytes_of_tensorflow_networks_are_exact():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    third = (127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255)
    got = EvalTransform(16, *third, crop_fraction=1.0)(Photo(image))
    assert np.array_equal(got[1].ravel(), (np.arange(256, dtype=np.float32) - 127) / 128)


def test_training_by_hand():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8))
    transform = train(flip=False)
    box = transform.crop(image.size, sample_rng(0, 0, 0))
    expected = by_hand(image.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(transform(Photo(image), sample_rng(0, 0, 0)), expected, rtol=1e-5, atol=1e-6)


def test_flip_is_a_mirror_of_half():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 30, 3), np.uint8))
    flipped = 0
    for index in range(200):
        plain = train(flip=False)(Photo(image), sample_rng(0, 0, index))
        maybe = train()(Photo(image), sample_rng(0, 0, index))
        mirror = np.array_equal(maybe, plain[:, :, ::-1])
        assert mirror or np.array_equal(maybe, plain)
        flipped += mirror
    assert 70 < flipped < 130


def test_color_keeps_place_and_bounds():
    image = Image.new("RGB", (20, 20), (200, 100, 50))
    transform = TrainTransform(4, ZERO, ONE, color=True)
    seen = np.stack([transform(Photo(image), sample_rng(0, 0, index))[:, 0, 0] for index in range(100)])
    assert np.ptp(seen, axis=0).min() > 0.05
    grey = seen @ np.array([0.299, 0.587, 0.114])  # saturation leaves it, brightness moves it by 1 +- 32/255
    original = np.array([200, 100, 50]) @ np.array([0.299, 0.587, 0.114]) / 255
    assert np.all(np.abs(grey / original - 1) <= 32 / 255 + 0.02)


sides = st.integers(1, 3000)


@given(sides, sides, st.integers(0, 2**32), st.floats(0.01, 1.0))
def test_crop_is_within_the_photograph(width: int, height: int, seed: int, least: float):
    transform = train(scale=(least, 1.0))
    left, upper, right, lower = transform.crop((width, height), sample_rng(seed, 0, 0))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    crop_width, crop_height = right - left, lower - upper
    if min(crop_width, crop_height) > 50:  # where rounding to whole pixels is small
        assert 3 / 4 * 0.97 <= crop_width / crop_height <= 4 / 3 * 1.03


@given(sides, sides, st.floats(0.001, 1.0))
def test_evaluation_crop_is_within_the_photograph(width: int, height: int, fraction: float):
    left, upper, right, lower = EvalTransform(SIDE, MEAN, STD, fraction).crop((width, height))
    assert right - left == lower - upper
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


def test_crops_cover_the_scale_asked_for():
    transform = train(scale=(0.22, 1.0))
    boxes = [transform.crop((500, 500), sample_rng(0, 0, index)) for index in range(300)]
    areas = np.array([(r - x) * (b - y) for x, y, r, b in boxes]) / 500**2
    assert 0.21 < areas.min() < 0.3
    assert 0.85 < areas.max() <= 1
    assert len(set(boxes)) > 290


def test_a_crop_that_cannot_fit_is_the_centre():
    assert train().crop((3000, 30), sample_rng(0, 0, 0)) == (1480, 0, 1520, 30)
    assert train().crop((30, 3000), sample_rng(0, 0, 0)) == (0, 1480, 30, 1520)
    assert train().crop((1, 1), sample_rng(0, 0, 0)) == (0, 0, 1, 1)


def test_reduced_decoding_shows_the_same_crop(tmp_path: Path):
    y, x = np.mgrid[0:601, 0:803]
    smooth = np.stack([255 * x / 802, 255 * y / 600, 128 + 0 * x], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth).save(tmp_path / "x.jpg", quality=95, exif=exif)
    Image.fromarray(smooth).rotate(-90, expand=True).save(tmp_path / "x.png")
    reductions = set()
    for index in range(10):
        results = []
        for name in ("x.jpg", "x.png"):
            with open_photo(tmp_path / name) as photo:
                results.append(TrainTransform(SIDE, ZERO, ONE)(photo, sample_rng(0, 0, index)))
                reductions.add(photo.reduced(1)[1])
        np.testing.assert_allclose(results[0], results[1], atol=0.03)
    assert reductions >= {1, 8}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resolution": 0}, "resolution 0"),
        ({"mean": (0.5, 0.5)}, "mean (0.5, 0.5)"),
        ({"std": (0.5, 0.5, 0.0)}, "std (0.5, 0.5, 0.0)"),
        ({"scale": (0.5, 0.2)}, "crop scale (0.5, 0.2)"),
        ({"scale": (0.0, 1.0)}, "crop scale"),
        ({"ratio": (0.0, 1.0)}, "crop ratio"),
    ],
)
def test_transform_errors(options: dict, expected: str):
    with pytest.raises(InputError) as caught:
        TrainTransform(**{"resolution": 8, "mean": MEAN, "std": STD, **options})
    assert str(caught.value).startswith(expected)


def test_more_transform_errors():
    with pytest.raises(InputError, match=r"crop fraction 1\.5 is out of range"):
        EvalTransform(8, MEAN, STD, 1.5)
    with pytest.raises(UnknownNameError, match="did you mean 'bicubic'"):
        EvalTransform(8, MEAN, STD, interpolation="bicubik")


# What is drawn


@given(st.integers(0, 2**63), st.integers(0, 10**6), st.integers(0, 500))
def test_order_is_a_permutation(seed: int, epoch: int, count: int):
    order = epoch_order(seed, epoch, count)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, epoch_order(seed, epoch, count))


def test_draws_are_the_same_everywhere():
    # Golden: a run that is resumed under another version of numpy must see the same photographs.
    assert epoch_order(0, 0, 8).tolist() == GOLDEN_ORDER
    assert sample_rng(0, 0, 0).random(2).tolist() == GOLDEN_DRAWS


def test_streams_differ():
    draws = {
        tuple(sample_rng(seed, epoch, index).integers(0, 2**32, 4).tolist())
        for seed in range(3)
        for epoch in range(3)
        for index in range(3)
    }
    assert len(draws) == 27
    assert len({tuple(epoch_order(seed, epoch, 20)) for seed in range(3) for epoch in range(3)}) == 9


# Batches


def test_a_batch(photos: PhotoSet):
    batches = list(loader(photos, workers=0).epoch(0))
    assert len(batches) == len(loader(photos)) == 4
    assert [len(batch) for batch in batches] == [3, 3, 3, 2]
    first = batches[0]
    assert (first.images.dtype, first.images.shape) == (torch.uint8, (3, 3, SIDE, SIDE))
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert first.labels.dtype == first.indices.dtype == torch.int64
    assert [photos.items[i][1] for i in first.indices] == first.labels.tolist()
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(11))
    index = int(first.indices[1])
    with open_photo(photos.items[index][0]) as photo:
        alone = train(color=True)(photo, sample_rng(5, 0, index))
    assert np.array_equal(first.normalized()[1].numpy(), alone)


def test_batches_do_not_depend_on_workers(photos: PhotoSet):
    expected = list(loader(photos, workers=0).epoch(2))
    for options in (
        {"workers": 1},
        {"workers": 3},
        {"workers": 3, "prefetch": 1},
        {"workers": 2, "prefetch": 9},
    ):
        got = list(loader(photos, **options).epoch(2))
        assert all(same(a, b) for a, b in zip(expected, got, strict=True))
    assert not decoding_threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle(photos: PhotoSet, workers: int):
    whole = list(loader(photos).epoch(1))
    for start in range(len(whole) + 1):
        rest = list(loader(photos, workers=workers).epoch(1, start))
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_epochs_and_seeds_differ(photos: PhotoSet):
    orders = {tuple(loader(photos, seed=seed).order(epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    straight = loader(photos, shuffle=False, workers=0)
    first, second = (next(iter(straight.epoch(epoch))) for epoch in (0, 1))
    assert first.indices.tolist() == second.indices.tolist() == [0, 1, 2]
    assert not torch.equal(first.images, second.images)  # the crops differ


def test_evaluation_does_not_change(photos: PhotoSet):
    straight = Loader(photos, EvalTransform(SIDE, MEAN, STD), 4, shuffle=False)
    assert all(same(a, b) for a, b in zip(straight.epoch(0), straight.epoch(7), strict=True))


def test_drop_last(photos: PhotoSet):
    assert len(loader(photos, drop_last=True)) == 3
    assert [len(batch) for batch in loader(photos, drop_last=True).epoch(0)] == [3, 3, 3]


def test_no_more_than_prefetch_under_way(photos: PhotoSet):
    """While the consumer holds batch k, nothing beyond k + prefetch may be opened, however long it takes."""
    opened: list[int] = []
    inner = EvalTransform(SIDE, MEAN, STD)

    class Counting:
        resolution = SIDE

        def __call__(self, photo: Photo, rng: np.random.Generator) -> np.ndarray:
            opened.append(1)
            return inner(photo)

    one = Loader(photos, Counting(), 1, shuffle=False, workers=3, prefetch=2)
    for number, _ in enumerate(one.epoch(0)):
        assert number + 1 <= len(opened) <= number + 1 + 2
    assert len(opened) == 11


def test_threads_end_with_the_loop(photos: PhotoSet):
    for _ in loader(photos).epoch(0):
        assert decoding_threads()
        break
    gc.collect()
    assert not decoding_threads()
    with closing(loader(photos).epoch(0)) as batches:
        next(batches)
    assert not decoding_threads()

    def consume() -> None:
        for _ in loader(photos).epoch(0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    gc.collect()
    assert not decoding_threads()


@pytest.mark.parametrize("workers", [0, 3])
def test_an_unreadable_photograph_is_named(tmp_path: Path, photos: PhotoSet, workers: int):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(photos.items[1][0].read_bytes()[:500])
    items = list(photos.items)
    items[4] = items[7] = (bad, 1)
    straight = loader(PhotoSet(photos.root, photos.classes, tuple(items)), shuffle=False, workers=workers)
    batches = straight.epoch(0)
    next(batches)  # the batch before it is whole
    with pytest.raises(DataError, match=r"bad\.jpg"):
        next(batches)
    assert not decoding_threads()


def test_loader_errors(photos: PhotoSet):
    for options, expected in (
        ({"workers": -1}, "number of workers -1"),
        ({"seed": -1}, "seed -1"),
        ({"prefetch": 0}, "prefetch 0"),
    ):
        with pytest.raises(InputError, match=expected):
            loader(photos, **options)
    with pytest.raises(InputError, match="batch size 0"):
        Loader(photos, train(), 0, shuffle=True)
    with pytest.raises(InputError, match="batch size 12 is more than the 11 photographs"):
        Loader(photos, train(), 12, shuffle=True, drop_last=True)
    with pytest.raises(DataError, match="gives no photographs"):
        loader(PhotoSet(photos.root, photos.classes, ()))
    for arguments in ((-1, 0), (0, -1), (0, 5)):
        with pytest.raises(ValueError, match="start_batch"):
            loader(photos).epoch(*arguments)
