"""What happens to gradients: they begin as 0, sums over micro-batches are completed, and what trains is updated.

    zero        a sum that micro-batches share: in `begin`; else right before the first that adds to it
    completion  the gradient of a weight that was made of others becomes theirs, once: dL/d standardize(w) -> dL/dw
    update      Adam or SGD, once all is read that depends on the old value

Completions read what trains, too (dL/dgamma = rstd <w, dL/dw'>), so those that have a tensor in common stand before
the updates of all of them: a group. At the end of a step group follows group. With updates in backward each group
stands right behind the last instruction that touches one of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinytl.engine.block_code import blocks
from tinytl.engine.eight_bit import SMALLEST

from .again import Placed, derive
from .op_table import OPS
from .program import Instruction, Tensor, instruction
from .step_builder import StepBuilder
from .step_options import StepOptions


class Sums:
    """Gradients that instructions add to: of trained tensors, and of those made of them.

    Two instructions that make the same of the same (a layer that is called twice) share one.

    Attributes:
        tensors: what is summed for -> its gradient.
    """

    def __init__(self, builder: StepBuilder, deriving: Sequence[Instruction], needed: set[int]) -> None:
        self.tensors: dict[int, int] = {}
        self.deriving: list[Instruction] = []
        self._builder, self._needed = builder, needed
        self._same: dict[int, int] = {}
        known: dict[object, int] = {}
        for one in deriving:
            inputs = [
                self.same(number) if number is not None else None
                for number, (_, mode, _) in zip(one.operands, one.kind.operands, strict=True)
                if mode == "in"
            ]
            (made,) = one.makes()
            first = known.setdefault((one.op, *inputs, *sorted(one.attributes.items())), made)
            if first == made:
                self.deriving.append(one)
            self._same[made] = first

    def needs(self, number: int | None) -> bool:
        """Whether the gradient of that tensor is needed."""
        return number is not None and number in self._needed

    def same(self, number: int) -> int:
        """The first tensor that is made as this one."""
        return self._same.get(number, number)

    def of(self, number: int | None) -> int | None:
        """The sum for that tensor; None where its gradient is not needed."""
        if number is None or not self.needs(number):
            return None
        number = self.same(number)
        if number not in self.tensors:
            tensor = self._builder.tensors[number]
            self.tensors[number] = self._builder.add(
                Tensor(f"{tensor.name}/grad", "gradient", "f32", tensor.shape, "fixed")
            )
        return self.tensors[number]


@dataclass
class _Group:
    """Instructions that come together, and the tensors (what trains, and sums) that they belong to."""

    touched: set[int]
    completions: list[Instruction]
    updates: list[Instruction]


def with_updates(
    builder: StepBuilder, micro: Sequence[Instruction], sums: Sums, options: StepOptions
) -> tuple[dict[str, list[Instruction]], dict[int, int]]:
    """Put zeros, completions and updates where they belong.

    Returns:
        The streams `begin`, `micro` and `finish`; and trained tensor -> its gradient, in the order of their numbers.
    """
    completions, gradients = _completions(builder, sums)
    groups = [_Group(touched, made, []) for touched, made in completions]
    for parameter, grad in sorted(gradients.items()):
        groups.append(_Group({parameter, grad}, [], [_update(builder, parameter, grad, options)]))
    groups = _united(groups)
    writes: dict[int, int] = {}  # tensor -> the first place of `micro` that changes it
    last: dict[int, int] = {}  # tensor -> the last place that reads or changes it
    for at, one in enumerate(micro):
        for number in one.writes():
            writes.setdefault(number, at)
        last.update((number, at) for number in one.operands if number is not None)
    _zero_inside(builder, groups, sums, set(writes))
    begin: list[Instruction] = []
    finish: list[Instruction] = []
    before: dict[int, list[Instruction]] = {}
    behind: dict[int, list[Instruction]] = {}
    for grad in sums.tensors.values():
        if grad in writes:
            (begin if options.pieces else before.setdefault(writes[grad], [])).append(_zero(builder, grad))
    for group in groups:
        place = finish
        if options.updates == "backward":
            place = behind.setdefault(max(last.get(number, -1) for number in group.touched), [])
        place += group.completions + group.updates
    placed: list[Instruction] = []
    for at, one in enumerate(micro):
        placed += [*before.get(at, ()), one, *behind.get(at, ())]
    return {"begin": begin, "micro": placed, "finish": finish}, gradients


def _completions(builder: StepBuilder, sums: Sums) -> tuple[list[tuple[set[int], list[Instruction]]], dict[int, int]]:
    """Turn the gradients of derived weights into those of what they are made of, those made last first.

    Returns:
        The instructions of each, with the trained tensors and sums that they touch; and the gradient of each trained
        tensor.
    """
    parts: dict[int, list[int]] = {}  # tensor -> the gradients of which its own is the sum
    found: list[tuple[set[int], list[Instruction]]] = []
    makes = {number: at for at, one in enumerate(sums.deriving) for number in one.makes()}
    forward = [Placed(one, 0) for one in sums.deriving]

    def total(number: int, into: list[Instruction]) -> int | None:
        direct = sums.tensors.get(number)
        held = parts.pop(number, []) + ([] if direct is None else [direct])
        for more in held[1:]:
            attributes = {"lo": float("-inf"), "hi": float("inf"), "slope": 0.0}
            into.append(_told(builder, instruction("add", attributes, a=held[0], b=more, y=held[0]), number))
        return held[0] if held else None

    for one in reversed(sums.deriving):
        made: list[Instruction] = []
        (derived,) = one.makes()
        grad = total(derived, made)
        if grad is None:
            continue
        gradient = f"{one.op}_grad"
        known = {name for name, _, _ in OPS[gradient].operands}
        operands: dict[str, Any] = {"grad": grad}
        for number, (name, mode, _) in zip(one.operands, one.kind.operands, strict=True):
            if mode != "in" or number is None:
                continue
            number = sums.same(number)
            if f"{name}_grad" in known:
                operands[f"{name}_grad"] = sums.of(number)
            if name in known:
                is_derived = builder.role(number) == "derived"
                operands[name] = derive(builder, forward, makes, number, made, "again") if is_derived else number
        completion = instruction(gradient, one.attributes, layer=one.layer, block=one.block, **operands)
        made.append(replace(completion, phase="update"))
        weight = one.operand("w") if one.op != "shift_bias" else None
        if weight is not None and sums.needs(weight):
            parts.setdefault(sums.same(weight), []).append(grad)
        found.append((_touched(builder, made), made))
    gradients: dict[int, int] = {}
    for number in sorted(n for n in {*parts, *sums.tensors} if builder.role(n) == "trained"):
        made = []
        grad = total(number, made)
        assert grad is not None
        gradients[number] = grad
        if made:
            found.append((_touched(builder, made), made))
    return found, gradients


def _touched(builder: StepBuilder, made: Iterable[Instruction]) -> set[int]:
    operands = {number for one in made for number in one.operands if number is not None}
    return {number for number in operands if builder.role(number) in ("trained", "gradient")}


def _united(groups: list[_Group]) -> list[_Group]:
    """Groups that have a tensor in common become one; order is kept, of groups and within."""
    found: list[_Group] = []
    for group in groups:
        together = [other for other in found if other.touched & group.touched]
        for other in together[1:]:
            together[0].touched |= other.touched
            together[0].completions += other.completions
            together[0].updates += other.updates
            found.remove(other)
        if together:
            together[0].touched |= group.touched
            together[0].completions += group.completions
            together[0].updates += group.updates
        else:
            found.append(group)
    return found


def _zero_inside(builder: StepBuilder, groups: Iterable[_Group], sums: Sums, touches: set[int]) -> None:
    """A sum that completions alone add to becomes 0 right before the first of them."""
    for grad in sums.tensors.values():
        if grad in touches:
            continue
        group = next(group for group in groups if grad in group.touched)
        first = next(at for at, one in enumerate(group.completions) if grad in one.operands)
        group.completions.insert(first, _zero(builder, grad))


def _zero(builder: StepBuilder, grad: int) -> Instruction:
    return _told(builder, instruction("zero", x=grad), grad)


def _told(builder: StepBuilder, one: Instruction, number: int) -> Instruction:
    """An instruction on behalf of a tensor's layer."""
    name = builder.tensors[number].name.split("/")[0]
    return replace(one, layer=name.rpartition(".")[0], phase="update")


def _update(builder: StepBuilder, parameter: int, grad: int, options: StepOptions) -> Instruction:
    """Adam or SGD; at 8 bits the larger tensors alone (see `tinytl.engine.eight_bit`)."""
    tensor = builder.tensors[parameter]
    small = options.optimizer_bits == 32 or tensor.elements < SMALLEST
    state: dict[str, Any] = {}

    def average(operand: str, name: str) -> None:
        where = f"{tensor.name}/{name}"
        dtype = "f32" if small else "u8"
        state[operand] = builder.add(Tensor(where, "state", dtype, tensor.shape))
        if not small:
            scales = (blocks(tensor.elements),)
            state[f"{operand}_scale"] = builder.add(Tensor(f"{where}_absmax", "state", "f32", scales))

    if options.optimizer == "adam":
        average("m", "exp_avg")
        average("v", "exp_avg_sq")
        beta1, beta2 = options.betas
        more = {"beta1": beta1, "beta2": beta2, "eps": options.eps}
    elif options.momentum:
        average("momentum", "momentum_buffer")
        more = {"momentum": options.momentum}
    else:
        small, more = True, {"momentum": 0.0}
    op = options.optimizer if small else f"{options.optimizer}8"
    attributes: Mapping[str, float] = {"weight_decay": options.weight_decay, **more}
    return _told(builder, instruction(op, attributes, p=parameter, grad=grad, **state), parameter)
