"""The ledger on CUDA, against `torch.cuda`'s own count: what is kept between the passes, what is resident, the peak."""

from __future__ import annotations

import pytest
import torch

from tinytl.memory import StepSpec, capture_step, kept, measure_step, resident_tensors
from tinytl.memory.measured import training_step
from tinytl.memory.step import as_input, build_batch, build_network, build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

BLOCK = 512  # bytes that the caching allocator rounds up to
SPEC = StepSpec("proxylessnas_mobile", "tinytl-l+b", resolution=96, batch_size=4, classes=7)


def test_what_is_kept_is_what_stays_allocated() -> None:
    model = build_network(SPEC)[0].cuda()
    rule = kept(model, SPEC.shape(4))
    images = as_input(build_batch(SPEC, torch.channels_last)[0].cuda())
    model(images).sum().backward()  # whatever libraries hold from their first call on
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    logits = model(images)
    held = torch.cuda.memory_allocated() - before - logits.nbytes
    assert rule.total_bytes <= held + images.nbytes
    assert held <= rule.total_bytes + BLOCK * (2 * len(rule.entries) + 8)


def test_the_described_step_is_near_the_measured_one() -> None:
    """Resident memory to the block; the peak as far as cuDNN's workspaces, which no rule states, allow."""
    model = build_network(SPEC)[0]
    described = capture_step(model, SPEC.shape(4), optimizer=lambda parameters: build_optimizer(SPEC, parameters))
    model = model.cuda()
    images, labels = (tensor.cuda() for tensor in build_batch(SPEC, torch.channels_last))
    optimizer = build_optimizer(SPEC, model.parameters())
    step = training_step(model, images, labels, optimizer)
    step()
    measured = measure_step(step, resident_tensors(model, optimizer, images, labels))
    assert measured.resident_bytes == described.resident_bytes
    assert measured.peak_bytes >= 0.9 * described.peak_bytes
