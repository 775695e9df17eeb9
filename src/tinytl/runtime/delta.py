"""What a program has learned as the lab's own delta file, and a delta of the lab's back into a program.

The file is that of `tinytl.delta`: the same fields, tensors, order of axes and hash. `tinytl evaluate`, `predict` and
`tinytl.open_run` read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinytl._run_folder import DELTA
from tinytl._sealed import DamagedFileError, Entry, SealedFile, write_entries
from tinytl.errors import DeltaError, RunError

from .layouts import from_delta, to_delta
from .machine import Machine, ProgramFile

KIND = "tinytl-delta/1"  # tinytl.delta's
MEND = "compile the program from that run (tinytl compile RUN)"


def write_delta(path: Path, machine: Machine, program: ProgramFile) -> int:
    """Write what was learned, atomically, and return the file's bytes.

    Raises RunError when the file cannot be written or a tensor holds NaN or infinity, ProgramError when what the
    program carries cannot be read.
    """
    meta = machine.meta
    name = first_bad(machine, meta)
    if name is not None:
        raise RunError(f"cannot write {path}: {name} holds NaN or infinity; lower the learning rate (--lr)")
    entries = {entry["key"]: _learned(machine, entry) for entry in meta["learned"]}
    entries |= {entry["key"]: _carried(program, entry) for entry in meta["carried"]}
    write_entries(path, KIND, entries, meta["delta"])
    return path.stat().st_size


def read_delta(path: Path, machine: Machine, program: ProgramFile) -> None:
    """Put a delta into a program: a run's that was trained with this one, or in the lab on the same base.

    What is carried is part of the program's constants and cannot be put in: it has to be the same, as have the bits
    of the frozen weights.

    Raises DeltaError when it is missing or damaged, or belongs to another network, ProgramError when what the program
    carries cannot be read; the program is unchanged then.
    """
    meta = machine.meta
    try:
        sealed = SealedFile(path, KIND)
    except DamagedFileError as error:
        raise DeltaError(f"delta {path} {error}") from error
    for field in ("base_hash", "method", "classes", "preprocessing"):
        ours, theirs = meta["delta"].get(field), sealed.metadata.get(field)
        if ours != theirs:
            raise DeltaError(
                f"delta {path} does not fit the program: its {field} is {_brief(theirs)}, "
                f"the program's {_brief(ours)}; give the program that it was trained with"
            )
    _refuse_other_base(path, meta["delta"]["extra"], sealed.metadata.get("extra"))
    learned = {entry["key"]: entry for entry in meta["learned"]}
    keys = {*learned, *(entry["key"] for entry in meta["carried"])}
    if keys != set(sealed.places):
        odd = sorted(keys ^ set(sealed.places))
        raise DeltaError(f"delta {path} does not fit the program: {odd[0]!r} is in one of them alone")
    for key, entry in learned.items():
        place = sealed.places[key]
        if place.dtype != "F32" or list(place.shape) != entry["shape"]:
            raise DeltaError(
                f"delta {path} does not fit the program: {key!r} is {place.dtype} {place.shape}, "
                f"expected F32 {tuple(entry['shape'])}"
            )
    for entry in meta["carried"]:
        if not entry["key"].endswith("num_batches_tracked"):  # counts, which no answer depends on
            _refuse_other_values(sealed, entry, program)
    for key, entry in learned.items():
        data = _content(sealed, key)
        machine.tensor(entry["tensor"])[:] = from_delta(data, entry["shape"], entry["layout"])


def _refuse_other_base(path: Path, ours: Mapping[str, Any], theirs: Any) -> None:
    """Raises DeltaError where the frozen weights were packed in another way."""
    if not isinstance(theirs, dict):
        raise DeltaError(f"delta {path} does not fit the program: its extra is {_brief(theirs)}, expected an object")
    for field, default in (("frozen_bits", 32), ("codebook", False)):  # where a run does not say
        mine, other = ours.get(field, default), theirs.get(field, default)
        if mine != other:
            raise DeltaError(
                f"delta {path} does not fit the program: its {field} is {_brief(other)}, the program's {_brief(mine)}; "
                f"{MEND}"
            )


def _refuse_other_values(sealed: SealedFile, entry: Mapping[str, Any], program: ProgramFile) -> None:
    """Raises DeltaError where a delta carries something else than the program does."""
    key, place = entry["key"], sealed.places[entry["key"]]
    same = place.dtype == entry["dtype"] and list(place.shape) == entry["shape"]
    if not same or _content(sealed, key) != program.read(entry["offset"], entry["bytes"]):
        raise DeltaError(f"delta {sealed.path} does not fit the program: its {key!r} has other values; {MEND}")


def _content(sealed: SealedFile, key: str) -> memoryview:
    data = memoryview(bytearray(sealed.places[key].nbytes))
    try:
        sealed.read_into(key, data)
    except DamagedFileError as error:
        raise DeltaError(f"delta {sealed.path} {error}") from error
    return data


def first_bad(machine: Machine, meta: Mapping[str, Any]) -> str | None:
    """The first learned tensor that holds NaN or infinity; None: all are finite."""
    for entry in meta["learned"]:
        # a sum, in float64, is finite if and only if every float32 of it is
        if not math.isfinite(sum(machine.tensor(entry["tensor"]).cast("f"))):
            return entry["key"]
    return None


def _learned(machine: Machine, entry: Mapping[str, Any]) -> Entry:
    number, shape, layout = entry["tensor"], entry["shape"], entry["layout"]
    return Entry("F32", tuple(shape), lambda: to_delta(machine.tensor(number), shape, layout))


def _carried(program: ProgramFile, entry: Mapping[str, Any]) -> Entry:
    offset, size = entry["offset"], entry["bytes"]
    return Entry(entry["dtype"], tuple(entry["shape"]), lambda: program.read(offset, size))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def delta_in(run: Path) -> Path:
    """The delta of a run's folder, or the file itself. Raises RunError where the folder's run is not finished."""
    if not run.is_dir():
        return run
    if (run / DELTA).exists():
        return run / DELTA
    raise RunError(f"{run} holds no finished run: finish it with train --resume, or give another")
