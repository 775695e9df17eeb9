"""Tiles: parts of a micro-batch's step that run a few images at a time, and change nothing but memory."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinytl.compiler.again import stretches
from tinytl.compiler.arena import lay_out, least_bytes, verify
from tinytl.compiler.differentiate import training_program
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.liveness import lifetimes
from tinytl.compiler.program import Program
from tinytl.compiler.step_options import StepOptions
from tinytl.compiler.tiles import early_ranges, tiled
from tinytl.methods import METHODS

from .small_program import Maker
from .test_interpreter_steps import small

OPTIONS = StepOptions(batch=5, micro_batch=3, evaluate_images=2)
LB = "tinytl-l+b"


@functools.cache
def step_of(norm: str = "bn", method: str = LB, again: bool = False, **options: Any) -> Program:
    pair = small(norm, METHODS[method], drop=0.2)
    recompute = frozenset(stretches(pair.captured)) if again else frozenset()
    return training_program(pair.captured, replace(OPTIONS, recompute=recompute, **options))


def early(program: Program, blocks: int = 2) -> Program:
    """The stem and the first blocks in tiles of an image."""
    ranges = early_ranges(program, lambda one: 0 <= one.block < blocks or one.layer.startswith("stem"))
    return tiled(program, ranges, 1)


def outcome(program: Program, steps: int = 2) -> tuple[list[tuple[float, int]], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, the last gradients, and what is learned; the second batch is smaller, and ends within a micro-batch."""
    ours = Interpreter(program)
    assert program.images is not None
    side = program.tensors[program.images].shape[0]
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        count = program.batch - step
        images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
        losses.append(ours.step(images, torch.arange(count) % 3, 1e-3, seed=7))
    return losses, ours.gradients(), ours.learned()


def assert_same(ours: Program, theirs: Program) -> None:
    """The same but for the order of sums, in float64."""
    (losses, gradients, learned), (expected, grads, values) = outcome(ours), outcome(theirs)
    for (loss, right), (other, count) in zip(losses, expected, strict=True):
        assert loss == pytest.approx(other, rel=1e-12)
        assert right == count
    for name in gradients:
        assert torch.allclose(gradients[name], grads[name], rtol=1e-9, atol=1e-12), name
    for name in learned:
        assert torch.allclose(learned[name], values[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("method", [LB, "tinytl-b", "ft-full"])
def test_a_step_in_tiles_is_the_same_step(method: str, norm: str, again: bool) -> None:
    program = step_of(norm, method, again)
    ours = early(program)
    assert ours.tiles
    assert_same(lay_out(ours), program)


@pytest.mark.parametrize("options", [{"micro_batch": 5, "updates": "backward"}, {"micro_batch": 5}, {"fuse": False}])
def test_updates_and_zeros_stand_outside_of_tiles(options: dict[str, Any]) -> None:
    program = step_of(**options)
    ours = early(program)
    inside = [one for first, end in ours.tiles for one in ours.streams["micro"][first:end]]
    assert inside
    assert not any(one.phase == "update" for one in inside)
    assert sorted(map(repr, ours.streams["micro"])) == sorted(map(repr, program.streams["micro"]))
    assert_same(lay_out(ours), program)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), images=st.integers(1, 3), norm=st.sampled_from(["bn", "gn"]))
def test_any_ranges_may_be_tiles(data: st.DataObject, images: int, norm: str) -> None:
    program = step_of(norm)
    count = len(program.streams["micro"])
    places = sorted(data.draw(st.lists(st.integers(0, count), unique=True, max_size=8)))
    ranges = [(a, b) for a, b in zip(places[::2], places[1::2], strict=False)]
    ours = lay_out(tiled(program, ranges, images))
    assert [end - first for first, end in ours.tiles] != [] or not ranges
    assert_same(ours, program)


def test_a_tile_takes_the_memory_of_its_images() -> None:
    program = step_of()
    ours = early(program)
    verify(lay_out(ours))
    assert least_bytes(ours) < least_bytes(program)
    scopes = {t.name: t.scope for t in ours.tensors}
    within = [n for n, t in enumerate(ours.tensors) if t.scope == "tile"]
    assert within
    assert all(program.tensors[n].scope == "micro" for n in within)
    assert all(ours.tensors[n].bytes(ours) * 3 == program.tensors[n].bytes(program) for n in within)
    for first, end in ours.tiles:
        for one in (*ours.streams["micro"][:first], *ours.streams["micro"][end:]):
            if not any(a <= at < b for a, b in ours.tiles for at, o in enumerate(ours.streams["micro"]) if o is one):
                assert not any(scopes[ours.tensors[n].name] == "tile" for n in one.operands if n is not None)


def test_what_crosses_a_tiles_border_is_alive_through_all_of_it() -> None:
    make = Maker()
    for name in ("before", "inside", "made", "behind"):
        make.tensor(name, "activation", "f32", 4, scope="micro")
    micro = (
        make.run("zero", x="before"),
        make.run("copy", x="before", y="inside"),
        make.run("copy", x="inside", y="made"),
        make.run("copy", x="made", y="inside"),
        make.run("copy", x="made", y="behind"),
    )
    program = Program(tuple(make.tensors), {"micro": micro}, batch=2, micro_batch=2)
    assert lifetimes(program) == {0: ((0, 1),), 1: ((1, 2), (3, 3)), 2: ((2, 4),), 3: ((4, 4),)}
    ours = tiled(program, [(1, 4)], 1)
    assert [tensor.scope for tensor in ours.tensors] == ["micro", "tile", "micro", "micro"]
    assert lifetimes(ours) == {0: ((0, 3),), 1: ((1, 2), (3, 3)), 2: ((1, 4),), 3: ((4, 4),)}


def test_a_layout_in_which_a_later_tile_overwrites_is_refused() -> None:
    ours = lay_out(early(step_of()))
    numbers = range(len(ours.tensors))
    crossing = [
        (n, spans)
        for n, spans in lifetimes(ours).items()
        if ours.tensors[n].scope == "micro" and ours.tensors[n].bytes(ours)
    ]
    begin = len(ours.streams["begin"])
    first, end = ours.tiles[0]
    late = next(n for n, spans in crossing if spans[0][0] == begin + first and spans[0][1] > begin + end)
    inner = next(n for n in numbers if ours.tensors[n].scope == "tile" and lifetimes(ours)[n][0][0] > begin + first)
    tensors = list(ours.tensors)
    tensors[late] = replace(tensors[late], offset=tensors[inner].offset)
    with pytest.raises(ValueError, match="overlap"):
        verify(replace(ours, tensors=tuple(tensors)))


def test_ranges_that_make_no_sense_are_refused() -> None:
    program = step_of()
    for ranges in ([(0, 5), (4, 8)], [(5, 5)], [(8, 9), (0, 2)], [(0, len(program.streams["micro"]) + 1)]):
        with pytest.raises(ValueError, match="expected ranges of"):
            tiled(program, ranges, 1)
    for images in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3, the micro-batch"):
            tiled(program, [(0, 5)], images)


def test_a_tile_runs_as_a_whole() -> None:
    ours = Interpreter(early(step_of()))
    first, end = ours.program.tiles[0]
    assert ours.program.runs("micro")[0] == (first, end)
    assert sum(b - a for a, b in ours.program.runs("micro")) == len(ours.program.streams["micro"])
    for cut in ((first + 1, end), (first, end - 1), (first + 1, first + 2)):
        with pytest.raises(ValueError, match="expected whole tiles"):
            ours.run("micro", *cut)
