"""Where a step's memory goes, in the terminal: a part of the network a line, and what makes the peak."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from tinytl.memory.by_block import PartMemory, by_part, owners_at
from tinytl.memory.by_role import COLOURS, STACK
from tinytl.memory.description import StepDescription

from .tables import Column, table

OWNERS = 8  # of the peak, that are named
NAMELESS = "(no layer)"  # in the place of a layer's path where there is none
COLUMNS = (
    Column("path", "part"),
    Column("kept_bytes", "kept", "MB", 2),
    Column("working_bytes", "working", "MB", 2),
    Column("peak_bytes", "peak while it runs", "MB", 2),
    Column("run_again", "run again"),
)


def part_rows(parts: Sequence[PartMemory]) -> list[dict[str, object]]:
    """The rows of the table under `COLUMNS`; of what is not run again, nothing is said."""
    return [
        {
            "path": part.path or NAMELESS,
            "kept_bytes": part.kept_bytes,
            "working_bytes": part.working_bytes,
            "peak_bytes": part.peak_bytes or None,
            "run_again": "yes" if part.run_again else None,
        }
        for part in parts
    ]


def print_blocks(step: StepDescription, blocks: Sequence[str], console: Console) -> None:
    """Print the parts of a described step, and the operation at its peak with who owns what is alive there.

    Args:
        step: as `capture_step` describes it.
        blocks: paths of the network's blocks (`Adaptation.blocks`).
        console: where to.
    """
    console.print(table(part_rows(by_part(step, blocks)), COLUMNS, "planned, a part of the network at a time"))
    peak = int(step.live_bytes.argmax())
    op = step.operations[peak]
    where = f"operation {peak + 1:,} of {len(step.operations):,}, {op.phase}, {op.layer or NAMELESS}, {op.name}"
    console.print(Text(f"the peak of {step.peak_bytes / 1e6:,.2f} MB: {where}"))
    for line in role_bar(step.at_peak(), max(20, min(console.width - 2, 100))):
        console.print(line)
    rows = [
        {"layer": owner.layer or NAMELESS, "role": owner.role, "bytes": owner.bytes}
        for owner in owners_at(step, peak)[:OWNERS]
    ]
    columns = [Column("layer", "largest owners there"), Column("role", "role"), Column("bytes", "MB", "MB", 2)]
    console.print(table(rows, columns))


def role_bar(found: dict[str, int], width: int) -> list[Text]:
    """A bar of so many characters, a stretch a role in proportion to its bytes, and under it what each is."""
    total = sum(found.values())
    bar, legend, drawn, reached = Text(), Text(), 0, 0
    for role in STACK:
        if not found[role]:
            continue
        reached += found[role]
        end = round(width * reached / total)
        bar.append("█" * (end - drawn), style=COLOURS[role])
        drawn = end
        legend.append("■ ", style=COLOURS[role]).append(f"{role} {found[role] / 1e6:,.2f} MB   ")
    return [bar, legend]
