"""Files that are written whole or not at all, and that show when they were changed afterwards.

Whole: `tinytl._files`; sealed: `tinytl._sealed`, here with PyTorch's tensors in place of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tinytl import _sealed
from tinytl._files import atomic_file, remove_temporaries, sync_folder, write_bytes
from tinytl._sealed import MAX_HEADER_BYTES, DamagedFileError, Entry, parse_json, read_header, shorten

__all__ = [
    "DTYPES",
    "MAX_DATA_BYTES",
    "MAX_HEADER_BYTES",
    "DamagedFileError",
    "atomic_file",
    "content_hash",
    "parse_json",
    "raw_bytes",
    "read_sealed",
    "remove_temporaries",
    "sync_folder",
    "write_bytes",
    "write_sealed",
]

MAX_DATA_BYTES = _sealed.MAX_DATA_BYTES
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's elements in logical (row-major) order, whatever its device and memory format."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def content_hash(entries: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 (hex) over names, dtypes, shapes and bytes, sorted by name, and over the metadata.

    Every variable-length part stands behind its length, so no two different contents read as one.
    """
    return _sealed.content_hash({name: _entry(tensor) for name, tensor in entries}, metadata or {})


def write_sealed(
    path: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    previous: Path | None = None,
) -> str:
    """Write tensors and JSON values as a sealed safetensors file and return its content hash.

    ``kind`` is the format's name and version, such as ``"tinytl-delta/1"``; ``previous`` see `atomic_file`.
    Raises RunError when the file cannot be written, ValueError for a dtype or a metadata value that it cannot
    hold.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which a sealed file cannot hold")
    entries = {name: _entry(tensor) for name, tensor in tensors.items()}
    return _sealed.write_entries(path, kind, entries, metadata, previous)


def read_sealed(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Read a sealed file: its tensors, its metadata as JSON values, and its content hash.

    The header is judged before the rest is read, so a large foreign file costs nothing.

    Raises DamagedFileError when anything is not as it was written; the message says what.
    """
    try:
        with open(path, "rb") as file:
            strings, head, size = read_header(file, kind, MAX_DATA_BYTES)
            data = head + file.read(size)
    except OSError as error:
        raise DamagedFileError(f"cannot be read: {error.strerror or error}") from error
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the parser's own type and, for unknown dtypes, KeyError and others
        raise DamagedFileError(f"is damaged or cut short ({_one_line(error)})") from error
    if any(tensor.dtype not in DTYPES for tensor in tensors.values()):
        raise DamagedFileError("holds a tensor of an unknown dtype")
    digest = strings.pop("content_sha256", None)
    if digest is None or content_hash(tensors.items(), strings) != digest:
        raise DamagedFileError("is damaged: its content does not have the SHA-256 that it names")
    del strings["format"]
    return tensors, {key: parse_json(value, key) for key, value in strings.items()}, digest


def _entry(tensor: Tensor) -> Entry:
    return Entry(DTYPES[tensor.dtype], tuple(tensor.shape), lambda: raw_bytes(tensor))


def _one_line(error: Exception) -> str:
    return shorten(str(error) or type(error).__name__)
