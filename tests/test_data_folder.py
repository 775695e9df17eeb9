"""Scanning folders, the stable split, named data sets: names only, so the "photographs" are empty files."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytl.data import DATASETS, PhotoSet, has_splits, resolve, resolve_split, scan, scan_splits, split
from tinytl.data import elpv as elpv_module
from tinytl.errors import DataError, InputError, UnknownNameError


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names(photos: PhotoSet) -> list[str]:
    return [photos.name(index) for index in range(len(photos))]


def message(call: Callable[[], object], kind: type[Exception] = DataError) -> str:
    """Return the error's message, having checked that it is one line."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_scan(tmp_path: Path):
    make(tmp_path, "b/2.JPG", "b/1.png", "a/deep/er/x.TIFF", "a/y.webp", "a/.hidden.jpg", ".git/z.jpg")
    photos = scan(tmp_path)
    assert photos.classes == ("a", "b")
    assert names(photos) == ["a/deep/er/x.TIFF", "a/y.webp", "b/1.png", "b/2.JPG"]
    assert [label for _, label in photos.items] == [0, 0, 1, 1]
    assert photos.counts() == (2, 2)
    assert photos.notes == ()
    assert all(path.exists() for path, _ in photos.items)


def test_scan_reads_names_in_any_script(tmp_path: Path):
    make(tmp_path, "猫/一.jpg", "chien é\n/été.jpg", "кот/'x\".jpg")
    assert sorted(names(scan(tmp_path))) == sorted(["猫/一.jpg", "chien é\n/été.jpg", "кот/'x\".jpg"])


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
def test_scan_and_split_take_names_that_are_no_text(tmp_path: Path):
    make(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.jpg")).touch()
    photos = scan(tmp_path)
    assert len(photos) == 4
    assert len(split(photos)[0]) == 2
    assert len(photos.fingerprint()) == 64


def test_links(tmp_path: Path):
    make(tmp_path / "photos", "a/real/1.jpg", "b/1.jpg")
    make(tmp_path / "elsewhere", "2.jpg")
    root = tmp_path / "photos"
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "above").symlink_to(tmp_path)
    (root / "a" / "a-link-to-real").symlink_to(root / "a" / "real")
    (root / "b" / "far").symlink_to(tmp_path / "elsewhere")
    (root / "back").symlink_to(tmp_path)
    (root / "b" / "self.jpg").symlink_to(root / "b" / "self.jpg")
    (root / "b" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    photos = scan(root)
    assert photos.classes == ("a", "b")
    assert names(photos) == ["a/real/1.jpg", "b/1.jpg", "b/far/2.jpg"]
    assert any("links back" in note and "back" in note for note in photos.notes)
    assert any("2 file(s)" in note and "b/gone.jpg" in note for note in photos.notes)


def test_what_is_left_out_is_noted(tmp_path: Path):
    notes = scan(make(tmp_path, "a/1.jpg", "a/2.heic", "b/1.jpg", "stray.jpg", "readme.txt")).notes
    assert len(notes) == 2
    assert "1 image(s) directly in" in notes[0]
    assert "'a/2.heic'" in notes[1]


def test_scan_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing = message(lambda: scan(tmp_path / "nowhere"))
    assert "no folder" in missing
    assert "nowhere" in missing
    assert "check the path" in missing
    assert "no folder" in message(lambda: scan("x" * 5000))
    assert "tinytl predict" in message(lambda: scan(make(tmp_path, "file.jpg") / "file.jpg"))
    assert "is not a folder: unpack the archive" in message(lambda: scan(make(tmp_path, "x.tar.gz") / "x.tar.gz"))
    assert "is not a folder: expected one" in message(lambda: scan(make(tmp_path, "list.txt") / "list.txt"))
    assert "no class folders" in message(lambda: scan(make(tmp_path / "1", ".hidden/1.jpg")))
    assert "images but no class folders" in message(lambda: scan(make(tmp_path / "2", "1.jpg")))
    assert "single class, 'a'" in message(lambda: scan(make(tmp_path / "3", "a/1.jpg")))
    make(tmp_path / "4", "a/1.jpg", "b/c/.hidden.jpg")
    assert "holds no images (nothing)" in message(lambda: scan(tmp_path / "4"))
    make(tmp_path / "4", "b/line\nbreak.heic")
    assert r"such as 'b/line\nbreak.heic'" in message(lambda: scan(tmp_path / "4"))

    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # by hand: the tests may run as root, whom nothing refuses
    assert "cannot be read (Permission denied)" in message(lambda: scan(tmp_path / "3"))


def test_splits(tmp_path: Path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/2.jpg", "val/b/2.jpg")
    assert has_splits(tmp_path)
    train, validation = scan_splits(tmp_path)
    assert train.classes == validation.classes == ("a", "b", "c")
    assert names(validation) == ["b/2.jpg", "c/2.jpg"]
    assert [label for _, label in validation.items] == [1, 2]
    assert any("no photographs of 'a'" in note for note in validation.notes)
    assert "ready-made splits" in message(lambda: scan(tmp_path))
    make(tmp_path, "val/d/1.jpg")
    assert "the class 'd', which was not trained" in message(lambda: scan_splits(tmp_path))


def test_what_is_no_split(tmp_path: Path):
    assert not has_splits(make(tmp_path / "1", "train/a/1.jpg", "val/a/1.jpg", "other/1.jpg"))
    assert "no ready-made splits" in message(lambda: scan_splits(tmp_path / "1"))
    # A "train" is also a vehicle, and its folder holds photographs, not folders.
    vehicles = make(tmp_path / "2", "train/1.jpg", "test/1.jpg")
    assert scan(vehicles).classes == ("test", "train")
    testing = make(tmp_path / "3", "train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg", "test/b/1.jpg")
    assert len(scan_splits(testing)[1]) == 2


GOLDEN = ["class0/0001.jpg", "class0/0007.jpg", "class1/0003.jpg"]


def photo_set(*sizes: int, prefix: str = "") -> PhotoSet:
    root = Path("/photos")
    classes = tuple(f"class{label}" for label in range(len(sizes)))
    return PhotoSet(
        root,
        classes,
        tuple(
            (root / classes[label] / f"{prefix}{i:04}.jpg", label) for label, n in enumerate(sizes) for i in range(n)
        ),
    )


sizes = st.lists(st.integers(1, 40), min_size=2, max_size=5).filter(lambda s: max(s) > 1)


@given(sizes, st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_split_is_stratified(sizes: list[int], fraction: float, seed: int):
    photos = photo_set(*sizes)
    train, validation = split(photos, fraction, seed)
    assert sorted(train.items + validation.items) == sorted(photos.items)
    for n, kept, held in zip(sizes, train.counts(), validation.counts(), strict=True):
        assert kept + held == n
        assert kept >= 1
        assert (held == 0) if n == 1 else abs(held - min(max(fraction * n, 1), n - 1)) <= 0.5 + 1e-9
    assert any("never validated" in note for note in train.notes) == (1 in sizes)


@given(st.integers(2, 60), st.integers(0, 60), st.integers(0, 99))
def test_one_more_photograph_moves_at_most_one(n: int, place: int, seed: int):
    photos = photo_set(n, 5)
    added = (photos.root / "class0" / f"{place:04}-new.jpg", 0)
    more = PhotoSet(photos.root, photos.classes, tuple(sorted((*photos.items, added))))
    before = set(split(photos, 0.25, seed)[1].items)
    after = set(split(more, 0.25, seed)[1].items) - {added}
    assert len(before ^ after) <= 1


@given(st.randoms(use_true_random=False), st.integers(0, 99))
def test_split_does_not_depend_on_order(random, seed: int):
    photos = photo_set(12, 7)
    shuffled = list(photos.items)
    random.shuffle(shuffled)
    again = split(PhotoSet(photos.root, photos.classes, tuple(shuffled)), 0.3, seed)
    assert set(again[1].items) == set(split(photos, 0.3, seed)[1].items)


def test_split_is_the_same_everywhere():
    # Golden: a change here would move photographs across in everyone's next run. Written by this very call.
    held = split(photo_set(10, 5), 0.2, 0)[1]
    assert names(held) == GOLDEN
    assert names(split(photo_set(10, 5), 0.2, 1)[1]) != GOLDEN
    photos = photo_set(10, 5)
    items = tuple((Path("/x") / path.relative_to(photos.root), label) for path, label in photos.items)
    moved = PhotoSet(Path("/x"), photos.classes, items)
    assert names(split(moved, 0.2, 0)[1]) == GOLDEN  # by relative name: the folder may move


def test_split_takes_accents_composed_or_not():
    def held(form: Literal["NFC", "NFD"]) -> list[str]:
        photos = photo_set(20, 5, prefix=unicodedata.normalize(form, "é"))
        return [unicodedata.normalize("NFC", name) for name in names(split(photos)[1])]

    assert held("NFC") == held("NFD")


def test_split_errors():
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        assert "validation fraction" in message(lambda f=fraction: split(photo_set(3, 3), f), InputError)
    assert "every class holds a single photograph" in message(lambda: split(photo_set(1, 1)))


def test_aligned_to_and_fingerprint():
    photos = photo_set(2, 1)
    aligned = photos.aligned_to(["class1", "new", "class0"])
    assert aligned.counts() == (1, 0, 2)
    assert "'new'" in aligned.notes[0]
    assert "was not trained" in message(lambda: photos.aligned_to(["class0"]))
    assert photos.fingerprint() == photo_set(2, 1).fingerprint() != photo_set(2, 2).fingerprint()
    assert aligned.fingerprint() != photos.fingerprint()


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(make(tmp_path, "elpv/a/1.jpg", "elpv/b/1.jpg", "elpv/b/2.jpg"))
    assert resolve("elpv").classes == ("a", "b")  # a folder of that name wins
    assert resolve(tmp_path / "elpv", classes=["b", "a"]).classes == ("b", "a")
    near = message(lambda: resolve("elvp"), UnknownNameError)
    assert "did you mean 'elpv'?" in near
    assert "no data set of that name (known: elpv)" in message(lambda: resolve("flowers"))
    assert "no data set" not in message(lambda: resolve("some/flowers"))
    assert "no folder ''" in message(lambda: resolve(""))
    assert "no folder ''" in message(lambda: resolve_split(""))


def test_elpv_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install elpv-dataset" in message(lambda: resolve("elpv"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("images/cell0001.png 1.0", "line 1"),
        ("images/cell0001.png likely mono", "'images/cell0001.png likely mono'"),
        ("images/cell0001.png nan mono", "line 1"),
        ("images/cell0002.png 1.0 mono", "no image 'images/cell0002.png'"),
        ("../cell0001.png 1.0 mono", "no image '../cell0001.png'"),
        ("", "lists no images"),
    ],
)
def test_elpv_damaged(tmp_path: Path, line: str, expected: str):
    make(tmp_path, "images/cell0001.png")
    assert "cannot be read" in message(lambda: elpv_module.read(tmp_path))
    (tmp_path / "labels.csv").write_text(line + "\n")
    text = message(lambda: elpv_module.read(tmp_path))
    assert expected in text
    assert "reinstall" in text


def test_elpv_verdicts(tmp_path: Path):
    make(tmp_path, *(f"images/{i}.png" for i in range(4)))
    rows = zip(range(4), ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0"), strict=True)
    (tmp_path / "labels.csv").write_text("\n".join(f"images/{i}.png  {p}   mono" for i, p in rows))
    photos = elpv_module.read(tmp_path)
    assert photos.classes == ("defective", "functional")
    assert {photos.name(i): photos.items[i][1] for i in range(4)} == {
        "images/0.png": 1,
        "images/1.png": 1,
        "images/2.png": 0,
        "images/3.png": 0,
    }


def test_elpv_installed():
    pytest.importorskip("elpv_dataset", reason="elpv-dataset (90 MB) is not installed")
    photos = DATASETS["elpv"]()
    assert photos.counts() == (821, 1803)
    assert split(photos)[1].counts() == (164, 361)
    assert resolve("elpv", classes=("functional", "defective")).counts() == (1803, 821)


def test_listing_photographs_imports_neither_torch_nor_the_package(tmp_path: Path):
    """In a process of its own; of torch, only what tinytl/__init__.py itself brings is allowed."""
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    code = (
        "import sys, tinytl.errors\n"
        "before = 'torch' in sys.modules\n"
        "import tinytl.data as data\n"
        "try: data.resolve('elpv')\n"
        "except Exception: pass\n"
        "data.scan(sys.argv[1])\n"
        "assert 'elpv_dataset' not in sys.modules\n"
        "assert ('torch' in sys.modules) == before\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
