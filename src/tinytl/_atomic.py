"""Files that are written whole or not at all, and that show when they were changed afterwards.

Whole: the content goes to a temporary file in the same directory, is flushed and fsynced, takes the target's
name in one rename, and the directory entry is fsynced too. A process killed at any instant leaves the old
file or the new one. The temporary's name is fixed, so that a thousand kills leave one stray file and not a
thousand; hence one writer per path at a time.

Sealed: an ordinary safetensors file (anything that reads safetensors reads it) whose metadata hold, besides
named JSON values, ``format`` and ``content_sha256`` over the other metadata and over every tensor's name,
dtype, shape and bytes. Entries are sorted, so equal content makes equal bytes; the stock writer's metadata
come in random order. Nothing in such a file is ever executed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from tinytl.errors import RunError

MAX_HEADER_BYTES = 16_000_000  # labels of 100,000 classes take about 2 MB
MAX_DATA_BYTES = 4_000_000_000  # all of ResNet-50 and Adam's slots take 0.3 GB
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


class DamagedFileError(Exception):
    """A sealed file is missing, foreign, cut short or changed; readers make it a DeltaError or a RunError."""


@contextlib.contextmanager
def atomic_file(path: Path, previous: Path | None = None, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name ``path`` when the block ends and vanishes if it raises.

    The file that had the name before is kept as ``previous``, where that is given: there is a whole file
    under one of the two names at any instant. ``size`` in bytes, where it is known, is told when the disk is full.

    Raises RunError when the file cannot be written (no folder, read-only, disk full); ``path`` is as before.
    """
    path = Path(path)
    temporary = _temporary(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    try:
        # os.open and not mkstemp: the file gets the permissions that the user's umask says, not 0600
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise RunError(f"cannot write {path}: {error.strerror or error}{_room(path, error, size)}") from error
        raise


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove what a killed writer of any of these files left behind; there must be no living one."""
    for path in paths:
        with contextlib.suppress(OSError):
            _temporary(path).unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _room(path: Path, error: OSError, size: int | None) -> str:
    """What to add where a disk or a quota is full: how much is needed and how much there is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    parts = [] if size is None else [f"it takes {size:,} bytes"]
    with contextlib.suppress(OSError):
        parts.append(f"{shutil.disk_usage(path.parent).free:,} bytes are free there")
    return f" ({', '.join(parts)})" if parts else ""


def _keep(path: Path, previous: Path) -> None:
    """Give the file ``path`` a second name, ``previous``; without hard links (FAT), the only one."""
    link = _temporary(previous)
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(link, previous)
        link.unlink(missing_ok=True)  # a rename onto another name of the same file leaves both, says POSIX


def sync_folder(folder: Path) -> None:
    """Force the names in ``folder`` to the disk: without it a rename may be undone by a power cut."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network folders know no such thing
                raise
        finally:
            os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all. Raises RunError when it cannot be written."""
    with atomic_file(path, size=len(data)) as file:
        file.write(data)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's elements in logical (row-major) order, whatever its device and memory format."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def content_hash(entries: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 (hex) over names, dtypes, shapes and bytes, sorted by name, and over the metadata.

    Every variable-length part stands behind its length, so no two different contents read as one.
    """
    digest = hashlib.sha256()

    def text(value: str) -> None:
        encoded = value.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)

    text(json.dumps(sorted((metadata or {}).items())))
    for name, tensor in sorted(entries, key=lambda entry: entry[0]):
        text(json.dumps([name, DTYPES[tensor.dtype], list(tensor.shape)]))
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


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
    strings = {key: json.dumps(value, allow_nan=False, sort_keys=True) for key, value in metadata.items()}
    strings["format"] = kind
    digest = content_hash(tensors.items(), strings)
    strings["content_sha256"] = digest

    # wide elements first and then by name, as the stock writer does: every tensor starts aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(strings.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES or end > MAX_DATA_BYTES:
        raise ValueError(f"{len(encoded)} bytes of metadata and {end} of tensors are more than would be read again")
    with atomic_file(path, previous, 8 + len(encoded) + end) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in order:
            file.write(raw_bytes(tensors[name]))
    return digest


def read_sealed(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Read a sealed file: its tensors, its metadata as JSON values, and its content hash.

    The header is judged before the rest is read, so a large foreign file costs nothing.

    Raises DamagedFileError when anything is not as it was written; the message says what.
    """
    try:
        with open(path, "rb") as file:
            strings, head, size = _read_header(file, kind)
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


def _read_header(file: BinaryIO, kind: str) -> tuple[dict[str, str], bytes, int]:
    """Return the metadata strings, the bytes read so far and how many follow, if the file is of this kind."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise DamagedFileError("is no safetensors file, or is cut short")
    encoded = file.read(length)
    header = parse_json(encoded, "header")
    strings = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(strings, dict) or not all(isinstance(value, str) for value in strings.values()):
        raise DamagedFileError(f"holds no metadata: it was not written by tinytl as {kind}")
    if strings.get("format") != kind:
        raise DamagedFileError(f"has the format {_shorten(strings.get('format'))}, expected {kind!r}")
    follow = size - 8 - length
    if follow != _data_bytes(header):
        raise DamagedFileError("is damaged or cut short: it has another size than its header says")
    if follow > MAX_DATA_BYTES:
        raise DamagedFileError(f"holds {follow:,} bytes, more than the {MAX_DATA_BYTES:,} that are read")
    return strings, prefix + encoded, follow


def _data_bytes(header: Mapping[str, Any]) -> int:
    """Return where the last tensor of a header ends; whatever else is wrong with it is the parser's to say."""
    ends = [0]
    for name, entry in header.items():
        if name != "__metadata__":
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            if not (isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int):
                raise DamagedFileError(f"has no offsets of the tensor {_shorten(name)}")
            ends.append(offsets[1])
    return max(ends)


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON from a file that may be hostile. Raises DamagedFileError when it is not."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DamagedFileError(f"has a {name} that is not JSON") from error


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # this parser would take the last, another one the first
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _one_line(error: Exception) -> str:
    return _shorten(str(error) or type(error).__name__)


def _shorten(value: object) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
