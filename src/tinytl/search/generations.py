"""One generation after the other: NSGA-II over genomes, as state that is plain data.

NSGA-II (Deb et al., 2002) keeps by rank of non-domination, within a rank by crowding distance, and what breaks a bound
behind all that keep them, by how much it breaks. Sorting and crowding are pymoo's. The loop is our own, since its whole
state must be plain data: a search that was killed goes on in the same bits. The shares of parents and mutations are
those of Once-for-All's search (PAPER.md, feature-extractor adaptation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinytl._differences import differences
from tinytl.errors import InputError, RunError

from .archive import BOUNDABLE, Archive, Planned
from .screen import MemoryScreen

ATTEMPTS = 20  # at a new genome, for each that is wanted
NEWEST = 2_000  # pairs that memory is guessed from: they are nearest to where the search is


@dataclass(frozen=True)
class EvolveOptions:
    """The knobs of `evolve`; PAPER.md's numbers, except for `patience`.

    Attributes:
        population: genomes that survive a generation, and children of each generation.
        generations: at most.
        parent_share: of the population, its best, from which children are made.
        mutation_share: of the children: changed copies of one parent. The others mix the genes of two.
        mutation_probability: that a gene of such a copy is drawn anew.
        patience: generations without a better front after which it ends.
        screen: leave genomes unplanned that are all but sure to be dominated.

    Raises:
        InputError: a number out of its range.
    """

    population: int = 100
    generations: int = 500
    parent_share: float = 0.25
    mutation_share: float = 0.5
    mutation_probability: float = 0.1
    patience: int = 50
    screen: bool = True

    def __post_init__(self) -> None:
        for name, least in (("population", 4), ("generations", 0), ("patience", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)}: expected {least} or more")
        for name in ("parent_share", "mutation_share", "mutation_probability"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} {getattr(self, name)}: expected more than 0 and at most 1")


def require_pymoo() -> tuple[Any, Any]:
    """Return pymoo's non-dominated sorting and crowding distance. Raises InputError where the extra is missing."""
    try:
        from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
        from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
    except ImportError as error:
        raise InputError(
            f"the search needs pymoo, and {error.name} is missing: pip install 'tinytl[search]'"
        ) from error
    return NonDominatedSorting(), get_crowding_function("cd")


class Generations:
    """The state of an evolution and one step of it."""

    def __init__(
        self,
        cardinalities: Sequence[int],
        canonical: Callable[[np.ndarray], np.ndarray],
        predict: Callable[[np.ndarray], np.ndarray],
        plan: Callable[[np.ndarray], Sequence[Planned | None]],
        limits: dict[str, float],
        options: EvolveOptions,
        seed: int,
        sample: Callable[[np.random.Generator], np.ndarray] | None,
    ) -> None:
        unknown = set(limits) - {"memory_bytes", *BOUNDABLE}
        if unknown:
            raise ValueError(f"unknown bounds {sorted(unknown)}: known: {', '.join(BOUNDABLE)}")
        self._sorting, self._crowding = require_pymoo()
        self.cardinalities = np.array([int(count) for count in cardinalities], np.int64)
        self.canonical, self.predict, self.plan = canonical, predict, plan
        self.options, self.limits, self.seed, self.sample = options, limits, seed, sample
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.archive = Archive(self.cardinalities)
        self.population: list[int] = []  # places in the archive, best first
        self.best: list[int] = []  # the front's places in the archive
        self.generation = 0
        self.unchanged = 0
        self.exhausted = False

    def settings(self) -> dict[str, Any]:
        """What must be the same when a search is gone on with. Generations and patience may be more than before."""
        fixed = ("population", "parent_share", "mutation_share", "mutation_probability", "screen")
        return {
            "cardinalities": self.cardinalities.tolist(),
            "limits": dict(self.limits),
            "seed": self.seed,
            **{name: getattr(self.options, name) for name in fixed},
        }

    def state(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "settings": self.settings(),
            "archive": self.archive.to_json(),
            "population": list(self.population),
            "best": list(self.best),
            "generation": self.generation,
            "unchanged": self.unchanged,
            "exhausted": self.exhausted,
            "rng": self.rng.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state. Raises RunError when it is of other settings."""
        found = differences(self.settings(), state["settings"])
        if found:
            raise RunError(f"this search was begun with other settings: {'; '.join(found)}: begin a new one")
        self.archive = Archive.from_json(self.cardinalities, state["archive"])
        self.population, self.best = list(state["population"]), list(state["best"])
        self.generation, self.unchanged = state["generation"], state["unchanged"]
        self.exhausted = state["exhausted"]
        self.rng.bit_generator.state = dict(state["rng"])

    def ended(self) -> str:
        """Why there is no further generation; empty while there is one."""
        if self.exhausted:
            return "exhausted"
        if self.generation >= self.options.generations:
            return "generations"
        return "patience" if self.unchanged >= self.options.patience else ""

    def begin(self, start: Sequence[Sequence[int]] | np.ndarray) -> None:
        """Plan the first generation. All of `start` is planned, if it is more than a population."""
        taken: dict[tuple[int, ...], None] = {}
        for genome in start:
            taken.setdefault(self._canonical(np.asarray(genome)))
        for _ in range(ATTEMPTS * self.options.population):
            if len(taken) >= self.options.population:
                break
            taken.setdefault(self._canonical(self._random()))
        genomes = list(taken)
        size = self.options.population
        for first in range(0, len(genomes), size):
            self._add(genomes[first : first + size])
        self._survive(list(range(len(genomes))))

    def step(self) -> None:
        """One generation: children, which of them are planned, who survives."""
        children = self._children()
        self.exhausted = not children
        if children and self.options.screen:
            children = self._screened(children)
        if children:
            first = len(self.archive)
            self._add(children)
            self._survive(self.population + list(range(first, len(self.archive))))
        else:
            self.unchanged += 1
        self.generation += 1

    def _children(self) -> list[tuple[int, ...]]:
        """New genomes, a population of them where there are as many."""
        wanted, options = self.options.population, self.options
        parents = self.archive.genomes(self.population[: max(2, round(options.parent_share * wanted))])
        mutants = round(options.mutation_share * wanted)
        found: dict[tuple[int, ...], None] = {}
        for attempt in range(ATTEMPTS * wanted):
            if len(found) == wanted:
                break
            one = parents[self.rng.integers(len(parents))]
            if attempt >= ATTEMPTS * wanted // 2:  # what is near has been tried
                child = self._random()
            elif len(found) < mutants:
                child = np.where(self.rng.random(one.size) < options.mutation_probability, self._random(), one)
            else:
                other = parents[self.rng.integers(len(parents))]
                child = np.where(self.rng.random(one.size) < 0.5, one, other)
            genome = self._canonical(child)
            if genome not in self.archive:
                found.setdefault(genome)
        return list(found)

    def _screened(self, children: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The children that may be on the front, judged by a careful guess at the least memory that they take."""
        screen = MemoryScreen.fit(*self.archive.with_memory(NEWEST), self.cardinalities)
        if screen is None:
            return children
        least = screen.least_bytes(np.array(children))
        accuracies = self._predicted(children)
        feasible = self.violations() == 0
        memory, accuracy = self.archive.memory()[feasible], self.archive.accuracies()[feasible]
        budget = self.limits["memory_bytes"] if feasible.any() else np.inf
        kept = []
        for child, floor, value in zip(children, least, accuracies, strict=True):
            dominated = bool(np.any((memory <= floor) & (accuracy >= value)))
            if floor <= budget and not dominated:
                kept.append(child)
        return kept

    def _add(self, genomes: list[tuple[int, ...]]) -> None:
        array = np.array(genomes, np.int64).reshape(len(genomes), self.cardinalities.size)
        accuracies = self._predicted(genomes)
        records = list(self.plan(array))
        if len(records) != len(genomes):
            raise ValueError(f"plan gave {len(records)} records for {len(genomes)} genomes")
        self.archive.add(array, accuracies, records)

    def _predicted(self, genomes: list[tuple[int, ...]]) -> np.ndarray:
        # a genome at a time would do, too: what matters is that a resumed search asks for the same batches
        found = np.asarray(self.predict(np.array(genomes, np.int64)), np.float64)
        if found.shape != (len(genomes),) or not np.isfinite(found).all():
            raise ValueError(f"predict gave {found!r}: expected {len(genomes)} finite accuracies")
        return found

    def violations(self) -> np.ndarray:
        """By how much each of the archive exceeds the limits, see `Archive.violations`."""
        return self.archive.violations(self.limits)

    def _survive(self, places: list[int]) -> None:
        """Keep a population's number of these places, best first, and bring the front up to date."""
        violations = self.violations()
        objectives = np.stack([-self.archive.accuracies(), self.archive.memory()], axis=1)
        chosen = np.array(places)
        kept: list[int] = []
        feasible = chosen[violations[chosen] == 0]
        if feasible.size:
            for front in self._sorting.do(objectives[feasible], n_stop_if_ranked=self.options.population):
                members = feasible[np.sort(front)]
                distance = self._crowding.do(objectives[members], n_remove=0)
                kept += members[np.argsort(-distance, kind="stable")].tolist()
        others = chosen[violations[chosen] > 0]
        kept += others[np.argsort(violations[others], kind="stable")].tolist()
        self.population = kept[: self.options.population]

        # what was dominated stays so: a front is made of the one before and of what is new
        within = np.array(sorted({*self.best, *places}), np.int64)
        within = within[violations[within] == 0]
        if within.size:
            best = within[self._sorting.do(objectives[within], only_non_dominated_front=True)]
        else:
            best = self.population[:1]  # nearest to the bounds: progress all the same
        best = sorted(int(place) for place in best)
        self.unchanged = self.unchanged + 1 if best == self.best else 0
        self.best = best

    def _random(self) -> np.ndarray:
        return self.rng.integers(0, self.cardinalities) if self.sample is None else np.asarray(self.sample(self.rng))

    def _canonical(self, genome: np.ndarray) -> tuple[int, ...]:
        found = np.asarray(self.canonical(genome))
        if found.shape != self.cardinalities.shape or (found < 0).any() or (found >= self.cardinalities).any():
            raise ValueError(f"genome {found!r} is not of the cardinalities {self.cardinalities.tolist()}")
        return tuple(int(gene) for gene in found)
