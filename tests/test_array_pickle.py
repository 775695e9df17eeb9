"""The unpickler that reads arrays and nothing else: what numpy writes is read, what anybody else writes is refused."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import pickletools
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytl.backbones._array_machine import _STEPS, RefusedError, loads
from tinytl.backbones.array_pickle import MAX_FILE_BYTES, read_array_pickle
from tinytl.errors import WeightsError

from .mcu_files import torch_zip, write_pickle

TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "float16", "float32", "float64", ">i4", ">f8")


def read(data: bytes, folder: Path) -> Any:
    return read_array_pickle(torch_zip(folder / "file.pkl", data))


def refusal(data: bytes, folder: Path) -> str:
    """The one line that refuses `data`."""
    with pytest.raises(WeightsError) as caught:
        read(data, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "file.pkl" in message
    assert len(message) < 400
    return message


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        right = type(found) is np.ndarray and found.dtype == expected.dtype.newbyteorder("=")
        return right and found.dtype.isnative and found.shape == expected.shape and np.array_equal(found, expected)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 100, shape)
    array = values.astype(draw(st.sampled_from(TYPES)))
    return np.asfortranarray(array) if draw(st.booleans()) else array


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=5)
)
VALUES = st.recursive(
    st.one_of(PLAIN, st.composite(arrays)(), st.tuples(PLAIN, PLAIN)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(value=VALUES, protocol=st.sampled_from([2, 3, 4]))
def test_what_numpy_writes_is_read(value: Any, protocol: int) -> None:
    assert same(loads(pickle.dumps(value, protocol)), value)


def test_torch_save_is_read(tmp_path: Path) -> None:
    import torch

    value = {"a": [np.arange(6, dtype=np.int8).reshape(2, 3)], "k": (3, 3)}
    torch.save(value, tmp_path / "x.pkl")
    assert same(read_array_pickle(tmp_path / "x.pkl"), value)


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Call(os.system, "touch HACKED"), r"'(posix|nt)\.system'"),
        (Call(eval, "1"), r"'(__builtin__|builtins)\.eval'"),
        (Call(getattr, "", "format"), r"getattr'"),
        (Call(builtins.__import__, "os"), r"__import__'"),
        (Call(np.load, "x"), r"'numpy.*load'"),
        (Call(np.frombuffer, b"1234", "i4"), r"frombuffer'"),
        (np.float32(1), r"scalar'"),
        (np.arange(3).view(np.recarray), r"recarray'"),
        ({1, 2}, r"instruction|'(__builtin__|builtins)\.set'"),
        (2 + 1j, r"complex'"),
        (np.ma.array([1, 2]), r"numpy\.ma"),
        ({"deep": [np.random.default_rng()]}, r"numpy\.random"),
    ],
)
def test_any_other_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, named: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(value, protocol)
    message = refusal(data, tmp_path)
    assert re.search(named, message), message
    assert not (tmp_path / "HACKED").exists()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def array(
    *,
    maker: bytes = b"cnumpy.core.multiarray\n_reconstruct\n",
    kind: bytes = b"cnumpy\nndarray\n",
    code: str = "i1",
    flags: bytes = b"\x89\x88",
    order: str = "|",
    shape: bytes = b"K\x04\x85",
    codec: str = "latin1",
    content: str = "abcd",
    version: bytes = b"K\x01",
    empty: bytes = b"K\x00\x85",
    rest: bytes = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00",
) -> bytes:
    """A pickled array of four int8, piece by piece as numpy writes it, each piece exchangeable."""
    first = b"c_codecs\nencode\n" + text("b") + text("latin1") + b"\x86R"
    dtype = b"cnumpy\ndtype\n" + text(code) + flags + b"\x87R(K\x03" + text(order) + rest + b"tb"
    encoded = b"c_codecs\nencode\n" + text(content) + text(codec) + b"\x86R"
    return b"\x80\x02" + maker + kind + empty + first + b"\x87R(" + version + shape + dtype + b"\x89" + encoded + b"tb."


def test_the_pieces_make_an_array(tmp_path: Path) -> None:
    assert same(read(array(), tmp_path), np.frombuffer(b"abcd", np.int8))
    assert same(pickle.loads(array()), np.frombuffer(b"abcd", np.int8))


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ({"code": "O"}, "calls dtype with other arguments"),
        ({"code": "O8"}, "calls dtype with other arguments"),
        ({"code": "V4"}, "calls dtype with other arguments"),
        ({"code": "i1,i1"}, "calls dtype with other arguments"),
        ({"flags": b"\x88\x88"}, "calls dtype with other arguments"),
        ({"flags": b"K\x00K\x01"}, "calls dtype with other arguments"),
        ({"order": "?"}, "sets a state"),
        ({"rest": b"}NNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3f"}, "sets a state"),  # a flag: refers to objects
        ({"codec": "unicode_escape"}, "calls encode with other arguments"),
        ({"codec": "zip"}, "calls encode with other arguments"),
        ({"content": "abc\u20ac"}, "is not bytes"),
        ({"kind": b"cnumpy\ndtype\n"}, "calls reconstruct with other arguments"),
        ({"kind": b"cnumpy\nmatrix\n"}, r"asks for 'numpy\.matrix'"),
        ({"maker": b"cnumpy\nndarray\n"}, "calls ndarray with other arguments"),
        ({"maker": b"c_codecs\nencode\n"}, "calls encode with other arguments"),
        ({"empty": b"K\x01\x85"}, "calls reconstruct with other arguments"),
        ({"empty": b"\x89\x85"}, "calls reconstruct with other arguments"),
        ({"shape": b"K\x05\x85"}, "has 4 bytes of content"),
        ({"shape": b"J\xff\xff\xff\xff\x85"}, "shape"),
        ({"shape": b"K\x02J\xfe\xff\xff\xff\x86"}, "shape"),
        ({"shape": b"K\x04"}, "shape"),
        ({"shape": b"(" + 9 * b"K\x01" + b"t"}, "shape"),
        ({"shape": b"\x8a\x08" + b"\xff" * 7 + b"\x7f" + b"\x85"}, "bytes of content"),
        ({"shape": b"\x8a\x09" + b"\xff" * 9 + b"\x85"}, "whole number of 9 bytes"),
        ({"code": "f8", "order": "<"}, "has 4 bytes of content"),
        ({"version": b"K\x02"}, "shape"),
    ],
)
def test_the_names_are_allowed_in_one_form_only(tmp_path: Path, pieces: dict[str, Any], match: str) -> None:
    with pytest.raises(WeightsError, match=match):
        read(array(**pieces), tmp_path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "cut off"),
        (b".", "does not end"),
        (b"\x80\x02", "cut off"),
        (b"\x80\x02}", "cut off"),
        (b"N", "cut off"),
        (b"N.N", "does not end"),
        (b"NN.", "does not end"),
        (b"(N.", "takes a value|does not end"),
        (b"0.", "instruction b'0'"),
        (b"2.", "instruction b'2'"),  # DUP
        (b"(cos\nsystem\n" + text("x") + b"o.", "asks for 'os.system'"),
        (b"(S'x'\nios\nsystem\n.", "instruction b'S'"),
        (b"(ios\nsystem\n.", "instruction b'i'"),
        (b"\x82\x01.", r"instruction b'\\x82'"),  # EXT1
        (b"Pabc\n.", "instruction b'P'"),  # PERSID
        (b"NQ.", "instruction b'Q'"),
        (b"cnumpy\nndarray\n)\x81.", r"instruction b'\\x81'"),  # NEWOBJ
        (b"cnumpy\nndarray\n.", "ndarray at byte"),
        (b"cnumpy\ndtype\n)R.", "calls dtype with other"),
        (b"cnumpy\ndtype\n}b.", "sets a state"),  # attributes of a name
        (b"}}b.", "sets a state"),
        (b"N)R.", "calls something that is no function"),
        (text("os") + text("system") + b"\x93.", "asks for 'os.system'"),
        (text("numpy") + text("ndarray.tofile") + b"\x93.", "asks for 'numpy.ndarray.tofile'"),
        (text("_codecs\nencode") + text("x") + b"\x93.", r"asks for '_codecs\\nencode"),
        (b"NN\x93.", "something unnamed"),
        (b"K\x01" + text("x") + b"\x93.", "something unnamed"),
        (b"c" + b"a" * 300 + b"\nb\n.", "no name"),
        (b"cnumpy\n", "no name"),
        (b"c\xff\xfe\nb\n.", "asks for"),
        (b"h\x00.", "memo 0"),
        (b"N0.", "instruction b'0'"),
        (b"}(Nu.", "belong to no dictionary"),
        (b"](K\x01K\x02u.", "belong to no dictionary"),
        (b"}K\x01a.", "belong to no list"),
        (b"}(NNu.", "neither text nor"),
        (b"}()Nu.", "neither text nor"),
        (b"}\x88Ns.", "neither text nor"),
        (b"s.", "takes a value"),
        (b"t.", "no mark"),
        (b"N(\x85.", "takes a value"),  # a tuple may not reach below the mark
        (b"]" + b"N\x85\x85" + b"a.", "tuple at byte"),
        (b"](" + b"N" * 9 + b"ta.", "tuple at byte"),
        (b"X\xff\xff\xff\xffabc.", "cut off"),
        (b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"B\xff\xff\xff\xffabc.", "cut off"),
        (b"\x8e" + b"\xff" * 8 + b".", r"instruction b'\\x8e'"),  # BINBYTES8
        (b"\x96" + b"\xff" * 8 + b".", r"instruction b'\\x96'"),  # BYTEARRAY8
        (b"\x8b\xff\xff\xff\x7f.", r"instruction b'\\x8b'"),  # LONG4
        (b"I" + b"9" * 5000 + b"\n.", "instruction b'I'"),
        (b"C\x04abcd.", "bytes at byte"),
        (b"cnumpy.core.multiarray\n_reconstruct\n.", "reconstruct at byte"),
    ],
)
def test_malformed_programs_are_refused(tmp_path: Path, data: bytes, match: str) -> None:
    with pytest.raises(WeightsError, match=match):
        read(data, tmp_path)
    refusal(data, tmp_path)


def test_an_array_without_content_is_refused(tmp_path: Path) -> None:
    head = array()[: array().index(b"\x87R(") + 2]
    assert "no content" in refusal(head + b".", tmp_path)


def test_large_promises_allocate_nothing(tmp_path: Path) -> None:
    """A memo index of four billion, and one text encoded again and again: bounded by the file, not by its word."""
    memo = read(b"Nr\xff\xff\xff\xff.", tmp_path)
    assert memo is None
    encode = b"c_codecs\nencode\n"
    long = encode + b"q\x00" + text("a" * 100_000) + b"q\x01" + text("latin1") + b"q\x02\x86R"
    again = (b"h\x00h\x01h\x02\x86R") * 2000  # 200 MB of bytes from 0.1 MB of file
    tracemalloc.start()
    assert "more bytes than the file has" in refusal(b"(" + long + again + b"t.", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_a_list_in_itself_is_no_endless_loop(tmp_path: Path) -> None:
    found = read(b"]q\x00h\x00a.", tmp_path)
    assert found[0] is found


def assert_read_or_refused(raw: bytes) -> None:
    why = ""
    try:
        found = loads(raw)
    except RefusedError as refused:
        found, why = None, str(refused)
    assert "\n" not in why
    assert isinstance(found, (dict, list, tuple, str, int, float, np.ndarray, type(None)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_spoilt_pickles_are_refused_or_read_as_plain_values(data: st.DataObject) -> None:
    """Cut, or bytes changed: an array of the right kind or a WeightsError's reason, never another exception."""
    raw = bytearray(pickle.dumps({"w": np.arange(12, dtype=np.int8).reshape(3, 4), "s": 0.5, "k": (3, 3)}, 2))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert_read_or_refused(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_refused_or_read(raw: bytes) -> None:
    assert_read_or_refused(raw + b".")


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "not a whole zip"),
        (b"\x80\x02}.", "not a whole zip"),
        (zipped(a__data_pkl=b"N.")[:-30], "not a whole zip"),
        (zipped(version=b"3"), "0 members named data.pkl"),
        (zipped(a__data_pkl=b"N.", b__data_pkl=b"N."), "2 members"),
        (zipped(a__data_pkl=b"N.").replace(b"N.", b"M."), "not a whole zip"),  # its checksum is wrong
    ],
    # a zip holds the time it was made: processes that share the tests out would not agree on their names
    ids=["empty", "a pickle", "cut", "no pickle", "two pickles", "wrong checksum"],
)
def test_containers_that_are_not_torch_s(tmp_path: Path, raw: bytes, match: str) -> None:
    (tmp_path / "file.pkl").write_bytes(raw)
    with pytest.raises(WeightsError, match=match):
        read_array_pickle(tmp_path / "file.pkl")


def test_a_zip_that_unpacks_to_too_much(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pkl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"N" * (MAX_FILE_BYTES + 1))
    with pytest.raises(WeightsError, match="unpacks to more than 32 MB"):
        read_array_pickle(tmp_path / "bomb.pkl")
    with zipfile.ZipFile(tmp_path / "odd.pkl", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/data.pkl", b"N.")
    with pytest.raises(WeightsError, match="packed by method 14"):
        read_array_pickle(tmp_path / "odd.pkl")
    with (tmp_path / "large.pkl").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(WeightsError, match="larger than 32 MB"):
        read_array_pickle(tmp_path / "large.pkl")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        read_array_pickle(tmp_path / "absent.pkl")
    with pytest.raises(WeightsError, match="directory"):
        read_array_pickle(tmp_path)


def test_the_instructions_are_pickle_s(tmp_path: Path) -> None:
    """The machine's table speaks of the instructions that pickletools knows by these codes."""
    known = {ord(op.code): op.name for op in pickletools.opcodes}
    names = {known[code] for code in _STEPS}
    assert {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINGET"} <= names
    assert not names & {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "POP"}
    path = write_pickle(tmp_path / "x.pkl", [np.ones(3, np.float32)])
    assert same(read_array_pickle(path), [np.ones(3, np.float32)])
