"""The program file: what is written is read, equal programs are equal bytes, and nothing that is found is trusted."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_program import small_program, small_tiled
from tinytl.compiler.arena import lay_out
from tinytl.compiler.file import HEAD, HEAD_BYTES, SECTION, read_program, write_program
from tinytl.errors import ProgramError, RunError

WORDS_BEFORE_TENSORS = 17


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("file") / "small.ttl"
    program = small_program()
    meta = {**program.meta, "room": " " * 64}  # for what `with_meta` writes longer
    write_program(lay_out(replace(program, meta=meta)), path)
    return path.read_bytes()


def sealed(content: bytes) -> bytes:
    """The content with the length and the hash that it has."""
    magic, version, order, _, _ = HEAD.unpack_from(content)
    digest = hashlib.sha256(content[HEAD.size :]).digest()
    return HEAD.pack(magic, version, order, len(content), digest) + content[HEAD.size :]


def sections(content: bytes) -> list[tuple[int, int]]:
    return [SECTION.unpack_from(content, HEAD.size + number * SECTION.size)[1:] for number in range(3)]


def with_word(content: bytes, number: int, value: int) -> bytes:
    """Another word of CODE, in a file that is whole otherwise."""
    at = sections(content)[1][0] + 8 * number
    return sealed(content[:at] + struct.pack("<q", value) + content[at + 8 :])


def with_meta(content: bytes, change: Callable[[dict], object]) -> bytes:
    """Another META, in a file that is whole otherwise."""
    at, size = sections(content)[0]
    meta = json.loads(content[at : at + size])
    del meta["room"]
    change(meta)
    text = json.dumps(meta, separators=(",", ":")).encode()
    assert len(text) <= size
    return sealed(content[:at] + text.ljust(size) + content[at + size :])


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "bad.ttl"
    path.write_bytes(content)
    with pytest.raises(ProgramError) as error:
        read_program(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    program = lay_out(small_program())
    write_program(program, tmp_path / "a.ttl")
    found = read_program(tmp_path / "a.ttl")
    carried = [found.meta["carried"], program.meta["carried"]]
    plain = [replace(one, values={}, meta={**one.meta, "carried": []}) for one in (found, program)]
    assert plain[0].__dict__ == plain[1].__dict__
    assert found.values.keys() == program.values.keys()
    assert all(torch.equal(found.values[number], value) for number, value in program.values.items())
    for entry, other in zip(*carried, strict=True):
        assert entry.keys() == other.keys()
        assert torch.equal(entry["values"], other["values"])
        assert (entry["key"], entry["shape"], entry["dtype"]) == (other["key"], other["shape"], other["dtype"])
    write_program(found, tmp_path / "b.ttl")
    assert (tmp_path / "a.ttl").read_bytes() == (tmp_path / "b.ttl").read_bytes()


def test_the_head_is_as_the_document_says(written: bytes) -> None:
    assert written[:8] == b"TINYTLP\0"
    assert struct.unpack_from("<IIQ", written, 8) == (1, 0x01020304, len(written))
    assert written[24:56] == hashlib.sha256(written[64:]).digest()
    assert [written[64 + 24 * n :][:8].rstrip(b"\0") for n in range(3)] == [b"META", b"CODE", b"DATA"]
    assert sections(written)[2][0] % 4096 == 0
    code = struct.unpack_from(f"<{WORDS_BEFORE_TENSORS}q", written, sections(written)[1][0])
    assert code[:8] == (2, 4, 2, 2, 2, 6, 6, 3)


def test_a_program_that_is_not_ready_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not laid out|out anew"):
        write_program(small_program(), tmp_path / "a.ttl")
    program = lay_out(small_program())
    with pytest.raises(ValueError, match=r"the values of conv\.weight"):
        write_program(replace(program, values={**program.values, 2: torch.zeros(3)}), tmp_path / "a.ttl")
    with pytest.raises(ValueError, match="made of the program itself"):
        write_program(replace(program, meta={"tensors": []}), tmp_path / "a.ttl")
    with pytest.raises(RunError, match="cannot write"):
        write_program(program, tmp_path / "nowhere" / "a.ttl")
    assert not list(tmp_path.iterdir())


def test_foreign_newer_short_and_changed_files_are_refused(tmp_path: Path, written: bytes) -> None:
    with pytest.raises(ProgramError, match="cannot be read: No such file"):
        read_program(tmp_path / "nothing.ttl")
    with pytest.raises(ProgramError, match="cannot be read: Is a directory"):
        read_program(tmp_path)
    assert "is no compiled program" in refused(tmp_path, b"")
    assert "is no compiled program" in refused(tmp_path, b"PK\x03\x04" + written[4:])
    assert "of version 2" in refused(tmp_path, written[:8] + struct.pack("<I", 2) + written[12:])
    assert "another order" in refused(tmp_path, written[:12] + struct.pack(">I", 0x01020304) + written[16:])
    for size in (20, 63, 64, HEAD_BYTES, len(written) - 1):
        assert "cut short" in refused(tmp_path, written[:size])
    assert "cut short" in refused(tmp_path, written + b"\0")
    changed = bytearray(written)
    changed[-3] ^= 1
    assert "SHA-256" in refused(tmp_path, bytes(changed))


def test_sections_lie_one_behind_the_other(tmp_path: Path, written: bytes) -> None:
    table = HEAD.size
    (meta_at, meta_size), (code_at, code_size), (data_at, _) = sections(written)
    for number, place in (
        (0, (0, meta_size)),
        (0, (meta_at, len(written))),
        (1, (meta_at, code_size)),
        (1, (code_at, 2**63)),
        (2, (data_at + 64, 64)),
        (2, (data_at, 2**64 - 1)),
    ):
        at = table + number * SECTION.size + 8
        assert " lies at " in refused(tmp_path, sealed(written[:at] + struct.pack("<QQ", *place) + written[at + 16 :]))
    assert "expected b'META'" in refused(tmp_path, sealed(written[:table] + b"DATA" + written[table + 4 :]))


HUGE = 2**62
TENSOR = WORDS_BEFORE_TENSORS  # the first: a constant, f32 (3,)


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 3, "of version 3, expected 2; upgrade tinytl"),
        (0, 1, "of version 1, expected 2; compile it again"),
        (1, 0, "batch is 0"),
        (1, HUGE, "batch is"),
        (2, 5, "micro_batch is 5"),
        (3, 5, "evaluate_images is 5"),
        (4, 0, "threads is 0"),
        (4, 3, "scratch memory begins"),
        (5, 7, "images are"),
        (7, 4, "logits are"),
        (8, HUGE, "arena_bytes is"),
        (8, -1, "arena_bytes is -1"),
        (9, HUGE, "state_bytes is"),
        (10, 64, "scratch_offset is 64"),
        (11, 10_000, "names the tensors"),
        (11, -1, "images is -1"),
        (13, 0, "logits are"),
        (16, HUGE, "tensors is"),
        (16, -1, "tensors is -1"),
        (TENSOR + 0, 10, "role of tensor 0 is 10"),
        (TENSOR + 1, 8, "dtype of tensor 0 is 8"),
        (TENSOR + 0, -1, "role of tensor 0 is -1"),
        (TENSOR + 2, 1, "constant of the scope 'batch'"),
        (TENSOR + 3, 7, "rank of tensor 0 is 7"),
        (TENSOR + 4, HUGE, "shape of tensor 0 is"),
        (TENSOR + 4, 1 << 30, "lies at 0 with"),
        (TENSOR + 10, 1, "lies at 1"),
        (TENSOR + 10, -64, "offset of tensor 0 is -64"),
        (TENSOR + 10, 1 << 20, "lies at 1048576"),
        (TENSOR + 11, 0, "has first values at 0"),
        (TENSOR + 3 * 12 + 11, -1, "has first values at None"),
        (TENSOR + 3 * 12 + 11, 1 << 20, "lies at 1048576"),
        (TENSOR + 3 * 12 + 10, 64, "conv.bias and fc.weight overlap"),
    ],
)
def test_hostile_numbers_are_refused(tmp_path: Path, written: bytes, word: int, value: int, message: str) -> None:
    assert message in refused(tmp_path, with_word(written, word, value))


def test_tiles_are_read_and_hostile_ones_refused(tmp_path: Path) -> None:
    program = lay_out(small_tiled())
    write_program(program, tmp_path / "tiled.ttl")
    found = read_program(tmp_path / "tiled.ttl")
    assert (found.tile_images, found.tiles) == (1, ((0, 3), (8, 10)))
    assert [tensor.scope for tensor in found.tensors] == [tensor.scope for tensor in program.tensors]
    content = (tmp_path / "tiled.ttl").read_bytes()
    end = sections(content)[1][1] // 8  # ... tile_images, 2, 0, 3, 8, 10
    for back, value, message in (
        (6, 0, "tile_images is 0"),
        (6, 3, "tile_images is 3, expected 1 to 2"),
        (5, -1, "tiles is -1"),
        (5, 1, "2 words of CODE are left over"),
        (4, -1, "first instruction of tile 0 is -1"),
        (4, 1, "instruction 0 of micro is in no tile and touches tensor"),
        (3, 0, "end of tile 0 is 0"),
        (2, 2, "first instruction of tile 1 is 2"),
        (1, 11, "end of tile 1 is 11"),
        (1, 9, "instruction 9 of micro is in no tile and touches tensor"),
    ):
        assert message in refused(tmp_path, with_word(content, end - back, value))


def test_hostile_instructions_are_refused(tmp_path: Path, written: bytes) -> None:
    tensors = len(small_program().tensors)
    begin = WORDS_BEFORE_TENSORS + 12 * tensors  # I; then zero: op, 1, operand, 0
    zero = struct.unpack_from("<5q", written, sections(written)[1][0] + 8 * begin)
    assert zero[:3] == (3, 60, 1)
    for offset, value, message in (
        (0, HUGE, "instructions is"),
        (0, 4, "operands of adaptive_pool is 1"),  # the next stream's words are read as instructions
        (1, 999, "of kind 999"),
        (2, 2, "operands of zero is 2"),
        (3, tensors, f"x of zero is {tensors}"),
        (3, -1, "x of zero is -1"),
        (3, 0, "zero writes to a constant"),
        (4, 1, "attributes of zero is 1"),
    ):
        assert message in refused(tmp_path, with_word(written, begin + offset, value))
    at = sections(written)[1][0]
    normalize = begin + 1 + 3 * 4 + 1  # behind three zeros and the number of instructions of `micro`
    conv = normalize + 2 + 4 + 1
    assert struct.unpack_from("<q", written, at + 8 * conv)[0] == 2
    kernel = conv + 2 + 7 + 1  # kh
    for value in (0.5, float("nan"), float("inf")):
        (bits,) = struct.unpack("<q", struct.pack("<d", value))
        assert "kh of conv is" in refused(tmp_path, with_word(written, kernel, bits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.pop("layers"), "META is not an object"),
        (lambda meta: meta["tensors"].pop(), "names of tensors are not"),
        (lambda meta: meta["tensors"].__setitem__(0, "shift"), "have one name"),
        (lambda meta: meta["tensors"].__setitem__(0, 5), "names of tensors are not"),
        (lambda meta: meta["layers"]["micro"].pop(), "layers of micro are not"),
        (lambda meta: meta["phases"].__setitem__("micro", [["no", 10]]), "there are not"),
        (lambda meta: meta["phases"]["micro"][0].__setitem__(1, 9**9), "phases of micro are not"),
        (lambda meta: meta["phases"].__setitem__("micro", []), "phases of micro are 0 values"),
        (lambda meta: meta["learned"][0].__setitem__("tensor", 99), "learns the tensor 99"),
        (lambda meta: meta["learned"][0].__setitem__("tensor", 0), "learns the tensor 0 as"),
        (lambda meta: meta["learned"][0].__setitem__("shape", [6]), "which it is not"),
        (lambda meta: meta["learned"][0].__setitem__("layout", "CHW"), "which it is not"),
        (lambda meta: meta["carried"][0].__setitem__("offset", 7), "carries"),
        (lambda meta: meta["carried"][0].__setitem__("bytes", 99), "carries"),
        (lambda meta: meta["carried"][0].__setitem__("shape", [-1]), "carries"),
        (lambda meta: meta["carried"][0].__setitem__("dtype", "F8"), "carries"),
        (lambda meta: meta.__setitem__("train", []), "train is no object"),
    ],
)
def test_hostile_names_are_refused(
    tmp_path: Path, written: bytes, change: Callable[[dict], object], message: str
) -> None:
    assert message in refused(tmp_path, with_meta(written, change))


def read_or_refused(path: Path, content: bytes) -> bool:
    """Whether it is read; anything but a ProgramError escapes."""
    path.write_bytes(content)
    try:
        read_program(path)
    except ProgramError:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_and_no_cut_goes_unseen(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "bad.ttl"
    content = bytearray(written)
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        if bytes(content[56:64]) != bytes(8):  # which mean nothing
            return
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    assert not read_or_refused(path, bytes(content))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_nothing_but_one_line_comes_of_hostile_words(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """With the hash made right, any word of CODE and any byte of META: read or refused, never another error."""
    path = tmp_path_factory.mktemp("fuzz") / "bad.ttl"
    if data.draw(st.booleans()):
        write_program(lay_out(small_tiled()), path)
        written = path.read_bytes()
    (meta_at, meta_size), (_, code_size), _ = sections(written)
    if data.draw(st.booleans()):
        value = data.draw(st.one_of(st.integers(-2, 70), st.integers(-(2**63), 2**63 - 1)))
        content = with_word(written, data.draw(st.integers(0, code_size // 8 - 1)), value)
    else:
        at = meta_at + data.draw(st.integers(0, meta_size - 1))
        content = sealed(written[:at] + bytes([data.draw(st.integers(0, 255))]) + written[at + 1 :])
    read_or_refused(path, content)
