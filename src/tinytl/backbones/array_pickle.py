"""Read a pickle that holds arrays in plain containers, and nothing else.

A pickle is a program for a stack machine; Python's own machine imports and calls whatever the program names. This one
is another machine. It knows the instructions that make dictionaries, lists, tuples, text, numbers and arrays, and it
imports and calls nothing: the four names that numpy's arrays are pickled with are only recognized, each in the one
form of arguments that numpy writes, and the array is made here from its type, shape and bytes.

======================================  =============================================================
``numpy.core.multiarray._reconstruct``  of exactly (ndarray, (0,), b"b"): an array, not filled yet
``numpy.ndarray``                       only as the argument above
``numpy.dtype``                         of exactly (code, False, True): one of the plain number types
``_codecs.encode``                      of exactly (text, "latin1"): bytes
======================================  =============================================================

Every other name and instruction is refused by name, and so is a memo or an array larger than the file can justify.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from tinytl.backbones._array_machine import RefusedError, loads
from tinytl.errors import WeightsError

MAX_FILE_BYTES = 32 << 20
"""The published files have less than one megabyte."""


def read_array_pickle(path: Path) -> Any:
    """What the file holds: dictionaries, lists, tuples, text, numbers, None and numpy arrays (copies, native order).

    Follow the keys that you expect: a hostile file's containers may hold one another in a circle.

    Args:
        path: a file that ``torch.save`` wrote (a zip with one ``data.pkl``).

    Raises:
        WeightsError: not such a file, damaged, too large, or it asks for anything that is not an array; one line.
    """
    try:
        return loads(_pickle_in(path))
    except RefusedError as refused:
        raise WeightsError(f"cannot read the arrays in {str(path)!r}: {refused}") from None
    except OSError as error:
        raise WeightsError(f"cannot read the arrays in {str(path)!r}: {error.strerror or error}") from error


def _pickle_in(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise RefusedError(f"larger than {MAX_FILE_BYTES >> 20} MB")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
            if len(names) != 1:
                raise RefusedError(f"{len(names)} members named data.pkl, expected 1 (a file that torch.save wrote)")
            if names[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise RefusedError(f"packed by method {names[0].compress_type}, expected none or deflate")
            with archive.open(names[0]) as member:  # at most what was promised is unpacked, whatever the zip says
                data = member.read(MAX_FILE_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error, OverflowError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(f"not a whole zip as torch.save writes: {what}") from None
    if len(data) > MAX_FILE_BYTES:
        raise RefusedError(f"unpacks to more than {MAX_FILE_BYTES >> 20} MB")
    return data
