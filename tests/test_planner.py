"""A budget that is given is a budget that is kept: plans against steps that were taken, from the least to plenty."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from tests.small_run import NAME, entry, make_spec
from tinytl import run
from tinytl.backbones import BACKBONES
from tinytl.errors import BudgetError, InputError
from tinytl.memory import StepSpec, capture_step, measure_step, profile_step, resident_tensors
from tinytl.memory.estimate import PROBE, Estimate
from tinytl.memory.measured import training_step
from tinytl.memory.plan import StepPlan
from tinytl.memory.planner import Planned, parts_of, plan_step
from tinytl.memory.profile import plan_network
from tinytl.memory.step import build_batch, build_network, build_optimizer, pieces_of
from tinytl.methods import Adaptation
from tinytl.nn.execution import Execution, set_execution_
from tinytl.spec import TrainSpec

SMALL = StepSpec("proxylessnas_mobile", "tinytl-l+b", resolution=64, batch_size=4, classes=5)


@functools.lru_cache(1)
def network(spec: StepSpec) -> tuple[torch.nn.Module, Adaptation]:
    """The network of a step, for plans alone, which leave it as it is: one for all budgets."""
    return build_network(spec)


def planned(spec: StepSpec) -> Planned:
    return plan_network(spec, *network(dataclasses.replace(spec, memory_budget=None)))


def least(spec: StepSpec) -> int:
    """The smallest budget that would do, as the refusal of a budget of nothing names it."""
    with pytest.raises(BudgetError) as refused:
        planned(dataclasses.replace(spec, memory_budget=1))
    least_bytes = refused.value.least_bytes
    assert f"the least that a step takes here is {least_bytes:,} bytes" in str(refused.value)
    return least_bytes


def measured_peak(spec: StepSpec, plan: StepPlan) -> int:
    model, _ = build_network(spec)
    set_execution_(model, plan.policies)
    images, labels = build_batch(spec, torch.channels_last)
    optimizer = build_optimizer(spec, model.parameters())
    step = training_step(model, images, labels, optimizer, plan.micro_batch, update=plan.update)
    step()
    return measure_step(step, resident_tensors(model, optimizer, images, labels)).peak_bytes


@pytest.mark.parametrize(
    ("spec", "shares"),
    [
        (SMALL, (0, 1 / 3, 1)),
        (dataclasses.replace(SMALL, method="tinytl-b", frozen_bits=8), (0, 1)),
        (dataclasses.replace(SMALL, backbone="efficientnet_lite0", norm="gn", optimizer_bits=8), (0, 1 / 2)),
        *(
            pytest.param(dataclasses.replace(SMALL, **other), (0, share), marks=pytest.mark.slow)
            for other, share in (
                ({"backbone": "mbv2_w035", "frozen_bits": 16}, 1),
                ({"backbone": "mobilenet_v2", "method": "ft-full", "optimizer": "sgd"}, 1 / 2),
                ({"backbone": "mobilenet_v3_large"}, 1 / 4),
                ({"backbone": "resnet50", "method": "ft-norm+last"}, 1 / 2),
            )
        ),
    ],
    ids=lambda given: f"{given.backbone}-{given.method}-{given.norm}" if isinstance(given, StepSpec) else "budgets",
)
def test_from_the_least_to_plenty_budgets_are_kept(spec, shares):
    """At shares of the way from the least budget to the plain step's peak."""
    low, high = least(spec), planned(spec).peak_bytes
    assert low < high
    seconds = []
    for share in shares:
        budget = low + int(share * (high - low))
        found = planned(dataclasses.replace(spec, memory_budget=budget))
        peak = measured_peak(spec, found.plan)
        assert peak <= budget
        assert found.peak_bytes == pytest.approx(peak, rel=0.01)
        seconds.append(found.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0]


def test_less_than_the_least_is_refused_and_what_helps_is_named():
    with pytest.raises(InputError, match=r"memory_budget is 9,000,000 bytes.*--frozen-bits 8, --optimizer-bits 8"):
        planned(dataclasses.replace(SMALL, memory_budget="9MB"))


def test_a_plan_changes_no_gradient():
    spec = dataclasses.replace(SMALL, resolution=48)
    found = planned(dataclasses.replace(spec, memory_budget=least(spec)))
    assert found.plan != StepPlan(spec.batch_size)
    gradients = []
    for plan in (StepPlan(spec.batch_size), found.plan):
        model = build_network(spec)[0].double()
        set_execution_(model, plan.policies)
        images, labels = build_batch(spec, torch.channels_last)
        torch.manual_seed(0)
        for x, target in pieces_of(images, labels, plan.micro_batch, torch.float64):
            (torch.nn.functional.cross_entropy(model(x), target) * len(target) / len(labels)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-9, atol=1e-12)


def test_what_is_fixed_is_left_as_it_is():
    spec = dataclasses.replace(SMALL, micro_batch=2)
    plenty = planned(dataclasses.replace(spec, memory_budget="1GB"))
    assert (plenty.plan.micro_batch, plenty.plan.update, plenty.plan.parts) == (2, "end", ())
    backward = dataclasses.replace(SMALL, update="backward", memory_budget=least(SMALL) * 2)
    assert planned(backward).plan.update == "backward"


def test_estimates_are_near_descriptions():
    """The rule by which plans are picked, against what they are: near enough to pick by."""
    model, adaptation = build_network(SMALL)
    parts = parts_of(model, adaptation.blocks)
    assert parts[0] == "features.stem"
    optimizer = functools.partial(build_optimizer, SMALL)
    probe = capture_step(model, SMALL.shape(PROBE), optimizer=optimizer, passes_only=True)
    estimate = Estimate(probe, parts, SMALL.batch_size)
    for plan in (
        StepPlan(4),
        StepPlan(2),
        StepPlan(4, "end", ((f"{parts[0]}:{parts[4]}", Execution(images=1)),)),
        StepPlan(4, "end", ((f"{parts[0]}:{parts[4]}", Execution(images=2, recompute=True)),)),
        StepPlan(4, "backward"),
    ):
        step = capture_step(model, SMALL.shape(4), plan=plan, optimizer=optimizer)
        assert estimate.peak_bytes(plan) == pytest.approx(step.peak_bytes, rel=0.03)


def test_a_network_without_blocks_has_micro_batches_at_least():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4), torch.nn.Linear(4, 5))
    whole = plan_step(model, (8, 3, 32, 32), blocks=()).peak_bytes
    found = plan_step(model, (8, 3, 32, 32), blocks=(), budget_bytes=whole - 1, update="end")
    assert found.plan.micro_batch < 8
    assert found.peak_bytes < whole


def test_profile_tells_the_plan_and_keeps_it():
    spec = dataclasses.replace(SMALL, memory_budget="40MB")
    found = profile_step(spec, repeats=0, rss=False).to_json()
    assert found["planned"]["budget_bytes"] == 40_000_000
    assert found["measured"]["peak_bytes"] <= 40_000_000
    assert StepPlan.from_json(found["planned"]["plan"]).to_json() == found["planned"]["plan"]


@pytest.fixture
def small(tmp_path, monkeypatch) -> TrainSpec:
    monkeypatch.setitem(BACKBONES, NAME, entry())
    spec = make_spec(tmp_path / "photos")
    return dataclasses.replace(spec, batch_size=8, fit=dataclasses.replace(spec.fit, micro_batch=None))


def test_a_run_keeps_its_budget_over_whole_epochs(small, tmp_path, monkeypatch):
    """Live bytes over all of `fit`: reading ahead, every step, both epochs, validation."""
    peaks = []
    real_fit = run.fit

    def watched(model, *args, **kwargs):
        result = []
        found = measure_step(lambda: result.append(real_fit(model, *args, **kwargs)), resident_tensors(model, None))
        peaks.append(found.peak_bytes)
        return result[0]

    monkeypatch.setattr(run, "fit", watched)
    with pytest.raises(BudgetError) as refused:
        run.prepare(dataclasses.replace(small, memory_budget=1))
    low = refused.value.least_bytes
    for budget in (low, 2 * low):
        out = tmp_path / str(budget)
        result = run.train(dataclasses.replace(small, memory_budget=budget), out)
        assert result.prepared.planned is not None
        assert peaks[-1] <= budget
    assert peaks[0] < peaks[1]


def test_a_resumed_run_follows_the_same_plan(small, tmp_path):
    spec = dataclasses.replace(small, memory_budget="2MB")
    plans = [run.prepare(spec).planned for _ in range(2)]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].plan == plans[1].plan
