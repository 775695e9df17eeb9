"""SHA-256 without OpenSSL, where a process would load it for nothing else.

`hashlib` brings OpenSSL, 3.6 MB of a process that counts its memory in tens; Python has the same function of its own,
somewhat slower. Where OpenSSL is loaded already (PyTorch sees to that) it is taken.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Protocol


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Add bytes."""
        ...

    def digest(self) -> bytes:
        """The hash of what was added so far: 32 bytes."""
        ...

    def hexdigest(self) -> str:
        """The same in 64 hexadecimal digits."""
        ...


def sha256(data: bytes = b"") -> Digest:
    """A SHA-256 that begins with `data`."""
    if "_hashlib" in sys.modules:
        import hashlib

        return hashlib.sha256(data)
    return _own()(data)


@functools.cache  # to look for a module that is not there takes longer than to hash a name
def _own() -> Callable[[bytes], Digest]:
    """Python's own, where this Python was built with it."""
    for name in ("_sha2", "_sha256"):  # of Python from 3.12 on, and before
        try:
            return __import__(name).sha256
        except ImportError:
            continue
    import hashlib

    return hashlib.sha256
