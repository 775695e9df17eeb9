"""The live bytes of a described step, apart by what they are for."""

from __future__ import annotations

import itertools

import numpy as np

from .description import ROLES, StepDescription

WORKSPACE = "workspace"
STACK = (*ROLES, WORKSPACE)
"""What is resident first, then what comes and goes: the order from the bottom in which pictures stack them."""

COLOURS = {
    "weight": "#55677A",
    "statistics": "#8C9BAA",
    "optimizer state": "#B3A06B",
    "input": "#9A7FB8",
    "gradient": "#E0A100",
    "kept": "#0072B2",
    "working": "#45A8DE",
    "workspace": "#D55E00",
}
"""Of each of `STACK` in pictures: muted what is resident, clear what comes and goes; neighbours differ in grey too."""


def live_by_role(step: StepDescription) -> dict[str, np.ndarray]:
    """For each of `STACK`, (operations,) int64: its bytes alive while each operation runs; they add up to `live_bytes`.

    'workspace' is what an operator allocates inside.
    """
    count = len(step.operations)
    change = {role: np.zeros(count + 1, dtype=np.int64) for role in ROLES}
    for storage in step.storages:
        change[storage.role][max(storage.born, 0)] += storage.bytes
        if storage.dies is not None:
            change[storage.role][storage.dies] -= storage.bytes
    live = {role: np.cumsum(changed)[:-1] for role, changed in change.items()}
    live[WORKSPACE] = np.array([operation.workspace_bytes for operation in step.operations], dtype=np.int64)
    return live


def skyline(step: StepDescription, most: int) -> list[int]:
    """Numbers of at most `most` operations that draw the step: of each of so many stretches, the one with most alive.

    All of them where there are no more. The stretches are equally long but for one operation, so that their places are
    equally far apart; the peak is among them.
    """
    count = len(step.operations)
    edges = np.linspace(0, count, min(most, count) + 1).round().astype(int).tolist()
    return [begin + int(step.live_bytes[begin:end].argmax()) for begin, end in itertools.pairwise(edges)]
