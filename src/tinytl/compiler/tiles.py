"""Tiles: parts of a micro-batch's step that run a few of its images at a time.

The first layers of a network have its largest images and its fewest weights, the last ones the reverse. So the first
run an image at a time, in forward and again in backward, and what is between them runs for a whole micro-batch, whose
weights are then brought into the kernels' order once for all its images:

    forward of the first layers, tile by tile  ->  the others, loss, their backward  ->  backward of the first, by tiles

What is made and used within a tile has the scope 'tile', memory for that tile alone; what crosses its border has memory
for the whole micro-batch. Nothing else changes but the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .program import Instruction, Program

Range = tuple[int, int]
"""First instruction, and the one behind the last."""


def early_ranges(program: Program, is_early: Callable[[Instruction], bool]) -> tuple[Range, ...]:
    """The ranges of `micro`, in forward and in backward, that hold all instructions of some first layers.

    Args:
        program: a training step.
        is_early: whether an instruction belongs to these layers.
    """
    micro = program.streams["micro"]
    loss = next(at for at, one in enumerate(micro) if one.op == "softmax_loss")
    early = [at for at, one in enumerate(micro) if one.phase != "update" and is_early(one)]
    forward, backward = [at for at in early if at < loss], [at for at in early if at > loss]
    ranges = [(0, forward[-1] + 1)] if forward else []
    if backward:
        ranges.append((backward[0], backward[-1] + 1))
    return tuple(ranges)


def tiled(program: Program, ranges: Sequence[Range], images: int) -> Program:
    """The step with these ranges of `micro` run `images` at a time.

    Zeros and updates stand once a micro-batch, and not once a tile: those in a range are moved before it, or behind.

    Raises:
        ValueError: ranges that overlap or are not in order, or a tile of more images than a micro-batch.
    """
    if not 1 <= images <= program.micro_batch:
        raise ValueError(f"tiles of {images} images: expected 1 to {program.micro_batch}, the micro-batch")
    micro = program.streams["micro"]
    row: list[Instruction] = []
    tiles: list[Range] = []
    end = 0
    for first, behind in ranges:
        if not end <= first < behind <= len(micro):
            raise ValueError(f"tiles {list(ranges)}: expected ranges of {len(micro)} instructions in order and apart")
        inside = micro[first:behind]
        zeros = [one for one in inside if one.op == "zero"]
        body = [one for one in inside if one.phase != "update"]
        row += [*micro[end:first], *zeros]
        tiles.append((len(row), len(row) + len(body)))
        row += [*body, *(one for one in inside if one.phase == "update" and one.op != "zero")]
        end = behind
    row += micro[end:]
    within = _within_one(row, tiles)
    tensors = tuple(
        replace(tensor, scope="tile") if number in within and tensor.scope == "micro" else tensor
        for number, tensor in enumerate(program.tensors)
    )
    streams = {**program.streams, "micro": tuple(row)}
    return replace(program, tensors=tensors, streams=streams, tile_images=images, tiles=tuple(tiles))


def _within_one(row: Sequence[Instruction], tiles: Sequence[Range]) -> set[int]:
    """Tensors that instructions of one range touch, and no others."""
    places = [next((n for n, (first, end) in enumerate(tiles) if first <= at < end), None) for at in range(len(row))]
    found: dict[int, set[int | None]] = {}
    for place, one in zip(places, row, strict=True):
        for number in one.operands:
            if number is not None:
                found.setdefault(number, set()).add(place)
    return {number for number, touched in found.items() if len(touched) == 1 and None not in touched}
