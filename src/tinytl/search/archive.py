"""Every genome that a search has planned, once each, with what was predicted and planned for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BOUNDABLE = ("multiply_adds", "step_seconds")


@dataclass(frozen=True)
class Planned:
    """What the planner says of a sub-network.

    Attributes:
        memory_bytes: planned peak of its training.
        multiply_adds: of one image's forward pass; None where nobody asked.
        step_seconds: of one training step, estimated; None where nobody asked.
    """

    memory_bytes: int
    multiply_adds: int | None = None
    step_seconds: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A sub-network that was planned.

    Attributes:
        genome: its genes.
        accuracy: predicted.
        planned: what the planner says.
    """

    genome: tuple[int, ...]
    accuracy: float
    planned: Planned


class Archive:
    """Genomes in the order in which they were planned."""

    def __init__(self, cardinalities: np.ndarray) -> None:
        self._genes = len(cardinalities)
        self._genomes: list[tuple[int, ...]] = []
        self._accuracies: list[float] = []
        self._records: list[Planned | None] = []
        self._known: set[tuple[int, ...]] = set()

    def __len__(self) -> int:
        return len(self._genomes)

    def __contains__(self, genome: object) -> bool:
        return genome in self._known

    def __getitem__(self, place: int) -> Candidate:
        """The candidate at a place. Raises ValueError where it could not be planned."""
        record = self._records[place]
        if record is None:
            raise ValueError(f"genome {self._genomes[place]} could not be planned")
        return Candidate(self._genomes[place], self._accuracies[place], record)

    def add(self, genomes: np.ndarray, accuracies: np.ndarray, records: Sequence[Planned | None]) -> None:
        """Append (n, G) genomes, n accuracies and n records. Raises ValueError for a genome that is there."""
        for row, accuracy, record in zip(genomes.tolist(), accuracies.tolist(), records, strict=True):
            genome = tuple(row)
            if genome in self._known:
                raise ValueError(f"genome {genome} is there already")
            self._known.add(genome)
            self._genomes.append(genome)
            self._accuracies.append(accuracy)
            self._records.append(record)

    def genomes(self, places: Sequence[int]) -> np.ndarray:
        """The genomes at these places, (n, G) int64."""
        return np.array([self._genomes[place] for place in places], np.int64).reshape(len(places), self._genes)

    def accuracies(self) -> np.ndarray:
        """All predicted accuracies, (n,) float64."""
        return np.array(self._accuracies, np.float64)

    def memory(self) -> np.ndarray:
        """All planned bytes, (n,) float64; infinite where planning failed."""
        return self._values("memory_bytes")

    def with_memory(self, newest: int) -> tuple[np.ndarray, np.ndarray]:
        """The newest genomes that could be planned, (m, G), and their bytes, (m,)."""
        memory = self.memory()
        places = np.flatnonzero(np.isfinite(memory))[-newest:]
        return self.genomes(places.tolist()), memory[places]

    def least(self, name: str) -> float:
        """The least value seen of a record's field."""
        return float(self._values(name).min())

    def violations(self, limits: Mapping[str, float]) -> np.ndarray:
        """By how much each exceeds the limits, summed in shares of them, (n,): 0 within all, infinite if not planned.

        Raises ValueError where a record lacks a value that is bounded.
        """
        found = np.where(np.isfinite(self.memory()), 0.0, np.inf)
        for name, limit in limits.items():
            found = found + np.maximum(0.0, self._values(name) - limit) / max(limit, 1e-12)
        return found

    def _values(self, name: str) -> np.ndarray:
        values = [np.inf if record is None else getattr(record, name) for record in self._records]
        if None in values:
            raise ValueError(f"{name} is bounded and a record does not tell it")
        return np.array(values, np.float64)

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes the same archive, bit for bit."""
        return {
            "genomes": [list(genome) for genome in self._genomes],
            "accuracies": list(self._accuracies),
            "records": [None if record is None else asdict(record) for record in self._records],
        }

    @staticmethod
    def from_json(cardinalities: np.ndarray, data: Mapping[str, Any]) -> Archive:
        """The reverse of `to_json`."""
        archive = Archive(cardinalities)
        genomes = np.array(data["genomes"], np.int64).reshape(-1, len(cardinalities))
        records = [None if record is None else Planned(**record) for record in data["records"]]
        archive.add(genomes, np.array(data["accuracies"], np.float64), records)
        return archive
