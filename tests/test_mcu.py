"""The int8-published networks: their tables, both file forms, what is refused, and real photographs."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from torch import nn

from tinytl.backbones import BACKBONES, Backbone, load
from tinytl.backbones.mcu import SOURCES, SPECS
from tinytl.data import EvalTransform, open_photo
from tinytl.errors import InputError, WeightsError

from .golden_logits import convolutions, formula_int8, read_int8
from .mcu_files import MCU_FILES, architecture, need, published, published_pickle, shapes, torch_zip, write_pickle

NAME = "mbv2_w035"
PHOTOS = Path(__file__).parent / "data" / "photos"
Int8 = tuple[dict[str, Any], dict[str, np.ndarray]]


@pytest.fixture
def int8() -> Int8:
    """Description and tensors of MobileNetV2 w0.35 on formula weights; a test may spoil them."""
    tensors, scales = formula_int8(shapes(SPECS[NAME]))
    return architecture(SPECS[NAME], scales), tensors


def write(folder: Path, int8: Int8, form: str) -> Path:
    description, tensors = int8
    path = folder / f"w.{form}"
    if form == "pkl":
        return write_pickle(path, published_pickle(description, tensors))
    save_file(tensors, path, {"architecture": json.dumps(description)})
    return path


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(NAME, weights=path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_tables_are_the_published_descriptions(name: str) -> None:
    description, tensors = read_int8(need(MCU_FILES[name]))
    scales = {conv["name"]: conv["x_scale"] for conv in convolutions(description)}
    ours = architecture(SPECS[name], scales)
    for mine, theirs in zip(convolutions(ours), convolutions(description), strict=True):
        assert mine == {key: theirs[key] for key in mine}
    assert [block["residual"] for block in ours["blocks"]] == [block["residual"] for block in description["blocks"]]
    assert {f"{conv}.weight_int8": shape for conv, shape in shapes(SPECS[name]).items()} == {
        key: value.shape for key, value in tensors.items() if key.endswith(".weight_int8")
    }


def test_both_forms_hold_the_same_network(tmp_path: Path, int8: Int8) -> None:
    one, other = (load(NAME, weights=write(tmp_path, int8, form)) for form in ("pkl", "safetensors"))
    assert equal(one.model, other.model)
    assert one.pretrained
    assert (one.norm, one.lite) == ("bn", "none")
    scale = int8[1]["blocks.3.pointwise1.weight_scale"].astype(np.float64)
    weight = int8[1]["blocks.3.pointwise1.weight_int8"] * scale[:, None, None, None]
    found = one.model.get_parameter("features.block3.expand.conv.weight").detach().numpy()
    assert np.array_equal(found, weight.astype(np.float32))


def test_the_published_pickle_is_the_published_network() -> None:
    file = need("mbv2-w0.35.pkl")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SOURCES[NAME].sha256
    assert equal(load(NAME, weights=file).model, published(NAME).model)


def test_it_is_fetched_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a path: the cache folder's file of the pinned hash; a spoilt one is not taken."""
    content = need("mbv2-w0.35.pkl").read_bytes()
    monkeypatch.setenv("TINYTL_CACHE", str(tmp_path))
    (tmp_path / "mbv2-w0.35.pkl").write_bytes(content)
    assert equal(load(NAME).model, published(NAME).model)


@pytest.mark.parametrize("name", [*sorted(SPECS), "mobilenet_v2", "mobilenet_v3_large", "resnet50"])
def test_no_network_and_no_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def unreachable(url: str, timeout: float) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setenv("TINYTL_CACHE", str(tmp_path))
    monkeypatch.delenv("TINYTL_MIRRORS", raising=False)
    with pytest.raises(WeightsError, match=r"no route to host.*Mend: give the file with --weights FILE") as caught:
        load(name)
    assert "\n" not in str(caught.value)
    assert "pip install" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ImageNet-1k classes: see tests/test_backbones.py
@pytest.mark.parametrize("name", sorted(SPECS))
def test_real_photographs(name: str) -> None:
    """A cat, an espresso and a rocket are recognized by the published weights in floating point."""
    backbone = published(name)
    p = backbone.preprocessing
    transform = EvalTransform(p.resolution, p.mean, p.std, p.crop_fraction, p.interpolation)
    top5 = {}
    for photo in ("chelsea", "coffee", "rocket"):
        with open_photo(PHOTOS / f"{photo}.jpg") as picture, torch.no_grad():
            top5[photo] = backbone.model(torch.from_numpy(transform(picture))[None])[0].topk(5).indices.tolist()
    assert top5["chelsea"][0] == 285
    assert {281, 282} < set(top5["chelsea"])
    assert top5["coffee"][0] == 967
    assert {657, 744, 812} < set(top5["rocket"])


# ---------------------------------------------------------------------------------------------- what is refused


def spoil_block(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["blocks"][4].__setitem__(key, value)


def spoil_conv(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["blocks"][4]["depthwise"].__setitem__(key, value)


@pytest.mark.parametrize("form", ["pkl", "safetensors"])
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda d: d["blocks"].pop(), "16 blocks, expected 17"),
        (lambda d: d.__setitem__("blocks", {}), "0 blocks, expected 17"),
        (spoil_block("residual", False), "blocks.4: no shortcut"),
        (spoil_conv("stride", 2), "blocks.4.depthwise: stride 2, expected 1"),
        (spoil_conv("groups", 1), "blocks.4.depthwise: groups 1, expected 96"),
        (spoil_conv("k", 5), "blocks.4.depthwise: kernel 5, expected 3"),
        (spoil_conv("x_scale", float("nan")), "x_scale is nan"),
        (spoil_conv("x_scale", -1.0), r"x_scale is -1\.0"),
        (spoil_conv("x_scale", "1"), "x_scale is '1'"),
        (spoil_conv("x_scale", 1e300), "out of float32"),
        (spoil_conv("stride", "1\n1"), "stride '1.*1', expected 1"),
        (spoil_conv("stride", [[1], [1]]), "stride a list, expected 1"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, int8: Int8, spoil: Any, match: str, form: str) -> None:
    description = copy.deepcopy(int8[0])
    spoil(description)
    path = write(tmp_path, (description, int8[1]), form)
    assert re.search(match, refusal(path))


@pytest.mark.parametrize("form", ["pkl", "safetensors"])
@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("blocks.2.pointwise2.weight_int8", np.zeros((8, 48, 1, 1), np.int16), "weight is int16"),
        ("blocks.2.pointwise2.weight_int8", np.zeros((8, 48, 3, 3), np.int8), r"weight is int8 \(8, 48, 3, 3\)"),
        ("first_conv.bias_int32", np.zeros(15, np.int32), r"bias is int32 \(15,\), expected int32 \(16,\)"),
        ("classifier.weight_scale", np.full(1000, np.nan, np.float32), "negative or not finite"),
        ("classifier.weight_scale", np.full(1000, -1, np.float32), "negative or not finite"),
        ("classifier.weight_scale", np.full(1000, 1, np.float64), "weight scale is float64"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, int8: Int8, key: str, value: np.ndarray, match: str, form: str
) -> None:
    int8[1][key] = value
    assert re.search(match, refusal(write(tmp_path, int8, form)))


def test_what_is_missing_or_too_much(tmp_path: Path, int8: Int8) -> None:
    description, tensors = int8
    value = published_pickle(description, tensors)
    del value["blocks"][3]["depthwise"]["params"]["w_scales"]
    assert "weight scale is NoneType" in refusal(write_pickle(tmp_path / "a.pkl", value))
    del value["blocks"][3]["depthwise"]["params"]
    assert "blocks.3.depthwise.params is missing" in refusal(write_pickle(tmp_path / "b.pkl", value))
    value = published_pickle(description, tensors)
    for spoilt, match in (
        ({"feature_mix": {"params": 1}}, "feature_mix"),
        ({"first_conv": None}, "first_conv is missing"),
        ({"first_conv": {**value["first_conv"], "kernel_size": np.ones(2)}}, "kernel a ndarray, expected 3"),
        ({"first_conv": {**value["first_conv"], "stride": np.ones(2)}}, "stride a ndarray, expected 2"),
        ({"blocks": [{**value["blocks"][0], "residual": np.ones(2)}, *value["blocks"][1:]]}, "blocks.0: a shortcut"),
        ({"blocks": [*value["blocks"][:-1], {**value["blocks"][-1], "se": {}}]}, "blocks.16: has other layers"),
        ({"blocks": [*value["blocks"][:-1], {**value["blocks"][-1], "pointwise1": None}]}, "blocks.16: has other"),
    ):
        assert match in refusal(write_pickle(tmp_path / "c.pkl", {**value, **spoilt}))
    assert "not a dictionary" in refusal(write_pickle(tmp_path / "d.pkl", [1]))
    tensors["extra"] = np.zeros(1, np.int8)
    assert "157 tensors, expected 156" in refusal(write(tmp_path, int8, "safetensors"))
    del tensors["extra"]
    tensors["other"] = tensors.pop("first_conv.bias_int32")
    assert "first_conv.bias_int32 is missing" in refusal(write(tmp_path, int8, "safetensors"))


def test_files_that_are_something_else(tmp_path: Path, int8: Int8) -> None:
    _, tensors = int8
    for text, match in (("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "is not a dictionary")):
        save_file(tensors, tmp_path / "x.safetensors", {"architecture": text})
        assert match in refusal(tmp_path / "x.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")  # no scales of the inputs: not this form
    assert "none of its tensors" in refusal(tmp_path / "bare.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    assert "cannot read" in refusal(tmp_path / "junk.safetensors")
    hostile = torch_zip(tmp_path / "h.pkl", b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.")
    assert "asks for 'posix.system'" in refusal(hostile)
    torch.save({"a": torch.zeros(2)}, tmp_path / "state.pkl")
    assert "_rebuild_tensor_v2" in refusal(tmp_path / "state.pkl")
    with pytest.raises(WeightsError, match="17 blocks, expected 14"):
        load("mcunet_5fps", weights=write(tmp_path, int8, "pkl"))


def test_norm_can_only_be_the_folded_one(tmp_path: Path, int8: Int8) -> None:
    for pretrained in (False, True):
        with pytest.raises(InputError, match="norm 'gn' has none to replace"):
            load(NAME, norm="gn", pretrained=pretrained)
    with pytest.raises(InputError, match="none to replace"):
        BACKBONES[NAME].build(norm="gn")


@pytest.mark.parametrize("lite", [False, True])
def test_a_network_saved_by_its_owner_is_read(tmp_path: Path, lite: bool) -> None:
    torch.manual_seed(1)
    saved: Backbone = load(NAME, pretrained=False, lite=lite)
    torch.save(saved.model.state_dict(), tmp_path / "own.pth")
    save_torch(saved.model.state_dict(), tmp_path / "own.safetensors")
    for file in ("own.pth", "own.safetensors"):
        found = load(NAME, weights=tmp_path / file)
        assert equal(found.model, saved.model)
        assert found.lite == ("pretrained" if lite else "none")
