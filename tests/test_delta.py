"""Deltas: bit for bit on the right base, and one clear line for everything else."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.test_engine import FakeLoader, bits, one_thread
from tinytl import _atomic
from tinytl.delta import KIND, apply_delta, load_delta, save_delta
from tinytl.engine import FitOptions, fit
from tinytl.errors import DeltaError, RunError
from tinytl.methods import TINYTL_LB, LastBlocks, Method, base_hash

__all__ = ["one_thread"]  # a fixture for this module too


@dataclass(frozen=True)
class FakeAdaptation:
    base_hash: str
    delta_keys: tuple[str, ...] = (
        "second.bias",
        "classifier.bias",
        "classifier.weight",
        "inserted.running_mean",
        "inserted.running_var",
    )
    method: Method = TINYTL_LB


PREPROCESSING = {
    "resolution": 8,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bicubic",
    "crop_fraction": 0.875,
}
CLASSES = ["functional", "défectueux", "故障"]


class Network(nn.Module):
    """A base; once adapted, a bias and the classifier train, and an inserted norm keeps statistics."""

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 1)
        torch.manual_seed(1)
        self.classifier = nn.Linear(4, classes)
        self.inserted: nn.Module = nn.Identity()
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.inserted(self.second(self.first(x).relu()).mean((2, 3))))


def adapted(seed: int = 0, classes: int = 3) -> tuple[Network, FakeAdaptation]:
    model = Network(seed, classes)
    adaptation = FakeAdaptation(base_hash(model))
    model.inserted = nn.BatchNorm1d(4, affine=False)
    model.requires_grad_(False)
    for name in adaptation.delta_keys[:3]:
        model.get_parameter(name).requires_grad_(True)
    return model, adaptation


def save(path: Path, model: nn.Module, adaptation: FakeAdaptation, **changes: Any) -> str:
    values: dict[str, Any] = {
        "backbone": "small",
        "norm": "bn",
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
        "extra": {"top1": 0.75},
    }
    return save_delta(path, model, adaptation, **(values | changes))


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Network]:
    model, adaptation = adapted()
    fit(model, FakeLoader(), None, FitOptions(epochs=2, lr=0.05))
    save(tmp_path / "delta.safetensors", model, adaptation)
    return tmp_path / "delta.safetensors", model


def test_base_and_delta_are_the_trained_model(trained: tuple[Path, Network]) -> None:
    path, model = trained
    delta = load_delta(path)
    fresh, adaptation = adapted()
    changed = {key for key, value in bits(model).items() if value != bits(fresh)[key]}
    assert changed == {*adaptation.delta_keys, "inserted.num_batches_tracked"}
    strides = {key: value.stride() for key, value in fresh.state_dict().items()}
    apply_delta(fresh, delta, adaptation)
    assert {key: value.stride() for key, value in fresh.state_dict().items()} == strides
    for key in adaptation.delta_keys:
        assert bits(fresh)[key] == bits(model)[key]
    images = next(FakeLoader().epoch(9)).images
    assert torch.equal(fresh.eval()(images), model.eval()(images))


def test_metadata_come_back(trained: tuple[Path, Network]) -> None:
    delta = load_delta(trained[0])
    assert delta.classes == tuple(CLASSES)
    assert (delta.backbone, delta.norm, delta.extra) == ("small", "bn", {"top1": 0.75})
    assert delta.preprocessing == PREPROCESSING
    assert delta.method == TINYTL_LB
    assert delta.base_hash == base_hash(Network())
    assert delta.tensors.keys() == set(FakeAdaptation("").delta_keys)


def test_it_is_an_ordinary_safetensors_file(trained: tuple[Path, Network]) -> None:
    tensors = safetensors.torch.load_file(trained[0])
    assert torch.equal(tensors["second.bias"], trained[1].get_parameter("second.bias"))


def test_equal_training_makes_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model, adaptation = adapted()
        fit(model, FakeLoader(), None, FitOptions(epochs=1))
        digest = save(tmp_path / name, model, adaptation)
        assert load_delta(tmp_path / name).content_hash == digest
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_base_hash_sees_every_bit_but_the_classifier_and_the_layout() -> None:
    model = Network()
    whole = base_hash(model)
    assert len(whole) == 64
    assert base_hash(Network()) == whole
    assert base_hash(Network(seed=1)) != whole
    assert base_hash(Network(classes=7)) == whole
    assert base_hash(model, exclude=()) != base_hash(Network(classes=7), exclude=())
    assert base_hash(Network().to(memory_format=torch.contiguous_format)) == whole  # pyright: ignore[reportCallIssue]
    assert base_hash(Network().double()) != whole
    with torch.no_grad():
        weight = model.first.weight
        weight[1, 2, 0, 1] = torch.nextafter(weight[1, 2, 0, 1], torch.tensor(9.0))
    assert base_hash(model) != whole
    norm = nn.BatchNorm2d(3)
    before = base_hash(norm)
    norm.num_batches_tracked.add_(1)  # pyright: ignore[reportOptionalMemberAccess]
    assert base_hash(norm) == before
    norm.running_mean[0] = 1  # pyright: ignore[reportOptionalSubscript]
    assert base_hash(norm) != before


def test_base_hash_is_pinned() -> None:
    """Deltas outlive versions: a change of this value makes every delta in the world unusable."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        model.bias.zero_()
    assert base_hash(model) == "c98be66331b588663c59ce3344262e5182cd8fc806e152d19ace4ce4b890ec80"


def refused(path: Path, match: str) -> None:
    with pytest.raises(DeltaError, match=match) as caught:
        load_delta(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_wrong_base_is_refused_unchanged(trained: tuple[Path, Network]) -> None:
    model, adaptation = adapted(seed=5)
    before = bits(model)
    with pytest.raises(DeltaError, match="belongs to another base: to small \\(bn\\) with the SHA-256"):
        apply_delta(model, load_delta(trained[0]), adaptation)
    assert bits(model) == before


def test_other_keys_shapes_and_dtypes_are_refused_unchanged(trained: tuple[Path, Network]) -> None:
    delta = load_delta(trained[0])
    model, adaptation = adapted(classes=4)
    before = bits(model)
    with pytest.raises(DeltaError, match=r"'classifier.bias' is float32 \(3,\), expected float32 \(4,\)"):
        apply_delta(model, delta, adaptation)
    more = FakeAdaptation(adaptation.base_hash, (*adaptation.delta_keys, "first.bias"))
    with pytest.raises(DeltaError, match=r"it lacks 1 tensors \('first.bias'"):
        apply_delta(model, delta, more)
    fewer = FakeAdaptation(adaptation.base_hash, adaptation.delta_keys[:4])
    with pytest.raises(DeltaError, match=r"it has besides 1 tensors \('inserted.running_var'"):
        apply_delta(model, delta, fewer)
    other = FakeAdaptation(adaptation.base_hash, method=TINYTL_LB + LastBlocks(2))
    with pytest.raises(DeltaError, match=r"with tinytl-l\+b, .* with tinytl-l\+b\+last-blocks\(2\)"):
        apply_delta(model, delta, other)
    assert bits(model) == before
    double = adapted()[0].double()
    with pytest.raises(DeltaError, match="float64"):
        apply_delta(double, delta, adaptation)


def test_damaged_files_are_refused(trained: tuple[Path, Network], tmp_path: Path) -> None:
    data = trained[0].read_bytes()
    path = tmp_path / "bad"
    for length in [*range(64), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        refused(path, "delta .*bad (is|has|holds)")
    path.write_bytes(data + b"\0")
    refused(path, "damaged")
    flipped = bytearray(data)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    refused(path, "does not have the SHA-256")
    path.write_bytes(data.replace(b"functional", b"functionel"))
    refused(path, "does not have the SHA-256")
    path.write_bytes(struct.pack("<Q", 2**63) + data[8:])
    refused(path, "no safetensors file")
    refused(tmp_path / "none", "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    refused(path, "holds no metadata: it was not written by tinytl")
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"format": "pt"})
    refused(path, "has the format pt, expected 'tinytl-delta/1'")
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"format": "tinytl-delta/2\n" * 90})
    refused(path, "has the format")
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, {"format": KIND})
    refused(path, "SHA-256")
    torch.save({"w": torch.zeros(2)}, path)
    refused(path, "no safetensors file")
    header = b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path, "header that is not JSON")


def good_metadata() -> dict[str, Any]:
    return {
        "method": {"name": "tinytl-b", "parts": [{"part": "bias"}]},
        "backbone": "small",
        "norm": "bn",
        "classes": ["a", "b"],
        "preprocessing": json.loads(json.dumps(PREPROCESSING)),
        "base_hash": "0" * 64,
        "extra": {},
    }


def forge(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a file whose seal is right: what a hostile writer would do."""
    _atomic.write_sealed(path, KIND, {"w": torch.zeros(2)}, metadata)


def test_forged_good_metadata_pass(tmp_path: Path) -> None:
    forge(tmp_path / "delta", good_metadata())
    assert load_delta(tmp_path / "delta").classes == ("a", "b")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"classes": []}, "classes that are not"),
        ({"classes": "ab"}, "classes that are not"),
        ({"classes": {"a": 1}}, "classes that are not"),
        ({"classes": ["a", 1]}, "classes that are not"),
        ({"classes": ["a", ""]}, "classes that are not"),
        ({"classes": ["a", "a"]}, "two classes of one name"),
        ({"classes": ["a", "\u001b[2J"]}, "classes that are not"),
        ({"classes": ["a", "\ud800"]}, "classes that are not"),
        ({"classes": ["a", "b" * 1001]}, "classes that are not"),
        ({"classes": [str(number) for number in range(100_001)]}, "classes that are not"),
        ({"backbone": 3}, "backbone that is no name"),
        ({"backbone": "x\ny"}, "backbone that is no name"),
        ({"norm": None}, "norm that is no name"),
        ({"base_hash": "0" * 63}, "no SHA-256"),
        ({"base_hash": "G" * 64}, "no SHA-256"),
        ({"base_hash": 0}, "no SHA-256"),
        ({"extra": []}, "extra that are no mapping"),
        ({"preprocessing": None}, "preprocessing that are no mapping"),
        ({"more": 1}, "the wrong fields"),
        ({"method": "tinytl-b"}, "a method that"),
        ({"method": None}, "a method that"),
        ({"method": {"parts": "bias"}}, "a method that"),
        ({"method": {"parts": [{"part": []}]}}, "a method that"),
        ({"method": {"parts": [{"part": "unknown"}]}}, "a method that"),
        ({"method": {"parts": [{"part": "last-blocks", "count": -1}]}}, "a method that"),
        ({"method": {"parts": [{"part": "lite-residual", "groups": 0}]}}, "a method that"),
        ({"method": {"parts": [{"part": "lite-modules", "modules": [[1, 3, 10**7, 50]]}]}}, "a method that"),
        ({"method": {"parts": [{"part": "block-bias", "blocks": [*range(0, 9_000, 2)]}]}}, "a method that"),
    ],
)
def test_hostile_metadata_are_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    forge(tmp_path / "delta", good_metadata() | change)
    refused(tmp_path / "delta", match)


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 0},
        {"resolution": 10**30},
        {"resolution": 224.0},
        {"resolution": True},
        {"mean": [0, 0]},
        {"mean": 0.5},
        {"mean": [0, 0, "0"]},
        {"mean": [0, 0, 10**400]},
        {"std": [0.1, 0.1, 0]},
        {"std": [0.1, 0.1, -1]},
        {"interpolation": ""},
        {"interpolation": 2},
        {"crop_fraction": 0},
        {"crop_fraction": 1.5},
        {"crop_fraction": "1"},
        {"more preprocessing": 224},
    ],
)
def test_hostile_preprocessing_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    metadata = good_metadata()
    metadata["preprocessing"] |= change
    forge(tmp_path / "delta", metadata)
    refused(tmp_path / "delta", next(iter(change)).split()[-1])


def test_missing_fields_and_infinite_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "delta"
    for name in good_metadata():
        forge(path, {key: value for key, value in good_metadata().items() if key != name})
        refused(path, "the wrong fields")
    for text in ('{"resolution": 1e999}', '{"resolution": NaN}', "{", '"\\ud800"', "9" * 5000, "[" * 9999):
        strings = {key: json.dumps(value) for key, value in good_metadata().items()} | {"preprocessing": text}
        strings["format"] = KIND
        strings["content_sha256"] = _atomic.content_hash([], strings)
        header = json.dumps({"__metadata__": strings}).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        refused(path, "preprocessing")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(good_metadata())), value=json_values)
def test_any_json_in_any_field(tmp_path_factory: pytest.TempPathFactory, name: str, value: object) -> None:
    path = tmp_path_factory.mktemp("delta") / "delta"
    forge(path, good_metadata() | {name: value})
    try:
        delta = load_delta(path)
    except DeltaError as error:
        message = str(error)
        assert "\n" not in message
    else:
        assert all(isinstance(entry, str) for entry in (delta.backbone, delta.norm, *delta.classes))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200))
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 20) + b'{"__metadata__":null}')
@example(struct.pack("<Q", 4) + b"null")
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("delta") / "delta"
    path.write_bytes(data)
    refused(path, "delta ")


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    model, adaptation = adapted()
    path = tmp_path / "delta"
    with pytest.raises(DeltaError, match="two classes of one name"):
        save(path, model, adaptation, classes=["a", "a"])
    with pytest.raises(DeltaError, match="preprocessing of other fields"):
        save(path, model, adaptation, preprocessing={})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(path, model, adaptation, extra={"path": path})
    with pytest.raises(RunError, match="cannot write"):
        save(tmp_path / "none" / "delta", model, adaptation)
    with pytest.raises(ValueError, match="is not in the model"):
        save(path, Network(), FakeAdaptation("0" * 64))
    assert list(tmp_path.iterdir()) == []
