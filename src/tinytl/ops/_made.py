"""What an operator makes on the meta device, worked out once for each signature.

For most operators PyTorch works a result's shape out in Python, at up to a millisecond a call, and the steps of one
network, and those of the sub-networks of one space, call the same operators on the same shapes again and again. What an
operator without aliases makes is decided by its operands' shapes, strides and types and by its other arguments, so that
is what it is remembered under; operators that give views or write to an operand are always called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MOST = 20_000  # signatures that are held; a step has some hundreds

_PLAIN = (Tensor, nn.Parameter)

_Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]
_fresh: dict[int, tuple[Any, bool]] = {}  # by id, and holding what has it: an operator's own hash is slow
_known: dict[Any, tuple[type | None, tuple[_Spec | None, ...]] | None] = {}


def made(func: Any, args: Any, kwargs: Any) -> Any:
    """``func(*args, **kwargs)`` of meta tensors, as PyTorch's own kernel gives it.

    Args:
        func: an `OpOverload`.
        args, kwargs: tensors, other values, and tuples or lists of them. Where a tensor has values, `func` is called.

    Raises what `func` raises, at every call.
    """
    number = id(func)
    fresh = _fresh.get(number)
    if fresh is None:
        fresh = _fresh[number] = (func, _is_fresh(func))
    if not fresh[1]:
        return func(*args, **kwargs)
    try:
        # the default type is that of a new tensor where none is said
        key = (number, torch.get_default_dtype(), _key(args), _key(tuple(kwargs.items())) if kwargs else None)
        found = _known.get(key, _known)
    except TypeError:  # an argument that cannot be a key
        return func(*args, **kwargs)
    if found is _known:
        out = func(*args, **kwargs)
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = _spec(out)
        return out
    if found is None:
        return func(*args, **kwargs)
    kind, specs = found
    results = [
        None if spec is None else torch.empty_strided(spec[0], spec[1], dtype=spec[2], device="meta") for spec in specs
    ]
    return results[0] if kind is None else kind(results)


def _is_fresh(func: Any) -> bool:
    """Whether all that it makes is new: its schema has no alias, and it returns tensors."""
    schema = func._schema
    declared = (*schema.arguments, *schema.returns)
    return bool(schema.returns) and all(value.alias_info is None for value in declared)


def _key(value: Any) -> Any:
    """A stand-in for all of a value that decides a result. Raises TypeError where there is none."""
    if isinstance(value, Tensor):
        if type(value) not in _PLAIN or not value.is_meta or value.layout is not torch.strided:
            raise TypeError("a tensor with values, which a shape may depend on, or one of another make")
        # an offset does not matter: no new tensor has its operand's
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple([_key(entry) for entry in value])
    return (type(value), value)  # 1, 1.0 and True are equal, and give different types


def _spec(out: Any) -> tuple[type | None, tuple[_Spec | None, ...]] | None:
    """How to make such a result again; None where an empty tensor of that shape would not be the same."""
    if isinstance(out, Tensor):
        return (None, (_of(out),)) if _is_plain(out) else None
    if type(out) not in (tuple, list) or not all(value is None or _is_plain(value) for value in out):
        return None
    return type(out), tuple(None if value is None else _of(value) for value in out)


def _of(tensor: Tensor) -> _Spec:
    return tensor.shape, tensor.stride(), tensor.dtype


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor on the meta device in memory of its own, as much of it as `torch.empty_strided` takes."""
    if type(value) is not Tensor or value.device.type != "meta" or value.storage_offset():
        return False
    span = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return value.untyped_storage().nbytes() == (span * value.element_size() if value.numel() else 0)
