"""Evolution over genomes: high predicted accuracy, little planned memory, everything returned planned.

A genome is a vector of whole numbers, gene i from 0 to cardinality i - 1. Predicting its accuracy costs
microseconds, planning its memory some 100 ms, so each genome is planned once, in the batch in which it is born,
and `tinytl.search.screen` keeps those from being planned that a planned one is all but sure to dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinytl.errors import BudgetError, InputError

from .archive import Candidate, Planned
from .generations import EvolveOptions, Generations


@dataclass(frozen=True)
class Front:
    """What evolution found.

    Attributes:
        candidates: none of which another one within the bounds beats in both accuracy and memory; by memory.
        planned: all that could be planned, by memory; those over the budget too.
        generations: that were run.
        reason: why it ended: 'generations', 'patience' or 'exhausted' (no genome is left to try).
    """

    candidates: tuple[Candidate, ...]
    planned: tuple[Candidate, ...] = field(repr=False)
    generations: int
    reason: str

    @property
    def best(self) -> Candidate:
        """The candidate of the highest predicted accuracy."""
        return max(self.candidates, key=lambda candidate: candidate.accuracy)


def evolve(
    cardinalities: Sequence[int],
    canonical: Callable[[np.ndarray], np.ndarray],
    predict: Callable[[np.ndarray], np.ndarray],
    plan: Callable[[np.ndarray], Sequence[Planned | None]],
    budget_bytes: float,
    *,
    options: EvolveOptions | None = None,
    bounds: Mapping[str, float] | None = None,
    seed: int = 0,
    sample: Callable[[np.random.Generator], np.ndarray] | None = None,
    start: Sequence[Sequence[int]] | np.ndarray = (),
    on_generation: Callable[[dict[str, Any]], None] | None = None,
    resume: Mapping[str, Any] | None = None,
) -> Front:
    """Evolve genomes to the front of predicted accuracy over planned memory, within a budget.

    The same arguments give the same result, in as many calls as it is interrupted.

    Args:
        cardinalities: values that each gene takes.
        canonical: (G,) -> (G,): the one genome of all that mean the same network.
        predict: (n, G) -> n accuracies, finite; higher is better.
        plan: (n, G) -> n records, None for what cannot be planned. Called once for a genome, with at most
            `EvolveOptions.population` of them.
        budget_bytes: that planned memory may not exceed.
        bounds: by name of `BOUNDABLE`, what may not be exceeded either.
        sample: draws a random genome (G,), for the first generation and for the genes that mutate; None: each gene
            evenly from its values.
        start: genomes of the first generation; random ones fill it up. Put the smallest network in it.
        on_generation: told the state after each generation, plain data that goes through JSON unchanged.
        resume: such a state, from which to go on. `predict` must be the same function.

    Raises:
        BudgetError: nothing planned is within the budget; `least_bytes` is the least memory seen.
        InputError: the bounds alone exclude everything, or pymoo is missing.
        RunError: `resume` is of other settings; the message lists the differences.
        ValueError: genomes, records or accuracies of a wrong form; a bound that is unknown.
    """
    run = Generations(
        cardinalities,
        canonical,
        predict,
        plan,
        {"memory_bytes": float(budget_bytes), **{name: float(value) for name, value in (bounds or {}).items()}},
        options or EvolveOptions(),
        seed,
        sample,
    )
    if resume is None:
        run.begin(start)
        if on_generation:
            on_generation(run.state())
    else:
        run.restore(resume)
    while not (reason := run.ended()):
        run.step()
        if on_generation:
            on_generation(run.state())
    violations = run.violations()
    if not (violations == 0).any():
        raise _nothing_within(run)
    everything = [run.archive[int(place)] for place in np.flatnonzero(np.isfinite(violations))]
    return Front(
        tuple(sorted((run.archive[place] for place in run.best), key=_by_memory)),
        tuple(sorted(everything, key=_by_memory)),
        run.generation,
        reason,
    )


def _nothing_within(run: Generations) -> InputError:
    """What to say where nothing that was planned is within the limits."""
    memory = run.archive.memory()
    if np.isinf(memory).all():
        return InputError("no sub-network of the space can be planned: give another space")
    bounds = {name: value for name, value in run.limits.items() if name != "memory_bytes"}
    within = memory[run.archive.violations(bounds) == 0]
    if within.size:
        least, budget = int(within.min()), int(run.limits["memory_bytes"])
        others = ", of those within the other bounds," if bounds else ""
        return BudgetError(
            f"a memory budget of {budget:,} bytes is below every sub-network that was planned: the least{others} takes "
            f"{least:,} bytes: give that or more, or a space with smaller ones",
            least,
        )
    told = [f"{name} {value:g} (the least planned: {run.archive.least(name):g})" for name, value in bounds.items()]
    return InputError(f"no sub-network that was planned is within {', '.join(told)}: give wider bounds")


def _by_memory(candidate: Candidate) -> tuple[Any, ...]:
    return candidate.planned.memory_bytes, candidate.accuracy, candidate.genome
