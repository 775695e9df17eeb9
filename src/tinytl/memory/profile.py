"""One training step of one method, every figure about it: counted, kept, measured, and stock PyTorch beside it.

Stock is the same method in plain PyTorch (`adapt_(..., lean=False)`): same parameters train, same frozen statistics.
It is measured in both memory layouts, and the lower bytes and the lower time are reported, so that the comparison is
with stock at its best (the fresh processes that tell the resident set run it contiguous). What is compared is timed in
turns, so that a machine that slows down slows down for all.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tinytl._options import number_of_bytes
from tinytl._threads import threads
from tinytl.methods import Adaptation
from tinytl.nn.execution import set_execution_
from tinytl.nn.kept import Kept, kept
from tinytl.ops._native import KERNELS

from .counted import Counted, count
from .measured import Measured, measure_step, resident_tensors, training_step
from .plan import StepPlan
from .planner import Planned, plan_step
from .rss import rss_delta
from .step import StepSpec, build_batch, build_network, build_optimizer

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass(frozen=True)
class Candidate:
    """One network ready to take the step, in one memory layout."""

    name: str
    step: Callable[[], None]
    measured: Measured


@dataclass(frozen=True)
class Figures:
    """What one engine measured.

    Attributes:
        measured: bytes of the layout with the lower peak.
        step_seconds: median of the layout with the lower median.
        spread: (fastest, slowest) repeat of that layout.
        layout: that layout.
        rss_delta_bytes: what the process grew by during its first step, in a fresh process; None where the system
            does not tell, or where it was not asked for.
    """

    measured: Measured
    step_seconds: float | None
    spread: tuple[float, float] | None
    layout: str
    rss_delta_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """As the command line prints it."""
        return {
            "peak_bytes": self.measured.peak_bytes,
            "step_peak_bytes": self.measured.step_peak_bytes,
            "resident_bytes": self.measured.resident_bytes,
            "rss_delta_bytes": self.rss_delta_bytes,
            "step_seconds": self.step_seconds,
            "step_seconds_spread": None if self.spread is None else list(self.spread),
            "layout": self.layout,
        }


@dataclass(frozen=True)
class Profile:
    """All figures of one step.

    Attributes:
        spec: the step.
        counted: by the paper's rule, for one micro-batch.
        kept: by the operations' rules, for one micro-batch.
        planned: how the step is taken, and the whole of it, described without running it.
        adaptation: what adapt_ did.
        lean, stock: measured; stock only where it was asked for.
        compiled: whether the compiled passes were there.
        threads: that computed.
        planning_seconds: that the plan took.
    """

    spec: StepSpec
    counted: Counted
    kept: Kept
    planned: Planned
    adaptation: Adaptation
    lean: Figures
    stock: Figures | None
    compiled: bool
    threads: int
    planning_seconds: float

    def to_json(self) -> dict[str, Any]:
        """As `tinytl profile --json` prints it; all bytes and seconds."""
        found: dict[str, Any] = {
            **{key: value for key, value in dataclasses.asdict(self.spec).items() if key != "lean"},
            "threads": self.threads,
            "torch": torch.__version__,
            "compiled_passes": self.compiled,
            "counted": self.counted.total_bytes,
            "counted_detail": dataclasses.asdict(self.counted),
            "kept_bytes": self.kept.total_bytes,
            "gradient_bytes": self.adaptation.trained_elements * 4,
            "trained_elements": self.adaptation.trained_elements,
            "frozen_elements": self.adaptation.frozen_elements,
            "planned": {
                "peak_bytes": self.planned.peak_bytes,
                "step_peak_bytes": self.planned.step.step_peak_bytes,
                "resident_bytes": self.planned.step.resident_bytes,
                "at_peak": self.planned.step.at_peak(),
                "budget_bytes": self.planned.budget_bytes,
                "plan": self.planned.plan.to_json(),
                "seconds_to_plan": self.planning_seconds,
            },
            "measured": self.lean.to_json(),
        }
        if self.stock is not None:
            found["stock"] = {"measured": self.stock.to_json()}
        return found


def profile_step(spec: StepSpec, *, compare_stock: bool = False, repeats: int = 5, rss: bool = True) -> Profile:
    """Take the step of `spec` and gather its figures. Weights and images are random, which no figure depends on.

    Args:
        spec: the step; its `lean` is ignored.
        compare_stock: measure stock PyTorch too, in turns.
        repeats: timed steps of each candidate, after one that warms up and one that is watched; 0: no times.
        rss: also start a fresh process for each engine to read its resident set.

    Raises:
        InputError: unknown names, or numbers that cannot be.
    """
    spec.check()
    with threads(spec.threads):
        return _profile(spec, compare_stock, repeats, rss)


def _profile(spec: StepSpec, compare_stock: bool, repeats: int, rss: bool) -> Profile:
    model, adaptation = build_network(replace(spec, lean=True))
    begun = time.perf_counter()
    planned = plan_network(spec, model, adaptation)
    planning_seconds = time.perf_counter() - begun
    size = planned.plan.micro_batch
    counted = count(build_network(replace(spec, lean=False))[0], spec.shape(size))
    set_execution_(model, planned.plan.policies)
    ledger = kept(model, spec.shape(size))
    spec = replace(spec, micro_batch=size, update=planned.plan.update)
    lean = [_make_candidate("channels-last", model, replace(spec, lean=True), torch.channels_last)]
    stock: list[Candidate] = []
    if compare_stock:
        stock = [candidate(replace(spec, lean=False), layout) for layout in stock_layouts(spec)]
    seconds = in_turns([*lean, *stock], repeats)
    return Profile(
        spec=spec,
        counted=counted,
        kept=ledger,
        planned=planned,
        adaptation=adaptation,
        lean=_figures(lean, seconds[:1], _rss(replace(spec, lean=True), planned.plan, rss)),
        stock=_figures(stock, seconds[1:], _rss(replace(spec, lean=False), None, rss)) if stock else None,
        compiled=KERNELS is not None,
        threads=torch.get_num_threads(),
        planning_seconds=planning_seconds,
    )


def plan_network(spec: StepSpec, model: nn.Module, adaptation: Adaptation) -> Planned:
    """How to take the step of `spec` with the lean network that was built for it: within its budget, if it has one.

    Raises:
        BudgetError: no plan fits the budget.
    """
    budget = None if spec.memory_budget is None else number_of_bytes("memory_budget", spec.memory_budget)
    return plan_step(
        model,
        spec.shape(spec.batch_size),
        blocks=adaptation.blocks,
        budget_bytes=budget,
        optimizer=functools.partial(build_optimizer, spec),
        micro_batch=spec.micro_batch,
        update=None if spec.update == "end" and budget is not None else spec.update,
    )


def stock_layouts(spec: StepSpec) -> list[str]:
    """The layouts in which stock PyTorch can take the step.

    Not channels-last with group norm: torch 2.13's CPU kernel of its backward crashes the process where the norm trains
    and its input needs no gradient, as behind a frozen first convolution.
    """
    return [name for name in LAYOUTS if spec.norm != "gn" or name == "contiguous"]


def candidate(spec: StepSpec, layout: str) -> Candidate:
    """The step of `spec` (lean or stock, as it says) in one of `LAYOUTS`, warmed up and watched once."""
    return _make_candidate(layout, build_network(spec)[0], spec, LAYOUTS[layout])


def _make_candidate(name: str, model: nn.Module, spec: StepSpec, memory_format: torch.memory_format) -> Candidate:
    if not spec.lean:
        model = model.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    images, labels = build_batch(spec, memory_format)
    optimizer = build_optimizer(spec, model.parameters())
    step = training_step(model, images, labels, optimizer, spec.micro_batch, update=spec.update)
    step()  # so that the optimizer's state is there
    return Candidate(name, step, measure_step(step, resident_tensors(model, optimizer, images, labels)))


def in_turns(candidates: list[Candidate], repeats: int) -> list[list[float]]:
    """Seconds of each repeat of each candidate, taken in turns after one turn that is not counted."""
    seconds: list[list[float]] = [[] for _ in candidates]
    for turn in range(repeats + 1 if repeats else 0):
        for mine, candidate in zip(seconds, candidates, strict=True):
            start = time.perf_counter()
            candidate.step()
            if turn:
                mine.append(time.perf_counter() - start)
    return seconds


def _figures(candidates: list[Candidate], seconds: list[list[float]], rss_bytes: int | None) -> Figures:
    lowest = min(candidates, key=lambda candidate: candidate.measured.step_peak_bytes)
    if not seconds[0]:
        return Figures(lowest.measured, None, None, lowest.name, rss_bytes)
    medians = [statistics.median(times) for times in seconds]
    fastest = medians.index(min(medians))
    spread = (min(seconds[fastest]), max(seconds[fastest]))
    return Figures(lowest.measured, medians[fastest], spread, candidates[fastest].name, rss_bytes)


def _rss(spec: StepSpec, plan: StepPlan | None, wanted: bool) -> int | None:
    found = rss_delta(spec, plan) if wanted else None
    return None if found is None else int(found["rss_delta_bytes"])
