"""One training step of every backbone, lean beside stock: `python -m benchmarks.backbones`.

Each at its own resolution, batch 8, 102 classes. What is kept for backward is stated by the operations' rules and
observed by autograd's hooks, and the two have to be equal. Times are taken in turns as in `benchmarks.steps`, against
stock's faster memory layout. Writes benchmarks/results/backbones.json and docs/benchmarks/backbones.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.observed import observe_kept
from tinytl.backbones import BACKBONES
from tinytl.backbones.once_for_all import SPACES
from tinytl.memory import StepSpec, kept
from tinytl.memory.profile import LAYOUTS, candidate, in_turns
from tinytl.memory.step import as_input, build_batch, build_network
from tinytl.report import Column, markdown

from .machine import describe, sentence
from .turns import ratio_columns, ratios

RESULTS, PAGE = Path("benchmarks/results/backbones.json"), Path("docs/benchmarks/backbones.md")
METHODS = ("tinytl-b", "tinytl-l+b")


def observed(spec: StepSpec) -> int:
    """Bytes of the distinct storages that autograd is seen to keep in one forward pass, parameters left out."""
    model, _ = build_network(spec)
    images = as_input(build_batch(spec, torch.contiguous_format)[0])
    return observe_kept(lambda: model(images), [*model.parameters(), *model.buffers()])[0]


def row(spec: StepSpec, turns: int) -> dict[str, Any]:
    """Bytes and time of one backbone and method."""
    stock_spec = StepSpec(**{**asdict(spec), "lean": False})
    rule = kept(build_network(spec)[0], spec.shape(spec.batch_size)).total_bytes
    lean = candidate(spec, "channels-last")
    stock = [candidate(stock_spec, layout) for layout in LAYOUTS]
    mine, *others = in_turns([lean, *stock], turns)
    best = min(others, key=statistics.median)
    return {
        "backbone": spec.backbone,
        "method": spec.method,
        "resolution": spec.resolution,
        "kept": rule,
        "observed": observed(spec),
        "stock_kept": observed(stock_spec),
        "step_peak": lean.measured.step_peak_bytes,
        "stock_step_peak": min(c.measured.step_peak_bytes for c in stock),
        "lean_seconds": statistics.median(mine),
        "stock_seconds": statistics.median(best),
        **ratios(mine, best),
    }


def page(results: dict[str, Any]) -> str:
    """The documentation page of the committed results."""
    columns = [
        Column("backbone", "backbone"),
        Column("method", "method"),
        Column("resolution", "px"),
        Column("kept", "kept, by rule", "MB", 2),
        Column("observed", "kept, observed", "MB", 2),
        Column("stock_kept", "stock keeps", "MB", 1),
        Column("step_peak", "step adds", "MB", 1),
        Column("stock_step_peak", "stock: step adds", "MB", 1),
        Column("lean_seconds", "lean", "ms", 0),
        Column("stock_seconds", "stock", "ms", 0),
        *ratio_columns("lean / stock"),
    ]
    return (
        "# Every backbone, one training step\n\n"
        "Made by `python -m benchmarks.backbones`; do not edit. Batch 8, 102 classes, batch norm with frozen "
        f"statistics (where there is any), on {sentence(results['machine'])}. Medians over {results['turns']} turns; "
        "ratios turn by turn, against stock's faster memory layout. What the columns say is in "
        "[measuring](../measuring.md).\n\n" + markdown(results["rows"], columns)
    )


def main() -> None:
    """Measure every backbone in a process of its own, write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--only", help="one backbone: print its rows as JSON and write nothing")
    parser.add_argument("--page-only", action="store_true", help="write the page from the committed JSON")
    options = parser.parse_args()
    if options.only:
        resolution = BACKBONES[options.only].preprocessing.resolution
        specs = [StepSpec(options.only, name, resolution=resolution) for name in METHODS]
        print(json.dumps([row(spec, options.turns) for spec in specs]))
        return
    if not options.page_only:
        rows: list[dict[str, Any]] = []
        for name in (name for name in BACKBONES if name not in SPACES):  # a space is many networks
            command = [sys.executable, "-m", "benchmarks.backbones", "--only", name, "--turns", str(options.turns)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows += json.loads(done.stdout.splitlines()[-1])
            print(rows[-2:], flush=True)
        results = {"machine": describe(), "turns": options.turns, "rows": rows}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
