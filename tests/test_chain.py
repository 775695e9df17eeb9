"""A chain of lean operations is the composition of stock ones, owns only what it made, and behaves as any function."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinytl.methods import TINYTL_LB, Bias, adapt_
from tinytl.nn.lean import LeanSequential, NormStatistics
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
)
from tinytl.ops import UpsampleBilinear as Upsample
from tinytl.ops import functional as lean_ops
from tinytl.ops._op import Op
from tinytl.ops._weights import WeightRecipe
from tinytl.ops.chain import Stage, chain, chain_keeps, fuse

from .test_adapt import images, small_network

C = 4


@dataclass
class Link:
    """One operation, its tensors, and the same thing in stock PyTorch."""

    op: Op
    tensors: list[Tensor | None]
    stock: Callable[..., Tensor]
    trainable: list[int] = field(default_factory=list)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def link(kind: str) -> Link:
    """A link from (N, C, H, W) to (N, C, H', W')."""
    if kind == "conv":
        op = Conv2d((3, 3), (1, 1), Padding.symmetric(1, 1), out_channels=C)
        return Link(op, [rand(C, C, 3, 3), rand(C)], lambda x, w, b: F.conv2d(x, w, b, 1, 1), [0, 1])
    if kind == "depthwise same":
        op = Conv2d((3, 3), (2, 2), Padding(same=True), groups=C, out_channels=C)

        def same(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            sides = [op.padding.along(a, x.shape[2 + a], 3, 2, 1) for a in (0, 1)]
            return F.conv2d(F.pad(x, (*sides[1], *sides[0])), w, b, 2, 0, 1, C)

        return Link(op, [rand(C, 1, 3, 3), rand(C)], same, [0, 1])
    if kind == "pointwise norm":
        op = Conv2d((1, 1), out_channels=C, recipe=WeightRecipe(norm_eps=1e-3))

        def normed(x: Tensor, w: Tensor, b: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return F.batch_norm(F.conv2d(x, w, b), mean, var, gamma, beta, False, 0.0, 1e-3)

        tensors: list[Tensor | None] = [rand(C, C, 1, 1), rand(C), rand(C), rand(C), rand(C), rand(C).abs() + 0.5]
        return Link(op, tensors, normed, [0, 1, 2, 3])
    if kind == "batch norm":
        tensors = [rand(C), rand(C), rand(C), rand(C).abs() + 0.5]
        return Link(
            FrozenBatchNorm(1e-3),
            tensors,
            lambda x, g, b, m, v: F.batch_norm(x, m, v, g, b, False, 0.0, 1e-3),
            [0, 1],
        )
    if kind == "group norm":
        return Link(GroupNorm(2, 1e-3), [rand(C), rand(C)], lambda x, g, b: F.group_norm(x, 2, g, b, 1e-3), [0, 1])
    if kind == "squeeze excite":

        def excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
            squeezed = F.relu(F.linear(x.mean((2, 3)), w1, b1))
            return x * F.hardsigmoid(F.linear(squeezed, w2, b2))[:, :, None, None]

        op = SqueezeExcite("relu", "hard_sigmoid")
        return Link(op, [rand(2, C), rand(2), rand(C, 2), rand(C)], excite, [0, 1, 2, 3])
    plain: dict[str, tuple[Op, Callable[[Tensor], Tensor]]] = {
        "relu": (Activation(), F.relu),
        "relu6": (Activation(hi=6.0), F.relu6),
        "leaky": (Activation(slope=0.2), lambda x: F.leaky_relu(x, 0.2)),
        "pool": (AvgPool2d((2, 2), (2, 2), ceil_mode=True), lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True)),
        "hard swish": (SmoothActivation("hard_swish"), F.hardswish),
        "gelu": (SmoothActivation("gelu"), F.gelu),
        "max": (MaxPool2d((3, 3), (2, 2), (1, 1)), lambda x: F.max_pool2d(x, 3, 2, 1)),
        "to a size": (AdaptiveAvgPool2d((3, 2)), lambda x: F.adaptive_avg_pool2d(x, (3, 2))),
        "up": (Upsample((5, 6)), lambda x: F.interpolate(x, (5, 6), mode="bilinear", align_corners=False)),
        "mean": (GlobalMean(keep_dims=True), lambda x: x.mean((2, 3), keepdim=True)),
    }
    return Link(plain[kind][0], [], plain[kind][1])


KINDS = ["conv", "depthwise same", "pointwise norm", "batch norm", "group norm"]
KINDS += ["relu", "relu6", "leaky", "pool", "up", "mean"]
KINDS += ["hard swish", "gelu", "max", "to a size", "squeeze excite"]


def stages(links: list[Link]) -> list[Stage]:
    return [(part.op, part.tensors) for part in links]


def compose(links: list[Link], x: Tensor) -> Tensor:
    for part in links:
        x = part.stock(x, *part.tensors)
    return x


def set_needs(links: list[Link], x: Tensor, needs: tuple[bool, ...]) -> tuple[list[Link], Tensor, list[Tensor]]:
    """Fresh leaves with requires_grad as said: first x, then every trainable tensor in order."""
    flags = iter(needs)
    x = x.detach().clone().requires_grad_(next(flags))
    leaves, fresh = [x], []
    for part in links:
        tensors = [None if t is None else t.detach().clone() for t in part.tensors]
        for index in part.trainable:
            leaf = tensors[index]
            assert leaf is not None
            leaves.append(leaf.requires_grad_(next(flags)))
        fresh.append(Link(part.op, tensors, part.stock, part.trainable))
    return fresh, x, leaves


def compare(kinds: list[str], needs: tuple[bool, ...], x: Tensor, recompute: bool | None) -> None:
    links = [link(kind) for kind in kinds]
    ours, a, our_leaves = set_needs(links, x, needs)
    theirs, b, their_leaves = set_needs(links, x, needs)
    y, reference = chain(a, stages(ours), recompute=recompute), compose(theirs, b)
    torch.testing.assert_close(y, reference, rtol=1e-10, atol=1e-10)
    assert torch.equal(a.detach(), x), "forward overwrote its input"
    assert y.requires_grad == reference.requires_grad == any(needs)
    if not any(needs):
        return
    upstream = torch.randn_like(reference).contiguous(memory_format=torch.channels_last)
    before = upstream.clone()
    for _ in range(2):  # twice: backward must leave what was kept as it was
        y.backward(upstream, retain_graph=True)
        reference.backward(upstream, retain_graph=True)
    assert torch.equal(upstream, before), "backward overwrote a gradient that is not its own"
    for mine, other, need in zip(our_leaves, their_leaves, needs, strict=True):
        assert (mine.grad is not None) == need
        if need:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-9)


@settings(max_examples=120, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    recompute=st.sampled_from([None, False, True]),
    data=st.data(),
)
def test_random_chains_agree_with_stock(
    kinds: list[str], size: tuple[int, int], recompute: bool | None, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    count = 1 + sum(len(link(kind).trainable) for kind in kinds)
    needs = tuple(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    compare(kinds, needs, rand(2, C, *size) * 3, recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_subset_of_needs(recompute: bool) -> None:
    kinds = ["conv", "relu6", "batch norm", "pool", "group norm"]
    for needs in itertools.product((False, True), repeat=7):
        compare(kinds, needs, rand(2, C, 5, 6), recompute)


def layouts() -> dict[str, Tensor]:
    return {
        "contiguous": rand(2, C, 6, 5),
        "channels last": rand(2, C, 6, 5).contiguous(memory_format=torch.channels_last),
        "expanded batch": rand(1, C, 6, 5).expand(3, C, 6, 5),
        "expanded channels": rand(2, 1, 6, 5).expand(2, C, 6, 5),
        "strided": rand(2, 2 * C, 12, 5)[:, ::2, ::2],
        "transposed": rand(2, C, 5, 6).transpose(2, 3),
        "one pixel": rand(3, C, 1, 1),
    }


@pytest.mark.parametrize("name", sorted(layouts()))
@pytest.mark.parametrize("kinds", [["relu"], ["conv", "relu"], ["batch norm", "leaky"], ["group norm", "conv"]])
def test_any_layout_of_the_input(name: str, kinds: list[str]) -> None:
    x = layouts()[name]
    links = [link(kind) for kind in kinds]
    base = x.detach().clone()
    ours, theirs = x.detach().requires_grad_(), base.clone().requires_grad_()
    y, reference = chain(ours, stages(links)), compose(links, theirs)
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(ours.detach(), base, rtol=0, atol=0)
    upstream = torch.randn_like(reference)[:1].expand_as(reference)  # an expanded gradient, as sum() makes them
    y.backward(upstream)
    reference.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("kinds", [["conv", "relu6"], ["group norm"], ["batch norm", "relu"], ["pool", "up"], ["mean"]])
def test_a_batch_of_none(kinds: list[str]) -> None:
    links = [link(kind) for kind in kinds]
    ours, a, leaves = set_needs(links, rand(0, C, 6, 5), (True,) * (1 + sum(len(part.trainable) for part in links)))
    y = chain(a, stages(ours))
    assert y.shape == compose(links, rand(0, C, 6, 5)).shape
    y.backward(torch.randn_like(y))
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_no_operation_at_all_is_the_identity() -> None:
    x = rand(2, C, 3, 3).requires_grad_()
    assert chain(x, []) is x


def test_two_branches_may_share_a_gradient() -> None:
    """Residual add and two consumers: autograd hands the same gradient tensor to both."""
    first, second = [link("conv"), link("relu6")], [link("pointwise norm"), link("leaky")]

    def network(run: Callable[[list[Link], Tensor], Tensor], x: Tensor) -> Tensor:
        a = run(first, x)
        b = run(second, a)
        return (a + b) + run([link_relu], a + b) * run([link_relu], x)

    link_relu = link("relu")
    x = rand(2, C, 5, 6).contiguous(memory_format=torch.channels_last)
    results = []
    for run in (lambda links, t: chain(t, stages(links)), compose):
        leaf = x.clone().requires_grad_()
        out = network(run, leaf)
        torch.manual_seed(3)
        (out * torch.randn_like(out)).sum().backward()
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def test_the_sum_in_place_gives_both_summands_their_gradient() -> None:
    model = small_network().double()
    adapt_(model, Bias(), resolution=32)
    block = next(module for module in model.modules() if type(module).__name__ == "LeanResidual")
    width = block.body[-1][0].weight.shape[0]  # type: ignore[index,union-attr]
    x = rand(2, width, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    for tensor in (x, x * 1.0):  # a leaf, and a tensor of the graph
        before = tensor.detach().clone()
        y = block(tensor)
        upstream = torch.randn_like(y)
        kept = upstream.clone()
        (grad,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        assert torch.equal(tensor.detach(), before)
        assert torch.equal(upstream, kept)
        (alone,) = torch.autograd.grad(block.body(tensor), x, upstream)  # type: ignore[operator]
        torch.testing.assert_close(grad, upstream + alone)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 3, 6, 5)])
def test_linear_of_any_rank_with_an_activation(shape: tuple[int, ...]) -> None:
    weight, bias, x = rand(4, 5).requires_grad_(), rand(4).requires_grad_(), rand(*shape).requires_grad_()
    y = chain(x, [(Linear(4), (weight, bias)), (Activation(), ())])
    reference = F.relu(F.linear(x, weight, bias))
    torch.testing.assert_close(y, reference)
    upstream = torch.randn_like(reference)
    for mine, other in zip(
        torch.autograd.grad(y, (x, weight, bias), upstream),
        torch.autograd.grad(reference, (x, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(6, C), (2, C, 7), (2, C, 3, 5), (2, C, 2, 3, 2)])
def test_frozen_batch_norm_of_any_rank(shape: tuple[int, ...]) -> None:
    x, gamma, beta = rand(*shape).requires_grad_(), rand(C).requires_grad_(), rand(C).requires_grad_()
    mean, var = rand(C), rand(C).abs() + 0.5
    y = lean_ops.frozen_batch_norm(x, mean, var, gamma, beta, 1e-3)
    reference = F.batch_norm(x, mean, var, gamma, beta, False, 0.0, 1e-3)
    upstream = torch.randn_like(reference)
    for mine, other in zip(
        torch.autograd.grad(y, (x, gamma, beta), upstream),
        torch.autograd.grad(reference, (x, gamma, beta), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_activations_of_infinities_and_scalars(name: str, dtype: torch.dtype) -> None:
    for x in (torch.tensor([-math.inf, -1.0, 2.0, math.inf, -math.inf], dtype=dtype), torch.tensor(-2.0, dtype=dtype)):
        assert torch.equal(getattr(lean_ops, name)(x), getattr(F, name)(x))


# ---------------------------------------------------------------- modes of PyTorch


def test_autocast_is_close_to_stock_and_trains() -> None:
    stock = small_network().eval()
    lean = copy.deepcopy(stock)
    adaptation = adapt_(lean, TINYTL_LB, resolution=32)
    adapt_(stock, TINYTL_LB, lean=False, resolution=32)
    x, grads = images(4), []
    for model in (lean.eval(), stock.eval()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        torch.manual_seed(1)
        (y.float() * torch.randn(y.shape)).sum().backward()
        grads.append((y.float(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (y, ours), (reference, theirs) = grads
    assert (y - reference).norm() <= 0.03 * reference.norm()
    for name, grad in ours.items():
        other = theirs[adaptation.origins.get(name, name)]
        assert grad is not None
        assert other is not None
        assert grad.dtype == torch.float32
        if other.norm() > 1e-3:
            assert (grad - other).norm() <= 0.2 * other.norm(), name


def test_autocast_leaves_float64_alone_as_stock_does() -> None:
    x, w = rand(2, C, 5, 5), rand(C, C, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lean_ops.conv2d(x, w).dtype == F.conv2d(x, w).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert lean_ops.conv2d(x.float(), w.float()).dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], torch.no_grad]) -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    x = images(2)
    expected = model.eval()(x)
    with mode():
        y = model(x)
        model.train()(x)  # dropout too
    assert not y.requires_grad
    torch.testing.assert_close(y, expected.detach())
    inferred = torch.inference_mode()(lambda: x * 1.0)()
    model.train()(inferred).square().sum().backward()  # an inference tensor as input of a training step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_compiled_model_gives_the_same_loss_and_gradients(norm: str) -> None:
    model = small_network(norm)
    model.dropout.p = 0.0
    adapt_(model, TINYTL_LB, resolution=32)
    x, labels = images(2), torch.tensor([1, 3])
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = F.cross_entropy(run(x), labels)
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0], found[1])
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_an_adapted_block(use_reentrant: bool) -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    x, found = images(2), []
    for wrap in (False, True):
        model.zero_grad()
        y = model.features[0](x)
        y = y + 0 * model.classifier.bias.sum()
        for block in list(model.features)[1:]:
            y = checkpoint(block, y, use_reentrant=use_reentrant) if wrap else block(y)
        torch.manual_seed(2)
        (y * torch.randn_like(y)).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1])


def test_a_gradient_of_a_gradient_is_refused() -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    x = images(2).requires_grad_()
    (grad,) = torch.autograd.grad(model.eval()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_deepcopy_state_dict_and_pickle_keep_the_network() -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    x = images(2)
    expected = model.eval()(x)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert {n: p.requires_grad for n, p in other.named_parameters()} == {
            n: p.requires_grad for n, p in model.named_parameters()
        }
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(x), expected), "a deep copy shares tensors"
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)


def test_training_mode_round_trip_leaves_batch_norm_frozen() -> None:
    for lean in (True, False):
        model = small_network()
        model.dropout.p = 0.0
        adapt_(model, TINYTL_LB, lean=lean, resolution=32)
        x = images(3)
        expected, state = model.eval()(x), copy.deepcopy(model.state_dict())
        assert torch.equal(model.train()(x), expected)
        assert torch.equal(model.eval().train()(x), expected)
        torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_hooks_on_lean_modules_run_and_change_nothing() -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    x = images(2)
    model.eval()
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    layers = {name: module for name, module in model.named_modules() if name and not isinstance(module, NormStatistics)}
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda m, a, o, name=name: called.append(name)) for name, module in layers.items()
    ]
    model(x).square().sum().backward()
    assert set(called) == set(layers)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    for handle in handles:
        handle.remove()
    called.clear()
    model(x)
    assert not called
    seen: list[Tensor] = []
    assert isinstance(model.features, LeanSequential)
    conv = model.features.get_submodule("head.conv")
    conv.register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
    model(x).square().sum().backward()
    assert len(seen) == 1


def test_fusing_keeps_the_rule_of_the_whole() -> None:
    links = [link("conv"), link("relu"), link("relu6"), link("pool"), link("leaky")]
    fused = fuse(stages(links))
    assert [type(op).__name__ for op, _ in fused] == ["Conv2d", "Activation", "AvgPool2d", "Activation"]
    assert chain_keeps((2, C, 6, 6), torch.float32, fused, x_needs=False) == []
    with_needs = chain_keeps((2, C, 6, 6), torch.float32, fused, x_needs=True)
    assert [entry.bytes for entry in with_needs] == [2 * C * 36 // 8, 2 * C * 36 // 8, 2 * C * 9 // 8]


def test_it_is_a_module_of_pytorch() -> None:
    """Any optimizer's parameters() and modules() see the adapted network."""
    model = small_network()
    adaptation = adapt_(model, TINYTL_LB, resolution=32)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adaptation.trained)
    assert isinstance(model, nn.Module)
    assert set(adaptation.delta_keys) <= set(model.state_dict())
