"""Folders of photographs: one sub-folder a class, and a split that stays put.

A `PhotoSet` is names only, no pixels: it is what `named.resolve` gives and what a `Loader` reads. Everything
in it is sorted by name, so it does not depend on the order in which a file system lists a folder.

The split is by hash: within a class, photographs are ordered by ``sha256(seed, relative name)`` and the first
``fraction`` of them validate. Adding one photograph therefore moves at most one other across, where a seeded
shuffle would deal all of them anew and leak what was trained on into validation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinytl._digest import sha256
from tinytl.data._walk import entries_of, identity, is_folder, walk
from tinytl.errors import DataError, InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_VALIDATION = ("val", "test")  # the first that is there is used
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".rar", ".7z")


class PhotoSet:
    """Photographs and their classes; not to be changed.

    ``root``: the folder that names are relative to. ``classes``: their names; an item's class index points
    here. ``items``: (path, class index), sorted by class, then by name. ``notes``: one line for each thing
    that was left out or is odd, for the user to read.
    """

    # Written out: `dataclasses` would bring 1 MB of modules into a process that trains in tens of MB.
    __slots__ = ("classes", "items", "notes", "root")

    def __init__(
        self,
        root: Path,
        classes: tuple[str, ...],
        items: tuple[tuple[Path, int], ...],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.root, self.classes, self.items, self.notes = root, classes, items, notes

    def replaced(self, **changes: Any) -> PhotoSet:
        """Return the same with some of its attributes changed."""
        return PhotoSet(**{**{name: getattr(self, name) for name in self.__slots__}, **changes})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PhotoSet):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self) -> int:
        return hash((self.root, self.classes, self.items, self.notes))

    def __repr__(self) -> str:
        return f"PhotoSet({self.root!r}, {self.classes!r}, {self.items!r}, {self.notes!r})"

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """Return the name of item ``index`` relative to the root, with forward slashes on every system."""
        return self.items[index][0].relative_to(self.root).as_posix()

    def counts(self) -> tuple[int, ...]:
        """Return the number of photographs in each class, in the order of ``classes``."""
        counts = [0] * len(self.classes)
        for _, label in self.items:
            counts[label] += 1
        return tuple(counts)

    def fingerprint(self) -> str:
        """Return a hash of the classes and of every name and label: equal when two runs see the same list.

        Not of the pixels, which would mean reading every file.
        """
        digest = sha256(repr(self.classes).encode("ascii", "backslashreplace"))
        for index, (_, label) in enumerate(self.items):
            digest.update(_name_bytes(self.name(index)) + b"\0%d\0" % label)
        return digest.hexdigest()

    def aligned_to(self, classes: Sequence[str]) -> PhotoSet:
        """Return the same photographs with indices into ``classes`` (those of a run, say).

        Raises DataError for a class that is not in ``classes``. The other way round is only noted.
        """
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise DataError(
                f"{str(self.root)!r} holds the class {unknown[0]!r}, which was not trained (trained: "
                f"{listed(map(repr, classes))}): rename or remove that folder"
            )
        index = [classes.index(name) for name in self.classes]
        items = sorted(((path, index[label]) for path, label in self.items), key=lambda item: item[1])
        absent = [name for name in classes if name not in self.classes]
        notes = (f"{str(self.root)!r} holds no photographs of {listed(map(repr, absent))}",) if absent else ()
        return self.replaced(classes=tuple(classes), items=tuple(items), notes=self.notes + notes)


def scan(root: str | Path, *, classes: Sequence[str] | None = None) -> PhotoSet:
    """List the photographs in ROOT/CLASS/**, without opening any.

    Suffixes: `SUFFIXES`, in upper or lower case. Folders inside a class belong to it. Hidden files and
    folders are skipped; links to folders are followed once, never back up, so that a loop ends.

    ``classes``: those of an earlier run. Indices then point into it; a folder with only some of them will do.

    Raises DataError for a folder that is missing, is no folder or cannot be read, that holds no class, a
    single class, an empty class or ready-made splits (those are for `scan_splits`), or a class that is not in
    ``classes``.
    """
    root = _checked(Path(root))
    if has_splits(root):
        raise DataError(
            f"{str(root)!r} holds ready-made splits, not classes: give {str(root / 'train')!r} or one "
            "of the others "
            "(in Python: scan_splits)"
        )
    notes: list[str] = []
    folders, loose = _classes_in(root, notes)
    if not folders:
        found = "images but no class folders" if loose else "no class folders"
        raise DataError(
            f"{str(root)!r} holds {found}: expected one folder a class, such as "
            f"{str(root / 'cats' / '1.jpg')!r}; "
            "sort the photographs into such folders"
        )
    if len(folders) == 1 and classes is None:
        raise DataError(
            f"{str(root)!r} holds a single class, {folders[0].name!r}: expected at least two class "
            "folders; add the "
            "other class, or give the folder above if this one is itself a class"
        )
    if loose:
        notes.append(f"{loose} image(s) directly in {str(root)!r} belong to no class and were left out")
    items = [(path, label) for label, folder in enumerate(folders) for path in _photos_in(folder, root, notes)]
    photos = PhotoSet(root, tuple(folder.name for folder in folders), tuple(items), tuple(notes))
    return photos if classes is None else photos.aligned_to(classes)


def has_splits(root: str | Path) -> bool:
    """Whether the sub-folders of ROOT are train/ and val/ or test/, and only these, with folders in train/.

    A class called "train" (the vehicle) holds photographs, not folders, and so is not mistaken for a split.
    """
    names = {entry.name for entry in entries_of(Path(root)) if is_folder(entry)}
    if "train" not in names or len(names) < 2 or names - {"train", *_VALIDATION}:
        return False
    return any(is_folder(entry) for entry in entries_of(Path(root) / "train"))


def scan_splits(root: str | Path) -> tuple[PhotoSet, PhotoSet]:
    """Scan ROOT/train and ROOT/val (or ROOT/test where there is no val), with the classes of train for both.

    Raises DataError as `scan` does, and where ROOT holds no such folders.
    """
    root = _checked(Path(root))
    if not has_splits(root):
        raise DataError(
            f"{str(root)!r} holds no ready-made splits: expected the sub-folders 'train' and 'val' or "
            "'test', and no "
            "others, each with one folder a class"
        )
    train = scan(root / "train")
    validation = next(root / name for name in _VALIDATION if (root / name).is_dir())
    return train, scan(validation, classes=train.classes)


def split(photos: PhotoSet, fraction: float = 0.2, seed: int = 0) -> tuple[PhotoSet, PhotoSet]:
    """Split into (train, validation), stratified and stable (see the top of this file).

    Of a class of n photographs, ``round(fraction * n)`` validate, but at least 1 and at most n - 1; a class
    with one photograph stays in train, and a note of train says so.

    Raises InputError unless 0 < fraction < 1, DataError where no class has two photographs.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation fraction {fraction!r} is out of range: expected more than 0 and less than 1")
    of_class: dict[int, list[int]] = {}
    for index, (_, label) in enumerate(photos.items):
        of_class.setdefault(label, []).append(index)
    chosen: set[int] = set()
    single: list[str] = []
    for label, members in of_class.items():
        if len(members) == 1:
            single.append(photos.classes[label])
            continue
        members.sort(key=lambda index: _rank(photos.name(index), seed))
        chosen.update(members[: min(max(int(fraction * len(members) + 0.5), 1), len(members) - 1)])
    if not chosen:
        raise DataError(
            f"{str(photos.root)!r} cannot be split: every class holds a single photograph and at "
            "least one class needs "
            "two; add photographs"
        )
    note = (f"one photograph only, trained but never validated: {listed(map(repr, single))}",) if single else ()
    parts = [
        tuple(item for index, item in enumerate(photos.items) if (index in chosen) is wanted)
        for wanted in (False, True)
    ]
    return photos.replaced(items=parts[0], notes=photos.notes + note), photos.replaced(items=parts[1], notes=())


def listed(texts: Iterable[str], most: int = 5) -> str:
    """Return the first few of ``texts``, and how many more there are."""
    texts = list(texts)
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest


def find_photos(folder: str | Path) -> list[Path]:
    """Return the images anywhere in a folder, whatever their classes, sorted by name.

    Raises DataError for a folder that cannot be read or holds none.
    """
    folder = _checked(Path(folder))
    above = folder / ".."  # `walk` does not go back to what it is told lies above
    found = [path for path, is_file in walk(folder, above) if is_file and path.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"the folder {str(folder)!r} holds no images: expected at least one of {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda path: path.as_posix())


def _rank(name: str, seed: int) -> bytes:
    return sha256(b"%d\0" % seed + _name_bytes(name)).digest()


def _name_bytes(name: str) -> bytes:
    if name.isascii():
        return name.encode()
    import unicodedata  # for names that need it

    # NFC, because macOS stores accents decomposed: the same folder must split alike on both sides of a copy.
    # surrogateescape, because a name on Linux may be bytes that are no UTF-8.
    return unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")


def _checked(root: Path) -> Path:
    if not os.path.exists(root):  # unlike Path.exists, False also for a name that is too long
        raise DataError(
            f"no folder {str(root)!r}: expected one that holds a folder of photographs for each class; check the path"
        )
    if not root.is_dir():
        mend = "expected one that holds a folder of photographs for each class"
        if root.name.lower().endswith(_ARCHIVES):
            mend = "unpack the archive and give the folder"
        elif root.suffix.lower() in SUFFIXES:
            mend = f"{mend}; give the folder above its class, and label a single photograph with `tinytl predict`"
        raise DataError(f"{str(root)!r} is not a folder: {mend}")
    return root


def _classes_in(root: Path, notes: list[str]) -> tuple[list[Path], int]:
    """Return the class folders of ``root`` and the number of images that lie beside them."""
    above = {identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
    folders: list[Path] = []
    loose = 0
    for entry in entries_of(root):
        path = root / entry.name
        if not is_folder(entry):
            loose += path.suffix.lower() in SUFFIXES
        elif entry.is_symlink() and identity(path) in above:
            notes.append(f"{str(path)!r} links back to a folder that holds it and was left out")
        else:
            folders.append(path)
    return folders, loose


def _photos_in(folder: Path, root: Path, notes: list[str]) -> list[Path]:
    """Return the images anywhere in a class folder, sorted by name; note what is left out. Raises "
    "DataError if none."""
    found: list[Path] = []
    other: list[str] = []
    for path, is_file in walk(folder, root):
        if is_file and path.suffix.lower() in SUFFIXES:
            found.append(path)
        else:
            other.append(path.relative_to(root).as_posix())
    kinds = f"{len(other)} file(s) that are broken links or no {'/'.join(s[1:] for s in SUFFIXES)}"
    if not found:
        what = f"only {kinds}, such as {other[0]!r}" if other else "nothing"
        raise DataError(
            f"the class folder {str(folder)!r} holds no images ({what}): expected at least one "
            "photograph; add some, "
            "convert them, or remove the folder"
        )
    if other:
        notes.append(f"left out of the class {folder.name!r}: {kinds}, such as {other[0]!r}")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
