"""Every op of a program, interpreted in float64, against stock PyTorch and its autograd."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tinytl.compiler import op_table, random
from tinytl.compiler.interpret_call import expand, pack, unpack
from tinytl.compiler.interpreter import FUNCTIONS
from tinytl.compiler.liveness import IN_PLACE
from tinytl.engine.block_code import blocks
from tinytl.engine.eight_bit import Adam8bit, SGD8bit
from tinytl.ops.weight_standardization import standardize

from .one_instruction import NO_ACT, bits, run_one

ACTS: dict[str, tuple[dict[str, float], Callable[[Tensor], Tensor]]] = {
    "none": (NO_ACT, lambda z: z),
    "relu": ({"lo": 0.0, "hi": math.inf, "slope": 0.0}, F.relu),
    "relu6": ({"lo": 0.0, "hi": 6.0, "slope": 0.0}, F.relu6),
    "leaky": ({"lo": 0.0, "hi": math.inf, "slope": 0.2}, lambda z: F.leaky_relu(z, 0.2)),
    "hardtanh": ({"lo": -1.0, "hi": 0.5, "slope": 0.0}, lambda z: F.hardtanh(z, -1.0, 0.5)),
}


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def first(x: Tensor) -> Tensor:
    """(n, H, W, C) -> (n, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)


def f32(x: Tensor, image: bool = True) -> tuple[tuple[int, ...], str]:
    """An operand that is written in the shape of x."""
    return tuple(x.shape[1:] if image else x.shape), "f32"


def as_bits(x: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(x.shape[1:]), "bits"


def check_mask(mask: Tensor, z: Tensor, act: dict[str, float]) -> None:
    assert torch.equal(bits(mask, z), ~((z <= act["lo"]) | (z >= act["hi"])))


# ---- convolution

GEOMETRY = st.fixed_dictionaries(
    {
        "kernel": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "pads": st.tuples(*[st.integers(0, 3)] * 4),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "size": st.tuples(st.integers(9, 12), st.integers(9, 12)),
    }
)


def window(g: dict[str, Any]) -> dict[str, int]:
    names = ("kh", "kw", "sh", "sw", "top", "left", "bottom", "right", "dh", "dw")
    return dict(zip(names, (*g["kernel"], *g["stride"], *g["pads"], *g["dilation"]), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    geometry=GEOMETRY,
    layout=st.sampled_from(["dense", "groups", "depthwise"]),
    act=st.sampled_from(sorted(ACTS)),
    bias=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolution_and_its_gradients(
    geometry: dict[str, Any], layout: str, act: str, bias: bool, residual: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    top, left, bottom, right = geometry["pads"]
    channels, outs, groups = {"dense": (3, 5, 1), "groups": (6, 10, 2), "depthwise": (9, 9, 9)}[layout]
    x = draw(2, *geometry["size"], channels)
    filters = draw(outs, channels // groups, *geometry["kernel"])
    weight = filters[:, 0].permute(1, 2, 0) if layout == "depthwise" else filters.permute(0, 2, 3, 1)
    leaves = [x.clone().requires_grad_(), filters.clone().requires_grad_()]
    padded = F.pad(first(leaves[0]), (left, right, top, bottom))
    z = last(F.conv2d(padded, leaves[1], None, geometry["stride"], 0, geometry["dilation"], groups))
    b = draw(outs) if bias else None
    r = torch.randn_like(z) if residual else None
    z0 = z
    z = z if b is None else z + b
    z = z if r is None else z + r
    attributes, function = ACTS[act]
    y = function(z)
    conv = {**window(geometry), "groups": groups, "depthwise": int(layout == "depthwise")}
    ours = run_one("conv", conv | attributes, 2, x=x, w=weight, bias=b, residual=r, y=f32(y), mask=as_bits(y))
    same(ours["y"], y)
    check_mask(ours["mask"], z, attributes)

    up = torch.randn_like(y)
    dx, dw = torch.autograd.grad(z0, leaves, up)
    other, kept, start = torch.randn_like(x), torch.rand_like(x) < 0.5, draw(channels)
    plain = run_one("conv_dx", conv | {"slope": 0.0}, 2, grad=up, w=weight, y=f32(x))
    same(plain["y"], dx)
    full = run_one(
        "conv_dx", conv | {"slope": 0.3}, 2, grad=up, w=weight, other=other, mask=pack(kept), y=f32(x), bias=start
    )
    expected = torch.where(kept, dx + other, 0.3 * (dx + other))
    same(full["y"], expected)
    same(full["bias"], start + expected.sum((0, 1, 2)))
    before = torch.randn_like(weight)
    found = run_one("conv_dw", conv, 2, x=x, grad=up, w=before)
    dw = dw[:, 0].permute(1, 2, 0) if layout == "depthwise" else dw.permute(0, 2, 3, 1)
    same(found["w"], before + dw)


@pytest.mark.parametrize("depthwise", [False, True])
def test_codes_are_expanded_by_their_table(depthwise: bool) -> None:
    shape, outs = ((3, 3, 4), 4) if depthwise else ((4, 3, 3, 5), 4)
    scale = torch.rand(outs, dtype=torch.float64)
    by_channel = scale if depthwise else scale[:, None, None, None]
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    same(expand(codes, scale, torch.float64), codes.double() * by_channel)
    values, numbers = draw(256), torch.randint(0, 256, shape, dtype=torch.uint8)
    same(expand(numbers, values, torch.float64), values[numbers.long()])
    half = draw(*shape).half()
    same(expand(half, torch.tensor([0.25]), torch.float64), half.double() * 0.25)
    plain = draw(*shape)
    same(expand(plain, None, torch.float64), plain)
    same(expand(plain, scale, torch.float64), plain * by_channel)


@pytest.mark.parametrize("groups", [1, 3, 6], ids=["dense", "grouped", "depthwise"])
def test_a_scale_beside_a_weight_is_one_of_the_forwards_output_channels(groups: int) -> None:
    depthwise = groups == 6
    shape, outs = ((3, 3, 6), 6) if depthwise else ((9, 3, 3, 6 // groups), 9)
    x, w, scale = draw(2, 5, 5, 6), draw(*shape), draw(outs)
    conv = window({"kernel": (3, 3), "stride": (2, 1), "pads": (1, 1, 1, 1), "dilation": (1, 1)})
    conv |= {"groups": groups, "depthwise": int(depthwise)}
    rows = ((3, 5, outs), "f32")
    scaled = run_one("conv", conv | NO_ACT, 2, x=x, w=w, table=scale, y=rows)["y"]
    same(scaled, run_one("conv", conv | NO_ACT, 2, x=x, w=w, y=rows)["y"] * scale)
    grad = draw(*scaled.shape)
    back = run_one("conv_dx", conv | {"slope": 0.0}, 2, grad=grad, w=w, table=scale, y=f32(x))["y"]
    same(back, run_one("conv_dx", conv | {"slope": 0.0}, 2, grad=grad * scale, w=w, y=f32(x))["y"])


def test_convolution_reads_codes() -> None:
    x, codes, scale = draw(2, 5, 5, 3), torch.randint(-9, 9, (4, 3, 3, 3), dtype=torch.int8), torch.rand(4).double()
    conv = window({"kernel": (3, 3), "stride": (1, 1), "pads": (1, 1, 1, 1), "dilation": (1, 1)})
    conv |= {"groups": 1, "depthwise": 0}
    y = {"y": ((5, 5, 4), "f32")}
    coded = run_one("conv", conv | NO_ACT, 2, x=x, w=codes, table=scale, **y)
    plain = run_one("conv", conv | NO_ACT, 2, x=x, w=codes.double() * scale[:, None, None, None], **y)
    same(coded["y"], plain["y"])
    back = run_one("conv_dx", conv | {"slope": 0.0}, 2, grad=coded["y"], w=codes, table=scale, y=f32(x))
    filters = (codes.double() * scale[:, None, None, None]).permute(0, 3, 1, 2)
    same(back["y"], last(F.conv_transpose2d(first(coded["y"]), filters, padding=1)))


# ---- pixel by pixel


@pytest.mark.parametrize("act", sorted(ACTS))
def test_activations_and_their_masks(act: str) -> None:
    attributes, function = ACTS[act]
    x = draw(2, 3, 4, 11, scale=4.0)
    x[0, 0, 0, :4] = torch.tensor([attributes["lo"], attributes["hi"], 0.0, 6.0]).nan_to_num(posinf=7.0, neginf=-7.0)
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    ours = run_one("activation", attributes, 2, x=x, y=f32(x), mask=as_bits(x))
    same(ours["y"], y)
    check_mask(ours["mask"], x, attributes)
    up, bias = torch.randn_like(x), draw(11)
    back = run_one("act_grad", {"slope": attributes["slope"]}, 2, grad=up, mask=ours["mask"], y=f32(x), bias=bias)
    (expected,) = torch.autograd.grad(y, leaf, up)
    same(back["y"], expected)
    same(back["bias"], bias + expected.sum((0, 1, 2)))
    same(run_one("bias_grad", {}, 2, grad=up, bias=bias)["bias"], bias + up.sum((0, 1, 2)))
    a, b = draw(2, 3, 4, 11), draw(2, 3, 4, 11)
    added = run_one("add", attributes, 2, a=a, b=b, y=f32(a), mask=as_bits(a))
    same(added["y"], function(a + b))
    check_mask(added["mask"], a + b, attributes)
    scale, shift = draw(11), draw(11)
    scaled = run_one("affine", attributes, 2, x=a, scale=scale, shift=shift, y=f32(a), mask=as_bits(a))
    same(scaled["y"], function(a * scale + shift))
    same(run_one("affine", attributes, 2, x=a, scale=scale, y=f32(a))["y"], function(a * scale))


def test_a_nan_passes_and_counts_as_inside() -> None:
    x = torch.full((1, 1, 1, 2), math.nan, dtype=torch.float64)
    ours = run_one("activation", ACTS["relu6"][0], x=x, y=f32(x), mask=as_bits(x))
    assert ours["y"].isnan().all()
    assert ours["mask"].item() == 0b11


def test_bits_are_packed_from_the_lowest() -> None:
    given = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1]]).bool()
    assert pack(given).tolist() == [[0b1001, 0b110]]
    assert torch.equal(unpack(pack(given), 11), given)


def test_normalize_copy_and_zero() -> None:
    x = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    scale, shift = draw(3), draw(3)
    same(run_one("normalize", {}, 2, x=x, scale=scale, shift=shift, y=((4, 5, 3), "f32"))["y"], x * scale + shift)
    values = draw(2, 4, 5, 3)
    assert torch.equal(run_one("copy", {}, 2, x=values, y=((1, 1, 60), "f32"))["y"], values.view(2, 1, 1, 60))
    assert not run_one("zero", {}, 2, x=((4, 3), "f32"))["x"].any()


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "hard_swish": F.hardswish,
    "hard_sigmoid": F.hardsigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "elu": lambda x: F.elu(x, 0.7),
}


@pytest.mark.parametrize("kind", op_table.SMOOTH)
def test_smooth_activations(kind: str) -> None:
    x = draw(2, 3, 4, 5, scale=3.0).requires_grad_()
    attributes = {"kind": op_table.SMOOTH.index(kind), "alpha": 0.7}
    y, up = SMOOTH[kind](x), draw(2, 3, 4, 5)
    same(run_one("smooth", attributes, 2, x=x.detach(), y=f32(x))["y"], y)
    back = run_one("smooth_grad", attributes, 2, grad=up, x=x.detach(), y=f32(x))
    same(back["y"], torch.autograd.grad(y, x, up)[0])


def test_gate_affine_gradients_and_channel_dot() -> None:
    x, s = draw(2, 3, 4, 5).requires_grad_(), draw(2, 1, 1, 5).requires_grad_()
    up = draw(2, 3, 4, 5)
    y = x * s
    same(run_one("gate", {}, 2, x=x.detach(), s=s.detach(), y=f32(x))["y"], y)
    back = run_one("gate_grad", {}, 2, grad=up, x=x.detach(), s=s.detach(), y=f32(x), s_grad=f32(s))
    dx, ds = torch.autograd.grad(y, (x, s), up)
    same(back["y"], dx)
    same(back["s_grad"], ds)
    scale = draw(5).requires_grad_()
    dx, dscale = torch.autograd.grad(x * scale, (x, scale), up)
    same(run_one("affine_grad", {}, 2, grad=up, scale=scale.detach(), y=f32(x))["y"], dx)
    start = draw(5)
    same(run_one("channel_dot", {}, 2, grad=up, x=x.detach(), y=start)["y"], start + dscale)


# ---- norms


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("act", ["none", "relu6", "leaky"])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norm(groups: int, act: str, affine: bool) -> None:
    x = (draw(2, 4, 3, 12) + 0.5).requires_grad_()
    gamma, beta = (draw(12).requires_grad_(), draw(12).requires_grad_()) if affine else (None, None)
    z = last(F.group_norm(first(x), groups, gamma, beta, eps=1e-3))
    attributes, function = ACTS[act]
    values = {name: v.detach() for name, v in (("gamma", gamma), ("beta", beta)) if v is not None}
    ours = run_one(
        "group_norm",
        {"groups": groups, "eps": 1e-3, **attributes},
        2,
        x=x.detach(),
        **values,
        y=f32(x),
        stats=((groups, 2), "f32"),
        mask=as_bits(x),
    )
    same(ours["y"], function(z))
    check_mask(ours["mask"], z, attributes)
    up = torch.randn_like(z)
    leaves = [leaf for leaf in (x, gamma, beta) if leaf is not None]
    expected = torch.autograd.grad(z, leaves, up)
    starts = {"gamma_grad": draw(12), "beta_grad": draw(12)} if affine else {}
    given = {"gamma": gamma.detach()} if gamma is not None else {}
    back = run_one(
        "group_norm_grad",
        {"groups": groups},
        2,
        grad=up,
        x=x.detach(),
        stats=ours["stats"],
        y=f32(x),
        **given,
        **starts,
    )
    same(back["y"], expected[0])
    for name, gradient in zip(starts, expected[1:], strict=True):
        same(back[name], starts[name] + gradient)


# ---- pooling and upsampling


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    share=st.floats(0, 1),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    ceil=st.booleans(),
    include_pad=st.booleans(),
    divisor=st.sampled_from([0, 5]),
    seed=st.integers(0, 99),
)
def test_average_pooling(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    share: float,
    size: tuple[int, int],
    ceil: bool,
    include_pad: bool,
    divisor: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    pads = (int(share * kernel[0] / 2), int(share * kernel[1] / 2))
    x = draw(2, *size, 3).requires_grad_()
    y = last(nn.AvgPool2d(kernel, stride, pads, ceil, include_pad, divisor or None)(first(x)))
    attributes = window({"kernel": kernel, "stride": stride, "pads": (*pads, *pads), "dilation": (1, 1)})
    attributes |= {"include_pad": int(include_pad), "divisor": divisor}
    same(run_one("avg_pool", attributes, 2, x=x.detach(), y=f32(y))["y"], y)
    up, other = torch.randn_like(y), torch.randn_like(x)
    (dx,) = torch.autograd.grad(y, x, up)
    same(run_one("avg_pool_grad", attributes, 2, grad=up, y=f32(x))["y"], dx)
    same(run_one("avg_pool_grad", attributes, 2, grad=up, other=other, y=f32(x))["y"], dx + other)


@pytest.mark.parametrize("pooled", [(1, 1), (3, 2), (4, 7), (9, 8)])
def test_adaptive_pooling(pooled: tuple[int, int]) -> None:
    x = draw(2, 6, 7, 5).requires_grad_()
    y = last(F.adaptive_avg_pool2d(first(x), pooled))
    same(run_one("adaptive_pool", {}, 2, x=x.detach(), y=f32(y))["y"], y)
    up, other = torch.randn_like(y), torch.randn_like(x)
    (dx,) = torch.autograd.grad(y, x, up)
    same(run_one("adaptive_pool_grad", {}, 2, grad=up, other=other, y=f32(x))["y"], dx + other)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    share=st.floats(0, 1),
    size=st.tuples(st.integers(7, 10), st.integers(7, 10)),
    ceil=st.booleans(),
    content=st.sampled_from(["any", "ties", "nan", "minus infinity"]),
    seed=st.integers(0, 99),
)
def test_max_pooling(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    share: float,
    size: tuple[int, int],
    ceil: bool,
    content: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    pads = (int(share * kernel[0] / 2), int(share * kernel[1] / 2))
    x = draw(2, *size, 3)
    if content == "ties":
        x = x.round()
    elif content != "any":
        x[torch.rand_like(x) < 0.3] = math.nan if content == "nan" else -math.inf
    leaf = first(x).contiguous().requires_grad_()
    y, places = F.max_pool2d(leaf, kernel, stride, pads, dilation, ceil, return_indices=True)
    attributes = window({"kernel": kernel, "stride": stride, "pads": (*pads, *pads), "dilation": dilation})
    shape = tuple(last(y).shape[1:])
    ours = run_one("max_pool", attributes, 2, x=x, y=(shape, "f32"), which=(shape, "u8"))
    torch.testing.assert_close(ours["y"], last(y), rtol=0, atol=0, equal_nan=True)
    # the number in the window -> the place in the image
    which = first(ours["which"]).long()
    rows = torch.arange(shape[0])[:, None] * stride[0] - pads[0] + which // kernel[1] * dilation[0]
    columns = torch.arange(shape[1]) * stride[1] - pads[1] + which % kernel[1] * dilation[1]
    assert torch.equal(rows * size[1] + columns, places)
    up = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, leaf, up)
    same(run_one("max_pool_grad", attributes, 2, grad=last(up), which=ours["which"], y=f32(x))["y"], last(dx))


@pytest.mark.parametrize("size", [(8, 6), (5, 9), (4, 3), (3, 2), (1, 1)])
def test_upsampling(size: tuple[int, int]) -> None:
    x = draw(2, 4, 3, 5).requires_grad_()
    y = last(F.interpolate(first(x), size, mode="bilinear", align_corners=False))
    residual, up = torch.randn_like(y), torch.randn_like(y)
    same(run_one("upsample", {}, 2, x=x.detach(), y=f32(y))["y"], y)
    same(run_one("upsample", {}, 2, x=x.detach(), residual=residual, y=f32(y))["y"], y + residual)
    same(run_one("upsample_grad", {}, 2, grad=up, y=f32(x))["y"], torch.autograd.grad(y, x, up)[0])


# ---- dropout and the loss


def test_dropout_draws_are_those_of_the_definition() -> None:
    stays = random.kept(seed=5, number=3, step=7, first=2, shape=(2, 1, 1, 6), p=0.4)
    for image in range(2):
        start = random.splitmix64(random.splitmix64(random.splitmix64(5 + 3 * 0x9E3779B97F4A7C15) + 7) + 2 + image)
        for i in range(6):
            uniform = (random.splitmix64(start + i) >> 11) / 2**53
            assert bool(stays[image, 0, 0, i]) == (uniform >= 0.4)
    negative = random.kept(-1, 0, 1, 0, (1, 8), 0.5)
    assert torch.equal(negative, random.kept(2**64 - 1, 0, 1, 0, (1, 8), 0.5))


def test_dropout_is_fair_and_differs_by_step_layer_and_image() -> None:
    def drawn(number: int = 0, step: int = 1, first: int = 0, seed: int = 0) -> Tensor:
        return random.kept(seed, number, step, first, (1, 20_000), 0.3)

    plain = drawn()
    assert abs(plain.double().mean().item() - 0.7) < 0.02
    for other in (drawn(number=1), drawn(step=2), drawn(first=1), drawn(seed=1)):
        assert 0.5 < (other == plain).double().mean().item() < 0.66  # independent ones agree in 0.58


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_and_its_gradient(p: float) -> None:
    x, up = draw(3, 1, 1, 21), draw(3, 1, 1, 21)
    scalars = {"seed": 4, "step": 2, "first": 1}
    ours = run_one("dropout", {"p": p, "number": 6}, 3, torch.float64, scalars, x=x, y=f32(x), mask=as_bits(x))
    stays = random.kept(4, 6, 2, 1, (3, 1, 1, 21), p)
    factor = stays.double() / (1 - p) if p < 1 else torch.zeros_like(x)
    same(ours["y"], x * factor)
    assert torch.equal(bits(ours["mask"], x), stays)
    same(run_one("dropout_grad", {"p": p}, 3, grad=up, mask=ours["mask"], y=f32(x))["y"], up * factor)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss(smoothing: float) -> None:
    logits, labels = draw(4, 1, 1, 6, scale=3.0).requires_grad_(), torch.tensor([0, 5, 2, 2])
    count = 7
    loss = F.cross_entropy(logits.flatten(1), labels, label_smoothing=smoothing, reduction="sum")
    (grad,) = torch.autograd.grad(loss / count, logits)
    start = torch.tensor([10.0, 3.0], dtype=torch.float64)
    ours = run_one(
        "softmax_loss",
        {"smoothing": smoothing},
        4,
        torch.float64,
        {"count": count},
        logits=logits.detach(),
        labels=labels.int(),
        grad=f32(logits),
        metrics=start,
    )
    same(ours["grad"], grad)
    right = (logits.flatten(1).argmax(1) == labels).sum()
    same(ours["metrics"], start + torch.stack([loss.detach(), right.double()]))


# ---- weights made of others


@pytest.mark.parametrize("depthwise", [0, 1])
def test_standardization(depthwise: int) -> None:
    filters = draw(6, 1, 3, 3) if depthwise else draw(6, 4, 3, 3)
    filters[2] = 0.5  # no deviation: the gradient's second term is left out

    def ours(w: Tensor) -> Tensor:
        return w[:, 0].permute(1, 2, 0) if depthwise else w.permute(0, 2, 3, 1)

    leaf = filters.clone().requires_grad_()
    y, up = standardize(leaf, 1e-5), torch.randn_like(filters)
    made = run_one("standardize", {"eps": 1e-5, "depthwise": depthwise}, w=ours(filters), y=f32(ours(filters), False))
    same(made["y"], ours(y))
    (expected,) = torch.autograd.grad(y, leaf, up)
    back = run_one("standardize_grad", {"eps": 1e-5, "depthwise": depthwise}, w=ours(filters), grad=ours(up))
    same(back["grad"], ours(expected), tolerance=1e-8)  # of the constant filter: up / eps


@pytest.mark.parametrize("depthwise", [0, 1])
@pytest.mark.parametrize("trained", [True, False])
def test_scaled_weight(depthwise: int, trained: bool) -> None:
    shape, along = ((3, 3, 5), (0, 1)) if depthwise else ((5, 3, 3, 2), (1, 2, 3))
    weight, rstd, up = draw(*shape).requires_grad_(), torch.rand(5).double(), draw(*shape)
    gamma = draw(5).requires_grad_()
    factor = (gamma if trained else torch.ones(5).double()) * rstd
    y = weight * (factor if depthwise else factor[:, None, None, None])
    given = {"gamma": gamma.detach()} if trained else {}
    made = run_one(
        "scale_weight", {"depthwise": depthwise}, w=weight.detach(), rstd=rstd, y=f32(weight, False), **given
    )
    same(made["y"], y)
    (dw,) = torch.autograd.grad(y, weight, up, retain_graph=True)
    start = draw(5)
    more = {"gamma_grad": start} if trained else {}
    back = run_one(
        "scale_weight_grad", {"depthwise": depthwise}, w=weight.detach(), rstd=rstd, grad=up, **given, **more
    )
    same(back["grad"], dw)
    if trained:
        (dgamma,) = torch.autograd.grad(y, gamma, up)
        same(back["gamma_grad"], start + dgamma)
        same(dgamma, rstd * (weight.detach() * up).sum(along))


@pytest.mark.parametrize("present", [("bias", "gamma", "beta"), ("gamma", "beta"), ("bias",), ()])
def test_shifted_bias(present: tuple[str, ...]) -> None:
    leaves = {name: draw(4).requires_grad_() for name in present}
    mean, rstd, up = draw(4), torch.rand(4).double(), draw(4)
    bias, gamma, beta = (leaves.get(name, value) for name, value in (("bias", 0.0), ("gamma", 1.0), ("beta", 0.0)))
    y = beta + (bias - mean) * gamma * rstd
    given: dict[str, Any] = {name: leaf.detach() for name, leaf in leaves.items()}
    same(run_one("shift_bias", {}, **given, mean=mean, rstd=rstd, y=((4,), "f32"))["y"], y)
    if not present:
        return
    starts = {f"{name}_grad": draw(4) for name in present}
    given.pop("beta", None)
    back = run_one("shift_bias_grad", {}, grad=up, **given, mean=mean, rstd=rstd, **starts)
    for name, expected in zip(present, torch.autograd.grad(y, list(leaves.values()), up), strict=True):
        same(back[f"{name}_grad"], starts[f"{name}_grad"] + expected)


# ---- updates


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_sgd(momentum: float, decay: float) -> None:
    p, buffer = draw(7), torch.zeros(7).double()
    theirs = nn.Parameter(p.clone())
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=momentum, weight_decay=decay)
    for step in range(1, 6):
        theirs.grad = draw(7)
        lr = optimizer.param_groups[0]["lr"] = 0.1 / step
        given = {"momentum": buffer} if momentum else {}
        attributes = {"weight_decay": decay, "momentum": momentum}
        found = run_one("sgd", attributes, 1, torch.float64, {"lr": lr}, p=p, grad=theirs.grad, **given)
        p, buffer = found["p"], found.get("momentum", buffer)
        optimizer.step()
        same(p, theirs.detach(), 1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_adam(decay: float) -> None:
    p, m, v = draw(7), torch.zeros(7).double(), torch.zeros(7).double()
    theirs = nn.Parameter(p.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.1, weight_decay=decay, betas=(0.8, 0.99), eps=1e-6)
    attributes = {"weight_decay": decay, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6}
    for step in range(1, 8):
        theirs.grad = draw(7)
        lr = optimizer.param_groups[0]["lr"] = 0.1 / step
        found = run_one("adam", attributes, 1, torch.float64, {"lr": lr, "step": step}, p=p, grad=theirs.grad, m=m, v=v)
        p, m, v = found["p"], found["m"], found["v"]
        optimizer.step()
        same(p, theirs.detach(), 1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("name", ["sgd8", "adam8"])
def test_updates_with_a_state_of_8_bits(name: str, decay: float) -> None:
    """In float32 the bits are those of the engine's own optimizers, the tail of the last block included."""
    n = 5000
    p = torch.randn(n)
    theirs = nn.Parameter(p.clone())
    averages = ("momentum",) if name == "sgd8" else ("m", "v")
    state = {average: torch.zeros(n, dtype=torch.uint8) for average in averages}
    state |= {f"{average}_scale": torch.zeros(blocks(n)) for average in averages}
    if name == "sgd8":
        optimizer: torch.optim.Optimizer = SGD8bit([theirs], lr=0.1, momentum=0.8, weight_decay=decay)
        attributes = {"weight_decay": decay, "momentum": 0.8}
    else:
        optimizer = Adam8bit([theirs], lr=0.1, weight_decay=decay)
        attributes = {"weight_decay": decay, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    for step in range(1, 6):
        theirs.grad = torch.randn(n)
        lr = optimizer.param_groups[0]["lr"] = 0.1 / step
        scalars = {"lr": lr, "step": step}
        found = run_one(name, attributes, 1, torch.float32, scalars, p=p, grad=theirs.grad, **state)
        p, state = found["p"], {key: found[key] for key in state}
        optimizer.step()
        assert torch.equal(p, theirs.detach())
    assert state[f"{averages[0]}_scale"].dtype == torch.float32
    in_float64 = run_one(
        name, attributes, 1, torch.float64, {"lr": 0.1, "step": 6}, p=p.double(), grad=draw(n), **state
    )
    assert in_float64["p"].dtype == torch.float64
    assert in_float64[f"{averages[0]}_scale"].dtype == torch.float32


# ---- the table


def test_every_op_is_interpreted() -> None:
    assert set(FUNCTIONS) == set(op_table.OPS)


def test_in_place_is_what_the_table_says() -> None:
    """The rows of the table say in words what `liveness.IN_PLACE` holds."""
    text = Path(op_table.__file__).read_text()
    rows = re.split(r"\n    (?=\d+ +\w)", text)[1:]
    said = {}
    for row in rows:
        found = re.search(r"(?:in place of|in\s+# place of|be in place of) (\w+(?: or \w+)*)", row)
        if found:
            name = row.split()[1]
            said[name] = tuple(found[1].split(" or "))
    assert {name: inputs for name, (_, inputs) in IN_PLACE.items()} == said
