"""The executor's copies of the contract (native/) say what the compiler's do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinytl.compiler.op_table import ACT, CONV, OPS, SMOOTH, WINDOW
from tinytl.compiler.program import ALIGN, DTYPES, ROLES, SCOPES, SCRATCH_PER_THREAD, STREAMS
from tinytl.runtime import _library, executor

NATIVE = Path(__file__).parents[1] / "native"


def source(name: str) -> str:
    return (NATIVE / name).read_text()


def enumerators(text: str, name: str) -> dict[str, int]:
    """Name -> number of `enum [class] name`."""
    body = re.search(rf"enum (?:class )?{name}\b[^{{]*{{(.*?)}}", re.sub(r"/\*.*?\*/|//[^\n]*", "", text), re.S)
    assert body is not None
    found: dict[str, int] = {}
    for word in filter(None, (part.strip() for part in body.group(1).split(","))):
        label, _, number = (part.strip() for part in word.partition("="))
        found[label] = int(number) if number else max(found.values(), default=-1) + 1
    return found


def numbered(names: object) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}  # type: ignore[arg-type]


def test_numbers_of_types_roles_and_scopes() -> None:
    text = source("runtime/program.hpp")
    assert enumerators(text, "Dtype") == numbered(DTYPES)
    assert enumerators(text, "Role") == numbered(ROLES)
    assert enumerators(text, "Scope") == numbered(SCOPES)
    sizes = re.search(r"dtype_bytes\[\] = {([^}]*)}", source("runtime/code.cpp"))
    assert sizes is not None
    assert [int(size) for size in sizes.group(1).split(",")] == list(DTYPES.values())


def test_numbers_of_ops() -> None:
    assert enumerators(source("runtime/program.hpp"), "Op") == {kind.name: kind.code for kind in OPS.values()}


def test_operands_and_attributes_of_ops() -> None:
    rows = re.findall(r'{Op::(\w+), "(\w+)",\s*"([^"]*)",\s*"([^"]*)"}', source("runtime/op_table.cpp"))
    assert len(rows) == len(OPS)
    for op, name, operands, attributes in rows:
        assert op == name
        kind = OPS[name]
        assert operands == " ".join(f"{mode}={label}{'?' * optional}" for label, mode, optional in kind.operands)
        expanded = attributes.replace("CONV", CONV).replace("WINDOW", WINDOW).replace("ACT", ACT)
        assert expanded == " ".join(f"{label}:{type_}" for label, type_ in kind.attributes)


def test_every_op_has_a_kernel() -> None:
    listed = re.search(r"#define TINYTL_OPS\(X\)(.*?)\n\n", source("kernels/kernels.hpp"), re.S)
    assert listed is not None
    assert re.findall(r"X\((\w+)\)", listed.group(1)) == list(OPS)


def test_the_most_operands_fit_a_row() -> None:
    room = re.search(r"OperandKind operand\[(\d+)\]", source("runtime/op_table.hpp"))
    length = re.search(r"char name\[(\d+)\]", source("runtime/op_table.hpp"))
    highest = re.search(r"highest = (\d+);", source("runtime/op_table.cpp"))
    assert room is not None
    assert length is not None
    assert highest is not None
    assert max(len(kind.operands) for kind in OPS.values()) <= int(room.group(1))
    assert max(len(label) for kind in OPS.values() for label, _, _ in kind.operands) < int(length.group(1))
    assert max(kind.code for kind in OPS.values()) == int(highest.group(1))


def test_kinds_of_smooth_functions() -> None:
    text = source("runtime/verify.cpp")
    assert set(re.findall(r"whole\(0, 0, (\d+)\);\n            break;", text)) == {str(len(SMOOTH) - 1)}


@pytest.mark.parametrize(
    ("file", "pattern", "expected"),
    [
        ("runtime/call.hpp", r"scratch_per_thread = ([\d *]+);", SCRATCH_PER_THREAD),
        ("runtime/code.cpp", r"scratch_bytes = ([\d *]+);", SCRATCH_PER_THREAD),
        ("runtime/code.cpp", r"align = (\d+)", ALIGN),
        ("tinytl.h", r"#define TINYTL_ABI (\d+)", _library.ABI),
    ],
)
def test_sizes(file: str, pattern: str, expected: int) -> None:
    found = re.search(pattern, source(file))
    assert found is not None
    product = 1
    for factor in found.group(1).split("*"):
        product *= int(factor)
    assert product == expected


def test_the_binding_knows_the_interface() -> None:
    header = source("tinytl.h")
    assert enumerators(header, "tinytl_key") == {f"TINYTL_{key.upper()}": n for n, key in enumerate(_library.KEYS)}
    statuses = {
        f"TINYTL_{name}": getattr(_library, name) for name in ("OK", "BAD_FILE", "BAD_INPUT", "NOT_FINITE", "NO_MEMORY")
    }
    assert enumerators(header, "tinytl_status") == statuses
    declared = set(re.findall(r"TINYTL_API [^;]*?\b(tinytl_\w+)\(", header))
    assert declared == set(_library._SIGNATURES)
    assert executor.STREAMS == STREAMS
    streams = enumerators(source("runtime/model.hpp"), "Stream")
    assert {name: number for name, number in streams.items() if name != "streams"} == {
        f"stream_{name}": number for number, name in enumerate(STREAMS)
    }
