"""Pictures of a search: accuracy over memory, predicted against measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytl._atomic import write_bytes

from .ranking import kendall_tau

# Okabe and Ito's colours, told apart by every kind of colour vision; markers repeat the difference
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"


@dataclass(frozen=True)
class Point:
    """A sub-network in the plane: its planned bytes, and its accuracy in 0..1."""

    memory_bytes: float
    accuracy: float


def draw_front(
    path: str | Path,
    *,
    pairs: Sequence[Point],
    front: Sequence[Point],
    finalists: Sequence[Point],
    winner: Point,
    budget_bytes: float,
    default: Point | None = None,
    pairs_measured: str = "random sub-networks, measured",
    finalists_measured: str = "finalists, measured again",
    title: str = "",
) -> Path:
    """Draw accuracy over planned memory into a PNG; needs no display.

    Args:
        pairs: what was measured for the predictor; may be empty, as may finalists.
        front: the candidates that evolution found, at predicted accuracy.
        finalists: at measured accuracy. `winner` and `default` are drawn apart, and may be among them.
        budget_bytes: drawn as a line, and what is beyond it in grey.
        default: the default network of that size, if one fits.
        pairs_measured, finalists_measured: what the legend says of them: where accuracies were measured in different
            ways, this is the place to say so.

    Returns ``path``. Raises ValueError where the front is empty, RunError when the file cannot be written.
    """
    if not front:
        raise ValueError("no front to draw: it is empty")
    figure, axes = _figure((8.0, 5.0))
    budget = budget_bytes / 1e6

    def scatter(points: Sequence[Point], **style: Any) -> None:
        axes.scatter([p.memory_bytes / 1e6 for p in points], [p.accuracy for p in points], **style)

    if pairs:
        scatter(pairs, s=16, color=GREY, alpha=0.5, linewidths=0, label=pairs_measured)
    line = sorted(front, key=lambda p: (p.memory_bytes, p.accuracy))
    axes.plot(
        [p.memory_bytes / 1e6 for p in line],
        [p.accuracy for p in line],
        drawstyle="steps-post",
        marker="o",
        markersize=3,
        linewidth=1.3,
        color=BLUE,
        label="front, predicted",
    )
    if finalists:
        scatter(
            finalists, s=42, marker="D", facecolor="white", edgecolor=GREEN, linewidths=1.5, label=finalists_measured,
            zorder=4,
        )  # fmt: skip
    if default is not None:
        text = f"default: {100 * default.accuracy:.1f} % at {default.memory_bytes / 1e6:,.1f} MB"
        scatter([default], s=80, marker="s", facecolor="white", edgecolor="black", linewidths=1.6, label=text, zorder=5)
    text = f"winner: {100 * winner.accuracy:.1f} % at {winner.memory_bytes / 1e6:,.1f} MB"
    scatter([winner], s=190, marker="*", color=ORANGE, edgecolor="black", linewidths=0.7, label=text, zorder=6)
    axes.axvline(budget, color="black", linestyle="--", linewidth=1.2, label=f"budget: {budget:,.1f} MB")
    low, high = axes.get_xlim()
    axes.axvspan(budget, max(high, budget * 1.03), color=GREY, alpha=0.1, linewidth=0)
    axes.set_xlim(low, max(high, budget * 1.03))
    axes.set_xlabel("planned memory of a training step (MB)")
    axes.set_ylabel("held-out top-1")
    _percent(axes.yaxis)
    return _written(figure, axes, path, title)


def draw_predicted(path: str | Path, *, predicted: Sequence[float], measured: Sequence[float], title: str = "") -> Path:
    """Draw predicted against measured accuracies (0..1) into a PNG, with Kendall's tau; needs no display.

    Give predictions of sub-networks that the predictor has not seen (`cross_validated_tau`).

    Returns ``path``. Raises ValueError for rows of unlike length or none, RunError when the file cannot be written.
    """
    tau = kendall_tau(predicted, measured)
    if not len(predicted):
        raise ValueError("no predictions to draw")
    figure, axes = _figure((5.2, 5.0))
    axes.scatter(measured, predicted, s=20, color=BLUE, alpha=0.65, linewidths=0)
    low, high = min(*predicted, *measured), max(*predicted, *measured)
    room = 0.05 * (high - low) or 0.01
    ends = (low - room, high + room)
    axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.2, label="predicted as measured")
    axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel="measured top-1", ylabel="predicted top-1, not seen before")
    axes.text(
        0.97, 0.04, f"{len(predicted)} sub-networks\nKendall's tau {tau:.2f}", transform=axes.transAxes, ha="right",
        fontweight="bold",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        _percent(axis)
    return _written(figure, axes, path, title)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def _written(figure: Any, axes: Any, path: str | Path, title: str) -> Path:
    axes.legend(frameon=False, fontsize="small", loc="best")
    if title:
        axes.set_title(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(Path(path), picture.getvalue())
    return Path(path)
