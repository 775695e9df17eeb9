"""What operations allocate while they compute: asserted to the byte, and what they compute meanwhile held to stock."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinytl.memory.capture import capture_step
from tinytl.memory.measured import adam, measure_step, resident_tensors, training_step
from tinytl.memory.step import StepSpec, build_batch, build_network
from tinytl.ops import Padding, _depthwise, _masks, _windows, group_norm, max_pool
from tinytl.ops import functional as lean_ops
from tinytl.ops._op import Needs
from tinytl.ops._weights import WeightRecipe
from tinytl.ops.conv import Conv2d
from tinytl.ops.group_norm import GroupNorm
from tinytl.ops.weight_standardization import standardize, standardize_gradient_

from .test_ops_gradients import agree, gradchecked, tensor

Pair = tuple[int, int]

MODULES = (_depthwise, _masks, _windows, group_norm, max_pool)
COMPILED = [False] if _windows.KERNELS is None else [True, False]
needs_kernels = pytest.mark.skipif(_windows.KERNELS is None, reason="built without a C++ compiler")


@pytest.fixture(params=COMPILED, ids=lambda compiled: "compiled" if compiled else "plain")
def passes(request: pytest.FixtureRequest) -> Iterator[None]:
    """The compiled passes, and plain PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            without_kernels(patch)
        yield


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        patch.setattr(module, "KERNELS", None)


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def peak(step: Callable[[], object]) -> int:
    """The most bytes alive at once of what the second of two calls allocates, its result included."""
    with torch.no_grad():
        step()
        return measure_step(step).step_peak_bytes


geometries = {
    "kernel": st.tuples(st.integers(1, 7), st.integers(1, 7)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "pads": st.tuples(*[st.integers(0, 3)] * 4),
    "size": st.tuples(st.integers(1, 6), st.integers(1, 6)),
    "count": st.integers(1, 2),
    "same": st.booleans(),
    "seed": st.integers(0, 99),
}


def fits(
    size: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int], sides: list[tuple[int, int]]
) -> bool:
    return all(size[a] + sum(sides[a]) > dilation[a] * (kernel[a] - 1) for a in (0, 1))


def convolutions_agree(
    width: int,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, int, int, int],
    size: tuple[int, int],
    count: int,
    same: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    padding = Padding(*pads, same=same)
    sides = [padding.along(a, size[a], kernel[a], stride[a], dilation[a]) for a in (0, 1)]
    if not fits(size, kernel, dilation, sides):
        return

    def stock(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (*sides[1], *sides[0])), w, b, stride, 0, dilation, groups)

    def lean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return lean_ops.conv2d(x, w, b, stride, padding, dilation, groups)

    agree(lean, stock, tensor(count, width, *size), tensor(width, width // groups, *kernel), tensor(width))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.usefixtures("passes")
@settings(max_examples=25, deadline=None)
@given(**geometries)
def test_few_pixels_and_many_filters_agree_with_stock(groups: int, **geometry) -> None:
    convolutions_agree(80, groups, **geometry)


@pytest.mark.usefixtures("passes")
@settings(max_examples=40, deadline=None)
@given(**geometries)
def test_depthwise_convolutions_agree_with_stock(**geometry) -> None:
    convolutions_agree(11, 11, **geometry)


@pytest.mark.usefixtures("passes")
def test_few_pixels_and_many_filters_gradcheck() -> None:
    torch.manual_seed(0)
    inputs = (tensor(1, 32, 3, 2), tensor(32, 32, 3, 3), tensor(32))
    gradchecked(lambda x, w, b: lean_ops.conv2d(x, w, b, 2, Padding(same=True)), *inputs)


@pytest.mark.usefixtures("passes")
def test_depthwise_gradcheck() -> None:
    torch.manual_seed(0)
    inputs = (tensor(2, 9, 6, 5), tensor(9, 1, 5, 5), tensor(9))
    gradchecked(lambda x, w, b: lean_ops.conv2d(x, w, b, 2, 2, groups=9), *inputs)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("frozen_scale", [False, True])
@pytest.mark.parametrize("standardized", [False, True])
def test_a_large_weight_behind_a_frozen_norm_agrees_with_stock(frozen_scale: bool, standardized: bool) -> None:
    torch.manual_seed(0)
    mean, var = tensor(64), tensor(64).abs() + 0.5

    def stock(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = F.conv2d(x, standardize(w) if standardized else w, None, 1, 1, 1, 2)
        return F.relu(F.batch_norm(y, mean, var, gamma, beta, False, 0.0, 1e-3))

    def lean(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        recipe = WeightRecipe(standardize=standardized, norm_eps=1e-3)
        op = Conv2d((3, 3), (1, 1), Padding.symmetric(1, 1), groups=2, out_channels=64, recipe=recipe)
        return F.relu(lean_ops.chain(x, [(op, (w, None, gamma, beta, mean, var))]))

    inputs = [tensor(1, 64, 3, 4), tensor(64, 32, 3, 3), tensor(64), tensor(64)]
    if frozen_scale:
        scale = inputs[2]
        agree(lambda x, w, b: lean(x, w, scale, b), lambda x, w, b: stock(x, w, scale, b), *inputs[:2], inputs[3])
    else:
        agree(lean, stock, *inputs)


def lite_convolution() -> tuple[Conv2d, Tensor, Tensor, Tensor]:
    """conv1 of ProxylessNAS-Mobile's last lite modules at 224 px, its input, weight and a gradient of its output."""
    op = Conv2d((3, 3), (1, 1), Padding.symmetric(1, 1), groups=2, out_channels=192)
    return op, images(1, 192, 4, 4), images(192, 96, 3, 3), images(1, 192, 4, 4)


WEIGHT = 192 * 96 * 9 * 4
GATHERED = 16 * 9 * 96 * 4  # the windows of one group
PIXELS = 192 * 16 * 4


@needs_kernels
def test_a_large_weights_gradient_takes_itself_and_the_windows_of_a_group() -> None:
    op, x, weight, grad = lite_convolution()

    def step() -> object:
        return op.backward(grad, tuple(x.shape), (weight, None), (x,), Needs(False, (True, False)), False)

    assert peak(step) == WEIGHT + GATHERED
    found = op.backward(grad, tuple(x.shape), (weight, None), (x,), Needs(False, (True, False)), False)[1][0]
    assert found is not None
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.untyped_storage().nbytes() == WEIGHT


@needs_kernels
def test_a_large_weight_is_not_laid_out_again_in_either_direction() -> None:
    op, x, weight, grad = lite_convolution()
    assert peak(lambda: op.forward(x, (weight, None), Needs(True, (False, False)), False)) == GATHERED + PIXELS
    needs = Needs(True, (False, False))
    assert peak(lambda: op.backward(grad, tuple(x.shape), (weight, None), (), needs, False)) == GATHERED + PIXELS


@needs_kernels
def test_a_frozen_norms_scale_goes_to_the_smaller_side() -> None:
    op, x, weight, _ = lite_convolution()
    op = dataclasses.replace(op, recipe=WeightRecipe(norm_eps=1e-5))
    tensors = (weight, None, *(torch.rand(192) + 0.5 for _ in range(4)))
    found = peak(lambda: op.forward(x, tensors, Needs(False, (False,) * 6), False))
    assert found <= GATHERED + PIXELS + 6 * 192 * 4


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("kernel", [5, 7])
def test_a_depthwise_weights_gradient_takes_no_copies_of_it(kernel: int) -> None:
    x, grad = images(1, 1152, 7, 7), images(1, 1152, 7, 7)
    half = kernel // 2
    op = Conv2d((kernel, kernel), (1, 1), Padding.symmetric(half, half), groups=1152, out_channels=1152)
    weight = images(1152, 1, kernel, kernel)
    needs = Needs(False, (True, False))
    found = peak(lambda: op.backward(grad, tuple(x.shape), (weight, None), (x,), needs, False))
    bytes_of_weight = 1152 * kernel * kernel * 4
    if _depthwise.KERNELS is not None:
        assert found == bytes_of_weight
    else:
        assert found <= bytes_of_weight + x.numel() * 4 + 8 * 1152 * 4


@pytest.mark.usefixtures("passes")
@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, 3),
    groups=st.sampled_from([1, 2, 3]),
    width=st.integers(1, 9),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    affine=st.tuples(st.booleans(), st.booleans()),
    owned=st.booleans(),
    wanted=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 99),
)
def test_group_norm_agrees_with_stock(count, groups, width, size, affine, owned, wanted, seed) -> None:
    if groups * width * math.prod(size) * count == 0 or width * math.prod(size) < 2:
        return
    torch.manual_seed(seed)
    c = groups * width
    op = GroupNorm(groups, 1e-3)
    x, grad = images(count, c, *size, dtype=torch.float64), images(count, c, *size, dtype=torch.float64)
    gamma, beta = (tensor(c) if there else None for there in affine)
    needs = Needs(wanted[0], (wanted[1] and affine[0], wanted[2] and affine[1]))
    if not needs.any:
        return
    absent = (x, torch.ones(c, dtype=x.dtype), torch.zeros(c, dtype=x.dtype))  # PyTorch fails without gamma
    leaves = [(b if a is None else a).clone().requires_grad_() for a, b in zip((x, gamma, beta), absent, strict=True)]
    y = F.group_norm(leaves[0], groups, leaves[1], leaves[2], 1e-3)
    y.backward(grad)
    ours, kept = op.forward(x.clone() if owned else x, (gamma, beta), needs, owned)
    torch.testing.assert_close(ours, y.detach(), rtol=1e-10, atol=1e-10)
    for mine, recalled in zip(kept, op.recall(x, (gamma, beta), needs), strict=True):
        assert torch.equal(mine, recalled)
    given_grad = grad.clone()
    grad_x, grads = op.backward(given_grad, tuple(x.shape), (gamma, beta), kept, needs, owned)
    assert owned or torch.equal(given_grad, grad)
    for mine, leaf, need in zip((grad_x, *grads), leaves, (needs.x, *needs.tensors), strict=True):
        assert (mine is not None) == need
        if need:
            torch.testing.assert_close(mine, leaf.grad, rtol=1e-9, atol=1e-9)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_passes_of_group_norm_agree(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    op, needs = GroupNorm(6, 1e-5), Needs(True, (True, True))
    x, grad = images(2, 48, 30, 31, dtype=dtype), images(2, 48, 30, 31, dtype=dtype)
    tensors = (torch.randn(48, dtype=dtype), torch.randn(48, dtype=dtype))
    kept = op.forward(x, tensors, needs, False)[1]
    found = []
    for kernels in (group_norm.KERNELS, None):
        monkeypatch.setattr(group_norm, "KERNELS", kernels)
        grad_x, grads = op.backward(grad, tuple(x.shape), tensors, kept, needs, False)
        found.append((grad_x, *grads))
    tolerance = 2e-4 if dtype == torch.float32 else 1e-11
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=tolerance)


@needs_kernels
def test_a_far_away_mean_costs_group_norm_no_digits() -> None:
    torch.manual_seed(0)
    op, needs = GroupNorm(2, 1e-5), Needs(True, (True, True))
    x, grad = images(1, 16, 33, 33) + 300, images(1, 16, 33, 33)
    tensors = (torch.randn(16), torch.randn(16))
    y, kept = op.forward(x, tensors, needs, False)
    grad_x, _ = op.backward(grad, tuple(x.shape), tensors, kept, needs, False)
    leaf = x.double().requires_grad_()
    exact = F.group_norm(leaf, 2, tensors[0].double(), tensors[1].double(), 1e-5)
    exact.backward(grad.double())
    torch.testing.assert_close(y.double(), exact.detach(), rtol=1e-4, atol=1e-4)
    assert leaf.grad is not None
    assert grad_x is not None
    torch.testing.assert_close(grad_x.double(), leaf.grad, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_group_norm_writes_over_what_is_ours() -> None:
    op, x, grad = GroupNorm(6, 1e-5), images(1, 48, 112, 112), images(1, 48, 112, 112)
    tensors = (torch.rand(48), torch.rand(48))
    y, kept = op.forward(x.clone(), tensors, Needs(True, (False, False)), True)
    assert kept[0] is not y
    mine = x.clone()
    assert op.forward(mine, tensors, Needs(False, (False, False)), True)[0] is mine
    assert torch.equal(mine, y)
    found = op.backward(grad, tuple(x.shape), tensors, kept, Needs(True, (False, False)), True)[0]
    assert found is grad


@pytest.mark.usefixtures("passes")
def test_group_norms_gradient_takes_little_beside_its_argument() -> None:
    op, x, grad = GroupNorm(6, 1e-5), images(1, 48, 112, 112), images(1, 48, 112, 112)
    tensors = (torch.rand(48), torch.rand(48))
    kept = op.forward(x, tensors, Needs(True, (False, False)), False)[1]
    found = peak(lambda: op.backward(grad, tuple(x.shape), tensors, kept, Needs(True, (False, False)), True))
    if group_norm.KERNELS is not None:
        assert found == (1 + 2 * 32) * 48 * 4
    else:
        assert found <= 2 * 4 * group_norm._SLICE + 64 * 48 * 4
    assert x.numel() * 4 > 4 * found


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 7), (8, 1, 5, 5), (3, 2, 1, 1)])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_the_standardized_weights_gradient_is_autograds(shape: tuple[int, ...], eps: float) -> None:
    torch.manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
        weight = (tensor(*shape) + 0.3).contiguous(memory_format=layout)
        weight[1] = 0.7  # a filter of equal values
        grad = tensor(*shape)
        leaf = weight.clone().requires_grad_()
        standardize(leaf, eps).backward(grad)
        assert leaf.grad is not None
        leaf.grad[1] = standardized_flat(grad[1], eps)
        mine = grad.clone()
        assert standardize_gradient_(weight, mine, eps) is mine
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-10, atol=1e-10)


def standardized_flat(grad: Tensor, eps: float) -> Tensor:
    """The gradient of a filter of equal values, whose deviation is 0 (autograd's own is rounding over rounding)."""
    return (grad - grad.mean()) / eps


def test_standardization_takes_one_weight_forward_and_none_backward() -> None:
    weight, grad = images(192, 96, 3, 3), images(192, 96, 3, 3)
    assert peak(lambda: standardize(weight)) <= WEIGHT + 4 * 192 * 4
    assert peak(lambda: standardize_gradient_(weight, grad)) <= 10 * 192 * 4


def test_a_trained_standardized_weight_is_gone_before_its_gradient_is_made() -> None:
    op, x, weight, grad = lite_convolution()
    op = dataclasses.replace(op, recipe=WeightRecipe(standardize=True))
    needs = Needs(True, (True, False))
    found = peak(lambda: op.backward(grad, tuple(x.shape), (weight, None), (x,), needs, False))
    assert found <= WEIGHT + 2 * GATHERED + 2 * PIXELS + 10 * 192 * 4


@needs_kernels
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    x, grad = images(2, 48, 40, 40), images(2, 48, 40, 40)
    weight, vectors = images(48, 1, 5, 5), (torch.rand(48), torch.rand(48))
    depthwise = Conv2d((5, 5), (1, 1), Padding.symmetric(2, 2), groups=48, out_channels=48)
    norm = GroupNorm(6, 1e-5)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            needs = Needs(False, (True, False))
            made = depthwise.backward(grad, tuple(x.shape), (weight, None), (x,), needs, False)[1][0]
            y, kept = norm.forward(x, vectors, Needs(True, (True, True)), False)
            grad_x, grads = norm.backward(grad, tuple(x.shape), vectors, kept, Needs(True, (True, True)), False)
            found.append((made, y, *kept, grad_x, *grads))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("name", "norm"), [("tinytl-l+b", "gn"), ("ft-full", "bn")])
def test_the_plan_holds_without_the_compiled_passes_too(monkeypatch: pytest.MonkeyPatch, name: str, norm: str) -> None:
    without_kernels(monkeypatch)
    spec = StepSpec("proxylessnas_mobile", name, norm, resolution=64, batch_size=2, classes=5)  # type: ignore[arg-type]
    model, _ = build_network(spec)
    described = capture_step(model, spec.shape(2), optimizer=adam)
    x, labels = build_batch(spec, torch.channels_last)
    optimizer = adam(model)
    step = training_step(model, x, labels, optimizer, None)
    step()
    measured = measure_step(step, resident_tensors(model, optimizer, x, labels))
    assert described.step_peak_bytes == pytest.approx(measured.step_peak_bytes, rel=5e-3)


@needs_kernels
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_no_step_of_full_training_holds_copies_of_a_depthwise_weight(norm: str) -> None:
    spec = StepSpec("proxylessnas_mobile", "ft-full", norm, batch_size=1)  # type: ignore[arg-type]
    described = capture_step(build_network(spec)[0], spec.shape(1))
    assert max(op.workspace_bytes for op in described.operations) < 500_000
