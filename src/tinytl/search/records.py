"""What a search measured and planned, and the costs that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .architecture import Genes
from .lines import Lines
from .planned import Cost
from .workers import Crew

PLANS = "plans.jsonl"


@dataclass(frozen=True)
class Pair:
    """A sub-network that was measured: its genome, its accuracy on the held-out fifth, and what it costs."""

    genome: tuple[int, ...]
    top1: float
    loss: float
    cost: Cost


@dataclass(frozen=True)
class Finalist:
    """A candidate that was measured again.

    Attributes:
        genome, cost: of it.
        predicted: top-1 by the predictor.
        shared_top1: measured in the super-network.
        trained_top1, trained_loss: trained by itself, on the held-out fifth; None where no epochs were asked for.
        step_seconds: median of a training step, measured in that training.
        default: whether it is the default network of that size.
    """

    genome: tuple[int, ...]
    cost: Cost
    predicted: float
    shared_top1: float
    trained_top1: float | None
    trained_loss: float | None
    step_seconds: float | None
    default: bool

    @property
    def rank(self) -> tuple[float, ...]:
        """By what finalists are compared, best first: held-out top-1, then loss, then memory."""
        top1 = self.shared_top1 if self.trained_top1 is None else self.trained_top1
        return (-top1, self.trained_loss or 0.0, self.cost.memory_bytes)


class Plans:
    """The cost of each genome, planned once and kept."""

    def __init__(self, folder: Path, crew: Crew) -> None:
        self._lines, self._crew = Lines(folder / PLANS), crew
        self._known = {tuple(line["genome"]): Cost(**line["cost"]) for line in self._lines.entries}

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, genomes: Sequence[Genes]) -> list[Cost]:
        """In the order of the genomes."""
        keys = [key_of(genome) for genome in genomes]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        for index, cost in self._crew.each("cost", [np.array(key) for key in new]):
            self._lines.append({"genome": list(new[index]), "cost": cost.to_json()})
            self._known[new[index]] = cost
        return [self._known[key] for key in keys]


def key_of(genome: Genes) -> tuple[int, ...]:
    """A genome as a key of a mapping."""
    return tuple(int(gene) for gene in genome)


def listed(genome: Genes) -> list[int]:
    """A genome as JSON has it."""
    return [int(gene) for gene in genome]
