"""Pictures of live bytes over one training step: several measured steps in one frame, or one planned step by role."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinytl._atomic import write_bytes
from tinytl.memory.by_role import COLOURS, STACK, live_by_role, skyline
from tinytl.memory.description import StepDescription
from tinytl.memory.measured import Measured

# Okabe and Ito's colours, told apart by colour-blind readers; the markers repeat the difference in grey.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^v"
_COLUMNS = 600  # of the planned step's picture, two pixels each


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


def draw_planned(step: StepDescription, path: str | Path, *, title: str = "") -> Path:
    """Draw the live bytes of a described step over its operations into a PNG, stacked by role, the peak marked.

    Vertical: MB (10^6 bytes). Of operations that would share a column of pixels, the one with most alive is drawn.

    Returns ``path``. Raises ValueError when the step has no operations, RunError when the file cannot be written.
    """
    if not step.operations:
        raise ValueError("no operations to draw: the step is empty")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = skyline(step, _COLUMNS)
    live = {role: values / 1e6 for role, values in live_by_role(step).items() if values.any()}
    count, peak = len(step.operations), int(step.live_bytes.argmax())
    highest = step.peak_bytes / 1e6
    edges = np.linspace(0, count, len(shown) + 1)
    below = np.zeros(len(edges))
    for role in STACK:
        if role in live:
            above = below + live[role][[*shown, shown[-1]]]
            label = f"{role} {live[role][peak]:,.1f} MB"
            axes.fill_between(edges, below, above, step="post", color=COLOURS[role], linewidth=0, label=label)
            below = above
    op, right = step.operations[peak], peak > 0.5 * count
    axes.plot([peak + 0.5], [highest * 1.02], marker="v", color="black", markersize=6, clip_on=False, zorder=5)
    axes.annotate(
        f"peak {highest:,.1f} MB\n{op.layer or op.name} ({op.phase})",
        (peak + 0.5, highest),
        xytext=(-8 if right else 8, 4),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=9,
        fontweight="bold",
    )
    for name, begin, end in phases(step):
        axes.axvline(begin, color="black", linewidth=0.6, alpha=0.35)
        if end - begin > 0.05 * count:
            axes.text((begin + end) / 2, -0.02, name, ha="center", va="top", transform=axes.get_xaxis_transform())
    axes.set(xlim=(0, count), ylim=(0, highest * 1.22), xticks=[])
    axes.set_xlabel(f"{count:,} operations of one training step, in order", labelpad=16)
    axes.set_ylabel("live bytes, planned (MB)")
    if title:
        axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, title="at the peak"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(Path(path), picture.getvalue())
    return Path(path)


def phases(step: StepDescription) -> list[tuple[str, int, int]]:
    """The stretches of a step: (phase, its first operation, the one behind its last), in order."""
    found: list[tuple[str, int, int]] = []
    for number, op in enumerate(step.operations):
        if found and found[-1][0] == op.phase:
            found[-1] = (op.phase, found[-1][1], number + 1)
        else:
            found.append((op.phase, number, number + 1))
    return found
