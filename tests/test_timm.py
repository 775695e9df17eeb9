"""Networks of timm and torchvision as they come: adapted by their traced graph, exactly, or refused with the reason."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tinytl
from tinytl.backbones import timm_models
from tinytl.engine import FitOptions
from tinytl.errors import InputError, UnknownNameError, WeightsError
from tinytl.methods import METHODS, TINYTL_LB, adapt_

from ._torchvision import need
from .foreign import assert_adapts, settle_
from .photographs import make_photographs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    need("timm")
    import timm
    import torchvision

SIDE = 64

# name -> (blocks found, the first and the last of them, classifier)
TIMM = {
    "resnet10t": (4, "layer1.0", "layer4.0", "fc"),
    "mobilenetv3_small_050": (11, "blocks.0.0", "blocks.4.2", "classifier"),
    "mobilenetv2_035": (17, "blocks.0.0", "blocks.6.0", "classifier"),
    "efficientnet_lite0": (16, "blocks.0.0", "blocks.6.0", "classifier"),
    "mnasnet_small": (15, "blocks.0.0", "blocks.6.0", "classifier"),
    "mobilenetv4_conv_small_050": (14, "blocks.0", "blocks.3.5", "classifier"),
    "regnetx_002": (13, "s1.b1", "s4.b7", "head.fc"),
    "test_convnext": (9, "stages.0.blocks.0", "stages.3.blocks.1", "head.fc"),
    "test_efficientnet": (4, "blocks.1.0", "blocks.4.0", "classifier"),
    "ghostnet_050": (16, "blocks.0.0", "blocks.8.3", "classifier"),
}
TORCHVISION = {
    "mobilenet_v2": (17, "features.1", "features.17", "classifier.1"),
    "mobilenet_v3_small": (11, "features.1", "features.11", "classifier.3"),
    "resnet18": (8, "layer1.0", "layer4.1", "fc"),
    "shufflenet_v2_x0_5": (16, "stage2.0", "stage4.3", "fc"),
    "squeezenet1_1": (8, "features.3", "features.12", "classifier.1"),
    "densenet121": (4, "features.denseblock1", "features.denseblock4", "classifier"),
}
SLOW = ("efficientnet_lite0", "densenet121", "ghostnet_050", "mobilenetv2_035", "regnetx_002", "mnasnet_small")


def from_timm(name: str) -> nn.Module:
    torch.manual_seed(0)
    return settle_(timm.create_model(name, num_classes=10, drop_rate=0.0))


def from_torchvision(name: str) -> nn.Module:
    torch.manual_seed(0)
    return settle_(getattr(torchvision.models, name)(weights=None, num_classes=10))


CASES = [
    pytest.param(make, name, found, id=f"{library}-{name}", marks=[pytest.mark.slow] if name in SLOW else [])
    for library, make, networks in (("timm", from_timm, TIMM), ("torchvision", from_torchvision, TORCHVISION))
    for name, found in networks.items()
]


@pytest.mark.parametrize(("make", "name", "found"), CASES)
def test_lean_is_stock(make, name: str, found: tuple[int, str, str, str]) -> None:  # type: ignore[no-untyped-def]
    count, first, last, classifier = found
    adaptation, share = assert_adapts(make(name), "tinytl-l+b", SIDE)
    assert (len(adaptation.blocks), adaptation.blocks[0], adaptation.blocks[-1]) == (count, first, last)
    assert adaptation.classifier == classifier
    assert len(adaptation.inserted) == count - 1
    assert share < 0.3


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method(method: str) -> None:
    """On a network with gates: its blocks run again in backward."""
    assert_adapts(from_timm("test_efficientnet"), method, SIDE)


def test_normalizations_with_an_activation_inside_become_part_of_their_convolutions() -> None:
    model = from_timm("mobilenetv2_035")
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    adaptation = adapt_(model, METHODS["tinytl-b"], resolution=SIDE)
    assert len(adaptation.folded) == norms
    assert not any(isinstance(module, nn.BatchNorm2d) and module.weight is not None for module in model.modules())


# ---------------------------------------------------------------- by name


def test_loaded_by_name() -> None:
    backbone = tinytl.load("timm:test_resnet", pretrained=False, num_classes=3)
    assert backbone.name == "timm:test_resnet"
    assert not backbone.model.training
    assert backbone.preprocessing.resolution == 160
    assert backbone.preprocessing.crop_fraction == 0.95
    adaptation = adapt_(backbone.model, TINYTL_LB, resolution=SIDE)
    assert backbone.model(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, 3)
    assert adaptation.classifier == "fc"
    assert tinytl.TrainSpec(photos="x", backbone="timm:test_resnet").backbone == "timm:test_resnet"


def test_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = timm.create_model("test_resnet")
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    backbone = tinytl.load("timm:test_resnet", weights=tmp_path / "w.pth", num_classes=2)
    own = backbone.model.state_dict()
    for key, value in theirs.state_dict().items():
        assert key.startswith("fc.") or torch.equal(own[key], value)
    assert own["fc.weight"].shape[0] == 2
    with pytest.raises(WeightsError, match="no weights file"):
        tinytl.load("timm:test_resnet", weights=tmp_path / "none.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="missing"):
        tinytl.load("timm:test_resnet", weights=tmp_path / "other.pth")


def test_what_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        tinytl.load("timm:resnet18x")
    with pytest.raises(UnknownNameError, match=r"resnet18\.a1_in1k"):
        tinytl.TrainSpec(photos="x", backbone="timm:resnet18.a1_in1kk")
    for options, reason in (
        ({"norm": "gn"}, "norm"),
        ({"lite": True}, "adapt_"),
        ({"num_classes": 0}, "num_classes"),
        ({"pretrained": False, "weights": tmp_path}, "pretrained=False"),
    ):
        with pytest.raises(InputError, match=reason):
            tinytl.load("timm:test_resnet", **options)  # type: ignore[arg-type]

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"cannot be fetched.*--weights FILE") as caught:
        tinytl.load("timm:test_resnet")
    assert "\n" not in str(caught.value)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'tinytl\[timm\]'") as caught:
        timm_models.load_timm("timm:resnet18", pretrained=False)
    assert "\n" not in str(caught.value)


def test_the_preprocessing_is_plain_data() -> None:
    fields = dataclasses.asdict(timm_models.timm_preprocessing("timm:resnet18"))
    assert fields["interpolation"] in ("bicubic", "bilinear")
    assert all(isinstance(value, float) for value in (*fields["mean"], *fields["std"], fields["crop_fraction"]))


def test_a_run_and_the_run_opened_again(tmp_path: Path) -> None:
    photos = make_photographs(tmp_path / "photos")
    spec = tinytl.TrainSpec(
        photos=str(photos),
        backbone="timm:test_efficientnet",
        pretrained=False,
        resolution=32,
        fit=FitOptions(epochs=1, lr=0.01),
    )
    result = tinytl.train(spec, tmp_path / "run", options=tinytl.RunOptions(workers=0))
    opened = tinytl.open_run(tmp_path / "run")
    ours, theirs = result.prepared.model.state_dict(), opened.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert opened.predict(photos / "red" / "0.jpg")[0]["label"] in ("blue", "green", "red")
