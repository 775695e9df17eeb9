"""The paper's table of memory, beside what is planned and what is measured: one row a method.

    rows = [table_row(step) for step in table_steps(StepSpec("proxylessnas_mobile", "tinytl-l+b"))]
    rows[3].published_mb, rows[3].counted.total_bytes, rows[3].planned.peak_bytes, rows[3].measured.peak_bytes

What each column includes:

    published       the next one, rounded to MB
    counted         weights (trained 32 bits, frozen 8) and activations of the forward pass, by the paper's rule; no
                    gradients, no optimizer state, no input
    without lite    the same, of the network that the method itself makes
    planned         all that is alive at the worst instant: weights as they are held, gradients, optimizer state, what
                    is kept for backward, the working set of forward, backward and update, the input
    measured        the same, as PyTorch's allocator saw it in a step that was taken
    stock           measured of the same step in plain PyTorch, in the memory layout with the lower peak

**With lite modules and without.** The paper counted every method on ProxylessNAS-Mobile with the lite residual modules
already in. Where a method does not train them they are ballast, 1.8 MB at 8 bits; but FT-Norm+Last's and FT-Full's
published counts only come out where the modules' norms, and all of them, train as well (192.4 and 390.8; frozen they
would be 184.9 and 368.9). `counted` is as published, `counted_without_lite` is the network that anybody would train.
The other networks were counted without lite modules, and there the two are the same.

Source: Cai et al., NeurIPS 2020 (arXiv 2007.11622), tables 2 and 3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tinytl._threads import threads
from tinytl.backbones import load
from tinytl.methods import Full, LiteResidual, Norm, adapt_, method
from tinytl.nn.execution import set_execution_

from .counted import Counted, count
from .measured import Measured, measure_step, resident_tensors, training_step
from .planner import Planned
from .profile import LAYOUTS, plan_network, stock_layouts
from .step import StepSpec, build_batch, build_network, build_optimizer

METHODS = ("ft-last", "tinytl-b", "tinytl-l", "tinytl-l+b", "tinytl-l+b@320", "ft-norm+last", "ft-full")
"""The rows, as table 2 orders them; `@320` is the resolution."""

RESOLUTION, BATCH, CLASSES = 224, 8, 102
"""What the paper's figures are of: pixels a side unless marked, images a step, and Flowers' classes."""

PUBLISHED_MB: dict[str, dict[str, int]] = {
    "proxylessnas_mobile": dict(zip(METHODS, (31, 32, 37, 37, 65, 192, 391), strict=True)),
    "mobilenet_v2_140": {"ft-full": 644},
    "resnet50": {"ft-full": 802},
}
"""Tables 2 and 3, in whole MB."""

REFERENCE_MB: dict[str, dict[str, tuple[float, float | None, float | None]]] = {
    "proxylessnas_mobile": {
        "ft-last": (30.8, 8.4, 29.0),
        "tinytl-b": (31.7, 8.5, 29.9),
        "tinytl-l": (37.1, 13.9, None),
        "tinytl-l+b": (37.1, 14.0, None),
        "tinytl-l+b@320": (64.7, 17.4, None),
        "ft-norm+last": (192.4, 28.7, 183.0),
        "ft-full": (390.8, 65.5, 367.0),
    },
    "mobilenet_v2": {
        "ft-last": (47.7, None, None),
        "ft-norm+last": (224.6, None, None),
        "ft-full": (447.7, None, None),
    },
    "mobilenet_v2_140": {
        "ft-last": (72.5, None, None),
        "ft-norm+last": (323.0, None, None),
        "ft-full": (644.2, None, None),
    },
    "resnet50": {
        "ft-last": (88.6, None, None),
        "ft-norm+last": (393.7, None, None),
        "ft-full": (805.3, None, None),
    },
}
"""What the authors' own profiler gives, in MB: batch 8 and batch 1 as published, batch 8 without lite modules.

ResNet-50's last is off (see `tinytl.memory.counted`): the rule gives 804.4."""

_COUNTED_WITH_LITE = ("proxylessnas_mobile",)


@dataclass(frozen=True, eq=False)
class TableRow:
    """All figures of one method; None where there is none.

    Attributes:
        name: the method as the command line names it, with `@320` where the row is marked so.
        step: the step that they are of, lean.
        published_mb: in the paper's tables, MB.
        reference_mb: by the authors' own profiler, MB to one digit (`REFERENCE_MB`).
        counted: by the paper's rule, for one micro-batch, the network as the paper had it.
        counted_without_lite: the same with no lite modules; None for the methods that are made of them.
        planned: how the step is taken, and the whole of it, described without running it.
        measured, stock: lean, and plain PyTorch.
        stock_layout: the memory layout in which stock's peak was lower.
    """

    name: str
    step: StepSpec
    published_mb: int | None
    reference_mb: float | None
    counted: Counted
    counted_without_lite: Counted | None
    planned: Planned
    measured: Measured | None
    stock: Measured | None
    stock_layout: str | None

    def to_json(self) -> dict[str, Any]:
        """As `tinytl table --json` prints it; bytes, and MB where the name says so."""
        about = {key: value for key, value in dataclasses.asdict(self.step).items() if key not in ("lean", "threads")}
        return {
            **about,
            "method": self.name,
            "published_mb": self.published_mb,
            "reference_mb": self.reference_mb,
            "counted_bytes": self.counted.total_bytes,
            "counted_without_lite_bytes": None
            if self.counted_without_lite is None
            else self.counted_without_lite.total_bytes,
            "planned_bytes": self.planned.peak_bytes,
            "measured_bytes": None if self.measured is None else self.measured.peak_bytes,
            "stock_measured_bytes": None if self.stock is None else self.stock.peak_bytes,
            "stock_layout": self.stock_layout,
        }


def table_steps(base: StepSpec, resolution: int | None = None) -> list[StepSpec]:
    """The table's steps, in its order: `base` with each method.

    At `resolution`; None: the paper's, and for the network of its table 2 the row at 320 px as well.

    Raises:
        InputError: numbers in `base` that cannot be.
    """
    steps = []
    for name in METHODS:
        chosen, _, marked = name.partition("@")
        if marked and (resolution is not None or base.backbone not in _COUNTED_WITH_LITE):
            continue
        pixels = int(marked or RESOLUTION) if resolution is None else resolution
        steps.append(replace(base, method=chosen, resolution=pixels))
        steps[-1].check()
    return steps


def table_row(step: StepSpec, *, measure: bool = True, stock: bool = True) -> TableRow:
    """Count, plan and measure one step. Weights and images are random, which no byte depends on.

    Args:
        step: its `lean` is ignored. Where it has a memory budget, it is planned and taken within that; stock PyTorch
            never is, and holds weights and optimizer state at 32 bits.
        measure: take the step; else it is only counted and planned.
        stock: take it in plain PyTorch too, where steps are taken.

    Raises:
        InputError: unknown names, numbers that cannot be, or a budget that no plan fits.
        UnsupportedLayerError: the paper's rule says nothing about a layer of the network.
    """
    step.check()
    with threads(step.threads):
        return _row(replace(step, lean=True), measure, measure and stock)


def row_name(step: StepSpec) -> str:
    """One of `METHODS`: the step's method, with its resolution where the paper's table marks it so."""
    marked = f"{step.method}@{step.resolution}"
    return marked if marked in METHODS else step.method


def counted_as_published(step: StepSpec) -> Counted:
    """By the paper's rule, one micro-batch of the network as the paper counted it (see the module's docstring)."""
    if step.backbone in _COUNTED_WITH_LITE and not _makes_lite(step):
        return count(_with_lite(step), step.shape(_at_a_time(step)))
    return counted_by_itself(step)


def counted_by_itself(step: StepSpec) -> Counted:
    """By the paper's rule, one micro-batch of the network that the method itself makes."""
    return count(build_network(_plain(step))[0], step.shape(_at_a_time(step)))


def _row(step: StepSpec, measure: bool, stock: bool) -> TableRow:
    lean, adaptation = build_network(step)
    planned = plan_network(step, lean, adaptation)
    if step.memory_budget is not None:
        step = replace(step, micro_batch=planned.plan.micro_batch, update=planned.plan.update)
    set_execution_(lean, planned.plan.policies)
    measured = _measure(lean, step, "channels-last") if measure else None
    del lean  # two networks at a time are one too many on a small machine
    plain, _ = build_network(_plain(step))
    own = count(plain, step.shape(_at_a_time(step)))
    layouts = {layout: _measure(plain, _plain(step), layout) for layout in stock_layouts(step)} if stock else {}
    lowest = min(layouts, key=lambda layout: layouts[layout].peak_bytes, default=None)
    inserted = step.backbone in _COUNTED_WITH_LITE and not _makes_lite(step)
    return TableRow(
        name=row_name(step),
        step=step,
        published_mb=_published(step),
        reference_mb=_reference(step),
        counted=counted_as_published(step) if inserted else own,
        counted_without_lite=None if _makes_lite(step) else own,
        planned=planned,
        measured=measured,
        stock=None if lowest is None else layouts[lowest],
        stock_layout=lowest,
    )


def _plain(step: StepSpec) -> StepSpec:
    """The same step in plain PyTorch: weights and optimizer state at 32 bits, updates at the end."""
    bits: dict[str, Any] = {"frozen_bits": 32, "codebook": False, "optimizer_bits": 32}
    return replace(step, lean=False, update="end", memory_budget=None, **bits)


def _at_a_time(step: StepSpec) -> int:
    return step.batch_size if step.micro_batch is None else step.micro_batch


def _makes_lite(step: StepSpec) -> bool:
    return method(step.method).part(LiteResidual) is not None


def _is_the_papers(step: StepSpec) -> bool:
    marked = "@" in row_name(step)
    return (marked or step.resolution == RESOLUTION) and step.classes == CLASSES and not step.last_blocks


def _published(step: StepSpec) -> int | None:
    if not _is_the_papers(step) or _at_a_time(step) != BATCH:
        return None
    return PUBLISHED_MB.get(step.backbone, {}).get(row_name(step))


def _reference(step: StepSpec) -> float | None:
    column = {BATCH: 0, 1: 1}.get(_at_a_time(step))
    if not _is_the_papers(step) or column is None:
        return None
    return REFERENCE_MB.get(step.backbone, {}).get(row_name(step), (None, None, None))[column]


def _with_lite(step: StepSpec) -> nn.Module:
    """The stock network with lite modules beside its blocks, for a method that makes none."""
    with torch.random.fork_rng(devices=[]):
        model = load(step.backbone, pretrained=False, norm=step.norm, num_classes=step.classes, lite=True).model
    chosen = method(step.method, last_blocks=step.last_blocks)
    adapt_(model, chosen, resolution=step.resolution, lean=False)
    if not any(chosen.part(part) for part in (Norm, Full)):
        for name, parameter in model.named_parameters():
            if ".lite." in name:  # TinyTL-B would train their biases
                parameter.requires_grad_(False)
    return model


def _measure(model: nn.Module, step: StepSpec, layout: str) -> Measured:
    """One step, after one that makes the optimizer's state. Bytes are exact: it is taken once."""
    if not step.lean:
        model.to(memory_format=LAYOUTS[layout])  # pyright: ignore[reportCallIssue]
    images, labels = build_batch(step, LAYOUTS[layout])
    optimizer = build_optimizer(step, model.parameters())
    take = training_step(model, images, labels, optimizer, step.micro_batch, update=step.update)
    take()
    return measure_step(take, resident_tensors(model, optimizer, images, labels))
