"""Which tensors are alive: nothing is read that was not written, or that something else has been written over.

A program is interpreted by tensor number, so that a wrong offset changes no value. What it would change is refused
instead: in a program that is laid out, a tensor that is written ends the life of every other one that shares bytes with
it, and an instruction may share bytes among its operands only where the table says 'in place'.
"""

from __future__ import annotations

from collections import defaultdict

from .liveness import IN_PLACE
from .program import Instruction, Program

RESIDENT = frozenset({"constant", "trained", "state", "input", "metric"})
"""Roles that are alive between streams. Before a step the metrics become 0, without an instruction."""


class Alive:
    """The tensors that have been written and still are what was written."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._written = {
            n for n, tensor in enumerate(program.tensors) if tensor.role in ("constant", "trained", "state")
        }
        self._shared = {evaluate: _shared(program, evaluate) for evaluate in (False, True)}
        self._begun: set[int] = set()  # written by the stream 'begin' of this step
        self._last: dict[int, str] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._written

    def enter(self, stream: str) -> None:
        """A stream begins: only what outlives the one before is still there.

        That is what is resident; after 'begin' also the gradients, and what 'begin' has written.
        """
        if stream in ("begin", "evaluate"):
            self._begun.clear()
        roles = RESIDENT | {"gradient"} if stream in ("micro", "finish") else RESIDENT
        self._written = {n for n in self._written if self._program.tensors[n].role in roles or n in self._begun}

    def enter_tile(self) -> None:
        """The next tile begins: nothing of the last one is there."""
        self._written = {n for n in self._written if self._program.tensors[n].scope != "tile"}

    def write(self, number: int, stream: str = "", by: str = "what was set") -> None:
        """A tensor has its values now, and those that share its bytes have lost theirs."""
        for other in self._shared[stream == "evaluate"].get(number, ()):
            self._written.discard(other)
            self._last[other] = f"{by} has written {self._program.tensors[number].name} over it"
        self._written.add(number)
        if stream == "begin":
            self._begun.add(number)

    def check(self, one: Instruction, where: str, stream: str) -> None:
        """Refuse an instruction that reads what is not there, changes what is constant, or overwrites its own inputs.

        Raises:
            RuntimeError: the program is wrong.
        """
        tensors = self._program.tensors
        for number in one.reads():
            if number not in self._written:
                why = self._last.get(number, "it has not been written")
                raise RuntimeError(f"{where} reads tensor {number} ({tensors[number].name}): {why}")
        for number in one.writes():
            if tensors[number].role == "constant":
                raise RuntimeError(f"{where} writes the constant {number} ({tensors[number].name})")
        self._check_sharing(one, where, stream == "evaluate")

    def _check_sharing(self, one: Instruction, where: str, evaluate: bool) -> None:
        shared, tensors = self._shared[evaluate], self._program.tensors
        named = [(name, mode, n) for (name, mode, _), n in zip(one.kind.operands, one.operands, strict=True)]
        for written, mode, number in named:
            if number is None or mode == "in":
                continue
            output, allowed = IN_PLACE.get(one.op, ("", ()))
            for other, _, beside in named:
                if other == written or beside is None:
                    continue
                if beside != number and beside not in shared.get(number, ()):
                    continue
                if written != output or other not in allowed or tensors[beside].offset != tensors[number].offset:
                    raise RuntimeError(f"{where} writes {written} ({tensors[number].name}) over its own {other}")


def _shared(program: Program, evaluate: bool) -> dict[int, set[int]]:
    """Tensor -> those that share bytes of the arena with it."""
    spans = sorted(
        (tensor.offset, tensor.offset + tensor.bytes(program, evaluate), n)
        for n, tensor in enumerate(program.tensors)
        if tensor.offset is not None and tensor.role != "constant"
    )
    found: dict[int, set[int]] = defaultdict(set)
    for k, (_, end, number) in enumerate(spans):
        for begin, _, other in spans[k + 1 :]:
            if begin >= end:
                break
            found[number].add(other)
            found[other].add(number)
    return found
