"""Where a run on the device stands, and the one file that keeps it.

A sealed safetensors file (see `tinytl._sealed`) with the executor's state as one row of bytes (trained tensors and the
optimizer's, as they lie in the arena), a `Progress` and the run's settings, the program's hash among them.
``checkpoint.safetensors.prev`` is the one before, used, and said, when the newest turns out torn or bit-flipped.

The state is written from the arena and read into it, with no second copy of it in memory: a file is first read through
and its hash verified, and then read again into its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinytl._differences import differences
from tinytl._sealed import DamagedFileError, Entry, SealedFile, write_entries
from tinytl.errors import RunError

from .delta import first_bad
from .machine import Machine

KIND = "tinytl-device-checkpoint/1"
STATE = "state"


class Progress(NamedTuple):
    """Where a run stands at a step boundary: all that a resumed run needs besides the state.

    Attributes:
        epoch: epochs finished, validation included.
        batch: batches done of the epoch after those.
        step: steps done since the start.
        loss_sum, correct, images: sums over the images of the unfinished epoch so far.
        best_top1, best_epoch: best validation accuracy and after how many epochs; -1 and 0 before the first.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0


class Boundary(NamedTuple):
    """A step boundary: where the run stands, and whether an epoch ends there."""

    progress: Progress
    epoch_end: bool


class Checkpointer:
    """Saves a run's checkpoints to one path and restores the newest good one.

    After `load`, ``notice`` tells that the newest file was damaged and the one before was taken; it is None otherwise.
    ``saved_step`` is the step that the newest good file holds, None where none is known.
    """

    def __init__(self, path: Path, machine: Machine, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.previous = self.path.with_name(self.path.name + ".prev")
        self.notice: str | None = None
        self.saved_step: int | None = None
        self._machine = machine
        self._settings = json.loads(json.dumps(settings))
        self._learned = {"learned": machine.meta["learned"]}
        self._newest_is_good = True

    def save(self, boundary: Boundary) -> None:
        """Write the state, atomically; the file that was newest is kept as ``previous``.

        Raises RunError when it cannot be written or a trained tensor holds NaN or infinity: the files on the disk are
        then as before.
        """
        step = boundary.progress.step
        bad = first_bad(self._machine, self._learned)
        if bad is not None:
            raise RunError(
                f"{bad} holds NaN or infinity after step {step}: not saved, the checkpoint before stands; "
                "lower the learning rate (--lr)"
            )
        state = self._machine.state
        metadata = {"progress": boundary.progress._asdict(), "settings": self._settings}
        entries = {STATE: Entry("U8", (len(state),), lambda: state)}
        try:
            # a damaged newest file must not push the good previous one off the disk
            write_entries(self.path, KIND, entries, metadata, self.previous if self._newest_is_good else None)
        except RunError as error:
            kept = "" if self.saved_step is None else f", and --resume goes on from step {self.saved_step}"
            raise RunError(f"{error}; mend that{kept}") from error
        self._newest_is_good, self.saved_step = True, step

    def load(self) -> Progress | None:
        """Put the newest good checkpoint into the executor; return where to go on, None without a file.

        Raises RunError when no file is good, or when the settings differ (each difference is named). The executor is
        unchanged then.
        """
        self.notice = None
        paths = [path for path in (self.path, self.previous) if path.exists()]
        faults: list[str] = []
        for path in paths:
            try:
                sealed, progress, saved = self._read(path)
            except DamagedFileError as error:
                faults.append(f"{path} {error}")
                continue
            self._newest_is_good = path == self.path
            if faults:
                self.notice = f"{faults[0]}; going on from the checkpoint before it, at step {progress.step}"
            different = differences(self._settings, saved)
            if different:
                raise RunError(
                    f"cannot resume {self.path}: it was made with other settings: {'; '.join(different)}; "
                    "use the same ones, or another folder"
                )
            if sealed.places[STATE].nbytes != len(self._machine.state):
                raise RunError(
                    f"cannot resume {path}: its state is {sealed.places[STATE].nbytes:,} bytes, the program's "
                    f"{len(self._machine.state):,}: give the program that it was made with"
                )
            try:
                sealed.read_into(STATE, self._machine.state)
            except DamagedFileError as error:
                raise RunError(f"cannot resume: {path} {error}") from error
            if self._machine.steps != progress.step:
                raise RunError(
                    f"cannot resume {path}: it is said to be at step {progress.step}, its state is at "
                    f"{self._machine.steps}; start again in another folder (--out)"
                )
            self.saved_step = progress.step
            return progress
        if faults:
            raise RunError(f"no checkpoint can be used: {'; '.join(faults)}; start again in another folder (--out)")
        return None

    def _read(self, path: Path) -> tuple[SealedFile, Progress, dict[str, Any]]:
        sealed = SealedFile(path, KIND)
        values, settings = sealed.metadata.get("progress"), sealed.metadata.get("settings")
        # the seal tells accidents, not intent: types and ranges are judged all the same
        if not isinstance(values, dict) or not isinstance(settings, dict) or set(sealed.places) != {STATE}:
            raise DamagedFileError("holds no progress, settings and state of a run")
        blank = Progress()._asdict()
        if values.keys() != blank.keys() or any(type(values[name]) is not type(blank[name]) for name in blank):
            raise DamagedFileError("holds a progress of other fields")
        if not all((-1 if name == "best_top1" else 0) <= value < 1e18 for name, value in values.items()):
            raise DamagedFileError("holds a progress that no run can have made")
        return sealed, Progress(**values), settings
