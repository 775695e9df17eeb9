"""Promise 2: bytes are true. Each operation's stated rule equals what autograd is seen to keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinytl.ops import (
    Activation,
    AdaptiveAvgPool2d,
    AvgPool2d,
    Conv2d,
    FrozenBatchNorm,
    GlobalMean,
    GroupNorm,
    Linear,
    MaxPool2d,
    Padding,
    SmoothActivation,
    SqueezeExcite,
    UpsampleBilinear,
    chain,
    chain_keeps,
    fuse,
)
from tinytl.ops._weights import WeightRecipe

from .observed import observe_kept

CHANNELS = 8


def tensors(*shapes: tuple[int, ...], trains: list[bool]) -> list[Tensor]:
    made = [torch.rand(shape) + 0.5 for shape in shapes]
    return [t.requires_grad_(need) for t, need in zip(made, trains, strict=True)]


def stage(kind: str, trains: list[bool]):
    """An operation that keeps CHANNELS channels, with its tensors."""
    c = (CHANNELS,)
    if kind == "conv":
        op = Conv2d((3, 3), (1, 1), Padding.symmetric(1, 1), out_channels=CHANNELS)
        return op, tensors((CHANNELS, CHANNELS, 3, 3), c, trains=trains[:2])
    if kind == "strided":
        op = Conv2d((5, 5), (2, 2), Padding(same=True), groups=CHANNELS, out_channels=CHANNELS)
        return op, tensors((CHANNELS, 1, 5, 5), c, trains=trains[:2])
    if kind == "conv+norm":
        op = Conv2d((1, 1), out_channels=CHANNELS, recipe=WeightRecipe(norm_eps=1e-3))
        weight, gamma, beta, mean, var = tensors(
            (CHANNELS, CHANNELS, 1, 1), c, c, c, c, trains=[*trains[:3], False, False]
        )
        return op, [weight, None, gamma, beta, mean, var]
    if kind == "standardized":
        op = Conv2d(
            (3, 3), (1, 1), Padding.symmetric(1, 1), out_channels=CHANNELS, recipe=WeightRecipe(standardize=True)
        )
        return op, [torch.randn(CHANNELS, CHANNELS, 3, 3).requires_grad_(trains[0]), None]
    if kind == "batch norm":
        return FrozenBatchNorm(1e-3), tensors(c, c, c, c, trains=[*trains[:2], False, False])
    if kind == "group norm":
        return GroupNorm(2, 1e-3), tensors(c, c, trains=trains[:2])
    if kind == "squeeze excite":
        return SqueezeExcite(), tensors((4, CHANNELS), (4,), (CHANNELS, 4), c, trains=[*trains[:3], trains[0]])
    plain = {
        "relu6": Activation(hi=6.0),
        "leaky": Activation(slope=0.1),
        "pool": AvgPool2d((2, 2), (2, 2), ceil_mode=True),
        "hard swish": SmoothActivation("hard_swish"),
        "sigmoid": SmoothActivation("sigmoid"),
        "max": MaxPool2d((3, 3), (2, 2), (1, 1)),
        "to a size": AdaptiveAvgPool2d((3, 2)),
        "up": UpsampleBilinear((9, 7)),
        "mean": GlobalMean(keep_dims=True),
    }
    return plain[kind], []


KINDS = [
    *("conv", "strided", "conv+norm", "standardized", "batch norm", "group norm"),
    *("relu6", "leaky", "pool", "up", "mean", "hard swish", "sigmoid", "max", "to a size", "squeeze excite"),
]


@settings(max_examples=150, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.sampled_from(KINDS), st.lists(st.booleans(), min_size=3, max_size=3)), min_size=1, max_size=6
    ),
    x_needs=st.booleans(),
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    recompute=st.sampled_from([None, False, True]),
)
def test_rule_equals_what_is_kept(
    layers: list[tuple[str, list[bool]]], x_needs: bool, size: tuple[int, int], recompute: bool | None
) -> None:
    stages = fuse([stage(kind, trains) for kind, trains in layers])
    x = torch.randn(3, CHANNELS, *size).contiguous(memory_format=torch.channels_last).requires_grad_(x_needs)
    resident = [t for _, group in stages for t in group if t is not None]
    rule = chain_keeps(tuple(x.shape), x.dtype, stages, x_needs=x_needs, recompute=recompute)
    seen, y = observe_kept(lambda: chain(x, stages, recompute=recompute), resident)
    assert seen == sum(entry.bytes for entry in rule)
    if y.requires_grad:
        y.backward(torch.randn_like(y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rule_for_other_types(dtype: torch.dtype) -> None:
    stages = [stage("conv", [True, True, True]), stage("relu6", []), stage("conv", [False, True, True])]
    stages = [(op, [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in ts]) for op, ts in stages]
    x = torch.randn(2, CHANNELS, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    rule = chain_keeps(tuple(x.shape), dtype, fuse(stages), x_needs=False)
    seen, _ = observe_kept(lambda: chain(x, stages), [t for _, ts in stages for t in ts])
    assert seen == sum(entry.bytes for entry in rule) > 0


def test_linear_keeps_its_input_only_for_its_weight() -> None:
    for trains in (False, True):
        weight, bias = tensors((4, 6), (4,), trains=[trains, True])
        x = torch.randn(5, 6, requires_grad=True)
        seen, _ = observe_kept(lambda w=weight, b=bias, x=x: chain(x, [(Linear(4), [w, b])]), [weight, bias])
        assert seen == (5 * 6 * 4 if trains else 0)


def test_nothing_is_kept_without_gradients() -> None:
    stages = [stage(kind, [True] * 3) for kind in KINDS]
    x = torch.randn(2, CHANNELS, 8, 8)
    with torch.no_grad():
        seen, y = observe_kept(lambda: chain(x, stages), [])
    assert seen == 0
    assert not y.requires_grad
