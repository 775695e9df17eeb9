"""A found network as a picture, a row a block: what stays, what is beside it, what trains."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytl._atomic import write_bytes

FROZEN, TRAINED, LITE, GONE = "#B9C2CC", "#D55E00", "#0072B2", "#6B6B6B"


@dataclass(frozen=True)
class LiteRow:
    """A lite residual module.

    Attributes:
        kernel, groups: of its group convolution.
        width_percent: of the full module's middle channels.
        channels: in the middle.
    """

    kernel: int
    groups: int
    width_percent: int
    channels: int


@dataclass(frozen=True)
class BlockRow:
    """A block of the full network, and what was chosen for it.

    Attributes:
        name: printed before it, such as its number.
        kept: False: left out, and the rest is not looked at but for its channels.
        in_channels, out_channels, stride: of the block.
        pixels: a side of its output.
        bias: whether its biases train.
        kernel, expand: of its main branch; None where there was nothing to choose.
        lite: the module beside it, if it has one.
    """

    name: str
    kept: bool
    in_channels: int
    out_channels: int
    stride: int
    pixels: int
    bias: bool
    kernel: int | None = None
    expand: float | None = None
    lite: LiteRow | None = None


# columns, in units of the axes: texts, main branch, lite module, biases
_NAME, _SHAPE, _MAIN, _MAIN_TEXT, _LITE, _LITE_TEXT, _BIAS = 0.0, 0.6, 2.6, 4.7, 5.9, 7.4, 9.5
_MAIN_WIDTH, _LITE_WIDTH = 2.0, 1.4


def draw_network(path: str | Path, blocks: Sequence[BlockRow], *, resolution: int, title: str = "") -> Path:
    """Draw a sub-network into a PNG, the image at the top; bars are as long as their channels are many.

    Args:
        blocks: of the full network, in order.
        resolution: pixels a side that it takes.

    Returns ``path``. Raises ValueError for no blocks, RunError when the file cannot be written.
    """
    if not blocks:
        raise ValueError("no blocks to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9.5, 1.6 + 0.3 * len(blocks)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for at, text in ((_NAME, "block"), (_SHAPE, "channels, pixels"), (_MAIN, "main branch, weights frozen"),
                     (_LITE, "lite module, trains"), (_BIAS, "biases")):  # fmt: skip
        axes.text(at, -1.0, text, fontweight="bold", va="center", fontsize=9)
    axes.text(_SHAPE, -0.1, f"image: {resolution} px", va="center", fontsize=8, color=GONE)
    widest = max(block.out_channels for block in blocks)
    middle = max([block.lite.channels for block in blocks if block.kept and block.lite], default=1)
    for row, block in enumerate(blocks, 1):
        _draw_block(axes, row, block, _MAIN_WIDTH / widest, _LITE_WIDTH / middle)
    kept = sum(block.kept for block in blocks)
    lite = sum(block.kept and block.lite is not None for block in blocks)
    biases = sum(block.kept and block.bias for block in blocks)
    handles = [
        Patch(facecolor=FROZEN, label=f"kept: {kept} of {len(blocks)}"),
        Patch(facecolor="white", edgecolor=GONE, linestyle="--", label=f"left out: {len(blocks) - kept}"),
        Patch(facecolor=LITE, label=f"lite modules: {lite}"),
        Patch(facecolor=TRAINED, label=f"biases train in: {biases}"),
    ]
    axes.legend(handles=handles, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize=8)
    axes.set(xlim=(-0.1, 10.4), ylim=(len(blocks) + 0.7, -1.5))
    axes.axis("off")
    if title:
        axes.set_title(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(Path(path), picture.getvalue())
    return Path(path)


def _draw_block(axes: Any, row: int, block: BlockRow, main_unit: float, lite_unit: float) -> None:
    """One row; units are the length of a channel."""
    from matplotlib.patches import Rectangle

    def text(at: float, what: str, color: str = "black") -> None:
        axes.text(at, row, what, va="center", fontsize=8, color=color)

    def bar(at: float, length: float, **style: Any) -> None:
        axes.add_patch(Rectangle((at, row - 0.36), length, 0.72, **style))

    length = block.out_channels * main_unit
    channels = f"{block.in_channels} → {block.out_channels}"
    if not block.kept:
        text(_NAME, block.name, GONE)
        text(_SHAPE, channels, GONE)
        bar(_MAIN, length, facecolor="white", edgecolor=GONE, linestyle="--", linewidth=0.9)
        text(_MAIN_TEXT, "left out", GONE)
        return
    text(_NAME, block.name)
    text(_SHAPE, f"{channels}, {block.pixels} px{f' (stride {block.stride})' if block.stride > 1 else ''}")
    bar(_MAIN, length, facecolor=FROZEN, linewidth=0)
    chosen = (f"k{block.kernel}" if block.kernel else "", f"e{block.expand:g}" if block.expand else "")
    text(_MAIN_TEXT, " ".join(part for part in chosen if part))
    if block.lite:
        lite = block.lite
        bar(_LITE, lite.channels * lite_unit, facecolor=LITE, linewidth=0)
        share = "" if lite.width_percent == 100 else f", {lite.width_percent} %"
        text(_LITE_TEXT, f"k{lite.kernel} g{lite.groups}, {lite.channels} ch{share}")
    if block.bias:
        bar(_BIAS, 0.45, facecolor=TRAINED, linewidth=0)
