"""The fastest way to take a training step within a memory budget.

What can be chosen, all of it exact: how many images go through the network at a time, which parts of it are run some
images or some rows at a time, which are run again in backward instead of keeping what they made, and where updates are
applied. Plans are tried in the order of their estimated time (`tinytl.memory.estimate`); the first that should fit is
described operator by operator (`tinytl.memory.capture`), and taken if that fits, so that what is promised is the
description and not the estimate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import nn

from tinytl.errors import BudgetError
from tinytl.nn.execution import Execution
from tinytl.nn.lean import LeanGroupNorm

from .capture import Capture, Optimizer
from .description import StepDescription
from .estimate import PROBE, Estimate
from .plan import StepPlan

_ATTEMPTS = 5
_IMAGES, _STRIPS, _LENGTHS = (1, 2, 4), (1, 2, 4), (0, 1, 3, 6)


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan, and the step that it makes.

    Attributes:
        plan: what was chosen.
        peak_bytes: the most that is alive at once in the step.
        describe: describes the whole step.
        seconds: of a step by the planner's rough rule; it orders plans, and tells no clock time.
        unbounded_seconds: of the fastest plan there is, by the same rule.
        budget_bytes: that it was chosen for; None: any.
    """

    plan: StepPlan
    peak_bytes: int
    describe: Callable[[], StepDescription]
    seconds: float
    unbounded_seconds: float
    budget_bytes: int | None

    @cached_property
    def step(self) -> StepDescription:
        """The whole step, described when it is first asked for."""
        return self.describe()

    def lines(self, batch_size: int) -> list[str]:
        """What was chosen, and why, a line each."""
        found = [f"planned: {self.peak_bytes / 1e6:.2f} MB alive at the peak of a step"]
        if self.budget_bytes is not None:
            slower = self.seconds / self.unbounded_seconds
            found[0] += f", of {self.budget_bytes / 1e6:.2f} MB allowed"
            why = (
                "the fastest way there is" if slower < 1.01 else f"about {slower:.2f} times as long as without a budget"
            )
            found.append(f"the fastest plan found that fits: {why}")
        return found + self.plan.lines(batch_size)


def plan_step(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    blocks: Sequence[str],
    budget_bytes: int | None = None,
    optimizer: Optimizer | None = None,
    micro_batch: int | None = None,
    update: str | None = None,
    label_smoothing: float = 0.0,
    beside_bytes: int = 0,
    throw_away: bool = False,
) -> Planned:
    """Choose how to take the step of an adapted `model` on images (N, 3, H, W).

    Args:
        model: left untouched, and without policies of its own.
        input_shape: of the whole batch.
        blocks: paths of its blocks (`Adaptation.blocks`).
        budget_bytes: most bytes alive at once; None: the fastest plan of all.
        optimizer: makes the optimizer from the trained parameters.
        micro_batch, update: fixed, instead of chosen.
        label_smoothing: of the cross entropy.
        beside_bytes: what is alive beside the step all the while (batches that a loader has read ahead).
        throw_away: `model` is on the meta device and nobody needs it afterwards, so that no copy is made of it.

    Raises:
        InputError: nothing trains; BudgetError: no plan fits, and the smallest budget that would do is named.
    """
    describe = _Describe(model, tuple(input_shape), optimizer, label_smoothing, beside_bytes, throw_away)
    batch = input_shape[0]
    if budget_bytes is None:
        plan = StepPlan(min(micro_batch or batch, batch), update or "end")
        return Planned(plan, describe(plan).peak_bytes, partial(describe.whole, plan), 0.0, 0.0, None)
    parts = parts_of(model, blocks)
    estimate = describe.estimate(parts)
    plans = sorted(
        ((estimate.seconds(plan), plan) for plan in _plans(model, estimate, parts, batch, micro_batch, update)),
        key=lambda pair: pair[0],
    )
    smallest: StepDescription | None = None
    for plan in _promising(estimate, plans, budget_bytes):
        step = describe(plan)
        if step.peak_bytes <= budget_bytes:
            whole = partial(describe.whole, plan)
            return Planned(plan, step.peak_bytes, whole, estimate.seconds(plan), plans[0][0], budget_bytes)
        smallest = step if smallest is None or step.peak_bytes < smallest.peak_bytes else smallest
    assert smallest is not None
    raise BudgetError(
        f"memory_budget is {budget_bytes:,} bytes: the least that a step takes here is {smallest.peak_bytes:,} bytes "
        f"({smallest.resident_bytes:,} of them weights, optimizer state and images); give at least that, "
        "a lower resolution, or fewer bits (--frozen-bits 8, --optimizer-bits 8: approximate)",
        smallest.peak_bytes,
    )


def parts_of(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Paths of what a plan may treat apart, in forward order: the blocks, and what stands beside them in a sequence."""
    if not blocks:
        return []
    found: list[str] = []
    for container in dict.fromkeys(path.rpartition(".")[0] for path in blocks):
        module = model.get_submodule(container)
        if isinstance(module, nn.Sequential):
            names = (f"{container}.{name}" if container else name for name, _ in module.named_children())
        else:
            names = (path for path in blocks if path.rpartition(".")[0] == container)
        found += [name for name in names if any(True for _ in model.get_submodule(name).parameters())]
    return found


class _Describe:
    """Describes plans of one step, and the step that estimates are made from."""

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        optimizer: Optimizer | None,
        label_smoothing: float,
        beside_bytes: int,
        throw_away: bool,
    ) -> None:
        self._capture, self._shape = Capture(model, throw_away=throw_away), input_shape
        self._options: dict[str, Any] = {"optimizer": optimizer, "label_smoothing": label_smoothing}
        self._beside_bytes = beside_bytes

    def __call__(self, plan: StepPlan) -> StepDescription:
        """As much of the plan's step as has its peak."""
        return self._step(plan, later_only=True)

    def whole(self, plan: StepPlan) -> StepDescription:
        """All of the plan's step."""
        return self._step(plan, later_only=False)

    def estimate(self, parts: Sequence[str]) -> Estimate:
        """From a pass of many images."""
        shape = (PROBE, *self._shape[1:])
        probe = self._capture.step(shape, StepPlan(PROBE), passes_only=True, **self._options)
        return Estimate(probe, parts, self._shape[0], self._beside_bytes)

    def _step(self, plan: StepPlan, later_only: bool) -> StepDescription:
        return self._capture.step(
            self._shape, plan, beside_bytes=self._beside_bytes, later_only=later_only, **self._options
        )


def _plans(
    model: nn.Module,
    estimate: Estimate,
    parts: Sequence[str],
    batch: int,
    micro_batch: int | None,
    update: str | None,
) -> Iterator[StepPlan]:
    """Every plan that is considered: the first parts, whose images are largest, one way, and all others another."""
    sizes = sorted({-(-batch // pieces) for pieces in range(1, batch + 1)}, reverse=True)
    again = [any(isinstance(m, LeanGroupNorm) for m in model.get_submodule(path).modules()) for path in parts]
    cut = again.index(True) if True in again else len(parts)  # a chain with group norm is not cut into strips
    depths = sorted({*range(min(6, len(parts)) + 1), *range(0, len(parts) + 1, 3), len(parts)})
    for size in sizes if micro_batch is None else [min(micro_batch, batch)]:
        updates = ("end", "backward") if size == batch else ("end",)
        images = (None, *(count for count in _IMAGES if count < size))
        for depth, length in itertools.product(depths, _LENGTHS):
            rest = _run_again(estimate, parts, depth, length)
            if length and not rest:
                continue
            for strips, at_once, rerun in itertools.product(_STRIPS, images, (False, True)):
                how = Execution(at_once, strips, rerun)
                if (depth == 0) != (how == Execution()) or (strips > 1 and depth > min(cut, 4)):
                    continue  # behind the first blocks the rows are too few to be cut
                if rerun and not estimate.saves(0, depth):
                    continue
                first = ((_key(parts, 0, depth), how),) if depth else ()
                for when in updates if update is None else (update,):
                    yield StepPlan(size, when, (*first, *rest))


def _run_again(estimate: Estimate, parts: Sequence[str], begin: int, length: int) -> tuple[tuple[str, Execution], ...]:
    """The parts from `begin` on, `length` at a time, run again in backward where that saves memory; 0: none."""
    if not length:
        return ()
    cuts = [(at, min(at + length, len(parts))) for at in range(begin, len(parts), length)]
    return tuple((_key(parts, at, end), Execution(recompute=True)) for at, end in cuts if estimate.saves(at, end))


def _key(parts: Sequence[str], begin: int, end: int) -> str:
    return parts[begin] if end == begin + 1 else f"{parts[begin]}:{parts[end - 1]}"


def _promising(estimate: Estimate, plans: list[tuple[float, StepPlan]], budget: int) -> Iterator[StepPlan]:
    """Plans worth describing: the fastest that should fit, then faster to smaller ones, and last the smallest."""
    peaks: dict[StepPlan, int] = {}
    tried: set[StepPlan] = set()
    target = budget
    for _ in range(_ATTEMPTS):
        for _, plan in plans:
            peak = peaks.get(plan)
            if peak is None:
                peak = peaks[plan] = estimate.peak_bytes(plan)
            if peak <= target and plan not in tried:
                tried.add(plan)
                yield plan
                target = peak - (budget // 200)  # it did not fit: the next is estimated clearly below it
                break
        else:
            break
    for _, plan in plans:
        peaks.setdefault(plan, estimate.peak_bytes(plan))
    yield from [plan for plan in sorted(peaks, key=peaks.__getitem__)[:_ATTEMPTS] if plan not in tried]
