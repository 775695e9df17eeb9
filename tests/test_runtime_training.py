"""A run without PyTorch: nothing is lost, and it ends in the same bits whatever happened to it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tinytl._lock import lock_folder
from tinytl._metrics_log import read_metrics
from tinytl._run_folder import CHECKPOINT, DELTA, METRICS, PREVIOUS, SETTINGS
from tinytl.delta import load_delta
from tinytl.errors import DataError, InputError, Interrupted, NotFiniteError, PhotoError, RunError
from tinytl.report import read_metrics as lab_reads
from tinytl.runtime.shown import Result, Shown
from tinytl.runtime.training import FILES, Intervals, train

from .photographs import make_photographs
from .stand_in import StandIn, write_program

ROOT = Path(__file__).parents[1]
EVERY_STEP = Intervals(checkpoint_steps=1)
EPOCHS, BATCHES = 2, 6
TIMES = ("seconds", "wait_seconds", "validation_seconds", "images_per_second", "trained_images", "peak_bytes")


class Watch(Shown):
    """Notes what is shown, and acts on a step."""

    def __init__(self, act: Any = None) -> None:
        self.notes: list[str] = []
        self.lines: list[Mapping[str, Any]] = []
        self._act = act

    def step(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)
        if self._act is not None:
            self._act(line)

    def epoch(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)

    def notice(self, text: str) -> None:
        self.notes.append(text)


class Place:
    """A program, photographs, and what a run that nobody disturbed left."""

    def __init__(self, folder: Path) -> None:
        self.program = write_program(folder / "program.ttl")
        self.photos = make_photographs(folder / "photos", each=10, size=(40, 36))
        self.out = folder / "undisturbed"
        self.result = self.train(self.out)
        self.hashes = left_behind(self.out)

    def train(self, out: Path, machine: StandIn | None = None, **options: Any) -> Result:
        options.setdefault("intervals", EVERY_STEP)
        return train(machine or StandIn(self.program), self.program, str(self.photos), out, **options)

    def finish(self, out: Path) -> list[str]:
        """Go on with a run that was cut, hold what it leaves against the undisturbed one, return what was said."""
        shown = Watch()
        self.train(out, resume=True, shown=shown)
        assert left_behind(out) == self.hashes
        return shown.notes

    def cut(self, out: Path, step: int = 4) -> None:
        """Leave a run as a process killed after that step does: its last act is the step's line of metrics."""

        class Cut(BaseException):
            pass

        def act(line: Mapping[str, Any]) -> None:
            if line["step"] == step:
                raise Cut

        with pytest.raises(Cut):
            self.train(out, shown=Watch(act))


def left_behind(out: Path) -> dict[str, str]:
    """Hashes of what a finished run left, of the metrics without their times: equal runs, equal hashes."""
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in (CHECKPOINT, DELTA, SETTINGS)}
    lines = [{key: line[key] for key in line if key not in TIMES} for line in read_metrics(out / METRICS)]
    return found | {METRICS: hashlib.sha256(json.dumps(lines).encode()).hexdigest()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("runtime"))


def test_it_learns_and_leaves_a_run(place: Place) -> None:
    result = place.result
    assert result.scores.top1 == 1.0  # three tints
    assert (result.steps, result.train_images, result.scores.images) == (EPOCHS * BATCHES, 21, 9)
    assert sorted(path.name for path in place.out.iterdir()) == sorted(FILES)
    record = json.loads((place.out / SETTINGS).read_text())
    assert record["photos"] == str(place.photos)
    assert record["weights"] is None
    lines = lab_reads(place.out / METRICS)
    assert [line["kind"] for line in lines] == (["step"] * BATCHES + ["epoch"]) * EPOCHS
    assert lines[-1]["validation"]["top1"] == 1.0
    assert lines[0]["loss"] > lines[-1]["loss"]
    assert lines[-1]["peak_bytes"] > 1_000_000
    assert load_delta(place.out / DELTA).classes == result.classes


@pytest.mark.parametrize("step", [1, 4, 6, 7, 12])
def test_cut_anywhere_it_ends_in_the_same_bits(place: Place, step: int, tmp_path: Path) -> None:
    place.cut(tmp_path / "run", step)
    assert place.finish(tmp_path / "run") == []


def test_resumed_when_finished_it_only_says_how_good_it_is(place: Place, tmp_path: Path) -> None:
    place.train(tmp_path / "run")
    shown = Watch()
    again = place.train(tmp_path / "run", resume=True, shown=shown)
    assert shown.lines == []
    assert again.scores == place.result.scores
    assert left_behind(tmp_path / "run") == place.hashes


def test_other_seeds_and_rates_are_other_runs(place: Place, tmp_path: Path) -> None:
    hashes = {place.hashes[DELTA]}
    for number, given in enumerate(({"seed": 2}, {"lr": 0.25}, {"flip": False}, {"color": False}, {"min_scale": 0.5})):
        place.train(tmp_path / str(number), given=given)
        hashes.add(left_behind(tmp_path / str(number))[DELTA])
    assert len(hashes) == 6


def test_resuming_with_other_settings_is_refused_and_the_difference_named(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "run"
    place.cut(out)
    with pytest.raises(RunError, match=r"made with other settings: lr is 0.25, was 0.5; use the same"):
        place.train(out, resume=True, given={"lr": 0.25})
    other = write_program(tmp_path / "other.ttl", label_smoothing=0.2)
    with pytest.raises(RunError, match=r"program is .*, was "):
        train(StandIn(other), other, str(place.photos), out, resume=True)
    more = make_photographs(tmp_path / "photos", each=11, size=(40, 36))
    with pytest.raises(RunError, match=r"train_photos is .*, was "):
        train(StandIn(place.program), place.program, str(more), out, resume=True)
    place.finish(out)


def test_a_folder_that_holds_a_run_is_refused(place: Place, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds a run already"):
        place.train(place.out)
    with pytest.raises(RunError, match="holds no run to resume"):
        place.train(tmp_path / "none", resume=True)
    with pytest.raises(InputError, match="would be taken for a class"):
        place.train(place.photos / "run")
    (tmp_path / "run").mkdir()
    with lock_folder(tmp_path / "run", print), pytest.raises(RunError, match="another run is writing to"):
        place.train(tmp_path / "run")
    assert left_behind(place.out) == place.hashes


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_checkpoint_costs_one_interval_and_is_said(place: Place, damage: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    place.cut(out)
    data = bytearray((out / CHECKPOINT).read_bytes())
    data[-20] ^= 16
    (out / CHECKPOINT).unlink()  # .prev may be another name of the same file
    (out / CHECKPOINT).write_bytes({"torn": data[:-9], "flipped": data}[damage])
    notes = place.finish(out)
    assert len(notes) == 1
    assert "going on from the checkpoint before it, at step 2" in notes[0]


def test_two_damaged_checkpoints_are_one_line(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "run"
    place.cut(out)
    for name in (CHECKPOINT, PREVIOUS):
        data = (out / name).read_bytes()
        (out / name).unlink()
        (out / name).write_bytes(data[:-1])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(RunError, match="no checkpoint can be used") as caught:
        place.train(out, resume=True)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(("call", "fault"), [(2, errno.ENOSPC), (7, errno.EIO), (15, errno.ENOSPC), (40, errno.EDQUOT)])
def test_whichever_write_fails_nothing_is_lost(
    place: Place, call: int, fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, fsync = tmp_path / "run", 0, os.fsync

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(fault, os.strerror(fault))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(RunError, match=f"cannot .*{os.strerror(fault)}") as caught:
            place.train(out)
    assert "\n" not in str(caught.value)
    place.train(out, resume=(out / SETTINGS).exists())
    assert left_behind(out) == place.hashes


def test_a_read_only_folder_is_refused_before_training(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = tmp_path / "run", os.open
    out.mkdir()

    def read_only(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if str(path).startswith(str(out)) and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    shown = Watch()
    with pytest.raises(RunError, match=r"cannot write .*Permission denied; give another folder"):
        place.train(out, shown=shown)
    assert not shown.lines
    assert not list(out.iterdir())


def test_a_loss_that_is_not_finite_is_named_and_the_last_good_state_kept(place: Place, tmp_path: Path) -> None:
    out, machine = tmp_path / "run", StandIn(place.program)

    def spoil(line: Mapping[str, Any]) -> None:
        if line["step"] == 4:  # as a kernel's fault would
            machine.tensor(1).cast("f")[0] = float("nan")

    with pytest.raises(RunError, match=r"head.bias holds NaN or infinity after step 4: not saved"):
        place.train(out, machine, shown=Watch(spoil))
    place.finish(out)

    class Overflowing(StandIn):
        bad = -1

        def step(self, count: int, lr: float, seed: int = 0) -> tuple[float, int]:
            if self.steps == 7:
                self.bad_tensor = self.bad
                raise NotFiniteError("not finite")
            return super().step(count, lr, seed)

    for number, bad, named in ((1, -1, "the loss"), (2, 3, "the gradient 'head.weight.gradient'")):
        out = tmp_path / str(number)
        machine = Overflowing(place.program)
        machine.bad = bad
        with pytest.raises(
            NotFiniteError, match=rf"{named} is NaN or infinite at step 8 \(epoch 2, batch 2 of 6\)"
        ) as e:
            place.train(out, machine, intervals=Intervals(None, None))
        # where a gradient was bad some tensors may have been updated: what the epoch's end left is what there is
        assert f"the state after step {7 if bad < 0 else 6} is in {out / CHECKPOINT}" in str(e.value)
        place.finish(out)


def test_a_photograph_that_vanishes_stops_the_run_without_loss(place: Place, tmp_path: Path) -> None:
    photos = make_photographs(tmp_path / "photos", each=10, size=(40, 36))
    gone: list[tuple[Path, bytes]] = []

    def act(line: Mapping[str, Any]) -> None:
        if line["step"] == 2:
            for path in sorted(photos.rglob("*.jpg")):
                gone.append((path, path.read_bytes()))
                path.unlink()

    machine, out = StandIn(place.program), tmp_path / "run"
    with pytest.raises(PhotoError, match=r"is not there.*; the state after step \d is in"):
        train(machine, place.program, str(photos), out, shown=Watch(act))
    for path, data in gone:
        path.write_bytes(data)
    train(StandIn(place.program), place.program, str(photos), out, resume=True)
    assert left_behind(out)[DELTA] == place.hashes[DELTA]


def test_classes_that_the_program_does_not_know_are_listed(place: Place, tmp_path: Path) -> None:
    program = write_program(tmp_path / "two.ttl", classes=("blue", "violet"))
    with pytest.raises(
        DataError, match=r"2 class\(es\) that the program does not know: 'green', 'red', and lacks 'vio"
    ):
        train(StandIn(program), program, str(place.photos), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_that_is_absent_is_noted(place: Place, tmp_path: Path) -> None:
    program, shown = write_program(tmp_path / "four.ttl", classes=("blue", "brown", "green", "red")), Watch()
    train(StandIn(program), program, str(place.photos), tmp_path / "run", shown=shown)
    assert any("holds no photographs of 'brown'" in note for note in shown.notes)


def test_the_programs_own_split_says_nothing_of_a_folder_that_is_split(place: Place, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for number, name in enumerate(("train", "val")):
        make_photographs(photos / name, each=4 - number, seed=number)
    program = write_program(tmp_path / "program.ttl", val_fraction=0.3, split_seed=7)
    result = train(StandIn(program), program, str(photos), tmp_path / "run")
    assert (result.train_images, result.scores.images) == (12, 9)
    record = json.loads((tmp_path / "run" / SETTINGS).read_text())
    assert (record["val_fraction"], record["split_seed"]) == (0.2, 0)
    for name, value in (("val_fraction", 0.3), ("split_seed", 7)):
        with pytest.raises(InputError, match=f"leave {name} out"):
            train(StandIn(program), program, str(photos), tmp_path / "given", given={name: value})
    unsplit = train(StandIn(program), program, str(place.photos), tmp_path / "unsplit")
    assert unsplit.scores.images == 9  # 0.3 of 10, of each of three


def test_photographs_that_cannot_be_read_are_left_out_or_refused(place: Place, tmp_path: Path) -> None:
    photos = make_photographs(tmp_path / "photos", each=4)
    (photos / "red" / "0.jpg").write_bytes(b"no photograph")
    with pytest.raises(DataError, match="1 of the 12 photographs"):
        train(StandIn(place.program), place.program, str(photos), tmp_path / "run", strict=True)
    shown = Watch()
    result = train(StandIn(place.program), place.program, str(photos), tmp_path / "run", shown=shown)
    assert result.train_images + result.scores.images == 11
    assert any("were left out" in note for note in shown.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected a whole number of at least 1"),
        ({"lr": 0.0}, "lr is 0.0, expected a number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0, expected a number above 0 and below 1"),
        ({"min_scale": 1.5}, "min_scale is 1.5, expected a number above 0 and at most 1"),
        ({"warmup_epochs": 2}, "warmup_epochs is 2, expected fewer than the 2 epochs"),
    ],
)
def test_settings_that_cannot_be(place: Place, given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        place.train(tmp_path / "run", given=given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(place: Place, number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def act(line: Mapping[str, Any]) -> None:
        if line["step"] == 8:
            signal.raise_signal(number)

    with pytest.raises(Interrupted, match=r"--resume goes on from") as caught:
        place.train(out, shown=Watch(act), intervals=Intervals(None, None))
    assert caught.value.exit_status == 128 + number
    shown = Watch()
    place.train(out, resume=True, shown=shown)
    assert [line["step"] for line in shown.lines if line["kind"] == "step"] == [9, 10, 11, 12]
    assert left_behind(out) == place.hashes


def command(place: Place, out: Path, *more: str) -> list[str]:
    given = ["train", str(place.program), str(place.photos), "--out", str(out), "--checkpoint-steps", "1", "--quiet"]
    return [sys.executable, "-m", "tests.stand_in", *given, *more]


def test_interrupted_from_outside_the_process_says_130_and_143(place: Place, tmp_path: Path) -> None:
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = tmp_path / str(status)
        slow = {**os.environ, "STAND_IN_PAUSE": "0.2"}
        process = subprocess.Popen(command(place, out), cwd=ROOT, env=slow, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (out / CHECKPOINT).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == status, error
        assert error.count("\n") == 1
        assert "--resume goes on from" in error
        place.finish(out)
