"""Batches of bytes: the float32 that comes of them has the bits it always had, and no byte is held unsaid."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torch._subclasses.fake_tensor import FakeTensorMode

from tinytl.data import (
    Batch,
    EvalTransform,
    Loader,
    Normalize,
    Photo,
    PhotoSet,
    TrainTransform,
    open_photo,
    sample_rng,
    scan,
)
from tinytl.data.transforms import Transform, in_pixels
from tinytl.errors import InputError
from tinytl.memory.measured import measure_step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 16
PLAIN, AUGMENT = EvalTransform(SIDE, MEAN, STD), TrainTransform(SIDE, MEAN, STD, color=True)
NORMALIZE = Normalize(MEAN, STD)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoSet:
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(11):
        folder = root / ("even" if number % 2 == 0 else "odd")
        folder.mkdir(exist_ok=True)
        pixels = noise.integers(0, 256, (40 + number, 70 - number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.{'jpg' if number % 3 else 'png'}")
    return scan(root)


def as_before(image: Image.Image, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> np.ndarray:
    """The formula of the time when batches were float32, word for word: the bits that runs have been trained with."""
    pixels = np.asarray(image).astype(np.float32)
    pixels -= (255.0 * np.asarray(mean, np.float64)).astype(np.float32)
    pixels /= (255.0 * np.asarray(std, np.float64)).astype(np.float32)
    return pixels.transpose(2, 0, 1)


def pictures(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 (N, 3, H, W), channels last."""
    values = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    return torch.from_numpy(values).permute(0, 3, 1, 2)


# The formula

channels = st.tuples(*[st.floats(-2, 2, width=64)] * 3)
spreads = st.tuples(*[st.floats(1e-3, 4, width=64)] * 3)


@given(channels, spreads)
def test_all_bytes_have_the_bits_they_had(mean: tuple[float, float, float], std: tuple[float, float, float]):
    every = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    expected = as_before(Image.fromarray(every), mean, std)
    normalize = Normalize(mean, std)
    assert normalize.array(every.transpose(2, 0, 1)).tobytes() == expected.tobytes()
    batch = torch.from_numpy(every).permute(2, 0, 1).expand(2, -1, -1, -1)
    for image in normalize(batch):
        assert image.numpy().tobytes() == expected.tobytes()


@given(st.integers(0, 3), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_every_shape_and_layout(count: int, height: int, width: int, planes: bool):
    images = pictures(count, height, width)
    images = images.contiguous() if planes else images
    before = images.clone()
    got = NORMALIZE(images)
    assert (got.dtype, got.shape) == (torch.float32, images.shape)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    for image, result in zip(images.numpy(), got.numpy(), strict=True):
        assert np.array_equal(result, as_before(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))))


def test_the_bits_of_transforms_are_as_before(photos: PhotoSet):
    """Evaluation and training by hand, from the photograph's pixels to float32, the colours distorted too."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8))
    # 0.875 of 50 is 43; (70 - 43 + 1) // 2 = 14 from the left, (50 - 43 + 1) // 2 = 4 from the top.
    cut = image.crop((14, 4, 57, 47)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert PLAIN(Photo(image)).tobytes() == as_before(cut).tobytes()
    for index in range(20):
        rng = sample_rng(0, 0, index)
        cut = image.crop(AUGMENT.crop(image.size, rng)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        mirrored, brightness, saturation = rng.random(3)
        if mirrored < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        cut = ImageEnhance.Brightness(cut).enhance(1 + (2 * brightness - 1) * 32 / 255)
        cut = ImageEnhance.Color(cut).enhance(1 + (2 * saturation - 1) * 0.5)
        assert AUGMENT(Photo(image), sample_rng(0, 0, index)).tobytes() == as_before(cut).tobytes()
        assert np.array_equal(AUGMENT.pixels(Photo(image), sample_rng(0, 0, index)).transpose(1, 2, 0), np.asarray(cut))


def test_what_it_refuses():
    for options in ({"mean": (0.5, 0.5)}, {"mean": (0.5, 0.5, float("nan"))}, {"std": (1.0, 1.0, 0.0)}):
        with pytest.raises(InputError, match="is out of range: expected three numbers"):
            Normalize(**{"mean": MEAN, "std": STD, **options})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.float32: expected torch\.uint8"):
        NORMALIZE(torch.zeros(1, 3, 4, 4))


# The memory


def rising(work: Callable[[], object]) -> tuple[int, int]:
    """The most that ``work`` has alive at once, by the allocator, and what it leaves; in bytes."""
    work()
    timeline = measure_step(work).timeline
    assert timeline is not None
    return int(timeline.live_bytes.max()), int(timeline.live_bytes[-1])


@pytest.mark.parametrize(("count", "side"), [(1, 224), (3, 37), (8, 16)])
def test_normalizing_takes_its_result_and_one_row(count: int, side: int):
    images = pictures(count, side, side)
    assert rising(lambda: NORMALIZE(images)) == (4 * images.numel() + 12 * side + 12, 0)
    assert NORMALIZE(images).untyped_storage().nbytes() == 4 * images.numel()


def test_fake_tensors_are_described_alike():
    with FakeTensorMode():
        images = torch.empty((4, 3, 32, 32), dtype=torch.uint8, memory_format=torch.channels_last)
        got = NORMALIZE(images)
        assert (got.dtype, got.shape, got.stride()) == (torch.float32, images.shape, images.stride())


def whole(photos: PhotoSet, transform: Transform = PLAIN, **options: object) -> Loader:
    return Loader(photos, transform, 4, **{"shuffle": False, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [None, 1, 3, 4, 9])
@pytest.mark.parametrize("transform", [PLAIN, AUGMENT], ids=["evaluation", "training"])
def test_pieces_are_the_floats_of_old(photos: PhotoSet, size: int | None, transform: EvalTransform | TrainTransform):
    for batch in whole(photos, transform, seed=7).epoch(2):
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        pieces = list(batch.pieces(size))
        assert [len(labels) for _, labels in pieces] == [len(p) for p in batch.labels.split(size or len(batch))]
        assert torch.equal(torch.cat([labels for _, labels in pieces]), batch.labels)
        assert torch.equal(torch.cat([images for images, _ in pieces]), batch.normalized())
        for images, _ in pieces:
            assert images.is_contiguous(memory_format=torch.channels_last)
        for row, index in zip(batch.normalized(), batch.indices.tolist(), strict=True):
            with open_photo(photos.items[index][0]) as photo:
                floats = transform(photo, sample_rng(7, 2, index))
            assert row.numpy().tobytes() == floats.tobytes()


def test_a_piece_is_alive_no_longer_than_it_is_held(photos: PhotoSet):
    batch = next(whole(photos).epoch(0))
    before: weakref.ref[torch.Tensor] | None = None
    for images, labels in batch.pieces(1):
        assert before is None or before() is None
        before = weakref.ref(images)
        del images, labels

    def epoch() -> None:
        for images, labels in batch.pieces(2):
            del images, labels

    piece = 2 * 3 * SIDE * SIDE * 4
    assert rising(epoch)[0] == piece + 12 * SIDE + 12


def test_pieces_of_nothing_are_refused(photos: PhotoSet):
    with pytest.raises(InputError, match="pieces of 0 photographs: expected at least 1"):
        next(next(whole(photos).epoch(0)).pieces(0))


def test_bytes_and_normalize_come_together():
    images, labels = pictures(2, 4, 4), torch.zeros(2, dtype=torch.int64)
    assert Batch(images, labels, labels, NORMALIZE).nbytes == 2 * (48 + 16)
    with pytest.raises(InputError, match=r"torch\.uint8 images: expected torch\.float32 without a normalize"):
        Batch(images, labels, labels)
    with pytest.raises(InputError, match=r"torch\.float32 images: expected torch\.uint8 with a normalize"):
        Batch(images.float(), labels, labels, NORMALIZE)


# Transforms of users


class Doubled(EvalTransform):
    """Does something in floats, behind what is done in bytes."""

    def __call__(self, photo: Photo, rng: np.random.Generator | None = None) -> npt.NDArray[np.float32]:
        return 2 * super().__call__(photo, rng)


class Inverted(EvalTransform):
    """Does something in bytes, which calling it then shows as well."""

    def pixels(self, photo: Photo, rng: np.random.Generator | None = None) -> npt.NDArray[np.uint8]:
        return 255 - super().pixels(photo, rng)


@dataclass
class Own:
    """Knows nothing of bytes; one that says ``pixels`` and means a number."""

    resolution: int = SIDE
    pixels: int = SIDE

    def __call__(self, photo: Photo, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        return PLAIN(photo) + np.float32(rng.random())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("transform", "dtype"),
    [
        (Doubled(SIDE, MEAN, STD), torch.float32),
        (Inverted(SIDE, MEAN, STD), torch.uint8),
        (Own(), torch.float32),
    ],
    ids=["floats overridden", "bytes overridden", "of its own"],
)
def test_a_transform_of_ones_own_is_not_passed_by(
    photos: PhotoSet, transform: Transform, dtype: torch.dtype, workers: int
):
    assert (in_pixels(transform) is not None) == (dtype == torch.uint8)
    for batch in whole(photos, transform, workers=workers).epoch(0):
        assert batch.images.dtype == dtype
        pieces = torch.cat([images for images, _ in batch.pieces(3)])
        assert pieces.dtype == torch.float32
        for row, index in zip(pieces, batch.indices.tolist(), strict=True):
            with open_photo(photos.items[index][0]) as photo:
                assert np.array_equal(row.numpy(), transform(photo, sample_rng(0, 0, index)))


def test_pixels_that_are_no_bytes_are_refused(photos: PhotoSet):
    class Floats(EvalTransform):
        def pixels(self, photo: Photo, rng: np.random.Generator | None = None) -> Any:
            return super().pixels(photo, rng).astype(np.float32)

    with pytest.raises(TypeError, match="float32"):
        next(whole(photos, Floats(SIDE, MEAN, STD), workers=0).epoch(0))


# What a loader holds


class Watched(Loader):
    """Knows which of its batches are alive."""

    def watch(self) -> None:
        self.made: list[weakref.ref[Batch]] = []
        self.most = 0

    def alive(self) -> list[Batch]:
        return [batch for made in self.made if (batch := made()) is not None]

    def alive_bytes(self) -> int:
        return sum(batch.nbytes for batch in self.alive())

    def _blank(self, indices: npt.NDArray[np.int64]) -> tuple[Batch, npt.NDArray[np.generic]]:
        batch, rows = super()._blank(indices)
        self.made.append(weakref.ref(batch))
        self.most = max(self.most, self.alive_bytes())
        return batch, rows


OPTIONS = (
    {},
    {"workers": 0},
    {"prefetch": 1},
    {"prefetch": 9},
    {"drop_last": True},
    {"prefetch": 9, "drop_last": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("transform", [PLAIN, Own()], ids=["bytes", "floats"])
def test_held_bytes_are_what_is_alive(photos: PhotoSet, transform: Transform, options: dict):
    loader = Watched(photos, transform, 4, shuffle=False, **options)
    loader.watch()
    seen = 0
    for batch in loader.epoch(0):
        seen = max(seen, loader.alive_bytes())
        del batch
    assert seen == loader.most == loader.held_bytes
    assert loader.alive() == []

    loader.watch()
    one = next(Loader(photos, transform, 4, shuffle=False, workers=0).epoch(0)).nbytes
    for batch in loader.epoch(0):  # noqa: B007 - holds one for as long as it waits for the next
        assert loader.alive_bytes() <= loader.held_bytes
    assert loader.most <= loader.held_bytes + one


def test_held_bytes_by_hand(photos: PhotoSet):
    assert whole(photos).prefetch == 2
    assert whole(photos).held_bytes == 11 * (3 * SIDE * SIDE + 16)  # there are not three batches of four
    assert whole(photos, prefetch=1).held_bytes == 8 * (3 * SIDE * SIDE + 16)
    assert whole(photos, workers=0).held_bytes == 4 * (3 * SIDE * SIDE + 16)
    assert whole(photos, Own(), workers=0).held_bytes == 4 * (12 * SIDE * SIDE + 16)
    paper = Loader(photos, EvalTransform(224, MEAN, STD), 8, shuffle=False, workers=0)
    assert paper.held_bytes == 1_204_224 + 128  # 4.8 MB in float32


def test_the_allocator_sees_no_more_images(photos: PhotoSet):
    """By PyTorch's own account, which knows its own thread alone: no worker."""
    twos = Loader(photos, PLAIN, 2, shuffle=False, workers=0)

    def epoch() -> None:
        with closing(twos.epoch(0)) as batches:
            for batch in batches:
                del batch

    images = twos.held_bytes - 2 * 16  # labels and indices are numpy's
    assert rising(epoch) == (images, 0)


def test_what_is_decoded_and_drawn_is_as_it_was(photos: PhotoSet):
    """Bytes or floats: the same photographs, crops and colours, in the same order."""

    class Floats:
        resolution = SIDE

        def __call__(self, photo: Photo, rng: np.random.Generator) -> npt.NDArray[np.float32]:
            return AUGMENT(photo, rng)

    def epochs(transform: Transform) -> Iterator[Batch]:
        loader = Loader(photos, transform, 4, shuffle=True, seed=3)
        for epoch in range(2):
            yield from loader.epoch(epoch)

    for a, b in zip(epochs(AUGMENT), epochs(Floats()), strict=True):
        assert (a.images.dtype, b.images.dtype) == (torch.uint8, torch.float32)
        assert torch.equal(a.normalized(), b.images)
        assert torch.equal(a.indices, b.indices)


def test_listing_and_decoding_import_no_torch(tmp_path: Path):
    Image.new("RGB", (20, 20), (9, 99, 199)).save(tmp_path / "x.png")
    code = (
        "import sys; from tinytl.data import EvalTransform, open_photo\n"
        f"with open_photo({str(tmp_path / 'x.png')!r}) as photo:\n"
        "    EvalTransform(8, (0, 0, 0), (1, 1, 1))(photo)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
