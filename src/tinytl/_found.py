"""What a search found, for those who use it: `tinytl train --backbone RUN`, where RUN is a search's folder.

The folder's `winner.json` says which backbone, which method, which resolution, and which weights where the search has
made its own. They take the place of the folder's name, so that a run, its delta and its program name the network itself
and need the search no longer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinytl.errors import RunError

WINNER, SEARCH = "winner.json", "search.json"
GIVEN = ("method", "resolution", "weights", "norm", "pretrained")
"""Options that come with a backbone that was found; one that is given beside it wins."""
FIELDS = ("backbone", *GIVEN)
MAX_BYTES = 1 << 20


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run, where a `backbone` that is a search's folder gives way to what was found there.

    Raises:
        RunError: the folder holds a search that has not come to its end, or a file that is none of a search's.
    """
    name = values.get("backbone")
    if not isinstance(name, str) or not os.path.isdir(name):
        return dict(values)
    folder = Path(name)
    if not (folder / WINNER).exists():
        if (folder / SEARCH).exists():
            raise RunError(
                f"{name} holds an unfinished search: finish it with `tinytl search ... --out {name} --resume`"
            )
        raise RunError(
            f"{name} is a folder and no backbone: give a name (see `tinytl backbones`), or a search's folder"
        )
    found = read_winner(folder / WINNER)
    weights = found["weights"]
    if weights is not None and not os.path.isabs(weights):
        beside = folder / weights  # made by the search, and moved with its folder
        found["weights"] = str(beside) if beside.exists() else weights
    return {**found, **{key: value for key, value in values.items() if key != "backbone"}}


def read_winner(path: Path) -> dict[str, Any]:
    """Read `winner.json`, judged. Raises RunError for anything else."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}: {' '.join(str(error).split())}; search again") from error
    kinds = {"backbone": str, "method": str, "resolution": int, "norm": str, "pretrained": bool}
    right = isinstance(found, dict) and sorted(found) == sorted(FIELDS)
    right = right and all(type(found[name]) is kind for name, kind in kinds.items())
    if not right or not isinstance(found["weights"], str | None):
        raise RunError(f"{path} is not what a search writes: expected {', '.join(FIELDS)}; search again")
    return found
