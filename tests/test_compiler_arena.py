"""One arena: nothing that is alive together overlaps, in place where that is exact, and near the bound."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_program import Maker, small_program
from tinytl.compiler import op_table
from tinytl.compiler.arena import lay_out, least_bytes, verify
from tinytl.compiler.liveness import IN_PLACE, Buffer, buffers, lifetimes, resident
from tinytl.compiler.op_table import OPS
from tinytl.compiler.packing import aligned, pack
from tinytl.compiler.program import ALIGN, SCRATCH_PER_THREAD, Program

spans = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(1, 5000)).map(
        lambda t: Buffer((), t[2], ((t[0], t[0] + t[1]),))
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=40)
@given(spans)
def test_packed_buffers_do_not_overlap_and_never_pass_under_the_bound(held: list[Buffer]) -> None:
    packing = pack(held)
    assert packing.bytes >= packing.bound
    assert packing.bytes <= sum(aligned(buffer.bytes) for buffer in held)
    assert pack(held) == packing
    places = list(zip(held, packing.offsets, strict=True))
    for number, (a, at) in enumerate(places):
        assert at % ALIGN == 0
        assert at + a.bytes <= packing.bytes
        for b, to in places[:number]:
            together = a.intervals[0][0] <= b.intervals[0][1] and b.intervals[0][0] <= a.intervals[0][1]
            assert not together or at + a.bytes <= to or to + b.bytes <= at


@settings(deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30))
def test_a_stack_is_packed_to_the_bound(sizes: list[int]) -> None:
    """What forward keeps, backward takes away: the largest sum of live bytes suffices."""
    count = len(sizes)
    held = [Buffer((), size, ((at, 2 * count - at),)) for at, size in enumerate(sizes)]
    packing = pack(held)
    assert packing.bytes == packing.bound == sum(map(aligned, sizes))


def test_every_in_place_pair_is_one_of_the_tables_rows() -> None:
    """The table's comments name what may be in place of what; nothing else may be, and nothing is left out."""
    from pathlib import Path

    source = Path(op_table.__file__).read_text()
    text = source[source.index("# ---- forward") :]
    rows = re.split(r"\n    (?=\d+ +\w+ )", text)[1:]
    said = {}
    for row in rows:
        name = row.split()[1]
        found = re.search(r"(?:(\w+) may be )?in place\s+of ((?:\w+)(?: or \w+)?)", row.replace("#", " "))
        if found:
            said[name] = tuple(found[2].split(" or "))
    assert {name: inputs for name, (_, inputs) in IN_PLACE.items()} == said
    for name, (output, inputs) in IN_PLACE.items():
        modes = {operand: mode for operand, mode, _ in OPS[name].operands}
        assert modes[output] == "out"
        assert all(modes[operand] == "in" for operand in inputs)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_step_is_laid_out(micro_batch: int) -> None:
    program = lay_out(small_program(micro_batch=micro_batch), threads=3)
    by_name = {tensor.name: tensor for tensor in program.tensors}
    assert [by_name[name].offset for name in ("conv.bias", "fc.weight", "fc.bias", "step")] == [0, 64, 128, 192]
    assert program.state_bytes == 256
    assert by_name["images"].offset == 256
    assert program.arena_bytes == least_bytes(small_program(micro_batch=micro_batch), 3)
    assert program.arena_bytes is not None
    ends = [t.offset + t.bytes(program) for t in program.tensors if t.offset is not None and t.role != "constant"]
    assert max(ends) <= program.arena_bytes - 3 * SCRATCH_PER_THREAD
    assert by_name["dy"].offset == by_name["dz"].offset
    assert by_name["logits"].offset == by_name["dlogits"].offset
    mask, again = by_name["mask"].offset, by_name["evaluate.y"].offset
    assert mask is not None
    assert again is not None
    assert again < mask  # evaluation overlays the step


def test_what_accumulates_is_alive_from_begin_to_finish() -> None:
    program = small_program(micro_batch=2)
    numbers = {tensor.name: number for number, tensor in enumerate(program.tensors)}
    times = lifetimes(program)
    begin, micro = len(program.streams["begin"]), len(program.streams["micro"])
    for name in ("conv.bias.grad", "fc.weight.grad", "fc.bias.grad"):
        ((first, last),) = times[numbers[name]]
        assert first < begin
        assert last >= begin + micro
    assert numbers["images"] in resident(program)
    assert numbers["images"] not in times


def test_what_begin_makes_for_each_micro_batch_outlives_the_first() -> None:
    """A weight that is standardized once must not be overwritten behind its last use in a micro-batch."""
    make = Maker()
    for name in ("w", "made"):
        make.tensor(name, "derived", "f32", 4)
    for name in ("x", "y"):
        make.tensor(name, "activation", "f32", 4, scope="micro")
    streams = {
        "begin": (make.run("zero", x="w"), make.run("standardize", {"eps": 1e-5, "depthwise": 0}, w="w", y="made")),
        "micro": (make.run("copy", x="made", y="x"), make.run("copy", x="x", y="y")),
    }
    once = Program(tuple(make.tensors), streams)
    assert lifetimes(once)[make.numbers["made"]] == ((1, 2),)
    assert lifetimes(replace(once, batch=2))[make.numbers["made"]] == ((1, 3),)


def test_what_runs_again_is_not_alive_between() -> None:
    make = Maker()
    for name in ("a", "b", "c"):
        make.tensor(name, "activation", "f32", 4, scope="micro")
    run = [("a", None), ("b", "a"), ("c", "b"), ("a", None), ("b", "a")]
    micro = [make.run("zero", x=y) if x is None else make.run("copy", x=x, y=y) for y, x in run]
    assert lifetimes(Program(tuple(make.tensors), {"micro": tuple(micro)}))[0] == ((0, 1), (3, 4))


def test_a_tensor_that_nothing_wrote_is_refused() -> None:
    program = small_program()
    micro = tuple(one for one in program.streams["micro"] if one.op != "adaptive_pool")
    with pytest.raises(ValueError, match="mean is read by conv before anything wrote it"):
        lay_out(replace(program, streams={**program.streams, "micro": micro}))


def test_in_place_only_where_the_input_ends_there() -> None:
    make = Maker()
    for name in ("a", "b", "c"):
        make.tensor(name, "activation", "f32", 4, scope="micro")
    relu = {"lo": 0.0, "hi": 1.0, "slope": 0.0}
    first = (make.run("zero", x="a"), make.run("activation", relu, x="a", y="b"))
    program = Program(tuple(make.tensors), {"micro": first})
    assert [buffer.tensors for buffer in buffers(program)] == [(0, 1)]
    later = replace(program, streams={"micro": (*first, make.run("add", relu, a="a", b="b", y="c"))})
    assert sorted(buffer.tensors for buffer in buffers(later)) == [(0, 2), (1,)]  # a lives on, and becomes c
    same = make.run("add", relu, a="a", b="a", y="c")
    twice = replace(program, streams={"micro": (first[0], same)})
    assert len(buffers(twice)) == 2


def _moved(program: Program, name: str, to: int | None) -> Program:
    tensors = tuple(replace(tensor, offset=to) if tensor.name == name else tensor for tensor in program.tensors)
    return replace(program, tensors=tensors)


def test_a_wrong_layout_is_seen() -> None:
    program = lay_out(small_program())
    offsets = {tensor.name: tensor.offset for tensor in program.tensors}
    verify(program)
    with pytest.raises(ValueError, match=r"overlap at .* and are alive together"):
        verify(_moved(program, "mask", offsets["y"]))
    for bad in (None, -64, 1, program.arena_bytes):
        with pytest.raises(ValueError, match=r"mask at .* the arena has"):
            verify(_moved(program, "mask", bad))
    with pytest.raises(ValueError, match="the state is the first 256 bytes"):
        verify(_moved(program, "mask", 0))
    assert offsets["dz"] is not None
    with pytest.raises(ValueError, match="overlap at"):  # in place, but not exactly
        verify(_moved(program, "dz", offsets["dz"] + 64))


def test_what_no_instruction_touches_is_left_out() -> None:
    program = small_program()
    make = Maker()
    make.tensor("nobody's", "activation", "f32", 1000, scope="micro")
    shifted = replace(program, tensors=(*program.tensors, *make.tensors))
    assert lay_out(shifted).tensors == lay_out(program).tensors
