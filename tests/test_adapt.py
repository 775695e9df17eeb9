"""`adapt_` on small networks: nothing changes but what trains, gradients are stock's, and refusals change nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.backbones._inverted_residual import BlockSpec, InvertedResidualNet
from tinytl.errors import InputError, UnsupportedLayerError
from tinytl.methods import METHODS, TINYTL_LB, Adaptation, Bias, Full, LastBlocks, Method, Norm, adapt_, method
from tinytl.nn.lean import ImageDropout, LeanConv2d, LeanModule
from tinytl.nn.lite_residual import LiteBlock, insert_lite_blocks_

SPECS = (
    BlockSpec(8, 8, 3, 1, 1),
    BlockSpec(8, 16, 3, 2, 2),
    BlockSpec(16, 16, 5, 1, 2),
    BlockSpec(16, 24, 3, 2, 2),
)


def enliven_(model: nn.Module) -> nn.Module:
    """Statistics and affine values that are not the identity, so that a mistake in folding shows."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand_like(module.weight) < 0.2, -1.0, 1.0))
                module.bias.normal_(0.0, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.3, 2.0)
    return model


def small_network(norm: str = "bn", same: bool = False, lite: bool = False, seed: int = 0) -> InvertedResidualNet:
    torch.manual_seed(seed)
    model = InvertedResidualNet(SPECS, head_channels=32, num_classes=5, norm=norm, same=same)  # type: ignore[arg-type]
    if lite:
        insert_lite_blocks_(model, model.block_paths[1:], norm=norm)  # type: ignore[arg-type]
    enliven_(model)
    return model


def images(count: int, side: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7)).to(dtype)


VARIANTS = {"bn": ("bn", False, False), "gn": ("gn", False, False), "same": ("bn", True, False)}
VARIANTS |= {"bn lite": ("bn", False, True), "gn lite": ("gn", False, True)}


def expected_trained(name: str, last: int, stock: nn.Module) -> set[str]:
    """What must train, by the names of the network before lowering. Written from the paper, not from the code."""
    found = set()
    blocks = [f"features.block{i}." for i in range(len(SPECS))]
    tail = (*blocks[len(SPECS) - last :], "features.head.") if last else ()
    for path, _ in stock.named_parameters():
        layer, _, kind = path.rpartition(".")
        lite = ".lite." in path
        norm = "norm" in layer.rpartition(".")[2]
        trains = path.startswith("classifier.") or path.startswith(tail)
        trains |= name == "ft-full"
        trains |= name == "ft-norm+last" and norm
        trains |= name in ("tinytl-b", "tinytl-l+b") and kind == "bias"
        trains |= name in ("tinytl-l", "tinytl-l+b") and lite
        if name == "tinytl-l+b" and path.endswith(".lite.norm2.bias"):
            trains = False
        if trains:
            found.add(path)
    return found


def backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(x)
    generator = torch.Generator().manual_seed(11)
    y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(lean: dict[str, Tensor], stock: dict[str, Tensor], adaptation: Adaptation) -> None:
    """Every trained tensor of stock is there under the name that it came from, to 1e-9 of its norm."""
    assert {adaptation.origins.get(name, name) for name in lean} == set(stock)
    floor = 1e-9 * max(g.norm().item() for g in stock.values())
    for name, grad in lean.items():
        other = stock[adaptation.origins.get(name, name)]
        assert (grad - other).norm() <= 1e-9 * other.norm() + 1e-4 * floor, name


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_output_trained_set_and_gradients(variant: str, name: str, last: int) -> None:
    base = small_network(*VARIANTS[variant]).double().eval()
    x = images(2, 33, torch.float64)
    before = base(x).detach()
    lean, stock = copy.deepcopy(base), copy.deepcopy(base)
    chosen = method(name, last_blocks=last)
    adaptation = adapt_(lean, chosen, resolution=32)
    adapt_(stock, chosen, lean=False, resolution=32)
    for model in (lean, stock):
        assert not model.training
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    expected = expected_trained(name, last, stock)
    assert {n for n, p in stock.named_parameters() if p.requires_grad} == expected
    assert {adaptation.origins.get(n, n) for n in adaptation.trained} == expected
    assert len(adaptation.trained) == len(expected)
    assert set(adaptation.trained) | set(adaptation.frozen) == {n for n, _ in lean.named_parameters()}
    # A fresh lite module's last scale is 0, which hides what stands before it: give it a value.
    for model in (lean, stock):
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if (
                adaptation.inserted
                and ".lite." in path
                and ("norm2" in path or "conv2.norm" in path)
                and path.endswith(".weight")
            ):
                tensor.data.copy_(torch.linspace(0.5, 1.5, tensor.numel()))
    torch.testing.assert_close(lean(x), stock(x), rtol=1e-10, atol=1e-10)
    assert_same_gradients(backward(lean, x), backward(stock, x), adaptation)


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_frozen_stays_frozen_and_trained_changes(norm: str, name: str, last: int) -> None:
    model = small_network(norm)
    adaptation = adapt_(model, method(name, last_blocks=last), resolution=32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    # An optimizer with weight decay over everything: what has no gradient must stay all the same.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    labels = torch.tensor([0, 1, 2, 3])
    for step in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(images(4) + step), labels).backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        if key in adaptation.trained:
            assert not torch.equal(value, before[key]), f"{key} did not train"
        else:
            assert torch.equal(value, before[key]), f"{key} changed"
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= set(adaptation.delta_keys)


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_micro_batches_take_the_same_step_with_dropout(norm: str) -> None:
    model = small_network(norm).double()
    model.dropout.p = 0.5
    adapt_(model, method("tinytl-l+b", last_blocks=1), resolution=32)
    model.train()
    x, labels = images(6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    found = []
    for size in (6, 4, 2, 1):
        torch.manual_seed(5)
        model.zero_grad()
        for part, wanted in zip(x.split(size), labels.split(size), strict=True):
            (F.cross_entropy(model(part), wanted, reduction="sum") / 6).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)
    model.zero_grad()
    torch.manual_seed(6)
    F.cross_entropy(model(x), labels).backward()
    assert any(not torch.allclose(p.grad, found[0][n]) for n, p in model.named_parameters() if p.grad is not None)


def test_image_dropout_has_the_rate_and_scale_of_dropout() -> None:
    x = torch.ones(8, 4000, requires_grad=True)
    y = ImageDropout(0.25)(x)
    assert y.detach().unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs((y == 0).float().mean().item() - 0.25) < 0.02
    assert not ImageDropout(1.0)(x).any()
    assert ImageDropout(0.0)(x) is x
    assert ImageDropout(0.5).eval()(x) is x
    assert not torch.equal(y[0], y[1])


def test_the_same_seed_inserts_the_same_and_leaves_the_generators_alone() -> None:
    state = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        model = small_network()
        torch.set_rng_state(state)
        adapt_(model, TINYTL_LB, seed=seed, resolution=32)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(model.get_parameter("features.block1.lite.conv1.weight").detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_mode_dtype_and_tensors_are_kept() -> None:
    model = small_network().double().eval()
    model.features[2].train()
    modes = {name: module.training for name, module in model.named_modules()}
    weight = model.classifier.weight
    adapt_(model, TINYTL_LB, resolution=32)
    assert model.classifier.weight is weight
    assert all(t.dtype == torch.float64 for t in model.state_dict().values())
    for name, module in model.named_modules():
        if name in modes:
            assert module.training == modes[name], name


def test_what_is_reported() -> None:
    model = small_network()
    base = copy.deepcopy(model)
    adaptation = adapt_(model, TINYTL_LB, resolution=64)
    assert adaptation.inserted == tuple(f"features.block{i}.lite" for i in (1, 2, 3))
    assert adaptation.resolution == 64
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adaptation.trained_elements == trained
    assert adaptation.trained_elements + adaptation.frozen_elements == sum(p.numel() for p in model.parameters())
    norms = sum(type(m) is nn.BatchNorm2d for m in base.modules())
    assert len(adaptation.folded) == norms + 2 * len(adaptation.inserted)
    lines = dict(adaptation.rows())
    assert f"{trained:,}" in lines["trained"]
    assert "64 px" in str(adaptation)
    stock = adapt_(base, TINYTL_LB, resolution=64, lean=False)
    assert stock.base_hash == adaptation.base_hash
    assert stock.kept_bytes_per_image is None
    assert "not stated" in str(stock)


# ---------------------------------------------------------------- networks by outsiders


class Outsider(nn.Module):
    """Written by somebody who has never seen this package."""

    class Shortcut(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding="same", dilation=2)
            self.bn2 = nn.BatchNorm2d(channels, affine=False)
            self.shortcut = nn.Sequential()

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += self.shortcut(x)
            return F.relu(out)

    def __init__(self) -> None:
        super().__init__()
        act = nn.LeakyReLU(0.1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Dropout(0.1), nn.Linear(7, 3))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), act, nn.AvgPool2d(2), act)
        self.blocks = nn.ModuleList([self.Shortcut(8), self.Shortcut(8)])
        self.last = nn.Sequential(nn.Conv2d(8, 12, 1), nn.GroupNorm(3, 12), act, nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


PATHS = ("blocks.0", "blocks.1")


def outsider() -> nn.Module:
    torch.manual_seed(4)
    model = Outsider()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return model


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_network_by_an_outsider(name: str) -> None:
    base = outsider().double().eval()
    x = images(2, 24, torch.float64)
    before = base(x).detach()
    lean, stock = copy.deepcopy(base), copy.deepcopy(base)
    options = {"blocks": PATHS, "classifier": "head", "resolution": 24}
    adaptation = adapt_(lean, METHODS[name], **options)  # type: ignore[arg-type]
    adapt_(stock, METHODS[name], lean=False, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(lean(x), before, rtol=1e-5, atol=1e-5)
    trained = {n for n, p in stock.named_parameters() if p.requires_grad}
    assert {adaptation.origins.get(n, n) for n in adaptation.trained} == trained
    assert_same_gradients(backward(lean, x), backward(stock, x), adaptation)


def test_a_bias_of_its_own_before_a_frozen_norm_trains_as_itself() -> None:
    """Two biases in a row both train: folding them into one would take another step than stock."""

    class Net(nn.Module):
        def __init__(self, affine: bool) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU())
            self.classifier = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.body(x).mean((2, 3)))

    for affine in (True, False):
        lean = Net(affine).double()
        stock = copy.deepcopy(lean)
        adaptation = adapt_(lean, Method((Bias(),)), resolution=8)
        adapt_(stock, Method((Bias(),)), resolution=8, lean=False)
        x = images(2, 8, torch.float64)
        grads = backward(stock, x)
        assert "body.0.bias" in grads
        assert_same_gradients(backward(lean, x), grads, adaptation)
        assert all(name in dict(stock.named_parameters()) or "running" in name or "num_batches" in name
                   for name in adaptation.origins.values())  # fmt: skip


def test_a_module_used_twice_stays_one_module_in_both_places() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act, norm = nn.ReLU6(), nn.BatchNorm2d(4)
            conv = nn.Conv2d(4, 4, 3, padding=1)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), act, conv, norm, act, conv, act, norm)
            self.first = self.again = act
            self.norm = self.same_norm = norm
            self.classifier = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.same_norm(self.again(self.body(x))).mean((2, 3)))

    base = enliven_(Net()).double().eval()
    x = images(2, 8, torch.float64)
    before = base(x).detach()
    for chosen in (Method((Bias(),)), Method((Full(),)), Method((Norm(),)), Method()):
        lean, stock = copy.deepcopy(base), copy.deepcopy(base)
        adapt_(lean, chosen, resolution=8)
        adapt_(stock, chosen, resolution=8, lean=False)
        assert lean.first is lean.again
        assert lean.norm is lean.same_norm
        assert stock.norm is stock.same_norm is stock.get_submodule("body.3")
        torch.testing.assert_close(lean(x), before)
        torch.testing.assert_close(stock.train()(x), before)
        assert isinstance(lean.again, LeanModule)
        if chosen == Method((Full(),)):
            ours, theirs = backward(lean, x), backward(stock, x)
            torch.testing.assert_close(ours["body.2.weight"], theirs["body.2.weight"])
            torch.testing.assert_close(ours["body.0.weight"], theirs["body.0.weight"])


def test_layers_keep_their_numbers() -> None:
    """A forward that picks layers by number finds the same ones after a norm was folded."""

    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
            self.classifier = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for number, layer in enumerate(self.net):
                x = layer(x)
                if number == 2:
                    x = x * 2
            return self.classifier((x + self.net[4](x)).mean((2, 3)))

    model = enliven_(Taps()).eval()
    x = images(2, 8)
    before = model(x).detach()
    adapt_(model, TINYTL_B, resolution=8)
    torch.testing.assert_close(model(x), before)


TINYTL_B = Method((Bias(),))


class Odd(nn.Module):
    """A layer that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class OwnConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Holder(nn.Module):
    """Two known layers, then `middle`, then a classifier."""

    def __init__(self, middle: nn.Module, width: int = 8, classifier_first: bool = False) -> None:
        super().__init__()
        if classifier_first:
            self.classifier = nn.Linear(width, 3)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.extra = nn.Sequential(nn.Conv2d(8, 8, 1))
        self.middle = middle
        if not classifier_first:
            self.classifier = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.middle(self.extra(self.stem(x))).mean((2, 3)))


def snapshot(model: nn.Module) -> tuple[object, ...]:
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def assert_unchanged(model: nn.Module, before: tuple[object, ...]) -> None:
    after = snapshot(model)
    assert after[:3] == before[:3]
    torch.testing.assert_close(after[3], before[3], rtol=0, atol=0)


def conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, **options)  # type: ignore[arg-type]


def by_the_batch(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


class OwnNorm(nn.Module):
    """Normalizes by the batch that it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return by_the_batch(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "by the batch": (OwnNorm, r"^middle \(OwnNorm\): .*by the batch"),
    "deep inside": (lambda: nn.Sequential(conv(), nn.ModuleDict({"a": OwnNorm()})["a"]), r"^middle\.1 \(OwnNorm\)"),
    "no statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), r"^middle .*running statistics"),
}


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refused_with_path_and_reason_and_nothing_changed(kind: str, lean: bool) -> None:
    make, reason = REFUSED[kind]
    model = Holder(make())
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match=reason) as caught:
        adapt_(model, TINYTL_LB, blocks=["stem", "extra"], resolution=16, lean=lean)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("first", [False, True])
def test_an_odd_layer_in_a_frozen_trunk_is_left_alone(first: bool) -> None:
    """In whatever order the network lists its layers: what counts is where gradients flow."""
    odd = OwnNorm()
    model = Holder(nn.Sequential(OwnConv(8, 8, 3), odd), classifier_first=first).eval()
    own, x = model.middle[0], images(2, 16)  # type: ignore[index]
    before = model(x).detach()
    adaptation = adapt_(model, Method(), resolution=16)
    assert model.middle[0] is own  # type: ignore[index]
    assert model.middle[1] is odd  # type: ignore[index]
    assert "forward" not in vars(odd)
    torch.testing.assert_close(model(x), before)
    assert adaptation.trained == ("classifier.weight", "classifier.bias")
    assert adaptation.kept_bytes_per_image == 8 * 4
    late = Holder(nn.Sequential(OwnConv(8, 8, 3), OwnNorm()), classifier_first=True)
    with pytest.raises(UnsupportedLayerError, match=r"middle\.1 \(OwnNorm\)"):
        adapt_(late, TINYTL_B, resolution=16)


def test_statistics_never_move_whatever_the_norm_s_type() -> None:
    mine = type("MyNorm", (nn.BatchNorm2d,), {})
    for chosen in (Method(), Method((Full(),))):
        for lean in (True, False):
            model = Holder(nn.Sequential(mine(8)))
            adapt_(model, chosen, resolution=16, lean=lean)
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            model.train()(images(4, 16) * 3 + 1)
            assert model.middle.training
            assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_hooks_that_would_be_lost_are_refused() -> None:
    for attach in (
        lambda m: m.stem[0].register_forward_hook(lambda *a: None),
        lambda m: m.stem[1].register_forward_pre_hook(lambda *a: None),
        lambda m: m.stem.register_full_backward_hook(lambda *a: None),
        lambda m: m.classifier.register_forward_hook(lambda *a: None),
    ):
        model = Holder(nn.Identity())
        handle = attach(model)
        before = snapshot(model)
        with pytest.raises(UnsupportedLayerError, match="hooks"):
            adapt_(model, TINYTL_B, resolution=16)
        assert_unchanged(model, before)
        handle.remove()
        adapt_(model, TINYTL_B, resolution=16)


def test_a_hook_on_the_network_itself_stays_and_sees_only_real_tensors() -> None:
    model, seen = Holder(nn.Identity()), []
    model.register_forward_hook(lambda m, a, o: seen.append(o.device.type))
    adapt_(model, TINYTL_B, resolution=16)
    assert seen == []
    model(images(1, 16))
    assert seen == ["cpu"]


@pytest.mark.parametrize("lean", [True, False])
def test_adapting_twice_is_refused(lean: bool) -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32, lean=lean)
    before = snapshot(model)
    for again in (TINYTL_LB, Method()):
        with pytest.raises(InputError, match="adapted already"):
            adapt_(model, again, resolution=32)
    assert_unchanged(model, before)


def test_other_refusals_name_the_mend_and_change_nothing() -> None:
    model = small_network()
    before = snapshot(model)
    cases: list[tuple[dict[str, object], str]] = [
        ({"classifier": "fc"}, "'fc'.*classifier="),
        ({"classifier": ""}, "classifier="),
        ({"classifier": "dropout"}, "no parameters"),
        ({"blocks": ["features.block0", "features.block9"]}, "features.block9"),
        ({"method": TINYTL_LB + LastBlocks(5)}, "last blocks 5.*4"),
        ({"resolution": 1 << 4, "method": TINYTL_LB, "blocks": ["features", "features.head.act"]}, "no convolution"),
    ]
    for options, reason in cases:
        chosen = options.pop("method", TINYTL_LB)
        with pytest.raises(InputError, match=reason):
            adapt_(model, chosen, **options)  # type: ignore[arg-type]
        assert_unchanged(model, before)
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    before = snapshot(bare)
    with pytest.raises(InputError, match=r"does not run on images \(N, 3, 9, 9\).*resolution="):
        adapt_(bare, Method(), classifier="2", resolution=9)
    with pytest.raises(InputError, match="blocks="):
        adapt_(bare, TINYTL_LB, classifier="2", resolution=4)
    assert_unchanged(bare, before)


def test_groups_that_do_not_divide_are_refused_before_anything_is_inserted() -> None:
    model = small_network()
    before = snapshot(model)
    with pytest.raises(InputError, match="groups"):
        adapt_(model, Method((type(TINYTL_LB.part(type(TINYTL_LB.parts[1])))(groups=7),)), resolution=32)
    assert_unchanged(model, before)
    assert not any(isinstance(module, LiteBlock) for module in model.modules())


def test_a_convolution_is_lowered_with_every_option() -> None:
    for options in (
        {"stride": 2, "padding": (2, 1), "dilation": (1, 2)},
        {"padding": "same", "kernel_size": (4, 3), "dilation": 2},
        {"padding": "valid", "groups": 2, "bias": False},
    ):
        arguments = {"kernel_size": 3, **options}
        stock = nn.Conv2d(4, 6, **arguments).double()  # type: ignore[arg-type]
        x = images(1, 9, torch.float64)[:, :1].expand(2, 4, 9, 9)
        torch.testing.assert_close(LeanConv2d(stock)(x), stock(x))
    assert math.prod(LeanConv2d(nn.Conv2d(4, 6, 3)).weight.shape) == 6 * 4 * 9
