"""One arena for all that a step needs beside its constants: an offset for every tensor, by when each is alive.

    [ trained tensors, optimizer's state | the batch, metrics, logits | what comes and goes | the threads' scratch ]

`tinytl.compiler.packing` packs what comes and goes; `verify` holds a layout against when tensors are alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .liveness import IN_PLACE, Interval, arena_bytes, buffers, lifetimes, resident, tiled_places, timeline
from .packing import aligned, bound, pack
from .program import ALIGN, SCRATCH_PER_THREAD, Program, Tensor


def lay_out(program: Program, threads: int = 2) -> Program:
    """The program with an offset for every tensor, and without those that no instruction touches.

    Offsets of constants, and of the first values of what trains, are in the file's data.

    Args:
        program: all its streams are there.
        threads: for how many the arena has scratch memory.

    Raises:
        ValueError: a tensor is read that nothing wrote before.
    """
    program = without_unused(program)
    state, batch = _state(program), _batch(program)
    offsets: dict[int, int] = {}
    end = _stack(program, state, offsets, 0)
    state_bytes = end
    end = _stack(program, batch, offsets, end)
    held = buffers(program)
    packing = pack(held, _span(program))
    for buffer, offset in zip(held, packing.offsets, strict=True):
        offsets.update(dict.fromkeys(buffer.tensors, end + offset))
    total = end + packing.bytes + threads * SCRATCH_PER_THREAD
    offsets.update(_data(program, "constant"))
    initial = _data(program, "trained", constant_bytes(program))
    tensors = tuple(
        replace(tensor, offset=offsets.get(n), initial=initial.get(n)) for n, tensor in enumerate(program.tensors)
    )
    laid_out = replace(program, tensors=tensors, arena_bytes=total, state_bytes=state_bytes, threads=threads)
    verify(laid_out)
    return laid_out


def least_bytes(program: Program, threads: int = 2) -> int:
    """What no layout of the arena takes less than; quick, for choosing among many programs."""
    fixed: dict[int, int] = {}
    end = _stack(program, _batch(program), fixed, _stack(program, _state(program), fixed, 0))
    return end + bound(buffers(program)) + threads * SCRATCH_PER_THREAD


def _span(program: Program) -> Interval | None:
    """First and last instruction of `micro`, through which gradients accumulate."""
    places = [at for at, (stream, _) in enumerate(timeline(program)) if stream == "micro"]
    return (places[0], places[-1]) if places else None


def constant_bytes(program: Program) -> int:
    """Bytes of all constants, with which the file's data begins: what stays mapped while it trains."""
    return sum(aligned(tensor.bytes(program)) for tensor in program.tensors if tensor.role == "constant")


def data_bytes(program: Program) -> int:
    """The same with the first values of what trains."""
    trained = (aligned(program.tensors[number].bytes(program)) for number in program.trained)
    return constant_bytes(program) + sum(trained)


def _data(program: Program, role: str, at: int = 0) -> dict[int, int]:
    """Offsets of the tensors of one role in the file's data, one behind the other from `at` on."""
    offsets: dict[int, int] = {}
    _stack(program, [n for n, tensor in enumerate(program.tensors) if tensor.role == role], offsets, at)
    return offsets


def _state(program: Program) -> list[int]:
    return [n for n, tensor in enumerate(program.tensors) if tensor.role in ("trained", "state")]


def _batch(program: Program) -> list[int]:
    return [n for n in resident(program) if program.tensors[n].role not in ("trained", "state", "constant")]


def _stack(program: Program, numbers: Iterable[int], offsets: dict[int, int], at: int) -> int:
    """Put tensors one behind the other from `at` on; return where the last one ends."""
    for number in numbers:
        offsets[number] = at
        at = aligned(at + program.tensors[number].bytes(program))
    return at


def without_unused(program: Program) -> Program:
    """The program without the tensors that no instruction touches, but for those it names itself; numbers close up."""
    kept = {number for _, one in program.instructions() for number in one.operands if number is not None}
    kept |= {*resident(program), *program.trained}
    if len(kept) == len(program.tensors):
        return program
    numbers = {old: new for new, old in enumerate(sorted(kept))}

    def of(number: int | None) -> int | None:
        return None if number is None else numbers[number]

    streams = {
        stream: tuple(replace(one, operands=tuple(of(number) for number in one.operands)) for one in instructions)
        for stream, instructions in program.streams.items()
    }
    meta: dict[str, Any] = dict(program.meta)
    if "learned" in meta:
        meta["learned"] = [{**entry, "tensor": numbers[entry["tensor"]]} for entry in meta["learned"]]
    return replace(
        program,
        tensors=tuple(program.tensors[old] for old in sorted(kept)),
        streams=streams,
        images=of(program.images),
        labels=of(program.labels),
        logits=of(program.logits),
        metrics=of(program.metrics),
        step_count=of(program.step_count),
        gradients={numbers[a]: numbers[b] for a, b in program.gradients.items() if a in numbers and b in numbers},
        values={numbers[old]: value for old, value in program.values.items() if old in numbers},
        meta=meta,
    )


def verify(program: Program) -> None:
    """Hold a layout against when tensors are alive.

    Raises:
        ValueError: two tensors overlap that are alive together and of which neither takes over from the other in place;
            one takes over at another offset; one lies outside the arena, in its scratch memory, or not aligned.
    """
    assert program.arena_bytes is not None
    assert program.state_bytes is not None
    end = program.arena_bytes - program.threads * SCRATCH_PER_THREAD
    times: dict[int, tuple[Interval, ...]] = dict(lifetimes(program))
    length = len(timeline(program))
    times.update({n: ((0, length),) for n in resident(program) if program.tensors[n].role != "constant"})
    sizes = {n: program.tensors[n].bytes(program) for n in times} | {
        n: size for n, size in arena_bytes(program).items() if n in times
    }
    places: list[tuple[int, int, int]] = []
    for number in times:
        tensor = program.tensors[number]
        if tensor.offset is None or tensor.offset % ALIGN or tensor.offset < 0 or tensor.offset + sizes[number] > end:
            raise ValueError(f"{tensor.name} at {tensor.offset} with {sizes[number]} bytes: the arena has {end}")
        if (tensor.role in ("trained", "state")) != (tensor.offset < program.state_bytes):
            raise ValueError(f"{tensor.name} at {tensor.offset}: the state is the first {program.state_bytes} bytes")
        if sizes[number]:
            places.append((tensor.offset, tensor.offset + sizes[number], number))
    places.sort()
    handed = _handed_over(program)
    for index, (_, stop, a) in enumerate(places):
        for start, _, b in places[index + 1 :]:
            if start >= stop:
                break
            shared = [(x, y) for x in times[a] for y in times[b] if max(x[0], y[0]) <= min(x[1], y[1])]
            if shared and not _exact(program.tensors[a], program.tensors[b], (a, b), shared, handed):
                names = f"{program.tensors[a].name} and {program.tensors[b].name}"
                raise ValueError(f"{names} overlap at {start} and are alive together")


def _handed_over(program: Program) -> dict[tuple[int, int], set[int]]:
    """(input, output) -> the instructions at which the output may take over the input's memory."""
    found: dict[tuple[int, int], set[int]] = {}
    within = tiled_places(program)
    for at, (_, one) in enumerate(timeline(program)):
        output, inputs = IN_PLACE.get(one.op, ("", ()))
        target = one.operand(output) if output else None
        for source in (one.operand(name) for name in inputs):
            if source is None or target is None or list(one.operands).count(source) > 1:
                continue
            if at not in within or program.tensors[source].scope == "tile":
                found.setdefault((source, target), set()).add(at)
    return found


def _exact(
    a: Tensor,
    b: Tensor,
    numbers: tuple[int, int],
    shared: Sequence[tuple[Interval, Interval]],
    handed: Mapping[tuple[int, int], set[int]],
) -> bool:
    """Whether two tensors meet only where the one takes over the other's memory, element by element."""
    if (a.offset, a.dtype, a.scope, a.image_bytes) != (b.offset, b.dtype, b.scope, b.image_bytes):
        return False
    for x, y in shared:
        forth = x[1] == y[0] and y[0] in handed.get(numbers, ())
        back = y[1] == x[0] and x[0] in handed.get((numbers[1], numbers[0]), ())
        if not (forth or back):
            return False
    return True
