"""Budgets from the least that does to stock PyTorch's appetite: `python -m benchmarks.budgets`.

For each method and a row of budgets between the two: what the planner chose, how long it took, the peak that it
promised, the peak that was measured, and the time of a step, all of a method's budgets and stock taken in turns.
ProxylessNAS-Mobile, 224 px, 102 classes, batch 8. Writes benchmarks/results/budgets.json, docs/benchmarks/budgets.md
and the picture beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinytl.errors import BudgetError
from tinytl.memory import StepSpec, measure_step, resident_tensors
from tinytl.memory.measured import training_step
from tinytl.memory.planner import Planned
from tinytl.memory.profile import Candidate, candidate, in_turns, plan_network, stock_layouts
from tinytl.memory.step import build_batch, build_network, build_optimizer
from tinytl.nn.execution import set_execution_
from tinytl.report import Column, markdown

from .machine import describe, sentence
from .turns import ratio_columns, ratios

RESULTS, PAGE = Path("benchmarks/results/budgets.json"), Path("docs/benchmarks/budgets.md")
PICTURE = PAGE.with_suffix(".png")
BASE = StepSpec("proxylessnas_mobile", "tinytl-l+b")
SERIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FT-Full", {"method": "ft-full"}),
    ("FT-Norm+Last", {"method": "ft-norm+last"}),
    ("TinyTL-L+B, group norm", {"norm": "gn"}),
    ("TinyTL-L+B", {}),
    ("TinyTL-L+B, 8-bit frozen weights and optimizer state", {"frozen_bits": 8, "optimizer_bits": 8}),
    ("TinyTL-B, 8-bit frozen weights", {"method": "tinytl-b", "frozen_bits": 8}),
)
STEPS = (0.0, 0.05, 0.15, 0.3, 0.5, 0.75, 1.0)  # of the way from the least to what the fastest plan takes


def least(spec: StepSpec) -> int:
    """The smallest budget that a plan fits: the refusal of a budget of one byte knows it."""
    try:
        plan_network(replace(spec, memory_budget=1), *build_network(spec))
    except BudgetError as refusal:
        return refusal.least_bytes
    raise AssertionError("a budget of one byte was accepted")


def ready(name: str, spec: StepSpec) -> tuple[Planned, float, Candidate]:
    """The plan of a budget, the seconds that it took, and the step that it makes, measured once."""
    model, adaptation = build_network(spec)
    begun = time.perf_counter()
    planned = plan_network(spec, model, adaptation)
    seconds = time.perf_counter() - begun
    set_execution_(model, planned.plan.policies)
    images, labels = build_batch(spec, torch.channels_last)
    optimizer = build_optimizer(spec, model.parameters())
    step = training_step(model, images, labels, optimizer, planned.plan.micro_batch, update=planned.plan.update)
    step()
    measured = measure_step(step, resident_tensors(model, optimizer, images, labels))
    return planned, seconds, Candidate(name, step, measured)


def series(name: str, spec: StepSpec, turns: int, steps: Sequence[float]) -> list[dict[str, Any]]:
    """One method: a row for each budget, and one for stock."""
    low = least(spec)
    high = plan_network(spec, *build_network(spec)).peak_bytes
    budgets = [low + int((high - low) * step) for step in steps]
    found = [ready(name, replace(spec, memory_budget=budget)) for budget in budgets]
    plain = replace(spec, lean=False, frozen_bits=32, optimizer_bits=32)
    stock = [candidate(plain, layout) for layout in stock_layouts(plain)]
    seconds = in_turns([*(entry[2] for entry in found), *stock], turns)
    best = min(seconds[len(found) :], key=statistics.median)
    rows = []
    for budget, (planned, took, entry), mine in zip(budgets, found, seconds, strict=False):
        rows.append(
            {
                "series": name,
                "budget": budget,
                "planned": planned.peak_bytes,
                "measured": entry.measured.peak_bytes,
                "kept": entry.measured.peak_bytes <= budget,
                "planning_seconds": took,
                "plan": "; ".join(planned.plan.lines(spec.batch_size)),
                "seconds": statistics.median(mine),
                **ratios(mine, best),
            }
        )
    peak = min(entry.measured.peak_bytes for entry in stock)
    rows.append({"series": f"{name}: stock PyTorch", "measured": peak, "seconds": statistics.median(best)})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds a step over budget, a line a method; stock at its own peak."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, _) in enumerate(SERIES):
        mine = [row for row in rows if row["series"] == name]
        if not mine:
            continue
        colour = f"C{number}"
        budgets, seconds = [row["budget"] / 1e6 for row in mine], [row["seconds"] for row in mine]
        axes.plot(budgets, seconds, "o-", color=colour, label=name)
        stock = next(row for row in rows if row["series"] == f"{name}: stock PyTorch")
        axes.plot(stock["measured"] / 1e6, stock["seconds"], "x", color=colour, markersize=9)
    axes.set_xscale("log")
    axes.set_xlabel("memory budget, MB, everything included (x: stock PyTorch at what it takes)")
    axes.set_ylabel("seconds a step of 8 images")
    ticks = (10, 20, 30, 50, 100, 200, 300, 500)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def page(results: dict[str, Any]) -> str:
    """The documentation page of the committed results."""
    columns = [
        Column("series", "method"),
        Column("budget", "budget", "MB", 2),
        Column("planned", "planned", "MB", 2),
        Column("measured", "measured", "MB", 2),
        Column("planning_seconds", "planning took", "ms", 0),
        Column("seconds", "step", "ms", 0),
        *ratio_columns("/ stock"),
        Column("plan", "plan"),
    ]
    rows = [{**dict.fromkeys(column.key for column in columns), **row} for row in results["rows"]]
    return (
        "# Budgets swept\n\n"
        "ProxylessNAS-Mobile, 224 px, 102 classes, batch 8. Budgets run from the least that any plan fits to what the\n"
        "fastest plan takes; everything alive is in them: weights, gradients, optimizer state, what is kept, the\n"
        "working set, the images. 8 bits are approximate, all else is exact. Times are taken in turns with stock\n"
        "PyTorch of the same method at 32 bits, in the faster of its memory layouts.\n\n"
        f"{sentence(results['machine'])}. Made by `python -m benchmarks.budgets`.\n\n"
        f"![Seconds a step over memory budget]({PICTURE.name})\n\n"
        f"{markdown(rows, columns)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each")
    parser.add_argument("--quick", action="store_true", help="two methods at 64 px, nothing written")
    arguments = parser.parse_args()
    base, chosen, steps = BASE, SERIES, STEPS
    if arguments.quick:
        base, chosen, steps = replace(BASE, resolution=64, batch_size=4), SERIES[3:5], STEPS[::3]
    rows: list[dict[str, Any]] = []
    for name, options in chosen:
        mine = series(name, replace(base, **options), arguments.turns, steps)
        for row in mine:
            print(json.dumps(row), flush=True)
        rows += mine
    if not all(row.get("kept", True) for row in rows):
        raise SystemExit("a budget was not kept")
    if arguments.quick:
        return
    results = {"machine": describe(), "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(rows, PICTURE)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
