"""How a step is to be taken so that it fits: micro-batches, tiles, what runs again in backward, where updates stand.

All of it is exact but for the order of sums. Of a handful of ways (`tinytl.compiler.ways`) the fastest that fits is
taken. Without a budget, a step takes one image at a time, and runs again what would be dear to keep: the blocks with a
group norm or a smooth activation, whose inputs a backward needs in full, where a mask has one bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tinytl.errors import BudgetError, InputError

from .arena import constant_bytes, lay_out, least_bytes
from .by_role import bytes_by_role
from .program import Program
from .step_options import StepOptions
from .ways import Network, Way, all_ways, joins


def plan(
    captured: Program,
    options: StepOptions,
    *,
    budget_bytes: int | None = None,
    micro_batch: int | None = None,
    updates: str | None = None,
) -> Program:
    """The training step of a captured network, laid out; `meta["plan"]` tells what was chosen.

    Args:
        captured: the stream `evaluate` alone.
        options: of which `micro_batch`, `evaluate_images`, `recompute` and `updates` are chosen here, and the tiles.
        budget_bytes: of the arena and of the constants, which are mapped: all of a process but the program itself, its
            stack and its libraries (about 3 MB without Python).
        micro_batch, updates: fixed, instead of chosen.

    Raises:
        BudgetError: no way fits; the least that would do is named.
        InputError: a micro-batch that is larger than the batch; nothing that trains.
    """
    if not captured.trained:
        raise InputError("nothing trains in this network: choose another method, such as --method tinytl-l+b")
    if micro_batch is not None and not 1 <= micro_batch <= options.batch:
        raise InputError(f"micro_batch is {micro_batch}, expected 1 to the batch_size of {options.batch}")
    network = Network(captured, options)
    if budget_bytes is None:
        size, kind = micro_batch or 1, updates or "end"
        cheap = [
            Way(size, network.dear, kind, joined, early, 0.0)
            for joined in joins(network.dear)
            for early in network.early(size)
        ]
        return _finished(captured, options, min(cheap, key=network.bytes), network, None)
    refused: list[Way] = []
    ways = sorted(all_ways(network, options.batch, micro_batch, updates), key=lambda way: way.cost)
    fewest = min(way.micro_batch for way in ways)
    for way in ways:
        if any(way.is_at_least(other) for other in refused):
            continue
        # an image at a time takes least: where that does not fit, more need not be tried; but updates in backward may
        # take less than any step that holds all gradients at its end
        least_of = replace(way, micro_batch=fewest, early=way.early if fewest > 1 else 0)
        first = () if way.updates == "backward" else (least_of,)
        for tried in (*first, way):
            if network.bytes(tried) > budget_bytes:
                refused.append(tried)
                break
        else:
            program = _finished(captured, options, way, network, budget_bytes)
            if total_bytes(program) <= budget_bytes:
                return program
            refused.append(way)
    smallest = min(refused, key=network.bytes)
    program = _finished(captured, options, smallest, network, None)
    least = total_bytes(program)  # laid out, and not only the bound: what is named must do
    raise BudgetError(
        f"memory_budget is {budget_bytes:,} bytes: the least that a compiled step takes here is {least:,} bytes "
        f"({constant_bytes(program):,} of them frozen weights, {program.state_bytes:,} what trains and the optimizer's "
        "state); give at least that, a lower resolution, or fewer bits (--frozen-bits 8, --optimizer-bits 8: "
        "approximate)",
        least,
    )


def total_bytes(program: Program) -> int:
    """The arena and the constants of a program that is laid out."""
    assert program.arena_bytes is not None
    return program.arena_bytes + constant_bytes(program)


def _finished(captured: Program, options: StepOptions, way: Way, network: Network, budget_bytes: int | None) -> Program:
    """The step laid out, evaluation with as many images at a time as take no more; and what was chosen."""
    step = network.step(way)
    least = least_bytes(step, options.threads)
    for images in sorted((n for n in range(2, options.batch + 1) if options.batch % n == 0), reverse=True):
        wider = replace(step, evaluate_images=images)
        if least_bytes(wider, options.threads) == least:
            step = wider
            break
    program = lay_out(step, options.threads)
    chosen: dict[str, Any] = {
        "budget_bytes": budget_bytes,
        "micro_batch": way.micro_batch,
        "updates": way.updates,
        "again": [network.names[stretch] for stretch in sorted(way.recompute)],
        "joined": [network.names[stretch] for stretch in sorted(way.joined)],
        "tiled": [network.names[stretch] for stretch in sorted(network.names) if stretch < way.early],
        "again_multiply_adds": sum(network.cost[stretch] for stretch in way.recompute),
        "bytes": bytes_by_role(program),
    }
    return replace(program, meta={**captured.meta, **program.meta, "plan": chosen})


def stretch_names(names: Sequence[str]) -> str:
    """Names of stretches on one line, runs of blocks as one: 'block 1 to 20, classifier'."""
    found: list[str] = []
    run: list[int] = []

    def close() -> None:
        if run:
            found.append(f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]} to {run[-1]}")
            run.clear()

    for name in names:
        number = int(name.removeprefix("block ")) if name.startswith("block ") else None
        if number is None or (run and number != run[-1] + 1):
            close()
        if number is None:
            found.append(name)
        else:
            run.append(number)
    close()
    return ", ".join(found)
