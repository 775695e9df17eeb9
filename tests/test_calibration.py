"""Calibration of fresh lite modules: the statistics are those of the images, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.errors import InputError
from tinytl.methods import METHODS, TINYTL_LB, adapt_, calibrate_

from .test_adapt import images, small_network


def by_hand(base: nn.Module, lite: nn.Module, path: str, batches: list[Tensor]) -> list[Tensor]:
    """Mean and variance of norm1's and norm2's input, from the stock network and stock functions."""
    inputs: list[Tensor] = []
    handle = base.get_submodule(path).register_forward_pre_hook(lambda m, a: inputs.append(a[0].detach()))
    with torch.no_grad():
        for batch in batches:
            base(batch)
    handle.remove()
    w = {name: t.detach() for name, t in lite.state_dict().items()}
    conv1, conv2 = lite.get_submodule("conv1"), lite.get_submodule("conv2")
    x = torch.cat([F.avg_pool2d(t, 2) for t in inputs])
    a = F.conv2d(x, w["conv1.weight"], None, conv1.stride, conv1.padding, 1, conv1.groups)  # type: ignore[arg-type]
    moments = [a.mean((0, 2, 3)), a.var((0, 2, 3), unbiased=False)]
    normed = F.relu(F.batch_norm(a, moments[0], moments[1], w["norm1.weight"], w["norm1.bias"], False, 0.0, 1e-3))
    b = F.conv2d(normed, conv2.weight.detach())  # type: ignore[arg-type]
    return [*moments, b.mean((0, 2, 3)), b.var((0, 2, 3), unbiased=False)]


def statistics(model: nn.Module, path: str, lean: bool) -> list[Tensor]:
    places = ("conv1.norm", "conv2.norm") if lean else ("norm1", "norm2")
    return [model.get_buffer(f"{path}.lite.{place}.{s}") for place in places for s in ("running_mean", "running_var")]


@pytest.mark.parametrize("lean", [True, False])
def test_statistics_are_those_of_the_images_and_the_output_stays(lean: bool) -> None:
    base = small_network().double()
    base.dropout.p = 0.0
    base.features.block1.eval()  # type: ignore[union-attr]
    model, stock = copy.deepcopy(base), copy.deepcopy(base)
    adaptation = adapt_(model, TINYTL_LB, lean=lean, resolution=48)
    adapt_(stock, TINYTL_LB, lean=False, resolution=48)
    batches = [images(3, 48, torch.float64), images(2, 48, torch.float64) * 1.3]
    before = [model(batch).detach() for batch in batches]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    assert calibrate_(model, adaptation, iter(batches)) == 6
    assert {name: module.training for name, module in model.named_modules()} == modes
    for path in ("features.block1", "features.block2", "features.block3"):
        expected = by_hand(base.eval(), stock.get_submodule(f"{path}.lite"), path, batches)
        torch.testing.assert_close(statistics(model, path, lean), expected, rtol=1e-8, atol=1e-10)
    for batch, wanted in zip(batches, before, strict=True):
        torch.testing.assert_close(model(batch), wanted, rtol=0, atol=0)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert len(changed) == 12
    assert changed <= set(adaptation.delta_keys)
    assert all(".lite." in key and "running_" in key for key in changed)
    assert all(not handles for module in model.modules() for handles in (module._forward_pre_hooks,))
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("norm", "name"), [("gn", "tinytl-l+b"), ("bn", "tinytl-b"), ("bn", "ft-last")])
def test_nothing_to_set(norm: str, name: str) -> None:
    model = small_network(norm)
    adaptation = adapt_(model, METHODS[name], resolution=32)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert calibrate_(model, adaptation, [images(2)]) == 0
    assert calibrate_(model, adaptation, []) == 0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_no_images_where_some_are_needed_are_refused() -> None:
    model = small_network()
    with pytest.raises(InputError, match="no images"):
        calibrate_(model, adapt_(model, TINYTL_LB, resolution=32), [])


def test_an_image_that_breaks_leaves_mode_and_hooks_as_they_were() -> None:
    model = small_network().train()
    adaptation = adapt_(model, TINYTL_LB, resolution=32)
    with pytest.raises(RuntimeError):
        calibrate_(model, adaptation, [torch.zeros(1, 4, 32, 32)])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
