"""The page's part on memory: the timeline of one step, who owns each moment, and the parts of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinytl.memory.by_block import PartMemory, by_part, owners_at, part_of
from tinytl.memory.by_role import COLOURS, STACK, live_by_role, skyline
from tinytl.memory.description import StepDescription
from tinytl.memory.timeline import phases

from .blocks import NAMELESS
from .html import data, megabytes, text
from .scale import ticks

POINTS = 600  # operations that are drawn and can be pointed at, at most
OWNERS = 6  # of each of them, that are named
_HEIGHT = 4000  # of the picture, in its own units
_ROOM = 1.12  # of its height to that of the peak


def memory_section(step: StepDescription, blocks: Sequence[str], trained: Mapping[str, int]) -> list[str]:
    """Lines of HTML.

    Args:
        step: as `capture_step` describes it.
        blocks: paths of the blocks (`Adaptation.blocks`).
        trained: numbers of values by the names of the parameters that train.
    """
    shown = skyline(step, POINTS)
    peak = int(step.live_bytes.argmax())
    op = step.operations[peak]
    every = "" if len(shown) == len(step.operations) else f"; of neighbours, the one with most alive of {len(shown)}"
    return [
        '<section id="memory">',
        "<h2>Memory of one training step</h2>",
        f"<p>Planned, operator by operator: at most <b>{megabytes(step.peak_bytes)}</b> are alive at once, while "
        f"<code>{text(op.layer or op.name)}</code> runs in {text(op.phase)}. {megabytes(step.resident_bytes)} of them "
        "are there before and after the step.</p>",
        *_timeline(step, shown, shown.index(peak)),
        f'<p class="hint">Point at the picture, drag over it, or use the arrow keys (Home, End; P: the peak). '
        f"{len(step.operations):,} operations{every}.</p>",
        *_readout(step, peak),
        f'<script type="application/json" id="steps">{data(_points(step, shown))}</script>',
        "<h3>By part of the network</h3>",
        *_parts(by_part(step, blocks), blocks, trained),
        "</section>",
    ]


def _timeline(step: StepDescription, shown: Sequence[int], at: int) -> list[str]:
    highest, base, count = step.peak_bytes, step.resident_bytes, len(step.operations)
    top = _ROOM * highest
    # drawn from zero, or from what is resident, with the peak at the same height in both
    marks = [("whole", t, t * 1e6 / top) for t in ticks(highest / 1e6)]
    above = _ROOM * (highest - base)
    marks += [("part", t, (t * 1e6 - base) / above) for t in ticks(highest / 1e6, base / 1e6) if above]
    low = _HEIGHT * (1 - base / top)
    views = (
        f"0 0 {len(shown)} {_HEIGHT}",
        f"0 {low - _HEIGHT * above / top:.1f} {len(shown)} {_HEIGHT * above / top:.1f}",
    )
    value = text(f"operation {shown[at] + 1}, the peak")
    place = 100 * (at + 0.5) / len(shown)
    side = "left" if place > 50 else "right"
    return [
        '<label class="hint"><input type="checkbox" id="zoom"> leave out what is resident</label>',
        f'<div id="timeline" class="chart" tabindex="0" role="slider" aria-label="Operations of the step" '
        f'aria-valuemin="1" aria-valuemax="{len(shown)}" aria-valuenow="{at + 1}" aria-valuetext="{value}">',
        '<div class="ticks">',
        *(f'<span class="{kind}" style="bottom:{share:.2%}">{t:g} MB</span>' for kind, t, share in marks),
        "</div>",
        '<div class="plot">',
        *(f'<i class="grid {kind}" style="bottom:{share:.2%}"></i>' for kind, _, share in marks),
        f'<svg viewBox="{views[0]}" data-whole="{views[0]}" data-part="{views[1]}" preserveAspectRatio="none" '
        'aria-hidden="true">',
        *_areas(step, shown, top),
        "</svg>",
        *(f'<i class="border" style="left:{begin / count:.2%}"></i>' for _, begin, _ in phases(step)[1:]),
        f'<div class="peak {side}" style="left:{place:.2f}%;bottom:{1 / _ROOM:.2%}">'
        f"<span>peak {megabytes(highest)}</span></div>",
        f'<div class="cursor" style="left:{place:.2f}%"></div>',
        "</div>",
        '<div class="under">',
        *(
            f'<span style="left:{begin / count:.2%};width:{(end - begin) / count:.2%}">{name}</span>'
            for name, begin, end in phases(step)
        ),
        "</div>",
        "</div>",
    ]


def _areas(step: StepDescription, shown: Sequence[int], top: float) -> list[str]:
    """A path a role from the bottom to the top of its stack; the highest first, so that each covers the ones above."""
    total = np.zeros(len(shown), dtype=np.int64)
    paths = []
    for role, values in live_by_role(step).items():
        if not values.any():
            continue
        total = total + values[list(shown)]
        heights = (_HEIGHT * (1 - total / top)).round().astype(int).tolist()
        drawn = [f"M0 {_HEIGHT}V{heights[0]}"]
        for x in range(1, len(heights)):
            if heights[x] != heights[x - 1]:
                drawn.append(f"H{x}V{heights[x]}")
        drawn.append(f"H{len(heights)}V{_HEIGHT}Z")
        paths.append(f'<path fill="{COLOURS[role]}" d="{"".join(drawn)}"/>')
    return paths[::-1]


def _readout(step: StepDescription, peak: int) -> list[str]:
    """What stands under the picture: of the peak, until somebody points elsewhere."""
    op, found = step.operations[peak], step.at_peak()
    lines = [
        '<div id="readout" aria-live="polite">',
        f'<p class="where"><b id="total">{megabytes(step.peak_bytes)}</b> <span id="place">operation {peak + 1:,} of '
        f"{len(step.operations):,}, {text(op.phase)}: the peak</span><br>"
        f'<code id="layer">{text(op.layer or NAMELESS)}</code> <code id="name" class="quiet">{text(op.name)}</code>',
        "</p>",
        '<div class="bar">',
        *(f'<i style="background:{COLOURS[role]};flex-grow:{found[role]}"></i>' for role in STACK),
        "</div>",
        '<ul class="legend">',
        *(
            f'<li><i style="background:{COLOURS[role]}"></i>{text(role)} <b>{megabytes(found[role])}</b></li>'
            for role in STACK
        ),
        "</ul>",
        '<div class="wide" tabindex="0"><table id="owners"><caption>Largest owners there</caption>',
        "<thead><tr><th>layer</th><th>role</th><th>bytes</th></tr></thead><tbody>",
    ]
    owners = owners_at(step, peak)[:OWNERS]
    for index in range(OWNERS):
        cells = ("", "", "")
        if index < len(owners):
            owner = owners[index]
            cells = (text(owner.layer or NAMELESS), text(owner.role), megabytes(owner.bytes))
        hidden = "" if index < len(owners) else " hidden"
        lines.append(f"<tr{hidden}><td><code>{cells[0]}</code></td><td>{cells[1]}</td><td>{cells[2]}</td></tr>")
    return [*lines, "</tbody></table></div>", "</div>"]


def _points(step: StepDescription, shown: Sequence[int]) -> dict[str, Any]:
    """What the script shows of each operation that is drawn; names stand once, and elsewhere by their number."""
    names: dict[str, int] = {}

    def number(name: str) -> int:
        return names.setdefault(name, len(names))

    roles, live = {role: at for at, role in enumerate(STACK)}, live_by_role(step)
    rows = []
    for at in shown:
        op = step.operations[at]
        owners = [
            [number(owner.layer or NAMELESS), roles[owner.role], owner.bytes] for owner in owners_at(step, at)[:OWNERS]
        ]
        parts = [int(live[role][at]) for role in STACK]
        rows.append([at, number(op.phase), number(op.layer or NAMELESS), number(op.name), parts, owners])
    peak = shown.index(int(step.live_bytes.argmax()))
    return {"count": len(step.operations), "peak": peak, "roles": STACK, "rows": rows, "names": list(names)}


def _parts(parts: Sequence[PartMemory], blocks: Sequence[str], trained: Mapping[str, int]) -> list[str]:
    values: dict[str, int] = {}
    for name, count in trained.items():
        path = part_of(name.rpartition(".")[0], blocks)
        values[path] = values.get(path, 0) + count
    most = [max((getattr(part, key) for part in parts), default=0) for key in ("kept_bytes", "working_bytes")]
    lines = [
        '<div class="wide" tabindex="0"><table id="parts">',
        "<thead><tr><th>part</th><th>kept</th><th>working</th><th>peak while it runs</th><th>trained values</th>"
        "<th>run again</th></tr></thead><tbody>",
    ]
    for part in parts:
        name = part.path or NAMELESS
        again = "yes" if part.run_again else "–"
        learned = f"{values[part.path]:,}" if values.get(part.path) else "–"
        lines.append(
            f"<tr><td><code>{text(name)}</code></td>{_bar(part.kept_bytes, most[0])}"
            f"{_bar(part.working_bytes, most[1])}<td>{megabytes(part.peak_bytes)}</td><td>{learned}</td>"
            f"<td>{again}</td></tr>"
        )
    return [
        *lines,
        "</tbody></table></div>",
        '<p class="hint">Kept: the most that its layers hold for backward at once. Working: the most that is alive, '
        "beside what is resident or kept, while one of its operations runs. Run again: in "
        "backward, what forward made and did not keep.</p>",
    ]


def _bar(count: int, most: int) -> str:
    share = 100 * count / most if most else 0
    return f'<td class="share" style="--s:{share:.1f}%">{megabytes(count)}</td>'
