"""What a trainer needs to know of an executor, and what a program's file tells of itself."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tinytl.errors import ProgramError


class Machine(Protocol):
    """An open program: `tinytl.runtime.Executor`, or anything of this shape."""

    batch: int
    micro_batch: int
    classes: int
    height: int
    width: int
    threads: int
    tensors: int
    arena_bytes: int
    images: memoryview
    labels: memoryview
    state: memoryview

    @property
    def meta(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def bad_tensor(self) -> int: ...  # noqa: D102
    def step(self, count: int, lr: float, seed: int = 0) -> tuple[float, int]: ...  # noqa: D102
    def evaluate(self, count: int) -> array[float]: ...  # noqa: D102
    def tensor(self, number: int) -> memoryview: ...  # noqa: D102


class ProgramFile(NamedTuple):
    """What the head of a program file tells (docs/program.md).

    Attributes:
        path: of the file.
        sha256: that the file names, in hexadecimal digits; the executor has verified it.
        data_offset: where its DATA begins.
    """

    path: Path
    sha256: str
    data_offset: int

    def read(self, offset: int, size: int) -> bytes:
        """Return so many bytes of DATA. Raises ProgramError when they cannot be read."""
        try:
            with open(self.path, "rb") as file:
                there = os.fstat(file.fileno()).st_size - self.data_offset
                if offset + size > there:  # before so much memory is asked for
                    raise ProgramError(
                        f"program {self.path} has {there} bytes of DATA, and is said to carry {size} at {offset}: "
                        "compile it again"
                    )
                file.seek(self.data_offset + offset)
                data = file.read(size)
        except OSError as error:
            raise ProgramError(f"program {self.path} cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise ProgramError(f"program {self.path} was cut short while it was in use: compile it again")
        return data


def program_file(path: Path) -> ProgramFile:
    """Read the head of a program that an executor has opened, and so judged.

    Raises:
        ProgramError: it cannot be read any more.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64 + 3 * 24)
    except OSError as error:
        raise ProgramError(f"program {path} cannot be read: {error.strerror or error}") from error
    data = head[64 + 2 * 24 :]
    if len(data) != 24 or data[:8].rstrip(b"\0") != b"DATA":
        raise ProgramError(f"program {path} was changed while it was in use: compile it again")
    return ProgramFile(path, head[24:56].hex(), int.from_bytes(data[8:16], "little"))
