"""The captured program computes what the network computes, in float64, for every backbone, norm and method."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.backbones import Preprocessing, load
from tinytl.checkpoint import learned_tensors
from tinytl.compiler.capture import capture
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.program import Program
from tinytl.errors import UnsupportedLayerError
from tinytl.methods import METHODS, TINYTL_LB, Adaptation, Bias, LastBlocks, Method, Norm, adapt_
from tinytl.nn.execution import Execution, execution_of, set_execution_
from tinytl.nn.packing import pack_frozen_

from ._torchvision import need
from .foreign import settle_
from .pairs import pairs
from .test_adapt import VARIANTS, enliven_, small_network
from .test_foreign import GatedBlock, NormAct, PlainBlock, SamePadConv

PREPROCESSING = Preprocessing(33, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)
SIDE = 64
LB = "tinytl-l+b"


def photographs(count: int, side: int) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def opened_(model: nn.Module) -> nn.Module:
    """A fresh lite module's last scale is 0, which hides what stands before it: give it a value."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ".lite." in path and ("norm2" in path or "conv2.norm" in path) and path.endswith(".weight"):
            tensor.data.copy_(torch.linspace(0.5, 1.5, tensor.numel()))
    return model


def assert_captured(model: nn.Module, adaptation: Adaptation, side: int) -> Program:
    """The program of `model`, in float64, whose logits are the model's, to 1e-10 of the largest."""
    preprocessing = dataclasses.replace(PREPROCESSING, resolution=side)
    model = opened_(copy.deepcopy(model).double())
    modes = [module.training for module in model.modules()]
    program = capture(model, adaptation, preprocessing)
    assert [module.training for module in model.modules()] == modes
    images = photographs(3, side)
    mean, std = (torch.tensor(three, dtype=torch.float64) for three in (preprocessing.mean, preprocessing.std))
    with torch.no_grad():
        expected = model.eval()(((images.double() / 255.0 - mean) / std).permute(0, 3, 1, 2))
    found = Interpreter(program, torch.float64).evaluate(images).flatten(1)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-10, atol=1e-10)
    assert_tells_what_is_learned(program, model, adaptation)
    return program


def assert_tells_what_is_learned(program: Program, model: nn.Module, adaptation: Adaptation) -> None:
    """The delta is what the lab would save, tensor by tensor, and each entry names the tensor that trains."""
    state = learned_tensors(model, adaptation)
    learned, carried = program.meta["learned"], program.meta["carried"]
    assert sorted(entry["key"] for entry in (*learned, *carried)) == sorted(state)
    assert sorted(entry["tensor"] for entry in learned) == sorted(program.trained)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {program.tensors[number].name for number in program.trained} == trained
    read = Interpreter(program, torch.float64).learned()
    for entry in learned:
        torch.testing.assert_close(read[entry["key"]], state[entry["key"]].detach(), rtol=0, atol=0)
    for entry in carried:
        assert list(state[entry["key"]].shape) == entry["shape"]
        torch.testing.assert_close(entry["values"].double(), state[entry["key"]].double(), rtol=1e-6, atol=1e-7)


def backbone(name: str, norm: str) -> nn.Module:
    torch.manual_seed(3)
    return enliven_(load(name, pretrained=False, num_classes=7, norm=norm).model)  # type: ignore[arg-type]


# ---------------------------------------------------------------- every network of the lab


@pytest.mark.parametrize("last", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_method_on_a_small_network(variant: str, name: str, last: int) -> None:
    model = small_network(*VARIANTS[variant])
    adaptation = adapt_(model, METHODS[name] + LastBlocks(last), resolution=33)
    program = assert_captured(model, adaptation, 33)
    assert list(program.streams) == ["evaluate"]
    assert {one.phase for one in program.streams["evaluate"]} == {"forward"}


QUICK = (("mcunet_5fps", "bn", LB),)
WITH_EVERY_METHOD = ("mobilenet_v3_large",)  # has every kind of layer; tests of gradients take the other networks
CASES = [*pairs(LB), *(case for case in pairs(*sorted(METHODS)) if case[0] in WITH_EVERY_METHOD)]
EVERY = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in dict.fromkeys(CASES)]


@pytest.mark.parametrize(("name", "norm", "method"), EVERY)
def test_every_backbone(name: str, norm: str, method: str) -> None:
    model = backbone(name, norm)
    adaptation = adapt_(model, METHODS[method], resolution=SIDE)
    program = assert_captured(model, adaptation, SIDE)
    blocks = {one.block for one in program.streams["evaluate"]}
    assert blocks == {-1, *range(len(adaptation.blocks))}


# ---------------------------------------------------------------- networks from elsewhere


class Elsewhere(nn.Module):
    """Most of what a forward of somebody's own calls between its layers."""

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = SamePadConv(3, 8, 3, stride=2, bias=False), NormAct(8)
        self.blocks = nn.ModuleList([PlainBlock(8, 16, 2), PlainBlock(16, 16), GatedBlock(16)])
        self.wide = nn.Conv2d(16, 32, 3, groups=16)  # two filters a channel: a grouped convolution
        self.hidden, self.head = nn.Linear(32 * 3 * 2, 16), nn.Linear(16, 5)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, 32).view(-1, 1, 1))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.stem(x)), 3, 2, ceil_mode=True)
        for block in self.blocks:
            x = block(x)
        x = (1.0 - self.wide(x)) * self.gain - self.gain / 3
        s = torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = F.gelu(x * s.expand_as(x), approximate="tanh").clamp(-0.5, 2.0)
        x = F.avg_pool2d(F.interpolate(x, (5, 3), mode="bilinear"), 2, ceil_mode=True, count_include_pad=False)
        x = F.elu(self.hidden(torch.flatten(self.drop(x), 1)), 0.7)
        return self.head(F.dropout(x.view(x.size(0), -1, 1, 1).squeeze(3).squeeze(2), 0.2, self.training))


@pytest.mark.parametrize("name", ["ft-last", "tinytl-b", LB])
def test_a_forward_of_somebody_s_own(name: str) -> None:
    torch.manual_seed(2)
    model = settle_(Elsewhere())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    blocks = [f"blocks.{at}" for at in range(3)]
    adaptation = adapt_(model, METHODS[name], blocks=blocks, classifier="head", resolution=49)
    program = assert_captured(model, adaptation, 49)
    ops = Counter(one.op for one in program.streams["evaluate"])
    assert ops["dropout"] == 2
    assert ops["gate"] == 2
    assert ops["max_pool"] == 1
    assert ops["upsample"] == 1 + len(adaptation.inserted)
    numbers = [
        (one.attributes["number"], one.attributes["p"]) for one in program.streams["evaluate"] if one.op == "dropout"
    ]
    assert numbers == [(0, 0.3), (1, 0.2)]
    for one in program.streams["evaluate"]:
        inside = next((at for at, path in enumerate(blocks) if one.layer.startswith(f"{path}.")), None)
        assert one.block in ([inside] if inside is not None else [-1, *range(3)])


def test_stock_layers_between_the_lean_ones() -> None:
    """A network that was adapted without lean layers calls PyTorch's operators alone: the same program, but folding."""
    model = small_network("gn", lite=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lean = copy.deepcopy(model)
    program = assert_captured(model, adapt_(model, METHODS["tinytl-b"], resolution=33, lean=False), 33)
    other = assert_captured(lean, adapt_(lean, METHODS["tinytl-b"], resolution=33), 33)
    kinds = ("conv", "group_norm", "add", "avg_pool", "upsample", "adaptive_pool")
    counts = [Counter(one.op for one in p.streams["evaluate"] if one.op in kinds) for p in (program, other)]
    assert counts[0] == counts[1]
    assert min(counts[0][kind] for kind in kinds) > 0


FOREIGN = {
    ("timm", "resnet10t"): "",
    ("timm", "tf_mobilenetv3_small_minimal_100"): "",  # TensorFlow's SAME padding, computed in its forward
    ("timm", "mobilenetv4_conv_small_050"): "",
    ("timm", "regnetx_002"): "",
    ("timm", "test_efficientnet"): "",
    ("timm", "ghostnet_050"): r"^blocks\.0\.0\.ghost1: aten\.cat\.default .* lab's engine",
    ("timm", "test_convnext"): r"^stem\.1: aten\.permute\.default .* lab's engine",
    ("torchvision", "mobilenet_v2"): "",
    ("torchvision", "resnet18"): "",
    (
        "torchvision",
        "efficientnet_b0",
    ): r"block\.stochastic_depth: aten\.bernoulli\.\w+, which draws",
}


@pytest.mark.parametrize(("home", "name"), [pytest.param(*key, marks=pytest.mark.slow) for key in FOREIGN])
def test_networks_of_timm_and_torchvision(home: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        need("timm")
        library = importlib.import_module("timm" if home == "timm" else "torchvision.models")
        torch.manual_seed(0)
        if home == "timm":
            model = library.create_model(name, num_classes=10, drop_rate=0.0)
        else:
            model = getattr(library, name)(num_classes=10)
    model = settle_(model)
    adaptation = adapt_(model, TINYTL_LB, resolution=SIDE)
    refused = FOREIGN[home, name]
    if refused:
        with pytest.raises(UnsupportedLayerError, match=refused):
            capture(model, adaptation, dataclasses.replace(PREPROCESSING, resolution=SIDE))
    else:
        assert_captured(model, adaptation, SIDE)


# ---------------------------------------------------------------- weights


PACKINGS = [(8, False, "i8"), (8, True, "u8"), (16, False, "f16")]


@pytest.mark.parametrize(("bits", "codebook", "dtype"), PACKINGS)
@pytest.mark.parametrize("name", ["mcunet_5fps", pytest.param("mobilenet_v3_large", marks=pytest.mark.slow)])
def test_packed_weights_stay_packed(name: str, bits: int, codebook: bool, dtype: str) -> None:
    """Codes of every frozen weight that was packed, dense, depthwise and of gates, in as many bytes as the lab has."""
    model = backbone(name, "bn")
    adaptation = adapt_(model, METHODS["tinytl-b"], resolution=SIDE)
    packed = pack_frozen_(model, bits, codebook)
    program = assert_captured(model, adaptation, SIDE)
    codes = [tensor for tensor in program.tensors if tensor.dtype == dtype and tensor.role == "constant"]
    assert sum(tensor.elements for tensor in codes) == sum(layer.elements for layer in packed.layers) > 0
    assert {len(tensor.shape) for tensor in codes} == {3, 4}
    tables = [
        program.tensors[n] for one in program.streams["evaluate"] if one.op == "conv" and (n := one.operand("table"))
    ]
    assert len(tables) == len(codes) == len(packed.layers)


class BesideFrozen(nn.Module):
    """Convolutions with a bias of their own in front of norms, and a norm with no convolution in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.LeakyReLU(0.2))
        self.third = nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.Hardtanh(-0.7, 0.8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize("packing", [None, *PACKINGS])
@pytest.mark.parametrize("parts", [(), (Bias(),), (Norm(),), (Norm(), Bias())])
def test_frozen_weights_behind_trained_norms(
    parts: tuple[Bias | Norm, ...], packing: tuple[int, bool, str] | None
) -> None:
    """What is folded at capture, what is made at each use, and what stays packed, in every combination."""
    torch.manual_seed(4)
    model = settle_(BesideFrozen()).float()
    adaptation = adapt_(model, Method(parts), blocks=["first", "second", "third"], classifier="head", resolution=33)
    if packing is not None:
        pack_frozen_(model, *packing[:2])
    program = assert_captured(model, adaptation, 33)
    derived = {tensor.name for tensor in program.tensors if tensor.role == "derived"}
    assert bool(derived) == bool(parts)


def test_a_layer_used_twice_is_stored_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, 2)
            self.same = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.same(self.same(self.stem(x))).mean((2, 3)))

    for name in ("tinytl-b", "ft-full"):
        torch.manual_seed(1)
        model = settle_(Twice())
        adaptation = adapt_(model, METHODS[name], blocks=["stem", "same"], classifier="head", resolution=17)
        program = assert_captured(model, adaptation, 17)
        assert sum(tensor.shape == (6, 3, 3, 6) and tensor.role != "derived" for tensor in program.tensors) == 1
        names = [tensor.name for tensor in program.tensors]
        assert len(names) == len(set(names))


# ---------------------------------------------------------------- what is left as it was, and what is refused


def test_policies_hooks_modes_and_gradients_are_left_alone() -> None:
    model = small_network(lite=True)
    adaptation = adapt_(model, TINYTL_LB, resolution=33)
    plain = assert_captured(model, adaptation, 33)
    set_execution_(model, {"features.block1": Execution(images=1, strips=2, recompute=True)})
    policies, seen = execution_of(model), []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    model.train()
    rng = torch.get_rng_state()
    program = capture(model, adaptation, dataclasses.replace(PREPROCESSING, resolution=33))
    handle.remove()
    assert [one.op for one in program.streams["evaluate"]] == [one.op for one in plain.streams["evaluate"]]
    assert execution_of(model) == policies
    assert seen == []
    assert model.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    dtypes = {program.values[n].dtype for n, t in enumerate(program.tensors) if t.role in ("constant", "trained")}
    assert dtypes == {torch.float32}


def test_values_are_copies_of_what_trains() -> None:
    """Training the network afterwards must not change the program."""
    model = small_network()
    adaptation = adapt_(model, METHODS["ft-last"], resolution=33)
    program = capture(model, adaptation, PREPROCESSING)
    number = next(n for n in program.trained if program.tensors[n].name == "classifier.bias")
    before = program.values[number].clone()
    with torch.no_grad():
        model.classifier.bias.add_(1.0)  # type: ignore[union-attr, operator]
    assert torch.equal(program.values[number], before)


class Odd(nn.Module):
    def __init__(self, odd: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head, self.odd = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), odd
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.branch = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(self, self.branch(self.stem(x)))
        return self.head(x.mean((2, 3))) if x.dim() == 4 else x


def in_training_alone(self: Odd, x: Tensor) -> Tensor:
    return F.relu(x) if self.training else torch.sigmoid(x)


REFUSED: dict[str, tuple[Callable[[Odd, Tensor], Tensor], str]] = {
    "cat": (lambda self, x: torch.cat([x, x], 1)[:, :8], "aten.cat.default"),
    "softmax": (lambda self, x: x.softmax(1), "aten._softmax.default"),
    "part of the channels": (lambda self, x: x[:, :4].repeat(1, 2, 1, 1), "aten.slice.Tensor"),
    "image times itself": (lambda self, x: x * x, "aten.mul.Tensor with these options or shapes"),
    "trained by itself": (lambda self, x: x * self.gain, "gain, which trains"),
    "computed from what trains": (
        lambda self, x: F.conv2d(x, self.branch.weight * 2),
        "on branch.weight, which trains",
    ),
    "images mixed": (lambda self, x: x - x.flip(0), "aten.flip.default"),
    "random": (lambda self, x: x + torch.rand(1), "which draws random numbers"),
    "one pixel": (lambda self, x: x[:, :, 0, 0], "aten.select.int"),
    "other in training": (in_training_alone, "is not what the network does there in evaluation mode"),
    "an image comes out": (lambda self, x: x.flatten(1), "an output"),
    "padded by ones": (lambda self, x: F.pad(x, [1, 1, 1, 1], value=1.0), "aten.constant_pad_nd.default"),
    "padded for an activation": (lambda self, x: F.relu(F.pad(x, [1, 1, 1, 1])), "takes a tensor that was padded"),
    "nearest": (lambda self, x: F.interpolate(x, (7, 7)), "aten.upsample_nearest2d.default"),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refused_by_name(kind: str) -> None:
    odd, expected = REFUSED[kind]
    torch.manual_seed(0)
    model = Odd(odd).eval()
    method = METHODS["ft-full"]
    adaptation = adapt_(model, method, blocks=["stem", "branch"], classifier="head", resolution=17)
    with pytest.raises(UnsupportedLayerError, match=re.escape(expected)) as caught:
        capture(model, adaptation, dataclasses.replace(PREPROCESSING, resolution=17))
    assert "\n" not in str(caught.value)
    assert "lab's engine" in str(caught.value)


def test_the_same_network_without_its_oddity_is_taken() -> None:
    """So that what is refused above is the oddity."""
    torch.manual_seed(0)
    model = Odd(lambda self, x: x).eval()
    adaptation = adapt_(model, METHODS["tinytl-b"], blocks=["stem", "branch"], classifier="head", resolution=17)
    assert_captured(model, adaptation, 17)


def test_a_network_changed_since_it_was_adapted_is_refused() -> None:
    model = small_network()
    adaptation = adapt_(model, METHODS["ft-last"], resolution=33)
    model.requires_grad_()
    with pytest.raises(ValueError, match="not as adapt_ left it"):
        capture(model, adaptation, PREPROCESSING)
