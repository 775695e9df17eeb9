"""Spaces: every genome is a network that loads, adapts and plans; and its cost is the planner's own."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytl._prepared import beside_bytes
from tinytl.backbones import load
from tinytl.errors import InputError, UnknownNameError
from tinytl.graph import tracer
from tinytl.memory import recorder
from tinytl.memory.planner import plan_step
from tinytl.memory.step import StepSpec, build_network, build_optimizer
from tinytl.methods import TINYTL_LB, BlockBias, LiteModules, adapt_, method
from tinytl.search import planned
from tinytl.search.architecture import Genes
from tinytl.search.planned import Conditions, Cost, cost_of
from tinytl.search.shown import block_rows
from tinytl.search.space import Space, make_space
from tinytl.search.spec import SearchSpec
from tinytl.search.stages import Stages
from tinytl.search.timing import Line, probes

NAMES = ("mcunet_5fps", "ofa_tiny_d234_e346_k357")
space_of = functools.cache(make_space)


def some(space: Space, seed: int) -> np.ndarray:
    return space.sample(np.random.default_rng(seed))


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_random_genomes_are_canonical_and_in_range(name: str, seed: int) -> None:
    space = space_of(name)
    genome = some(space, seed)
    assert np.array_equal(space.canonical(genome), genome)
    assert (genome >= 0).all()
    assert (genome < np.array(space.cardinalities)).all()
    rng = np.random.default_rng(seed)
    wild = np.array([rng.integers(count) for count in space.cardinalities])
    found = space.canonical(wild)
    assert np.array_equal(space.canonical(found), found)
    assert space.choice(found) == space.choice(wild), "what is left out by `canonical` meant nothing"
    assert method(space.choice(found).method) == space.method(found)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_different_canonical_genomes_are_different_choices(seed: int) -> None:
    space = space_of("mcunet_5fps")
    one = some(space, seed)
    rng = np.random.default_rng(seed + 1)
    other = one.copy()
    gene = int(rng.integers(len(other)))
    other[gene] = rng.integers(space.cardinalities[gene])
    other = space.canonical(other)
    assert np.array_equal(one, other) == (space.choice(one) == space.choice(other))


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_a_network_and_a_method(name: str) -> None:
    space = space_of(name)
    for seed in range(3):
        genome = some(space, seed)
        choice = space.choice(genome)
        backbone = load(choice.backbone, pretrained=False, num_classes=3)
        adaptation = adapt_(backbone.model, method(choice.method), resolution=choice.resolution)
        assert len(adaptation.blocks) == len(space.active(genome))
        assert len(adaptation.inserted) == len(space.lite(genome))
        rows = block_rows(space, genome)
        assert [row.kept for row in rows] == [slot in space.active(genome) for slot in range(len(rows))]


def test_the_default_network_is_tinytl_of_the_whole_backbone() -> None:
    space = space_of("mcunet_5fps")
    choice = space.choice(space.default(2))
    assert (choice.backbone, choice.resolution) == ("mcunet_5fps", space.resolutions[2])
    found = method(choice.method)
    assert found.part(BlockBias).blocks == tuple(range(14))
    assert [row[1:] for row in found.part(LiteModules).modules] == [(5, 2, 100)] * 10 + [(3, 2, 100)] * 3
    ours, theirs = (_trained(choice.backbone, m, choice.resolution) for m in (found, TINYTL_LB))
    assert ours == theirs


def _trained(backbone: str, chosen: object, resolution: int) -> tuple[int, int | None]:
    model = load(backbone, pretrained=False, num_classes=3).model
    adaptation = adapt_(model, chosen, resolution=resolution)  # pyright: ignore[reportArgumentType]
    return adaptation.trained_elements, adaptation.kept_bytes_per_image


@pytest.mark.parametrize("frozen_bits", [32, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_cost_is_what_the_planner_says_of_the_real_network(name: str, frozen_bits: int) -> None:
    """The search's short way of making a network without memory gives the step of the long one, to the byte."""
    space = space_of(name)
    genome = some(space, 5)
    choice = space.choice(genome)
    spec = StepSpec(choice.backbone, choice.method, resolution=choice.resolution, classes=7, frozen_bits=frozen_bits)
    model, adaptation = build_network(spec)
    step = plan_step(
        model,
        spec.shape(8),
        blocks=adaptation.blocks,
        optimizer=lambda parameters: build_optimizer(spec, parameters),
        beside_bytes=beside_bytes(8, choice.resolution),
    )
    cost = cost_of(choice, Conditions(7, frozen_bits=frozen_bits, multiply_adds=True))
    assert cost.memory_bytes == step.peak_bytes
    assert cost.trained_elements == adaptation.trained_elements
    assert cost.multiply_adds


@pytest.mark.parametrize("name", NAMES)
def test_a_cost_is_the_same_whatever_was_planned_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sub-networks share is made once, and what an operator makes is remembered: neither changes a byte."""
    space = space_of(name)
    genomes = [space.smallest(), space.default(0), *(some(space, seed) for seed in range(8))]
    choices = [space.choice(genome) for genome in (*genomes, *genomes[::-1])]
    conditions = [Conditions(7), Conditions(5, batch_size=6, micro_batch=4, optimizer_bits=8, multiply_adds=True)]
    costs = [[cost_of(choice, each) for choice in choices] for each in conditions]
    for module in (recorder, tracer):
        monkeypatch.setattr(module, "made", lambda func, args, kwargs: func(*args, **kwargs))
    for each, found in zip(conditions, costs, strict=True):
        for choice, cost in zip(choices, found, strict=True):
            planned._stock.cache_clear()
            planned._trace.cache_clear()
            assert cost_of(choice, each) == cost


def test_what_trains_costs_memory() -> None:
    space = space_of("mcunet_5fps")
    costs = [cost_of(space.choice(genome), Conditions(7)) for genome in (space.smallest(), space.default(4))]
    assert costs[0].memory_bytes < costs[1].memory_bytes
    assert costs[0].trained_elements < costs[1].trained_elements


def test_a_space_that_cannot_be() -> None:
    with pytest.raises(InputError, match="names one sub-network"):
        make_space("mcunet_5fps@0-5.7-13")
    with pytest.raises(UnknownNameError):
        make_space("mcunet")
    with pytest.raises(InputError, match="resolution 16"):
        make_space("mcunet_5fps", (16, 64))


def test_time_is_told_by_work() -> None:
    line = Line.through([100, 200, 300], [1.0, 2.0, 3.0])
    assert line(250) == pytest.approx(2.5)
    falling = Line.through([100, 200, 300], [3.0, 2.0, 1.0])
    assert falling(50) == falling(500) == pytest.approx(2.0)
    chosen = probes([5, 1, 9, 7, 3, 8, 2])
    assert chosen[0] == 1
    assert chosen[-1] == 2


def test_torch_is_not_told_of_the_search() -> None:
    """Planning draws nothing from the generator that a run of the user's may depend on."""
    space = space_of("mcunet_5fps")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    cost_of(space.choice(some(space, 1)), Conditions(7))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("budget", "resolution", "lite_modules"), [(9_200_000, 64, True), (8_300_000, 48, True), (4_000_000, 64, False)]
)
def test_the_default_is_tinytl_b_where_no_lite_module_fits(budget: int, resolution: int, lite_modules: bool) -> None:
    space, found = MCUNET, defaults_within(budget)
    assert found is not None
    assert found[0].tolist() == space.default(space.resolutions.index(resolution), lite_modules=lite_modules).tolist()
    assert ("lite" in space.choice(found[0]).method) == lite_modules


def test_there_is_no_default_within_a_budget_below_tinytl_b() -> None:
    assert defaults_within(1_000_000) is None


MCUNET = make_space("mcunet_5fps", (48, 64))


def defaults_within(budget: int) -> tuple[Genes, Cost] | None:
    stages = object.__new__(Stages)  # of a search, what that question needs
    vars(stages).update(
        _space=MCUNET,
        _spec=SearchSpec("photos", "mcunet_5fps", memory_budget=budget),
        plans=lambda genomes: [cost_of(MCUNET.choice(genome), Conditions(10)) for genome in genomes],
    )
    return stages.default()
