"""Methods on every network that came with issue 3, whole: lean is stock, and the rule of what is kept is true."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tinytl.backbones import Backbone, load
from tinytl.methods import METHODS, LastBlocks, Method, adapt_
from tinytl.nn.kept import kept

from .test_adapt import assert_same_gradients, backward, enliven_, images
from .test_kept_model import observed

NETWORKS = ("mobilenet_v2", "mobilenet_v3_large", "resnet50", "proxyless_w03", "mcunet_5fps", "mbv2_w035")
OTHERS = sorted(set(METHODS) - {"tinytl-l+b"})
WITH_EVERY_METHOD = ("mobilenet_v3_large", "resnet50", "mcunet_5fps")
SIDE = 64


def cases() -> list[Any]:
    """(network, method): TinyTL-L+B by each; every other method where blocks are unlike, two in turn by the others."""
    found = []
    for turn, network in enumerate(NETWORKS):
        some = [OTHERS[(2 * turn + at) % len(OTHERS)] for at in range(2)]
        fast = () if network != "resnet50" else pytest.mark.slow
        found.append(pytest.param(network, "tinytl-l+b", marks=fast))
        for name in OTHERS if network in WITH_EVERY_METHOD else some:
            found.append(pytest.param(network, name, marks=pytest.mark.slow))
    return found


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name == "resnet50" else name for name in NETWORKS],
)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(3)
    found = load(request.param, pretrained=False, num_classes=7)
    enliven_(found.model)
    return found


def chosen(backbone: Backbone, name: str) -> Method:
    """The method of that name; TinyTL-B with its last block in full."""
    return METHODS[name] + LastBlocks(1 if name == "tinytl-b" else 0)


def test_lean_is_stock(backbone: Backbone) -> None:
    """Outputs and gradients of TinyTL-L+B in float64, the lite modules' last scale not at its 0."""
    base = backbone.model.double()
    lean, stock = copy.deepcopy(base), copy.deepcopy(base)
    base.float()
    x = images(2, SIDE, torch.float64)
    adaptation = adapt_(lean, chosen(backbone, "tinytl-l+b"), resolution=SIDE)
    assert len(adaptation.inserted) == len(backbone.lite_blocks)
    adapt_(stock, chosen(backbone, "tinytl-l+b"), lean=False, resolution=SIDE)
    for model in (lean, stock):
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            last = ".lite." in path and ("norm2" in path or "conv2.norm" in path) and path.endswith(".weight")
            if last:
                tensor.data.copy_(torch.linspace(0.5, 1.5, tensor.numel()))
    torch.testing.assert_close(lean(x), stock(x), rtol=1e-9, atol=1e-9)
    assert_same_gradients(backward(lean, x), backward(stock, x), adaptation)


@pytest.mark.parametrize(("backbone", "name"), cases(), indirect=["backbone"])
def test_what_is_kept_is_what_is_seen(backbone: Backbone, name: str) -> None:
    model = copy.deepcopy(backbone.model).float()
    before = model.eval()(images(1, SIDE)).detach()
    adaptation = adapt_(model, chosen(backbone, name), resolution=SIDE)
    torch.testing.assert_close(model(images(1, SIDE)), before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    assert adaptation.kept_bytes_per_image == kept(model, (1, 3, SIDE, SIDE)).total_bytes
    assert adaptation.kept_bytes_per_image == observed(model, images(1, SIDE)) > 0


def test_the_int8_networks_have_no_norm() -> None:
    """FT-Norm+Last finds nothing to train there but the classifier (docs/backbones.md says so)."""
    model = load("mcunet_5fps", pretrained=False, num_classes=3).model
    assert adapt_(model, METHODS["ft-norm+last"], resolution=SIDE).trained == ("classifier.weight", "classifier.bias")
    model = load("mcunet_5fps", pretrained=False, num_classes=3).model
    biases = adapt_(model, METHODS["tinytl-b"], resolution=SIDE).trained
    assert len(biases) == 1 + (2 + 13 * 3) + 2  # stem, block 0 without an expansion, the others, classifier
