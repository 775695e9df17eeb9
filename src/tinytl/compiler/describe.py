"""A program as planning sees a step (`tinytl.memory.description`), so that the lab's views by role and over time serve.

The step is `begin`, `micro` once, and `finish`. Each buffer of the arena is one storage for as long as it is alive,
whatever tensors take it over from each other; the threads' scratch memory is the workspace of every instruction.
"""

from __future__ import annotations

from tinytl.memory.description import Operation, StepDescription, Storage

from .cost import multiply_adds
from .liveness import STEP, Buffer, buffers, resident, timeline
from .packing import aligned
from .program import SCRATCH_PER_THREAD, Program

_RESIDENT = {"constant": "weight", "trained": "weight", "state": "optimizer state", "input": "input"}
_PHASES = {"forward": "forward", "again": "backward", "backward": "backward", "update": "update"}


def describe(program: Program) -> StepDescription:
    """The operations of one micro-batch's step in order, and the storages that they read and make."""
    order = [(stream, one) for stream, one in timeline(program) if stream in STEP]
    count = len(order)
    storages: list[Storage] = []
    places: dict[int, list[tuple[int, int, int]]] = {}  # tensor -> (first, last, storage)
    fixed = resident(program)
    constants = tuple(n for n, tensor in enumerate(program.tensors) if tensor.role == "constant")
    for number in dict.fromkeys((*constants, *fixed)):
        tensor = program.tensors[number]
        role = _RESIDENT.get(tensor.role, "working")
        places[number] = [(0, count, len(storages))]
        storages.append(Storage(aligned(tensor.bytes(program)), role, _layer(tensor.name), -1, None))
    backward = next((at for at, (_, one) in enumerate(order) if one.phase in ("again", "backward")), count)
    for buffer in buffers(program):
        for first, last in buffer.intervals:
            if first >= count:
                continue
            role = _role(program, buffer, first < backward <= last)
            for number in buffer.tensors:
                places.setdefault(number, []).append((first, last, len(storages)))
            storages.append(Storage(aligned(buffer.bytes), role, order[first][1].layer, first, min(last + 1, count)))
    operations = tuple(
        Operation(
            one.op,
            _PHASES[one.phase],
            one.layer,
            tuple(_storage(places[number], at) for number in one.reads()),
            tuple(_storage(places[number], at) for number in one.writes()),
            program.threads * SCRATCH_PER_THREAD,
            multiply_adds(program, one) * program.micro_batch,
        )
        for at, (_, one) in enumerate(order)
    )
    # what dies behind the last operation is alive after it
    held = tuple(
        Storage(s.bytes, s.role, s.layer, s.born, None if s.dies is not None and s.dies >= count else s.dies)
        for s in storages
    )
    return StepDescription(operations, held)


def _role(program: Program, buffer: Buffer, crosses: bool) -> str:
    """What a buffer is for; `crosses`: it is alive from forward into backward."""
    roles = {program.tensors[number].role for number in buffer.tensors}
    if "gradient" in roles:
        return "gradient"
    return "kept" if crosses else "working"


def _storage(found: list[tuple[int, int, int]], at: int) -> int:
    return next(storage for first, last, storage in found if first <= at <= last)


def _layer(name: str) -> str:
    return name.split("/")[0].split(":")[0].rpartition(".")[0]
