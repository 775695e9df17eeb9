"""The ways to take a step that planning considers, and what each takes: bytes, and a rough cost.

What every way computes is the same, so that a cost is what one takes more than another:

    seconds ~ batch x (multiply-adds that run again) + (values of weights, each time they are used) x PACKING

Weights are brought into the kernels' order once a micro-batch, or once a tile, in forward and in backward, and the rows
of small images are many enough only together; that is about the cost of some dozens of multiply-adds a value. So more
micro-batches come before anything that runs again, and tiles of the first layers, whose weights are few and whose
images are large, before more micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product

from .again import stretches
from .arena import constant_bytes, least_bytes
from .cost import multiply_adds
from .differentiate import training_program
from .liveness import lifetimes, timeline
from .program import Instruction, Program
from .step_options import StepOptions
from .tiles import early_ranges, tiled

PACKING = 64
"""Multiply-adds that take as long as to begin anew with one value of a weight, both ways."""
NEEDS_INPUTS = ("group_norm", "smooth")
SHARES = (0.3, 0.6, 1.0)
"""Of the stretches that may run again, in the order of bytes freed for a multiply-add."""


@dataclass(frozen=True)
class Way:
    """One way to take a step.

    Attributes:
        micro_batch: images at a time.
        early: how many of the first stretches run in tiles of one image.
        recompute: numbers of the stretches that run again.
        updates: 'end' or 'backward'.
        joined: numbers of the stretches that run again as one with the stretch before them.
        cost: what it takes more than another, in multiply-adds of a batch.
    """

    micro_batch: int
    recompute: frozenset[int]
    updates: str
    joined: frozenset[int]
    early: int
    cost: float

    def is_at_least(self, other: Way) -> bool:
        """Whether it cannot take less memory than the other: the same with as many images at once.

        What runs again says nothing by itself: less is kept, and more is alive where it is made again.
        """
        later = self.updates == other.updates or self.updates == "end"
        return (
            later
            and (self.early == other.early or other.micro_batch == 1)
            and self.joined == other.joined
            and self.micro_batch >= other.micro_batch
            and self.recompute == other.recompute
        )


class Network:
    """What is known of a captured network's stretches.

    Attributes:
        dear: numbers of the stretches that hold a group norm or a smooth activation.
        order: numbers of all that may run again, those that free most bytes for a multiply-add first.
        cost: multiply-adds of each stretch for one image.
        weights: values of the weights of each that multiply.
    """

    def __init__(self, captured: Program, options: StepOptions) -> None:
        self._captured, self._options = captured, options
        self._steps: dict[StepOptions, Program] = {}
        self._bytes: dict[tuple[StepOptions, int], int] = {}
        of_each = stretches(captured)
        stream = captured.streams["evaluate"]
        self.names: dict[int, str] = {}
        self.cost: dict[int, int] = {}
        places: dict[tuple[str, int], set[int]] = {}
        sides: dict[int, int] = {}
        self.weights: dict[int, int] = {}
        for one, stretch in zip(stream, of_each, strict=True):
            self.cost[stretch] = self.cost.get(stretch, 0) + multiply_adds(captured, one)
            name = f"block {one.block}" if one.block >= 0 else one.layer
            self.names[stretch] = self.names.get(stretch) or name
            places.setdefault((one.layer, one.block), set()).add(stretch)
            if one.op == "conv":
                weight, y = one.operand("w"), one.operand("y")
                assert weight is not None
                assert y is not None
                self.weights[stretch] = self.weights.get(stretch, 0) + captured.tensors[weight].elements
                sides[stretch] = captured.tensors[y].shape[0]
        # what no layer's name is said of may stand in several stretches
        self._of_layer = {key: next(iter(found)) for key, found in places.items() if len(found) == 1}
        rows = sorted(sides)
        self._shrinking = [b + 1 for a, b in pairwise(rows) if 1 < sides[b] < sides[a]]
        self.dear = frozenset(s for one, s in zip(stream, of_each, strict=True) if one.op in NEEDS_INPUTS)
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

    def early(self, micro_batch: int) -> list[int]:
        """How many first stretches may run in tiles: none, or up to one behind which images are smaller."""
        return [0, *self._shrinking] if micro_batch > 1 else [0]

    def passes(self, way: Way, batch: int) -> int:
        """Values of weights times how often a step begins anew with them."""
        early = sum(values for stretch, values in self.weights.items() if stretch < way.early)
        return batch * early + math.ceil(batch / way.micro_batch) * (sum(self.weights.values()) - early)

    def step(self, way: Way) -> Program:
        """The training step taken that way, not laid out."""
        options = options_of(self._options, way)
        if options not in self._steps:
            self._steps[options] = training_program(self._captured, options)
        step = self._steps[options]
        if not way.early:
            return step
        return tiled(step, early_ranges(step, lambda one: self._is_early(one, way.early)), 1)

    def _is_early(self, one: Instruction, early: int) -> bool:
        stretch = self._of_layer.get((one.layer, one.block))
        return stretch is not None and stretch < early

    def bytes(self, way: Way) -> int:
        """The least that it takes."""
        key = (options_of(self._options, way), way.early)
        if key not in self._bytes:
            step = self.step(way)
            self._bytes[key] = least_bytes(step, self._options.threads) + constant_bytes(step)
        return self._bytes[key]


def options_of(options: StepOptions, way: Way) -> StepOptions:
    """What `training_program` takes for that way; its tiles come after."""
    return replace(
        options,
        micro_batch=way.micro_batch,
        evaluate_images=1,
        recompute=way.recompute,
        joined=way.joined,
        updates=way.updates if way.micro_batch == options.batch else "end",
    )


def all_ways(network: Network, batch: int, micro_batch: int | None, updates: str | None) -> Iterator[Way]:
    """All that is considered."""
    sizes = [micro_batch] if micro_batch else [size for size in range(1, batch + 1) if batch % size == 0]
    count = len(network.order)
    sets = {frozenset[int](), network.dear, *(frozenset(network.order[: math.ceil(s * count)]) for s in SHARES)}
    sets |= {network.dear | frozenset(network.order[: math.ceil(s * count)]) for s in SHARES}
    for size in sizes:
        kinds = ["end", "backward"] if size == batch else ["end"]
        for recompute in sorted(sets, key=sorted):
            again = sum(network.cost[stretch] for stretch in recompute)
            for joined, early in product(joins(recompute), network.early(size)):
                way = Way(size, recompute, "end", joined, early, 0.0)
                cost = batch * again + network.passes(way, batch) * PACKING
                # updates in backward cost no time, but change some parameters before another gradient is seen
                for place, kind in enumerate(kinds):
                    if updates in (None, kind):
                        yield replace(way, updates=kind, cost=cost + place)


def joins(recompute: frozenset[int]) -> list[frozenset[int]]:
    """Stretches to join: none, or the network's first two, between which the largest image of all may lie."""
    return [frozenset(), frozenset({1})] if {0, 1} <= recompute else [frozenset()]
