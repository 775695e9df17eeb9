"""The step described without running it against the step that runs, to the byte."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytl.errors import InputError
from tinytl.memory.capture import RESIDENT, StepDescription, capture_step
from tinytl.memory.measured import Measured, adam, measure_step, resident_tensors, training_step
from tinytl.memory.step import StepSpec, build_batch, build_network
from tinytl.methods import METHODS
from tinytl.nn.kept import kept

SMALL = StepSpec("proxylessnas_mobile", "tinytl-l+b", resolution=64, batch_size=2, classes=5)


def both(spec: StepSpec) -> tuple[StepDescription, Measured]:
    model, _ = build_network(spec)
    described = capture_step(
        model,
        spec.shape(spec.batch_size),
        micro_batch=spec.micro_batch,
        optimizer=adam,
    )
    images, labels = build_batch(spec, torch.channels_last)
    optimizer = adam(model)
    step = training_step(model, images, labels, optimizer, spec.micro_batch)
    step()
    return described, measure_step(step, resident_tensors(model, optimizer, images, labels))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_planned_is_what_is_measured(name):
    described, measured = both(dataclasses.replace(SMALL, method=name))
    assert described.resident_bytes == measured.resident_bytes
    assert described.peak_bytes == pytest.approx(measured.peak_bytes, rel=5e-3)


@pytest.mark.parametrize("name", ["ft-last", "tinytl-l+b"])
def test_a_single_image_with_group_norm_is_laid_out_as_the_step_lays_it_out(name):
    described, measured = both(dataclasses.replace(SMALL, method=name, norm="gn", resolution=87, batch_size=1))
    assert described.peak_bytes == pytest.approx(measured.peak_bytes, rel=2e-3)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    backbone=st.sampled_from(["proxylessnas_mobile", "efficientnet_lite0", "mobilenet_v3_large", "mcunet_5fps"]),
    name=st.sampled_from(sorted(METHODS)),
    norm=st.sampled_from(["bn", "gn"]),
    resolution=st.integers(40, 130),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    last_blocks=st.sampled_from([0, 0, 2]),
)
def test_whatever_is_asked_the_plan_is_within_one_percent(backbone, name, norm, resolution, sizes, last_blocks):
    if backbone != "proxylessnas_mobile":
        norm = "bn"  # the one norm of the others' weights
    spec = StepSpec(backbone, name, norm, resolution, sizes[0], min(sizes), classes=7, last_blocks=last_blocks)
    described, measured = both(spec)
    assert described.resident_bytes == measured.resident_bytes
    assert described.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)


def test_what_the_peak_is_made_of_adds_up_to_it():
    model, _ = build_network(SMALL)
    described = capture_step(model, SMALL.shape(2), micro_batch=1)
    parts = described.at_peak()
    assert sum(parts.values()) == described.peak_bytes == int(described.live_bytes.max())
    assert sum(parts[role] for role in RESIDENT) == described.resident_bytes


def test_what_is_alive_between_the_passes_is_what_the_rules_say():
    model, _ = build_network(SMALL)
    described = capture_step(model, SMALL.shape(2))
    first = next(i for i, op in enumerate(described.operations) if op.phase == "backward")
    alive = sum(described.storages[i].bytes for i in described.alive_at(first) if described.storages[i].role == "kept")
    # beside what the network keeps: the loss, its total weight, its probabilities, and the image that a chain keeps
    image = 2 * 3 * 64 * 64 * 4
    rule = kept(model, SMALL.shape(2)).total_bytes
    assert rule - image <= alive <= rule + 1000


def test_the_network_is_left_alone():
    model, _ = build_network(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture_step(model.eval(), SMALL.shape(2))
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_to_train_and_no_images_are_refused():
    model, _ = build_network(SMALL)
    with pytest.raises(InputError, match="micro_batch is 0"):
        capture_step(model, SMALL.shape(2), micro_batch=0)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        capture_step(model, SMALL.shape(2))
