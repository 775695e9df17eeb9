"""What a training step is, as planning sees it: operators in order, and the storages that they read and make."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

RESIDENT = ("weight", "statistics", "optimizer state", "input")
ROLES = (*RESIDENT, "gradient", "kept", "working")


@dataclass(frozen=True)
class Storage:
    """One piece of memory.

    Attributes:
        bytes: its size.
        role: one of `ROLES`. 'kept': alive when a micro-batch's forward pass is over; 'working': any other of the step.
        layer: path of the layer that made it ('' where that is unknown).
        born: number of the operation that makes it; -1: alive before the step.
        dies: number of the first operation before which it is gone; None: alive after the step.
    """

    bytes: int
    role: str
    layer: str
    born: int
    dies: int | None


@dataclass(frozen=True)
class Operation:
    """One operator call.

    Attributes:
        name: PyTorch's, e.g. 'aten.convolution.default'.
        phase: 'forward', 'backward' or 'update'.
        layer: path of the layer on whose behalf it runs, as far as the tensors that it reads tell.
        inputs, outputs: numbers of the storages that it reads and makes.
        workspace_bytes: allocated inside and freed before it returns (see `tinytl.memory.workspace`).
        multiply_adds: of convolutions and matrix products; 0 for all others.
    """

    name: str
    phase: str
    layer: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    workspace_bytes: int
    multiply_adds: int = 0


@dataclass(frozen=True, eq=False)
class StepDescription:
    """The operations of one training step in order, and the storages that they read and make."""

    operations: tuple[Operation, ...]
    storages: tuple[Storage, ...]

    @cached_property
    def live_bytes(self) -> np.ndarray:
        """(operations,) int64: bytes alive while each operation runs, its workspace included."""
        change = np.zeros(len(self.operations) + 1, dtype=np.int64)
        for storage in self.storages:
            change[max(storage.born, 0)] += storage.bytes
            if storage.dies is not None:
                change[storage.dies] -= storage.bytes
        return np.cumsum(change)[:-1] + np.array([op.workspace_bytes for op in self.operations], dtype=np.int64)

    @property
    def resident_bytes(self) -> int:
        """Weights, statistics, optimizer state and input: what is alive before and after the step."""
        return sum(storage.bytes for storage in self.storages if storage.role in RESIDENT)

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once, everything included."""
        return int(self.live_bytes.max())

    @property
    def step_peak_bytes(self) -> int:
        """The most that the step adds to what is resident."""
        return self.peak_bytes - self.resident_bytes

    def alive_at(self, operation: int) -> list[int]:
        """Numbers of the storages that are alive while that operation runs."""
        return [
            number
            for number, storage in enumerate(self.storages)
            if storage.born <= operation and (storage.dies is None or operation < storage.dies)
        ]

    def at_peak(self) -> dict[str, int]:
        """Bytes of each role, and of the workspace, at the operation where the peak is."""
        peak = int(self.live_bytes.argmax())
        found: dict[str, int] = dict.fromkeys((*ROLES, "workspace"), 0)
        for number in self.alive_at(peak):
            found[self.storages[number].role] += self.storages[number].bytes
        found["workspace"] = self.operations[peak].workspace_bytes
        return found
