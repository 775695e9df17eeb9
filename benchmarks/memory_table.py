"""The paper's table of memory beside ours, and what group norm's bytes are for: `python -m benchmarks.memory_table`.

ProxylessNAS-Mobile, 224 px, 102 classes, batch 8, both norms; the paper's rule on every backbone and method. Bytes
only, no times: they are exact, so every step is taken once. Writes benchmarks/results/memory_table.json and
docs/memory-table.md (the words are in `benchmarks.memory_page`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinytl._threads import threads
from tinytl.backbones import BACKBONES
from tinytl.memory.by_role import STACK, live_by_role
from tinytl.memory.counted import Counted
from tinytl.memory.description import StepDescription
from tinytl.memory.plan import StepPlan
from tinytl.memory.step import StepSpec
from tinytl.memory.table import (
    REFERENCE_MB,
    counted_as_published,
    counted_by_itself,
    row_name,
    table_row,
    table_steps,
)

from .machine import describe
from .memory_page import page

RESULTS, PAGE = Path("benchmarks/results/memory_table.json"), Path("docs/memory-table.md")
BASE = StepSpec("proxylessnas_mobile", "tinytl-l+b", threads=1)
OURS: dict[str, Callable[[StepSpec], Counted]] = {  # for each of the authors' figures of a row
    "batch 8": counted_as_published,
    "batch 1": lambda step: counted_as_published(replace(step, micro_batch=1)),
    "batch 8, no lite modules": counted_by_itself,
}
OF_TRAINING = ("gradient", "optimizer state")
ACTIVATIONS = ("kept", "working", "workspace")
# What is compared in the section on group norm; the budgets are this project's targets.
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"norm": "gn"},
    {"norm": "gn", "micro_batch": 1},
    {"norm": "gn", "frozen_bits": 8, "memory_budget": "44MB"},
    {"norm": "gn", "frozen_bits": 8, "optimizer_bits": 8, "memory_budget": "32MB"},
    {"norm": "bn"},
    {"norm": "bn", "micro_batch": 1},
    {"norm": "bn", "frozen_bits": 8, "memory_budget": "40MB"},
    {"norm": "bn", "frozen_bits": 8, "optimizer_bits": 8, "memory_budget": "28MB"},
    {"norm": "bn", "method": "tinytl-b", "frozen_bits": 8, "memory_budget": "12MB"},
)


def tables() -> dict[str, list[dict[str, Any]]]:
    """The rows of `tinytl table` for both norms."""
    return {
        norm: [table_row(step).to_json() for step in table_steps(replace(BASE, norm=norm))] for norm in ("bn", "gn")
    }


def counts() -> Iterator[dict[str, Any]]:
    """Every backbone by the paper's rule, at the paper's resolution, one row each; bytes by method."""
    for backbone in BACKBONES:
        row: dict[str, Any] = {"backbone": backbone}
        for step in table_steps(replace(BASE, backbone=backbone), resolution=224):
            row[step.method] = counted_by_itself(step).total_bytes
        yield row


def profiler_rows() -> Iterator[dict[str, Any]]:
    """Our count beside the figures of the authors' profiler, every one that there is."""
    for backbone, figures in REFERENCE_MB.items():
        for step in table_steps(replace(BASE, backbone=backbone)):
            if row_name(step) in figures:
                about = {"backbone": backbone, "method": row_name(step)}
                for theirs, kind in zip(figures[row_name(step)], OURS, strict=True):
                    if theirs is not None:
                        yield {**about, "kind": kind, "theirs_mb": theirs, "ours": OURS[kind](step).total_bytes}


def paper_row(name: str, counted: Counted) -> dict[str, Any]:
    """The paper's count as a row of the section on group norm."""
    return {
        "name": name,
        "weights": counted.parameter_bytes,
        "activations": counted.activation_bytes,
        "counted_alike": counted.total_bytes,
    }


def configuration_row(about: dict[str, Any]) -> dict[str, Any]:
    """One configuration, planned and measured, with what is alive at the peak by what it is for."""
    row = table_row(replace(BASE, **about), stock="memory_budget" not in about)
    described, roles = row.planned.step, row.planned.step.at_peak()
    assert row.measured is not None
    return {
        "name": _name(about, row.planned.plan),
        **about,
        "plan": row.planned.plan.to_json(),
        "weights": roles["weight"] + roles["statistics"],
        "input": roles["input"],
        "gradients": roles["gradient"],
        "optimizer": roles["optimizer state"],
        "kept": roles["kept"],
        "activations": sum(roles[role] for role in ACTIVATIONS),
        "planned": row.planned.peak_bytes,
        "measured": row.measured.peak_bytes,
        "stock": None if row.stock is None else row.stock.peak_bytes,
        "without_training_state": peak_without(described, OF_TRAINING),
        "counted_alike": peak_without(described, (*OF_TRAINING, "input")),
    }


def peak_without(step: StepDescription, roles: tuple[str, ...]) -> int:
    """The most that is alive at once in a planned step when some roles are left out: the paper's kind of figure."""
    live = live_by_role(step)
    return int(np.sum([live[role] for role in STACK if role not in roles], axis=0).max())


def _name(about: dict[str, Any], plan: StepPlan) -> str:
    words = ["TinyTL-B"] if "method" in about else []
    words += [{"gn": "group norm", "bn": "batch norm"}[about["norm"]]]
    if "memory_budget" in about:
        words.append(f"budget {about['memory_budget'].replace('MB', ' MB')}")
    else:
        words.append("all 8 at once" if plan.micro_batch == 8 else f"{plan.micro_batch} at a time")
    for key, what in (("frozen_bits", "frozen weights"), ("optimizer_bits", "Adam")):
        words += [f"{what} at {about[key]} bits"] if key in about else []
    return ", ".join(words)


def measure() -> dict[str, Any]:
    """Everything that the page shows."""
    with threads(1):
        published = [
            paper_row(f"the paper's count, batch {images}", counted_as_published(replace(BASE, micro_batch=images)))
            for images in (8, 1)
        ]
        return {
            "machine": describe(),
            "tables": tables(),
            "profiler": list(profiler_rows()),
            "counted": list(counts()),
            "group_norm": [*published, *(configuration_row(about) for about in CONFIGURATIONS)],
        }


def main() -> None:
    """Measure, write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="write the page from the committed JSON")
    if not parser.parse_args().page_only:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=2) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
