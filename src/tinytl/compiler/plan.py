"""How a step is to be taken so that it fits: micro-batches, what runs again in backward, where updates stand.

All of it is exact but for the order of sums. Of a handful of ways the fastest that fits is taken, by a rough rule:

    seconds ~ batch x (multiply-adds that run again) + micro-batches x (values of weights) x PACKING

since what every way computes is the same. Weights are brought into the kernels' order once a micro-batch, in forward
and in backward; that is about the cost of a few dozen multiply-adds a value, and a per cent or two of a step. So more
micro-batches come before anything that runs again.

Without a budget, a step takes one image at a time, and runs again what would be dear to keep: the blocks with a group
norm or a smooth activation, whose inputs a backward needs in full, where a mask has one bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinytl.errors import BudgetError, InputError

from .again import stretches
from .arena import constant_bytes, lay_out, least_bytes
from .by_role import bytes_by_role
from .cost import multiply_adds
from .differentiate import training_program
from .liveness import lifetimes, timeline
from .program import Program
from .step_options import StepOptions

PACKING = 32
"""Multiply-adds that take as long as to bring one value of a weight into the kernels' order, both ways."""
NEEDS_INPUTS = ("group_norm", "smooth")
SHARES = (0.3, 0.6, 1.0)
"""Of the stretches that may run again, in the order of bytes freed for a multiply-add."""


@dataclass(frozen=True)
class Way:
    """One way to take a step.

    Attributes:
        micro_batch: images at a time.
        recompute: numbers of the stretches that run again.
        updates: 'end' or 'backward'.
        joined: numbers of the stretches that run again as one with the stretch before them.
        cost: what it takes more than another, in multiply-adds of a batch.
    """

    micro_batch: int
    recompute: frozenset[int]
    updates: str
    joined: frozenset[int]
    cost: float

    def is_at_least(self, other: Way) -> bool:
        """Whether it cannot take less memory than the other: as many images at once, and no more runs again."""
        later = self.updates == other.updates or self.updates == "end"
        return (
            later
            and self.joined == other.joined
            and self.micro_batch >= other.micro_batch
            and self.recompute <= other.recompute
        )


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
        options: of which `micro_batch`, `evaluate_images`, `recompute` and `updates` are chosen here.
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
    network = _Network(captured, options)
    if budget_bytes is None:
        size = micro_batch or 1
        cheap = [Way(size, network.dear, updates or "end", joined, 0.0) for joined in _joins(network.dear)]
        return _finished(captured, options, min(cheap, key=network.bytes), network, None)
    refused: list[Way] = []
    ways = sorted(_ways(network, options.batch, micro_batch, updates), key=lambda way: way.cost)
    fewest = min(way.micro_batch for way in ways)
    for way in ways:
        if any(way.is_at_least(other) for other in refused):
            continue
        # an image at a time takes least: where that does not fit, more need not be tried; but updates in backward may
        # take less than any step that holds all gradients at its end
        first = () if way.updates == "backward" else (replace(way, micro_batch=fewest, updates="end"),)
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


class _Network:
    """What is known of a captured network's stretches.

    Attributes:
        dear: numbers of the stretches that hold a group norm or a smooth activation.
        order: numbers of all that may run again, those that free most bytes for a multiply-add first.
        cost: multiply-adds of each stretch for one image.
        weights: values of all weights that multiply.
    """

    def __init__(self, captured: Program, options: StepOptions) -> None:
        self._captured, self._options = captured, options
        self._steps: dict[Way, Program] = {}
        of_each = stretches(captured)
        stream = captured.streams["evaluate"]
        self.names: dict[int, str] = {}
        self.cost: dict[int, int] = {}
        self._of_layer: dict[tuple[str, int], int] = {}
        for one, stretch in zip(stream, of_each, strict=True):
            self.cost[stretch] = self.cost.get(stretch, 0) + multiply_adds(captured, one)
            name = f"block {one.block}" if one.block >= 0 else one.layer
            self.names[stretch] = self.names.get(stretch) or name
            self._of_layer.setdefault((one.layer, one.block), stretch)
        self.dear = frozenset(s for one, s in zip(stream, of_each, strict=True) if one.op in NEEDS_INPUTS)
        self.weights = sum(
            captured.tensors[number].elements
            for number in {one.operand("w") for one in stream if one.op == "conv"}
            if number is not None
        )
        kept = self._kept()
        self.order = sorted((s for s in self.cost if kept.get(s)), key=lambda s: (-kept[s] / max(self.cost[s], 1), s))

    def _kept(self) -> dict[int, int]:
        """Bytes an image that each stretch keeps from forward for backward, where nothing runs again."""
        one_image = replace(self._options, batch=1, micro_batch=1, evaluate_images=1, recompute=frozenset())
        step = training_program(self._captured, replace(one_image, updates="end"))
        order, times = timeline(step), lifetimes(step)
        found: dict[int, int] = {}
        for stream, one in order:
            stretch = self._of_layer.get((one.layer, one.block))
            if stream != "micro" or one.phase != "forward" or stretch is None:
                continue
            for number in one.makes():
                if any(order[last][1].phase != "forward" for _, last in times.get(number, ())):
                    found[stretch] = found.get(stretch, 0) + step.tensors[number].bytes(step)
        return found

    def step(self, way: Way) -> Program:
        """The training step taken that way, not laid out."""
        if way not in self._steps:
            self._steps[way] = training_program(self._captured, _options(self._options, way))
        return self._steps[way]

    def bytes(self, way: Way) -> int:
        """The least that it takes."""
        step = self.step(way)
        return least_bytes(step, self._options.threads) + constant_bytes(step)


def _options(options: StepOptions, way: Way) -> StepOptions:
    return replace(
        options,
        micro_batch=way.micro_batch,
        evaluate_images=1,
        recompute=way.recompute,
        joined=way.joined,
        updates=way.updates if way.micro_batch == options.batch else "end",
    )


def _ways(network: _Network, batch: int, micro_batch: int | None, updates: str | None) -> Iterator[Way]:
    """All that is considered."""
    sizes = [micro_batch] if micro_batch else [size for size in range(1, batch + 1) if batch % size == 0]
    count = len(network.order)
    sets = {frozenset[int](), network.dear, *(frozenset(network.order[: math.ceil(s * count)]) for s in SHARES)}
    sets |= {network.dear | frozenset(network.order[: math.ceil(s * count)]) for s in SHARES}
    for size in sizes:
        kinds = ["end", "backward"] if size == batch else ["end"]
        for recompute in sorted(sets, key=sorted):
            again = sum(network.cost[stretch] for stretch in recompute)
            cost = batch * again + math.ceil(batch / size) * network.weights * PACKING
            # updates in backward cost no time, but change some parameters before another gradient is seen
            for place, kind in enumerate(kinds):
                if updates in (None, kind):
                    yield from (Way(size, recompute, kind, joined, cost + place) for joined in _joins(recompute))


def _joins(recompute: frozenset[int]) -> list[frozenset[int]]:
    """Stretches to join: none, or the network's first two, between which the largest image of all may lie."""
    return [frozenset(), frozenset({1})] if {0, 1} <= recompute else [frozenset()]


def _finished(
    captured: Program, options: StepOptions, way: Way, network: _Network, budget_bytes: int | None
) -> Program:
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
