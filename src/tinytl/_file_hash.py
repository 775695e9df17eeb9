"""The sha256 of a file, read a piece at a time: what a file is, whatever its name."""

from __future__ import annotations

import os

from tinytl._digest import sha256

_CHUNK_BYTES = 1 << 20


def file_sha256(path: str | os.PathLike[str]) -> bytes:
    """Return the sha256 of the file's bytes (32 bytes; ``.hex()`` as it is printed). Raises OSError."""
    digest = sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()
