"""A part of a network run some images at a time, in strips of rows, or again: the same gradients, and less memory."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tinytl.backbones import load
from tinytl.errors import InputError
from tinytl.memory.capture import capture_step
from tinytl.memory.measured import adam, measure_step, resident_tensors, training_step
from tinytl.memory.step import StepSpec, build_batch, build_network
from tinytl.methods import METHODS, TINYTL_LB, Bias, adapt_, method
from tinytl.nn.execution import Execution, execution_of, set_execution_
from tinytl.nn.kept import kept
from tinytl.nn.lean import stages_of
from tinytl.nn.meta import meta_copy
from tinytl.ops import Activation, Conv2d, FrozenBatchNorm, GroupNorm, Padding, SmoothActivation, chain, chain_keeps
from tinytl.ops._weights import WeightRecipe
from tinytl.ops.by_images import by_images
from tinytl.ops.chain import Stage, fuse
from tinytl.ops.strips import in_strips, strips_of

from .observed import observe_kept
from .test_adapt import backward, enliven_, images, small_network
from .test_foreign import BLOCKS, Foreign
from .test_foreign import settle_ as settle

E = Execution
C = 4


# ---------------------------------------------------------------- strips of one chain


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def link(kind: str) -> Stage:
    """One operation that can be cut, from C channels to C, with fresh tensors."""
    if kind == "conv":
        return Conv2d((3, 3), (1, 1), Padding.symmetric(1, 1), out_channels=C), [rand(C, C, 3, 3), rand(C)]
    if kind == "depthwise same":
        return Conv2d((5, 3), (2, 2), Padding(same=True), groups=C, out_channels=C), [rand(C, 1, 5, 3), rand(C)]
    if kind == "dilated":
        return Conv2d((3, 3), (1, 1), Padding(2, 1, 0, 2), (2, 1), out_channels=C), [rand(C, C, 3, 3), None]
    if kind == "rows left out":
        return Conv2d((1, 1), (3, 1), out_channels=C), [rand(C, C, 1, 1), rand(C)]
    if kind == "pointwise norm":
        recipe = WeightRecipe(norm_eps=1e-3)
        tensors = [rand(C, C, 1, 1), rand(C), rand(C), rand(C), rand(C), rand(C).abs() + 0.5]
        return Conv2d((1, 1), out_channels=C, recipe=recipe), tensors
    if kind == "norm":
        return FrozenBatchNorm(1e-3), [rand(C), rand(C), rand(C), rand(C).abs() + 0.5]
    return {"relu6": Activation(hi=6.0), "hard swish": SmoothActivation("hard_swish")}[kind], []


KINDS = ["conv", "depthwise same", "dilated", "rows left out", "pointwise norm", "norm", "relu6", "hard swish"]
TRAINABLE = {0: 0, 2: 2, 4: 2, 6: 4}  # number of an operation's tensors -> how many of them can train


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    size=st.tuples(st.integers(1, 3), st.integers(3, 19), st.integers(3, 8)),
    count=st.sampled_from([2, 3, 4, 99]),
    recompute=st.sampled_from([None, False, True]),
    data=st.data(),
)
def test_a_chain_in_strips_is_the_chain(
    kinds: list[str], size: tuple[int, int, int], count: int, recompute: bool | None, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    stages: list[Stage] = []
    leaves: list[Tensor] = []
    for op, tensors in map(link, kinds):
        for tensor in tensors[: TRAINABLE[len(tensors)]]:
            if tensor is not None and data.draw(st.booleans()):
                leaves.append(tensor.requires_grad_())
        stages.append((op, tensors))
    x = (3 * rand(size[0], C, *size[1:])).contiguous(memory_format=torch.channels_last)
    if data.draw(st.booleans()):
        leaves.append(x.requires_grad_())
    try:
        whole = chain(x, stages, recompute=recompute)
    except RuntimeError:
        return  # smaller than the kernel
    shape = tuple(x.shape)
    cut = strips_of(tuple(op for op, _ in fuse(stages)), shape, count)
    resident = [t for _, tensors in stages for t in tensors if t is not None]
    with in_strips(count):
        seen, y = observe_kept(lambda: chain(x, stages, recompute=recompute), resident)
    assert (cut is not None) == (type(y.grad_fn).__name__ == "_StripsBackward") or not leaves
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
    rules = chain_keeps(shape, x.dtype, fuse(stages), x_needs=x.requires_grad, recompute=recompute, strips=count)
    assert sum(rule.bytes for rule in rules) == seen
    if whole.requires_grad:
        grad = torch.randn_like(whole)
        expected = torch.autograd.grad(whole, leaves, grad)
        for keep in (True, False):
            found = torch.autograd.grad(y, leaves, grad, retain_graph=keep)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_rows_of_strips() -> None:
    """By hand: 3x3 at stride 2 behind 5x5 at stride 1, both padded as usual, over 16 rows."""
    ops = (
        Conv2d((5, 5), (1, 1), Padding.symmetric(2, 2), out_channels=1),
        Conv2d((3, 3), (2, 2), Padding.symmetric(1, 1), out_channels=1),
    )
    strips = strips_of(ops, (1, 1, 16, 16), 4)
    assert strips is not None
    assert [strip.out_rows for strip in strips] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [strip.rows for strip in strips] == [(0, 6), (1, 10), (5, 14), (9, 16)]
    paddings = [[(op.padding.top, op.padding.bottom, op.padding.left) for op in strip.ops] for strip in strips]  # type: ignore[attr-defined]
    assert paddings == [[(2, 0, 2), (1, 0, 1)], [(0, 0, 2), (0, 0, 1)], [(0, 0, 2), (0, 0, 1)], [(0, 2, 2), (0, 0, 1)]]
    assert len(strips_of(ops, (1, 1, 3, 9), 50) or ()) == 2  # no more than the output has rows
    assert strips_of(ops, (1, 1, 1, 9), 4) is None
    assert strips_of(ops, (1, 1, 16, 16), 1) is None
    assert strips_of((*ops, GroupNorm(1, 1e-3)), (1, 1, 16, 16), 4) is None
    assert strips_of((Activation(),), (1, 1, 16, 16), 4) is None  # one alone is done in place
    only_padding = Conv2d((1, 1), (1, 1), Padding.symmetric(3, 3), out_channels=1)
    assert strips_of((only_padding,), (1, 1, 4, 4), 10) is None


# ---------------------------------------------------------------- whole networks


def assert_the_same(
    model: nn.Module, x: Tensor, policies: dict[str, Execution], tolerance: float = 1e-10
) -> tuple[int, int]:
    """Output, gradients, random numbers and evaluation are those without policies; the ledger is what is seen.

    Returns the bytes that are kept without and with the policies.
    """

    def seen() -> int:
        return observe_kept(lambda: model(x), [*model.parameters(), *model.buffers()])[0]

    def run() -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        torch.manual_seed(1)
        gradients = backward(model.train(), x)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        y = model(x).detach()
        with torch.no_grad():
            evaluated = model.eval()(x)
        model.train()
        return y, gradients, state, evaluated

    set_execution_(model, {})
    without, expected = seen(), run()
    before = list(model.state_dict())
    set_execution_(model, policies)
    assert list(model.state_dict()) == before
    found = run()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[3], expected[3], rtol=1e-9, atol=1e-9)
    assert torch.equal(found[2], expected[2])
    assert set(found[1]) == set(expected[1])
    floor = 1e-6 * max(gradient.norm().item() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * (gradient.norm() + floor), name
    rule = kept(model, tuple(x.shape)).total_bytes
    assert rule == seen()
    return without, rule


def mixed(blocks: Sequence[str], stem: str | None = None) -> dict[str, dict[str, Execution]]:
    """Policies of every kind for a network with these blocks."""
    found = {
        "strips": dict.fromkeys(blocks, E(strips=3)),
        "more strips than rows": dict.fromkeys(blocks, E(strips=1000)),
        "images": dict.fromkeys(blocks, E(images=2)),
        "again": dict.fromkeys(blocks, E(recompute=True)),
        "all at once": dict.fromkeys(blocks, E(images=2, strips=2, recompute=True)),
        "mixed": {
            path: [E(images=1), E(strips=4), E(recompute=True), E(), E(1, 2), E(2, 3, True)][i % 6]
            for i, path in enumerate(blocks)
        },
    }
    if stem is not None:
        found["ranges"] = {
            **{path: policy for path, policy in found["mixed"].items() if path not in blocks[:7]},
            f"{stem}:{blocks[1]}": E(images=1, strips=3),
            f"{blocks[2]}:{blocks[4]}": E(recompute=True),
            f"{blocks[5]}:{blocks[6]}": E(strips=2, recompute=True),
            blocks[3]: E(images=2),  # inside a range
        }
    return found


def enlivened(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """In float64, with a lite module's last scale away from its 0, which hides what stands before it."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ".lite." in path and ("norm2" in path or "conv2.norm" in path) and path.endswith(".weight"):
            tensor.data.copy_(torch.linspace(0.5, 1.5, tensor.numel()))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.double().train()


FAST = (("bn", "tinytl-b"), ("bn", "tinytl-l+b"), ("bn", "ft-full"), ("gn", "tinytl-l+b"))


OTHERS = (("gn", "ft-norm+last"), ("bn", "tinytl-l"), ("gn", "ft-last"))


@pytest.mark.parametrize(
    ("norm", "name"), [*FAST, *(pytest.param(norm, name, marks=pytest.mark.slow) for norm, name in OTHERS)]
)
def test_proxylessnas_by_every_method(norm: str, name: str) -> None:
    torch.manual_seed(3)
    model = enliven_(load("proxylessnas_mobile", pretrained=False, num_classes=5, norm=norm).model)  # type: ignore[arg-type]
    adaptation = adapt_(model, METHODS[name], resolution=64)
    enlivened(model, dropout=0.3)
    policies = mixed(adaptation.blocks, "features.stem")["ranges"]
    assert_the_same(model, images(3, 61, torch.float64), policies)


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [
        *itertools.product(["mobilenet_v3_large", "efficientnet_lite0"], ["strips", "mixed"]),
        *(
            pytest.param(backbone, kind, marks=pytest.mark.slow)
            for backbone, kinds in (
                ("mobilenet_v3_large", ["more strips than rows", "again", "images"]),
                ("efficientnet_lite0", ["all at once", "images"]),
                ("resnet50", ["strips", "images", "again", "all at once"]),
            )
            for kind in kinds
        ),
    ],
)
def test_other_networks(backbone: str, kind: str) -> None:
    torch.manual_seed(3)
    model = enliven_(load(backbone, pretrained=False, num_classes=5).model)
    adaptation = adapt_(model, TINYTL_LB, resolution=64)
    enlivened(model)
    without, rule = assert_the_same(model, images(3, 61, torch.float64), mixed(adaptation.blocks)[kind])
    if kind == "images" and backbone != "mobilenet_v3_large":  # whose chains run again, and end where a part does
        assert without <= rule <= 1.01 * without  # bits are rounded up to whole bytes


@pytest.mark.parametrize("kind", ["strips", "images", "again", "all at once", "mixed"])
def test_a_network_by_an_outsider(kind: str) -> None:
    torch.manual_seed(3)
    model = settle(Foreign(dropout=0.5))
    adapt_(model, TINYTL_LB, resolution=32)
    enlivened(model)
    x = images(5, 45, torch.float64)
    assert_the_same(model, x, mixed(BLOCKS)[kind])
    assert_the_same(model, x, {"": E(images=2, strips=2)})
    assert_the_same(model, x, {"": E(recompute=True), BLOCKS[1]: E(strips=3)})


def test_numbers_drawn_inside_a_part_are_drawn_again_alike() -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    enlivened(model, dropout=0.5)
    x = images(5, 32, torch.float64)
    for policies in ({"": E(images=2)}, {"": E(recompute=True)}, {"": E(2, 2, True)}, {"dropout": E(images=2)}):
        assert_the_same(model, x, policies)
    set_execution_(model, {"": E(recompute=True)})
    assert "random state" in {entry.what for entry in kept(model, tuple(x.shape)).entries}
    model.dropout.p = 0.0
    set_execution_(model, {"features": E(recompute=True)})
    assert "random state" not in {entry.what for entry in kept(model, tuple(x.shape)).entries}


def test_what_runs_again_keeps_its_input_and_nothing_else() -> None:
    model = small_network("gn")
    adapt_(model, TINYTL_LB, resolution=32)
    x = images(2)
    set_execution_(model, {"features.block1:features.block3": E(recompute=True)})
    entries = [e for e in kept(model, tuple(x.shape)).entries if e.layer.startswith("features.block")]
    inside = [e for e in entries if e.layer[:15] in ("features.block1", "features.block2", "features.block3")]
    assert [(e.layer, e.what, e.bytes) for e in inside] == [
        ("features.block1:features.block3", "input", 2 * 8 * 16 * 16 * 4)
    ]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_frozen_stays_frozen(name: str) -> None:
    model = small_network()
    adaptation = adapt_(model, method(name), resolution=32)
    enlivened(model).float()
    set_execution_(model, mixed(adaptation.blocks)["mixed"])
    before = {path: parameter.clone() for path, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images(3)), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    for path, parameter in model.named_parameters():
        assert torch.equal(parameter, before[path]) == (path not in adaptation.trained), path


# ---------------------------------------------------------------- memory


def batch_of(spec: StepSpec) -> tuple[Tensor, Tensor]:
    x = torch.randn(spec.shape(spec.batch_size)).contiguous(memory_format=torch.channels_last)
    return x, torch.zeros(spec.batch_size, dtype=torch.int64)


def peak_of(step: Callable[[], object], model: nn.Module) -> int:
    step()
    return measure_step(step, list(model.parameters())).step_peak_bytes


BLOCK1, BLOCK2 = "features.block1", "features.block2"


@pytest.mark.parametrize(
    ("method_name", "batch", "policies", "share"),
    [
        ("tinytl-b", 1, {"features.stem:features.block0": E(strips=4), BLOCK1: E(strips=4), BLOCK2: E(strips=4)}, 0.7),
        ("tinytl-b", 1, {"features.stem:features.block5": E(strips=8)}, 0.55),
        ("tinytl-b", 8, {"features.stem:features.block10": E(images=1)}, 0.4),
        ("tinytl-b", 8, {"features.stem:features.block10": E(images=1, strips=4)}, 0.4),
        ("ft-norm+last", 4, {f"features.block{i}": E(recompute=True) for i in range(20)}, 0.6),
        ("ft-norm+last", 4, {f"features.block{i}": E(images=1, recompute=True) for i in range(20)}, 0.4),
        (
            "ft-norm+last",
            4,
            {
                "features.stem:features.block1": E(images=1, strips=4, recompute=True),
                "features.block2:features.block6": E(images=1, recompute=True),
                "features.block7:features.block19": E(images=1, recompute=True),
            },
            0.2,
        ),
    ],
)
def test_less_is_alive(method_name: str, batch: int, policies: dict[str, Execution], share: float) -> None:
    spec = StepSpec("proxylessnas_mobile", method_name, resolution=160, batch_size=batch, classes=5)
    model, _ = build_network(spec)
    x, labels = batch_of(spec)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()

    whole = peak_of(step, model)
    set_execution_(model, policies)
    assert peak_of(step, model) <= share * whole


def test_less_is_alive_in_evaluation() -> None:
    spec = StepSpec("proxylessnas_mobile", "tinytl-b", resolution=160, batch_size=8, classes=5)
    model, _ = build_network(spec)
    x, _ = batch_of(spec)
    model.eval()

    @torch.no_grad()
    def step() -> None:
        model(x)

    whole = peak_of(step, model)
    set_execution_(model, {"features": E(images=1)})
    assert peak_of(step, model) <= 0.25 * whole
    set_execution_(model, {"features.stem:features.block5": E(strips=8)})
    assert peak_of(step, model) <= 0.6 * whole


def test_in_a_run_of_blocks_one_chain_is_whole_at_a_time() -> None:
    """Group norm: blocks that run again together take little more than each of them alone."""
    spec = StepSpec("proxylessnas_mobile", "tinytl-b", norm="gn", resolution=96, batch_size=4, classes=5)
    model, _ = build_network(spec)
    x, labels = batch_of(spec)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()

    def peak(policies: dict[str, Execution]) -> int:
        set_execution_(model, policies)
        return peak_of(step, model)

    together = peak({"features.block1:features.block4": E(recompute=True)})
    assert together <= 1.1 * peak({})


MIX = {
    "features.stem:features.block1": E(images=1, strips=3),
    "features.block2:features.block4": E(recompute=True),
    "features.block5": E(images=1, recompute=True),
    "features.block6": E(strips=2, recompute=True),
    "features.block7": E(strips=3),
    "features.block8": E(images=1),
}


@pytest.mark.parametrize(
    ("name", "norm", "side"),
    [
        ("tinytl-b", "bn", 87),
        ("tinytl-b", "gn", 64),
        ("tinytl-l+b", "bn", 64),
        ("tinytl-l+b", "gn", 87),
        pytest.param("tinytl-b", "gn", 96, marks=pytest.mark.slow),
        pytest.param("tinytl-l+b", "bn", 96, marks=pytest.mark.slow),
    ],
)
def test_what_is_planned_is_what_is_measured(name: str, norm: str, side: int) -> None:
    spec = StepSpec("proxylessnas_mobile", name, norm, side, batch_size=4, micro_batch=2, classes=5)  # type: ignore[arg-type]
    model, _ = build_network(spec)
    set_execution_(model, MIX)
    described = capture_step(model, spec.shape(4), micro_batch=2, optimizer=adam)
    x, labels = build_batch(spec, torch.channels_last)
    optimizer = adam(model)
    step = training_step(model, x, labels, optimizer, 2)
    step()
    measured = measure_step(step, resident_tensors(model, optimizer, x, labels))
    assert described.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert described.step_peak_bytes == pytest.approx(measured.step_peak_bytes, rel=0.02)


# ---------------------------------------------------------------- the policies themselves


def adapted() -> nn.Module:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    return enlivened(model)


def test_policies_are_set_read_and_taken_away() -> None:
    model = adapted()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    policies = {
        "features": E(images=2),
        "features.stem:features.block0": E(strips=2),
        "features.block2": E(recompute=True),
        "features.block3.lite.conv1": E(images=1),
    }
    set_execution_(model, policies)
    assert execution_of(model) == policies
    for path in ("features", "features.block2", "features.block3.lite.conv1"):
        assert stages_of(model.get_submodule(path)) is None
    set_execution_(model, {"features.block1": E(strips=2), "features.block2": E()})
    assert execution_of(model) == {"features.block1": E(strips=2)}
    set_execution_(model, {})
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before


def test_copies_pickles_and_hooks() -> None:
    model = adapted()
    policies = {"features.stem:features.block0": E(2, 2, True), "features.block2": E(images=2), "": E(strips=2)}
    x = images(3, 32, torch.float64)
    expected = backward(model, x)
    set_execution_(model, policies)
    called: list[str] = []
    model.get_submodule("features.block2").register_forward_hook(lambda m, a, y: called.append(str(y.shape[0])))
    other = copy.deepcopy(model)
    del called[:]
    set_execution_(model, {})
    assert execution_of(other) == policies
    other.get_parameter("classifier.weight").data.zero_()  # a copy runs the copy
    assert not other(x).std(0).any()
    assert model(x).std(0).all()
    assert called == ["3", "3"]
    set_execution_(model, policies)
    model.get_submodule("features.block2")._forward_hooks.clear()
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    again = pickle.load(buffer)
    assert execution_of(again) == policies
    found = backward(again, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)
    ghost = meta_copy(again)
    assert execution_of(ghost) == policies
    assert ghost(torch.empty(3, 3, 32, 32, device="meta", dtype=torch.float64)).shape == (3, 5)
    again.load_state_dict(model.state_dict())


def test_hooks_inside_a_part_run() -> None:
    model = adapted()
    x = images(3, 32, torch.float64)
    called: list[int] = []
    model.get_submodule("features.block2.block.body.project").register_forward_hook(
        lambda module, args, y: called.append(len(y))
    )
    set_execution_(model, {"features.block2": E(images=2)})
    model(x).sum().backward()
    assert called == [2, 1]


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = adapted()
    set_execution_(model, {"features.block1": E(strips=2)})
    for policies, message in (
        ({"features.block99": E(strips=2)}, "no module 'features.block99'"),
        ({"features.block0:features.block99": E(strips=2)}, "no module 'features.block99'"),
        ({"features.block2:features.block0": E(strips=2)}, "behind the last"),
        ({"features.block0:classifier": E(strips=2)}, "two neighbours"),
        ({"features:classifier": E(strips=2)}, "two neighbours"),
        ({"features.stem:features.block1": E(strips=2), "features.block1:features.block2": E(images=1)}, "overlap"),
        ({"features.block1.lite.conv1.norm": E(images=1)}, "no forward"),
    ):
        with pytest.raises(InputError, match=message):
            set_execution_(model, policies)
        assert execution_of(model) == {"features.block1": E(strips=2)}
    for bad in ({"images": 0}, {"strips": 0}, {"images": 1.5}, {"strips": True}):
        with pytest.raises(InputError, match="expected a whole number of 1 or more"):
            Execution(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="normalizes by the batch"):
        set_execution_(small_network(), {"features.block1": E(images=1)})


def test_a_part_that_takes_or_makes_no_single_tensor_says_so() -> None:
    model = settle(Foreign())
    adapt_(model, Bias(), resolution=32)
    x = images(3, 32, torch.float64)
    expected = model(x)
    for policy in (E(images=1), E(recompute=True)):
        set_execution_(model, {"mix": policy})  # takes and gives a dictionary
        with pytest.raises(InputError, match=r"mix \(SplitBlock\): is not called with one tensor"):
            model(x)
    set_execution_(model, {"mix": E(strips=2)})
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(InputError, match="one row an image"):
        by_images(lambda t: t.sum(), x, [], 2, name="somewhere")


def test_the_graph_can_be_kept_and_is_used_up_otherwise() -> None:
    model = adapted()
    x = images(3, 32, torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    for policies in ({"features": E(images=2)}, {"features": E(2, 2, True)}, {"features": E(strips=2, recompute=True)}):
        set_execution_(model, policies)
        y = model(x)
        grad = torch.randn_like(y)
        first = torch.autograd.grad(y, trained, grad, retain_graph=True)
        second = torch.autograd.grad(y, trained, grad)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, trained, grad)


def test_gradients_of_the_input_arrive() -> None:
    model = adapted()
    x = images(3, 32, torch.float64)
    found = []
    for policies in ({}, {"features": E(images=2)}, {"features": E(2, 3, True)}, {"features.block1": E(strips=2)}):
        set_execution_(model, policies)
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        torch.manual_seed(0)
        model(leaf).mul(torch.randn(3, 5)).sum().backward()
        found.append(leaf.grad)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)
    set_execution_(model, {"features.stem.norm": E(images=2), "features.block1.block.expand.norm": E(recompute=True)})
    leaf = x.clone().requires_grad_()  # parts that do nothing at all
    torch.manual_seed(0)
    model(leaf).mul(torch.randn(3, 5)).sum().backward()
    torch.testing.assert_close(leaf.grad, found[0], rtol=1e-9, atol=1e-12)


def test_two_parameters_with_one_gradient_tensor_are_summed_apart() -> None:
    a, b = rand(C).requires_grad_(), rand(C).requires_grad_()
    x, grad = rand(5, C).requires_grad_(), rand(5, C)

    def run(t: Tensor) -> Tensor:
        return t * (a + b)

    leaves = (x, a, b)
    expected = torch.autograd.grad(run(x), leaves, grad)
    for recompute in (False, True):
        y = by_images(run, x, [a, b], 2, recompute=recompute)
        torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), expected)
    same = by_images(lambda t: t, x, [], 2)
    torch.testing.assert_close(torch.autograd.grad(same, x, grad)[0], grad)
    unused = by_images(lambda t: t * a, x, [a, b], 2)
    assert torch.autograd.grad(unused, leaves, grad, allow_unused=True)[2] is None


def test_in_a_lower_precision() -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    enlivened(model).float()
    x, found = images(4), []
    for policies in ({}, {"features.block1": E(2, 2, True), "features.block2:features.block3": E(recompute=True)}):
        set_execution_(model, policies)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        model.zero_grad()
        torch.manual_seed(0)
        (y.float() * torch.randn(y.shape)).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient is not None
        assert (found[1][name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-3, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_inside_torch_compile() -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    enlivened(model).float()
    x = images(3)
    expected = backward(model, x)
    set_execution_(model, {"features.stem:features.block0": E(strips=2), "features.block1": E(2, 2, True)})
    found = backward(torch.compile(model, backend="aot_eager"), x)  # type: ignore[arg-type]
    for name, gradient in expected.items():
        torch.testing.assert_close(found["_orig_mod." + name], gradient, rtol=1e-4, atol=1e-5)
