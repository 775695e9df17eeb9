"""What tests of the executor share: where it is, small programs in files, and the tensors of an open one."""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tinytl.compiler.arena import lay_out
from tinytl.compiler.file import write_program
from tinytl.compiler.program import Program
from tinytl.runtime import Executor, _library

from .small_program import small_program

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
# Where there is a compiler the executor has to be there, too: then a test that does not find it fails.
needs_executor = pytest.mark.skipif(
    not HAS_COMPILER and not (_library.HERE / "libtinytl.so").exists(),
    reason="the executor was not built: there is no C++ compiler",
)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")

TORCH = {
    "f32": torch.float32,
    "f64": torch.float64,
    "u8": torch.uint8,
    "i8": torch.int8,
    "f16": torch.float16,
    "i32": torch.int32,
    "i64": torch.int64,
    "bits": torch.uint8,
}


def written(program: Program, path: Path) -> Path:
    """The program in a file; laid out, if it is not yet."""
    write_program(program if program.arena_bytes is not None else lay_out(program), path)
    return path


def widest_isa() -> str:
    """The widest instruction set that this processor and the executor have: avx512, avx2, neon or plain."""
    with tempfile.TemporaryDirectory() as folder, Executor(small_file(Path(folder))) as executor:
        return executor.isa


def small_file(folder: Path) -> Path:
    return written(small_program(), folder / "small.ttl")


def rehashed(content: bytes) -> bytes:
    """A program file that was changed on purpose, with the hash that belongs to it."""
    return content[:24] + hashlib.sha256(content[64:]).digest() + content[56:]


def section(content: bytes, name: bytes) -> tuple[int, int]:
    """Offset and bytes of a section."""
    for at in range(64, 64 + 3 * 24, 24):
        found, offset, size = struct.unpack_from("<8sQQ", content, at)
        if found.rstrip(b"\0") == name:
            return offset, size
    raise AssertionError(name)


def stored_shape(program: Program, number: int) -> tuple[int, ...]:
    """Of one image, as it lies in memory: bits as bytes."""
    tensor = program.tensors[number]
    if tensor.dtype == "bits":
        return (*tensor.shape[:-1], -(-tensor.shape[-1] // 8))
    return tuple(tensor.shape)


def value(executor: Executor, program: Program, number: int, images: int) -> Tensor:
    """A copy of a tensor's value: (images, ...) where it has one for each image."""
    tensor, shape = program.tensors[number], stored_shape(program, number)
    if tensor.scope != "fixed":
        shape = (images, *shape)
    size = torch.Size(shape).numel() * TORCH[tensor.dtype].itemsize
    flat = torch.frombuffer(bytearray(executor.tensor(number)[:size]), dtype=TORCH[tensor.dtype])
    return flat.reshape(shape)


def put(executor: Executor, number: int, new: Tensor) -> None:
    """Write a tensor's value from its beginning."""
    content = new.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    executor.tensor(number)[: len(content)] = content


def photographs(executor: Executor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images (count, H, W, 3) and labels (count,), which are also put in the executor's slot."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, executor.height, executor.width, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, executor.classes, (count,), generator=generator, dtype=torch.int32)
    content = images.numpy().tobytes()
    executor.images[: len(content)] = content
    for at, label in enumerate(labels.tolist()):
        executor.labels[at] = label
    return images, labels
