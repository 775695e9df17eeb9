"""A super-network: its keys, its choices held against static networks, statistics, sorted channels."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinytl.backbones.ofa_layouts import cut_state, super_state_shapes
from tinytl.backbones.ofa_networks import sub_network
from tinytl.backbones.once_for_all import SPACES, OfaArchitecture, OfaSpace, largest, smallest
from tinytl.errors import InputError, WeightsError
from tinytl.supernet.elastic import ElasticNet
from tinytl.supernet.elastic_layers import ElasticNorm
from tinytl.supernet.recalibration import recalibrate_
from tinytl.supernet.shrinking import everything, phases, sample, sort_channels_

from .small_spaces import MBV3, PROXYLESS, SMALL

FAMILIES = (SPACES["ofa_tiny_d234_e346_k357"], SPACES["ofa_mbv3_d234_e346_k357_w1.0"])


def randomized(space: OfaSpace, classes: int = 5) -> ElasticNet:
    """A super-network in which every tensor says something: matrices, statistics, scales and biases too."""
    net, draws = ElasticNet(space, classes, seed=3), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                first, second = torch.rand((2, *tensor.shape), generator=draws) - 0.5
                tensor.mul_(1 + 0.5 * first).add_(0.1 * second)
        recalibrate_(net, [torch.randn(8, 3, 32, 32, generator=draws)])  # or activations would saturate
    return net.eval()


def choices(space: OfaSpace, count: int) -> list[OfaArchitecture]:
    draws = random.Random(7)
    return [largest(space), smallest(space), *(sample(space, everything(space), draws) for _ in range(count))]


@pytest.mark.parametrize("space", [*SPACES.values(), *SMALL], ids=lambda space: space.name)
def test_the_state_dict_has_the_published_keys(space: OfaSpace) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in ElasticNet(space, 7).state_dict().items()}
    assert shapes == super_state_shapes(space, 7)


@pytest.mark.parametrize("space", [*FAMILIES, *SMALL], ids=lambda space: space.name)
def test_a_choice_has_the_bits_of_the_network_that_is_cut_for_it(space: OfaSpace) -> None:
    net, images = randomized(space), torch.randn(2, 3, 48, 40)
    seen: list[Tensor] = []
    for architecture in choices(space, 12 if space in SMALL else 3):
        static = sub_network(space, architecture, num_classes=5).eval()
        static.load_state_dict(cut_state(space, net.state_dict(), architecture))
        net.choose(architecture)
        with torch.no_grad():
            seen.append(net(images))
            assert torch.equal(seen[-1], static(images))
            last = images.contiguous(memory_format=torch.channels_last)
            assert torch.equal(net(last), static(last))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize("space", SMALL, ids=lambda space: space.name)
def test_gradients_are_those_of_the_static_network(space: OfaSpace) -> None:
    net, architecture = randomized(space).double(), choices(space, 1)[-1]
    static = sub_network(space, architecture, num_classes=5).double()
    static.load_state_dict(cut_state(space, net.state_dict(), architecture))
    images, upstream = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    net.choose(architecture)
    static.eval()  # a dropout that ElasticNet does not have
    (net(images) * upstream).sum().backward()
    (static(images) * upstream).sum().backward()
    pairs = {"first_conv.conv.weight": "features.stem.conv.weight", "classifier.linear.bias": "classifier.bias"}
    for ours, theirs in pairs.items():
        torch.testing.assert_close(net.get_parameter(ours).grad, static.get_parameter(theirs).grad)


def test_what_is_left_out_gets_no_gradient() -> None:
    net = ElasticNet(PROXYLESS, 3)
    images = torch.randn(2, 3, 32, 32)
    net(images).square().sum().backward()
    assert net.get_parameter("blocks.1.conv.depth_conv.conv.7to5_matrix").grad is None  # the largest kernel needs none
    net.zero_grad()
    net.choose(smallest(PROXYLESS))
    net(images).square().sum().backward()
    assert net.get_parameter("blocks.1.conv.depth_conv.conv.7to5_matrix").grad is not None
    without = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert {name.split(".")[1] for name in without} == {"2", "4", "5"}  # the blocks that are skipped
    grad = net.get_parameter("blocks.1.conv.point_linear.conv.conv.weight").grad
    assert grad is not None
    assert grad[:, :16].abs().sum() > 0
    assert grad[:, 16:].abs().sum() == 0


def test_a_choice_of_another_space_is_refused() -> None:
    with pytest.raises(InputError, match="ofa_small_proxyless"):
        ElasticNet(PROXYLESS).choose(smallest(MBV3))


def test_equal_seeds_make_equal_weights_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = (ElasticNet(PROXYLESS, 3, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["first_conv.conv.weight"], other["first_conv.conv.weight"])


@pytest.mark.parametrize("space", SMALL, ids=lambda space: space.name)
def test_published_weights_are_read_in_either_spelling(space: OfaSpace, tmp_path: Path) -> None:
    source, file = randomized(space), tmp_path / "super.pth"
    older = {
        name.replace(".conv.", ".mobile_inverted_conv.", 1).replace(".bn.bn.", ".bn.")
        if name.startswith("blocks.")
        else name: tensor
        for name, tensor in source.state_dict().items()
    }
    torch.save({"state_dict": older}, file)
    net = ElasticNet(space, 5)
    net.load_published(file)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in net.state_dict().items())


def test_weights_that_do_not_fit_are_listed_and_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "super.safetensors"
    state = {name: tensor.contiguous() for name, tensor in randomized(PROXYLESS).state_dict().items()}
    state["blocks.2.conv.point_linear.conv.conv.weight"] = torch.zeros(3, 3, 1, 1)
    state["blocks.77.weight"] = torch.zeros(1)
    del state["first_conv.bn.bias"]
    save_file(state, file)
    net = ElasticNet(PROXYLESS, 5)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(WeightsError, match=r"first_conv\.bn\.bias.*blocks\.77\.weight.*point_linear.*\(3, 3, 1, 1\)"):
        net.load_published(file)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_another_number_of_classes_is_refused_or_left_out(tmp_path: Path) -> None:
    file = tmp_path / "super.safetensors"
    save_file(randomized(PROXYLESS, classes=9).state_dict(), file)
    net = ElasticNet(PROXYLESS, 5)
    own = net.get_parameter("classifier.linear.weight").detach().clone()
    with pytest.raises(WeightsError, match="has 9 classes, expected 5"):
        net.load_published(file)
    net.load_published(file, classifier=False)
    assert torch.equal(net.get_parameter("classifier.linear.weight"), own)
    theirs = randomized(PROXYLESS, classes=9).get_parameter("first_conv.conv.weight")
    assert torch.equal(net.get_parameter("first_conv.conv.weight"), theirs)


def collected(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Every batch norm's inputs (C, values), in float64, where each normalizes by its batch."""
    exact, found = copy.deepcopy(model).double().eval(), {}
    for name, module in exact.named_modules():
        if isinstance(module, nn.BatchNorm2d | ElasticNorm):
            (module.bn if isinstance(module, ElasticNorm) else module).train()

            def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                found.setdefault(name, []).append(args[0].transpose(0, 1).flatten(1))

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in batches:
            exact(batch.double())
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


def plain() -> nn.Module:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("which", ["plain", "proxyless", "mbv3"])
def test_statistics_are_those_computed_directly(which: str) -> None:
    model = plain() if which == "plain" else randomized(PROXYLESS if which == "proxyless" else MBV3)
    if isinstance(model, ElasticNet):
        model.choose(choices(model.space, 1)[-1])
    batches = [torch.randn(n, 3, 32, 32) * 2 + 5 for n in (4, 3, 6)]
    model.train()
    expected, before = collected(model, batches), copy.deepcopy(model.state_dict())
    assert recalibrate_(model, iter(batches)) == len(expected) > 1
    assert all(module.training for module in model.modules())
    state, set_ = model.state_dict(), set()
    for name, values in expected.items():
        module = model.get_submodule(name)
        path = f"{name}.bn" if isinstance(module, ElasticNorm) else name
        channels = len(values)
        mean, variance = values.mean(1), values.var(1, unbiased=False)
        torch.testing.assert_close(state[f"{path}.running_mean"][:channels].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state[f"{path}.running_var"][:channels].double(), variance, rtol=1e-4, atol=1e-6)
        for tensor in ("running_mean", "running_var"):
            assert torch.equal(state[f"{path}.{tensor}"][channels:], before[f"{path}.{tensor}"][channels:])
            set_.add(f"{path}.{tensor}")
    assert all(torch.equal(state[name], before[name]) for name in state.keys() - set_)


def test_statistics_need_images() -> None:
    with pytest.raises(InputError, match="no images"):
        recalibrate_(plain(), [])
    with pytest.raises(InputError, match="one value a channel"):
        recalibrate_(nn.Sequential(nn.BatchNorm2d(3)), [torch.zeros(1, 3, 1, 1)])
    assert recalibrate_(nn.Conv2d(3, 3, 1), []) == 0


@pytest.mark.parametrize("space", [*SMALL, FAMILIES[1]], ids=lambda space: space.name)
def test_sorting_changes_no_sub_network_that_is_open(space: OfaSpace) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for phase in phases(space, 1, 1, 0.1, 0.1):
        if phase.sorted_within is None:
            continue
        net = randomized(space).double()
        before = phases(space, 1, 1, 0.1, 0.1)
        draws, at = random.Random(5), before.index(phase) - 1
        drawn = [sample(space, before[at], draws) for _ in range(3)]
        outputs = []
        for _ in range(2):
            with torch.no_grad():
                outputs.append([(net.choose(architecture), net(images))[1] for architecture in drawn])
            sort_channels_(net, phase.sorted_within)
        for old, new in zip(*outputs, strict=True):
            torch.testing.assert_close(old, new, rtol=1e-9, atol=1e-9)


def test_sorted_channels_begin_with_the_most_important() -> None:
    net = randomized(MBV3)
    sort_channels_(net, MBV3.expands[-1:])
    for number in range(1, len(MBV3.blocks) + 1):
        weight = net.elastic_block(number).point_linear.conv.conv.weight
        importance = weight.detach().abs().sum((0, 2, 3))
        assert torch.equal(importance, importance.sort(descending=True).values)
