"""Evolution against brute force, through kills, and where nothing fits."""

from __future__ import annotations

import builtins
import itertools
import json
from typing import Any

import numpy as np
import pytest

from tinytl.errors import BudgetError, InputError, RunError
from tinytl.search.archive import Planned
from tinytl.search.evolve import EvolveOptions, Front, evolve
from tinytl.search.screen import MemoryScreen

pytest.importorskip("pymoo", reason="pip install -e '.[search]'")

CARDINALITIES = (3, 3, 2, 4, 3, 2, 3, 3)
SMALL = EvolveOptions(population=40, generations=12)


class Problem:
    """2,106 sub-networks whose accuracy and memory are known: neither is a sum over the genes."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.gains = [rng.normal(size=count) for count in CARDINALITIES]
        self.sizes = [np.sort(rng.random(count)) for count in CARDINALITIES]
        self.planned: list[tuple[int, ...]] = []
        self.asked: list[int] = []

    def canonical(self, genome: np.ndarray) -> np.ndarray:
        """Gene 2 is a block: where it is 0, its kernel and width (3, 4) mean nothing."""
        found = genome.copy()
        if found[2] == 0:
            found[3:5] = 0
        return found

    def predict(self, genomes: np.ndarray) -> np.ndarray:
        total = np.sum([gain[genomes[:, at]] for at, gain in enumerate(self.gains)], axis=0)
        return total + 0.3 * self.gains[0][genomes[:, 0]] * self.gains[1][genomes[:, 1]]

    def plan(self, genomes: np.ndarray) -> list[Planned | None]:
        self.planned += [tuple(genome) for genome in genomes.tolist()]
        self.asked.append(len(genomes))
        total = 1 + np.sum([size[genomes[:, at]] for at, size in enumerate(self.sizes)], axis=0)
        memory = (1e6 * total * (1 + 0.2 * genomes[:, 0])).astype(int).tolist()
        return [Planned(value, multiply_adds=int(genome.sum())) for value, genome in zip(memory, genomes, strict=True)]

    def all(self) -> np.ndarray:
        every = itertools.product(*(range(count) for count in CARDINALITIES))
        return np.array(sorted({tuple(self.canonical(np.array(genome))) for genome in every}))

    def exact_front(self, budget: float, most_multiply_adds: float = np.inf) -> set[tuple[int, ...]]:
        genomes = self.all()
        records = [record for record in Problem.plan(self, genomes) if record]
        self.planned, self.asked = [], []
        memory = np.array([record.memory_bytes for record in records])
        accuracy = self.predict(genomes)
        front, best = set(), -np.inf
        for place in np.lexsort((-accuracy, memory)):
            fits = memory[place] <= budget and genomes[place].sum() <= most_multiply_adds
            if fits and accuracy[place] > best:
                best = accuracy[place]
                front.add(tuple(genomes[place].tolist()))
        return front

    def evolve(self, budget: float, options: EvolveOptions = SMALL, **more: Any) -> Front:
        return evolve(CARDINALITIES, self.canonical, self.predict, self.plan, budget, options=options, **more)


BUDGET = 5.0e6


@pytest.mark.parametrize("seed", range(3))
def test_the_front_is_that_of_brute_force(seed: int) -> None:
    problem = Problem(seed)
    exact = problem.exact_front(BUDGET)
    front = problem.evolve(BUDGET, EvolveOptions(population=60, generations=30, screen=False), seed=seed)
    found = {candidate.genome for candidate in front.candidates}
    assert len(exact) >= 5
    assert len(exact & found) >= 0.8 * len(exact)
    best = max(problem.predict(np.array(sorted(exact))))
    assert front.best.accuracy == pytest.approx(best)


def test_what_is_returned_was_planned_once_and_keeps_the_budget() -> None:
    problem = Problem()
    front = problem.evolve(BUDGET)
    assert len(set(problem.planned)) == len(problem.planned) == len(front.planned)
    assert {candidate.genome for candidate in front.planned} == set(problem.planned)
    assert max(problem.asked) <= SMALL.population
    memory = [candidate.planned.memory_bytes for candidate in front.candidates]
    accuracy = [candidate.accuracy for candidate in front.candidates]
    assert memory == sorted(memory)
    assert accuracy == sorted(accuracy)
    assert memory[-1] <= BUDGET < max(candidate.planned.memory_bytes for candidate in front.planned)
    fresh = Problem()
    for candidate in front.candidates:
        genome = np.array([candidate.genome])
        assert fresh.plan(genome) == [candidate.planned]
        assert fresh.predict(genome)[0] == pytest.approx(candidate.accuracy)
        assert tuple(fresh.canonical(genome[0])) == candidate.genome


@pytest.mark.parametrize("budget", [BUDGET, 1e9], ids=["by budget and dominance", "by dominance"])
def test_screening_spares_the_planner_and_not_the_front(budget: float) -> None:
    with_screen, without = Problem(), Problem()
    options = EvolveOptions(population=60, generations=15)
    screened = with_screen.evolve(budget, options)
    plain = without.evolve(budget, EvolveOptions(population=60, generations=15, screen=False))
    assert len(with_screen.planned) < 0.5 * len(without.planned)
    assert screened.best.accuracy >= plain.best.accuracy - 1e-9


def test_a_guess_at_memory_is_careful() -> None:
    """Of genomes that it has not seen, few take less than it says; and it tells large from small."""
    problem = Problem()
    genomes = np.random.default_rng(0).permutation(problem.all())
    memory = np.array([record.memory_bytes for record in problem.plan(genomes) if record], float)
    screen = MemoryScreen.fit(genomes[:150], memory[:150], CARDINALITIES)
    assert screen is not None
    least = screen.least_bytes(genomes[150:])
    assert np.mean(least > memory[150:]) < 0.04
    assert np.corrcoef(least, memory[150:])[0, 1] > 0.95
    assert MemoryScreen.fit(genomes[:20], memory[:20], CARDINALITIES) is None


@pytest.mark.parametrize("killed_after", [0, 1, 5])
def test_a_killed_search_ends_in_the_same_bits(killed_after: int) -> None:
    whole = Problem().evolve(BUDGET, seed=7)
    states: list[str] = []

    class KilledError(Exception):
        pass

    def on_generation(state: dict[str, Any]) -> None:
        states.append(json.dumps(state))
        if len(states) == killed_after + 1:
            raise KilledError

    with pytest.raises(KilledError):
        Problem().evolve(BUDGET, seed=7, on_generation=on_generation)
    rest = Problem()
    resumed = rest.evolve(BUDGET, seed=7, resume=json.loads(states[-1]))
    assert (resumed.candidates, resumed.planned) == (whole.candidates, whole.planned)
    assert (resumed.generations, resumed.reason) == (whole.generations, whole.reason)
    before = {tuple(genome) for genome in json.loads(states[-1])["archive"]["genomes"]}
    assert not before & set(rest.planned)


def test_equal_seeds_are_equal_searches() -> None:
    one, same, other = (Problem().evolve(BUDGET, seed=seed) for seed in (3, 3, 4))
    assert one.planned == same.planned
    assert one.planned != other.planned


def test_other_settings_are_refused_and_listed() -> None:
    states: list[dict[str, Any]] = []
    Problem().evolve(BUDGET, EvolveOptions(population=40, generations=1), on_generation=states.append)
    with pytest.raises(RunError, match=r"limits.memory_bytes is 4000000.0, was 5000000.0; seed is 9, was 0") as caught:
        Problem().evolve(4e6, seed=9, resume=states[-1])
    assert "\n" not in str(caught.value)
    more = Problem().evolve(BUDGET, EvolveOptions(population=40, generations=2), resume=states[-1])
    assert more.generations == 2  # going on for longer is no other search


def test_a_budget_below_everything_names_the_least() -> None:
    problem = Problem()
    least = min(record.memory_bytes for record in problem.plan(problem.all()) if record)
    with pytest.raises(BudgetError, match="memory budget of 100,000 bytes is below") as caught:
        problem.evolve(1e5, EvolveOptions(population=60, generations=40))
    assert caught.value.least_bytes == least  # constraint violation drives there
    assert f"{least:,} bytes" in str(caught.value)


def test_bounds_hold_and_may_exclude_everything() -> None:
    problem = Problem()
    exact = problem.exact_front(BUDGET, 8)
    options = EvolveOptions(population=60, generations=30, screen=False)
    front = problem.evolve(BUDGET, options, bounds={"multiply_adds": 8})
    assert all((candidate.planned.multiply_adds or 0) <= 8 for candidate in front.candidates)
    assert len(exact & {candidate.genome for candidate in front.candidates}) >= 0.8 * len(exact)
    with pytest.raises(InputError, match=r"within multiply_adds -1 \(the least planned: 0\)"):
        problem.evolve(BUDGET, SMALL, bounds={"multiply_adds": -1})
    with pytest.raises(BudgetError, match="of those within the other bounds"):
        problem.evolve(1e5, SMALL, bounds={"multiply_adds": 8})
    with pytest.raises(ValueError, match="unknown bounds"):
        problem.evolve(BUDGET, SMALL, bounds={"watts": 1})
    with pytest.raises(ValueError, match="step_seconds is bounded"):
        problem.evolve(BUDGET, SMALL, bounds={"step_seconds": 1})


def test_a_space_that_is_used_up_ends_the_search() -> None:
    cardinalities = (2, 3, 2)
    calls: list[int] = []

    def plan(genomes: np.ndarray) -> list[Planned | None]:
        calls.append(len(genomes))
        return [Planned(int(10 + genome.sum())) for genome in genomes]

    def predict(genomes: np.ndarray) -> np.ndarray:
        return genomes.sum(1).astype(float)

    front = evolve(cardinalities, np.copy, predict, plan, 13, options=EvolveOptions(population=8))
    assert front.reason == "exhausted"
    assert sum(calls) == len(front.planned) == 12
    assert {sum(candidate.genome) for candidate in front.candidates} == {0, 1, 2, 3}


def test_it_ends_when_the_front_stays() -> None:
    options = EvolveOptions(population=40, generations=500, patience=5)
    assert Problem().evolve(BUDGET, options).reason == "patience"
    assert Problem().evolve(BUDGET, EvolveOptions(population=40, generations=3)).reason == "generations"


def test_what_cannot_be_planned_is_no_candidate() -> None:
    class Picky(Problem):
        def plan(self, genomes: np.ndarray) -> list[Planned | None]:
            records = super().plan(genomes)
            return [None if genome[1] == 2 else record for genome, record in zip(genomes, records, strict=True)]

    front = Picky().evolve(BUDGET)
    assert all(candidate.genome[1] != 2 for candidate in front.planned)

    class Hopeless(Problem):
        def plan(self, genomes: np.ndarray) -> list[Planned | None]:
            return [None] * len(genomes)

    with pytest.raises(InputError, match="can be planned"):
        Hopeless().evolve(BUDGET, EvolveOptions(population=8, generations=2))


def test_the_start_is_planned_and_samples_are_asked_for() -> None:
    problem, drawn = Problem(), []

    def sample(rng: np.random.Generator) -> np.ndarray:
        drawn.append(genome := rng.integers(0, CARDINALITIES))
        return genome

    start = [(2, 2, 1, 3, 2, 1, 2, 2), (0,) * 8]
    problem.evolve(BUDGET, EvolveOptions(population=10, generations=1), start=start, sample=sample)
    assert problem.planned[:2] == start
    assert tuple(problem.canonical(drawn[0])) == problem.planned[2]


def test_wrong_forms_are_bugs() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="not of the cardinalities"):
        problem.evolve(BUDGET, start=[(3, 0, 0, 0, 0, 0, 0, 0)])
    problem.plan = lambda genomes: []
    with pytest.raises(ValueError, match="0 records for 40 genomes"):
        problem.evolve(BUDGET)
    problem.predict = lambda genomes: np.full(len(genomes), np.nan)
    with pytest.raises(ValueError, match="finite accuracies"):
        problem.evolve(BUDGET)


@pytest.mark.parametrize(
    "knob", [{"population": 3}, {"generations": -1}, {"patience": 0}, {"parent_share": 0.0}, {"mutation_share": 1.5}]
)
def test_knobs_out_of_range(knob: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(knob))):
        EvolveOptions(**knob)


def test_without_pymoo_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "pymoo":
            raise ModuleNotFoundError("No module named 'pymoo'", name="pymoo")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pymoo is missing: pip install 'tinytl\[search\]'"):
        Problem().evolve(BUDGET)
