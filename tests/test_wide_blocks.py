"""Squeeze and excite, hard-swish, shortcuts with a convolution, max pooling: whole networks of them, lean and stock."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.backbones.mobilenet_v3 import BLOCKS, ExcitedBlockSpec, MobileNetV3, mobilenet_v3_large, timm_names
from tinytl.backbones.mobilenet_v3 import published_names as v3_names
from tinytl.backbones.resnet import ResNet, resnet, resnet50
from tinytl.backbones.resnet import published_names as resnet_names
from tinytl.errors import InputError, UnknownNameError, UnsupportedLayerError
from tinytl.methods import METHODS, TINYTL_B, TINYTL_LB, adapt_
from tinytl.methods._lowering import Lowering, is_leaf
from tinytl.nn.kept import kept
from tinytl.nn.layers import ShortcutBlock, SqueezeExcite, StandardizedConv2d
from tinytl.nn.lean import LeanShortcutBlock, LeanSqueezeExcite
from tinytl.nn.lite_residual import LiteBlock, block_shape, insert_lite_blocks_
from tinytl.ops import functional as lean_ops
from tinytl.ops import max_pool

from .test_adapt import assert_same_gradients, backward, enliven_, images
from .test_kept_model import observed

SPECS = (
    ExcitedBlockSpec(8, 8, 8, 3, 1, excites=False, hard_swish=False),
    ExcitedBlockSpec(8, 24, 16, 3, 2, excites=False, hard_swish=False),
    ExcitedBlockSpec(16, 24, 16, 5, 1, excites=True, hard_swish=False),
    ExcitedBlockSpec(16, 32, 24, 3, 2, excites=True, hard_swish=True),
    ExcitedBlockSpec(24, 48, 24, 5, 1, excites=False, hard_swish=True),
)

NETWORKS: dict[str, Callable[[str], nn.Module]] = {
    "mobilenet v3": lambda norm: MobileNetV3(SPECS, 64, 32, 5, norm),  # type: ignore[arg-type]
    "bottlenecks": lambda norm: ResNet((2, 1, 1), True, 5, norm, width=8),  # type: ignore[arg-type]
    "basic blocks": lambda norm: ResNet((2, 1), False, 5, norm, width=8),  # type: ignore[arg-type]
}


def network(name: str, norm: str = "bn") -> nn.Module:
    torch.manual_seed(0)
    return enliven_(NETWORKS[name](norm)).eval()


def enliven_lite_(model: nn.Module, inserted: tuple[str, ...]) -> None:
    """A fresh module's last scale is 0, which hides what stands before it: give it a value."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if path.startswith(inserted) and ("norm2" in path or "conv2.norm" in path) and path.endswith(".weight"):
            tensor.data.copy_(torch.linspace(0.5, 1.5, tensor.numel()))


@pytest.mark.parametrize(
    ("method", "norm"), [(method, "bn") for method in sorted(METHODS)] + [("ft-full", "gn"), ("tinytl-l+b", "gn")]
)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_gradients_are_stock_s_and_the_rule_is_what_is_seen(name: str, method: str, norm: str) -> None:
    base = network(name, norm).double()
    x = images(2, 33, torch.float64)
    before = base(x).detach()
    lean, stock = copy.deepcopy(base), copy.deepcopy(base)
    adaptation = adapt_(lean, METHODS[method], resolution=33)
    adapt_(stock, METHODS[method], lean=False, resolution=33)
    torch.testing.assert_close(lean(x), before, rtol=1e-10, atol=1e-10)
    if adaptation.inserted:
        enliven_lite_(lean, adaptation.inserted)
        enliven_lite_(stock, adaptation.inserted)
    torch.testing.assert_close(lean(x), stock(x), rtol=1e-10, atol=1e-10)
    assert_same_gradients(backward(lean, x), backward(stock, x), adaptation)
    ledger = kept(lean, tuple(x.shape))
    assert ledger.total_bytes == observed(lean, x) > 0
    assert not any("(" in entry.layer for entry in ledger.entries), "a layer without a path"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "method"),
    [
        *((mobilenet_v3_large, method) for method in ("ft-norm+last", "ft-full", "tinytl-l")),
        *((resnet50, method) for method in ("ft-last", "ft-full", "tinytl-b")),
    ],
)
def test_the_published_networks(make: Callable[..., nn.Module], method: str) -> None:
    """By every method but TinyTL-L+B, by which test_backbone_methods.py has every network."""
    torch.manual_seed(0)
    base = enliven_(make(num_classes=5)).double().eval()
    x = images(2, 64, torch.float64)
    lean, stock = copy.deepcopy(base), copy.deepcopy(base)
    adaptation = adapt_(lean, METHODS[method], resolution=64)
    adapt_(stock, METHODS[method], lean=False, resolution=64)
    if adaptation.inserted:
        enliven_lite_(lean, adaptation.inserted)
        enliven_lite_(stock, adaptation.inserted)
    torch.testing.assert_close(lean(x), stock(x), rtol=1e-10, atol=1e-10)
    assert_same_gradients(backward(lean, x), backward(stock, x), adaptation)
    assert kept(lean, tuple(x.shape)).total_bytes == observed(lean, x)


KEPT_AT_224 = {("v3", "tinytl-b"): 2_021_120, ("v3", "tinytl-l+b"): 2_912_695, ("resnet50", "tinytl-b"): 1_334_720}
"""Bytes kept for one image with 102 classes. A change here is a change of what is promised."""


@pytest.mark.parametrize(("name", "method"), sorted(KEPT_AT_224))
def test_the_figures_of_the_published_networks(name: str, method: str) -> None:
    model = (mobilenet_v3_large if name == "v3" else resnet50)(num_classes=102)
    assert adapt_(model, METHODS[method], resolution=224).kept_bytes_per_image == KEPT_AT_224[name, method]


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_micro_batches_copies_and_state_dicts(name: str) -> None:
    model = network(name).double().train()
    if isinstance(model, MobileNetV3):
        model.dropout.p = 0.5
    adaptation = adapt_(model, TINYTL_LB, resolution=33)
    enliven_lite_(model, adaptation.inserted)
    x, labels, found = images(4, 33, torch.float64), torch.tensor([0, 1, 2, 3]), []
    for size in (4, 1):
        torch.manual_seed(5)
        model.zero_grad()
        for part, wanted in zip(x.split(size), labels.split(size), strict=True):
            (F.cross_entropy(model(part), wanted, reduction="sum") / 4).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    expected = model.eval()(x).detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(x), expected), "a deep copy shares tensors"
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)


def test_hooks_inside_a_block_change_nothing() -> None:
    for name in NETWORKS:
        model = network(name)
        adapt_(model, TINYTL_B, resolution=33)
        x = images(2, 33)
        expected = backward(model, x)
        called: list[str] = []
        for path, module in model.named_modules():
            if path and not path.endswith((".norm", ".fc1", ".fc2")):
                module.register_forward_hook(lambda m, a, o, path=path, called=called: called.append(path))
        torch.testing.assert_close(backward(model, x), expected)
        assert any(".act" in path for path in called)


# ---------------------------------------------------------------- the block with a shortcut


@pytest.mark.parametrize("act", [nn.ReLU, nn.Hardswish, nn.Identity])
@pytest.mark.parametrize("plain_body", [True, False])
def test_the_sum_goes_to_both_branches(act: type[nn.Module], plain_body: bool) -> None:
    """Also where the body is not lean (a module of somebody's own), and its output is not ours to overwrite."""
    torch.manual_seed(2)

    class Own(nn.Sequential):
        pass

    for downsamples in (False, True):
        kind = nn.Sequential if plain_body else Own
        shortcut = nn.Sequential(nn.Conv2d(8, 8, 1)) if downsamples else nn.Identity()
        stock = ShortcutBlock(kind(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)), shortcut, act())
        stock = stock.double()
        lean = Lowering().run(copy.deepcopy(stock), "block")
        assert type(lean) is LeanShortcutBlock
        results = []
        for block in (stock, lean):
            torch.manual_seed(3)
            x = torch.randn(2, 8, 5, 6, dtype=torch.float64, requires_grad=True)
            inner = x * 1.0  # of the graph, and read again behind the block
            y = block(inner)
            (y * torch.randn(y.shape, dtype=y.dtype)).sum().add((inner * inner).sum()).backward()
            results.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_refusals_name_the_layer() -> None:
    odd_act = SqueezeExcite(8, 8, nn.Softplus())
    odd_layer = SqueezeExcite(8, 8)
    odd_layer.fc2 = StandardizedConv2d(8, 8, 1)
    hooked = SqueezeExcite(8, 8)
    hooked.fc1.register_forward_hook(lambda m, a, o: None)
    for module, words in (
        (odd_act, r"x\.act \(Softplus\): expected one of .*ReLU"),
        (SqueezeExcite(8, 8, gate=nn.ReLU()), r"x\.gate \(ReLU\): expected one of"),
        (odd_layer, r"x\.fc2 \(StandardizedConv2d\)"),
        (hooked, r"x\.fc1 \(Conv2d\): has hooks"),
    ):
        with pytest.raises(UnsupportedLayerError, match=words):
            Lowering().run(module, "x")
    assert type(Lowering().run(SqueezeExcite(8, 8, nn.SiLU()), "x")) is LeanSqueezeExcite
    for pool in (nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(17)):
        assert not is_leaf(pool)


LAYERS = [nn.Hardswish(), nn.Hardsigmoid(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(), nn.Tanh(), nn.Mish()]
LAYERS += [nn.ELU(0.5), nn.Hardtanh(-1.0, 2.0), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3)), nn.AdaptiveAvgPool2d(3)]
LAYERS += [nn.AdaptiveAvgPool2d((2, None)), nn.AdaptiveAvgPool2d((1, 1)), SqueezeExcite(8, 4, nn.SiLU())]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_every_layer_s_lean_form(layer: nn.Module) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 8, 7, 6) * 3
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = Lowering().run(copy.deepcopy(layer), "x")(ours), layer(theirs)
    torch.testing.assert_close(a, b)
    upstream = torch.randn_like(b)
    a.backward(upstream)
    b.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.skipif(max_pool.KERNELS is None, reason="built without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [(3, 2, 1), (2, 1, 0, 2), ((3, 1), (1, 2), (1, 0), 1, True)])
def test_compiled_pooling_equals_plain(
    dtype: torch.dtype, options: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 24, 33, 30, dtype=dtype).round()
    x[torch.rand_like(x) < 0.05] = float("nan")
    x[:, :2] = float("-inf")
    results: list[tuple[Tensor, Tensor | None]] = []
    for kernels in (max_pool.KERNELS, None):
        monkeypatch.setattr(max_pool, "KERNELS", kernels)
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        y = lean_ops.max_pool2d(leaf, *options)
        y.backward(torch.randn_like(y))
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], equal_nan=True)


# ---------------------------------------------------------------- the published networks


def test_sizes_and_published_names() -> None:
    v3, r50, r18 = mobilenet_v3_large(), resnet50(), resnet(18)
    assert sum(p.numel() for p in v3.parameters()) == 5_483_032
    assert sum(p.numel() for p in r50.parameters()) == 25_557_032
    assert sum(p.numel() for p in r18.parameters()) == 11_689_512
    for model, names in ((v3, v3_names), (v3, timm_names), (r50, resnet_names)):
        keys = list(model.state_dict())
        theirs = names(keys)
        assert list(theirs) == keys
        assert len(set(theirs.values())) == len(keys)
        assert all(
            re.search(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$", n) for n in theirs.values()
        )
    published = set(v3_names(v3.state_dict()).values())
    assert {"features.0.0.weight", "features.1.block.1.0.weight", "features.4.block.2.fc1.bias"} <= published
    assert {"features.15.block.3.1.running_var", "features.16.0.weight", "classifier.3.bias"} <= published
    assert {"blocks.0.0.conv_pw.weight", "blocks.3.3.bn3.bias", "blocks.5.2.se.conv_expand.weight"} <= set(
        timm_names(v3.state_dict()).values()
    )
    assert {"conv1.weight", "layer1.0.downsample.0.weight", "layer4.2.bn3.weight", "fc.bias"} <= set(
        resnet_names(r50.state_dict()).values()
    )
    with pytest.raises(UnknownNameError, match="ResNet depth"):
        resnet(51)


def test_where_lite_modules_go_and_how_large_they_are() -> None:
    model = network("bottlenecks")
    assert [block_shape(model.get_submodule(path)) for path in model.block_paths] == [  # type: ignore[attr-defined]
        (8, 32, 1), (32, 32, 1), (32, 64, 2), (64, 128, 2)
    ]  # fmt: skip
    large = mobilenet_v3_large()
    assert [block_shape(large.get_submodule(path)) for path in large.block_paths] == [
        (spec.in_channels, spec.out_channels, spec.stride) for spec in BLOCKS
    ]
    insert_lite_blocks_(large, large.block_paths[1:])
    lite = [module.lite for module in large.modules() if isinstance(module, LiteBlock)]
    assert len(lite) == 14
    assert [branch.conv1.kernel_size[0] for branch in lite] == [5] * 11 + [5, 3, 3]  # type: ignore[union-attr]


def test_shapes_may_be_given() -> None:
    """For a block that cannot be read off: its convolutions stand beside one another."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(8, 16, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model = nn.Sequential(Fork())
    with pytest.raises(InputError, match=r"'0': its convolutions do not follow one another"):
        insert_lite_blocks_(model, ["0"])
    assert type(model[0]) is Fork
    assert insert_lite_blocks_(model, ["0"], shapes=[(8, 16, 2)]) == ["0.lite"]
    assert model(torch.randn(1, 8, 12, 12)).shape == (1, 16, 6, 6)
