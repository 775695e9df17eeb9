"""Backbones of which only some blocks are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from tinytl.backbones import BACKBONES, block_paths, canonical_name, droppable, find, load
from tinytl.backbones.architecture import drop_blocks_, kept_text, parse_kept
from tinytl.backbones.proxylessnas import published_names
from tinytl.errors import InputError, UnknownNameError, WeightsError
from tinytl.methods import METHODS, adapt_
from tinytl.nn.layers import Residual
from tinytl.nn.lite_residual import insert_lite_blocks_
from tinytl.spec import TrainSpec

from . import _torchvision

NAME = "mcunet_5fps"


@given(st.sets(st.integers(0, 40), min_size=1))
def test_texts_are_read_back(kept: set[int]) -> None:
    text = kept_text(kept)
    assert parse_kept(text) == tuple(sorted(kept))
    assert kept_text(parse_kept(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("0-5.7-13", "@0-5.7-13"), ("7-13.0-5", "@0-5.7-13"), ("0.1.2-4.5.7.8-13", "@0-5.7-13"), ("0-13", "")],
)
def test_equal_choices_have_one_name(text: str, canonical: str) -> None:
    assert canonical_name(f"{NAME}@{text}") == NAME + canonical
    assert load(f"{NAME}@{text}", pretrained=False).name == NAME + canonical


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (f"{NAME}@", "cannot read ''"),
        (f"{NAME}@0-x", "cannot read '0-x'"),
        (f"{NAME}@0,1", "cannot read '0,1'"),
        (f"{NAME}@5-3", "cannot read '5-3'"),
        (f"{NAME}@0-\u0663", "cannot read"),
        (f"{NAME}@0-99999999999", "cannot read"),
        (f"{NAME}@0-4.3", "block 3 is there twice"),
        (f"{NAME}@0-14", "no block 14: it has the blocks 0-13"),
        (f"{NAME}@0-4.6-13", "block 5 has no identity shortcut.*may be dropped: 2.4.6.8-9.11-12"),
        (f"{NAME}@0-5.7-13@0", "more than one '@'"),
    ],
)
def test_choices_that_cannot_be(name: str, match: str) -> None:
    for use in (find, canonical_name, lambda name: load(name, pretrained=False), lambda name: TrainSpec("p", name)):
        with pytest.raises(InputError, match=match) as caught:
            use(name)
        assert "\n" not in str(caught.value)


def test_names_that_cannot_be() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mcunet_5fps'"):
        find("mcunet_5@0-3")
    with pytest.raises(InputError, match="no block is kept"):
        drop_blocks_(AllResidual(), [], "a network")


class AllResidual(nn.Sequential):
    """Every block may go."""

    block_paths = ("0", "1")

    def __init__(self) -> None:
        super().__init__(Residual(nn.Conv2d(3, 3, 1)), Residual(nn.Conv2d(3, 3, 1)))


@pytest.mark.parametrize(
    "name", ["mcunet_5fps", "proxylessnas_mobile", "mobilenet_v3_large", "resnet50", "mobilenet_v2_035"]
)
def test_without_its_droppable_blocks_a_network_is_the_rest(name: str) -> None:
    """The same values as the full network with every dropped block's body silenced."""
    torch.manual_seed(0)
    whole = find(name).build().eval()
    count, free = len(block_paths(whole)), droppable(whole)
    assert free
    kept = [number for number in range(count) if number not in free]
    part = load(f"{name}@{kept_text(kept)}", pretrained=False)
    own = set(part.model.state_dict())
    assert own < set(whole.state_dict())  # every path is the full network's
    assert block_paths(part.model) == tuple(block_paths(whole)[number] for number in kept)
    assert part.lite_blocks == block_paths(part.model)[1:]
    part.model.load_state_dict({key: value for key, value in whole.state_dict().items() if key in own})
    for number in free:
        whole.get_submodule(block_paths(whole)[number]).register_module("body", Zero())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(part.model(images), whole(images))
    assert find(part.name).complexity().parameters == sum(p.numel() for p in part.model.parameters())


class Zero(nn.Module):
    """What adds nothing."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(input)


def test_a_middle_block_goes_and_its_neighbours_keep_their_names() -> None:
    backbone = load(f"{NAME}@0-5.7-13", pretrained=False, num_classes=4)
    names = [name for name, _ in backbone.model.get_submodule("features").named_children()]
    assert names == ["stem", *(f"block{number}" for number in range(14) if number != 6)]
    adaptation = adapt_(backbone.model, METHODS["tinytl-l+b"], resolution=64)
    assert "features.block6" not in adaptation.blocks
    assert len(adaptation.blocks) == 13


@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("form", ["whole", "published", "own", "own.safetensors"])
def test_weights_of_the_full_network_or_of_the_part(tmp_path: Path, form: str, lite: bool) -> None:
    torch.manual_seed(1)
    name = "proxylessnas_mobile"
    whole = load(name, pretrained=False, lite=lite).model
    for tensor in whole.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.0)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    dropped = tuple(f"features.block{number}." for number in (4, 9))
    part = {key: value for key, value in state.items() if not key.startswith(dropped)}
    file = tmp_path / ("w.safetensors" if form.endswith("safetensors") else "w.pth")
    if form == "whole":
        torch.save(state, file)
    elif form == "published":
        torch.save({theirs: state[ours] for ours, theirs in published_names(state).items()}, file)
    elif form == "own":
        torch.save(part, file)
    else:
        save_file(part, file)
    found = load(f"{name}@0-3.5-8.10-19", weights=file)
    assert found.lite == ("pretrained" if lite else "none")
    assert found.model.state_dict().keys() == part.keys()
    assert all(torch.equal(value, part[key]) for key, value in found.model.state_dict().items())


def test_a_part_with_a_classifier_of_its_own_is_read(tmp_path: Path) -> None:
    saved = load(f"{NAME}@0-5.7-13", pretrained=False, num_classes=7).model
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    found = load(f"{NAME}@0-5.7-13", weights=tmp_path / "w.pth").model
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in found.state_dict().items())
    with pytest.raises(WeightsError, match=r"missing: features\.block6\.body"):
        load(NAME, weights=tmp_path / "w.pth")  # the full network wants it all
    state = {key: value for key, value in saved.state_dict().items() if "block7" not in key}
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(WeightsError, match=r"missing: features\.block7"):
        load(f"{NAME}@0-5.7-13", weights=tmp_path / "less.pth")


def test_blocks_with_lite_modules_are_dropped_too() -> None:
    model = find(NAME).build()
    insert_lite_blocks_(model, block_paths(model)[1:])
    assert droppable(model) == (2, 4, 6, 8, 9, 11, 12)
    drop_blocks_(model, [0, 1, 3, 5, 7, 10, 13], NAME)
    assert len(block_paths(model)) == 7


def test_droppable_blocks_of_every_backbone() -> None:
    for name, entry in BACKBONES.items():
        with torch.device("meta"):
            model = entry.build()
        blocks = [model.get_submodule(path) for path in block_paths(model)]
        free = droppable(model)
        assert free, name
        if name != "resnet50":
            assert free == tuple(number for number, block in enumerate(blocks) if type(block) is Residual)
        else:  # all but the first of each stage
            assert free == tuple(number for number in range(16) if number not in (0, 3, 7, 13))


def test_networks_of_timm(tmp_path: Path) -> None:
    _torchvision.need("timm")
    part = load("timm:resnet18@7.0.2-6", pretrained=False, num_classes=3)
    assert part.name == "timm:resnet18@0.2-7"
    assert canonical_name("timm:resnet18@0-7") == "timm:resnet18"
    torch.manual_seed(0)
    whole = load("timm:resnet18", pretrained=False, num_classes=1000).model
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    cut = load(part.name, weights=tmp_path / "whole.pth").model
    torch.save(cut.state_dict(), tmp_path / "part.pth")
    again = load(part.name, weights=tmp_path / "part.pth").model
    assert not any(key.startswith("layer1.1.") for key in cut.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = cut(images)
        assert torch.equal(again(images), expected)
        layer1 = whole.get_submodule("layer1")
        assert isinstance(layer1, nn.Sequential)
        del layer1[1]
        assert torch.equal(whole(images), expected)
    assert len(adapt_(part.model, METHODS["tinytl-l+b"], resolution=64).blocks) == 7
    with pytest.raises(InputError, match=r"block 2 has no identity shortcut.*may be dropped: 0-1\.3\.5\.7"):
        load("timm:resnet18@0-1.3-7", pretrained=False)
    with pytest.raises(InputError, match="no blocks were found"):
        find("timm:vgg11@0")
