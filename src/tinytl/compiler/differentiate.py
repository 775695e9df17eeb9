"""From a forward program to a training step: reverse-mode differentiation by the rules of `tinytl.compiler.rules`.

    captured (evaluate)  ->  fused forward, in an order that needs little memory
                         ->  backward: rule by rule from the last instruction to the first, what is dropped made again
                         ->  fused backward  ->  zeros, completions and updates  ->  begin, micro, finish, evaluate

Every tensor that comes and goes is written whole by one instruction and never again, until the arena is laid out;
gradients of what trains are sums, to which instructions add. A weight that is made of trained ones (standardized,
scaled by a norm) is made for each use, and the sum belongs to what was made: it becomes the gradient of the trained
ones once, when it is complete (`tinytl.compiler.updates`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .again import DERIVING, Placed, Values, derive, stretches
from .arena import without_unused
from .fuse_backward import fuse_backward
from .fuse_forward import fuse_activations, fuse_convolved, fuse_upsampled
from .fuse_scaled import Scales
from .order import order_branches
from .program import Instruction, Program, Tensor, instruction
from .rules import RULES
from .simplify import without_copies, without_dead
from .step_builder import StepBuilder
from .step_options import StepOptions
from .updates import Sums, with_updates


def training_program(captured: Program, options: StepOptions) -> Program:
    """The training step of a captured network: all four streams, nothing laid out yet.

    Args:
        captured: the stream `evaluate` alone, every instruction with its layer and block; `images` and `logits` named.
        options: see there.

    Raises:
        ValueError: a number in `options.recompute` or `options.joined` that is no stretch of the network.
    """
    assert captured.images is not None
    assert captured.logits is not None
    of_each, recompute = _joined(stretches(captured), options)
    builder = StepBuilder(_per_image(tensor) for tensor in captured.tensors)
    forward = [Placed(one, stretch) for one, stretch in zip(captured.streams["evaluate"], of_each, strict=True)]
    forward, logits = without_copies(builder, forward, captured.logits)
    forward = without_dead(forward, {logits})
    if options.fuse:
        forward = fuse_upsampled(fuse_activations(forward, logits), logits)
    forward = order_branches(builder, forward, logits)
    if options.fuse:
        forward = fuse_convolved(forward, logits)

    labels = captured.labels
    if labels is None:
        labels = builder.add(Tensor("labels", "input", "i32", (), "batch"))
    metrics = builder.add(Tensor("metrics", "metric", "f64", (2,)))
    step_count = builder.add(Tensor("step_count", "state", "i64", ()))

    tape = Differentiation(builder, forward, logits, recompute, options)
    grad = builder.like(logits, "grad")
    tape.run(grad)
    loss = instruction(
        "softmax_loss",
        {"smoothing": options.label_smoothing},
        layer=forward[-1].one.layer,
        logits=logits,
        labels=labels,
        grad=grad,
        metrics=metrics,
    )
    micro = [*tape.forward_stream(), loss, *tape.values.backward]
    kept = {metrics, *tape.sums.tensors.values()}
    micro = [placed.one for placed in without_dead([Placed(one, 0) for one in micro], kept)]
    evaluate, outcome = _evaluation(builder, forward, tape.makes, logits)
    scales = Scales(builder)
    if options.fuse:
        micro = scales.fuse(fuse_backward(builder, micro))
        evaluate = scales.fuse(evaluate)
    streams, gradients = with_updates(builder, micro, tape.sums, options)
    begin = [instruction("zero", x=metrics, phase="update"), *streams["begin"]]
    program = replace(
        captured,
        tensors=tuple(builder.tensors),
        streams={**{name: tuple(s) for name, s in streams.items()}, "begin": tuple(begin), "evaluate": tuple(evaluate)},
        batch=options.batch,
        micro_batch=options.micro_batch,
        evaluate_images=options.evaluate_images,
        labels=labels,
        logits=outcome,
        metrics=metrics,
        step_count=step_count,
        gradients=gradients,
        threads=options.threads,
        values={**captured.values, **scales.values},
    )
    return without_unused(program)


def _joined(of_each: Sequence[int], options: StepOptions) -> tuple[list[int], frozenset[int]]:
    """The stretch of each instruction, and those that run again, when some are one with the stretch before them."""
    last = max(of_each)
    for name, numbers in (("recompute", options.recompute), ("joined", options.joined)):
        if not all(0 <= number <= last for number in numbers):
            raise ValueError(f"{name} {sorted(numbers)}: expected numbers from 0 to {last}")
    first: list[int] = []
    for number in range(last + 1):
        both = {number - 1, number} <= options.recompute
        first.append(first[-1] if number and number in options.joined and both else number)
    return [first[number] for number in of_each], frozenset(first[number] for number in options.recompute)


def _per_image(tensor: Tensor) -> Tensor:
    """What a micro-batch computes is its own: the captured program names logits of the whole batch."""
    return replace(tensor, scope="micro") if tensor.role == "activation" and tensor.scope == "batch" else tensor


class Differentiation:
    """Backward in the making; the `Tape` of `tinytl.compiler.rules`.

    Attributes:
        values: of forward, and the instructions of backward.
        sums: gradients of what trains.
        makes: tensor -> place of the instruction in forward that makes it.
    """

    def __init__(
        self,
        builder: StepBuilder,
        forward: Sequence[Placed],
        logits: int,
        recompute: frozenset[int],
        options: StepOptions,
    ) -> None:
        self.values = Values(builder, forward, logits, recompute)
        self.makes = {number: at for at, (one, _) in enumerate(forward) for number in one.makes()}
        self._builder, self._forward, self._logits, self._options = builder, forward, logits, options
        self._needed = {number for number, tensor in enumerate(builder.tensors) if tensor.role == "trained"}
        for one, _ in forward:
            if self._needed.intersection(one.reads()):
                self._needed.update(one.makes())
        self.sums = Sums(builder, [one for one, _ in forward if one.op in DERIVING], self._needed)
        self._grads: dict[int, int] = {}
        self._at = 0

    def run(self, grad: int) -> None:
        """Differentiate everything, given the tensor with the gradient of the logits."""
        self._grads[self._logits] = grad
        for at in reversed(range(len(self._forward))):
            one = self._forward[at].one
            found = None if one.op in DERIVING else self._grads.pop(_output(one), None)
            if found is not None:
                self._at = at
                RULES[one.op](self, one, found)

    def forward_stream(self) -> list[Instruction]:
        """Forward with what backward asked of it; a derived weight right before its use."""
        found: list[Instruction] = []
        for at, (one, _) in enumerate(self._forward):
            if one.op not in DERIVING:
                wanted = {output: number for (place, output), number in self.values.extras.items() if place == at}
                one = one.with_operands(**wanted)
                found.append(_with_derived(self._builder, self._forward, self.makes, one, found))
        return found

    def needs(self, number: int | None) -> bool:
        """See `rules.Tape`, as of all below."""
        return number is not None and number in self._needed

    def value(self, number: int | None) -> int | None:
        """Kept, or made again."""
        return None if number is None else self.values.value(number, self._forward[self._at].stretch)

    def extra(self, output: str) -> int:
        """Kept, or made again."""
        return self.values.extra(self._at, output)

    def accumulate(self, number: int | None) -> int | None:
        """A sum, from 0."""
        return self.sums.of(number)

    def contribute(self, number: int | None, grad: int) -> None:
        """The first part is the gradient, each further one is added."""
        if number is None or not self.needs(number):
            return
        before = self._grads.get(number)
        if before is not None:
            y = self.grad_of(number)
            self.emit("add", {"lo": float("-inf"), "hi": float("inf"), "slope": 0.0}, a=before, b=grad, y=y)
            grad = y
        self._grads[number] = grad

    def emit(self, op: str, attributes: Mapping[str, Any], **operands: int | None) -> None:
        """On behalf of the layer that is being differentiated."""
        one = self._forward[self._at].one
        self.values.backward.append(
            instruction(op, attributes, layer=one.layer, block=one.block, phase="backward", **operands)
        )

    def grad_of(self, number: int) -> int:
        """Of its shape."""
        return self._builder.like(number, "grad")

    def weight_first(self, weight: int, x: int) -> bool:
        """Behind its own last use x may go, unless the weight's gradient, alive until its update, is the larger one."""
        tensors = self._builder.tensors
        grows = tensors[weight].elements > tensors[x].elements * self._options.micro_batch
        return not (self._options.updates == "backward" and grows)


def _output(one: Instruction) -> int:
    y = one.operand("y")
    assert y is not None
    return y


def _with_derived(
    builder: StepBuilder, forward: Sequence[Placed], makes: dict[int, int], one: Instruction, into: list[Instruction]
) -> Instruction:
    """The instruction with its derived operands made anew, by instructions that are appended to `into`."""
    new = {
        name: derive(builder, forward, makes, number, into, "forward")
        for number, (name, mode, _) in zip(one.operands, one.kind.operands, strict=True)
        if number is not None and mode == "in" and builder.role(number) == "derived"
    }
    return one.with_operands(**new)


def _evaluation(
    builder: StepBuilder, forward: Sequence[Placed], makes: dict[int, int], logits: int
) -> tuple[list[Instruction], int]:
    """The stream `evaluate` on tensors of its own, without dropout; and its logits, of the whole batch."""
    found: list[Instruction] = []
    new: dict[int, int] = {}
    for one, _ in forward:
        if one.op == "dropout":
            new[_output(one)] = _moved(new, one.operand("x"))
        elif one.op not in DERIVING:
            for number in one.makes():
                new[number] = builder.like(number, "evaluate")
            made = _with_derived(builder, forward, makes, one, found)
            found.append(replace(made, operands=tuple(n if n is None else new.get(n, n) for n in made.operands)))
    outcome = new[logits]
    builder.tensors[outcome] = replace(builder.tensors[outcome], scope="batch")
    return found, outcome


def _moved(new: Mapping[int, int], number: int | None) -> int:
    assert number is not None
    return new.get(number, number)
