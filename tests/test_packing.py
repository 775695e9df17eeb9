"""Frozen weights in 8 or 16 bits: how far they are off, and that all the rest stays exact."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.backbones import BACKBONES, load
from tinytl.delta import load_delta
from tinytl.errors import DeltaError, InputError
from tinytl.memory import measure_step
from tinytl.memory.step import StepSpec, build_network
from tinytl.methods import METHODS, TINYTL_B, TINYTL_LB, adapt_
from tinytl.nn.kept import kept
from tinytl.nn.layers import SqueezeExcite
from tinytl.nn.lean import LeanConv2d, LeanLinear, LeanSqueezeExcite
from tinytl.nn.meta import meta_copy
from tinytl.nn.packing import Packed, pack_frozen_
from tinytl.ops._layout import rows
from tinytl.ops._pointwise import PIECE_BYTES, in_pieces, input_gradient, product
from tinytl.ops.chain import chain
from tinytl.ops.packing import Packing
from tinytl.ops.squeeze_excite import SqueezeExcite as SqueezeExciteOp
from tinytl.run import RunResult, train
from tinytl.spec import RunOptions
from tinytl.trained import open_run

from . import small_run
from ._torchvision import need
from .foreign import observed_bytes, settle_
from .mcu_files import MCU_FILES, published
from .observed import observe_kept
from .test_adapt import backward, enliven_, images, small_network
from .test_memory_planned import both

WAYS = {"int8": (8, False), "codebook": (8, True), "float16": (16, False)}
ways = pytest.mark.parametrize("way", WAYS)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights whose channels differ in size by orders of magnitude, in the layout of a lean convolution."""
    weight = torch.randn(shape, dtype=dtype) * 10.0 ** torch.empty(shape[0], *(1,) * (len(shape) - 1)).uniform_(-3, 2)
    return weight.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else weight


def rounded(way: str, weight: Tensor) -> Tensor:
    packing = Packing.of(*WAYS[way])
    codes, table = packing.pack(weight)
    assert codes.shape == weight.shape
    assert codes.stride() == weight.stride()
    assert table.dtype == weight.dtype
    assert codes.nbytes + table.nbytes == packing.packed_bytes(weight)
    found = packing.expand(codes, table)
    if weight.dim() == 2 or weight.is_contiguous(memory_format=torch.channels_last):
        assert found.stride() == weight.stride()
    return found


# ------------------------------------------------------------ how far they are off


@pytest.mark.parametrize("shape", [(12, 7, 1, 1), (9, 1, 5, 5), (6, 4, 3, 3), (10, 33)])
def test_int8_is_off_by_half_a_step_of_its_channel_or_a_step(shape: tuple[int, ...]) -> None:
    weight = draw(*shape)
    off = rounded("int8", weight) - weight
    step = weight.abs().flatten(1).amax(1) / 127
    taps = off.flatten(2).shape[2] if len(shape) == 4 else 1
    largest = off.abs().flatten(1).amax(1)
    assert (largest <= step * (1.0 if taps > 1 else 0.5) * (1 + 1e-5)).all()
    assert largest.max() > 0
    if taps > 1:  # the sum of each filter of several taps
        assert (off.sum((2, 3)).abs() <= step[:, None] * 0.5 * (1 + 1e-4)).all()


@pytest.mark.parametrize("shape", [(40, 9, 1, 1), (30, 1, 5, 5), (20, 4, 3, 3), (25, 33)])
def test_float16_is_off_by_half_a_unit_of_half_precision(shape: tuple[int, ...]) -> None:
    for size in (1e-20, 1.0, 1e20):  # far out of half precision's own range
        weight = draw(*shape) * size
        off = (rounded("float16", weight) - weight).abs()
        assert (off <= weight.abs() / 2048 + weight.abs().max() * 2.0**-39).all()


@pytest.mark.parametrize("shape", [(40, 90, 1, 1), (300, 1, 5, 5), (20, 40, 3, 3), (25, 330)])
def test_the_codebook_is_no_worse_than_even_spacing(shape: tuple[int, ...]) -> None:
    for weight in (torch.randn(shape), torch.rand(shape), torch.randn(shape) ** 3, draw(*shape)):
        off = rounded("codebook", weight) - weight
        assert off.square().mean().sqrt() <= (weight.max() - weight.min()) / 510
    weight = torch.randn(shape) ** 3  # few values far out: there k-means does much better
    assert (rounded("codebook", weight) - weight).square().mean().sqrt() < (weight.max() - weight.min()) / 2000


def test_a_tensor_of_256_values_comes_back_from_a_codebook_to_the_bit() -> None:
    values = torch.randn(256)
    weight = values[torch.randint(256, (30, 20, 3, 3))].contiguous(memory_format=torch.channels_last)
    assert weight.unique().numel() == 256
    assert torch.equal(rounded("codebook", weight), weight)
    few = weight.sign()
    assert torch.equal(rounded("codebook", few), few)


def test_weights_on_a_grid_of_127_steps_come_back_from_int8() -> None:
    codes = torch.randint(-127, 128, (400, 3, 5, 5)).double()
    scale = 10.0 ** torch.empty(400, 1, 1, 1, dtype=torch.float64).uniform_(-6, 3)
    codes[:100] = (
        codes[:100] / torch.linspace(2, 127, 100).view(-1, 1, 1, 1)
    ).round()  # coarser grids, down to 0 and 1
    codes[7] = 0
    weight = (codes * scale.float().double()).float()
    found = rounded("int8", weight)
    ulp = torch.nextafter(weight.abs(), torch.tensor(torch.inf)) - weight.abs()
    assert ((found - weight).abs() <= ulp).all()
    assert (found == weight).float().mean() > 0.99


@ways
def test_zeros_and_single_values_are_met(way: str) -> None:
    weight = torch.zeros(4, 100, 1, 1)
    assert torch.equal(rounded(way, weight), weight)
    weight[1, 5] = -0.75
    assert torch.equal(rounded(way, weight), weight)


@ways
def test_equal_weights_have_equal_codes_whatever_the_threads_and_the_layout(way: str) -> None:
    weight = draw(70, 60, 3, 3)
    packing = Packing.of(*WAYS[way])
    codes, table = packing.pack(weight)
    torch.set_num_threads(2)
    again, table_again = packing.pack(weight.contiguous())
    assert torch.equal(codes, again)
    assert torch.equal(table, table_again)


def test_a_codebook_is_looked_up_in_every_layout() -> None:
    packing = Packing.of(8, codebook=True)
    weight = torch.randn(90, 80, 3, 3)  # more than one slice
    codes, table = packing.pack(weight)
    expected = table[codes.long()]
    assert torch.equal(packing.expand(codes, table), expected)
    assert torch.equal(packing.expand(codes.contiguous(memory_format=torch.channels_last), table), expected)


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="4 bits: expected 8 or 16"):
        Packing.of(4)
    with pytest.raises(ValueError, match="16 bits with a codebook"):
        Packing.of(16, codebook=True)


# ------------------------------------------------------------ networks


def expanded_twin(model: nn.Module, packed: Packed, lean: nn.Module) -> nn.Module:
    """`lean`, not packed, with the rounded weights of `model` in it."""
    for layer in packed.layers:
        holder = model.get_submodule(layer.layer)
        weight = packed.packing.expand(holder.weight_codes, holder.weight_table)  # type: ignore[arg-type]
        with torch.no_grad():
            lean.get_submodule(layer.layer).weight.copy_(weight)  # type: ignore[operator]
    return lean


def squeezed_network() -> nn.Module:
    """Squeeze and excite, a convolution with a bias of its own in front of a norm, and a frozen linear layer."""
    torch.manual_seed(3)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish()),
                nn.Sequential(nn.Conv2d(16, 32, 1), nn.Hardswish(), SqueezeExcite(32, 24), nn.Conv2d(32, 16, 1)),
                nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
            )
            self.neck = nn.Linear(24, 40)
            self.classifier = nn.Linear(40, 5)

        def forward(self, input: Tensor) -> Tensor:
            return self.classifier(torch.relu(self.neck(self.features(input).mean((2, 3)))))

    return enliven_(Network())


def small(norm: str = "bn", same: bool = False, seed: int = 0) -> nn.Module:
    """A network of inverted bottlenecks that draws nothing at random."""
    model = small_network(norm, same, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


NETWORKS = {
    "bn": small,
    "gn": lambda: small("gn"),
    "same": lambda: small(same=True),
    "squeezed": squeezed_network,
}


@ways
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_gradients_are_those_of_the_network_with_the_rounded_weights(network: str, name: str, way: str) -> None:
    base = NETWORKS[network]().double().eval()
    blocks = [f"features.{i}" for i in range(3)] if network == "squeezed" else None
    adaptation = adapt_(base, METHODS[name], resolution=33, blocks=blocks)
    model = copy.deepcopy(base)
    packed = pack_frozen_(model, *WAYS[way])
    twin = expanded_twin(model, packed, copy.deepcopy(base))
    assert bool(packed.layers) == (name != "ft-full")
    x = images(2, 33, torch.float64)
    for training in (False, True):
        model.train(training)
        twin.train(training)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
        ours, theirs = backward(model, x), backward(twin, x)
        assert set(ours) == set(theirs) == set(adaptation.trained)
        largest = max(float(grad.abs().max()) for grad in theirs.values())
        for key, grad in ours.items():
            torch.testing.assert_close(grad, theirs[key], rtol=1e-10, atol=1e-10 * largest)
    rule = kept(model, (2, 3, 33, 33)).total_bytes
    assert rule == observed_bytes(model, 33, 2) == kept(twin, (2, 3, 33, 33)).total_bytes


def test_what_is_packed_there() -> None:
    model = squeezed_network()
    adapt_(model, TINYTL_B, blocks=[f"features.{i}" for i in range(3)], resolution=33)
    packed = pack_frozen_(model, 8)
    assert [layer.layer for layer in packed.layers] == [
        *("features.0.0", "features.1.0", "features.1.2.fc1", "features.1.2.fc2", "features.1.3", "features.2.0"),
        "neck",
    ]
    assert model.get_submodule("features.0.0").norm is not None  # its own bias trains in front of the norm
    assert all(t.name.rpartition(".")[2] != "weight" or t.bytes <= 64 for t in packed.left)  # gamma
    # and a codebook of 1 KB is no gain for the smaller of them
    model = squeezed_network()
    adapt_(model, TINYTL_B, blocks=[f"features.{i}" for i in range(3)], resolution=33)
    larger = pack_frozen_(model, 8, codebook=True)
    assert {layer.layer for layer in packed.layers} - {layer.layer for layer in larger.layers} == set()
    assert all(layer.bytes_after < layer.bytes_before for layer in larger.layers)


@ways
def test_a_packed_weight_is_a_buffer_of_small_numbers(way: str) -> None:
    lean = small()
    adapt_(lean, TINYTL_LB, resolution=32)
    model = copy.deepcopy(lean)
    packed = pack_frozen_(model, *WAYS[way])
    kind = {"int8": torch.int8, "codebook": torch.uint8, "float16": torch.int16}[way]
    state, before = model.state_dict(), lean.state_dict()
    assert packed.layers
    for layer in packed.layers:
        holder = model.get_submodule(layer.layer)
        assert holder.weight is None
        assert state[f"{layer.layer}.weight_codes"].dtype == kind
        assert f"{layer.layer}.weight" not in state
        codes, table = state[f"{layer.layer}.weight_codes"], state[f"{layer.layer}.weight_table"]
        weight = before[f"{layer.layer}.weight"]
        assert (layer.elements, layer.bytes_before) == (weight.numel(), weight.nbytes)
        assert layer.bytes_after == codes.nbytes + table.nbytes < weight.nbytes
        off = (packed.packing.expand(codes, table) - weight).abs().max() / weight.abs().max()
        assert layer.error == pytest.approx(float(off))
        assert layer.error <= packed.largest_error < 0.015
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in lean.named_parameters() if p.requires_grad
    ]
    gone = {f"{layer.layer}.weight" for layer in packed.layers}
    assert {n for n, p in lean.named_parameters() if not p.requires_grad} - gone == {t.name for t in packed.left}
    assert packed.left_bytes == sum(before[t.name].nbytes for t in packed.left)
    assert "layers" in str(packed)


@ways
def test_copies_state_dicts_and_types(way: str) -> None:
    base = small()
    adapt_(base, TINYTL_LB, resolution=32)
    model = copy.deepcopy(base)
    pack_frozen_(model, *WAYS[way])
    x = images(2)
    y = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    ghost = meta_copy(model)
    for name, tensor in model.state_dict().items():
        other = ghost.state_dict()[name]
        assert (other.dtype, other.shape, other.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    other = small(seed=5)
    adapt_(other, TINYTL_LB, resolution=32)
    pack_frozen_(other, *WAYS[way])
    assert not torch.allclose(other(x), y)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    double = copy.deepcopy(model).to(torch.float64)
    for name, tensor in model.state_dict().items():
        assert double.state_dict()[name].dtype == (torch.float64 if tensor.is_floating_point() else tensor.dtype)
    torch.testing.assert_close(double(x.double()).float(), y, rtol=1e-4, atol=1e-4)
    back = double.float()
    assert torch.equal(back(x), y)
    torch.testing.assert_close(model.to(memory_format=torch.contiguous_format)(x), y)  # type: ignore[call-overload]


def test_no_step_changes_a_packed_weight() -> None:
    model = small("gn")
    adapt_(model, TINYTL_LB, resolution=32)
    pack_frozen_(model, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".weight_" in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    backward(model.train(), images(2))
    optimizer.step()
    assert before
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_under_autocast() -> None:
    model = small().eval()
    adapt_(model, TINYTL_B, resolution=32)
    x, results = images(2), {}
    for way, how in {"32": None, **WAYS}.items():
        mine = copy.deepcopy(model)
        if how is not None:
            pack_frozen_(mine, *how)
        with torch.autocast("cpu", torch.bfloat16):
            y = mine(x)
        y.float().square().sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in mine.parameters())
        results[way] = y.float()
    for y in results.values():
        assert (y - results["32"]).abs().max() <= 0.05 * results["32"].abs().max()


# ------------------------------------------------------------ refusals


def test_what_cannot_be_packed_is_refused() -> None:
    base = small()
    with pytest.raises(InputError, match="not lean"):
        pack_frozen_(base, 8)
    stock = copy.deepcopy(base)
    adapt_(stock, TINYTL_B, resolution=32, lean=False)
    with pytest.raises(InputError, match="not lean"):
        pack_frozen_(stock, 8)
    adapt_(base, TINYTL_B, resolution=32)
    for bits, codebook in ((32, False), (4, False), (16, True)):
        with pytest.raises(InputError, match=f"cannot pack frozen weights into {bits} bits"):
            pack_frozen_(base, bits, codebook)
    spoilt = copy.deepcopy(base)
    [*_, last] = [m for m in spoilt.modules() if isinstance(m, LeanConv2d)]
    assert last.weight is not None
    last.weight.data[0, 0, 0, 0] = torch.inf
    before = set(spoilt.state_dict())
    with pytest.raises(InputError, match=r"\.weight holds NaN or infinity"):
        pack_frozen_(spoilt, 8)
    assert set(spoilt.state_dict()) == before
    pack_frozen_(base, 8)
    for bits in (8, 16):
        with pytest.raises(InputError, match="packed already"):
            pack_frozen_(base, bits)


class Tied(nn.Module):
    """A weight that two layers share, and one that a forward of its own takes beside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.third, self.lent = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.third.weight = self.second.weight
        self.classifier = nn.Linear(12, 4)

    def forward(self, input: Tensor) -> Tensor:
        x = self.lent(torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(input)))))))
        x = torch.nn.functional.conv2d(torch.relu(x), self.lent.weight)
        return self.classifier(torch.tanh(x).mean((2, 3)))


@ways
def test_shared_and_lent_weights(way: str) -> None:
    base = Tied().double().eval()
    adapt_(base, TINYTL_B, resolution=16)
    model = copy.deepcopy(base)
    packed = pack_frozen_(model, *WAYS[way])
    assert "second" in {layer.layer for layer in packed.layers}
    assert "third" not in {layer.layer for layer in packed.layers}  # counted once
    assert model.second.weight_codes is model.third.weight_codes
    assert [(t.name, t.why) for t in packed.left if t.name.endswith("lent.weight")] == [
        ("lent.weight", "a forward of its own takes it, too")
    ]
    twin = expanded_twin(model, packed, copy.deepcopy(base))
    x = images(2, 16, torch.float64)
    ours, theirs = backward(model, x), backward(twin, x)
    for key, grad in ours.items():
        torch.testing.assert_close(grad, theirs[key], rtol=1e-10, atol=1e-12)


def test_a_network_without_values_is_packed_by_its_shapes() -> None:
    model = small()
    adapt_(model, TINYTL_LB, resolution=32)
    for bits, codebook in WAYS.values():
        ghost, real = meta_copy(model), copy.deepcopy(model)
        seen, made = pack_frozen_(ghost, bits, codebook), pack_frozen_(real, bits, codebook)
        shapes = [{n: (t.dtype, t.shape, t.stride()) for n, t in m.state_dict().items()} for m in (ghost, real)]
        assert shapes[0] == shapes[1]
        assert (seen.bytes_before, seen.bytes_after) == (made.bytes_before, made.bytes_after)


# ------------------------------------------------------------ one layer's weight at a time


def alive_when_expanding(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> tuple[int, int]:
    """How often a weight is expanded in one step, and the most that are alive when one more is."""
    alive: list[weakref.ref[Tensor]] = []
    most, expand = [0], Packing.expand

    def watched(self: Packing, codes: Tensor, table: Tensor) -> Tensor:
        most.append(sum(ref() is not None for ref in alive))
        made = expand(self, codes, table)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Packing, "expand", watched)
    backward(model, x)
    assert all(ref() is None for ref in alive)
    return len(alive), max(most)


@ways
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_one_layer_is_expanded_at_a_time(network: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NETWORKS[network]()
    adapt_(
        model, TINYTL_B, resolution=33, blocks=[f"features.{i}" for i in range(3)] if network == "squeezed" else None
    )
    packed = pack_frozen_(model, *WAYS[way])
    count, most = alive_when_expanding(monkeypatch, model.train(), images(2, 33))
    assert count >= len(packed.layers)
    assert most == 0


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_packed_layer_alone_keeps_its_rule(kind: str) -> None:
    conv, linear = nn.Conv2d(3, 16, 3), nn.Linear(30, 20)
    for layer in (conv, linear):
        layer.weight.requires_grad_(False)
    lean = LeanConv2d(conv) if kind == "conv" else LeanLinear(linear)
    x = images(2, 12) if kind == "conv" else torch.randn(4, 30)
    y = lean(x)
    pack_frozen_(lean, 8)
    x.requires_grad_()
    bytes_kept, z = observe_kept(lambda: lean(x), [*lean.parameters(), *lean.buffers()])
    assert bytes_kept == 0
    assert 0 < (z - y).abs().max() <= 0.02 * y.abs().max()
    assert kind == "linear" or "int8" in repr(lean)


def test_a_squeeze_and_excite_with_one_frozen_layer() -> None:
    module = SqueezeExcite(16, 12).double()
    module.fc2.weight.requires_grad_(False)
    twin = LeanSqueezeExcite(copy.deepcopy(module), SqueezeExciteOp())
    lean = LeanSqueezeExcite(module, SqueezeExciteOp())
    packed = pack_frozen_(lean, 8)
    expanded_twin(lean, packed, twin)
    assert [layer.layer for layer in packed.layers] == ["fc2"]
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    ours, theirs = backward(lean, x), backward(twin, x)
    assert set(ours) == set(theirs) == {"fc1.weight", "fc1.bias", "fc2.bias"}
    for key, grad in ours.items():
        torch.testing.assert_close(grad, theirs[key], rtol=1e-10, atol=1e-12)


def test_a_scale_that_trains_behind_a_packed_weight() -> None:
    """No network asks for it; the recipe gives its gradient all the same."""
    from tinytl.ops._weights import WeightRecipe
    from tinytl.ops.conv import Conv2d

    packing, weight = Packing.of(8), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    codes, table = packing.pack(weight)
    norm = [torch.rand(6, dtype=torch.float64).add_(0.5).requires_grad_() for _ in range(2)]
    norm += [torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64).add_(0.5)]
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    op = Conv2d((3, 3), out_channels=6, recipe=WeightRecipe(norm_eps=1e-3, packing=packing))
    plain = Conv2d((3, 3), out_channels=6, recipe=WeightRecipe(norm_eps=1e-3))
    results = [
        chain(x, [(op, (codes, None, table, *norm))]),
        chain(x, [(plain, (packing.expand(codes, table), None, *norm))]),
    ]
    grad = torch.randn_like(results[0])
    found = [torch.autograd.grad(y, (x, norm[0], norm[1]), grad) for y in results]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------ planned and measured

STEP = StepSpec("proxylessnas_mobile", "tinytl-l+b", resolution=64, batch_size=2, classes=5)


PLANNED = [
    pytest.param(
        name, norm, way, marks=[pytest.mark.slow] if way != "int8" and (name == "tinytl-b") == (norm == "gn") else []
    )
    for name in ("tinytl-l+b", "tinytl-b")
    for norm in ("bn", "gn")
    for way in WAYS
]


@pytest.mark.parametrize(("name", "norm", "way"), PLANNED)
def test_what_is_planned_is_what_is_measured(name: str, norm: str, way: str) -> None:
    bits, codebook = WAYS[way]
    spec = dataclasses.replace(STEP, method=name, norm=norm)
    described, measured = both(dataclasses.replace(spec, frozen_bits=bits, codebook=codebook))
    assert described.resident_bytes == measured.resident_bytes
    assert described.peak_bytes == pytest.approx(measured.peak_bytes, rel=5e-3)


def test_resident_bytes_fall_by_what_the_report_says() -> None:
    def resident(model: nn.Module) -> int:
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    base, _ = build_network(STEP)
    for bits, codebook in WAYS.values():
        model = copy.deepcopy(base)
        packed = pack_frozen_(model, bits, codebook)
        assert resident(base) - resident(model) == packed.bytes_before - packed.bytes_after
        assert packed.bytes_before > 11e6  # all of the network's convolutions but the lite modules'
        assert packed.bytes_after < packed.bytes_before * (0.51 if bits == 16 else 0.26)
        if codebook:
            asked, _ = build_network(dataclasses.replace(STEP, frozen_bits=bits, codebook=codebook))
            assert resident(asked) == resident(model)


def test_a_step_of_other_bits_is_refused() -> None:
    with pytest.raises(InputError, match="frozen_bits is 4: expected one of 32, 16, 8"):
        dataclasses.replace(STEP, frozen_bits=4).check()
    with pytest.raises(InputError, match="codebook with frozen_bits 32"):
        dataclasses.replace(STEP, codebook=True).check()


# ------------------------------------------------------------ real networks


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("efficientnet_lite0", {"int8": 0.12, "codebook": 0.2, "float16": 0.01}),  # with its ImageNet weights
        ("proxylessnas_mobile", {"int8": 0.01, "codebook": 0.02, "float16": 0.001}),
        ("mobilenet_v3_large", {"int8": 0.01, "codebook": 0.02, "float16": 0.001}),
    ],
)
def test_logits_stay_close(name: str, bounds: dict[str, float]) -> None:
    """The root mean square of the change, relative to the logits' spread over the classes."""
    pretrained = name == "efficientnet_lite0"
    base = load(name, pretrained=pretrained).model
    if not pretrained:
        settle_(base).float()
    adapt_(base.eval(), METHODS["ft-last"], resolution=96)
    generator = torch.Generator().manual_seed(1)
    sizes = [torch.randn(8, 3, side, side, generator=generator) for side in (3, 6, 12, 24, 48)]
    x = torch.stack([F.interpolate(noise, (96, 96), mode="bicubic") for noise in sizes]).sum(0) / 2  # as photographs
    with torch.no_grad():
        before = base(x)
        spread = (before - before.mean(1, keepdim=True)).square().mean().sqrt()
        for way, bound in bounds.items():
            model = copy.deepcopy(base)
            pack_frozen_(model, *WAYS[way])
            assert 0 < (model(x) - before).square().mean().sqrt() <= bound * spread


@pytest.mark.parametrize("name", sorted(MCU_FILES))
def test_published_int8_weights_are_packed_as_they_are(name: str) -> None:
    model = copy.deepcopy(published(name).model)
    adapt_(model, TINYTL_B, resolution=64)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    packed = pack_frozen_(model, 8)
    assert packed.largest_error < 1e-7
    for layer in packed.layers:
        weight, holder = before[f"{layer.layer}.weight"], model.get_submodule(layer.layer)
        found = packed.packing.expand(holder.weight_codes, holder.weight_table)  # type: ignore[arg-type]
        ulp = torch.nextafter(weight.abs(), torch.tensor(torch.inf)) - weight.abs()
        assert ((found - weight).abs() <= ulp).all()
        assert torch.equal(found, weight)


def test_a_network_from_elsewhere() -> None:
    need("timm")
    import timm

    torch.manual_seed(0)
    base = settle_(timm.create_model("mobilenetv3_small_050", num_classes=10, drop_rate=0.0))
    adapt_(base, TINYTL_LB, resolution=64)
    model = copy.deepcopy(base)
    packed = pack_frozen_(model, 8)
    frozen = sum(p.nbytes for p in base.parameters() if not p.requires_grad)
    assert packed.left_bytes < 0.02 * frozen
    assert frozen == packed.bytes_before + packed.left_bytes
    twin = expanded_twin(model, packed, copy.deepcopy(base))
    x = images(2, 64, torch.float64)
    ours, theirs = backward(model.train(), x), backward(twin.train(), x)
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for key, grad in ours.items():
        torch.testing.assert_close(grad, theirs[key], rtol=1e-10, atol=1e-10 * largest)
    assert kept(model, (2, 3, 64, 64)).total_bytes == observed_bytes(model, 64, 2)


# ------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunResult]:
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, small_run.NAME, small_run.entry())
        torch.set_num_threads(1)
        spec = small_run.make_spec(folder / "photos")
        done = {}
        for way, (bits, codebook) in {"full": (32, False), **WAYS}.items():
            asked = dataclasses.replace(spec, frozen_bits=bits, codebook=codebook)
            done[way] = train(asked, folder / way, options=RunOptions(workers=0))
        return done


@ways
def test_a_run_is_opened_with_its_packed_network(
    way: str, runs: dict[str, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, small_run.NAME, small_run.entry())
    done = runs[way]
    opened = open_run(done.out)
    codes = {name for name in opened.model.state_dict() if name.endswith("weight_codes")}
    assert codes
    trained = done.prepared.model.state_dict()
    assert trained.keys() == opened.model.state_dict().keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in opened.model.state_dict().items())
    again = opened.evaluate(done.prepared.validation, workers=0)
    assert again.top1 == done.evaluation.top1
    assert again.loss == pytest.approx(done.evaluation.loss, rel=1e-6)
    delta = load_delta(done.out / "delta.safetensors")
    assert (delta.extra["frozen_bits"], delta.extra["codebook"]) == WAYS[way]
    assert set(delta.tensors) == set(load_delta(runs["full"].out / "delta.safetensors").tensors)


@pytest.mark.parametrize(
    "extra", [{"frozen_bits": 4}, {"frozen_bits": True}, {"frozen_bits": [8]}, {"codebook": True}, {"codebook": "yes"}]
)
def test_a_delta_of_unknown_bits_is_refused(
    extra: dict[str, object], runs: dict[str, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, small_run.NAME, small_run.entry())
    delta = load_delta(runs["full"].out / "delta.safetensors")
    known = {"pretrained": False, "base_seed": 1}
    monkeypatch.setattr("tinytl.trained.load_delta", lambda path: dataclasses.replace(delta, extra=known | extra))
    with pytest.raises(DeltaError, match="expected what a run writes"):
        open_run(runs["full"].out)


def test_a_delta_that_says_nothing_of_bits_has_32(runs: dict[str, RunResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, small_run.NAME, small_run.entry())
    delta = load_delta(runs["full"].out / "delta.safetensors")
    older = {key: value for key, value in delta.extra.items() if key in ("pretrained", "base_seed")}
    monkeypatch.setattr("tinytl.trained.load_delta", lambda path: dataclasses.replace(delta, extra=older))
    opened = open_run(runs["full"].out)
    assert not any(name.endswith("weight_codes") for name in opened.model.state_dict())


def test_the_folder_says_what_was_asked(runs: dict[str, RunResult]) -> None:
    text = Path(runs["codebook"].out / "config.toml").read_text()
    assert "frozen_bits = 8" in text
    assert "codebook = true" in text


@pytest.mark.parametrize(("bits", "codebook"), [(16, False), (8, False), (8, True)])
def test_a_large_pointwise_weight_is_never_there_in_full(bits, codebook) -> None:
    """Some filters at a time, in both directions; the values are those of the whole weight."""
    packing = Packing.of(bits, codebook)
    weight = torch.randn(1280, 320, 1, 1)
    codes, table = packing.pack(weight)
    x = torch.randn(1, 320, 4, 4).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(1, 1280, 4, 4).contiguous(memory_format=torch.channels_last)
    whole = packing.expand(codes, table)
    assert in_pieces(codes, table)
    torch.testing.assert_close(product(x, codes, table, packing), F.conv2d(x, whole), rtol=1e-3, atol=1e-3)
    made = input_gradient(rows(grad), codes, table, packing)
    torch.testing.assert_close(made, rows(grad) @ whole.view(1280, 320), rtol=1e-3, atol=1e-3)
    outputs = {"forward": grad.nbytes, "backward": x.nbytes}
    runs = {
        "forward": lambda: product(x, codes, table, packing),
        "backward": lambda: input_gradient(rows(grad), codes, table, packing),
    }
    for name, run in runs.items():
        peak = measure_step(run, [x, grad, codes, table]).step_peak_bytes
        indices = 4 * 2**15 if codebook else 0  # of a slice of codes in the table
        assert peak <= outputs[name] + PIECE_BYTES + indices < whole.nbytes
