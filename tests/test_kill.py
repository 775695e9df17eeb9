"""Nothing is lost: processes killed at random moments, files damaged, disks full; the runs end in the same bits."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tinytl import _atomic
from tinytl.backbones import BACKBONES
from tinytl.errors import RunError
from tinytl.run import CHECKPOINT, CURVES, DELTA, FILES, METRICS, PAGE, PREVIOUS, SETTINGS, Callbacks, train
from tinytl.spec import RunOptions, TrainSpec

from . import small_run
from .small_run import left_behind

ROOT = Path(__file__).parents[1]
EVERY_STEP = RunOptions(workers=0, threads=1, checkpoint_steps=1)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbed, and what it left."""

    spec: TrainSpec
    out: Path
    hashes: dict[str, str]


@pytest.fixture(autouse=True, scope="module")
def _small_backbone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, small_run.NAME, small_run.entry())
        yield


@pytest.fixture(scope="module")
def undisturbed(_small_backbone: None, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kill")
    spec = small_run.make_spec(folder / "photos")
    train(spec, folder / "run", options=EVERY_STEP)
    return Undisturbed(spec, folder / "run", left_behind(folder / "run"))


def finish(undisturbed: Undisturbed, out: Path, *notices: str) -> None:
    """Go on with a run that was cut, and hold what it leaves against the undisturbed one."""
    said: list[str] = []
    train(undisturbed.spec, out, resume=True, options=EVERY_STEP, callbacks=Callbacks(on_notice=said.append))
    assert left_behind(out) == undisturbed.hashes
    for notice in notices:
        assert any(notice in line for line in said), said


def cut(undisturbed: Undisturbed, out: Path, step: int = 4) -> None:
    """Leave a run as a process killed after that step does: its last act is the step's line of metrics."""

    class Cut(BaseException):
        pass

    def on_step(info) -> None:
        if info.step == step:
            raise Cut

    with pytest.raises(Cut):
        train(undisturbed.spec, out, options=EVERY_STEP, callbacks=Callbacks(on_step=on_step))


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Real processes and real SIGKILLs; see benchmarks/soak.py, which does it a thousand times."""
    work, results = tmp_path / "work", tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--kills", "20", "--seed", "7"]
    command += ["--work", str(work), "--results", str(results)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_thread, timeout=280, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(results.read_text())
    assert found["kills"] == found["kills_by_time"] + found["kills_by_call"] == 20
    assert found["kills_by_call"] >= 1
    assert found["same"] == found["runs"] >= 1
    # the last run was killed too or stands for itself; held here against the undisturbed one once more
    last = max(work.glob("run-*"))
    assert left_behind(last) == left_behind(work / "undisturbed")
    assert (last / DELTA).read_bytes() == (work / "undisturbed" / DELTA).read_bytes()


@pytest.mark.parametrize("gone", [(DELTA, CURVES), (CURVES,), (DELTA, CURVES, METRICS), (CHECKPOINT,)])
def test_killed_between_the_last_files(undisturbed: Undisturbed, gone: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "run"
    cut(undisturbed, out, step=12) if METRICS not in gone else train(undisturbed.spec, out, options=EVERY_STEP)
    for name in gone:
        (out / name).unlink(missing_ok=True)
    if METRICS in gone:  # a lost log is no reason to lose the run; there is nothing left to draw
        with pytest.raises(RunError, match="no finished epoch"):
            finish(undisturbed, out)
        assert (out / DELTA).read_bytes() == (undisturbed.out / DELTA).read_bytes()
        return
    finish(undisturbed, out)


def test_what_a_killed_writer_left_is_cleared_away(undisturbed: Undisturbed, tmp_path: Path) -> None:
    out = tmp_path / "run"
    cut(undisturbed, out)
    for name in FILES:
        (out / f".{name}.tmp").write_bytes(b"half of it")
    (out / ".mine.tmp").write_bytes(b"not the run's")
    (out / "run.lock").write_bytes(b"process 1 on elsewhere\n")
    finish(undisturbed, out)
    written = set(FILES) - {PAGE}  # which nobody asked for
    assert sorted(path.name for path in out.iterdir()) == sorted([".mine.tmp", *written])


def test_a_run_killed_before_it_wrote_anything_begins_with_resume_too(undisturbed: Undisturbed, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.lock").touch()
    finish(undisturbed, out)


def test_a_lost_checkpoint_is_said_before_the_delta_is_lost_too(undisturbed: Undisturbed, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / DELTA).write_bytes(b"learned")
    with pytest.raises(RunError, match="no checkpoint to resume"):
        train(undisturbed.spec, out, resume=True)
    (out / DELTA).rename(out / PREVIOUS)  # killed between two renames, where there are no hard links
    with pytest.raises(RunError, match="holds a run already"):
        train(undisturbed.spec, out)
    assert [path.name for path in out.iterdir()] == [PREVIOUS]


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_checkpoint_costs_one_interval(undisturbed: Undisturbed, damage: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    cut(undisturbed, out)
    data = bytearray((out / CHECKPOINT).read_bytes())
    data[len(data) // 3] ^= 16
    (out / CHECKPOINT).unlink()  # .prev may be another name of the same file
    (out / CHECKPOINT).write_bytes({"torn": data[:-9], "flipped": data}[damage])
    finish(undisturbed, out, "going on from the checkpoint before it, at step 2")


def test_two_damaged_checkpoints_are_one_line(undisturbed: Undisturbed, tmp_path: Path) -> None:
    out = tmp_path / "run"
    cut(undisturbed, out)
    for name in (CHECKPOINT, PREVIOUS):
        data = (out / name).read_bytes()
        (out / name).unlink()
        (out / name).write_bytes(data[:-1])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(RunError, match="no checkpoint can be used") as caught:
        train(undisturbed.spec, out, resume=True)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_file_that_grows_too_large_is_told_in_bytes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A limit of the operating system on a file's size, which is as real as a full disk and needs no disk."""
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(info) -> None:
        if info.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))

    try:
        with pytest.raises(RunError) as caught:
            train(undisturbed.spec, out, options=EVERY_STEP, callbacks=Callbacks(on_step=on_step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    needed = re.match(rf"cannot write {out / CHECKPOINT}: File too large \(it takes ([0-9,]+) bytes, ", message)
    assert needed is not None, message
    # the file of step 2 differs in the digits of its progress only
    assert abs(int(needed[1].replace(",", "")) - (out / CHECKPOINT).stat().st_size) < 100
    assert message.endswith("bytes are free there); mend that, and --resume goes on from step 2")
    assert not list(out.glob(".*.tmp"))
    finish(undisturbed, out)


def mounted(folder: Path, size: int, *, again: bool = False) -> bool:
    """Mount a disk of that size in memory, or change its size; False where this process may not."""
    folder.mkdir(exist_ok=True)
    options = f"{'remount,' if again else ''}size={size}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_full_disk_loses_nothing_but_the_last_interval(undisturbed: Undisturbed, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if not mounted(disk, 190_000):  # two checkpoints of 70 kB fit, a third beside them does not
        pytest.skip("may not mount a small disk here")
    try:
        with pytest.raises(RunError, match=r"No space left on device \(it takes .* mend that, and --resume goes on"):
            train(undisturbed.spec, disk / "run", options=EVERY_STEP)
        assert (disk / "run" / CHECKPOINT).exists()
        assert not list((disk / "run").glob(".*.tmp"))
        assert mounted(disk, 1_000_000, again=True)
        finish(undisturbed, disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(("call", "fault"), [(2, errno.ENOSPC), (9, errno.EIO), (14, errno.ENOSPC), (48, errno.EDQUOT)])
def test_whichever_write_fails(
    undisturbed: Undisturbed, call: int, fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the settings, at the log, at a checkpoint, at the end: one line, and resumed the same bits."""
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
            train(undisturbed.spec, out, options=EVERY_STEP)
    assert "\n" not in str(caught.value)
    train(undisturbed.spec, out, options=EVERY_STEP, resume=(out / SETTINGS).exists())
    assert left_behind(out) == undisturbed.hashes


def test_a_read_only_folder_is_refused_before_training(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = tmp_path / "run", os.open
    out.mkdir()
    out.chmod(0o555)
    if os.access(out, os.W_OK):  # root may write anywhere: then the system's answer is made up

        def read_only(path, flags: int, *arguments, **options) -> int:
            if str(path).startswith(str(out)) and flags & (os.O_WRONLY | os.O_RDWR):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return original(path, flags, *arguments, **options)

        monkeypatch.setattr(os, "open", read_only)
    steps: list[object] = []
    try:
        with pytest.raises(RunError, match=r"cannot write .*Permission denied; give another folder"):
            train(undisturbed.spec, out, callbacks=Callbacks(on_step=steps.append))
    finally:
        out.chmod(0o755)
    assert not steps
    assert not list(out.iterdir())


def test_a_folder_made_for_a_run_that_is_refused_is_taken_away(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RunError("no")

    monkeypatch.setattr("tinytl.run.write_config", refuse)
    with pytest.raises(RunError, match="no"):
        train(undisturbed.spec, tmp_path / "new" / "deeper", options=EVERY_STEP)
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_sync_folders_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    _atomic.write_bytes(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"
