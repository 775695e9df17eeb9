"""The compiled step beside stock PyTorch's: `python -m benchmarks.device`.

What `tinytl bench device` measures, as JSON and as a page of the docs: benchmarks/results/device.json and
docs/benchmarks/device.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tinytl._device_bench import device_rows
from tinytl.cli.bench import columns
from tinytl.memory import StepSpec
from tinytl.report import Column, markdown

from . import readme
from .machine import describe, sentence

RESULTS, PAGE = Path("benchmarks/results/device.json"), Path("docs/benchmarks/device.md")
BASE = StepSpec("proxylessnas_mobile", "tinytl-b", threads=2)


def by_op(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One row's operations, the longest first, each with its share of the step."""
    total = sum(entry["seconds"] for entry in row["by_op"].values())
    return [
        {"op": op, "of_step": entry["seconds"] / total, "share": None, **entry}
        for op, entry in row["by_op"].items()
        if entry["seconds"] >= 0.005 * total
    ]


def page(results: dict[str, Any]) -> str:
    """The documentation page of the committed results."""
    rows = results["rows"]
    parts = [
        "# The compiled step\n\n"
        "Made by `python -m benchmarks.device` (`make bench-device`; `tinytl bench device` shows the same on any "
        "machine); do not edit. ProxylessNAS-Mobile, 224 px, 102 classes, batch 8, Adam, on "
        f"{sentence(results['machine'])}. MB are 10^6 bytes. Process: the most that the stand-alone program has "
        "resident, everything included; from Python: `python -m tinytl.runtime train`, an epoch on photographs; stock "
        "process: Python with PyTorch taking one step. Steps are taken in turns; "
        f"ratios are medians over {results['turns']} turns, with their quartiles, against stock's faster memory "
        "layout.\n",
        markdown(rows, columns()),
        "\n## Where the time goes\n\nShare of peak: the multiply-adds of the operation over what the machine's units "
        "reach at best on operands in cache, all threads. Operations below half a percent of the step are left out.\n",
    ]
    shown = [Column("op", "operation"), Column("seconds", "a step", "ms", 2), Column("of_step", "of the step", "%", 1)]
    shown.append(Column("share", "of peak", "%", 0))
    for row in rows:
        head = f"{row['method']}, {row['norm']}, {row['frozen_bits']} frozen bits, {row['optimizer_bits']} Adam bits"
        parts += [f"\n### {head}\n\n", markdown(by_op(row), shown)]
    return "".join(parts)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=21)
    options = parser.parse_args()
    rows = device_rows(BASE, turns=options.turns, on_row=print)
    results = {"machine": describe(), "turns": options.turns, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    readme.refresh()
    print(f"written: {RESULTS}, {PAGE}")


if __name__ == "__main__":
    main()
