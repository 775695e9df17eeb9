"""What a program is, in words and as plain data: for `tinytl compile` and `tinytl inspect`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .arena import constant_bytes
from .by_role import bytes_by_role, peak_instruction
from .cost import multiply_adds
from .liveness import arena_bytes, lifetimes, resident, timeline
from .plan import stretch_names, total_bytes
from .program import STREAMS, Program

_ROLES = {
    "constant": "frozen weights, mapped from the file",
    "trained": "what trains",
    "state": "the optimizer's state",
    "gradient": "gradients",
    "input": "the batch",
    "activation": "activations",
    "mask": "masks",
    "derived": "weights made of trained ones",
    "metric": "metrics",
    "scratch": "the threads' scratch",
    "between": "unused between tensors",
}


def record(program: Program) -> dict[str, Any]:
    """What a program that is laid out is, as plain data that JSON has."""
    order = timeline(program)
    stream, one = order[peak_instruction(program)]
    delta = program.meta.get("delta", {})
    return {
        "backbone": delta.get("backbone"),
        "norm": delta.get("norm"),
        "method": delta.get("method", {}).get("name"),
        "classes": delta.get("classes"),
        "resolution": _side(program),
        "batch": program.batch,
        "micro_batch": program.micro_batch,
        "evaluate_images": program.evaluate_images,
        "tile_images": program.tile_images if program.tiles else None,
        "threads": program.threads,
        "arena_bytes": program.arena_bytes,
        "state_bytes": program.state_bytes,
        "constant_bytes": constant_bytes(program),
        "total_bytes": total_bytes(program),
        "peak": {"stream": stream, "op": one.op, "layer": one.layer, "phase": one.phase},
        "bytes": bytes_by_role(program),
        "instructions": {name: len(program.streams.get(name, ())) for name in STREAMS},
        "operations": operations(program),
        "trained_values": sum(program.tensors[number].elements for number in program.trained),
        "multiply_adds": step_multiply_adds(program),
        "plan": program.meta.get("plan", {}),
        "train": program.meta.get("train", {}),
    }


def operations(program: Program) -> dict[str, int]:
    """How many instructions of each kind there are, the most frequent first."""
    found = Counter(one.op for _, one in program.instructions())
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def step_multiply_adds(program: Program) -> int:
    """Of a step on a whole batch."""
    return sum(multiply_adds(program, one) * program.batch for one in program.streams.get("micro", ()))


def arena_map(program: Program) -> list[dict[str, Any]]:
    """Every tensor of the arena: name, role, type, shape, offset, bytes, and for which instructions it is alive."""
    sizes, times, count = arena_bytes(program), lifetimes(program), len(timeline(program))
    always = set(resident(program))
    return [
        {
            "tensor": number,
            "name": tensor.name,
            "role": tensor.role,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "scope": tensor.scope,
            "offset": tensor.offset,
            "bytes": tensor.bytes(program) if number in always else sizes.get(number, 0),
            "alive": [[0, count - 1]] if number in always else [list(span) for span in times.get(number, ())],
        }
        for number, tensor in enumerate(program.tensors)
        if tensor.role != "constant"
    ]


def instruction_rows(program: Program) -> Iterator[dict[str, Any]]:
    """Every instruction: its number in time, stream, op, phase, layer, and what it reads and writes by name."""
    for at, (stream, one) in enumerate(timeline(program)):
        yield {
            "at": at,
            "stream": stream,
            "op": one.op,
            "phase": one.phase,
            "layer": one.layer,
            "operands": {
                name: program.tensors[number].name
                for number, (name, _, _) in zip(one.operands, one.kind.operands, strict=True)
                if number is not None
            },
            "attributes": {name: _plain(value) for name, value in one.attributes.items()},
        }


def title(program: Program) -> str:
    """One line on what it trains."""
    found = record(program)
    what = " ".join(str(found[key]) for key in ("backbone", "norm") if found[key]) or "a network"
    classes = "" if found["classes"] is None else f", {len(found['classes'])} classes"
    return (
        f"{what}, {found['method'] or 'trained in part'}, {_side(program)} px, batch {program.batch}{classes}, "
        f"{program.threads} threads"
    )


def role_rows(program: Program) -> list[dict[str, Any]]:
    """[{"role", "bytes"}] at the step's peak, and what they add up to."""
    found = bytes_by_role(program)
    rows = [{"role": words, "bytes": found[role]} for role, words in _ROLES.items() if found[role]]
    rows.append({"role": "all of it: the arena and the frozen weights", "bytes": total_bytes(program)})
    return rows


def chosen_lines(program: Program) -> list[str]:
    """How the step is taken, and why, a line each."""
    plan: Mapping[str, Any] = program.meta.get("plan", {})
    pieces = math.ceil(program.batch / program.micro_batch)
    budget, again = plan.get("budget_bytes"), plan.get("again", [])
    why = (
        "as little memory as costs no time: no budget was given"
        if budget is None
        else f"the fastest way that fits {budget / 1e6:.2f} MB"
    )
    lines = [
        f"the batch of {program.batch} in one piece"
        if pieces == 1
        else f"the batch of {program.batch} as {pieces} micro-batches of {program.micro_batch}"
    ]
    lines[0] += f": {why}"
    if early := plan.get("tiled", []):
        lines.append(f"{program.tile_images} at a time, in tiles of a micro-batch: {stretch_names(early)}")
    if again:
        share = plan.get("again_multiply_adds", 0) * program.batch / max(step_multiply_adds(program), 1)
        lines.append(f"run again in backward and not kept: {stretch_names(again)} (up to {share:.0%} of a step)")
    if plan.get("updates") == "backward":
        lines.append("each parameter updated in backward, as soon as its gradient is complete")
    counts = ", ".join(f"{len(program.streams.get(name, ()))} {name}" for name in STREAMS)
    one = timeline(program)[peak_instruction(program)][1]
    lines.append(f"instructions: {counts}; the peak is at {one.layer or one.op} ({one.op}, {one.phase})")
    return lines


def _side(program: Program) -> int | None:
    return None if program.images is None else program.tensors[program.images].shape[0]


def _plain(value: float) -> float | None:
    """Infinity, which JSON does not have, is None: an activation without that bound."""
    return value if math.isfinite(value) else None
