"""The program file: one compiled step, its weights and all that it needs to be run (docs/program.md has the format).

Equal programs make equal bytes. A reader trusts nothing that it finds: what is wrong is one `ProgramError`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinytl._atomic import DamagedFileError, atomic_file, parse_json, raw_bytes
from tinytl.errors import ProgramError

from .arena import constant_bytes, data_bytes, verify
from .file_code import NewerError, read_code, write_code
from .file_meta import read_meta, write_meta
from .packing import aligned
from .program import Program, Tensor

MAGIC = b"TINYTLP\0"
VERSION = 1
BYTE_ORDER = 0x01020304
HEAD = struct.Struct("<8sIIQ32s8x")
SECTION = struct.Struct("<8sQQ")
SECTIONS = (b"META", b"CODE", b"DATA")
HEAD_BYTES = HEAD.size + len(SECTIONS) * SECTION.size
CODE_ALIGN, DATA_ALIGN = 8, 4096
ALIGNS = {b"META": 1, b"CODE": CODE_ALIGN, b"DATA": DATA_ALIGN}
UPGRADE = "upgrade tinytl (pip install --upgrade tinytl)"
MAX_FILE_BYTES = 4_000_000_000

_TORCH = {
    "f32": torch.float32,
    "f64": torch.float64,
    "u8": torch.uint8,
    "i8": torch.int8,
    "f16": torch.float16,
    "i32": torch.int32,
    "i64": torch.int64,
}
_CARRIED = {torch.float32: "F32", torch.int64: "I64"}
_OF_CARRIED = {name: dtype for dtype, name in _CARRIED.items()}


def write_program(program: Program, path: Path) -> str:
    """Write a program that is laid out, whole or not at all; return the SHA-256 in the file (hex).

    Raises:
        RunError: the file cannot be written.
        ValueError: the program is not laid out, or a constant or trained tensor has no values of its type and shape.
    """
    data, carried = _data(program)
    code = write_code(program)
    meta = write_meta(program, carried)
    meta_at = HEAD_BYTES
    code_at = -(-(meta_at + len(meta)) // CODE_ALIGN) * CODE_ALIGN
    data_at = -(-(code_at + len(code)) // DATA_ALIGN) * DATA_ALIGN
    size = data_at + sum(len(part) for part in data)
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes are more than would be read again")
    places = ((meta_at, len(meta)), (code_at, len(code)), (data_at, size - data_at))
    table = b"".join(SECTION.pack(name, *place) for name, place in zip(SECTIONS, places, strict=True))
    front = table + meta
    front += bytes(code_at - HEAD.size - len(front)) + code
    front += bytes(data_at - HEAD.size - len(front))
    digest = hashlib.sha256(front)
    for part in data:
        digest.update(part)
    with atomic_file(Path(path), size=size) as file:
        file.write(HEAD.pack(MAGIC, VERSION, BYTE_ORDER, size, digest.digest()))
        file.write(front)
        for part in data:
            file.write(part)
    return digest.hexdigest()


def read_program(path: Path) -> Program:
    """Read a program, with its values as torch tensors (read-only views of what was read).

    Raises:
        ProgramError: the file is missing, foreign, of a newer version, cut short or changed, or what it says of itself
            cannot be.
    """
    path = Path(path)
    try:
        content = _content(path)
        (meta_at, meta_size), (code_at, code_size), (data_at, data_size) = _sections(content)
        program = read_code(content[code_at : code_at + code_size], data_size)
        meta = parse_json(content[meta_at : meta_at + meta_size], "META")
        program, carried = read_meta(meta, program, data_size)
        _judge_layout(program)
    except DamagedFileError as error:
        raise ProgramError(f"program {path} {error}; compile it again") from error
    except ProgramError as error:
        mend = UPGRADE if isinstance(error, NewerError) else "compile it again"
        raise ProgramError(f"program {path}: {error}; {mend}") from error

    # a copy of its own: torch takes no read-only memory without a warning
    data = bytearray(memoryview(content)[data_at : data_at + data_size])
    values = {
        number: _values(data, tensor, at)
        for number, tensor in enumerate(program.tensors)
        if (at := tensor.offset if tensor.role == "constant" else tensor.initial) is not None
        and tensor.role in ("constant", "trained")
    }
    held = [
        {
            **{name: entry[name] for name in ("key", "shape", "dtype")},
            "values": _view(data, _OF_CARRIED[entry["dtype"]], tuple(entry["shape"]), entry["offset"]),
        }
        for entry in carried
    ]
    return replace(program, values=values, meta={**program.meta, "carried": held})


def _content(path: Path) -> bytes:
    """All of a file whose head and hash are right."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD.size)
            size = os.fstat(file.fileno()).st_size
            _judge_head(head, size)
            content = head + file.read(size - len(head))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DamagedFileError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) != size or hashlib.sha256(memoryview(content)[HEAD.size :]).digest() != HEAD.unpack(head)[4]:
        raise ProgramError("it is damaged: its content does not have the SHA-256 that it names")
    return content


def _judge_head(head: bytes, size: int) -> None:
    if head[: len(MAGIC)] != MAGIC:
        raise ProgramError("it is no compiled program of tinytl")
    if len(head) < HEAD.size or size < HEAD_BYTES:
        raise ProgramError(f"it is cut short: {size} bytes")
    _, version, order, named, _ = HEAD.unpack(head)
    if order != BYTE_ORDER:
        raise ProgramError("its bytes are in another order than this machine's")
    if version != VERSION:
        kind = NewerError if version > VERSION else ProgramError
        raise kind(f"it is of version {version}, and this tinytl reads {VERSION}")
    if named != size:
        raise ProgramError(f"it is cut short or damaged: {size:,} bytes, and it names {named:,}")
    if size > MAX_FILE_BYTES:
        raise ProgramError(f"it holds {size:,} bytes, more than the {MAX_FILE_BYTES:,} that are read")


def _sections(content: bytes) -> list[tuple[int, int]]:
    """(offset, bytes) of META, CODE and DATA."""
    found, at = [], HEAD_BYTES
    for index, expected in enumerate(SECTIONS):
        name, offset, size = SECTION.unpack_from(content, HEAD.size + index * SECTION.size)
        if name.rstrip(b"\0") != expected:
            raise ProgramError(f"its section {index} is {name!r}, expected {expected!r}")
        if not at <= offset <= offset + size <= len(content) or offset % ALIGNS[expected]:
            raise ProgramError(f"its {expected.decode()} lies at {offset} with {size} bytes, in {len(content)}")
        found.append((offset, size))
        at = offset + size
    return found


def _judge_layout(program: Program) -> None:
    try:
        verify(program)
    except ValueError as error:
        raise ProgramError(str(error)) from error


def _data(program: Program) -> tuple[list[bytes | memoryview], list[dict[str, Any]]]:
    """The section DATA in pieces, and what is carried as META tells it."""
    parts: list[bytes | memoryview] = []
    at = 0
    for number, tensor in _in_order(program):
        found = program.values.get(number)
        if found is None or found.dtype != _TORCH.get(tensor.dtype) or found.numel() != tensor.elements:
            what = None if found is None else (found.dtype, tuple(found.shape))
            raise ValueError(f"the values of {tensor.name} are {what}, expected {tensor.dtype} {tensor.shape}")
        place = tensor.offset if tensor.role == "constant" else tensor.initial
        if place != at:
            raise ValueError(f"{tensor.name} lies at {place}, expected {at}: lay the program out anew")
        at = _append(parts, raw_bytes(found), at)
    if at != data_bytes(program) or constant_bytes(program) > at:
        raise AssertionError("the data's size is another one than planned")
    carried = []
    for entry in program.meta.get("carried", ()):
        value = entry["values"]
        if _CARRIED.get(value.dtype) != entry["dtype"] or list(value.shape) != entry["shape"]:
            raise ValueError(f"{entry['key']} is {value.dtype} {tuple(value.shape)}, expected {entry['dtype']}")
        told = {name: entry[name] for name in ("key", "shape", "dtype")}
        carried.append({**told, "offset": at, "bytes": value.numel() * value.element_size()})
        at = _append(parts, raw_bytes(value), at)
    return parts, carried


def _append(parts: list[bytes | memoryview], content: memoryview, at: int) -> int:
    end = aligned(at + len(content))
    parts += [content, bytes(end - at - len(content))]
    return end


def _in_order(program: Program) -> Iterator[tuple[int, Tensor]]:
    """What has values, in the order of the data: constants, then what trains."""
    for role in ("constant", "trained"):
        yield from ((number, tensor) for number, tensor in enumerate(program.tensors) if tensor.role == role)


def _values(data: bytearray, tensor: Tensor, at: int) -> torch.Tensor:
    return _view(data, _TORCH[tensor.dtype], tensor.shape, at)


def _view(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...], at: int) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=at).reshape(shape)
