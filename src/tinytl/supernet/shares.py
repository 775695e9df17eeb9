"""Training batches of changing resolution, each process's share of them.

The resolution of a batch is drawn from (seed, its number in the whole run), its photographs from (seed, epoch), so both
are the same in every process and after a resumption. For each resolution there is one loader that reads its batches'
photographs in order; what follows merges them. (Images resized when they are already a batch would be sampled twice.)
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tinytl._interrupt import Stop
from tinytl._schedule import step_seed
from tinytl.data import Batch, Loader, PhotoCache, PhotoSet, TrainTransform
from tinytl.data.transforms import epoch_order
from tinytl.errors import InputError


class MixedSizes:
    """Batches of a `PhotoSet`, epoch by epoch, each at one of several resolutions; ``len()`` is their number.

    Incomplete batches are left out. An epoch's batches depend on the arguments alone, and not on ``workers``, ``cache``
    and ``stop``.

    Args:
        photos: all of them, whatever the share.
        transform: augments; its resolution is put aside.
        sizes: the resolutions, drawn uniformly.
        batch_size: images of a batch in all processes together.
        seed: of order, augmentation and resolution.
        rank, processes: which share of how many.
        workers: threads that decode.
        cache: holds decoded photographs.
        stop: asked between batches; None: nobody asks.

    Raises:
        InputError: a batch size that the processes do not divide, or more than there are photographs.
    """

    def __init__(
        self,
        photos: PhotoSet,
        transform: TrainTransform,
        sizes: tuple[int, ...],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        cache: PhotoCache | None = None,
        stop: Stop | None = None,
    ) -> None:
        if batch_size % processes or batch_size < 2 * processes:
            raise InputError(
                f"batch_size is {batch_size} and there are {processes} processes: expected a multiple of it, and at "
                "least 2 images for each"
            )
        if len(photos) < batch_size:
            raise InputError(
                f"batch_size is {batch_size}, more than the {len(photos)} photographs to train on: make it smaller"
            )
        self._photos, self._transform, self._sizes = photos, transform, sizes
        self._batch_size, self._seed, self._rank, self._processes = batch_size, seed, rank, processes
        self._workers, self._cache, self._stop = workers, cache, stop

    def __len__(self) -> int:
        return len(self._photos) // self._batch_size

    def size_of(self, epoch: int, batch: int) -> int:
        """The resolution of a batch."""
        draws = random.Random(f"resolution/{self._seed}/{epoch * len(self) + batch}")
        return self._sizes[int(draws.random() * len(self._sizes))]

    def epoch(self, epoch: int, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Yield this process's shares of an epoch's batches, from number ``start_batch`` on; both count from 0."""
        batches = self._batches(epoch, start_batch)
        return batches if self._stop is None else self._stop.between(batches)

    def _batches(self, epoch: int, start_batch: int) -> Generator[Batch, None, None]:
        order = epoch_order(self._seed, epoch, len(self._photos))
        numbers = {size: [n for n in range(len(self)) if self.size_of(epoch, n) == size] for size in self._sizes}
        with contextlib.ExitStack() as stack:
            sources = {}
            for size, own in numbers.items():
                done = sum(number < start_batch for number in own)
                if done < len(own):
                    # the whole epoch's, so that a photograph's place in it, and with it its crop, is the same
                    picked = [index for n in own for index in self._share(order, n)]
                    batches = self._loader(picked, size).epoch(epoch, start_batch=done)
                    sources[size] = stack.enter_context(contextlib.closing(batches))
            for number in range(start_batch, len(self)):
                yield next(sources[self.size_of(epoch, number)])

    def _share(self, order: npt.NDArray[np.int64], number: int) -> list[int]:
        whole = order[number * self._batch_size : (number + 1) * self._batch_size]
        return [int(index) for index in whole[self._rank :: self._processes]]

    def _loader(self, picked: list[int], size: int) -> Loader:
        photos = self._photos.replaced(items=tuple(self._photos.items[index] for index in picked), notes=())
        return Loader(
            photos,
            replace(self._transform, resolution=size),
            self._batch_size // self._processes,
            shuffle=False,
            # of its own: equal places of two resolutions or shares would else be cropped alike
            seed=step_seed(self._seed, size * self._processes + self._rank),
            workers=self._workers,
            prefetch=1,
            cache=self._cache,
        )
