"""A described step, a part of the network at a time: what each keeps, works with, and does twice; who owns a moment.

A *part* is a block, or what stands beside the blocks at their depth: the stem, the head, the classifier. Which part an
operation or a piece of memory belongs to is told by the path of its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .by_role import WORKSPACE, live_by_role
from .description import StepDescription

_FILLED_LATER = ("aten.empty", "aten.new_empty", "aten.zeros", "aten.new_zeros")  # with what, no input tells

UPDATE = "(update)"
"""The part to which the optimizer's operations belong, which work on many layers at once."""


@dataclass(frozen=True)
class PartMemory:
    """One part of the network in a step.

    Attributes:
        path: of the block, or of what stands beside the blocks; '' where no layer is known, or `UPDATE`.
        kept_bytes: the most that its layers hold for backward at once.
        working_bytes: the most working memory alive while one of its operations runs, the operator's own included and
            whoever made it: what this part needs beside what is resident and kept.
        peak_bytes: the most that is alive, all roles, while one of its operations runs.
        operations: how many it runs, in all passes.
        run_again: whether some of them make in backward what forward had made and dropped.
    """

    path: str
    kept_bytes: int
    working_bytes: int
    peak_bytes: int
    operations: int
    run_again: bool


@dataclass(frozen=True)
class Owner:
    """What one layer has alive in one role; `role` is one of `tinytl.memory.by_role.STACK`."""

    layer: str
    role: str
    bytes: int


def part_of(layer: str, blocks: Sequence[str]) -> str:
    """The part that a layer's path lies in: a block of `blocks`, or the path cut to the blocks' depth."""
    for block in blocks:
        if layer == block or layer.startswith(f"{block}."):
            return block
    depth = blocks[0].count(".") + 1 if blocks else 1
    return ".".join(layer.split(".")[:depth])


def by_part(step: StepDescription, blocks: Sequence[str]) -> list[PartMemory]:
    """Every part of the network that does something in `step`, in the order in which forward comes to it.

    Args:
        step: as `capture_step` describes it.
        blocks: paths of the blocks (`Adaptation.blocks`).
    """
    known: dict[str, str] = {}

    def part(layer: str) -> str:
        if layer not in known:
            known[layer] = part_of(layer, blocks)
        return known[layer]

    live = live_by_role(step)
    working = live["working"] + live[WORKSPACE]
    again = operations_run_again(step)
    parts = [UPDATE if op.phase == "update" else part(op.layer) for op in step.operations]
    kept = _most_kept(step, part)
    found = []
    for path in dict.fromkeys(parts):
        mine = [number for number, owner in enumerate(parts) if owner == path]
        found.append(
            PartMemory(
                path=path,
                kept_bytes=kept.pop(path, 0),
                working_bytes=int(working[mine].max()),
                peak_bytes=int(step.live_bytes[mine].max()),
                operations=len(mine),
                run_again=not again.isdisjoint(mine),
            )
        )
    # nothing that is kept is left out, should its layer run no operation of its own
    return found + [PartMemory(path, held, 0, 0, 0, False) for path, held in kept.items()]


def owners_at(step: StepDescription, operation: int) -> list[Owner]:
    """Who holds what is alive while that operation runs, largest first: a line for each layer and role.

    The bytes add up to `step.live_bytes[operation]`.
    """
    held: dict[tuple[str, str], int] = {}
    for number in step.alive_at(operation):
        storage = step.storages[number]
        held[storage.layer, storage.role] = held.get((storage.layer, storage.role), 0) + storage.bytes
    inside = step.operations[operation]
    if inside.workspace_bytes:
        held[inside.layer, WORKSPACE] = inside.workspace_bytes
    owners = [Owner(layer, role, count) for (layer, role), count in held.items() if count]
    return sorted(owners, key=lambda owner: (-owner.bytes, owner.layer, owner.role))


def operations_run_again(step: StepDescription) -> set[int]:
    """Numbers of operations in backward that make again what forward made and did not keep.

    Told by where values come from: such an operation reads a weight and what was kept, or what was made again from
    that, and no gradient; and forward has an operation of the same name on the same weights that makes as many bytes.
    Each is one; but what follows behind a tensor that is filled in place is not followed, so that there may be more.
    """
    weights = {n for n, s in enumerate(step.storages) if s.born < 0 and s.role in ("weight", "statistics")}
    given = {n for n, s in enumerate(step.storages) if s.born < 0}  # all that can be had without a gradient
    first: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    found: set[int] = set()
    for number, op in enumerate(step.operations):
        if op.phase == "update" or not op.inputs or not given.issuperset(op.inputs):
            continue
        if not op.name.startswith(_FILLED_LATER):
            given.update(op.outputs)
        if weights.issuperset(op.inputs):
            weights.update(op.outputs)  # a weight made for the occasion: normalized, or turned round
        elif not weights.isdisjoint(op.inputs):
            own = tuple(n for n in op.inputs if n in weights and step.storages[n].born < 0)
            signature = op.name, own, tuple(step.storages[n].bytes for n in op.outputs)
            if op.phase == "forward":
                first.add(signature)
            elif own and signature in first:
                found.add(number)
    return found


def _most_kept(step: StepDescription, part: Callable[[str], str]) -> dict[str, int]:
    """For each part that keeps anything, the most that it holds at once."""
    changes: dict[str, np.ndarray] = {}
    for storage in step.storages:
        if storage.role == "kept":
            mine = changes.setdefault(part(storage.layer), np.zeros(len(step.operations) + 1, dtype=np.int64))
            mine[storage.born] += storage.bytes
            if storage.dies is not None:
                mine[storage.dies] -= storage.bytes
    return {path: int(np.cumsum(change).max()) for path, change in changes.items()}
