"""Before training: what cannot be read is left out and named, copies are told, and the same whoever looks."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinytl.data import PhotoSet, checked, open_photo, read_rgb, resolve_split, scan, split
from tinytl.data import check as check_module
from tinytl.data.duplicates import with_copies_noted
from tinytl.errors import DataError, InputError, PhotoError
from tinytl.spec import TrainSpec

from .photographs import make_photographs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_photographs(tmp_path / "photos", each=5)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def message(photos: PhotoSet, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        checked(photos, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_good_changes_nothing(root: Path) -> None:
    photos = scan(root)
    assert checked(photos) is photos


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_cannot_be_read_is_left_out_and_named(root: Path, workers: int) -> None:
    truncate(root / "red" / "1.jpg")
    (root / "green" / "0.jpg").write_bytes(b"")
    (root / "blue" / "4.jpg").write_bytes(b"no photograph")
    Image.new("F", (4, 4)).save(root / "blue" / "é\n.tiff")
    (root / "blue" / "2.jpg").unlink()
    photos = PhotoSet(root, scan(root).classes, (*scan(root).items, (root / "blue" / "2.jpg", 0)))
    seen: list[tuple[int, int]] = []
    found = checked(photos, workers=workers, on_progress=lambda done, of: seen.append((done, of)))
    assert found.counts() == (3, 4, 4)
    assert found.notes == (
        f"5 of the 16 photographs in {str(root)!r} cannot be read and were left out: 'blue/4.jpg' (no known format), "
        r"'blue/é\n.tiff' (32-bit pixels), 'green/0.jpg' (empty), 'red/1.jpg' (truncated), 'blue/2.jpg' (missing)",
    )
    assert seen == [(done, 16) for done in range(1, 17)]
    assert "replace or remove them, or train without --strict" in message(photos, strict=True, workers=workers)


def test_many_are_counted_and_a_few_named(root: Path) -> None:
    for number in range(4):
        truncate(root / "red" / f"{number}.jpg")
        truncate(root / "blue" / f"{number}.jpg")
    (note,) = checked(scan(root)).notes
    assert note.startswith("8 of the 15")
    assert note.endswith("'red/0.jpg' (truncated) and 3 more")


def test_a_class_without_photographs_is_refused(root: Path) -> None:
    for path in (root / "red").iterdir():
        truncate(path)
    assert "no photograph of the class 'red'" in message(scan(root))
    for path in root.glob("*/*"):
        path.write_bytes(b"")
    assert "15 of the 15 photographs" in message(scan(root))


def test_a_class_that_was_empty_before_is_no_fault(root: Path) -> None:
    truncate(root / "red" / "1.jpg")
    aligned = scan(root).aligned_to(["blue", "green", "new", "red"])
    assert checked(aligned).counts() == (5, 5, 0, 4)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"mode": "CMYK"}])
def test_an_eighth_of_a_jpeg_tells_as_much_as_all_of_it(tmp_path: Path, options: dict) -> None:
    """Wherever a file is cut, decoding at 1/8 fails just where decoding in full does."""
    mode = options.pop("mode", "RGB")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)).convert(mode)
    whole = io.BytesIO()
    noise.save(whole, format="JPEG", quality=60, **options)
    data, path, outcomes = whole.getvalue(), tmp_path / "x.jpg", []
    for end in [*range(0, len(data) - 40, 29), *range(len(data) - 40, len(data) + 1)]:
        path.write_bytes(data[:end])
        pair = []
        for shrink in (1, 8):
            try:
                with open_photo(path) as photo:
                    photo.reduced(shrink)
                pair.append(None)
            except PhotoError as error:
                pair.append(error.reason)
        assert (pair[0] is None) == (pair[1] is None), f"cut after {end} of {len(data)} bytes: {pair}"
        outcomes.append(pair[0])
    assert outcomes[-1] is None
    assert "truncated" in outcomes


def test_every_photograph_that_passes_can_be_read(root: Path) -> None:
    truncate(root / "red" / "3.jpg")
    Image.new("LA", (9, 9)).save(root / "red" / "alpha.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(root / "red" / "deep.png")
    for path, _ in checked(scan(root)).items:
        assert read_rgb(path).mode == "RGB"


def test_a_file_is_looked_at_again_only_when_it_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncate(root / "red" / "1.jpg")
    first = checked(scan(root))
    monkeypatch.setattr(check_module, "_reason_to_leave_out", lambda path: "looked at again")
    assert checked(scan(root)) == first
    shutil.copy(root / "red" / "0.jpg", root / "red" / "1.jpg")
    assert "'red/1.jpg' (looked at again)" in checked(scan(root)).notes[0]
    os.chmod(root / "red" / "2.jpg", 0o600)
    assert len(checked(scan(root))) == 13


def test_the_split_is_of_what_can_be_read(root: Path) -> None:
    truncate(root / "red" / "1.jpg")
    train, validation = resolve_split(root)
    assert [train.items, validation.items] == [part.items for part in split(checked(scan(root)))]
    assert len(train) + len(validation) == 14
    assert "'red/1.jpg' (truncated)" in train.notes[0]
    with pytest.raises(DataError, match="--strict"):
        resolve_split(root, strict=True)


def test_ready_made_splits_are_looked_at_too(tmp_path: Path) -> None:
    make_photographs(tmp_path / "train", each=3)
    make_photographs(tmp_path / "val", each=2, seed=1)
    truncate(tmp_path / "val" / "red" / "1.jpg")
    train, validation = resolve_split(tmp_path)
    assert (len(train), len(validation)) == (9, 5)
    assert train.notes == ()
    assert "1 of the 6 photographs" in validation.notes[0]
    for options, name in (({"fraction": 0.3}, "val_fraction is 0.3"), ({"seed": 1}, "split_seed is 1")):
        with pytest.raises(InputError, match=f"{name} and .* has its own train/"):
            resolve_split(tmp_path, **options)  # type: ignore[arg-type]


def test_the_default_fraction_is_the_run_s() -> None:
    assert TrainSpec("x").val_fraction == resolve_split.__defaults__[0]  # type: ignore[index]


# Copies


def test_copies_across_train_and_validation_are_counted(tmp_path: Path) -> None:
    make_photographs(tmp_path / "train", each=3)
    make_photographs(tmp_path / "val", each=2, seed=1)
    shutil.copy(tmp_path / "train" / "red" / "1.jpg", tmp_path / "val" / "red" / "copy.jpg")
    os.link(tmp_path / "train" / "red" / "2.jpg", tmp_path / "val" / "red" / "hard.jpg")
    (tmp_path / "val" / "blue" / "soft.jpg").symlink_to(tmp_path / "train" / "blue" / "0.jpg")
    Image.open(tmp_path / "train" / "red" / "0.jpg").save(tmp_path / "val" / "red" / "saved anew.jpg", quality=50)
    train, validation = resolve_split(tmp_path)
    assert train.notes == ()
    (note,) = validation.notes
    assert note.startswith("3 of the 10 photographs of validation are also in training, byte for byte: ")
    assert "'val/blue/soft.jpg' = 'train/blue/0.jpg'" in note
    assert "'val/red/copy.jpg' = 'train/red/1.jpg'" in note
    assert "'val/red/hard.jpg' = 'train/red/2.jpg'" in note
    assert resolve_split(tmp_path, workers=0) == (train, validation)


def test_copies_in_two_classes_are_counted(root: Path) -> None:
    shutil.copy(root / "red" / "1.jpg", root / "blue" / "x.jpg")
    shutil.copy(root / "red" / "1.jpg", root / "blue" / "y.jpg")
    shutil.copy(root / "green" / "1.jpg", root / "green" / "same class.jpg")
    train, validation = resolve_split(root, seed=3)
    (note,) = (note for note in train.notes if "more than one class" in note)
    assert note.startswith("1 photograph(s) lie in more than one class, byte for byte: 'blue/")
    assert "= 'red/1.jpg'" in note
    held = {validation.name(index) for index in range(len(validation))}
    leaks = {"blue/x.jpg", "blue/y.jpg", "red/1.jpg", "green/1.jpg", "green/same class.jpg"} & held
    assert bool(leaks) == any("also in training" in note for note in validation.notes)


def test_what_cannot_be_compared_is_no_copy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(root / "red" / "1.jpg", root / "blue" / "x.jpg")
    photos = scan(root)

    def refuse(path: Path, mode: str) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    assert with_copies_noted(photos, photos)[0].notes
    monkeypatch.setattr("tinytl._file_hash.open", refuse, raising=False)  # by hand: the tests may run as root
    assert with_copies_noted(photos, photos)[0].notes == ()


def test_no_copies_no_notes(root: Path) -> None:
    (root / "red" / "0.bmp").write_bytes(b"")
    (root / "red" / "1.bmp").write_bytes(b"")
    Image.new("RGB", (8, 8), "red").save(root / "red" / "0.bmp")
    Image.new("RGB", (8, 8), "blue").save(root / "red" / "1.bmp")  # of equal size, so both are read
    train, validation = resolve_split(root)
    assert train.notes == validation.notes == ()
