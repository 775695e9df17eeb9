"""The data set that a network is chosen for: what the super-network learns from, and what it is measured on.

The training photographs are split once more: a fifth is held out, and every choice looks at that fifth alone. The test
photographs are not touched before there is a winner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tinytl._prepared import eval_transform, train_transform
from tinytl.backbones import Preprocessing, find
from tinytl.data import Batch, Loader, PhotoCache, PhotoSet, split
from tinytl.errors import DataError

from .spec import SearchSpec

HELD_OUT = 0.2
LEAST = 5
"""Photographs a class: a fifth of fewer is none."""
CACHE_BYTES = 256_000_000


@dataclass(frozen=True)
class Target:
    """Photographs to learn from and to choose by.

    Attributes:
        spec: of the search.
        tune: what the super-network is fine-tuned on.
        held: what sub-networks are measured on.
    """

    spec: SearchSpec
    tune: PhotoSet
    held: PhotoSet

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.tune.classes

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Of the backbone, at its own resolution."""
        return find(self.spec.space).preprocessing

    @cached_property
    def _cache(self) -> PhotoCache:
        return PhotoCache(CACHE_BYTES)

    def tune_batch(self, step: int, resolution: int) -> tuple[Tensor, Tensor]:
        """Images (N, 3, R, R) and labels (N,) of a step of fine-tuning: a function of (seed, step, resolution)."""
        epoch, batch = divmod(step, self.tune_steps)
        made = next(self._tuning(resolution).epoch(epoch, batch))
        return made.normalized(), made.labels

    @property
    def tune_steps(self) -> int:
        """Steps of an epoch of fine-tuning."""
        return len(self.tune) // self.spec.tune_batch

    def _tuning(self, resolution: int) -> Loader:
        spec = self.spec
        transform = train_transform(replace(self.preprocessing, resolution=resolution), spec)
        # no threads: a loader that is asked for any one batch
        return Loader(
            self.tune,
            transform,
            spec.tune_batch,
            shuffle=True,
            seed=spec.seed,
            workers=0,
            drop_last=True,
            cache=self._cache,
        )

    def held_images(self, resolution: int) -> Batch:
        """All photographs that choices are measured on, in one batch of bytes."""
        return self._whole(self.held, resolution)

    def calibration_images(self, resolution: int, count: int) -> list[Tensor]:
        """Images (8, 3, R, R) of the first photographs of the first epoch, not distorted."""
        order = self._tuning(resolution).order(0)[:count]
        some = self.tune.replaced(items=tuple(self.tune.items[int(index)] for index in order))
        return list(self._whole(some, resolution).normalized().split(8))

    def _whole(self, photos: PhotoSet, resolution: int) -> Batch:
        transform = eval_transform(replace(self.preprocessing, resolution=resolution))
        loader = Loader(photos, transform, 64, shuffle=False, workers=0)
        batches = list(loader.epoch(0))
        parts = [torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels", "indices")]
        return Batch(parts[0].contiguous(memory_format=torch.channels_last), parts[1], parts[2], batches[0].normalize)


def make_target(spec: SearchSpec, train: PhotoSet) -> Target:
    """Hold a fifth of the training photographs out.

    Raises:
        DataError: too few photographs of a class for that.
    """
    counts = train.counts()
    fewest = min(range(len(train.classes)), key=lambda label: counts[label])
    if counts[fewest] < LEAST:
        raise DataError(
            f"the class {train.classes[fewest]!r} has {counts[fewest]} photograph(s) to train on: a search holds a "
            f"fifth of them out and needs at least {LEAST}; add some, or remove the class"
        )
    tune, held = split(train, HELD_OUT, spec.split_seed)
    if len(tune) < spec.tune_batch:
        raise DataError(
            f"{len(tune)} photographs to fine-tune on, fewer than the tune_batch of {spec.tune_batch}: lower it"
        )
    return Target(spec, tune, held)
