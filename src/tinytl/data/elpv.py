"""ELPV: 2,624 electroluminescence photographs of solar cells, 300 x 300 px, grey; functional or defective.

Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence
images", Solar Energy 185 (2019) 455-468, arXiv 1807.02894; package `elpv-dataset` (images CC-BY-NC-SA 4.0:
fetched, not shipped).

Each cell carries an expert's verdict as a probability of defect: 0 functional, 1/3 functional but unsure, 2/3
defective but unsure, 1 defective. The authors' paper counts the unsure cells as defective at a weight of 1/3
or 2/3 (so later papers report; not checked here). tinytl has no weight a sample, and to call a cell that the
expert held to be functional defective at full weight would turn the verdict round, so the class here is **the
verdict itself: defective where the probability is at least 1/2**. All 2,624 are used: 821 defective (715
sure), 1,803 functional (1,508 sure); always "functional" is right for 68.7 %. Figures from work that drops
the unsure cells, or calls all that is not 0 defective, do not compare.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tinytl.data.folder import PhotoSet
from tinytl.errors import DataError

CLASSES = ("defective", "functional")
_MEND = "reinstall it with `pip install --force-reinstall --no-deps elpv-dataset`"


def elpv() -> PhotoSet:
    """Return the photographs of the installed package `elpv-dataset`, without importing it.

    Raises DataError where the package is missing or damaged.
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the data set 'elpv' needs the package elpv-dataset, which is not installed: "
            "`pip install elpv-dataset` (90 MB)"
        )
    return read(Path(spec.submodule_search_locations[0]) / "data")


def read(root: Path) -> PhotoSet:
    """Read ROOT/labels.csv: lines of ``image path, probability of defect, mono or poly``, parted by white
    space.

    Raises DataError for a file that is missing or a line that does not read so.
    """
    table = root / "labels.csv"
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
        there = {path.name for path in (root / "images").iterdir()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the data set 'elpv' cannot be read from {str(root)!r} ({error}): {_MEND}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            name, probability, _ = line.split()
            label = 0 if _probability(probability) >= 0.5 else 1
        except ValueError as error:
            raise DataError(
                f"{str(table)!r}, line {number}: {line!r} is not an image, a probability and a cell type: {_MEND}"
            ) from error
        path = root / name
        if path.parent != root / "images" or path.name not in there:
            raise DataError(f"{str(table)!r}, line {number}: there is no image {name!r}: {_MEND}")
        items.append((path, label))
    if not items:
        raise DataError(f"{str(table)!r} lists no images: {_MEND}")
    return PhotoSet(root, CLASSES, tuple(sorted(items, key=lambda item: (item[1], item[0].name))))


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:  # also refuses nan
        raise ValueError(text)
    return value
