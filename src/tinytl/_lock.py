"""One run a folder: a lock that the kernel lets go of when its process ends, however it ends.

The lock is on the file ``run.lock``, not in it: what it says (process and machine) is for the message alone, and a file
that a killed process leaves behind locks nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tinytl.errors import RunError

NAME = "run.lock"


@contextlib.contextmanager
def lock_folder(folder: Path, on_notice: Callable[[str], object]) -> Iterator[None]:
    """Hold ``folder``, which exists, for the length of the block.

    On a file system that has no locks (some network folders), ``on_notice`` is told that two runs would not notice each
    other, and the block goes on.

    Raises RunError when another run holds the folder, or nothing can be written there.
    """
    path = folder / NAME
    descriptor = _locked(path, on_notice)
    try:
        _write_owner(descriptor)
        yield
    finally:
        # before it is let go: whoever opened it meanwhile sees that its name is gone, and opens anew
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _locked(path: Path, on_notice: Callable[[str], object]) -> int:
    """Open and lock the file that has the name ``path`` once the lock is held."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}; give another folder with --out") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(path, descriptor):
                return descriptor
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            by = f" ({owner})" if owner and owner.isprintable() else ""
            os.close(descriptor)
            raise RunError(
                f"another run is writing to {path.parent}{by}: wait until it ends, or give another folder with --out"
            ) from error
        except OSError as error:
            on_notice(
                f"{path.parent} is on a file system without locks ({error.strerror or error}): "
                "a second run into it would not be noticed"
            )
            return descriptor
        os.close(descriptor)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether the open file still has its name: a run that ended meanwhile may have taken it away."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int) -> None:
    text = f"process {os.getpid()} on {os.uname().nodename}\n"
    with contextlib.suppress(OSError):  # it is for a message only; a full disk is told of by what matters
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
