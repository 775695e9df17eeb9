"""The arena map as a picture: every tensor a rectangle, its bytes over the instructions for which it is alive."""

from __future__ import annotations

import io
from pathlib import Path

from tinytl._atomic import write_bytes

from .by_role import live_bytes, peak_instruction
from .liveness import buffers, resident, timeline
from .program import SCRATCH_PER_THREAD, STREAMS, Program

COLOURS = {
    "trained": "#55677A",
    "state": "#B3A06B",
    "input": "#9A7FB8",
    "metric": "#8C9BAA",
    "gradient": "#E0A100",
    "derived": "#009E73",
    "mask": "#CC79A7",
    "activation": "#45A8DE",
    "scratch": "#D55E00",
}
"""As in `tinytl.memory.by_role`: muted what is resident, clear what comes and goes."""


def draw_arena(program: Program, path: str | Path, *, title: str = "") -> Path:
    """Draw the arena of a program that is laid out into a PNG: offset (MB) over instructions; the peak is named.

    Returns ``path``. Raises ValueError when the program has no instructions, RunError when the file cannot be written.
    """
    order = timeline(program)
    if not order or program.arena_bytes is None:
        raise ValueError("no arena to draw: the program is empty, or not laid out")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    figure = Figure(figsize=(9.0, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    found = _rectangles(program)
    for role, places in found.items():
        boxes = [Rectangle((first, low / 1e6), last - first, size / 1e6) for first, last, low, size in places]
        edge = "white" if len(boxes) < 2000 else "none"
        axes.add_collection(PatchCollection(boxes, facecolor=COLOURS[role], edgecolor=edge, linewidth=0.15))
    live = live_bytes(program)
    peak = peak_instruction(program, live)
    height, most = program.arena_bytes / 1e6, sum(int(values[peak]) for values in live.values()) / 1e6
    one = order[peak][1]
    right = peak > 0.5 * len(order)
    axes.plot([peak + 0.5], [height * 1.015], marker="v", color="black", markersize=6, clip_on=False, zorder=5)
    axes.annotate(
        f"peak {most:,.2f} MB of {height:,.2f} MB\n{one.layer or one.op} ({one.op}, {one.phase})",
        (peak + 0.5, height),
        xytext=(-8 if right else 8, 6),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=9,
        fontweight="bold",
    )
    for name, first, last in _streams(program):
        axes.axvline(first, color="black", linewidth=0.6, alpha=0.5)
        if last - first > 0.05 * len(order):
            axes.text((first + last) / 2, -0.02, name, ha="center", va="top", transform=axes.get_xaxis_transform())
    axes.set(xlim=(0, len(order)), ylim=(0, height * 1.16), xticks=[])
    axes.set_xlabel(f"{len(order):,} instructions, in order", labelpad=16)
    axes.set_ylabel("offset in the arena (MB)")
    if title:
        axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(facecolor=COLOURS[role], label=f"{role} {int(live[role][peak]) / 1e6:,.2f} MB")
        for role in COLOURS
        if role in found
    ]
    axes.legend(
        handles=handles, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5, title="at the peak"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(Path(path), picture.getvalue())
    return Path(path)


def _rectangles(program: Program) -> dict[str, list[tuple[int, int, int, int]]]:
    """Role -> (first instruction, the one behind the last, offset, bytes) of each tensor's rectangle."""
    assert program.arena_bytes is not None
    count = len(timeline(program))
    found: dict[str, list[tuple[int, int, int, int]]] = {}
    for number in resident(program):
        tensor = program.tensors[number]
        if tensor.role != "constant":
            found.setdefault(tensor.role, []).append((0, count, tensor.offset or 0, tensor.bytes(program)))
    for buffer in buffers(program):
        last_one = program.tensors[buffer.tensors[-1]]
        for first, last in buffer.intervals:
            found.setdefault(last_one.role, []).append((first, last + 1, last_one.offset or 0, buffer.bytes))
    scratch = program.threads * SCRATCH_PER_THREAD
    found["scratch"] = [(0, count, program.arena_bytes - scratch, scratch)]
    return found


def _streams(program: Program) -> list[tuple[str, int, int]]:
    """(stream, its first instruction, the one behind its last)."""
    found, at = [], 0
    for name in STREAMS:
        end = at + len(program.streams.get(name, ()))
        found.append((name, at, end))
        at = end
    return found
