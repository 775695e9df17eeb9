"""What a search finds, over data sets and seeds: `python -m benchmarks.search NAME=FOLDER ... --weights FILE`.

For each data set and seed: a search in the space of a real network, then the winner, the default network of that size
and random networks of the winner's planned memory are each trained on all training photographs and measured on those
that no choice saw. The default is TinyTL-L+B of the full network, or TinyTL-B where that fits at no
resolution, at the highest resolution that fits the same budget (5.1 MB: TinyTL-B of mcunet_5fps at 80 px).
The random ones are the first of the space, drawn as the search draws, whose planned memory is within 10 % of the
winner's and within the budget: so what the winner has before them is not memory.

Each finished part is kept in runs/search and not made again, so the benchmark can be cut and goes on. Writes
benchmarks/results/search.json, docs/benchmarks/search.md and its pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinytl._threads import threads
from tinytl.memory.measured import adam, measure_training_step
from tinytl.memory.step import StepSpec, build_batch, build_network
from tinytl.run import train
from tinytl.search.begin import conditions_of
from tinytl.search.planned import cost_of
from tinytl.search.records import key_of
from tinytl.search.run import run_spec, search
from tinytl.search.shown import FRONT, NETWORK, PREDICTED, draw, record
from tinytl.search.space import Choice, Space
from tinytl.search.spec import SearchOptions, SearchSpec
from tinytl.search.workers import end_with
from tinytl.spec import RunOptions

from . import readme
from .machine import describe
from .search_page import PAGE, PICTURES, page
from .search_space import paper_setting

RESULTS, RUNS = Path("benchmarks/results/search.json"), Path("runs/search")
SEEDS = (0, 1, 2)
RANDOM = 3
NEAR = 0.1  # of the winner's planned memory: how far a random network's may be from it
DRAWS = 2_000
THREADS = 1
EPOCHS = 5


@dataclass(frozen=True)
class Cell:
    """One data set and seed.

    Attributes:
        name, photos: of the data set.
        space, weights: where the networks come from.
        budget: planned memory.
        resolutions: to choose from.
        seed: of everything.
    """

    name: str
    photos: str
    space: str
    weights: str | None
    budget: str
    resolutions: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where its runs are kept."""
        return RUNS / f"{self.name}-{self.budget}-{self.seed}"

    def spec(self) -> SearchSpec:
        """What is asked of the search."""
        return SearchSpec(
            self.photos,
            self.space,
            self.budget,
            self.resolutions,
            weights=self.weights,
            min_scale=0.5,
            flip=False,
            tune_epochs=10,
            pairs=160,
            population=40,
            generations=8,
            finalists=6,
            finalist_epochs=4,
            epochs=0,
            lr=1e-3,
            seed=self.seed,
        )


def measure(cell: Cell) -> dict[str, Any]:
    """Search and train, or read what an earlier call found."""
    done = cell.folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    spec = cell.spec()
    begun = (cell.folder / "search.json").exists()
    result = search(spec, cell.folder, options=SearchOptions(threads=THREADS), resume=begun)
    draw(result, spec.budget_bytes)
    best = result.finalists[0]
    default = next(finalist for finalist in result.finalists if finalist.default)
    classes = len(json.loads((cell.folder / "search.json").read_text())["classes"])
    with threads(THREADS):  # as the search planned: a plan depends on how many threads compute
        random = random_like(
            result.space,
            lambda choice: cost_of(choice, conditions_of(spec, classes)).memory_bytes,
            best.cost.memory_bytes,
            spec.budget_bytes,
            seed=cell.seed,
            leave_out={best.genome, default.genome},
        )
    trained = [_trained(cell, spec, "winner", result.choice, best.cost.memory_bytes)]
    trained.append(
        _trained(cell, spec, "default", result.space.choice(np.array(default.genome)), default.cost.memory_bytes)
    )
    for at, (choice, planned) in enumerate(random):
        trained.append(_trained(cell, spec, f"random-{at}", choice, planned))
    found = {
        "data": cell.name,
        "seed": cell.seed,
        "space": cell.space,
        "budget_bytes": spec.budget_bytes,
        "finalists": spec.finalists,
        "finalist_epochs": spec.finalist_epochs,
        "search": record(result),
        "measured_bytes": _measured_bytes(result.choice, classes),
        "random_near": NEAR,
        "trained": trained,
    }
    done.write_text(json.dumps(found))
    return found


def random_like(
    space: Space,
    planned: Callable[[Choice], int],
    target_bytes: int,
    budget_bytes: int,
    *,
    seed: int,
    leave_out: Collection[tuple[int, ...]] = (),
    count: int = RANDOM,
    draws: int = DRAWS,
) -> list[tuple[Choice, int]]:
    """Draw sub-networks as the search draws them; the first ``count`` of about ``target_bytes``, and their bytes.

    Args:
        space: to draw from.
        planned: the planned bytes of a choice.
        target_bytes: within `NEAR` of which they are.
        budget_bytes: that they do not exceed.
        seed: of the draws.
        leave_out: genomes that are not taken.
        count: how many.
        draws: at most.

    Raises:
        ValueError: so many draws did not hold so many networks.
    """
    rng = np.random.default_rng((seed, 9))  # not the numbers that the search itself drew from (3, 5)
    seen, found, nearest = set(leave_out), list[tuple[Choice, int]](), None
    for _ in range(draws):
        genome = space.sample(rng)
        if key_of(genome) in seen:
            continue
        seen.add(key_of(genome))
        choice = space.choice(genome)
        memory = planned(choice)
        if abs(memory - target_bytes) <= NEAR * target_bytes and memory <= budget_bytes:
            found.append((choice, memory))
            if len(found) == count:
                return found
        elif nearest is None or abs(memory - target_bytes) < abs(nearest - target_bytes):
            nearest = memory
    raise ValueError(
        f"{draws} random networks, and {len(found)} of them within {NEAR:.0%} of {target_bytes:,} planned bytes and "
        f"within the budget of {budget_bytes:,}: {count} were wanted"
        + ("" if nearest is None else f"; the nearest of the others takes {nearest:,}")
    )


def _trained(cell: Cell, spec: SearchSpec, kind: str, choice: Choice, planned: int) -> dict[str, Any]:
    """A network after full training, on the photographs that no choice saw."""
    out = cell.folder / kind
    asked = run_spec(spec, choice, spec.weights, epochs=EPOCHS)
    result = train(asked, out, options=RunOptions(threads=THREADS, workers=1), resume=(out / "run.json").exists())
    e = result.evaluation
    shutil.copy(out / "delta.safetensors", cell.folder / f"{kind}.delta")
    return {
        "kind": kind.partition("-")[0],
        **choice.to_json(),
        "planned_bytes": planned,
        "top1": e.top1,
        "images": e.images,
        "seconds": result.fit.seconds,
    }


def _measured_bytes(choice: Choice, classes: int) -> int:
    """The most bytes alive in a step of the winner, as the allocator tells: what the plan promised."""
    spec = StepSpec(choice.backbone, choice.method, resolution=choice.resolution, classes=classes, threads=THREADS)
    model, _ = build_network(spec)
    images, labels = build_batch(spec, torch.channels_last)
    return measure_training_step(model, images, labels, adam(model), repeats=0).peak_bytes


def main() -> None:
    """Measure what is missing, write the JSON, the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", help="NAME=FOLDER of photographs")
    parser.add_argument("--space", default="mcunet_5fps")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--budgets", default="5.1MB,10MB", help="planned memory, one after the other")
    parser.add_argument("--resolutions", default="48,64,80,96")
    parser.add_argument("--processes", type=int, default=1, help="data sets and seeds side by side, a thread each")
    parser.add_argument("--page-only", action="store_true", help="write the page from the committed JSON")
    options = parser.parse_args()
    if not options.page_only:
        pairs = [text.partition("=") for text in options.sets]
        cells = [
            Cell(name, folder, options.space, options.weights, budget, options.resolutions, seed)
            for budget in options.budgets.split(",")
            for seed in SEEDS
            for name, _, folder in pairs
        ]
        begin = {"mp_context": get_context("spawn"), "initializer": end_with, "initargs": (os.getpid(),)}
        with ProcessPoolExecutor(options.processes, **begin) as pool:
            found = list(pool.map(measure, cells))
        results = {"machine": describe(), "epochs": EPOCHS, "cells": found, "paper": paper_setting()}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        for cell in cells:
            shown = cell.seed == SEEDS[0] and cell.budget == cells[0].budget
            for picture in (FRONT, PREDICTED, NETWORK) if shown else ():
                shutil.copy(cell.folder / picture, PICTURES / f"search_{cell.name}_{picture}")
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(page(results))
    readme.refresh()
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
