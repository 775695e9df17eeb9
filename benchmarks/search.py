"""What a search finds, over data sets and seeds: `python -m benchmarks.search NAME=FOLDER ... --weights FILE`.

For each data set and seed: a search in the space of a real network, then the winner, the default network of that size
and random networks within the budget are each trained on all training photographs and measured on those that no choice
saw. The default is TinyTL-L+B of the full network, at the highest resolution that fits the same planned memory.

Each finished part is kept in runs/search and not made again, so the benchmark can be cut and goes on. Writes
benchmarks/results/search.json, docs/benchmarks/search.md and its pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinytl.memory.measured import adam, measure_training_step
from tinytl.memory.step import StepSpec, build_batch, build_network
from tinytl.run import train
from tinytl.search.run import run_spec, search
from tinytl.search.shown import FRONT, NETWORK, PREDICTED, draw, record
from tinytl.search.space import Choice
from tinytl.search.spec import SearchOptions, SearchSpec
from tinytl.spec import RunOptions

from . import readme
from .machine import describe
from .search_page import PAGE, PICTURES, page
from .search_space import paper_setting

RESULTS, RUNS = Path("benchmarks/results/search.json"), Path("runs/search")
SEEDS = (0, 1, 2)
RANDOM = 3
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
        return RUNS / f"{self.name}-{self.seed}"

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
            finalists=4,
            finalist_epochs=2,
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
    result = search(spec, cell.folder, options=SearchOptions(threads=1), resume=begun)
    draw(result, spec.budget_bytes)
    best = result.finalists[0]
    default = next(finalist for finalist in result.finalists if finalist.default)
    fitting = [pair for pair in result.pairs if pair.cost.memory_bytes <= spec.budget_bytes]
    random = [pair for pair in fitting if pair.genome not in {best.genome, default.genome}][-RANDOM:]
    trained = [_trained(cell, spec, "winner", result.choice, best.cost.memory_bytes)]
    trained.append(
        _trained(cell, spec, "default", result.space.choice(np.array(default.genome)), default.cost.memory_bytes)
    )
    for at, pair in enumerate(random):
        choice = result.space.choice(np.array(pair.genome))
        trained.append(_trained(cell, spec, f"random-{at}", choice, pair.cost.memory_bytes))
    found = {
        "data": cell.name,
        "seed": cell.seed,
        "space": cell.space,
        "budget_bytes": spec.budget_bytes,
        "search": record(result),
        "measured_bytes": _measured_bytes(
            result.choice, len(json.loads((cell.folder / "search.json").read_text())["classes"])
        ),
        "trained": trained,
    }
    done.write_text(json.dumps(found))
    return found


def _trained(cell: Cell, spec: SearchSpec, kind: str, choice: Choice, planned: int) -> dict[str, Any]:
    """A network after full training, on the photographs that no choice saw."""
    out = cell.folder / kind
    asked = run_spec(spec, choice, spec.weights, epochs=EPOCHS)
    result = train(asked, out, options=RunOptions(threads=1, workers=1), resume=(out / "run.json").exists())
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
    spec = StepSpec(choice.backbone, choice.method, resolution=choice.resolution, classes=classes, threads=1)
    model, _ = build_network(spec)
    images, labels = build_batch(spec, torch.channels_last)
    return measure_training_step(model, images, labels, adam(model), repeats=0).peak_bytes


def main() -> None:
    """Measure what is missing, write the JSON, the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", help="NAME=FOLDER of photographs")
    parser.add_argument("--space", default="mcunet_5fps")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--budget", default="10MB")
    parser.add_argument("--resolutions", default="48,64,80,96")
    parser.add_argument("--processes", type=int, default=1, help="data sets and seeds side by side, a thread each")
    parser.add_argument("--page-only", action="store_true", help="write the page from the committed JSON")
    options = parser.parse_args()
    if not options.page_only:
        pairs = [text.partition("=") for text in options.sets]
        cells = [
            Cell(name, folder, options.space, options.weights, options.budget, options.resolutions, seed)
            for seed in SEEDS
            for name, _, folder in pairs
        ]
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(measure, cells))
        results = {"machine": describe(), "epochs": EPOCHS, "cells": found, "paper": paper_setting()}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        for cell in cells:
            for picture in (FRONT, PREDICTED, NETWORK) if cell.seed == SEEDS[0] else ():
                shutil.copy(cell.folder / picture, PICTURES / f"search_{cell.name}_{picture}")
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(page(results))
    readme.refresh()
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
