"""The bytes of a program that is laid out, by what they are for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .arena import constant_bytes
from .liveness import buffers, resident, timeline
from .packing import aligned
from .program import ROLES, SCRATCH_PER_THREAD, Program


def live_bytes(program: Program) -> dict[str, np.ndarray]:
    """For each role of the arena, (instructions,) int64: bytes alive while each instruction runs.

    Instructions are those of `tinytl.compiler.liveness.timeline`: the step's, then evaluation's. A buffer that one
    tensor takes over from another counts once, as the role that the tensor has that is alive last.
    """
    count = len(timeline(program))
    found = {role: np.zeros(count, np.int64) for role in ROLES if role != "constant"}
    for number in resident(program):
        tensor = program.tensors[number]
        if tensor.role != "constant":
            found[tensor.role] += aligned(tensor.bytes(program))
    for buffer in buffers(program):
        role = program.tensors[buffer.tensors[-1]].role
        for first, last in buffer.intervals:
            found[role][first : last + 1] += aligned(buffer.bytes)
    found["scratch"] += program.threads * SCRATCH_PER_THREAD
    return found


def bytes_by_role(program: Program) -> dict[str, int]:
    """Bytes of each role at the instruction of the step where most of the arena is alive; constants apart; all of it.

    Keys: the roles, 'constant' (mapped, not in the arena), 'between' (of the arena, but alive at no tensor then: what
    packing could not fill) and 'arena'.
    """
    assert program.arena_bytes is not None
    live = live_bytes(program)
    total = sum(live.values(), np.zeros(len(timeline(program)), np.int64))
    peak = int(total.argmax())
    found = {role: int(values[peak]) for role, values in live.items()}
    return {
        "constant": constant_bytes(program),
        **found,
        "between": program.arena_bytes - int(total[peak]),
        "arena": program.arena_bytes,
    }


def peak_instruction(program: Program, live: Mapping[str, np.ndarray] | None = None) -> int:
    """Number, in the timeline, of the instruction at which most is alive."""
    live = live_bytes(program) if live is None else live
    return int(sum(live.values(), np.zeros(len(timeline(program)), np.int64)).argmax())
