"""The super-network for a data set: a sub-network built by itself, of its weights, computes the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tinytl.backbones import BACKBONES, load
from tinytl.backbones.ofa_layouts import super_state_shapes
from tinytl.data import scan
from tinytl.errors import DataError, WeightsError
from tinytl.methods import adapt_, method
from tinytl.nn.lite_residual import lite_residual
from tinytl.search.elastic_lite import SharedLite, calibrate_lite_
from tinytl.search.main_branch import ElasticMain
from tinytl.search.session import make_shared, own_weights
from tinytl.search.shared import SharedNet
from tinytl.search.space import Site, Space, make_space
from tinytl.search.spec import SearchSpec
from tinytl.search.target import Target, make_target
from tinytl.supernet.elastic import ElasticNet

from . import small_run
from .photographs import make_photographs

OFA = "ofa_tiny_d234_e346_k357"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(BACKBONES, small_run.NAME, small_run.entry())
    return make_photographs(tmp_path / "photos", each=10)


def made(photos: Path, base: str, **options: object) -> tuple[Target, Space, SharedNet]:
    spec = SearchSpec(str(photos), base, resolutions="32,40", **{"pretrained": False, **options})  # pyright: ignore
    space = make_space(base, spec.resolution_list)
    target = make_target(spec, scan(photos))
    shared = make_shared(target, space)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as if it had learned
        for parameter in shared.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    shared.calibrate_(lambda: target.calibration_images(32, 8))
    return target, space, shared


def built(shared: SharedNet, genome: np.ndarray, model: nn.Module) -> nn.Module:
    """A sub-network made as a run makes it, given the weights that it has in the super-network."""
    space, choice = shared.space, shared.space.choice(genome)
    adaptation = adapt_(model, method(choice.method), resolution=choice.resolution, lean=False)
    shared.choose(genome)
    blocks = dict(zip(space.active(genome), adaptation.blocks, strict=True))
    for slot, module in space.lite(genome).items():
        lite = model.get_submodule(f"{blocks[slot]}.lite")
        lite.load_state_dict({**lite.state_dict(), **shared.lite_at(slot).cut(module)})
    there = dict(model.named_parameters())
    beside = [blocks[slot] for slot in space.lite(genome)]
    with torch.no_grad():
        for name, value in shared.trained_biases.items():
            for path in beside:
                name = name.replace(f"{path}.", f"{path}.block.", 1) if name.startswith(f"{path}.") else name
            there[name].copy_(value)
    model.get_submodule("classifier").load_state_dict(shared.classifier.state_dict())
    return model.eval()


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_a_sub_network_of_kept_blocks_is_the_same_by_itself(photos: Path, norm: str) -> None:
    _, space, shared = made(photos, small_run.NAME, norm=norm)
    full = shared.main.model.state_dict()
    shared.eval()
    rng = np.random.default_rng(0)
    genomes = [space.default(1), space.smallest(), *(space.sample(rng) for _ in range(8))]
    for genome in genomes:
        choice = space.choice(genome)
        # the full network's weights, of which the sub-network has some
        shared.choose(space.default(0))
        full = shared.main.model.state_dict()
        backbone = load(choice.backbone, pretrained=False, norm=norm, num_classes=3)  # pyright: ignore[reportArgumentType]
        backbone.model.load_state_dict({name: full[name] for name in backbone.model.state_dict()})
        model = built(shared, genome, backbone.model)
        images = torch.randn(2, 3, choice.resolution, choice.resolution)
        with torch.no_grad():
            assert torch.equal(shared(images), model(images)), choice


def test_a_sub_network_of_a_once_for_all_network_is_the_same_by_itself(photos: Path, tmp_path: Path) -> None:
    target, space, shared = made(photos, OFA)
    rng = np.random.default_rng(0)
    for _ in range(3):
        resolution, architecture, lite, biases = space.split(space.sample(rng))
        genome = space.joined(resolution, architecture, lite, biases * 0)
        choice = space.choice(genome)
        shared.choose(genome)
        shared.eval()
        shared.recalibrate_(target.calibration_images(choice.resolution, 16))
        main = shared.main
        assert isinstance(main, ElasticMain)
        backbone = load(choice.backbone, pretrained=False, num_classes=3)
        backbone.model.load_state_dict(main.cut())
        model = built(shared, genome, backbone.model)
        images = torch.randn(2, 3, choice.resolution, choice.resolution)
        with torch.no_grad():
            assert torch.equal(shared(images), model(images)), choice


def test_a_winner_of_a_once_for_all_network_brings_its_own_weights(photos: Path, tmp_path: Path) -> None:
    """What is cut out, with statistics of the target's images, is a weights file of that very network."""
    target, space, _ = made(photos, OFA)
    genome = space.sample(np.random.default_rng(2))
    choice = space.choice(genome)
    path = own_weights(space, target, genome, tmp_path)
    assert path is not None
    backbone = load(choice.backbone, weights=path, num_classes=3)
    stem = dict(backbone.model.named_buffers())["features.stem.norm.running_mean"]
    assert bool(stem.abs().sum() > 0), "a fresh network's mean is 0: it was measured"
    assert own_weights(space, target, genome, tmp_path) == path


def test_only_what_is_chosen_trains(photos: Path) -> None:
    _, space, shared = made(photos, small_run.NAME)
    genome = space.default(0)
    frozen = {name: value.clone() for name, value in shared.main.model.state_dict().items()}
    shared.choose(genome)
    shared.train()
    with shared.only_used() as used:
        shared(torch.randn(2, 3, 32, 32)).sum().backward()
    trained = {id(p) for p in shared.parameters() if p.grad is not None}
    assert trained == {id(p) for p in used}
    names = {name for name, p in shared.named_parameters() if p.grad is not None}
    assert not any(name.endswith("norm2.bias") for name in names), "the main branch's bias does its work"
    assert all(torch.equal(value, shared.main.model.state_dict()[name]) for name, value in frozen.items())
    shared.choose(space.smallest())
    with shared.only_used() as used:
        assert len(used) == 2, "the classifier alone"


def test_a_smaller_module_is_a_cut_of_the_larger() -> None:
    site = Site(16, 24, 1, (3, 5), pools_globally=False)
    shared = SharedLite(site, (2, 4), (50, 100), "bn")
    full = shared.full.get_parameter("conv1.weight")  # (16, 8, 5, 5)
    whole, cut = shared.cut((5, 2, 100)), shared.cut((3, 4, 50))
    assert torch.equal(whole["conv1.weight"], full)
    plain = lite_residual(16, 24, stride=1, kernel_size=3, groups=4, width=50)
    assert {name: value.shape for name, value in cut.items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    # group 1 of 4: the second half of what the first of two groups reads, and its own first two filters
    assert torch.equal(cut["conv1.weight"][2:4], full[4:6, 4:8, 1:4, 1:4])
    assert torch.equal(cut["conv2.weight"], shared.full.get_parameter("conv2.weight")[:, [0, 1, 4, 5, 8, 9, 12, 13]])


def test_calibrated_statistics_are_those_of_what_a_norm_receives() -> None:
    site = Site(8, 16, 2, (3, 5), pools_globally=False)
    shared = SharedLite(site, (2, 4), (50, 100), "bn")
    inputs = [torch.randn(3, 8, 12, 12), torch.randn(2, 8, 12, 12)]
    for layer in ("norm1", "norm2"):
        calibrate_lite_(shared, layer, inputs)
    module = (3, 2, 100)
    state = shared.cut(module)
    runner = shared.runner(module)
    with torch.no_grad():
        pooled = torch.nn.functional.avg_pool2d(torch.cat(inputs), 2)
        first = torch.nn.functional.conv2d(pooled, state["conv1.weight"], stride=2, padding=1, groups=2)
        mean, var = first.mean((0, 2, 3)), first.var((0, 2, 3), unbiased=False)
        norm = runner.get_submodule("norm1")
        assert isinstance(norm, nn.BatchNorm2d)
        normed = torch.nn.functional.batch_norm(
            first, mean, var, state["norm1.weight"], state["norm1.bias"], eps=norm.eps
        )
        second = torch.nn.functional.conv2d(normed.relu(), state["conv2.weight"])
    torch.testing.assert_close(state["norm1.running_mean"], first.mean((0, 2, 3)))
    torch.testing.assert_close(state["norm2.running_var"], second.var((0, 2, 3), unbiased=False))


def test_the_fifth_that_chooses_is_not_learned_from(photos: Path) -> None:
    target = make_target(SearchSpec(str(photos), small_run.NAME, pretrained=False), scan(photos))
    tune, held = ({path for path, _ in photos.items} for photos in (target.tune, target.held))
    assert not tune & held
    assert len(held) == 6
    images, labels = target.tune_batch(3, 32)
    again, _ = target.tune_batch(3, 32)
    assert torch.equal(images, again), "a batch is a function of the seed and the step"
    assert images.shape == (16, 3, 32, 32)
    assert len(labels) == 16


def test_too_few_photographs_to_hold_a_fifth_out(tmp_path: Path) -> None:
    photos = make_photographs(tmp_path, each=4)
    with pytest.raises(DataError, match=r"class 'blue' has 4 photograph.* at least 5"):
        make_target(SearchSpec(str(photos), small_run.NAME, pretrained=False), scan(photos))


def test_a_checkpoint_that_does_not_fit_the_space(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.pt"
    state = ElasticNet(make_ofa(), 3).state_dict()
    wrong = next(iter(super_state_shapes(make_ofa(), 3)))
    torch.save({name: value for name, value in state.items() if name != wrong}, file)
    spec = SearchSpec(str(photos), OFA, resolutions="32", weights=str(file))
    with pytest.raises(WeightsError, match=wrong.replace(".", r"\.")):
        make_shared(make_target(spec, scan(photos)), make_space(OFA, (32,)))


def make_ofa():
    from tinytl.backbones.once_for_all import SPACES

    return SPACES[OFA]
