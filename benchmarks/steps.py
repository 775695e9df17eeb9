"""Bytes and time of one training step, lean beside stock: `python -m benchmarks.steps`.

ProxylessNAS-Mobile, 224 px, 102 classes, batch 8. Times are taken in turns, one step of each candidate after the other,
and compared turn by turn, so that a machine whose speed drifts drifts for all; what is reported is the median ratio and
the quartiles. Stock runs in both memory layouts, and the comparison is with the faster one. Writes
benchmarks/results/steps.json, docs/benchmarks/steps.md and docs/live_bytes.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinytl.memory import StepSpec, draw_timelines
from tinytl.memory.profile import LAYOUTS, candidate, in_turns, profile_step
from tinytl.report import Column, markdown

from . import readme
from .machine import describe, sentence
from .turns import ratio_columns, ratios

RESULTS, PAGE = Path("benchmarks/results/steps.json"), Path("docs/benchmarks/steps.md")
PICTURE = Path("docs/live_bytes.png")
BASE = StepSpec("proxylessnas_mobile", "tinytl-l+b")
TIMED = ("tinytl-b", "tinytl-l+b")
MEMORY = [
    ("ft-last", "bn", None),
    ("tinytl-b", "bn", None),
    ("tinytl-l", "bn", None),
    ("tinytl-l+b", "bn", None),
    ("tinytl-l+b", "bn", 1),
    ("tinytl-l+b", "gn", None),
    ("tinytl-l+b", "gn", 1),
    ("ft-norm+last", "bn", None),
    ("ft-full", "bn", None),
]


def time_rows(turns: int) -> list[dict[str, Any]]:
    """Lean over stock of the same method, and over stock FT-Full, for each timed method."""
    specs = {f"lean {name}": replace(BASE, method=name) for name in TIMED}
    specs |= {f"stock {name}": replace(BASE, method=name, lean=False) for name in (*TIMED, "ft-full")}
    names, candidates = [], []
    for name, spec in specs.items():
        for layout in ["channels-last"] if spec.lean else LAYOUTS:
            names.append((name, layout))
            candidates.append(candidate(spec, layout))
    seconds = dict(zip(names, in_turns(candidates, turns), strict=True))
    best = {
        name: min((times for (other, _), times in seconds.items() if other == name), key=statistics.median)
        for name in specs
    }
    rows = []
    for name in TIMED:
        mine = best[f"lean {name}"]
        row: dict[str, Any] = {"method": name, "lean_seconds": statistics.median(mine)}
        for key, other in (("stock", f"stock {name}"), ("full", "stock ft-full")):
            row |= {f"{key}_seconds": statistics.median(best[other]), **ratios(mine, best[other], f"{key}_")}
        rows.append(row)
    return rows


def memory_rows() -> list[dict[str, Any]]:
    """Every figure in bytes, for each method, norm and micro-batch of `MEMORY`."""
    rows = []
    for method, norm, micro in MEMORY:
        spec = replace(BASE, method=method, norm=norm, micro_batch=micro)  # pyright: ignore[reportArgumentType]
        found = profile_step(spec, compare_stock=True, repeats=0)
        assert found.stock is not None
        if spec == BASE:
            draw_timelines(
                {"stock PyTorch": found.stock.measured, "tinytl": found.lean.measured},
                PICTURE,
                title="Live bytes over one training step: ProxylessNAS-Mobile, TinyTL-L+B, 224 px, batch 8",
            )
        rows.append(
            {
                "method": method,
                "norm": norm,
                "micro_batch": micro or spec.batch_size,
                "counted": found.counted.total_bytes,
                "kept": found.kept.total_bytes,
                "gradients": found.adaptation.trained_elements * 4,
                "step_peak": found.lean.measured.step_peak_bytes,
                "peak": found.lean.measured.peak_bytes,
                "rss": found.lean.rss_delta_bytes,
                "stock_step_peak": found.stock.measured.step_peak_bytes,
                "stock_peak": found.stock.measured.peak_bytes,
                "stock_rss": found.stock.rss_delta_bytes,
            }
        )
    return rows


def page(results: dict[str, Any]) -> str:
    """The documentation page of the committed results."""
    memory = [Column("method", "method"), Column("norm", "norm"), Column("micro_batch", "images at a time")]
    for key, heading in (
        ("counted", "counted"),
        ("kept", "kept"),
        ("gradients", "gradients"),
        ("step_peak", "step adds"),
        ("stock_step_peak", "stock: step adds"),
        ("peak", "all live"),
        ("stock_peak", "stock: all live"),
        ("rss", "process grows"),
        ("stock_rss", "stock: process grows"),
    ):
        memory.append(Column(key, heading, "MB"))
    times = [Column("method", "method"), Column("lean_seconds", "lean", "ms", 0)]
    for key, heading in (("stock", "stock"), ("full", "stock FT-Full")):
        times += [Column(f"{key}_seconds", heading, "ms", 0), *ratio_columns(f"lean / {heading}", f"{key}_")]
    return (
        "# One training step\n\n"
        "Made by `python -m benchmarks.steps`; do not edit. ProxylessNAS-Mobile, 224 px, 102 classes, batch 8, "
        f"on {sentence(results['machine'])}. MB are 10^6 bytes; what each column says is in "
        "[measuring](../measuring.md).\n\n"
        "## Memory\n\n" + markdown(results["memory"], memory) + "\n## Time\n\n"
        f"Medians over {results['turns']} turns; ratios turn by turn, against stock's faster memory layout.\n\n"
        + markdown(results["time"], times)
    )


def main() -> None:
    """Measure, write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--page-only", action="store_true", help="write the page from the committed JSON")
    parser.add_argument("--time-only", action="store_true", help="time again, keep the committed bytes")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.page_only:
        times = time_rows(options.turns)
        memory = results["memory"] if options.time_only else memory_rows()
        results = {"machine": describe(), "turns": options.turns, "time": times, "memory": memory}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(results))
    readme.refresh()
    print(page(results))


if __name__ == "__main__":
    main()
