"""Two runs into one folder: the second is refused, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinytl._lock import lock_folder
from tinytl.errors import RunError

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


def nothing(notice: str) -> None:
    raise AssertionError(notice)


def use(folder: Path, on_notice: Callable[[str], object] = nothing) -> str:
    """Lock a folder and return what the lock says of its holder."""
    with lock_folder(folder, on_notice):
        return (folder / "run.lock").read_text() if (folder / "run.lock").exists() else ""


def test_the_second_run_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    with lock_folder(tmp_path, nothing):
        with pytest.raises(RunError, match=rf"another run is writing to .*process {os.getpid()} on .*--out") as caught:
            use(tmp_path)
        assert "\n" not in str(caught.value)
        with pytest.raises(RunError):  # the refused one has taken nothing away
            use(tmp_path)
    assert not list(tmp_path.iterdir())
    assert use(tmp_path).startswith(f"process {os.getpid()} on ")


def test_a_run_refuses_before_it_touches_the_other_s_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinytl.backbones import BACKBONES
    from tinytl.run import train

    from . import small_run

    monkeypatch.setitem(BACKBONES, small_run.NAME, small_run.entry())
    out = tmp_path / "run"
    out.mkdir()
    (out / ".metrics.jsonl.tmp").write_bytes(b"the other's, half written")
    (out / "run.json").write_bytes(b"{}")
    spec = small_run.make_spec(tmp_path / "photos")
    with lock_folder(out, nothing):
        for resume in (False, True):
            with pytest.raises(RunError, match="another run is writing"):
                train(spec, out, resume=resume)
        assert {path.name for path in out.iterdir()} == {".metrics.jsonl.tmp", "run.json", "run.lock"}


def test_the_kernel_lets_go_when_the_holder_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another run is writing"):
            use(tmp_path)
        holder.kill()
    assert (tmp_path / "run.lock").exists()  # what it left behind locks nothing
    use(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_name_was_taken_away_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened just before its holder ended and removed it: locked, it would keep nobody out."""
    flock, files = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        files.append(os.fstat(descriptor).st_ino)
        if len(files) == 1:
            (tmp_path / "run.lock").rename(tmp_path / "gone")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock_folder(tmp_path, nothing):
        assert (tmp_path / "run.lock").stat().st_ino == files[-1] != files[0]
        assert len(files) == 2


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    said: list[str] = []
    use(tmp_path, said.append)
    assert len(said) == 1
    assert "file system without locks (No locks available)" in said[0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*run\.lock: Not a directory; give another folder with --out"):
        use(tmp_path / "file")
