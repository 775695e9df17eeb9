"""A chain without its tensors: operations in order, and the plan of one pass through them.

A plan says what depends on the input's shape and on what trains: which gradients each operation needs, whether the
chain runs again in backward, and if so from where to where. It is made once and remembered.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._layout import dense
from ._op import NOTHING, Needs, Op, Shape, Tensors

REMEMBERED = 1024  # lines, and plans of one line, that are remembered rather than made again


@dataclass(frozen=True)
class Plan:
    """What of a line depends on its input's shape and on what trains."""

    needs: tuple[Needs, ...]
    shapes: tuple[Shape, ...]  # of each operation's input
    recompute: bool  # only where something is kept at all
    start: int  # where running again starts: the operation whose input the chain keeps
    last: int  # the last operation that keeps anything: what lies behind it has no need to run again

    @property
    def without_keeping(self) -> list[Needs]:
        return [Needs(False, (False,) * len(need.tensors)) for need in self.needs]


class Line:
    """A chain without its tensors: operations in order, and which tensors of the flat list are whose."""

    def __init__(self, ops: tuple[Op, ...], recompute: bool | None) -> None:
        self.ops = ops
        self.recompute = any(op.recompute for op in ops) if recompute is None else recompute
        bounds = list(itertools.accumulate((op.tensor_count for op in ops), initial=0))
        self._parts = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
        self._plans: dict[Any, Plan] = {}

    def split(self, flat: Sequence[Any]) -> list[Sequence[Any]]:
        return [flat[part] for part in self._parts]

    def plan(self, x_shape: Shape, dtype: torch.dtype, x_needs: bool, flat: tuple[bool, ...]) -> Plan:
        """Made once for each shape, type and set of needed gradients."""
        key = (x_shape, dtype, x_needs, flat)
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= REMEMBERED:  # images of ever changing sizes
                self._plans.clear()
            found = self._plans[key] = self._plan(x_shape, dtype, x_needs, flat)
        return found

    def _plan(self, x_shape: Shape, dtype: torch.dtype, x_needs: bool, flat: tuple[bool, ...]) -> Plan:
        needs, shapes, x = [], [x_shape], x_needs
        for op, part in zip(self.ops, self.split(flat), strict=True):
            needs.append(Needs(x, tuple(part)))
            shapes.append(op.out_shape(shapes[-1]))
            x = needs[-1].any
        del shapes[-1]  # of the output
        rules = [op.keeps(shape, dtype, need) for op, shape, need in zip(self.ops, shapes, needs, strict=True)]
        keeping = [i for i, rule in enumerate(rules) if rule != NOTHING]
        if not keeping or not self.recompute:
            return Plan(tuple(needs), tuple(shapes), False, 0, -1)
        return Plan(tuple(needs), tuple(shapes), True, _start(shapes[: keeping[0] + 1]), keeping[-1])

    def run(
        self,
        x: Tensor,
        flat: Tensors,
        needs: Sequence[Needs],
        owned: bool,
        begin: int = 0,
        end: int | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Forward, or a part of it. Its first operation owns `x` if `owned`, each later one what was made for it."""
        kept, part = [], slice(begin, end)
        for op, tensors, need in zip(self.ops[part], self.split(flat)[part], needs[part], strict=True):
            y, mine = op.forward(x, tensors, need, owned)
            owned = owned or y is not x
            kept.append(mine)
            x = y
        return x, kept

    def run_again(self, x: Tensor, flat: Tensors, plan: Plan) -> list[tuple[Tensor, ...]]:
        """What forward would have kept, from the tensor that was kept; no more is computed than that."""
        x, kept = self.run(x, flat, plan.needs, False, plan.start, plan.last)
        kept.append(self.ops[plan.last].recall(x, self.split(flat)[plan.last], plan.needs[plan.last]))
        behind = len(self.ops) - 1 - plan.last
        return [()] * plan.start + kept + [()] * behind

    def walk_back(
        self, grad: Tensor, flat: Tensors, kept: list[tuple[Tensor, ...]], plan: Plan, owned: bool = False
    ) -> list[Tensor | None]:
        """Gradients of x and of every tensor of the flat list, last operation first; `kept` is used up.

        `owned`: nobody else holds `grad`, so that the last operation may overwrite it.
        """
        parts = self.split(flat)
        grads: list[tuple[Tensor | None, ...]] = [(None,) * len(part) for part in parts]
        own = dense(grad)
        owned = owned or own is not grad
        travelling: Tensor | None = own
        del own, grad
        for i in reversed(range(len(self.ops))):
            if not plan.needs[i].any:
                break  # nothing at or before this operation trains
            assert travelling is not None
            mine = kept.pop()
            before = travelling
            travelling, grads[i] = self.ops[i].backward(before, plan.shapes[i], parts[i], mine, plan.needs[i], owned)
            owned = owned or travelling is not before
            del mine, before
        return [travelling if plan.needs[0].x else None, *(g for group in grads for g in group)]


def _start(shapes: Sequence[Shape]) -> int:
    """Where to start again, given the inputs' shapes up to the first operation that keeps anything.

    At the chain's input, which often lives anyway or is kept by another chain as well, unless a tensor behind it is
    smaller by far, as behind a global mean.
    """
    sizes = [math.prod(shape) for shape in shapes]
    smallest = min(range(len(sizes)), key=lambda i: (sizes[i], -i))
    return smallest if 8 * sizes[smallest] <= sizes[0] else 0


@functools.lru_cache(maxsize=REMEMBERED)
def line(ops: tuple[Op, ...], recompute: bool | None) -> Line:
    """The line of these operations; `recompute` as for `chain`."""
    return Line(ops, recompute)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Operations inside a chain choose their types themselves: by the type of the chain's input."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
