"""Learning curves as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from tinytl._atomic import write_bytes
from tinytl.errors import RunError

from .metrics import read_metrics

# Okabe and Ito's colours: told apart by every kind of colour vision, and in grey
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"


def plot_curves(metrics_path: Path, out_png: Path) -> None:
    """Draw loss and accuracy over the epochs of a ``metrics.jsonl`` (train, validation, majority) into a PNG.

    Needs no display. Raises RunError when there is no epoch in the file, or a file cannot be read or written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [line for line in read_metrics(metrics_path) if line["kind"] == "epoch"]
    if not epochs:
        raise RunError(f"{metrics_path} holds no finished epoch: there is nothing to draw yet")
    validated = [line for line in epochs if line["validation"]]
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)

    def draw(axes: Any, lines: list[dict[str, Any]], values: list[float], color: str, label: str) -> None:
        marker = "o" if len(lines) <= 30 else None  # one epoch alone would be no line at all
        x = [line["epoch"] for line in lines]
        style = "-" if color == BLUE else "--"  # not by colour alone
        axes.plot(x, values, style, color=color, marker=marker, markersize=3.5, linewidth=1.6, label=label)

    draw(loss, epochs, [line["loss"] for line in epochs], BLUE, "training (as minimized)")
    draw(accuracy, epochs, [line["accuracy"] for line in epochs], BLUE, "training")
    if validated:
        results = [line["validation"] for line in validated]
        draw(loss, validated, [result["loss"] for result in results], ORANGE, "validation")
        draw(accuracy, validated, [result["top1"] for result in results], ORANGE, "validation")
        share = results[-1]["majority_share"]
        accuracy.axhline(share, color=GREY, linewidth=1.2, linestyle=":", label="always the largest class")
    loss.set(title="Loss", xlabel="epoch", ylabel="cross entropy [nats]", ylim=(0, None))
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="top-1")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_bytes(Path(out_png), picture.getvalue())
