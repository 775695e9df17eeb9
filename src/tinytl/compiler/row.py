"""A row of instructions in which some are exchanged or taken out, and who makes and reads each tensor is known."""

from __future__ import annotations

from collections.abc import Iterable

from .program import Instruction


class Row:
    """Instructions by place. A place keeps its number when another one becomes empty.

    Every tensor that comes and goes is made by one instruction, as it is until a program is laid out.
    """

    def __init__(self, instructions: Iterable[Instruction]) -> None:
        self._places: list[Instruction | None] = []
        self._makers: dict[int, int] = {}
        self._uses: dict[int, int] = {}
        for one in instructions:
            self._places.append(None)
            self.put(len(self._places) - 1, one)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Instruction | None:
        return self._places[place]

    def put(self, place: int, one: Instruction | None) -> None:
        """Exchange the instruction at a place; None empties it."""
        before = self._places[place]
        for gone, step in ((before, -1), (one, 1)):
            for number in () if gone is None else gone.operands:
                if number is not None:
                    self._uses[number] = self._uses.get(number, 0) + step
        for number in () if before is None else before.makes():
            if self._makers.get(number) == place:
                del self._makers[number]
        for number in () if one is None else one.makes():
            self._makers[number] = place
        self._places[place] = one

    def maker(self, number: int | None) -> int | None:
        """The place of the instruction that makes a tensor; None where it comes from outside."""
        return None if number is None else self._makers.get(number)

    def read_once(self, number: int) -> bool:
        """Whether a tensor that is made here is an operand of one other instruction, once."""
        return self._uses[number] == 2
