"""Files that are written whole or not at all.

The content goes to a temporary file in the same directory, is flushed and fsynced, takes the target's name in one
rename, and the directory entry is fsynced too. A process killed at any instant leaves the old file or the new one. The
temporary's name is fixed, so that a thousand kills leave one stray file and not a thousand; hence one writer per path
at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tinytl.errors import RunError


@contextlib.contextmanager
def atomic_file(path: Path, previous: Path | None = None, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name ``path`` when the block ends and vanishes if it raises.

    The file that had the name before is kept as ``previous``, where that is given: there is a whole file
    under one of the two names at any instant. ``size`` in bytes, where it is known, is told when the disk is full.

    Raises RunError when the file cannot be written (no folder, read-only, disk full); ``path`` is as before.
    """
    path = Path(path)
    temporary = _temporary(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    try:
        # os.open and not mkstemp: the file gets the permissions that the user's umask says, not 0600
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise RunError(f"cannot write {path}: {error.strerror or error}{_room(path, error, size)}") from error
        raise


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove what a killed writer of any of these files left behind; there must be no living one."""
    for path in paths:
        with contextlib.suppress(OSError):
            _temporary(path).unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _room(path: Path, error: OSError, size: int | None) -> str:
    """What to add where a disk or a quota is full: how much is needed and how much there is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    parts = [] if size is None else [f"it takes {size:,} bytes"]
    with contextlib.suppress(OSError):
        import shutil  # not at the top: it brings what only archives need

        parts.append(f"{shutil.disk_usage(path.parent).free:,} bytes are free there")
    return f" ({', '.join(parts)})" if parts else ""


def _keep(path: Path, previous: Path) -> None:
    """Give the file ``path`` a second name, ``previous``; without hard links (FAT), the only one."""
    link = _temporary(previous)
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(link, previous)
        link.unlink(missing_ok=True)  # a rename onto another name of the same file leaves both, says POSIX


def sync_folder(folder: Path) -> None:
    """Force the names in ``folder`` to the disk: without it a rename may be undone by a power cut."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network folders know no such thing
                raise
        finally:
            os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all. Raises RunError when it cannot be written."""
    with atomic_file(path, size=len(data)) as file:
        file.write(data)
