"""Files that show when they were changed after they were written: their form, in bytes, without PyTorch or numpy.

Sealed: an ordinary safetensors file (anything that reads safetensors reads it) whose metadata hold, besides
named JSON values, ``format`` and ``content_sha256`` over the other metadata and over every tensor's name,
dtype, shape and bytes. Entries are sorted, so equal content makes equal bytes; the stock writer's metadata
come in random order. Nothing in such a file is ever executed.

`tinytl._atomic` has the same for PyTorch's tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tinytl._digest import Digest, sha256
from tinytl._files import atomic_file

MAX_HEADER_BYTES = 16_000_000  # labels of 100,000 classes take about 2 MB
MAX_DATA_BYTES = 4_000_000_000  # all of ResNet-50 and Adam's slots take 0.3 GB
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes an element of what such a file can hold, by safetensors' name."""
PIECE_BYTES = 1 << 16

Buffer = bytes | bytearray | memoryview


class DamagedFileError(Exception):
    """A sealed file is missing, foreign, cut short or changed; readers make it a DeltaError or a RunError."""


class Entry(NamedTuple):
    """One tensor: safetensors' name of its type, its shape, and what gives its elements in row-major order.

    `data` is called when they are hashed and again when they are written, and what it gives is not held between.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], Buffer]

    @property
    def nbytes(self) -> int:
        """Bytes of all of its elements."""
        count = ITEM_BYTES[self.dtype]
        for extent in self.shape:
            count *= extent
        return count


def content_hash(entries: Mapping[str, Entry], strings: Mapping[str, str]) -> str:
    """Return the SHA-256 (hex) over names, dtypes, shapes and bytes, sorted by name, and over the metadata.

    Every variable-length part stands behind its length, so no two different contents read as one.
    """
    digest = _begun(strings)
    for name in sorted(entries):
        entry = entries[name]
        _add_head(digest, name, entry.dtype, entry.shape)
        digest.update(entry.data())
    return digest.hexdigest()


def _begun(strings: Mapping[str, str]) -> Digest:
    digest = sha256()
    _add_text(digest, json.dumps(sorted(strings.items())))
    return digest


def _add_head(digest: Digest, name: str, dtype: str, shape: Iterable[int]) -> None:
    _add_text(digest, json.dumps([name, dtype, list(shape)]))


def _add_text(digest: Digest, value: str) -> None:
    encoded = value.encode()
    digest.update(len(encoded).to_bytes(8, "little"))
    digest.update(encoded)


def write_entries(
    path: Path, kind: str, entries: Mapping[str, Entry], metadata: Mapping[str, Any], previous: Path | None = None
) -> str:
    """Write tensors and JSON values as a sealed safetensors file and return its content hash.

    ``kind`` is the format's name and version, such as ``"tinytl-delta/1"``; ``previous`` see `atomic_file`.
    Raises RunError when the file cannot be written, ValueError for a metadata value that it cannot hold.
    """
    strings = {key: json.dumps(value, allow_nan=False, sort_keys=True) for key, value in metadata.items()}
    strings["format"] = kind
    digest = content_hash(entries, strings)
    strings["content_sha256"] = digest

    # wide elements first and then by name, as the stock writer does: every tensor starts aligned
    order = sorted(entries, key=lambda name: (-ITEM_BYTES[entries[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(strings.items()))}
    end = 0
    for name in order:
        entry = entries[name]
        start, end = end, end + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES or end > MAX_DATA_BYTES:
        raise ValueError(f"{len(encoded)} bytes of metadata and {end} of tensors are more than would be read again")
    with atomic_file(path, previous, 8 + len(encoded) + end) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in order:
            file.write(entries[name].data())
    return digest


class Place(NamedTuple):
    """Where a tensor lies in a sealed file: safetensors' name of its type, its shape, its offset and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SealedFile:
    """A sealed file that was found whole, tensors read when they are asked for.

    Attributes:
        metadata: JSON values by name.
        places: where each tensor lies.
        content_hash: the hash that the file has and names.
    """

    def __init__(self, path: Path, kind: str) -> None:
        """Read all of it once, in pieces, and hold the header alone.

        Raises DamagedFileError when anything is not as it was written; the message says what.
        """
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                strings, head, size = read_header(file, kind)
                self.places = _places(parse_json(head[8:], "header"), len(head), size)
                digest = strings.pop("content_sha256", None)
                if digest is None or self._hash(file, strings) != digest:
                    raise DamagedFileError("is damaged: its content does not have the SHA-256 that it names")
        except OSError as error:
            raise DamagedFileError(f"cannot be read: {error.strerror or error}") from error
        del strings["format"]
        self.metadata = {key: parse_json(value, key) for key, value in strings.items()}
        self.content_hash = digest

    def read_into(self, name: str, target: memoryview) -> None:
        """Read a tensor's bytes into `target`, bytes of the same number.

        Raises DamagedFileError when the file cannot be read any more.
        """
        place = self.places[name]
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(place.offset)
                done = 0
                while done < place.nbytes:
                    read = file.readinto(target[done:])
                    if not read:
                        raise DamagedFileError("was cut short while it was read")
                    done += read
        except OSError as error:
            raise DamagedFileError(f"cannot be read: {error.strerror or error}") from error

    def _hash(self, file: BinaryIO, strings: Mapping[str, str]) -> str:
        digest = _begun(strings)
        piece = memoryview(bytearray(PIECE_BYTES))
        for name in sorted(self.places):
            place = self.places[name]
            _add_head(digest, name, place.dtype, place.shape)
            file.seek(place.offset)
            left = place.nbytes
            while left:
                read = file.readinto(piece[: min(left, PIECE_BYTES)])  # type: ignore[attr-defined]
                if not read:
                    raise DamagedFileError("was cut short while it was read")
                digest.update(piece[:read])
                left -= read
        return digest.hexdigest()


def read_header(file: BinaryIO, kind: str, most: int = MAX_DATA_BYTES) -> tuple[dict[str, str], bytes, int]:
    """Return the metadata strings, the bytes read so far and how many follow, if the file is of this kind.

    Raises DamagedFileError if it is not, or if more than `most` bytes follow.
    """
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
        raise DamagedFileError(f"has the format {shorten(strings.get('format'))}, expected {kind!r}")
    follow = size - 8 - length
    if follow != _data_bytes(header):
        raise DamagedFileError("is damaged or cut short: it has another size than its header says")
    if follow > most:
        raise DamagedFileError(f"holds {follow:,} bytes, more than the {most:,} that are read")
    return strings, prefix + encoded, follow


def _data_bytes(header: Mapping[str, Any]) -> int:
    """Return where the last tensor of a header ends; whatever else is wrong with it is the parser's to say."""
    ends = [0]
    for name, entry in header.items():
        if name != "__metadata__":
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            if not (isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int):
                raise DamagedFileError(f"has no offsets of the tensor {shorten(name)}")
            ends.append(offsets[1])
    return max(ends)


def _places(header: dict[str, Any], begin: int, size: int) -> dict[str, Place]:
    """Where each tensor lies, judged: `begin` and `size` are of the tensors' bytes, which they fill without a gap."""
    found: dict[str, Place] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        whole = isinstance(shape, list) and all(type(extent) is int and extent >= 0 for extent in shape)
        if dtype not in ITEM_BYTES or not whole or not all(type(offset) is int for offset in offsets):
            raise DamagedFileError(f"holds the tensor {shorten(name)} of an unknown type or shape")
        nbytes = Entry(dtype, tuple(shape), bytes).nbytes
        if offsets[1] - offsets[0] != nbytes:
            raise DamagedFileError(f"is damaged: the tensor {shorten(name)} has other bytes than its shape takes")
        spans.append((offsets[0], offsets[1]))
        found[name] = Place(dtype, tuple(shape), begin + offsets[0], nbytes)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise DamagedFileError("is damaged: its tensors overlap, or leave gaps")
        end = last
    if end != size:
        raise DamagedFileError("is damaged: its tensors overlap, or leave gaps")
    return found


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


def shorten(value: object) -> str:
    """A value from a file in at most 80 characters, escaped where it is not printable."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
