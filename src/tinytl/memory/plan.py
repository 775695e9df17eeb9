"""How a training step is carried out so that it fits: what the planner chooses, and the engine does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinytl.nn.execution import Execution


@dataclass(frozen=True)
class StepPlan:
    """One way to take a step. Every choice is exact, but for the order of floating-point sums.

    Attributes:
        micro_batch: images at a time through the whole network.
        update: 'end', or 'backward': each parameter as soon as its gradient is complete (see `tinytl.spec.FitOptions`).
        parts: (path, or FIRST:LAST, how that part of the network is run), for those that are not simply run.
    """

    micro_batch: int
    update: str = "end"
    parts: tuple[tuple[str, Execution], ...] = ()

    @property
    def policies(self) -> dict[str, Execution]:
        """`parts` as `tinytl.nn.execution.set_execution_` takes them."""
        return dict(self.parts)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "micro_batch": self.micro_batch,
            "update": self.update,
            "parts": [{"path": path, **asdict(how)} for path, how in self.parts],
        }

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> StepPlan:
        """What `to_json` gave."""
        parts = tuple(
            (part["path"], Execution(**{key: value for key, value in part.items() if key != "path"}))
            for part in found["parts"]
        )
        return StepPlan(found["micro_batch"], found["update"], parts)

    def lines(self, batch_size: int) -> list[str]:
        """What was chosen, in words, a line each."""
        pieces = -(-batch_size // self.micro_batch)
        found = [
            f"the batch of {batch_size} in one piece"
            if pieces == 1
            else f"the batch of {batch_size} as {pieces} micro-batches of {self.micro_batch}"
        ]
        found += [f"{path.replace(':', ' to ')}: {_words(how)}" for path, how in self.parts]
        if self.update == "backward":
            found.append("each parameter updated in backward, as soon as its gradient is complete")
        return found


def _words(how: Execution) -> str:
    words: Sequence[str] = [
        *([] if how.images is None else [f"{how.images} image{'s' * (how.images > 1)} at a time"]),
        *([] if how.strips == 1 else [f"{how.strips} strips of rows"]),
        *(["run again in backward"] if how.recompute else []),
    ]
    return ", ".join(words)
