"""How good sub-networks of a super-network are, each with batch-norm statistics of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinytl.backbones import Complexity, Preprocessing, complexity
from tinytl.backbones.ofa_networks import sub_network
from tinytl.backbones.once_for_all import OfaArchitecture, architecture_text
from tinytl.data import Batch, EvalTransform, Loader, PhotoCache, PhotoSet
from tinytl.data.transforms import epoch_order
from tinytl.engine import Evaluation, evaluate
from tinytl.engine.batches import BatchSource
from tinytl.report import evaluation_record

from .elastic import ElasticNet
from .processes import Group
from .recalibration import recalibrate_


class CalibrationImages:
    """Some training photographs as they are evaluated, held in bytes: batches (N, 3, R, R), the same each time.

    Args:
        photos: to draw from, without repetition.
        transform: of evaluation.
        count: how many, at most; what is left over beside whole batches is left out.
        batch_size: images a batch, at most.
        seed: of the draw.
        workers: threads that decode.
        cache: holds decoded photographs.
    """

    def __init__(
        self,
        photos: PhotoSet,
        transform: EvalTransform,
        count: int,
        batch_size: int,
        *,
        seed: int,
        workers: int = 0,
        cache: PhotoCache | None = None,
    ) -> None:
        chosen = sorted(int(index) for index in epoch_order(seed, 0, len(photos))[:count])
        picked = photos.replaced(items=tuple(photos.items[index] for index in chosen), notes=())
        # in a drawn order: sorted by class, a batch would have one class's statistics
        loader = Loader(
            picked,
            transform,
            min(batch_size, len(picked)),
            shuffle=True,
            seed=seed,
            workers=workers,
            drop_last=True,
            cache=cache,
        )
        self._batches: list[Batch] = list(loader.epoch(0))

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.normalized() for batch in self._batches)


@dataclass(frozen=True, eq=False)
class SubnetResult:
    """A sub-network and how good it is.

    Attributes:
        name: 'largest', 'smallest', 'random 1', ...
        architecture: as text, what stands behind the '@' of a backbone's name.
        evaluation: on the held-out photographs.
        complexity: parameters and multiply-adds, at the resolution of the evaluation.
    """

    name: str
    architecture: str
    evaluation: Evaluation
    complexity: Complexity

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            **evaluation_record(self.evaluation),
            "parameters": self.complexity.parameters,
            "multiply_adds": self.complexity.multiply_adds,
        }


def evaluate_choice(
    net: ElasticNet, architecture: OfaArchitecture, calibration: CalibrationImages, validation: BatchSource
) -> Evaluation:
    """Measure one sub-network with statistics measured on ``calibration``; the super-network is as before afterwards,
    but for its choice."""
    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.choose(architecture)
    try:
        recalibrate_(net, calibration)
        return evaluate(net, validation)
    finally:
        for name, buffer in net.named_buffers():
            buffer.copy_(kept[name])


def measure(
    net: ElasticNet,
    named: Sequence[tuple[str, OfaArchitecture]],
    calibration: CalibrationImages,
    validation: BatchSource,
    preprocessing: Preprocessing,
    group: Group,
    on_measured: Callable[[int, int], object] | None = None,
) -> tuple[SubnetResult, ...]:
    """Measure sub-networks, each in one of the processes; all of them get all results.

    ``on_measured`` is told how many are done and how many this process has to do.
    """
    mine = list(named)[group.rank :: group.size]
    found: dict[str, Evaluation] = {}
    for name, architecture in mine:
        found[name] = evaluate_choice(net, architecture, calibration, validation)
        if on_measured is not None:
            on_measured(len(found), len(mine))
    together = {name: evaluation for part in group.gathered(found) for name, evaluation in part.items()}
    return tuple(
        SubnetResult(
            name,
            architecture_text(net.space, architecture),
            together[name],
            _complexity(net, architecture, preprocessing.resolution),
        )
        for name, architecture in named
    )


def _complexity(net: ElasticNet, architecture: OfaArchitecture, resolution: int) -> Complexity:
    with torch.device("meta"):
        return complexity(sub_network(net.space, architecture, num_classes=net.num_classes), resolution)
