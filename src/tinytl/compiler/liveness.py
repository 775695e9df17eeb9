"""When each tensor of a program is alive, and which tensors take over the memory of another.

Time is the row of all instructions: `begin`, `micro` and `finish` one behind the other, then `evaluate`, which runs
apart from them. A tensor is alive from the instruction that writes it whole to the last one that touches that value;
one that is written whole again (run again in backward, say) is not alive between. What `micro` takes from `begin`, or
adds to, is alive through all of `micro` where that runs more than once; likewise what a tile takes from before it, or
leaves of the whole micro-batch, through all of the tile. Resident is what outlives the streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .program import Instruction, Program

Interval = tuple[int, int]
"""First and last instruction, both included."""

IN_PLACE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "conv": ("y", ("residual",)),
    "group_norm": ("y", ("x",)),
    "affine": ("y", ("x",)),
    "activation": ("y", ("x",)),
    "add": ("y", ("a", "b")),
    "smooth": ("y", ("x",)),
    "gate": ("y", ("x",)),
    "upsample": ("y", ("residual",)),
    "dropout": ("y", ("x",)),
    "softmax_loss": ("grad", ("logits",)),
    "act_grad": ("y", ("grad",)),
    "conv_dx": ("y", ("other",)),
    "group_norm_grad": ("y", ("grad",)),
    "affine_grad": ("y", ("grad",)),
    "smooth_grad": ("y", ("grad",)),
    "gate_grad": ("y", ("grad",)),
    "avg_pool_grad": ("y", ("other",)),
    "adaptive_pool_grad": ("y", ("other",)),
    "dropout_grad": ("y", ("grad",)),
}
"""Op -> its output, and the inputs whose memory that may be; the rows of `op_table` say the same in words."""

STEP = ("begin", "micro", "finish")
ROLES_RESIDENT = ("trained", "state", "input", "metric")


@dataclass(frozen=True)
class Buffer:
    """Memory for one tensor, or for several that take over from each other in place.

    Attributes:
        tensors: their numbers.
        bytes: that it takes.
        intervals: when it is alive, in order and apart from each other.
    """

    tensors: tuple[int, ...]
    bytes: int
    intervals: tuple[Interval, ...]


def tiled_places(program: Program) -> set[int]:
    """Numbers, in the timeline, of the instructions that run in tiles."""
    begin = len(program.streams.get("begin", ()))
    return {begin + at for first, end in program.tiles for at in range(first, end)}


def timeline(program: Program) -> list[tuple[str, Instruction]]:
    """(stream, instruction) in the order of time: the step, then `evaluate`."""
    return list(program.instructions())


def resident(program: Program) -> tuple[int, ...]:
    """Numbers of the tensors of the arena that are alive through everything: the state and the batch."""
    named = {program.images, program.labels, program.logits, program.metrics, program.step_count}
    return tuple(
        number for number, tensor in enumerate(program.tensors) if tensor.role in ROLES_RESIDENT or number in named
    )


def lifetimes(program: Program) -> dict[int, tuple[Interval, ...]]:
    """When each tensor of the arena is alive that is not resident; those that no instruction touches are not there.

    Raises:
        ValueError: a tensor is read that nothing wrote before.
    """
    order = timeline(program)
    loop = [at for at, (stream, _) in enumerate(order) if stream == "micro"]
    repeats = program.micro_batch < program.batch and bool(loop)
    outlives = set(resident(program))
    found: dict[int, list[Interval]] = {}
    streams: dict[int, str] = {}  # of the last access
    for at, (stream, one) in enumerate(order):
        fresh = set(one.makes()) - set(one.reads())
        for number in dict.fromkeys((*one.reads(), *one.writes())):
            if program.tensors[number].role == "constant" or number in outlives:
                continue
            spans, before = found.setdefault(number, []), streams.get(number)
            apart = stream == "evaluate" and before != "evaluate"
            if number in fresh:
                spans.append((at, at))
            elif before is None or apart:
                raise ValueError(f"{program.tensors[number].name} is read by {one.op} before anything wrote it")
            else:
                spans[-1] = (spans[-1][0], at)
                if repeats and stream == "micro" and before == "begin":  # the next micro-batch needs it, too
                    spans[-1] = (spans[-1][0], loop[-1])
            streams[number] = stream
    tiles = [(loop[0] + first, loop[0] + end - 1) for first, end in program.tiles]
    return {
        number: _united([_through_tiles(span, program.tensors[number].scope, tiles) for span in spans])
        for number, spans in found.items()
    }


def _through_tiles(span: Interval, scope: str, tiles: Sequence[Interval]) -> Interval:
    """The span with all of each tile that another tile of the same range needs it in.

    What comes from before is there for the last tile as for the first; what has a part for each image of the
    micro-batch is being written by all of them.
    """
    first, last = span
    for begin, end in tiles:
        whole = scope == "micro" and begin <= last and first <= end
        if whole or first < begin <= last:
            first, last = min(first, begin) if whole else first, max(last, end)
    return first, last


def _united(spans: list[Interval]) -> tuple[Interval, ...]:
    """The same times in order, those that overlap as one."""
    found: list[Interval] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)


def buffers(program: Program, times: Mapping[int, tuple[Interval, ...]] | None = None) -> list[Buffer]:
    """The tensors that come and go as buffers: in place wherever an instruction can and its input ends there.

    To share memory is never worse: both would be alive at that instruction otherwise.
    """
    times = lifetimes(program) if times is None else times
    sizes = arena_bytes(program)
    root = {number: number for number in times}
    members = {number: [number] for number in times}
    spans = dict(times)

    def top(number: int) -> int:
        while root[number] != number:
            number = root[number]
        return number

    within = tiled_places(program)
    for at, (_, one) in enumerate(timeline(program)):
        taken = _takes_over(program, one, times)
        for source, target in taken:
            if at in within and program.tensors[source].scope != "tile":
                continue  # the next tile's part of the input is still to come
            a, b = top(source), top(target)
            if a == b or not _meet_only(spans[a], spans[b], at):
                continue
            root[b] = a
            members[a] += members.pop(b)
            spans[a] = _united([*spans[a], *spans[b]])
            break
    return [Buffer(tuple(held), sizes[number], spans[number]) for number, held in members.items()]


def _takes_over(program: Program, one: Instruction, times: Mapping[int, tuple[Interval, ...]]) -> list[tuple[int, int]]:
    """(input, output) of an instruction that may share memory by what they are; not yet by when they are alive."""
    output, inputs = IN_PLACE.get(one.op, ("", ()))
    target = one.operand(output) if output else None
    if target is None or target not in times:
        return []
    found = []
    for name in inputs:
        source = one.operand(name)
        if source is None or source not in times or list(one.operands).count(source) > 1:
            continue
        a, b = program.tensors[source], program.tensors[target]
        if (a.dtype, a.scope, a.image_bytes) == (b.dtype, b.scope, b.image_bytes):
            found.append((source, target))
    return found


def _meet_only(a: tuple[Interval, ...], b: tuple[Interval, ...], at: int) -> bool:
    """Whether two buffers are never alive together but for the instruction where `b` takes over from `a`."""
    together = [(max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b if max(x[0], y[0]) <= min(x[1], y[1])]
    return together == [(at, at)] and any(last == at for _, last in a) and any(first == at for first, _ in b)


def arena_bytes(program: Program) -> dict[int, int]:
    """Bytes of each tensor that some instruction touches: the more of what the step and `evaluate` put there."""
    found: dict[int, int] = {}
    for stream, one in program.instructions():
        evaluate = stream == "evaluate"
        for number in one.operands:
            if number is not None:
                size = program.tensors[number].bytes(program, evaluate)
                found[number] = max(found.get(number, 0), size)
    return found
