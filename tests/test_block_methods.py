"""Methods with a choice per block: what is inserted, what trains, what is kept, and every later stage with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinytl.backbones import load
from tinytl.compiler.compile import compile_network
from tinytl.compiler.differentiate import training_program
from tinytl.compiler.program import Program
from tinytl.delta import apply_delta, load_delta, save_delta
from tinytl.errors import InputError
from tinytl.methods import (
    TINYTL_B,
    TINYTL_L,
    TINYTL_LB,
    Adaptation,
    BlockBias,
    LiteModules,
    Method,
    adapt_,
    calibrate_,
    method,
)
from tinytl.nn.kept import kept
from tinytl.nn.lite_residual import lite_geometry, lite_middle, lite_residual, lite_width
from tinytl.spec import TrainSpec

from .test_adapt import (
    VARIANTS,
    assert_same_gradients,
    backward,
    expected_trained,
    images,
    outsider,
    small_network,
)
from .test_interpreter_steps import OPTIONS, adam, hold_together, small
from .test_kept_model import observed

MIXED = "bias(0.2)+lite(1:k3g4.2:k5g2w50)"
HEAD = {"classifier.weight", "classifier.bias"}
LITE = ("conv1.weight", "norm1.weight", "norm1.bias", "conv2.weight", "norm2.weight", "norm2.bias")


def lite_of(*blocks: int) -> set[str]:
    return {f"features.block{block}.lite.{name}" for block in blocks for name in LITE}


def stock(text: str, norm: str = "bn", lite: bool = False) -> tuple[nn.Module, Adaptation]:
    model = small_network(norm, lite=lite)
    return model, adapt_(model, method(text), lean=False, resolution=32)


def biases(model: nn.Module, *prefixes: str) -> set[str]:
    """Names of the main branches' biases under one of the prefixes."""
    named = {name for name, _ in model.named_parameters() if name.endswith(".bias") and ".lite." not in name}
    return {name for name in named if name.startswith(prefixes)}


def enliven_lite_(model: nn.Module) -> None:
    """A fresh lite module's last scale is 0, which hides what stands before it: give it a value."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ".lite." in path and ("norm2" in path or "conv2.norm" in path) and path.endswith(".weight"):
            tensor.data.copy_(torch.linspace(0.5, 1.5, tensor.numel()))


# What trains


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_the_biases_of_some_blocks(norm: str) -> None:
    for text, prefixes in (
        ("bias(1)", ("features.block1.",)),
        ("bias(0)", ("features.stem.", "features.block0.")),
        ("bias(1-3)", ("features.block1.", "features.block2.", "features.block3.", "features.head.")),
    ):
        model, adaptation = stock(text, norm)
        expected = biases(model, *prefixes)
        assert len(expected) > 1
        assert set(adaptation.trained) == expected | HEAD
        assert adaptation.inserted == ()
    assert set(stock("bias(0-3)", norm)[1].trained) == set(stock("tinytl-b", norm)[1].trained)
    assert set(stock("bias(0-3)+lite(1-3:k5g2)", norm)[1].trained) == set(stock("tinytl-l+b", norm)[1].trained)


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_lite_modules_beside_some_blocks(norm: str) -> None:
    model, adaptation = stock(MIXED, norm)
    assert adaptation.inserted == ("features.block1.lite", "features.block2.lite")
    # block 2's own bias trains, so its lite module's last shift does not; block 1's does not, so that one's does
    expected = HEAD | lite_of(1, 2) - {"features.block2.lite.norm2.bias"}
    expected |= biases(model, "features.stem.", "features.block0.", "features.block2.block.")
    assert set(adaptation.trained) == expected
    assert set(stock("lite(3:k1g2)", norm)[1].trained) == HEAD | lite_of(3)
    assert set(stock("bias+lite(3:k1g2)", norm)[1].trained) == (
        set(stock("tinytl-b", norm)[1].trained) - biases(small_network(), "features.block3.")
        | biases(stock("lite(3:k1g2)")[0], "features.block3.")
        | lite_of(3) - {"features.block3.lite.norm2.bias"}
    )


def test_all_of_it_by_parts_is_tinytl() -> None:
    """Every block named with the paper's module: the same network, to the bit."""
    spelled, named = small_network(), small_network()
    one = adapt_(spelled, method("bias(0-3)+lite(1-3:k5g2)"), resolution=32)
    other = adapt_(named, TINYTL_LB, resolution=32)
    assert one.trained == other.trained
    assert one.kept_bytes_per_image == other.kept_bytes_per_image
    for (name, a), (_, b) in zip(spelled.state_dict().items(), named.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_last_blocks_beside_them() -> None:
    _, adaptation = stock("bias(0)+lite(2:k3g2)+last-blocks(1)")
    model, _ = stock("lite(2:k3g2)")
    tail = {n for n, _ in model.named_parameters() if n.startswith(("features.block3.", "features.head."))}
    assert set(adaptation.trained) == HEAD | tail | lite_of(2) | biases(model, "features.stem.", "features.block0.")
    assert expected_trained("ft-last", 1, model) == HEAD | tail


def test_what_stands_between_blocks_belongs_to_the_earlier() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.between, self.first = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.stem, self.unused, self.classifier = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.last(self.between(self.first(self.stem(x)))).mean((2, 3)))

    for blocks, expected in (((0,), {"stem.bias", "first.bias", "between.bias"}), ((1,), {"last.bias"})):
        adaptation = adapt_(Net(), BlockBias(blocks), blocks=["first", "last"], resolution=16)
        assert set(adaptation.trained) == expected | HEAD


def test_an_outsiders_network() -> None:
    model = outsider().double()
    options: dict[str, Any] = {"blocks": ("blocks.0", "blocks.1"), "classifier": "head", "resolution": 24}
    adaptation = adapt_(model, method("bias(1)+lite(1:k3g2w50)"), **options)
    assert adaptation.inserted == ("blocks.1.lite",)
    assert not any(name.startswith("blocks.0.") for name in adaptation.trained)
    x = images(2, 24, torch.float64)
    assert kept(model, tuple(x.shape)).total_bytes == observed(model, x)


def test_a_network_without_biases() -> None:
    """Nothing is selected beyond the classifier; and a method of empty parts is FT-Last."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(8, 2))
    adaptation = adapt_(net, BlockBias((0,)), blocks=["0"], resolution=16)
    assert adaptation.trained == ("4.weight", "4.bias")
    assert backward(net, images(2, 16)).keys() == {"4.weight", "4.bias"}
    assert BlockBias(()) + LiteModules(()) == method("ft-last")


# The modules' form


@given(st.integers(1, 300).map(lambda n: 8 * n), st.sampled_from([1, 2, 4, 8]), st.integers(1, 100))
def test_the_width_of_the_middle(in_ch: int, groups: int, percent: int) -> None:
    full, doubled = lite_width(in_ch, groups)
    middle, found = lite_middle(in_ch, groups, percent)
    assert found == doubled
    assert lite_middle(in_ch, groups, 100) == (full, doubled)
    assert middle % found == 0
    assert middle % 8 == 0
    assert min(8, full) <= middle <= full
    step = max(8, doubled)
    assert abs(middle - full * percent / 100) <= step / 2 or middle in (step, full)
    assert percent == 100 or lite_middle(in_ch, groups, percent + 1)[0] >= middle


def test_each_module_has_its_form() -> None:
    model = load("mcunet_5fps", pretrained=False, num_classes=3).model
    assert isinstance(model.block_paths, tuple)
    text = "lite(2:k3g4.3:k5g2w50.4:k1g1w25.11:k5g2.13:k5g4w10)"
    adapt_(model, method(text), lean=False, resolution=64)
    strides = [2, 1, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1]
    rule = [kernel for kernel, _ in lite_geometry(strides, 5)]
    for at, kernel, groups, width in method(text).part(LiteModules).modules:
        branch: Any = model.get_submodule(f"features.block{at}.lite")
        conv = branch.conv1
        assert conv.kernel_size == (min(kernel, rule[at - 1]),) * 2
        assert (conv.out_channels, conv.groups) == lite_middle(conv.in_channels, groups, width)
        assert conv.stride == (strides[at - 1],) * 2
    assert rule[10] == 3 < 5  # the rule has its say at block 11
    with pytest.raises(AttributeError):
        model.get_submodule("features.block1.lite")


def test_global_pooling_where_the_rule_says_so() -> None:
    assert lite_geometry([2] * 8, 7)[-3:] == [(1, False), (1, True), (1, True)]
    net = nn.Sequential(*(nn.Conv2d(8 if at else 3, 8, 3, 2, 1) for at in range(10)))
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)])
    adapt_(net, method("lite(3:k5g2.9:k5g2)"), blocks=[str(at) for at in range(10)], lean=False, resolution=1024)
    early, late = net.get_submodule("3.lite"), net.get_submodule("9.lite")
    assert isinstance(early.get_submodule("pool"), nn.AvgPool2d)
    assert isinstance(late.get_submodule("pool"), nn.AdaptiveAvgPool2d)
    assert late.get_submodule("conv1").kernel_size == (1, 1)


def test_the_width_of_one_branch() -> None:
    assert lite_residual(96, 24, stride=1, width=50).get_submodule("conv2").weight.shape == (24, 48, 1, 1)
    assert lite_residual(96, 24, stride=1).get_submodule("conv2").weight.shape == (24, 96, 1, 1)


def test_modules_that_are_there_already() -> None:
    """A module of the form that is asked for stays, and trains; those that are not named stay frozen."""
    base = small_network(lite=True)
    for text, trained in (("lite(1:k5g2)", (1,)), ("lite(2:k5g2.3:k5g2)", (2, 3))):
        model = copy.deepcopy(base)
        adaptation = adapt_(model, method(text), lean=False, resolution=32)
        assert adaptation.inserted == ()
        assert set(adaptation.trained) == HEAD | lite_of(*trained)
        name = "features.block1.lite.conv1.weight"
        assert torch.equal(model.state_dict()[name], base.state_dict()[name])
    with pytest.raises(InputError, match=r"'features.block1'.*has one already, with kernel 5.*asked for.*kernel 3"):
        adapt_(copy.deepcopy(base), method("lite(1:k3g2)"), resolution=32)


# Refusals


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bias(2-4)", r"'bias\(2-4\)' names block 4: the network has 4 blocks, 0 to 3"),
        ("lite(1:k3g2.9:k3g2)", "names block 9: the network has 4 blocks, 0 to 3"),
        ("lite(2:k3g3)", r"'features.block2'.*3 groups do not divide 16"),
    ],
)
@pytest.mark.parametrize("lean", [True, False])
def test_what_does_not_fit_the_network(text: str, says: str, lean: bool) -> None:
    model = small_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=says) as caught:
        adapt_(model, method(text), resolution=32, lean=lean)
    assert "\n" not in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(InputError, match="needs to know the network's blocks"):
        adapt_(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), method(text), resolution=2)


def test_a_hostile_length_is_not_repeated() -> None:
    with pytest.raises(InputError) as caught:
        adapt_(small_network(), BlockBias(tuple(range(0, 9_000, 2))), resolution=32)
    assert len(str(caught.value)) < 300


# The lean network


@pytest.mark.parametrize("last", ["", "+last-blocks(1)"])
@pytest.mark.parametrize("variant", ["bn", "gn", "same"])
def test_lean_is_stock(variant: str, last: str) -> None:
    base = small_network(*VARIANTS[variant]).double().eval()
    x = images(2, 33, torch.float64)
    before = base(x).detach()
    lean, plain = copy.deepcopy(base), copy.deepcopy(base)
    adaptation = adapt_(lean, method(MIXED + last), resolution=32)
    other = adapt_(plain, method(MIXED + last), lean=False, resolution=32)
    assert {adaptation.origins.get(n, n) for n in adaptation.trained} == set(other.trained)
    for model in (lean, plain):
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        enliven_lite_(model)
    torch.testing.assert_close(lean(x), plain(x), rtol=1e-10, atol=1e-10)
    assert_same_gradients(backward(lean, x), backward(plain, x), adaptation)


def test_lean_is_stock_on_folded_norms() -> None:
    torch.manual_seed(0)
    base = load("mcunet_5fps", pretrained=False, num_classes=3).model.double()
    lean, plain = copy.deepcopy(base), copy.deepcopy(base)
    text = "bias(3.10-13)+lite(2:k3g2.10:k5g4w50)"
    adaptation = adapt_(lean, method(text), resolution=48)
    adapt_(plain, method(text), lean=False, resolution=48)
    for model in (lean, plain):
        enliven_lite_(model)
    x = images(2, 48, torch.float64)
    assert_same_gradients(backward(lean, x), backward(plain, x), adaptation)


@pytest.mark.parametrize("variant", ["bn", "gn", "same"])
@pytest.mark.parametrize("text", [MIXED, "bias(2)", "bias(3)+lite(3:k1g2)", "lite(2:k3g2w50)"])
def test_the_rule_is_what_is_seen(variant: str, text: str) -> None:
    model = small_network("gn" if variant == "gn" else "bn", same=variant == "same")
    adaptation = adapt_(model, method(text), resolution=37)
    x = images(3, 37)
    assert kept(model, tuple(x.shape)).total_bytes == observed(model, x) > 0
    assert adaptation.kept_bytes_per_image == kept(model, (1, 3, 37, 37)).total_bytes


def test_blocks_before_the_first_that_trains_keep_nothing() -> None:
    def adapted(chosen: Method) -> tuple[nn.Module, Adaptation]:
        model = load("mcunet_5fps", pretrained=False, num_classes=3).model
        return model, adapt_(model, chosen, resolution=96)

    def bytes_of(text: str) -> int:
        model, adaptation = adapted(method(text))
        x = images(1, 96)
        assert adaptation.kept_bytes_per_image == observed(model, x)
        return observed(model, x)

    late, middle, every, last = (bytes_of(t) for t in ("bias(10-13)", "bias(5-13)", "tinytl-b", "ft-last"))
    assert last < late < middle < every
    assert bytes_of("bias(10)") == late  # what stands behind it must carry its gradient all the same
    assert late < every / 5
    assert bytes_of("lite(12:k3g2)") < bytes_of("lite(6:k3g2)") < adapted(TINYTL_L)[1].kept_bytes_per_image  # type: ignore[operator]
    assert bytes_of("lite(12:k3g2w50)") < bytes_of("lite(12:k3g2)")
    model, _ = adapted(method("bias(10-13)+lite(11:k3g2)"))
    ledger = kept(model, (1, 3, 96, 96))
    early = tuple(f"features.block{at}." for at in range(10))
    assert not any(entry.layer.startswith((*early, "features.stem")) for entry in ledger.entries)


def test_frozen_stays_frozen() -> None:
    model = small_network()
    adaptation = adapt_(model, method(MIXED), resolution=32)
    calibrate_(model, adaptation, [images(4)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images(4) + step), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(adaptation.trained)


# Behind the surgery


def test_a_delta_keeps_the_method(tmp_path: Path) -> None:
    base = small_network()
    model = copy.deepcopy(base).eval()
    adaptation = adapt_(model, method(MIXED), resolution=32)
    with torch.no_grad():
        for name in adaptation.trained:
            model.get_parameter(name).add_(0.1)
    preprocessing = {"resolution": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    preprocessing |= {"interpolation": "bicubic", "crop_fraction": 0.875}
    path = tmp_path / "delta.safetensors"
    about: dict[str, Any] = {"backbone": "small", "norm": "bn", "classes": list("abcde")}
    save_delta(path, model, adaptation, preprocessing=preprocessing, **about)
    delta = load_delta(path)
    assert delta.method == method(MIXED)
    assert delta.method.name == MIXED
    again = copy.deepcopy(base).eval()
    apply_delta(again, delta, adapt_(again, delta.method, resolution=32, seed=5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(model(images(2)), again(images(2)))


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_compiled_steps_are_the_lab_s(norm: str) -> None:
    """The interpreted program against autograd; it trains what `adapt_` says trains."""
    pair = small(norm, method("bias(0)+lite(1:k3g4.2:k5g2w50)"))
    hold_together(pair, training_program(pair.captured, OPTIONS), adam(pair), steps=4)


def test_a_compiled_network_of_folded_norms() -> None:
    model = load("mcunet_5fps", pretrained=False, num_classes=3).model
    adaptation = adapt_(model, method("bias(10-13)+lite(11:k3g2w50)"), resolution=48)
    program = compile_network(model, adaptation, resolution=48, batch=2)
    assert {entry["key"] for entry in program.meta["learned"]} == set(adaptation.trained)
    whole = load("mcunet_5fps", pretrained=False, num_classes=3).model
    other = compile_network(whole, adapt_(whole, TINYTL_B, resolution=48), resolution=48, batch=2)

    def masks(step: Program) -> int:
        return sum(tensor.role == "mask" for tensor in step.tensors)

    assert 0 < masks(program) < masks(other) / 2  # blocks before the tenth have nothing to go back through


def test_a_run_is_asked_for_by_its_text() -> None:
    assert TrainSpec("photos", method=MIXED).method == MIXED
    with pytest.raises(InputError, match="cannot be read"):
        TrainSpec("photos", method="bias(3-1)")
    with pytest.raises(InputError, match="trains every block"):
        TrainSpec("photos", method="full", last_blocks=2)
