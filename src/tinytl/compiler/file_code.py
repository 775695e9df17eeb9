"""The section CODE of a program file: tensors and instructions as a row of 64-bit words."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tinytl.errors import ProgramError

from .op_table import BY_CODE
from .program import ALIGN, DTYPES, ROLES, SCOPES, SCRATCH_PER_THREAD, STREAMS, Instruction, Program, Tensor

CODE_VERSION = 2
MAX_RANK = 6
TENSOR_WORDS = 12
MAX_BYTES = 1 << 40
MAX_IMAGES = 1 << 20
MAX_THREADS = 1024
NAMED = ("images", "labels", "logits", "metrics", "step_count")
_DTYPES = tuple(DTYPES)


class NewerError(ProgramError):
    """Nothing is wrong with the file: a later tinytl wrote it."""


def write_code(program: Program) -> bytes:
    """A program that is laid out, in words.

    Raises:
        ValueError: it is not laid out, or lacks one of the tensors that it must name.
    """
    numbers = [getattr(program, name) for name in NAMED]
    if program.arena_bytes is None or program.state_bytes is None or None in numbers:
        raise ValueError(f"the program is not laid out, or has none of {', '.join(NAMED)}")
    images, logits = program.tensors[numbers[0]], program.tensors[numbers[2]]
    words = [CODE_VERSION, program.batch, program.micro_batch, program.evaluate_images, program.threads]
    words += [*images.shape[:2], logits.shape[-1], program.arena_bytes, program.state_bytes]
    words += [program.arena_bytes - program.threads * SCRATCH_PER_THREAD, *numbers, len(program.tensors)]
    for tensor in program.tensors:
        if tensor.offset is None or len(tensor.shape) > MAX_RANK:
            raise ValueError(f"{tensor.name} {tensor.shape} at {tensor.offset} is not laid out, or of too many axes")
        words += [ROLES.index(tensor.role), _DTYPES.index(tensor.dtype), SCOPES.index(tensor.scope), len(tensor.shape)]
        words += [*tensor.shape, *(1 for _ in range(MAX_RANK - len(tensor.shape))), tensor.offset]
        words.append(-1 if tensor.initial is None else tensor.initial)
    for stream in STREAMS:
        instructions = program.streams.get(stream, ())
        words.append(len(instructions))
        for one in instructions:
            words += [one.kind.code, len(one.operands), *(-1 if n is None else n for n in one.operands)]
            words.append(len(one.kind.attributes))
            words += [_bits(one.attributes[name]) for name, _ in one.kind.attributes]
    words += [program.tile_images, len(program.tiles), *(at for tile in program.tiles for at in tile)]
    return np.array(words, dtype="<i8").tobytes()


def read_code(code: bytes, data_bytes: int) -> Program:
    """The program that these words say, without names and values.

    Raises:
        ProgramError: they say none; the message begins with what is wrong and is for the caller to complete.
    """
    if len(code) % 8:
        raise ProgramError("its CODE is cut short")
    words = _Words(np.frombuffer(code, dtype="<i8").tolist())
    version = words.take("version")
    if version != CODE_VERSION:
        error = NewerError if version > CODE_VERSION else ProgramError
        raise error(f"its CODE is of version {version}, expected {CODE_VERSION}")
    batch = words.take("batch", 1, MAX_IMAGES)
    micro = words.take("micro_batch", 1, batch)
    evaluate = words.take("evaluate_images", 1, batch)
    threads = words.take("threads", 1, MAX_THREADS)
    height, width, classes = (words.take(what, 1, MAX_BYTES) for what in ("height", "width", "classes"))
    arena = words.take("arena_bytes", 0, MAX_BYTES)
    state = words.take("state_bytes", 0, arena)
    scratch = words.take("scratch_offset", state, arena)
    if scratch != arena - threads * SCRATCH_PER_THREAD:
        raise ProgramError(f"its scratch memory begins at {scratch}, expected {threads} threads' before {arena}")
    named = [words.take(name, 0) for name in NAMED]
    count = words.take("tensors", 0, words.left // TENSOR_WORDS)
    if any(number >= count for number in named):
        raise ProgramError(f"it names the tensors {named}, and has {count}")
    found = [_tensor(words, number) for number in range(count)]
    streams = {stream: tuple(_instructions(words, found)) for stream in STREAMS}
    tile_images = words.take("tile_images", 1, micro)
    tiles = tuple(_tiles(words, len(streams["micro"])))
    if words.left:
        raise ProgramError(f"{words.left} words of CODE are left over")
    program = Program(
        tensors=tuple(found),
        streams=streams,
        batch=batch,
        micro_batch=micro,
        evaluate_images=evaluate,
        tile_images=tile_images,
        tiles=tiles,
        **dict(zip(NAMED, named, strict=True)),
        gradients=_gradients(streams),
        arena_bytes=arena,
        state_bytes=state,
        threads=threads,
    )
    _judge_tiles(program)
    _judge_places(program, data_bytes)
    _judge_named(program, (height, width, classes))
    return program


class _Words:
    """A row of words, taken one after the other."""

    def __init__(self, words: list[int]) -> None:
        self._words, self._at = words, 0

    @property
    def left(self) -> int:
        return len(self._words) - self._at

    def take(self, what: str, least: int | None = None, most: int | None = None) -> int:
        if not self.left:
            raise ProgramError(f"its CODE ends before {what}")
        word = self._words[self._at]
        if (least is not None and word < least) or (most is not None and word > most):
            raise ProgramError(f"its {what} is {word}, expected {least} to {most if most is not None else 'any'}")
        self._at += 1
        return word


def _tensor(words: _Words, number: int) -> Tensor:
    what = f"tensor {number}"
    role = ROLES[words.take(f"role of {what}", 0, len(ROLES) - 1)]
    dtype = _DTYPES[words.take(f"dtype of {what}", 0, len(_DTYPES) - 1)]
    scope = SCOPES[words.take(f"scope of {what}", 0, len(SCOPES) - 1)]
    rank = words.take(f"rank of {what}", 0, MAX_RANK)
    dims = [words.take(f"shape of {what}", 0, MAX_BYTES) for _ in range(MAX_RANK)]
    offset = words.take(f"offset of {what}", 0, MAX_BYTES)
    initial = words.take(f"initial of {what}", -1, MAX_BYTES)
    if math.prod(dims[:rank]) > MAX_BYTES or (dtype == "bits" and not rank):
        raise ProgramError(f"the shape of {what} is {dims[:rank]}")
    return Tensor(what, role, dtype, tuple(dims[:rank]), scope, offset, None if initial < 0 else initial)


def _instructions(words: _Words, tensors: list[Tensor]) -> list[Instruction]:
    found = []
    for at in range(words.take("instructions", 0, words.left // 3)):
        code = words.take("op")
        kind = BY_CODE.get(code)
        if kind is None:
            raise ProgramError(f"instruction {at} is of kind {code}, which this version does not know")
        words.take(f"operands of {kind.name}", len(kind.operands), len(kind.operands))
        operands: list[int | None] = []
        for name, mode, optional in kind.operands:
            number = words.take(f"{name} of {kind.name}", -1 if optional else 0, len(tensors) - 1)
            if number >= 0 and mode != "in" and tensors[number].role == "constant":
                raise ProgramError(f"{kind.name} writes to a constant, tensor {number}")
            operands.append(None if number < 0 else number)
        words.take(f"attributes of {kind.name}", len(kind.attributes), len(kind.attributes))
        attributes: dict[str, Any] = {}
        for name, type_ in kind.attributes:
            value = struct.unpack("<d", struct.pack("<q", words.take(f"{name} of {kind.name}")))[0]
            if math.isnan(value) or (type_ == "i" and not (value.is_integer() and abs(value) < MAX_BYTES)):
                raise ProgramError(f"{name} of {kind.name} is {value}")
            attributes[name] = int(value) if type_ == "i" else value
        found.append(Instruction(kind.name, tuple(operands), attributes))
    return found


def _tiles(words: _Words, count: int) -> Iterator[tuple[int, int]]:
    end = 0
    for at in range(words.take("tiles", 0, count)):
        first = words.take(f"first instruction of tile {at}", end, count - 1)
        end = words.take(f"end of tile {at}", first + 1, count)
        yield first, end


def _gradients(streams: Mapping[str, tuple[Instruction, ...]]) -> dict[int, int]:
    """Trained tensor -> gradient, by what the updates take."""
    found = {}
    for one in (one for stream in streams.values() for one in stream):
        if one.op in ("sgd", "adam", "sgd8", "adam8"):
            trained, gradient = one.operand("p"), one.operand("grad")
            assert trained is not None
            assert gradient is not None
            found[trained] = gradient
    return found


def _judge_tiles(program: Program) -> None:
    """Refuse what has memory for a tile alone and is touched elsewhere."""
    within = {at for first, end in program.tiles for at in range(first, end)}
    for stream in STREAMS:
        for at, one in enumerate(program.streams[stream]):
            if stream == "micro" and at in within:
                continue
            for number in one.operands:
                if number is not None and program.tensors[number].scope == "tile":
                    raise ProgramError(f"instruction {at} of {stream} is in no tile and touches tensor {number} of one")


def _judge_places(program: Program, data_bytes: int) -> None:
    """Refuse a tensor that does not lie where its role says."""
    assert program.arena_bytes is not None
    end = program.arena_bytes - program.threads * SCRATCH_PER_THREAD
    # a tensor takes what the streams that touch it need: those of a step, or 'evaluate' with its own count of images
    touched = {(n, stream == "evaluate") for stream, one in program.instructions() for n in one.operands}
    for number, tensor in enumerate(program.tensors):
        size = max((tensor.bytes(program, later) for later in (False, True) if (number, later) in touched), default=0)
        size = max(size, 0 if tensor.scope in ("micro", "tile") else tensor.bytes(program))
        constant = tensor.role == "constant"
        assert tensor.offset is not None
        if constant and tensor.scope != "fixed":
            raise ProgramError(f"tensor {number} is a constant of the scope {tensor.scope!r}")
        if (tensor.initial is not None) != (tensor.role == "trained"):
            raise ProgramError(f"tensor {number} ({tensor.role}) has first values at {tensor.initial}")
        places = [("the data", tensor.offset, data_bytes) if constant else ("the arena", tensor.offset, end)]
        if tensor.initial is not None:
            places.append(("the data", tensor.initial, data_bytes))
        for where, offset, most in places:
            if offset % ALIGN or offset + size > most:
                raise ProgramError(f"tensor {number} lies at {offset} with {size} bytes in {where} of {most}")


def _judge_named(program: Program, sizes: tuple[int, int, int]) -> None:
    height, width, classes = sizes
    wanted = {
        "images": ("u8", "batch", (height, width, 3)),
        "labels": ("i32", "batch", ()),
        "logits": ("f32", "batch", (classes,)),
        "metrics": ("f64", "fixed", (2,)),
        "step_count": ("i64", "fixed", ()),
    }
    for name, (dtype, scope, shape) in wanted.items():
        tensor = program.tensors[getattr(program, name)]
        found = tuple(d for d in tensor.shape if d != 1)  # a lone axis of 1 changes nothing
        if (tensor.dtype, tensor.scope) != (dtype, scope) or found != tuple(d for d in shape if d != 1):
            raise ProgramError(f"its {name} are {tensor.dtype} {tensor.scope} {tensor.shape}, expected {dtype} {shape}")


def _bits(value: float) -> int:
    """The bits of a float64 as a signed word."""
    return struct.unpack("<q", struct.pack("<d", value))[0]
