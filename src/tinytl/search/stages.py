"""The stages of a search. Each leaves a file, and goes on from it where it is there already."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinytl._atomic import write_bytes
from tinytl._interrupt import Stop
from tinytl.errors import InputError

from .architecture import Genes
from .archive import Archive, Candidate, Planned
from .evolve import Front, evolve
from .generations import EvolveOptions
from .lines import Lines
from .planned import Cost
from .predictor import Predictor, cross_validated_tau
from .profile import Stopwatch
from .records import Finalist, Pair, Plans, key_of, listed
from .space import Space
from .spec import SearchSpec
from .timing import Line, probes, step_seconds
from .workers import Crew

PAIRS, TIMES, EVOLUTION, FINALISTS = "pairs.jsonl", "times.jsonl", "evolution.json", "finalists.jsonl"
Told = Callable[[str, int, int], object]
"""Told a stage's name, how much of it is done, and how much there is."""


class Stages:
    """What a search does after fine-tuning.

    Args:
        spec, space: of the search.
        folder: of its files.
        crew: that measures and plans.
        stop: asked between two pieces of work.
        watch: told what time goes to.
        told: told how far a stage is.
        front: told, after each generation, the candidates that no other beats so far.
    """

    def __init__(
        self,
        spec: SearchSpec,
        space: Space,
        folder: Path,
        crew: Crew,
        stop: Stop,
        watch: Stopwatch,
        told: Told,
        front: Callable[[tuple[Candidate, ...]], object],
    ) -> None:
        self._spec, self._space, self._folder, self._crew = spec, space, folder, crew
        self._stop, self._watch, self._told, self._front = stop, watch, told, front
        self.plans = Plans(folder, crew)

    def pairs(self) -> list[Pair]:
        """Measure random sub-networks, and the default ones at each resolution among them."""
        lines = Lines(self._folder / PAIRS)
        genomes = self._random()
        done = {line["index"] for line in lines.entries}
        left = [index for index in range(len(genomes)) if index not in done]
        self._told("measuring sub-networks", len(done), len(genomes))
        with self._watch.phase("measure"):
            for at, found in self._crew.each("accuracy", [genomes[index] for index in left]):
                index = left[at]
                line = {"index": index, "genome": listed(genomes[index]), "top1": found.top1, "loss": found.loss}
                lines.append(line | {"choice": self._space.choice(genomes[index]).to_json()})
                self._told("measuring sub-networks", len(lines.entries), len(genomes))
                self._stop.check()
        entries = sorted(lines.entries, key=lambda line: line["index"])
        with self._watch.phase("plan"):
            costs = self.plans([np.array(line["genome"]) for line in entries])
        return [
            Pair(tuple(line["genome"]), line["top1"], line["loss"], cost)
            for line, cost in zip(entries, costs, strict=True)
        ]

    def predictor(self, pairs: Sequence[Pair]) -> tuple[Predictor, np.ndarray, float]:
        """Fit the predictor; also what it says of each pair when it has not seen it, and Kendall's tau of that."""
        genomes, top1 = np.array([pair.genome for pair in pairs]), np.array([pair.top1 for pair in pairs])
        cards, seed = self._space.cardinalities, self._spec.seed
        with self._watch.phase("predict"):
            unseen = cross_validated_tau(genomes, top1, cards, seed=seed)
            return Predictor.fit(genomes, top1, cards, seed=seed), unseen.predictions, unseen.tau

    def line(self, pairs: Sequence[Pair]) -> Line | None:
        """Measure steps of some of the pairs, where there is a bound on a step's time."""
        if self._spec.max_step_seconds is None:
            return None
        lines, work = Lines(self._folder / TIMES), [pair.cost.multiply_adds or 0 for pair in pairs]
        chosen = probes(work)
        with self._watch.phase("measure"):
            for at in chosen[len(lines.entries) :]:
                self._stop.check()
                choice = self._space.choice(np.array(pairs[at].genome))
                lines.append({"multiply_adds": work[at], "seconds": step_seconds(choice, self._crew.conditions)})
        return Line.through([e["multiply_adds"] for e in lines.entries], [e["seconds"] for e in lines.entries])

    def evolve(self, predictor: Predictor, pairs: Sequence[Pair], line: Line | None = None) -> Front:
        """Evolve under the planned memory, from the pairs that fit and the default networks."""
        spec, path = self._spec, self._folder / EVOLUTION
        state = json.loads(path.read_text()) if path.exists() else None

        def predict(genomes: np.ndarray) -> np.ndarray:
            with self._watch.phase("predict"):
                return predictor.predict(genomes)

        def plan(genomes: np.ndarray) -> list[Planned | None]:
            self._stop.check()
            with self._watch.phase("plan"):
                costs = self.plans(list(genomes))
            return [
                Planned(
                    cost.memory_bytes,
                    cost.multiply_adds,
                    None if line is None or cost.multiply_adds is None else line(cost.multiply_adds),
                )
                for cost in costs
            ]

        def keep(state: Mapping[str, Any]) -> None:
            write_bytes(path, json.dumps(state).encode())
            archive = Archive.from_json(np.array(self._space.cardinalities), state["archive"])
            self._front(tuple(archive[place] for place in state["best"]))
            self._told("evolving", int(state["generation"]), spec.generations)
            self._stop.check()

        fitting = sorted((p for p in pairs if p.cost.memory_bytes <= spec.budget_bytes), key=lambda p: -p.top1)
        limits = {"multiply_adds": spec.max_multiply_adds, "step_seconds": spec.max_step_seconds}
        bounds = {name: limit for name, limit in limits.items() if limit is not None}
        rng = np.random.default_rng((spec.seed, 5))
        first = [pair.genome for pair in fitting[: spec.population // 2]]
        first += [key_of(self._space.sample(rng)) for _ in range(spec.population // 4)]
        with self._watch.phase("evolve"):
            return evolve(
                self._space.cardinalities,
                self._space.canonical,
                predict,
                plan,
                spec.budget_bytes,
                options=EvolveOptions(population=spec.population, generations=spec.generations),
                bounds=bounds,
                seed=spec.seed,
                sample=self._space.sample,
                start=list(dict.fromkeys([key_of(self._space.smallest()), *first])),
                on_generation=keep,
                resume=state,
            )

    def default(self) -> tuple[Genes, Cost] | None:
        """TinyTL-L+B of the full network, or TinyTL-B where that fits at no resolution, at the highest that fits.

        None where not even that does.
        """
        genomes = self._defaults()
        fitting = [
            (genome, cost)
            for genome, cost in zip(genomes, self.plans(genomes), strict=True)
            if cost.memory_bytes <= self._spec.budget_bytes and self._within(cost)
        ]
        return fitting[-1] if fitting else None

    def finalists(self, front: Front, predictor: Predictor) -> list[Finalist]:
        """Measure the best again, the default network of that size among them; best first."""
        spec, lines = self._spec, Lines(self._folder / FINALISTS)
        fitting = [c for c in front.planned if self._fits(c)]
        best = self._spread(sorted(fitting, key=lambda c: (-c.accuracy, c.planned.memory_bytes)))
        with self._watch.phase("plan"):
            default = self.default()
        keys = [candidate.genome for candidate in best]
        given = None if default is None else key_of(default[0])
        keys += [given] if given is not None and given not in keys else []
        done = {tuple(line["genome"]) for line in lines.entries}
        left = [np.array(key) for key in keys if key not in done]
        self._told("measuring finalists", len(done), len(keys))
        with self._watch.phase("measure"):
            shared = self._crew.all("accuracy", left)
            none = ((at, None) for at in range(len(left)))
            for at, trial in self._crew.each("trial", left) if spec.finalist_epochs else none:
                seconds = None if trial is None else trial.step_seconds
                if spec.max_step_seconds is not None:  # by itself, where trials may have run side by side
                    seconds = step_seconds(self._space.choice(left[at]), self._crew.conditions)
                lines.append(
                    {
                        "genome": listed(left[at]),
                        "shared_top1": shared[at].top1,
                        "trained_top1": None if trial is None else trial.top1,
                        "trained_loss": None if trial is None else trial.loss,
                        "step_seconds": seconds,
                    }
                )
                self._told("measuring finalists", len(lines.entries), len(keys))
                self._stop.check()
        with self._watch.phase("plan"):
            costs = self.plans([np.array(line["genome"]) for line in lines.entries])
        predicted = predictor.predict(np.array([line["genome"] for line in lines.entries]))
        found = [
            Finalist(
                tuple(line["genome"]),
                cost,
                float(guess),
                line["shared_top1"],
                line["trained_top1"],
                line["trained_loss"],
                line["step_seconds"],
                tuple(line["genome"]) == given,
            )
            for line, cost, guess in zip(lines.entries, costs, predicted, strict=True)
        ]
        return sorted(self._in_time(found), key=lambda finalist: finalist.rank)

    def _spread(self, ranked: Sequence[Candidate]) -> list[Candidate]:
        """The best of each resolution before the second best of any.

        What the super-network says of two networks it says under one training; how it errs depends most of all on the
        resolution, so finalists of one resolution alone would all err alike.
        """
        first: dict[int, Candidate] = {}
        for candidate in ranked:
            first.setdefault(candidate.genome[0], candidate)
        heads = list(first.values())
        return (heads + [candidate for candidate in ranked if candidate not in heads])[: self._spec.finalists]

    def _in_time(self, finalists: list[Finalist]) -> list[Finalist]:
        """Those whose measured step is within the bound, if there is one. Raises InputError where none is."""
        most = self._spec.max_step_seconds
        if most is None:
            return finalists
        times = {f.genome: f.step_seconds or 0.0 for f in finalists}
        within = [f for f in finalists if times[f.genome] <= most]
        if not within:
            raise InputError(
                f"max_step_seconds is {most:g}: of the finalists the fastest takes {min(times.values()):.3g} seconds a "
                "step; give that or more"
            )
        return within

    def _fits(self, candidate: Candidate) -> bool:
        planned, spec = candidate.planned, self._spec
        limits = (
            (planned.memory_bytes, spec.budget_bytes),
            (planned.multiply_adds, spec.max_multiply_adds),
            (planned.step_seconds, spec.max_step_seconds),
        )
        return all(most is None or (value is not None and value <= most) for value, most in limits)

    def _within(self, cost: Cost) -> bool:
        most = self._spec.max_multiply_adds
        return most is None or (cost.multiply_adds is not None and cost.multiply_adds <= most)

    def _defaults(self) -> list[Genes]:
        """TinyTL-B of the full network at each resolution, then TinyTL-L+B."""
        space = self._space
        return [space.default(at, lite_modules=lite) for lite in (False, True) for at in range(len(space.resolutions))]

    def _random(self) -> list[Genes]:
        """The sub-networks to measure: the default ones, and random ones, all different; the same at every call."""
        space, rng = self._space, np.random.default_rng((self._spec.seed, 3))
        found = {key_of(genome): None for genome in self._defaults()}
        for _ in range(100 * self._spec.pairs):  # a small space may not hold so many
            if len(found) >= self._spec.pairs:
                break
            found[key_of(space.sample(rng))] = None
        return [np.array(key) for key in list(found)[: self._spec.pairs]]
