"""What a program sees of photographs: the lab's bytes in evaluation, its recipe in training, and always the same."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinytl.data import EvalTransform, open_photo, scan
from tinytl.data.decode import Photo
from tinytl.errors import PhotoError, ProgramError
from tinytl.runtime.batches import filled
from tinytl.runtime.pixels import Draws, Recipe, epoch_order
from tinytl.runtime.settings import Settings

from .photographs import make_photographs

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
ABOUT = {"resolution": 24, "interpolation": "bicubic", "crop_fraction": 0.875}


def bytes_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "I;16"])
def test_evaluation_gives_the_labs_very_bytes(mode: str, interpolation: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (41, 57), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (41, 57, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    recipe = Recipe(ABOUT | {"interpolation": interpolation, "crop_fraction": 0.7})
    transform = EvalTransform(24, MEAN, STD, 0.7, interpolation)
    with open_photo(path) as photo:
        ours = bytes_of(recipe.evaluation(photo))
    with open_photo(path) as photo:
        theirs = transform.pixels(photo).transpose(1, 2, 0)
    assert np.array_equal(ours, theirs)


def test_a_turned_jpeg_is_evaluated_as_in_the_lab(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(rng.integers(0, 256, (90, 140, 3), dtype=np.uint8)).save(tmp_path / "x.jpg", exif=exif)
    with open_photo(tmp_path / "x.jpg") as photo:
        ours = bytes_of(Recipe(ABOUT).evaluation(photo))
    with open_photo(tmp_path / "x.jpg") as photo:
        theirs = EvalTransform(24, MEAN, STD).pixels(photo).transpose(1, 2, 0)
    assert np.array_equal(ours, theirs)


def noise(seed: int = 0, size: tuple[int, int] = (60, 48)) -> Photo:
    rng = np.random.default_rng(seed)
    return Photo(Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)))


def test_a_training_photograph_depends_on_seed_epoch_and_number_alone() -> None:
    recipe = Recipe(ABOUT, Settings(seed=5, color=True))

    def seen(epoch: int, index: int, recipe: Recipe = recipe) -> bytes:
        return recipe.training(noise(), epoch, index).tobytes()

    first = seen(2, 7)
    assert seen(2, 7) == first
    assert len({first, seen(3, 7), seen(2, 8), seen(2, 7, Recipe(ABOUT, Settings(seed=6, color=True)))}) == 4


def test_an_option_does_not_change_what_the_others_draw() -> None:
    plain, flipped = Recipe(ABOUT, Settings(flip=False)), Recipe(ABOUT, Settings(flip=True))
    sides = []
    for index in range(40):
        one, other = (bytes_of(recipe.training(noise(), 0, index)) for recipe in (plain, flipped))
        sides.append(not np.array_equal(one, other))
        assert np.array_equal(other, one[:, ::-1] if sides[-1] else one)
    assert 8 < sum(sides) < 32


def test_crops_are_as_large_and_as_long_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = []

    def note(photo: Photo, box: tuple[int, int, int, int], resolution: int, interpolation: str) -> Image.Image:
        boxes.append(box)
        return Image.new("RGB", (resolution, resolution))

    monkeypatch.setattr("tinytl.runtime.pixels.train_pixels", note)
    recipe = Recipe(ABOUT, Settings(min_scale=0.3))
    for index in range(400):
        recipe.training(noise(size=(400, 300)), 0, index)
    sizes = np.array([(right - left, lower - upper) for left, upper, right, lower in boxes], float)
    share, ratio = sizes.prod(1) / (400 * 300), sizes[:, 0] / sizes[:, 1]
    assert 0.29 < share.min() < 0.35
    assert 0.9 < share.max() <= 1
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.35
    assert min(left for left, *_ in boxes) == 0
    assert max(right for _, _, right, _ in boxes) > 380


def test_draws_do_not_change_with_the_version_of_python() -> None:
    draws = Draws("sample", 1, 2, 3)
    assert [draws.next() for _ in range(3)] == [0.3870371052484334, 0.20650612629304654, 0.016834515404208883]
    many = [Draws("order", 0, 0, number).next() for number in range(2000)]
    assert 0.47 < sum(many) / 2000 < 0.53
    assert 0 <= min(many) < 0.01
    assert 0.99 < max(many) < 1


def test_an_epochs_order_is_a_permutation_of_its_own() -> None:
    first, again, other = epoch_order(1, 0, 50), epoch_order(1, 0, 50), epoch_order(1, 1, 50)
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(50))


def test_preprocessing_that_is_none_is_refused() -> None:
    for about in ({}, ABOUT | {"interpolation": "magic"}, ABOUT | {"resolution": "large"}):
        with pytest.raises(ProgramError, match="compile it again"):
            Recipe(about)


def test_batches_come_in_order_and_whole(tmp_path: Path) -> None:
    photos = scan(make_photographs(tmp_path, each=3))
    paths = [path for path, _ in photos.items]
    recipe, slot = Recipe(ABOUT), memoryview(bytearray(4 * 24 * 24 * 3))
    batches = [[8, 1, 2, 3], [0, 4, 5, 6], [7]]
    seen = []
    for numbers in filled(slot, paths, batches, lambda photo, _: recipe.evaluation(photo)):
        for place, number in enumerate(numbers):
            with open_photo(paths[number]) as photo:
                expected = recipe.evaluation(photo).tobytes()
            assert slot[place * len(expected) :][: len(expected)] == expected
            seen.append(number)
    assert seen == [8, 1, 2, 3, 0, 4, 5, 6, 7]


def test_the_next_batch_is_decoded_while_one_is_worked_on(tmp_path: Path) -> None:
    photos = scan(make_photographs(tmp_path, each=2))
    read, second = [], threading.Event()

    def note(photo: Photo, number: int) -> Image.Image:
        read.append(number)
        if number == 3:
            second.set()
        return Image.new("RGB", (24, 24))

    slot = memoryview(bytearray(2 * 24 * 24 * 3))
    source = filled(slot, [path for path, _ in photos.items], [[0, 1], [2, 3], [4, 5]], note)
    next(source)
    assert second.wait(30)  # without a word from whoever has the first
    assert read == [0, 1, 2, 3]  # and not the third, for which there is no room
    source.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "tinytl-decode"]


def test_a_photograph_that_vanished_is_named_when_its_turn_comes(tmp_path: Path) -> None:
    photos = scan(make_photographs(tmp_path, each=2))
    paths = [path for path, _ in photos.items]
    paths[3].unlink()
    recipe, seen = Recipe(ABOUT), []
    slot = memoryview(bytearray(2 * 24 * 24 * 3))
    with pytest.raises(PhotoError, match=f"{paths[3].name}.*is not there"):
        seen.extend(filled(slot, paths, [[0, 1], [2, 3], [4]], lambda photo, _: recipe.evaluation(photo)))
    assert seen == [[0, 1]]
    assert not [thread for thread in threading.enumerate() if thread.name == "tinytl-decode"]
