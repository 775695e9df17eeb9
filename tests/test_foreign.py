"""A network as an outsider would write it: traced, made lean exactly, and refused where it cannot be."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.delta import apply_delta, load_delta, save_delta
from tinytl.engine import FitOptions, fit
from tinytl.errors import InputError, UnknownNameError
from tinytl.methods import METHODS, TINYTL_LB, Bias, Full, LastBlocks, adapt_
from tinytl.nn.kept import kept

from .foreign import assert_adapts, observed_bytes, settle_
from .test_adapt import assert_same_gradients, assert_unchanged, backward, images, snapshot
from .test_engine import FakeBatch, FakeLoader


class SamePadConv(nn.Conv2d):
    """TensorFlow's SAME padding, as everybody writes it."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        ih, iw = x.size()[-2:]
        kh, kw = self.weight.size()[-2:]
        oh, ow = math.ceil(ih / self.stride[0]), math.ceil(iw / self.stride[1])
        pad_h = max((oh - 1) * self.stride[0] + kh - ih, 0)
        pad_w = max((ow - 1) * self.stride[1] + kw - iw, 0)
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, [pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardizedConv(nn.Conv2d):
    """A weight that is made anew in each forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Gate(nn.Module):
    """Squeeze and excite by functional calls."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(s))))


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation inside, as timm has it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), 0.1)


class PlainBlock(nn.Module):
    def __init__(self, before: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = SamePadConv(before, channels, 3, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.down = None
        if stride > 1 or before != channels:
            self.down = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(before, channels, 1))

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        identity = x if self.down is None else self.down(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        self.act(out)  # in place: what it returns is thrown away
        return out if scale is None else out * scale


class GatedBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.norm = NormAct(2 * channels)
        self.depth = StandardizedConv(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.group = nn.GroupNorm(4, 2 * channels)
        self.gate = Gate(2 * channels)
        self.project = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.expand(x))
        y = F.hardswish(self.group(self.depth(y)))
        return x + self.project(self.gate(y))


class SplitBlock(nn.Module):
    """Channels split, shuffled and joined; takes and gives a dictionary."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv = nn.Conv2d(half, half, 3, padding=1)
        self.norm = nn.BatchNorm2d(half)

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = given["x"].chunk(2, dim=1)
        y = torch.cat([a, F.relu6(self.norm(self.conv(b)))], dim=1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return {"x": y}


class Foreign(nn.Module):
    """Nothing in it comes from this package, and nothing in it is named as here."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.entry = SamePadConv(3, 8, 3, 2)
        self.bn = nn.BatchNorm2d(8)
        self.body = nn.ModuleList([PlainBlock(8, 8), PlainBlock(8, 16, 2), GatedBlock(16), PlainBlock(16, 16)])
        self.mix = SplitBlock(16)
        self.dropout = dropout
        self.fc = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn(self.entry(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        for block in self.body:
            x = block(x)
        x = self.mix({"x": x})["x"]
        x = x * torch.tanh(x)  # a network's own activation, outside of every block
        x = F.adaptive_avg_pool2d(x, (2, 2))
        x = F.dropout(x.view(x.size(0), -1), self.dropout, self.training)
        return self.fc(x)


BLOCKS = ("body.0", "body.1", "body.2", "body.3")


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(3)
    return settle_(Foreign())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_lean_is_stock(base: nn.Module, name: str) -> None:
    adaptation, share = assert_adapts(base, name, 32)
    assert adaptation.blocks == BLOCKS
    assert adaptation.classifier == "fc"
    assert name == "ft-last" or share < (0.6 if name.startswith("ft") else 0.3)
    assert "body.0 ... body.3" in str(adaptation)


def test_it_stays_the_same_object_with_the_same_paths(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    kinds = {path: type(module) for path, module in model.named_modules()}
    adaptation = adapt_(model, Bias(), resolution=32)
    assert type(model) is Foreign
    for path in ("body.0", "body.2.gate", "body.2.norm", "body.2.depth", "mix"):
        assert type(model.get_submodule(path)) is kinds[path]
    gone = {key for key in base.state_dict() if key not in model.state_dict()}
    assert {key.rpartition(".")[0] for key in gone if not key.endswith("num_batches_tracked")} == set(adaptation.folded)
    assert set(model.state_dict()) - set(base.state_dict()) == {
        "body.0.conv2.bias",
        "body.1.conv2.bias",
        "body.3.conv2.bias",
        "body.2.expand.bias",
        *(f"mix.conv.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    }


def test_a_frozen_weight_that_is_computed_is_computed_once(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    adaptation = adapt_(model, Bias(), resolution=32)
    conv = model.get_submodule("body.2.depth")
    assert [name for name, _ in conv.named_buffers()] == ["_constant0"]
    assert "body.2.depth._constant0" not in model.state_dict()
    assert "body.2.depth.weight" in adaptation.frozen
    assert torch.equal(model.get_parameter("body.2.depth.weight"), base.get_parameter("body.2.depth.weight"))
    trained = copy.deepcopy(base)
    adapt_(trained, Full(), resolution=32)
    assert not list(trained.get_submodule("body.2.depth").named_buffers())


@pytest.mark.parametrize("side", [32, 45, 64])
def test_another_size_and_another_batch(base: nn.Module, side: int) -> None:
    lean, stock = copy.deepcopy(base), copy.deepcopy(base)
    adaptation = adapt_(lean, Bias(), resolution=32)
    adapt_(stock, Bias(), resolution=32, lean=False)
    for batch in (1, 5):
        x = images(batch, side, torch.float64)
        torch.testing.assert_close(lean(x), stock(x), rtol=1e-10, atol=1e-10)
        assert_same_gradients(backward(lean, x), backward(stock, x), adaptation)
        assert kept(lean, tuple(x.shape)).total_bytes == observed_bytes(lean, side, batch)


def test_copies_pickles_and_modes(base: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    adapt_(model, TINYTL_LB, resolution=32)
    x = images(2, 32, torch.float64)
    before = model(x).detach()
    torch.save(model, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert torch.equal(other(x), before)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(other(x), before)  # it runs on its own tensors
        assert torch.equal(model(x), before)


def test_dropout_follows_the_mode_and_is_drawn_again_alike() -> None:
    torch.manual_seed(0)
    model = settle_(Foreign(dropout=0.5))
    adapt_(model, Bias(), resolution=32)
    x = images(4, 32, torch.float64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    found = []
    for size in (4, 1):  # micro-batches draw what their batch would draw
        torch.manual_seed(5)
        model.zero_grad()
        for part in x.split(size):
            model(part).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_random_numbers_inside_a_block_that_runs_again() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.back = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.conv(x)) * self.conv(x)
            if self.training:
                y = y * torch.rand(y.shape, dtype=y.dtype) + F.dropout2d(y, 0.5, self.training)
            return x + self.back(y)

    net = nn.Sequential(Noisy(), Noisy(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    stock = copy.deepcopy(net)
    adaptation = adapt_(net, Full(), resolution=16)
    adapt_(stock, Full(), resolution=16, lean=False)
    assert adaptation.blocks == ("0", "1")
    x, found = images(3, 16, torch.float64), []
    for model in (net, stock):
        torch.manual_seed(9)
        found.append((model.train()(x), backward_seeded(model, x, 9)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1], adaptation)
    assert kept(net, tuple(x.shape)).total_bytes == observed_bytes(net, 16, 3)
    assert "random state" in {entry.what for entry in kept(net, tuple(x.shape)).entries}


def backward_seeded(model: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return backward(model, x)


class TwoGates(nn.Module):
    """Two stretches that run again, of one and the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.first, self.second = SelfGate(), SelfGate()

    def forward(self, input: Tensor) -> Tensor:
        x = self.stem(input)
        return self.fc((self.first(x) + self.second(x)).mean((2, 3)))


class SelfGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(self.conv(input))


def test_what_two_stretches_keep_of_one_tensor_is_counted_once() -> None:
    torch.manual_seed(0)
    assert_adapts(settle_(TwoGates()), "tinytl-b", 16)


def test_hooks_on_children_run(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    adapt_(model, Bias(), resolution=32)
    x, seen = images(2, 32, torch.float64), []
    before = model(x).detach()
    for path in ("body.0.conv2", "body.2.gate", "mix", "body.1"):
        model.get_submodule(path).register_forward_hook(lambda m, a, o, path=path: seen.append(path))
    torch.testing.assert_close(model(x).detach(), before)
    assert seen == ["body.0.conv2", "body.1", "body.2.gate", "mix"]


def test_inside_torch_compile(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    adapt_(model, Bias(), resolution=32)
    x = images(2, 32, torch.float64)
    expected = backward(model, x)
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    torch.testing.assert_close(backward(compiled, x), {f"_orig_mod.{n}": g for n, g in expected.items()})


class Batches(FakeLoader):
    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[FakeBatch]:
        yield FakeBatch(images(4, 32), torch.tensor([0, 1, 2, 3]))


def test_training_the_delta_and_what_is_frozen(base: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(base).float()
    fresh = copy.deepcopy(model)
    adaptation = adapt_(model, TINYTL_LB, resolution=32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit(model, Batches(batches=1), None, FitOptions(epochs=3, lr=0.01))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert changed <= set(adaptation.delta_keys)
    preprocessing = {
        "resolution": 32,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "crop_fraction": 1.0,
    }
    names = {"backbone": "foreign", "norm": "bn", "classes": list("abcde"), "preprocessing": preprocessing}
    save_delta(tmp_path / "d.safetensors", model, adaptation, **names)  # type: ignore[arg-type]
    again = adapt_(fresh, TINYTL_LB, resolution=32)
    apply_delta(fresh, load_delta(tmp_path / "d.safetensors"), again)
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    assert torch.equal(model.eval()(images(2, 32)), fresh.eval()(images(2, 32)))


def test_last_blocks_and_what_stands_behind_them(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    adaptation = adapt_(model, LastBlocks(1), resolution=32)
    trained = {adaptation.origins.get(name, name).split(".")[0] for name in adaptation.trained}
    assert trained == {"body", "mix", "fc"}
    assert {name.split(".")[1] for name in adaptation.trained if name.startswith("body.")} == {"3"}


def test_blocks_are_named_or_found(base: nn.Module) -> None:
    named = adapt_(copy.deepcopy(base), TINYTL_LB, blocks=["body.1", "body.2"], resolution=32)
    assert named.inserted == ("body.2.lite",)
    with pytest.raises(UnknownNameError, match=r"'body\.4': did you mean 'body\.\d'"):
        adapt_(copy.deepcopy(base), TINYTL_LB, blocks=["body.4"], resolution=32)
    for odd in ("mix", "fc"):
        model = copy.deepcopy(base)
        before = snapshot(model)
        with pytest.raises(InputError, match=rf"'{odd}': .*expected one image in and one out"):
            adapt_(model, TINYTL_LB, blocks=["body.0", odd], resolution=32)
        assert_unchanged(model, before)
