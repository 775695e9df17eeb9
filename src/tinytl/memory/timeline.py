"""A picture of live bytes over one training step, several methods or engines in one frame."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinytl.memory.measured import Measured

# Okabe and Ito's colours, told apart by colour-blind readers; the markers repeat the difference in grey.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^v"


def draw_timelines(steps: Mapping[str, Measured], path: str | Path, *, title: str = "") -> Path:
    """Draw all live tensor bytes over one step for each of ``steps`` (name -> measurement) into a PNG.

    Horizontal: share of the step, as the profiler slows steps down and seconds would mislead. Vertical: MB
    (10^6 bytes), resident tensors included. Each curve's peak is marked and named.

    Returns ``path``. Raises ValueError when there is nothing to draw, or a measurement has no timeline
    (CUDA).
    """
    if not steps:
        raise ValueError("no timelines to draw: give at least one measured step")
    # Agg without pyplot: no display, no window, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    highest = max(measured.peak_bytes for measured in steps.values()) / 1e6
    for index, (name, measured) in enumerate(steps.items()):
        if measured.timeline is None:
            raise ValueError(f"{name!r} has no timeline: only steps measured on the CPU have one")
        seconds = measured.timeline.seconds
        live = (measured.timeline.live_bytes + measured.resident_bytes) / 1e6
        share = 100 * seconds / max(float(seconds[-1]), 1e-12)
        colour = _COLOURS[index % len(_COLOURS)]
        marker = _MARKERS[index % len(_MARKERS)]
        at = int(np.argmax(live))
        label = f"{name}: peak {measured.peak_bytes / 1e6:,.1f} MB"
        axes.plot(
            share,
            live,
            drawstyle="steps-post",
            linewidth=1.3,
            color=colour,
            label=label,
            marker=marker,
            markersize=6,
            markevery=[at],
        )
        axes.fill_between(share, live, step="post", color=colour, alpha=0.12, linewidth=0)
        right = share[at] > 60  # Text leans to the side where there is room.
        axes.annotate(
            f"{live[at]:,.1f} MB",
            (float(share[at]), float(live[at])),
            xytext=(-6 if right else 6, 6),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=10,
            color=colour,
            fontweight="bold",
        )
    axes.set(xlim=(0, 100), ylim=(0, highest * 1.15))
    axes.set_xlabel("share of one training step (%)")
    axes.set_ylabel("live tensor bytes (MB)")
    if title:
        axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=min(len(steps), 3))
    path = Path(path)
    figure.savefig(path, format="png")
    return path
