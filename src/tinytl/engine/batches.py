"""What a loader yields, and a batch in the pieces that are put through a network at once."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor


class LabelledBatch(Protocol):
    """What a loader yields: images (N, 3, R, R) float and labels (N,) int64.

    It may also have a method ``pieces(size)`` that yields (images float (n, 3, R, R), labels (n,)) for n <= size images
    at a time, in order: then ``images`` is not looked at, and may be of another form.
    """

    @property
    def images(self) -> Tensor: ...  # noqa: D102
    @property
    def labels(self) -> Tensor: ...  # noqa: D102


class BatchSource(Protocol):
    """What `fit` and `evaluate` read: `tinytl.data.Loader`, or anything of this shape."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        ...

    def epoch(self, epoch: int, /, start_batch: int = 0) -> Iterator[LabelledBatch]:
        """Yield an epoch's batches from ``start_batch`` on (both from 0); equal arguments, equal batches."""
        ...


def pieces(batch: LabelledBatch, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (n, 3, R, R) and labels (n,) of at most ``size`` images at a time.

    A batch's own ``pieces`` makes a piece's images when their turn comes: whoever takes them should hold them no longer
    than they are needed, and not while the next are made.
    """
    own: Any = getattr(batch, "pieces", None)
    if own is not None:
        return iter(own(size))
    return zip(batch.images.split(size), batch.labels.split(size), strict=True)


def images_of(batch: LabelledBatch, size: int) -> Iterator[Tensor]:
    """Yield the images of `pieces`, and hold none of them (a generator would, until it is asked for the next)."""
    return map(operator.itemgetter(0), pieces(batch, size))


@contextlib.contextmanager
def closing(source: Iterator[LabelledBatch]) -> Iterator[Iterator[LabelledBatch]]:
    """Close a generator at the end of the block: the loader's workers end there, also when a step raises."""
    try:
        yield source
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            close()
