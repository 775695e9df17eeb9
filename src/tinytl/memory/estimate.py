"""What a plan would cost, worked out from one description of the step instead of a new one for every plan.

The description is of one micro-batch of `PROBE` images. That is a prime, so a piece of memory that grows with the batch
is told by its size. From it follows, for any plan and a part of the network at a time:

- resident memory and gradients: as they are;
- what a part keeps: as many images as the micro-batch has; none if it is run again, but its input then;
- what a part works with and drops: as many images as it is given at a time, less where it is cut into strips;
- what one part hands to the next: as many images as the micro-batch has.

This picks plans; it is no promise. The plan that is picked is described itself, and that is what is told and kept to.
Seconds are rougher still: so much for a call, for a multiply-add and for a byte, on a laptop's core.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinytl.nn.execution import Execution

from .by_block import part_of
from .description import RESIDENT, StepDescription
from .plan import StepPlan

PROBE = 61
_CALL_SECONDS = 20e-6
_MULTIPLY_ADDS_A_SECOND = 4e10
_BYTES_A_SECOND = 8e9
_UPDATE_SECONDS = 1e-4  # of one parameter in backward, beside what it costs at the end
_HALO = 0.08  # of a part's rows, that a strip computes beside its own


@dataclass(frozen=True)
class _Run:
    """Neighbouring parts, as one part: when they run, and what changes if they are run otherwise.

    `inside`, `kept`: (operations,) bytes of one image, alive while each operation runs.
    """

    forward: slice
    backward: slice
    inside: np.ndarray
    kept: np.ndarray
    input_bytes: float  # of one image
    gradient_bytes: float
    calls: tuple[int, int]  # forward, backward
    seconds: tuple[float, float]  # of one image, beside the calls


class Estimate:
    """The described step of one micro-batch of `PROBE` images, taken apart.

    Args:
        step: so described, without an update.
        parts: paths of the parts of the network that a plan may treat apart, in forward order.
        batch_size: images a step.
        beside_bytes: alive beside the real step all the while.
    """

    def __init__(self, step: StepDescription, parts: Sequence[str], batch_size: int, beside_bytes: int = 0) -> None:
        self.paths, self.batch_size = list(parts), batch_size
        self.resident_bytes = beside_bytes + sum(
            storage.bytes * batch_size // PROBE if storage.role == "input" else storage.bytes
            for storage in step.storages
            if storage.role in RESIDENT
        )
        ops = step.operations
        at = {path: i for i, path in enumerate(parts)}
        layers = {op.layer for op in ops}
        number = {layer: at.get(part_of(layer, parts), -1) for layer in layers}
        self._owner = np.array([number[op.layer] for op in ops])
        self._backward = np.array([op.phase == "backward" for op in ops])
        count = len(ops)
        passing = [storage for storage in step.storages if storage.role not in RESIDENT]
        self._born = np.array([storage.born for storage in passing])
        self._dies = np.array([count if storage.dies is None else storage.dies for storage in passing])
        sizes = np.array([storage.bytes for storage in passing], dtype=np.float64)
        gradient = np.array([storage.role == "gradient" for storage in passing])
        self._is_gradient = gradient
        self._grows = (sizes % PROBE == 0) & ~gradient
        self._is_kept = np.array([storage.role == "kept" for storage in passing])
        self._sizes = np.where(self._grows, sizes / PROBE, sizes)
        workspace = np.array([op.workspace_bytes for op in ops], dtype=np.float64)
        self._fixed = self._alive(~self._grows & ~gradient) + workspace
        self._growing = self._alive(self._grows)
        self._gradients = self._alive(gradient)
        self._gradient_bytes = float(sizes[gradient].sum())
        self._one_gradient = np.zeros(count)
        np.maximum.at(self._one_gradient, np.minimum(self._born[gradient], count - 1), sizes[gradient])
        self._cost = _costs(step)
        self._runs: dict[tuple[int, int], _Run] = {}
        rest = self._owner < 0
        self._rest = [self._sum(rest & ~self._backward), self._sum(rest & self._backward)]

    def seconds(self, plan: StepPlan) -> float:
        """Roughly, of one step."""
        sizes = _pieces(self.batch_size, plan.micro_batch)
        total = sum(calls * _CALL_SECONDS * len(sizes) + cost * self.batch_size for calls, cost in self._rest)
        if plan.update == "backward":
            total += int(self._is_gradient.sum()) * _UPDATE_SECONDS
        for run, how in self._cut(plan):
            times = sum(len(_pieces(size, how.images or size)) for size in sizes) * how.strips
            images = (1 + _HALO * (how.strips - 1)) * self.batch_size
            forward, backward = (
                calls * _CALL_SECONDS * times + cost * images
                for calls, cost in zip(run.calls, run.seconds, strict=True)
            )
            total += forward * (2 if how.recompute else 1) + backward
        return total

    def peak_bytes(self, plan: StepPlan) -> int:
        """The most that is alive at once in that plan's step, roughly."""
        m = min(plan.micro_batch, self.batch_size)
        live = self._growing * m + self._fixed
        for run, how in self._cut(plan):
            if how == Execution():
                continue
            at_once = min(how.images or m, m)
            share = 1 / how.strips + _HALO if how.strips > 1 else 1.0
            live -= run.inside * (m - at_once * share)
            if at_once < m:  # its gradients are summed over the images, and handed on at the end
                live[run.backward] += run.gradient_bytes
            if how.recompute:
                live -= run.kept * m
                live[run.forward.start : run.backward.stop] += run.input_bytes * m
                live[run.backward] += run.kept[run.backward].max(initial=0.0) * at_once
        if m < self.batch_size:
            live += self._gradient_bytes + self._one_gradient
        else:
            live += self._one_gradient if plan.update == "backward" else self._gradients
        return self.resident_bytes + int(live.max())

    def saves(self, begin: int, end: int) -> bool:
        """Whether running these parts again keeps less than they keep."""
        run = self._run(begin, end)
        return run.input_bytes < run.kept.max(initial=0.0)

    def _cut(self, plan: StepPlan) -> list[tuple[_Run, Execution]]:
        """The network's parts as the plan runs them."""
        cut, at = [], 0
        for begin, end, how in sorted(
            (self.paths.index(key.partition(":")[0]), self.paths.index(key.rpartition(":")[2]) + 1, how)
            for key, how in plan.parts
        ):
            cut += [(self._run(i, i + 1), Execution()) for i in range(at, begin)]
            cut.append((self._run(begin, end), how))
            at = end
        return cut + [(self._run(i, i + 1), Execution()) for i in range(at, len(self.paths))]

    def _run(self, begin: int, end: int) -> _Run:
        found = self._runs.get((begin, end))
        if found is None:
            found = self._runs[begin, end] = self._make_run(begin, end)
        return found

    def _make_run(self, begin: int, end: int) -> _Run:
        mine = (self._owner >= begin) & (self._owner < end)
        forward, backward = _bounds(mine & ~self._backward), _bounds(mine & self._backward)
        inside = np.zeros_like(self._grows)
        for span in (forward, backward):
            inside |= (self._born >= span.start) & (self._dies <= span.stop)
        kept = self._is_kept & (self._born >= forward.start) & (self._born < forward.stop)
        entering = ~self._is_kept & (self._born < forward.start) & (self._dies > forward.start)
        (calls_f, seconds_f), (calls_b, seconds_b) = self._sum(mine & ~self._backward), self._sum(mine & self._backward)
        return _Run(
            forward,
            backward,
            self._alive(inside & self._grows & ~self._is_kept),
            self._alive(kept & self._grows),
            float(self._sizes[entering & self._grows].sum()),
            float(self._sizes[self._is_gradient & (self._born >= backward.start) & (self._born < backward.stop)].sum()),
            (calls_f, calls_b),
            (seconds_f, seconds_b),
        )

    def _alive(self, chosen: np.ndarray) -> np.ndarray:
        """Bytes of the chosen storages while each operation runs."""
        change = np.zeros(len(self._owner) + 1)
        np.add.at(change, self._born[chosen], self._sizes[chosen])
        np.subtract.at(change, self._dies[chosen], self._sizes[chosen])
        return np.cumsum(change)[:-1]

    def _sum(self, chosen: np.ndarray) -> tuple[int, float]:
        return int(chosen.sum()), float(self._cost[chosen].sum())


def _costs(step: StepDescription) -> np.ndarray:
    """(operations,) seconds of each for one image, beside the call."""
    found = np.zeros(len(step.operations))
    for i, op in enumerate(step.operations):
        touched = sum(step.storages[number].bytes for number in (*op.inputs, *op.outputs))
        found[i] = op.multiply_adds / _MULTIPLY_ADDS_A_SECOND + touched / _BYTES_A_SECOND
    return found / PROBE


def _bounds(mask: np.ndarray) -> slice:
    found = np.flatnonzero(mask)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _pieces(images: int, size: int) -> list[int]:
    whole, rest = divmod(images, size)
    return list(itertools.repeat(size, whole)) + ([rest] if rest else [])
