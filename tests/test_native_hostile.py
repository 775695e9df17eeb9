"""Programs with a right hash that would lead a kernel out of its memory are refused when they are opened."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tinytl.compiler.program import Instruction, Program, Tensor
from tinytl.errors import InputError, ProgramError
from tinytl.runtime import Executor

from .native import needs_executor, rehashed, section, small_file, written
from .small_program import small_program, small_tiled

pytestmark = needs_executor


def number_of(program: Program, name: str) -> int:
    return next(number for number, tensor in enumerate(program.tensors) if tensor.name == name)


def with_operands(program: Program, op: str, **operands: int) -> Program:
    """The program with other operands of that op in 'micro'."""

    def changed(one: Instruction) -> Instruction:
        return one.with_operands(**operands) if one.op == op else one

    return replace(program, streams={**program.streams, "micro": tuple(map(changed, program.streams["micro"]))})


def with_tensor(program: Program, tensor: Tensor) -> tuple[Program, int]:
    return replace(program, tensors=(*program.tensors, tensor)), len(program.tensors)


def other_labels(program: Program) -> Program:
    program, other = with_tensor(program, Tensor("indices", "input", "i32", (), "batch"))
    return with_operands(program, "softmax_loss", labels=other)


def other_metrics(program: Program) -> Program:
    program, other = with_tensor(program, Tensor("elsewhere", "metric", "f64", (2,)))
    return with_operands(program, "softmax_loss", metrics=other)


def loss_in_evaluate(program: Program) -> Program:
    loss = next(one for one in program.streams["micro"] if one.op == "softmax_loss")
    loss = loss.with_operands(logits=program.logits, grad=program.logits)
    return replace(program, streams={**program.streams, "evaluate": (*program.streams["evaluate"], loss)})


def image_of_one_axis(program: Program) -> Program:
    """(C) in the place of (1, 1, C), which the kernel would take for a height."""
    tensors = list(program.tensors)
    for name in ("logits", "dlogits"):
        at = number_of(program, name)
        tensors[at] = replace(tensors[at], shape=tensors[at].shape[2:])
    return replace(program, tensors=tuple(tensors))


def scaled_by(name: str) -> Callable[[Program], Program]:
    """That tensor stands beside the weight of each convolution, the first of which has 5 output channels."""
    return lambda program: with_operands(program, "conv", table=number_of(program, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled_by("scale"), "table has another number of elements"),
        (scaled_by("conv.weight"), "table has another number of elements"),
        (scaled_by("x"), "table is not of scope 'fixed'"),
        (scaled_by("step"), "table is of another type"),
        (other_labels, "labels.*is not the batch's"),
        (other_metrics, "metrics.*is not the step's"),
        (loss_in_evaluate, "labels.*are not known in 'evaluate'"),
        (image_of_one_axis, r"has no shape \(H, W, C\)"),
    ],
)
def test_what_would_leave_its_memory_is_refused(
    change: Callable[[Program], Program], message: str, tmp_path: Path
) -> None:
    path = written(change(small_program()), tmp_path / "changed.ttl")
    with pytest.raises(ProgramError, match=message):
        Executor(path)


@pytest.mark.parametrize(
    ("back", "value", "message"),
    [
        (6, 3, "the images of a tile is 3 .* expected 1 to 2"),
        (5, 11, "the number of tiles is 11"),
        (4, 1, "instruction 0 of 'micro' is in no tile, and tensor"),
        (3, 0, "a tile's end is 0"),
        (2, 2, "a tile's first instruction is 2"),
        (1, 11, "a tile's end is 11"),
        (1, 9, "instruction 9 of 'micro' is in no tile, and tensor"),
    ],
)
def test_hostile_tiles_are_refused(back: int, value: int, message: str, tmp_path: Path) -> None:
    """The words before the end of CODE: the images of a tile, 2 (tiles), 0, 3, 8, 10."""
    path = written(small_tiled(), tmp_path / "tiled.ttl")
    content = path.read_bytes()
    Executor(path).close()
    offset, size = section(content, b"CODE")
    at = offset + size - 8 * back
    path.write_bytes(rehashed(content[:at] + struct.pack("<q", value) + content[at + 8 :]))
    with pytest.raises(ProgramError, match=message):
        Executor(path)


def test_sides_that_the_scratch_memory_does_not_hold_are_refused(tmp_path: Path) -> None:
    program = small_program(batch=1, micro_batch=1, side=6, channels=1)
    tensors = [
        replace(tensor, shape=(9000, 1, tensor.shape[2])) if tensor.shape[:2] == (6, 6) else tensor
        for tensor in program.tensors
    ]
    path = written(replace(program, tensors=tuple(tensors)), tmp_path / "long.ttl")
    with pytest.raises(ProgramError, match="has a side of more than 8192 pixels"):
        Executor(path)


def test_labels_behind_the_count_are_looked_at_too(tmp_path: Path) -> None:
    with Executor(small_file(tmp_path)) as executor:
        executor.labels[1] = -1
        with pytest.raises(InputError, match="label"):
            executor.run("micro", 0, len(executor.instructions("micro")), images=2, count=1)
