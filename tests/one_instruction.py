"""A program of a single instruction, for tests of one op at a time: of the interpreter, or of a kernel against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinytl.compiler.interpret_call import unpack
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.op_table import OPS
from tinytl.compiler.program import Program, instruction
from tinytl.compiler.program import Tensor as Described

NAMES = {
    torch.float64: "f32",  # of a program in float64
    torch.float32: "f32",
    torch.float16: "f16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
PER_IMAGE = {
    "x",
    "y",
    "a",
    "b",
    "grad",
    "residual",
    "other",
    "s",
    "s_grad",
    "stats",
    "mask",
    "which",
    "logits",
    "labels",
}
NO_ACT = {"lo": float("-inf"), "hi": float("inf"), "slope": 0.0}


def per_image(op: str, operand: str) -> bool:
    """Whether an operand has an axis of images."""
    if OPS[op].code >= 50 or 20 <= OPS[op].code < 30 or (op, operand) == ("channel_dot", "y"):
        return False
    return operand in PER_IMAGE


def program_of(op: str, attributes: Mapping[str, Any], operands: Mapping[str, Any], images: int) -> Program:
    """A program whose stream 'micro' is that one instruction.

    Args:
        op: its name.
        attributes: all of them.
        operands: name -> its value (with the axis of images where there is one), or for one that is written
            (shape, dtype) with no such axis.
        images: of the micro-batch.
    """
    tensors, numbers = [], {}
    for name, given in operands.items():
        scope = "micro" if per_image(op, name) else "fixed"
        if isinstance(given, Tensor):
            shape = tuple(given.shape[1:] if scope == "micro" else given.shape)
            dtype = "f64" if name == "metrics" else NAMES[given.dtype]
            if name == "mask":
                dtype, shape = "bits", operands["y"][0]
        else:
            shape, dtype = given
        role = "input" if isinstance(given, Tensor) else "activation"
        numbers[name] = len(tensors)
        tensors.append(Described(name, role, dtype, shape, scope))
    one = instruction(op, attributes, **numbers)
    return Program(tuple(tensors), {"micro": (one,)}, batch=images, micro_batch=images)


def run_one(
    op: str,
    attributes: Mapping[str, Any] | None = None,
    images: int = 1,
    dtype: torch.dtype = torch.float64,
    scalars: Mapping[str, Any] | None = None,
    /,
    **operands: Any,
) -> dict[str, Tensor]:
    """Run one instruction; return the value after it of every operand that it writes. Operands as in `program_of`."""
    operands = {name: given for name, given in operands.items() if given is not None}
    program = program_of(op, attributes or {}, operands, images)
    interpreter = Interpreter(program, dtype)
    numbers = {tensor.name: n for n, tensor in enumerate(program.tensors)}
    for name, given in operands.items():
        if isinstance(given, Tensor):
            interpreter.set_tensor(numbers[name], given)
    interpreter.run("micro", images=images, **(scalars or {}))
    one = program.streams["micro"][0]
    return {program.tensors[n].name: interpreter.tensor(n) for n in one.writes()}


def bits(packed: Tensor, like: Tensor) -> Tensor:
    """A mask as booleans in the shape of an image tensor."""
    return unpack(packed, like.shape[-1])
