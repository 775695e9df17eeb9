"""The stock building blocks: SAME padding, weight standardization, blocks, the lite residual module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tinytl.errors import InputError
from tinytl.nn.layers import (
    Conv2dSame,
    Norm,
    Residual,
    StandardizedConv2d,
    conv_norm_act,
    same_padding,
)
from tinytl.nn.lite_residual import (
    LiteBlock,
    insert_lite_blocks_,
    lite_geometry,
    lite_residual,
    make_divisible,
)
from tinytl.ops.weight_standardization import standardize


@given(
    height=st.integers(1, 15),
    width=st.integers(1, 15),
    kernel=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_same_convolution_is_the_definition(
    height: int, width: int, kernel: int, stride: int, dilation: int, groups: int
) -> None:
    """Output pixel o is sum_k w[k] x[o * stride + k * dilation - before]; ceil(size / stride) of them."""
    torch.manual_seed(height * 100 + width)
    conv = Conv2dSame(4, 4, kernel, stride=stride, dilation=dilation, groups=groups, bias=True).double()
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    out = conv(x)
    assert out.shape == (2, 4, -(-height // stride), -(-width // stride))
    # a frame wide enough for any padding, then each output pixel's window on its own
    margin = kernel * dilation + stride
    framed = F.pad(x, (margin,) * 4)
    top = max((out.shape[2] - 1) * stride + (kernel - 1) * dilation + 1 - height, 0) // 2
    left = max((out.shape[3] - 1) * stride + (kernel - 1) * dilation + 1 - width, 0) // 2
    reach = (kernel - 1) * dilation + 1
    for row, column in [(0, 0), (out.shape[2] - 1, out.shape[3] - 1)]:
        y, z = row * stride - top + margin, column * stride - left + margin
        window = framed[:, :, y : y + reach, z : z + reach]
        alone = F.conv2d(window, conv.weight, conv.bias, dilation=dilation, groups=groups)
        torch.testing.assert_close(out[:, :, row : row + 1, column : column + 1], alone)


def test_same_padding_puts_the_odd_pixel_after() -> None:
    assert same_padding(224, 3, 2) == (0, 1)
    assert same_padding(225, 3, 2) == (1, 1)
    assert same_padding(112, 5, 2) == (1, 2)
    assert same_padding(7, 1, 2) == (0, 0)


def test_standardized_filters_have_mean_zero_and_unit_deviation() -> None:
    torch.manual_seed(0)
    weight = 3 + 2 * torch.randn(6, 4, 3, 3, dtype=torch.float64)
    filters = standardize(weight).flatten(1)
    deviation = weight.flatten(1).std(1)  # unbiased
    torch.testing.assert_close(filters.mean(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(filters.std(1), deviation / (deviation + 1e-5), atol=1e-12, rtol=0)


def test_standardization_differentiates() -> None:
    torch.manual_seed(1)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(standardize, weight)
    upstream = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(standardize(weight), weight, upstream)
    # the derivative of the module's docstring, written out
    g, u = upstream.flatten(1), weight.detach().flatten(1)
    u = u - u.mean(1, keepdim=True)
    sigma = u.std(1, keepdim=True)
    shared = (g * u).sum(1, keepdim=True) / ((sigma + 1e-5) ** 2 * sigma * (u.shape[1] - 1))
    du = g / (sigma + 1e-5) - u * shared
    torch.testing.assert_close(gradient.flatten(1), du - du.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="2 values"):
        standardize(torch.randn(4, 1, 1, 1))


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("act", [True, False])
def test_conv_norm_act_is_a_named_straight_line(norm: Norm, act: bool) -> None:
    unit = conv_norm_act(8, 16, 5, stride=2, groups=2, norm=norm, act=act)
    assert type(unit) is nn.Sequential
    kinds = {name: type(child) for name, child in unit.named_children()}
    expected = {"conv": StandardizedConv2d, "norm": nn.GroupNorm} if norm == "gn" else {}
    assert kinds == {"conv": nn.Conv2d, "norm": nn.BatchNorm2d} | expected | ({"act": nn.ReLU6} if act else {})
    assert unit.get_submodule("conv").bias is None
    assert unit.get_submodule("norm").eps == 1e-3
    assert unit(torch.randn(2, 8, 9, 7)).shape == (2, 16, 5, 4)


def test_group_norm_has_eight_channels_a_group() -> None:
    norm = conv_norm_act(8, 48, norm="gn").get_submodule("norm")
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == 6


def test_foreseeable_misuse_is_refused() -> None:
    with pytest.raises(InputError, match="12 channels"):
        conv_norm_act(8, 12, norm="gn")
    with pytest.raises(InputError, match="SAME"):
        conv_norm_act(8, 16, norm="gn", same=True)
    with pytest.raises(InputError, match="unknown norm"):
        conv_norm_act(8, 16, norm="ln")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="groups"):
        lite_residual(9, 16, stride=1)


def test_residual_adds_its_input() -> None:
    torch.manual_seed(2)
    body = nn.Conv2d(3, 3, 1)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(Residual(body)(x), x + body(x))


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize(("stride", "size", "pool"), [(1, 12, 2), (2, 12, 2), (1, 7, 2), (2, 9, 2), (1, 6, None)])
def test_lite_block_is_the_formula(norm: Norm, stride: int, size: int, pool: int | None) -> None:
    """Against functional calls; forward, and backward under a random upstream gradient."""
    torch.manual_seed(3)
    block = conv_norm_act(16, 24, 3, stride=stride, norm=norm).double()
    lite = lite_residual(16, 24, stride=stride, kernel_size=3, pool=pool, norm=norm).double()
    assert list(dict(lite.named_children())) == ["pool", "conv1", "norm1", "act", "conv2", "norm2"]
    nn.init.normal_(lite.get_submodule("norm2").weight)  # pyright: ignore[reportArgumentType]
    both = LiteBlock(block, lite).eval()
    x = torch.randn(2, 16, size, size, dtype=torch.float64, requires_grad=True)
    out = both(x)

    weight = dict(lite.named_parameters())
    make = standardize if norm == "gn" else (lambda w: w)

    def normalize(value: torch.Tensor, name: str) -> torch.Tensor:
        layer = lite.get_submodule(name)
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(value, value.shape[1] // 8, layer.weight, layer.bias, 1e-3)
        assert isinstance(layer, nn.BatchNorm2d)
        return value / (1 + 1e-3) ** 0.5 * layer.weight[:, None, None]  # fresh statistics and bias: 0, 1, 0

    pooled = x.mean((2, 3), keepdim=True) if pool is None else F.avg_pool2d(x, 2)
    z = F.conv2d(pooled, make(weight["conv1.weight"]), stride=stride, padding=1, groups=2)
    z = F.conv2d(normalize(z, "norm1").relu(), make(weight["conv2.weight"]))
    main = block(x)
    z = F.interpolate(normalize(z, "norm2"), main.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(out, main + z)
    upstream = torch.randn_like(out)
    inputs = [x, *both.parameters()]
    ours = torch.autograd.grad(out, inputs, upstream)
    theirs = torch.autograd.grad(main + z, inputs, upstream, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        # the formula above leaves out batch norm's zero bias
        if other is not None:
            torch.testing.assert_close(mine, other)


def test_geometry_of_the_reference() -> None:
    strides = [2, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]  # ProxylessNAS-Mobile without block 0
    assert lite_geometry(strides) == [(5, False)] * 15 + [(3, False)] * 4
    assert lite_geometry([2] * 8)[4:] == [(3, False), (1, False), (1, True), (1, True)]
    assert lite_geometry([1], kernel_size=3, first_resolution=2) == [(1, True)]


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_inserted_modules_change_nothing_yet(norm: Norm) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(
        conv_norm_act(3, 8, 3, norm=norm), nn.Sequential(conv_norm_act(8, 16, 3, stride=2, norm=norm))
    ).double()
    model.eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before, old = model(x), model[1]
    assert isinstance(old, nn.Sequential)
    assert insert_lite_blocks_(model, ["1"], norm=norm) == ["1.lite"]
    assert isinstance(model[1], LiteBlock)
    assert model[1].block is old
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert torch.equal(model(x), before)
    with pytest.raises(InputError, match="already"):
        insert_lite_blocks_(model, ["1"], norm=norm)


def test_make_divisible() -> None:
    assert [make_divisible(value) for value in (1, 8, 12, 26.4, 44, 123.2, 17.6)] == [
        8,
        8,
        16,
        24,
        48,
        120,
        16,
    ]
