"""Our networks compute what other implementations compute with the same weights (``tests/golden_logits.py``)."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from tinytl.backbones import find, load
from tinytl.backbones._layouts import Layout
from tinytl.backbones.mcu import SPECS
from tinytl.backbones.weights import load_strict_

from ._torchvision import need
from .golden_logits import EVERY, FILE, SIDE, formula_input, formula_int8, formula_state
from .mcu_files import MCU_FILES, architecture, published, shapes

GOLDEN = json.loads(FILE.read_text())["cases"]
BY_OTHERS = sorted(case for case in GOLDEN if case.split()[1] in ("torchvision", "timm"))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(torch.from_numpy(formula_input(SIDE))[None])[0, ::EVERY]


def assert_golden(model: nn.Module, case: str) -> None:
    expected = torch.tensor(GOLDEN[case]["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def test_every_network_has_a_golden_case() -> None:
    """Of those that came before, tests/golden.py and efficientnet_lite_logits.json tell."""
    assert {case.split()[0] for case in GOLDEN} == {
        *("mobilenet_v2", "mobilenet_v2_050", "mobilenet_v2_140", "mobilenet_v3_large", "resnet50", *MCU_FILES)
    }


def layout(name: str, publisher: str) -> Layout:
    [found] = [layout for layout in find(name).layouts if publisher in layout.publisher]
    return found


@pytest.mark.parametrize("case", BY_OTHERS)
def test_networks_of_torchvision_and_timm(case: str) -> None:
    name, publisher = case.split()
    model = find(name).build(norm="bn").double()
    theirs = layout(name, publisher)
    names = theirs.names(list(model.state_dict()))
    state_shapes = {names[ours]: tuple(value.shape) for ours, value in model.state_dict().items()}
    state_shapes |= {key: (*state_shapes[key], 1, 1) for key in theirs.as_linear}
    state = {key: torch.from_numpy(value) for key, value in formula_state(state_shapes).items()}
    load_strict_(model, theirs.prepared_(model, state), names)
    assert_golden(model, case)


@pytest.mark.parametrize("name", sorted(MCU_FILES))
def test_int8_networks_on_formula_weights(tmp_path: Path, name: str) -> None:
    tensors, scales = formula_int8(shapes(SPECS[name]))
    description = architecture(SPECS[name], scales)
    save_file(tensors, tmp_path / "formula.safetensors", {"architecture": json.dumps(description)})
    assert_golden(load(name, weights=tmp_path / "formula.safetensors").model, f"{name} formula")


@pytest.mark.parametrize("name", sorted(MCU_FILES))
def test_int8_networks_on_their_published_weights(name: str) -> None:
    assert_golden(copy.deepcopy(published(name).model), f"{name} published")


def test_weights_are_fetched_from_where_torchvision_says() -> None:
    need("torchvision")
    from torchvision import models

    for name, enum in (
        ("mobilenet_v2", models.MobileNet_V2_Weights),
        ("mobilenet_v3_large", models.MobileNet_V3_Large_Weights),
        ("resnet50", models.ResNet50_Weights),
    ):
        source, theirs = find(name).source, enum.IMAGENET1K_V1
        assert source is not None
        assert source.urls == (theirs.url,)
        assert source.sha256_prefix == theirs.url.rpartition("-")[2].removesuffix(".pth")
        assert find(name).complexity().parameters == theirs.meta["num_params"]
        chosen = theirs.transforms()
        ours = find(name).preprocessing
        assert [ours.resolution] == chosen.crop_size
        assert ours.interpolation == chosen.interpolation.value
        assert ours.crop_fraction == chosen.crop_size[0] / chosen.resize_size[0]
        assert (list(ours.mean), list(ours.std)) == (chosen.mean, chosen.std)


def test_a_wrong_network_is_seen() -> None:
    """The tolerance can fail: another eps of the norms, which no shape or key tells, is off by far more."""
    model = find("mobilenet_v2").build(norm="bn").double()
    names = layout("mobilenet_v2", "torchvision").names(list(model.state_dict()))
    state_shapes = {names[ours]: tuple(value.shape) for ours, value in model.state_dict().items()}
    load_strict_(model, {k: torch.from_numpy(v) for k, v in formula_state(state_shapes).items()}, names)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    expected = np.array(GOLDEN["mobilenet_v2 torchvision"]["logits"])
    assert np.abs(logits(model).numpy() - expected).max() > 1e-5 * np.abs(expected).max()
