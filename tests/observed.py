"""What autograd really keeps: the reference that the stated rules are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def observe_kept(run: Callable[[], Any], resident: Iterable[Tensor]) -> tuple[int, Any]:
    """Bytes of the distinct storages saved for backward while `run` runs, those of `resident` left out.

    Also walks the autograd graph of the result and fails if a node of ours keeps a tensor on its context outside
    save_for_backward, where the hooks do not see it.
    """
    known = {t.untyped_storage().data_ptr() for t in resident}
    storages: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in known:
            storages[pointer] = t.untyped_storage().nbytes()
            held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    for node in _nodes(result):
        hidden = [key for key, value in vars(node).items() if _holds_tensor(value)] if hasattr(node, "line") else []
        assert not hidden, f"{node} keeps {hidden} outside save_for_backward"
    return sum(storages.values()), result


def _nodes(result: Any) -> list[Any]:
    found, todo = [], [result.grad_fn] if isinstance(result, Tensor) and result.grad_fn is not None else []
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(node)
        todo += [following for following, _ in node.next_functions]
    return found


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, Tensor)
