"""Photographs -> batches, decoded in a bounded pool of threads.

Threads, not processes: Pillow lets go of the interpreter's lock while it decodes and resizes, and a thread
costs no second copy of the runtime. A worker writes its photograph straight into the batch's memory. There it is held
in bytes; the consumer makes float32 of it a micro-batch at a time (`Batch.pieces`). What is held is the batch in the
consumer's hands and at most ``prefetch`` more (`Loader.held_bytes`), whatever the size of the data set; in each worker
the photograph that it reads; and the `PhotoCache` where one is given.

A batch depends on (photographs, transform, batch size, seed, epoch, its number) and on nothing else: not on
the number of workers, on which of them was first, on the batches before it, or on the cache. To resume is to ask for an
epoch from ``start_batch``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinytl.data.cache import PhotoCache
from tinytl.data.decode import open_photo
from tinytl.data.folder import PhotoSet
from tinytl.data.normalize import Normalize
from tinytl.data.transforms import Transform, epoch_order, in_pixels, sample_rng
from tinytl.errors import DataError, InputError

if TYPE_CHECKING:  # imported when an epoch begins: listing photographs should not cost an import of torch
    import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """N photographs.

    ``images``: (N, 3, R, R), channels last in memory. Where there is a ``normalize``, they are uint8, the photographs'
    bytes, and the network's input is what ``normalize`` makes of them; else they are that input, float32. `pieces` and
    `normalized` give the input either way. ``labels``: int64 (N,), class indices. ``indices``: int64 (N,), positions in
    the PhotoSet.

    Raises InputError for bytes without a ``normalize``, and for anything else with one.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    normalize: Normalize | None = None

    def __post_init__(self) -> None:
        import torch

        if (self.normalize is not None) != (self.images.dtype == torch.uint8):
            wanted = "torch.float32 without a normalize" if self.normalize is None else "torch.uint8 with a normalize"
            raise InputError(f"a batch of {self.images.dtype} images: expected {wanted}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of its images, labels and indices."""
        return sum(tensor.nbytes for tensor in (self.images, self.labels, self.indices))

    def pieces(self, size: int | None = None) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """Yield ``size`` photographs at a time (None: all): float32 (n, 3, R, R), channels last, and their labels (n,).

        Of bytes, each piece is made when it is asked for and not held here: 12 n R R bytes, and while they are
        made 12 R + 12 more (see `Normalize`). Let go of one before asking for the next, or both are alive. Of float32,
        pieces are views.

        Raises InputError for a size below 1.
        """
        if size is not None and size < 1:
            raise InputError(f"pieces of {size} photographs: expected at least 1")
        at_once = size or len(self)
        for images, labels in zip(self.images.split(at_once), self.labels.split(at_once), strict=True):
            yield (images if self.normalize is None else self.normalize(images)), labels

    def normalized(self) -> torch.Tensor:
        """Return all of the network's input at once: float32 (N, 3, R, R), channels last."""
        return self.images if self.normalize is None else self.normalize(self.images)


class Loader:
    """Batches of a `PhotoSet`, epoch by epoch; ``len(loader)`` is the number of batches in one.

    ``transform``: batches hold bytes where it ends in bytes (`PixelTransform`), else the float32 that it returns.
    ``batch_size``: N; the last batch of an epoch may be smaller, unless ``drop_last``. ``seed``: of order and
    augmentation, at least 0. ``shuffle``: a new order each epoch, else that of the set. ``workers``: threads;
    0 decodes in the calling thread. ``prefetch``: batches under way beyond the one being used. ``cache``: holds
    decoded photographs from one epoch to the next; loaders may share one.

    Raises InputError for a number out of range, DataError where there are no photographs.
    """

    def __init__(
        self,
        photos: PhotoSet,
        transform: Transform,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        workers: int = 2,
        drop_last: bool = False,
        prefetch: int = 2,
        cache: PhotoCache | None = None,
    ) -> None:
        for name, value, least in (
            ("batch size", batch_size, 1),
            ("seed", seed, 0),
            ("number of workers", workers, 0),
            ("number of batches to prefetch", prefetch, 1),
        ):
            if value < least:
                raise InputError(f"{name} {value!r} is out of range: expected at least {least}")
        if not photos:
            raise DataError(f"{str(photos.root)!r} gives no photographs: expected at least one; add some")
        if drop_last and len(photos) < batch_size:
            raise InputError(
                f"batch size {batch_size} is more than the {len(photos)} photographs, and incomplete "
                "batches are "
                "dropped, so nothing would be left: make it smaller"
            )
        self.photos, self.transform, self.batch_size = photos, transform, batch_size
        self.seed, self.shuffle, self.workers = seed, shuffle, workers
        self.drop_last, self.prefetch, self.cache = drop_last, prefetch, cache
        self._in_pixels = in_pixels(transform)
        self._open = open_photo if cache is None else cache.open
        self._labels = np.array([label for _, label in photos.items], dtype=np.int64)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.photos), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def held_bytes(self) -> int:
        """Most bytes of batches alive while one is worked on: that one and ``prefetch`` more, or it alone if no worker.

        A consumer that still holds it when it asks for the next, as a plain ``for`` does, holds one batch more for as
        long as the answer takes; ``del batch`` at the end of the loop's body spares that.
        """
        photos = len(self.photos)
        if self.drop_last:
            photos -= photos % self.batch_size
        alive = self.batch_size * (1 + (self.prefetch if self.workers else 0))
        pixel_bytes = 4 if self._in_pixels is None else 1
        beside = 2 * self._labels.itemsize  # a label, an index
        return min(alive, photos) * (3 * self.transform.resolution**2 * pixel_bytes + beside)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the order of the photographs in an epoch, a permutation from (seed, epoch) only."""
        if not self.shuffle:
            return np.arange(len(self.photos), dtype=np.int64)
        return epoch_order(self.seed, epoch, len(self.photos))

    def epoch(self, epoch: int, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch from number ``start_batch`` on; both count from 0.

        Threads end with the iterator: when it is exhausted, closed, collected, or raises. Keep it in no
        variable, or close it (``contextlib.closing``), where a loop may be left early.

        Raises DataError, naming the file, when the turn comes to a batch with a photograph that cannot be
        read; ValueError for numbers that are out of range.
        """
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(f"epoch {epoch}, start_batch {start_batch}: expected >= 0 and 0..{len(self)}")
        return self._batches(epoch, start_batch)  # a generator of its own, so that the check above is made at once

    def _batches(self, epoch: int, start_batch: int) -> Generator[Batch, None, None]:
        order = self.order(epoch)
        numbers = iter(range(start_batch, len(self)))
        if self.workers == 0:
            for number in numbers:
                yield self._made(epoch, self._indices(order, number))
            return
        under_way: deque[tuple[Batch, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="tinytl-decode")

        def submit() -> None:
            while len(under_way) < self.prefetch and (number := next(numbers, None)) is not None:
                indices = self._indices(order, number)
                batch, rows = self._blank(indices)
                pairs = zip(rows, indices, strict=True)
                under_way.append((batch, [pool.submit(self._fill, row, epoch, int(index)) for row, index in pairs]))

        try:
            submit()
            while under_way:
                batch, futures = under_way.popleft()
                for future in futures:
                    future.result()  # in order: of two that cannot be read, the first is named
                del futures
                submit()
                yield batch
                del batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _indices(self, order: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
        return order[number * self.batch_size : (number + 1) * self.batch_size]

    def _made(self, epoch: int, indices: npt.NDArray[np.int64]) -> Batch:
        batch, rows = self._blank(indices)
        for row, index in zip(rows, indices, strict=True):
            self._fill(row, epoch, int(index))
        return batch

    def _fill(self, row: npt.NDArray[Any], epoch: int, index: int) -> None:
        """Read and transform one photograph: the only thing that runs in a worker, and no torch in it."""
        rng = sample_rng(self.seed, epoch, index)
        with self._open(self.photos.items[index][0]) as photo:
            if self._in_pixels is None:
                row[...] = self.transform(photo, rng)
            else:
                np.copyto(row, self._in_pixels.pixels(photo, rng), casting="no")  # floats would be cut off in silence

    def _blank(self, indices: npt.NDArray[np.int64]) -> tuple[Batch, npt.NDArray[Any]]:
        """Return a batch whose images are not written yet, and the array (N, 3, R, R) to write them to."""
        import torch

        shape = (len(indices), 3, self.transform.resolution, self.transform.resolution)
        normalize = None if self._in_pixels is None else self._in_pixels.normalize
        dtype = torch.float32 if normalize is None else torch.uint8
        images = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        labels = torch.from_numpy(self._labels[indices])
        return Batch(images, labels, torch.from_numpy(indices.copy()), normalize), images.numpy()
