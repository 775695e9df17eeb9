"""The page's part on training: loss and accuracy as curves, and every epoch as a line."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .html import text
from .scale import ticks

POINTS = 300  # of a curve, at most
_WIDTH, _HEIGHT = 1000, 500  # of a chart, in its own units

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A line of a chart: what it is called, its class in the style sheet, its points by rising x."""

    name: str
    kind: str
    points: list[Point]


def training_section(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of HTML from what `read_metrics` returns."""
    epochs = [line for line in metrics if line["kind"] == "epoch"]
    steps = [line for line in metrics if line["kind"] == "step"]
    if not epochs:
        return []
    results = [(line["epoch"], line["validation"]) for line in epochs if line["validation"]]
    batches = epochs[-1]["step"] / epochs[-1]["epoch"]  # of an epoch
    loss = [
        Curve("each step", "faint", _thinned([(line["step"] / batches, line["loss"]) for line in steps])),
        Curve("training", "train", [(line["epoch"], line["loss"]) for line in epochs]),
        Curve("held out", "held", [(epoch, found["loss"]) for epoch, found in results]),
    ]
    accuracy = [
        Curve("training", "train", [(line["epoch"], 100 * line["accuracy"]) for line in epochs]),
        Curve("held out", "held", [(epoch, 100 * found["top1"]) for epoch, found in results]),
    ]
    if results:
        share = 100 * results[-1][1]["majority_share"]
        accuracy.append(Curve("always the largest class", "level", [(0.0, share), (epochs[-1]["epoch"], share)]))
    return [
        '<section id="training">',
        "<h2>Training</h2>",
        '<div class="charts">',
        *_chart("Loss [nats]", loss, epochs[-1]["epoch"], None),
        *_chart("Top-1 [%]", accuracy, epochs[-1]["epoch"], 100.0),
        "</div>",
        *_table(epochs),
        "</section>",
    ]


def _chart(title: str, curves: Sequence[Curve], last: int, top: float | None) -> list[str]:
    curves = [curve for curve in curves if curve.points]
    highest = max(y for curve in curves for _, y in curve.points)
    marks = ticks(highest if top is None else top)
    top = top or max(highest, marks[-1]) * 1.04 or 1.0
    lines = [
        f'<figure class="chart small"><figcaption>{text(title)}</figcaption>',
        '<div class="ticks">',
        *(f'<span style="bottom:{100 * t / top:.2f}%">{t:g}</span>' for t in marks),
        "</div>",
        '<div class="plot">',
        *(f'<i class="grid" style="bottom:{100 * t / top:.2f}%"></i>' for t in marks),
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(title)} over {last} epochs">',
        *(_line(curve, last, top) for curve in curves),
        "</svg>",
        "</div>",
        f'<div class="under ends"><span>0</span><span>epoch</span><span>{last}</span></div>',
        '<ul class="legend">',
        *(f'<li><i class="{curve.kind}"></i>{text(curve.name)}</li>' for curve in curves),
        "</ul></figure>",
    ]
    return lines


def _line(curve: Curve, last: int, top: float) -> str:
    places = [(f"{_WIDTH * x / last:.1f}", f"{_HEIGHT * (1 - y / top):.1f}") for x, y in curve.points]
    drawn = "M" + "L".join(f"{x} {y}" for x, y in places)
    dots = ""
    if curve.kind in ("train", "held") and len(places) <= 30:  # one epoch alone would be no line at all
        dots = f'<path class="{curve.kind} dots" d="{"".join(f"M{x} {y}h0" for x, y in places)}"/>'
    return f'<path class="{curve.kind}" d="{drawn}"/>{dots}'


def _table(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"<details><summary>All {len(epochs)} epochs as a table</summary>",
        '<div class="wide" tabindex="0"><table id="epochs">',
        "<thead><tr><th>epoch</th><th>loss</th><th>accuracy</th><th>held out: loss</th><th>top-1</th>"
        "<th>balanced</th><th>learning rate</th><th>seconds</th></tr></thead><tbody>",
    ]
    for line in epochs:
        found = line["validation"] or {}
        balanced = found.get("balanced_accuracy")
        cells = [
            str(line["epoch"]),
            f"{line['loss']:.4f}",
            f"{line['accuracy']:.1%}",
            f"{found['loss']:.4f}" if found else "–",
            f"{found['top1']:.1%}" if found else "–",
            "–" if balanced is None else f"{balanced:.1%}",
            f"{line['lr']:.3g}" if "lr" in line else "–",
            f"{line['seconds']:,.1f}" if "seconds" in line else "–",
        ]
        lines.append("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>")
    return [*lines, "</tbody></table></div></details>"]


def _thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most so many points: the mean of each of so many stretches."""
    if len(points) <= most:
        return list(points)
    edges = [round(len(points) * i / most) for i in range(most + 1)]
    groups = [points[begin:end] for begin, end in itertools.pairwise(edges)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
