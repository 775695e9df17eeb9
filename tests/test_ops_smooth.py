"""Smooth activations, squeeze and excite, max pooling and pooling to a size: PyTorch's values, gradients and kinks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinytl.ops import MaxPool2d, SmoothActivation, SqueezeExcite, chain, chain_keeps
from tinytl.ops import functional as lean_ops
from tinytl.ops._op import Needs

from .observed import observe_kept
from .test_ops_gradients import agree, gradchecked, tensor

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


def smooth(kind: str) -> Callable[[Tensor], Tensor]:
    return lambda x: lean_ops.smooth_activation(x, kind, 0.7)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 16), (5,)])
@pytest.mark.parametrize("kind", sorted(SMOOTH))
def test_smooth_activations(kind: str, shape: tuple[int, ...]) -> None:
    x = tensor(*shape, scale=3)
    agree(smooth(kind), SMOOTH[kind], x, tolerance=1e-12)
    gradchecked(smooth(kind), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(SMOOTH))
def test_smooth_activations_at_the_kinks_and_beyond(kind: str, dtype: torch.dtype) -> None:
    values = [-3.0, 3.0, 0.0, -0.0, 3.001, -3.001, 100.0, -100.0, math.inf, -math.inf, math.nan]
    x = torch.tensor(values * 3, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = smooth(kind)(ours), SMOOTH[kind](theirs)
    assert torch.equal(a.nan_to_num(), b.nan_to_num())
    upstream = torch.randn_like(x)
    a.backward(upstream)
    b.backward(upstream)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad.nan_to_num(), theirs.grad.nan_to_num())


@pytest.mark.parametrize("kind", sorted(SMOOTH))
def test_in_place_where_owned(kind: str) -> None:
    op, x, grad = SmoothActivation(kind, 0.7), tensor(3, 8, scale=3), tensor(3, 8)  # type: ignore[arg-type]
    expected, pulled = op.forward(x, (), Needs(False), False)[0], op.pull_back(grad, x)
    mine, copy = x.clone(), grad.clone()
    y, kept = op.forward(mine, (), Needs(False), True)
    assert y is mine
    assert kept == ()
    assert torch.equal(y, expected)
    assert torch.equal(op.pull_back(copy, x, in_place=True), pulled)
    assert torch.equal(copy, pulled) or kind == "mish"


def stock_squeeze_excite(act: str, gate: str) -> Callable[..., Tensor]:
    first = F.relu if act == "relu" else SMOOTH[act]

    def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        m = x.mean((2, 3))
        s = SMOOTH[gate](F.linear(first(F.linear(m, w1.flatten(1), b1)), w2.flatten(1), b2))
        return x * s[:, :, None, None]

    return run


@pytest.mark.parametrize(("act", "gate"), [("relu", "hard_sigmoid"), ("silu", "sigmoid"), ("relu", "sigmoid")])
@pytest.mark.parametrize("convolutions", [False, True])
def test_squeeze_excite(act: str, gate: str, convolutions: bool) -> None:
    torch.manual_seed(1)
    sides = (1, 1) if convolutions else ()
    inputs = (tensor(3, 6, 4, 5), tensor(4, 6, *sides, scale=2), tensor(4), tensor(6, 4, *sides), tensor(6))

    def lean(*tensors: Tensor) -> Tensor:
        return lean_ops.squeeze_excite(*tensors, act=act, gate=gate)  # type: ignore[arg-type]

    agree(lean, stock_squeeze_excite(act, gate), *inputs)
    gradchecked(lean, *inputs)


def test_squeeze_excite_keeps_its_input_and_means() -> None:
    """By its own rule; as a chain it keeps its input alone, and nothing where nothing trains."""
    for needs in itertools.product((False, True), repeat=5):
        shapes = ((3, 8, 4, 5), (4, 8), (4,), (8, 4), (8,))
        x, *rest = [torch.randn(s).requires_grad_(n) for s, n in zip(shapes, needs, strict=True)]
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(needs[0])
        stages = [(SqueezeExcite(), rest)]
        for recompute, bytes_kept in ((False, (3 * 8 * 20 + 3 * 8) * 4), (None, 3 * 8 * 20 * 4)):
            rule = chain_keeps(tuple(x.shape), x.dtype, stages, x_needs=needs[0], recompute=recompute)
            seen, _ = observe_kept(lambda r=recompute, s=stages, x=x: chain(x, s, recompute=r), rest)
            assert seen == sum(entry.bytes for entry in rule) == (bytes_kept if any(needs) else 0)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padded=st.booleans(),
    ceil_mode=st.booleans(),
    size=st.tuples(st.integers(7, 11), st.integers(7, 11)),
    ties=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_max_pooling(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padded: bool,
    ceil_mode: bool,
    size: tuple[int, int],
    ties: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
    options = (kernel, stride, padding, dilation, ceil_mode)
    x = torch.randn(2, 3, *size, dtype=dtype)
    if ties:
        x = x.round()
        x[torch.rand_like(x) < 0.3] = -math.inf
        x[torch.rand_like(x) < 0.05] = math.nan
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = lean_ops.max_pool2d(ours, *options), F.max_pool2d(theirs, *options)
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    upstream = torch.randn_like(b)
    a.backward(upstream)
    b.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_max_pooling_where_nothing_trains_or_there_is_nothing() -> None:
    op = MaxPool2d((3, 3), (2, 2), (1, 1))
    x = tensor(2, 4, 9, 7)
    assert torch.equal(chain(x, [(op, ())]), F.max_pool2d(x, 3, 2, 1))
    assert op.keeps((2, 4, 9, 7), x.dtype, Needs(False)).extra_bytes == 0
    none = tensor(0, 4, 9, 7).requires_grad_()
    chain(none, [(op, ())]).sum().backward()
    assert none.grad is not None
    gradchecked(lambda t: lean_ops.max_pool2d(t, 3, 2, 1), x)


@pytest.mark.parametrize("size", [1, 3, (2, 4), (None, 3), (12, 9), (7, 7)])
def test_pooling_to_a_size(size: int | tuple[int | None, int | None]) -> None:
    x = tensor(2, 3, 12, 9)
    agree(lambda t: lean_ops.adaptive_avg_pool2d(t, size), lambda t: F.adaptive_avg_pool2d(t, size), x)  # type: ignore[arg-type]
    gradchecked(lambda t: lean_ops.adaptive_avg_pool2d(t, size), x)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-2.0, 0.5), (0.0, 6.0)])
def test_hardtanh(bounds: tuple[float, float]) -> None:
    for x in (tensor(2, 8, 3, 5, scale=2), torch.tensor([*bounds, 0.1], dtype=torch.float64)):
        agree(lambda t: lean_ops.hardtanh(t, *bounds), lambda t: F.hardtanh(t, *bounds), x)
