"""Everything that a super-network's training makes before its first step, and what its bits depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinytl._interrupt import Stop
from tinytl._prepared import eval_transform, train_transform
from tinytl.backbones import Preprocessing
from tinytl.backbones.once_for_all import OfaSpace, space_of
from tinytl.data import Loader, PhotoCache, PhotoSet, resolve_split
from tinytl.delta import check_names
from tinytl.spec import RunOptions

from .measuring import CalibrationImages
from .processes import Group
from .shares import MixedSizes
from .shrinking import Phase, phases
from .spec import SupernetSpec


@dataclass(frozen=True, eq=False)
class PreparedSupernet:
    """Everything that is made before the first step.

    Attributes:
        space: of the super-network.
        phases: of its training, in order.
        train, validation: photographs.
        preprocessing: of an evaluation; its resolution is the largest of those that are trained on.
        training: this process's batches.
        evaluation: batches of ``validation``.
        processes: how many train together.
    """

    spec: SupernetSpec
    space: OfaSpace
    phases: tuple[Phase, ...]
    train: PhotoSet
    validation: PhotoSet
    preprocessing: Preprocessing
    training: MixedSizes
    evaluation: Loader
    processes: int
    cache: PhotoCache | None
    workers: int

    @property
    def epochs(self) -> int:
        """Of all phases."""
        return self.phases[-1].end

    def calibration(self) -> CalibrationImages:
        """Read the images that statistics are measured on."""
        spec = self.spec
        return CalibrationImages(
            self.train,
            eval_transform(self.preprocessing),
            spec.calibration_images,
            max(spec.batch_size, 32),  # a batch normalizes by itself on the way, and a small one says little
            seed=spec.seed,
            workers=self.workers,
            cache=self.cache,
        )

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as plain data: the specification, the photographs, the number of processes."""
        return {
            **dataclasses.asdict(self.spec),
            "resolutions": list(self.spec.sizes),
            "processes": self.processes,
            "train_photos": self.train.fingerprint(),
            "validation_photos": self.validation.fingerprint(),
            "classes": list(self.train.classes),
        }


def prepare_supernet(
    spec: SupernetSpec,
    options: RunOptions,
    group: Group,
    stop: Stop | None,
    on_check: Callable[[int, int], object] | None = None,
) -> PreparedSupernet:
    """See which photographs can be read, and make loaders and phases.

    ``stop`` is asked between batches, where this process trains alone (several stop together, at a step's end).

    Raises:
        InputError: anything in ``spec`` that cannot be used, or photographs that cannot be read if they must be.
    """
    space = space_of(spec.space)
    train, validation = resolve_split(
        spec.photos,
        spec.val_fraction,
        spec.split_seed,
        strict=options.strict,
        workers=options.workers,
        on_progress=on_check,
    )
    p = dataclasses.replace(space.preprocessing, resolution=spec.sizes[-1])
    check_names(train.classes, dataclasses.asdict(p))
    cache = PhotoCache(options.cache_bytes) if options.cache_bytes else None
    augment = train_transform(p, spec)
    training = MixedSizes(
        train,
        augment,
        spec.sizes,
        spec.batch_size,
        seed=spec.seed,
        rank=group.rank,
        processes=group.size,
        workers=options.workers,
        cache=cache,
        stop=stop,
    )
    size = max(spec.batch_size, 32)
    evaluation = Loader(
        validation, eval_transform(p), size, shuffle=False, workers=options.workers, prefetch=1, cache=cache
    )
    course = phases(space, spec.epochs, spec.phase_epochs, spec.lr, spec.phase_lr, spec.warmup_epochs)
    return PreparedSupernet(
        spec, space, course, train, validation, p, training, evaluation, group.size, cache, options.workers
    )
