"""How many threads PyTorch computes with, for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tinytl.errors import InputError


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads (None: as many as before), and put the old number back.

    Raises:
        InputError: fewer than 1.
    """
    import torch

    if count is not None and count < 1:
        raise InputError(f"threads {count}: expected 1 or more")
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
