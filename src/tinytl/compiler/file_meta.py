"""The section META of a program file: names, what is learned, and what is not computed with; JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from tinytl.errors import ProgramError

from .program import ALIGN, STREAMS, Instruction, Program

PHASES = ("forward", "again", "backward", "update")
LAYOUTS = ("as-is", "OHWI", "HWC")
CARRIED = {"F32": 4, "I64": 8}
OWN = ("tensors", "layers", "phases", "blocks")
"""Keys that are made of the program itself; the others are its `meta`."""


def write_meta(program: Program, carried: Sequence[Mapping[str, Any]]) -> bytes:
    """The section; `carried` as docs/program.md has it, in the place of that of `program.meta`.

    Raises:
        ValueError: `program.meta` holds a key of this section's own, or what JSON does not have.
    """
    if set(program.meta) & set(OWN):
        raise ValueError(f"meta holds {sorted(set(program.meta) & set(OWN))}, which are made of the program itself")
    streams = {name: program.streams.get(name, ()) for name in STREAMS}
    meta = {
        **program.meta,
        "tensors": [tensor.name for tensor in program.tensors],
        "layers": {name: [one.layer for one in stream] for name, stream in streams.items()},
        "phases": {name: _runs([one.phase for one in stream]) for name, stream in streams.items()},
        "blocks": {name: _runs([one.block for one in stream]) for name, stream in streams.items()},
        "carried": list(carried),
    }
    return json.dumps(meta, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def read_meta(meta: Any, program: Program, data_bytes: int) -> tuple[Program, list[dict[str, Any]]]:
    """The program with its names and `meta`, and apart from it what is carried.

    Raises:
        ProgramError: something in it does not fit the program; the message is for the caller to complete.
    """
    if not isinstance(meta, dict) or any(key not in meta for key in (*OWN, "carried")):
        raise ProgramError(f"its META is not an object of {', '.join((*OWN, 'carried'))}")
    names = _texts(meta["tensors"], len(program.tensors), "names of tensors")
    if len(set(names)) != len(names):
        raise ProgramError("two of its tensors have one name")
    streams = {
        stream: _instructions(stream, program.streams[stream], meta["layers"], meta["phases"], meta["blocks"])
        for stream in STREAMS
    }
    tensors = tuple(replace(tensor, name=name) for tensor, name in zip(program.tensors, names, strict=True))
    rest = {key: value for key, value in meta.items() if key not in (*OWN, "carried")}
    if "learned" in rest:
        _judge_learned(rest["learned"], program)
    for key in ("delta", "train", "plan"):
        if not isinstance(rest.get(key, {}), dict):
            raise ProgramError(f"its {key} is no object")
    carried = _judge_carried(meta["carried"], data_bytes)
    return replace(program, tensors=tensors, streams=streams, meta=rest), carried


def _runs(values: Sequence[Any]) -> list[list[Any]]:
    """[value, how many times in a row] of a row of values."""
    return [[value, len(list(same))] for value, same in groupby(values)]


def _instructions(
    stream: str, instructions: Sequence[Instruction], layers: Any, phases: Any, blocks: Any
) -> tuple[Instruction, ...]:
    if not all(isinstance(found, dict) for found in (layers, phases, blocks)):
        raise ProgramError("its layers, phases or blocks are no object")
    count = len(instructions)
    layer = _texts(layers.get(stream), count, f"layers of {stream}")
    phase = _expanded(phases.get(stream), count, f"phases of {stream}")
    block = _expanded(blocks.get(stream), count, f"blocks of {stream}")
    if any(name not in PHASES for name in phase) or any(type(number) is not int for number in block):
        raise ProgramError(f"it has phases or blocks of {stream} that there are not")
    return tuple(replace(one, layer=layer[at], phase=phase[at], block=block[at]) for at, one in enumerate(instructions))


def _texts(found: Any, count: int, what: str) -> list[str]:
    if not isinstance(found, list) or len(found) != count or not all(isinstance(text, str) for text in found):
        raise ProgramError(f"its {what} are not {count} texts")
    return found


def _expanded(found: Any, count: int, what: str) -> list[Any]:
    if not isinstance(found, list):
        raise ProgramError(f"its {what} are no list")
    values: list[Any] = []
    for run in found:
        whole = isinstance(run, list) and len(run) == 2 and type(run[1]) is int and isinstance(run[0], str | int)
        if not whole or not 0 < run[1] <= count - len(values):
            raise ProgramError(f"its {what} are not {count} values")
        values += [run[0]] * run[1]
    if len(values) != count:
        raise ProgramError(f"its {what} are {len(values)} values, expected {count}")
    return values


def _judge_learned(found: Any, program: Program) -> None:
    if not isinstance(found, list):
        raise ProgramError("what it learns is no list")
    for entry in found:
        number = entry.get("tensor") if isinstance(entry, dict) else None
        if type(number) is not int or not 0 <= number < len(program.tensors):
            raise ProgramError(f"it learns the tensor {number!r}, which is not there")
        tensor = program.tensors[number]
        shape, layout = entry.get("shape"), entry.get("layout")
        fits = tensor.role == "trained" and _elements(shape) == tensor.elements
        if not fits or layout not in LAYOUTS or not isinstance(entry.get("key"), str):
            raise ProgramError(f"it learns the tensor {number} as {shape!r} ({layout!r}), which it is not")


def _judge_carried(found: Any, data_bytes: int) -> list[dict[str, Any]]:
    if not isinstance(found, list):
        raise ProgramError("what it carries is no list")
    for entry in found:
        if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
            raise ProgramError("what it carries has no key")
        offset, dtype = entry.get("offset"), str(entry.get("dtype"))
        elements = _elements(entry.get("shape"))
        size = elements * CARRIED[dtype] if dtype in CARRIED and elements >= 0 else -1
        fits = isinstance(offset, int) and offset % ALIGN == 0 and 0 <= offset <= data_bytes - size
        if not fits or size < 0 or type(entry.get("bytes")) is not int or entry["bytes"] != size:
            raise ProgramError(f"it carries {entry['key']!r} at {offset!r}, in data of {data_bytes} bytes")
    if len({entry["key"] for entry in found}) != len(found):
        raise ProgramError("it carries two tensors of one name")
    return found


def _elements(shape: Any) -> int:
    """Of a shape as JSON has it; -1 where it is none."""
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        return -1
    return math.prod(shape)
