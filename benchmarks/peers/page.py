"""The results as a page with a table a network, and a picture: bytes against time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import sentence
from benchmarks.turns import ratio_columns
from tinytl.report import Column, markdown

RESULTS = Path("benchmarks/results/peers.json")
PAGE, PICTURE = Path("docs/benchmarks/peers.md"), Path("docs/benchmarks/peers.png")

# Okabe and Ito's colours; the markers repeat the difference in grey.
_STYLES = {
    "stock": ("#D55E00", "s"),
    "other": ("#6B6B6B", "D"),
    "ours": ("#0072B2", "o"),
}
_COLUMNS = [
    Column("number", "no."),
    Column("label", "contender"),
    Column("trains", "trains"),
    Column("trained_elements", "values"),
    Column("peak_bytes", "all live", "MB"),
    Column("step_peak_bytes", "step adds", "MB"),
    Column("rss_bytes", "process grows", "MB"),
    Column("rss_first_bytes", "process grows, first step", "MB"),
    Column("seconds", "step", "ms", 0),
    *ratio_columns("time / stock"),
    Column("first_seconds", "first pass", "s", 1),
    Column("error", "gradient error, worst tensor"),
    Column("whole", "gradient error, whole"),
    Column("approximate", "approximate"),
]


def numbered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that ran, each with its `number` in table and picture."""
    return [{"number": at + 1, **row} for at, row in enumerate(row for row in rows if "missing" not in row)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One network's contenders in Markdown, and a line for each that did not run."""
    told = [
        {
            **row,
            "error": f"{row['gradient_error']:.0e}",
            "whole": f"{row['whole_gradient_error']:.0e}",
            "approximate": row["approximate"] or None,
        }
        for row in numbered(rows)
    ]
    absent = "".join(f"- {row['label']}: not run. {row['missing']}.\n" for row in rows if "missing" in row)
    return markdown(told, _COLUMNS) + (f"\n{absent}" if absent else "")


def page(results: dict[str, Any]) -> str:
    """The documentation page of the committed results."""
    machine = results["machine"]
    packages = "".join(f", {name} {version}" for name, version in results["packages"].items())
    parts = [
        "# Against the others\n\n"
        f"Made by `python -m benchmarks.peers`; do not edit. One run on {sentence(machine)}{packages}. Every contender "
        "takes the same step: the same weights, one random batch with labels, Adam (32 bits, fused, where nothing else "
        f"is said), dropout off, batch norm with frozen statistics. {results['turns']} turns, in each of which every "
        "contender takes one step; ratios turn by turn, against stock PyTorch with TinyTL-L+B. Contenders in stock "
        "layers are run contiguous and channels-last, and the lower bytes and the lower time are given (torch.compile: "
        "channels-last only).\n\n"
        "![Peak of live tensor bytes against time of a step](peers.png)\n"
    ]
    for network in results["networks"]:
        setting = network["setting"]
        weights = "ImageNet weights" if setting["pretrained"] else "random weights"
        parts.append(
            f"\n## {setting['backbone']}, {weights}\n\n"
            f"{setting['resolution']} px, {setting['classes']} classes, batch {setting['batch_size']}.\n\n"
            + table(network["rows"])
        )
    return "".join(parts) + _NOTES


_NOTES = """
## What the columns say

- All live, step adds: PyTorch's allocator over one step (`measured.peak_bytes` and `measured.step_peak_bytes` of
  [measuring](../measuring.md)): weights, gradients and optimizer state are in the first, gradients in the second.
- Process grows: what one step adds to the resident set of a fresh process that took a step before and gave its free
  heap back. First step: what the very first step adds, code and thread pool included, and with torch.compile the
  compiler, which found its cache filled. Only these figures see memory that PyTorch does not allocate.
- First pass: the first forward and backward pass, which compiles where something compiles.
- Gradient error: against stock autograd in float64 of what the contender trains (the same method in stock layers; for
  LoRA, PEFT's own layers). Worst tensor: its largest difference over its largest value. Whole: all tensors as one
  vector, length of the difference over length. What rounding does is told by the rows of stock PyTorch, in float32 like
  all others: where it turns a ReLU whose input is next to 0, a small tensor moves by more than rounding. Parameters
  that would start at 0 are drawn, so that no gradient is 0 for that.
- Budget: the planner picks how the step is carried out; nothing of it is approximate.
- 8-bit Adam has exact gradients; its state is rounded, so its updates are approximate.
- memsave_torch is not compared: it is on no package index that was at hand.
"""


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw peak of live bytes (logarithmic) against the time ratio into a PNG, a panel a network.

    Points bear the numbers of the table's rows; bars are the quartiles.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    networks = results["networks"]
    figure = Figure(figsize=(10.0, 4.6 * len(networks)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, network in zip(figure.subplots(len(networks), 1, squeeze=False)[:, 0], networks, strict=True):
        rows = [row for row in numbered(network["rows"]) if row["ratio"] is not None]
        for row in rows:
            colour, marker = _STYLES[row["side"]]
            x, y = row["peak_bytes"] / 1e6, row["ratio"]
            bars = [[y - row["ratio_low"]], [row["ratio_high"] - y]]
            style = {"color": colour, "marker": marker, "linestyle": "", "markersize": 6}
            axes.errorbar(x, y, yerr=bars, elinewidth=1, capsize=2, **style)
            axes.plot([], [], label=f"{row['number']}  {row['label']}", **style)
        axes.set_xscale("log")
        axes.margins(x=0.08)
        axes.set_ylim(0, max((row["ratio_high"] for row in rows), default=1.0) * 1.1)
        axes.xaxis.set_major_locator(FixedLocator([digit * 10**power for power in range(5) for digit in (1, 2, 5)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axhline(1.0, color="#A0A0A0", linewidth=0.8, linestyle=":")
        setting = network["setting"]
        axes.set_title(f"{setting['backbone']}, {setting['resolution']} px, batch {setting['batch_size']}")
        axes.set_xlabel("all live tensor bytes (MB, logarithmic)")
        axes.set_ylabel("time of a step / stock PyTorch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    figure.draw_without_rendering()  # where the points lie on the paper is known from here on
    for axes, network in zip(figure.axes, networks, strict=True):
        _number(axes, [row for row in numbered(network["rows"]) if row["ratio"] is not None])
    figure.savefig(path, format="png")


def _number(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Write each row's number beside its point, on the side that is farthest from all other points and numbers."""
    points = [tuple(axes.transData.transform((row["peak_bytes"] / 1e6, row["ratio"]))) for row in rows]
    taken = list(points)
    for row, (x, y) in zip(rows, points, strict=True):
        sides = [(x + dx, y + dy) for dx, dy in ((18, 0), (-18, 0), (14, 16), (-14, 16), (14, -16), (-14, -16))]
        others = [point for point in taken if point != (x, y)]
        place = max(sides, key=lambda side: min((math.dist(side, other) for other in others), default=0.0))
        taken.append(place)
        axes.annotate(
            str(row["number"]),
            place,
            xycoords="figure pixels",
            fontsize=8,
            ha="center",
            va="center",
            color=_STYLES[row["side"]][0],
        )
