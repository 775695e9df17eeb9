"""Promise 1: gradients are exact. gradcheck over every subset, and stock autograd under random upstream gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinytl.ops import Activation, Padding
from tinytl.ops import functional as lean_ops
from tinytl.ops.add import add

ACTIVATIONS = {"none": None, "relu": Activation(), "relu6": Activation(hi=6.0), "leaky": Activation(slope=0.2)}


def tensor(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def stock_activation(x: Tensor, kind: str) -> Tensor:
    return {
        "none": lambda t: t,
        "relu": F.relu,
        "relu6": F.relu6,
        "leaky": lambda t: F.leaky_relu(t, 0.2),
    }[kind](x)


def agree(lean: Callable[..., Tensor], stock: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-10) -> None:
    """Same output, and same gradients for every subset of inputs under a random upstream gradient."""
    upstream = None
    for subset in itertools.product((False, True), repeat=len(inputs)):
        ours = [t.detach().clone().requires_grad_(need) for t, need in zip(inputs, subset, strict=True)]
        theirs = [t.detach().clone().requires_grad_(need) for t, need in zip(inputs, subset, strict=True)]
        a, b = lean(*ours), stock(*theirs)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert a.requires_grad == b.requires_grad == any(subset)
        if not any(subset):
            continue
        upstream = torch.randn_like(b) if upstream is None else upstream
        before = upstream.clone()
        a.backward(upstream)
        assert torch.equal(upstream, before), "backward overwrote a gradient that is not its own"
        b.backward(upstream)
        for x, y, need in zip(ours, theirs, subset, strict=True):
            assert (x.grad is not None) == need
            if need:
                torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance)
        for x, original in zip(ours, inputs, strict=True):
            assert torch.equal(x.detach(), original), "forward overwrote an input"


def gradchecked(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    for subset in itertools.product((False, True), repeat=len(inputs)):
        if any(subset):
            leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(inputs, subset, strict=True)]
            assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([4, 8]),
    size=st.tuples(st.integers(9, 13), st.integers(9, 13)),
    same=st.booleans(),
    kind=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 99),
)
def test_convolution_agrees_with_stock(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    width: int,
    size: tuple[int, int],
    same: bool,
    kind: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    padding = Padding(*pads, same=same)
    sides = [padding.along(a, size[a], kernel[a], stride[a], dilation[a]) for a in (0, 1)]

    def stock(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        padded = F.pad(x, (*sides[1], *sides[0]))
        return stock_activation(F.conv2d(padded, w, b, stride, 0, dilation, groups), kind)

    def lean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return lean_ops.conv2d(x, w, b, stride, padding, dilation, groups, activation=ACTIVATIONS[kind])

    agree(lean, stock, tensor(2, 4, *size), tensor(width, 4 // groups, *kernel), tensor(width))


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (3, 1, 4), (5, 2, 2)])
def test_convolution_gradcheck(kind: str, kernel: int, stride: int, groups: int) -> None:
    torch.manual_seed(0)
    gradchecked(
        lambda x, w, b: lean_ops.conv2d(
            x, w, b, stride, Padding(same=True), groups=groups, activation=ACTIVATIONS[kind]
        ),
        tensor(2, 4, 5, 5, scale=3),
        tensor(4, 4 // groups, kernel, kernel),
        tensor(4),
    )


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_convolution_with_frozen_batch_norm(kind: str) -> None:
    torch.manual_seed(1)
    mean, var = tensor(8), tensor(8).abs() + 0.5

    def stock(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = F.conv2d(x, w, None, 2, 1)
        return stock_activation(F.batch_norm(y, mean, var, gamma, beta, False, 0.0, 1e-3), kind)

    def lean(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        act = ACTIVATIONS[kind]
        return lean_ops.conv2d_norm(x, w, (gamma, beta, mean, var), 1e-3, 2, 1, activation=act)

    inputs = (tensor(2, 4, 7, 7), tensor(8, 4, 3, 3), tensor(8), tensor(8))
    agree(lean, stock, *inputs)
    gradchecked(lean, *inputs)


def test_standardized_convolution() -> None:
    torch.manual_seed(2)

    def stock(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        centred = w - w.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred / (w.std((1, 2, 3), keepdim=True) + 1e-5), b, 1, 1)

    def lean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return lean_ops.conv2d(x, w, b, 1, 1, standardize=True)

    inputs = (tensor(2, 4, 5, 6), tensor(6, 4, 3, 3), tensor(6))
    agree(lean, stock, *inputs)
    gradchecked(lean, *inputs)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_linear(shape: tuple[int, ...]) -> None:
    inputs = (tensor(*shape), tensor(4, 5), tensor(4))
    agree(lean_ops.linear, F.linear, *inputs)
    gradchecked(lean_ops.linear, *inputs)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm(groups: int) -> None:
    inputs = (tensor(2, 8, 5, 4), tensor(8), tensor(8))
    agree(
        lambda x, w, b: lean_ops.group_norm(x, groups, w, b, 1e-3),
        lambda x, w, b: F.group_norm(x, groups, w, b, 1e-3),
        *inputs,
    )
    gradchecked(lambda x, w, b: lean_ops.group_norm(x, groups, w, b, 1e-3), *inputs)


def test_frozen_batch_norm() -> None:
    mean, var = tensor(6), tensor(6).abs() + 0.5
    inputs = (tensor(2, 6, 5, 4), tensor(6), tensor(6))
    agree(
        lambda x, w, b: lean_ops.frozen_batch_norm(x, mean, var, w, b, 1e-3),
        lambda x, w, b: F.batch_norm(x, mean, var, w, b, False, 0.0, 1e-3),
        *inputs,
    )
    gradchecked(lambda x, w, b: lean_ops.frozen_batch_norm(x, mean, var, w, b, 1e-3), *inputs)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 16), (2, 8, 4, 4), (5,)])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_activations(name: str, shape: tuple[int, ...]) -> None:
    x = tensor(*shape, scale=5)
    agree(getattr(lean_ops, name), getattr(F, name), x)
    gradchecked(getattr(lean_ops, name), x)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_activations_at_the_kinks_and_for_nan(name: str) -> None:
    x = torch.tensor([0.0, -0.0, 6.0, 6.0001, -1.0, float("nan"), float("inf"), -float("inf")] * 3)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = getattr(lean_ops, name)(ours), getattr(F, name)(theirs)
    torch.testing.assert_close(a, b, equal_nan=True)
    upstream = torch.randn_like(x)
    a.backward(upstream)
    b.backward(upstream)
    assert ours.grad is not None
    assert theirs.grad is not None
    number = ~x.isnan()
    torch.testing.assert_close(ours.grad[number], theirs.grad[number])


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    ceil_mode=st.booleans(),
    include=st.booleans(),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
)
def test_average_pooling(kernel: int, stride: int, ceil_mode: bool, include: bool, size: tuple[int, int]) -> None:
    x = tensor(2, 3, *size)
    options = (kernel, stride, kernel // 2, ceil_mode, include)
    agree(lambda t: lean_ops.avg_pool2d(t, *options), lambda t: F.avg_pool2d(t, *options), x)


@pytest.mark.parametrize("keepdim", [False, True])
def test_global_mean(keepdim: bool) -> None:
    x = tensor(2, 3, 5, 4)
    agree(lambda t: lean_ops.global_mean(t, keepdim), lambda t: t.mean((2, 3), keepdim=keepdim), x)
    gradchecked(lambda t: lean_ops.global_mean(t, keepdim), x)


@pytest.mark.parametrize("size", [(7, 9), (3, 4), (6, 8), (1, 1)])
def test_upsampling(size: tuple[int, int]) -> None:
    x = tensor(2, 3, 3, 4)
    agree(
        lambda t: lean_ops.upsample_bilinear(t, size),
        lambda t: F.interpolate(t, size, mode="bilinear", align_corners=False),
        x,
    )
    gradchecked(lambda t: lean_ops.upsample_bilinear(t, size), x)


def test_addition() -> None:
    agree(add, torch.add, tensor(2, 3, 4, 4), tensor(2, 3, 4, 4))


def test_a_gradient_of_a_gradient_is_refused() -> None:
    x = tensor(2, 3, 4, 4).requires_grad_()
    (grad,) = torch.autograd.grad(lean_ops.relu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
