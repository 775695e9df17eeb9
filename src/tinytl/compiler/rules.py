"""How each forward instruction is differentiated: one small rule an op.

A rule is handed a `Tape` and the gradient of its output. It says what it reads of forward by asking for it
(`value`, `extra`), adds to gradients of what trains (`accumulate`), and hands on the gradients of its inputs
(`contribute`). It asks only where the tape says that a gradient is needed, so nothing else is kept or computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .op_table import OPS
from .program import Instruction
from .step_builder import acts


class Tape(Protocol):
    """What a rule may ask of the differentiation."""

    def needs(self, number: int | None) -> bool:
        """Whether the gradient of that tensor is needed: something that trains lies at or before it."""
        ...

    def value(self, number: int | None) -> int | None:
        """A tensor with the value that it had in forward, kept or made again; None for None."""
        ...

    def extra(self, output: str) -> int:
        """An optional output (mask, stats, which) of the instruction that is being differentiated."""
        ...

    def accumulate(self, number: int | None) -> int | None:
        """The tensor that sums the gradient of a trained tensor, or of one made of it; None where it is not needed."""
        ...

    def contribute(self, number: int | None, grad: int) -> None:
        """`grad` is part of the gradient of that tensor of an image; where that is not needed, nothing happens."""
        ...

    def emit(self, op: str, attributes: Mapping[str, Any], **operands: int | None) -> None:
        """Append an instruction to backward."""
        ...

    def grad_of(self, number: int) -> int:
        """A new tensor for the gradient of that one."""
        ...

    def weight_first(self, weight: int, x: int) -> bool:
        """Whether the gradient of a weight is best computed before that of the convolution's input."""
        ...


Rule = Callable[[Tape, Instruction, int], None]
RULES: dict[str, Rule] = {}


def rule(op: str) -> Callable[[Rule], Rule]:
    """Enter a rule into the table."""

    def enter(function: Rule) -> Rule:
        RULES[op] = function
        return function

    return enter


def chosen(one: Instruction, op: str, **more: Any) -> dict[str, Any]:
    """The attributes that `op` shares with an instruction, and some more."""
    return {name: one.attributes[name] for name, _ in OPS[op].attributes if name in one.attributes} | more


def operand(one: Instruction, name: str) -> int:
    """An operand that is there."""
    number = one.operand(name)
    assert number is not None, f"{one.op} of {one.layer}: {name} is absent"
    return number


def before_activation(tape: Tape, one: Instruction, grad: int, bias: int | None = None) -> int:
    """The gradient in front of an instruction's activation; its sum over images and pixels is added to `bias`."""
    total = tape.accumulate(bias)
    if acts(one):
        y = tape.grad_of(operand(one, "y"))
        attributes = {"slope": one.attributes["slope"]}
        tape.emit("act_grad", attributes, grad=grad, mask=tape.extra("mask"), y=y, bias=total)
        return y
    if total is not None:
        tape.emit("bias_grad", {}, grad=grad, bias=total)
    return grad


@rule("conv")
def _conv(tape: Tape, one: Instruction, grad: int) -> None:
    """dx: the transposed convolution, which needs the weight alone; dw: the only one that needs x."""
    grad = before_activation(tape, one, grad, one.operand("bias"))
    tape.contribute(one.operand("residual"), grad)
    x, w = operand(one, "x"), operand(one, "w")
    parts = (_conv_dw, _conv_dx) if tape.weight_first(w, x) else (_conv_dx, _conv_dw)
    for part in parts:
        part(tape, one, grad)


def _conv_dw(tape: Tape, one: Instruction, grad: int) -> None:
    total = tape.accumulate(one.operand("w"))
    if total is not None:
        tape.emit("conv_dw", chosen(one, "conv_dw"), x=tape.value(one.operand("x")), grad=grad, w=total)


def _conv_dx(tape: Tape, one: Instruction, grad: int) -> None:
    x = operand(one, "x")
    if tape.needs(x):
        y = tape.grad_of(x)
        weight = {"w": tape.value(one.operand("w")), "table": one.operand("table")}
        tape.emit("conv_dx", chosen(one, "conv_dx", slope=0.0), grad=grad, **weight, y=y)
        tape.contribute(x, y)


@rule("group_norm")
def _group_norm(tape: Tape, one: Instruction, grad: int) -> None:
    """Needs its input and its statistics, whatever trains."""
    grad = before_activation(tape, one, grad)
    x, gamma, beta = operand(one, "x"), one.operand("gamma"), one.operand("beta")
    if not tape.needs(x) and not tape.needs(gamma):
        tape.emit("bias_grad", {}, grad=grad, bias=tape.accumulate(beta))
        return
    y = tape.grad_of(x)
    tape.emit(
        "group_norm_grad",
        {"groups": one.attributes["groups"]},
        grad=grad,
        x=tape.value(x),
        stats=tape.extra("stats"),
        gamma=tape.value(gamma),
        y=y,
        gamma_grad=tape.accumulate(gamma),
        beta_grad=tape.accumulate(beta),
    )
    tape.contribute(x, y)


@rule("affine")
def _affine(tape: Tape, one: Instruction, grad: int) -> None:
    """Needs its input where the scale trains."""
    grad = before_activation(tape, one, grad, one.operand("shift"))
    x, scale = operand(one, "x"), operand(one, "scale")
    if tape.needs(scale):
        tape.emit("channel_dot", {}, grad=grad, x=tape.value(x), y=tape.accumulate(scale))
    if tape.needs(x):
        y = tape.grad_of(x)
        tape.emit("affine_grad", {}, grad=grad, scale=tape.value(scale), y=y)
        tape.contribute(x, y)


@rule("activation")
def _activation(tape: Tape, one: Instruction, grad: int) -> None:
    tape.contribute(one.operand("x"), before_activation(tape, one, grad))


@rule("add")
def _add(tape: Tape, one: Instruction, grad: int) -> None:
    grad = before_activation(tape, one, grad)
    tape.contribute(one.operand("a"), grad)
    tape.contribute(one.operand("b"), grad)


@rule("smooth")
def _smooth(tape: Tape, one: Instruction, grad: int) -> None:
    """f'(x) needs x."""
    x = operand(one, "x")
    y = tape.grad_of(x)
    tape.emit("smooth_grad", one.attributes, grad=grad, x=tape.value(x), y=y)
    tape.contribute(x, y)


@rule("gate")
def _gate(tape: Tape, one: Instruction, grad: int) -> None:
    """The gradient of the gate sums grad x over pixels: it needs x; that of x needs the gate."""
    x, s = operand(one, "x"), operand(one, "s")
    y, s_grad = tape.grad_of(x), tape.grad_of(s)
    tape.emit("gate_grad", {}, grad=grad, x=tape.value(x), s=tape.value(s), y=y, s_grad=s_grad)
    tape.contribute(x, y)
    tape.contribute(s, s_grad)


@rule("avg_pool")
@rule("adaptive_pool")
def _mean_pool(tape: Tape, one: Instruction, grad: int) -> None:
    x = operand(one, "x")
    y = tape.grad_of(x)
    tape.emit(f"{one.op}_grad", one.attributes, grad=grad, y=y)
    tape.contribute(x, y)


@rule("max_pool")
def _max_pool(tape: Tape, one: Instruction, grad: int) -> None:
    x = operand(one, "x")
    y = tape.grad_of(x)
    tape.emit("max_pool_grad", one.attributes, grad=grad, which=tape.extra("which"), y=y)
    tape.contribute(x, y)


@rule("upsample")
def _upsample(tape: Tape, one: Instruction, grad: int) -> None:
    x = operand(one, "x")
    if tape.needs(x):
        y = tape.grad_of(x)
        tape.emit("upsample_grad", {}, grad=grad, y=y)
        tape.contribute(x, y)
    tape.contribute(one.operand("residual"), grad)


@rule("dropout")
def _dropout(tape: Tape, one: Instruction, grad: int) -> None:
    x = operand(one, "x")
    y = tape.grad_of(x)
    tape.emit("dropout_grad", {"p": one.attributes["p"]}, grad=grad, mask=tape.extra("mask"), y=y)
    tape.contribute(x, y)


@rule("copy")
def _copy(tape: Tape, one: Instruction, grad: int) -> None:
    """The same values in another shape: so is the gradient."""
    x = operand(one, "x")
    y = tape.grad_of(x)
    tape.emit("copy", {}, x=grad, y=y)
    tape.contribute(x, y)
