"""The plan of a compiled step: what is promised is what is laid out, and a budget is kept or refused by name."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import small_run
from tinytl.backbones import Preprocessing
from tinytl.compiler.arena import constant_bytes, lay_out, least_bytes, verify
from tinytl.compiler.by_role import bytes_by_role, live_bytes
from tinytl.compiler.capture import capture
from tinytl.compiler.compile import compile_network
from tinytl.compiler.describe import describe
from tinytl.compiler.differentiate import training_program
from tinytl.compiler.inspect import step_multiply_adds
from tinytl.compiler.picture import draw_arena
from tinytl.compiler.plan import plan, stretch_names, total_bytes
from tinytl.compiler.program import SCRATCH_PER_THREAD, Program
from tinytl.compiler.step_options import StepOptions
from tinytl.compiler.ways import Network, all_ways
from tinytl.errors import BudgetError, InputError
from tinytl.memory.by_role import live_by_role
from tinytl.memory.step import StepSpec, build_network
from tinytl.memory.timeline import draw_planned
from tinytl.methods import adapt_, method
from tinytl.nn.packing import pack_frozen_

PREPROCESSING = Preprocessing(64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0)
OPTIONS = StepOptions(batch=4, micro_batch=1, evaluate_images=1)


@functools.cache
def captured(norm: str = "bn", name: str = "tinytl-l+b") -> Program:
    torch.manual_seed(0)
    model = small_run.entry().build(norm=norm, num_classes=5)
    adaptation = adapt_(model, method(name), resolution=64)
    pack_frozen_(model, 8)
    return capture(model, adaptation, PREPROCESSING)


def test_without_a_budget_one_image_at_a_time_and_nothing_run_again() -> None:
    program = plan(captured(), OPTIONS)
    verify(program)
    chosen = program.meta["plan"]
    assert (program.micro_batch, chosen["updates"], chosen["again"], chosen["budget_bytes"]) == (1, "end", [], None)
    assert chosen["bytes"] == bytes_by_role(program)
    assert program.meta["learned"]
    assert program.evaluate_images in (1, 2, 4)
    wider = replace(program, evaluate_images=min(2 * program.evaluate_images, 4))
    if wider.evaluate_images > program.evaluate_images:
        assert least_bytes(wider) > least_bytes(program)


def test_group_norms_run_again_without_a_budget() -> None:
    program = plan(captured("gn"), OPTIONS)
    assert "block 0" in program.meta["plan"]["again"]
    kept = lay_out(training_program(captured("gn"), OPTIONS))
    assert total_bytes(program) < total_bytes(kept)
    again = {one.layer for one in program.streams["micro"] if one.phase == "again" and one.op == "conv"}
    assert again
    assert not any(one.phase == "again" for one in kept.streams["micro"] if one.op == "conv")


def test_a_budget_is_kept_and_more_of_it_costs_no_more_time() -> None:
    one = total_bytes(plan(captured("gn"), OPTIONS))
    whole = total_bytes(plan(captured("gn"), replace(OPTIONS), micro_batch=4))
    before = None
    for budget in (one, (2 * one + whole) // 3, whole, 2 * whole):
        program = plan(captured("gn"), OPTIONS, budget_bytes=budget)
        assert total_bytes(program) <= budget
        chosen = program.meta["plan"]
        cost = (chosen["again_multiply_adds"] * 4, 4 // program.micro_batch, len(chosen["tiled"]))
        assert before is None or cost <= before
        before = cost
    assert program.micro_batch == 4
    assert program.meta["plan"]["again"] == []


def test_what_nothing_fits_is_refused_by_the_least_that_would_do() -> None:
    with pytest.raises(
        BudgetError, match="memory_budget is 100,000 bytes: the least that a compiled step takes"
    ) as error:
        plan(captured("gn"), OPTIONS, budget_bytes=100_000)
    least = error.value.least_bytes
    program = plan(captured("gn"), OPTIONS, budget_bytes=least)
    assert total_bytes(program) <= least
    with pytest.raises(BudgetError):
        plan(captured("gn"), OPTIONS, budget_bytes=least - 64)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["ft-full", "tinytl-l+b"])
def test_the_least_that_is_named_is_the_least_of_all_ways(name: str, batch: int) -> None:
    options = replace(OPTIONS, batch=batch)
    network = Network(captured(name=name), options)
    ways = list(all_ways(network, batch, None, None))
    least = min(total_bytes(lay_out(network.step(way))) for way in ways)
    with pytest.raises(BudgetError) as error:
        plan(captured(name=name), options, budget_bytes=1000)
    assert error.value.least_bytes == least
    assert total_bytes(plan(captured(name=name), options, budget_bytes=least)) <= least


def test_what_is_given_is_taken() -> None:
    program = plan(captured(), OPTIONS, micro_batch=2)
    assert program.micro_batch == 2
    program = plan(captured(), OPTIONS, micro_batch=4, updates="backward")
    assert program.meta["plan"]["updates"] == "backward"
    updates = [stream for stream, one in program.instructions() if one.op == "adam"]
    assert updates.count("micro") > updates.count("finish")
    with pytest.raises(InputError, match="micro_batch is 5, expected 1 to the batch_size of 4"):
        plan(captured(), OPTIONS, micro_batch=5)


def test_bytes_by_role_add_up() -> None:
    program = plan(captured("gn"), OPTIONS)
    found = bytes_by_role(program)
    constant, arena = found.pop("constant"), found.pop("arena")
    assert constant == constant_bytes(program)
    assert sum(found.values()) == arena == program.arena_bytes
    assert found["scratch"] == 2 * SCRATCH_PER_THREAD
    assert found["between"] < 0.02 * arena
    assert found["trained"] + found["state"] <= (program.state_bytes or 0)
    totals = np.sum(list(live_bytes(program).values()), axis=0)
    assert totals.max() + found["between"] == arena


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_the_labs_views_describe_the_program(norm: str, tmp_path: Path) -> None:
    program = plan(captured(norm), OPTIONS)
    step = describe(program)
    trained = sum(-(-program.tensors[n].bytes(program) // 64) * 64 for n in program.trained)
    found = bytes_by_role(program)
    assert step.peak_bytes == total_bytes(program) - found["between"]
    assert step.at_peak()["weight"] == constant_bytes(program) + trained
    assert sum(op.multiply_adds for op in step.operations) * 4 == step_multiply_adds(program)
    assert {op.phase for op in step.operations} == {"forward", "backward", "update"}
    live = live_by_role(step)
    assert np.array_equal(np.sum(list(live.values()), axis=0), step.live_bytes)
    assert live["kept"].max() > 0
    for number, op in enumerate(step.operations):
        for storage in (*op.inputs, *op.outputs):
            assert storage in step.alive_at(number)
    for path in (draw_planned(step, tmp_path / "a.png"), draw_arena(program, tmp_path / "b.png", title="small")):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_names_of_stretches_on_one_line() -> None:
    assert stretch_names(["stem", "block 0", "block 1", "block 2", "block 5", "head"]) == (
        "stem, blocks 0 to 2, block 5, head"
    )
    assert stretch_names([]) == ""


# bytes of arena and constants that leave 3 MB of the targets for the process itself
TARGETS = [
    ("tinytl-b", "bn", 8, 32, 13_000_000),
    ("tinytl-b", "bn", 32, 32, 21_000_000),
    ("tinytl-l+b", "bn", 8, 32, 41_000_000),
    ("tinytl-l+b", "bn", 8, 8, 29_000_000),
    ("tinytl-l+b", "gn", 8, 32, 45_000_000),
    ("tinytl-l+b", "gn", 8, 8, 33_000_000),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm", "frozen_bits", "optimizer_bits", "most"), TARGETS)
def test_the_steps_of_the_table_are_planned_within_their_targets(
    name: str, norm: str, frozen_bits: int, optimizer_bits: int, most: int
) -> None:
    spec = StepSpec("proxylessnas_mobile", name, norm, frozen_bits=frozen_bits)  # pyright: ignore[reportArgumentType]
    model, adaptation = build_network(spec)
    program = compile_network(model, adaptation, resolution=224, optimizer_bits=optimizer_bits)
    assert total_bytes(program) <= most
    assert (program.arena_bytes or 0) <= 1.005 * least_bytes(program)
