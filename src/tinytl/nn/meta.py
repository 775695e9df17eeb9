"""A network's shape without its memory, for all that is planned, traced or counted before anything is computed."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PLAIN = (int, float, str, bytes, type(None), torch.dtype, torch.Size)
_OWN_COPY = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__slots__")


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """What is made inside has no memory, and nothing is drawn for it: without values there is nothing to fill in."""
    with torch.device("meta"), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    """Passes over what fills a tensor on the meta device, which PyTorch does there in slow Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


_FILLING = {
    *(nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.uniform_, nn.init.normal_),
    *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_),
}


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` whose tensors have a shape and no memory; its hooks are there and do nothing."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                empty = torch.empty_like(tensor.detach(), device="meta")
                trains = tensor.requires_grad
                memo[id(tensor)] = nn.Parameter(empty, trains) if isinstance(tensor, nn.Parameter) else empty
    ghost = _copied(model, memo)
    for module in ghost.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.update(dict.fromkeys(hooks, _no_hook))
    return ghost


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy` of a module whose tensors are in the memo, only faster.

    A module has some twenty containers, nearly all empty, and deepcopy takes each apart by the pickle protocol. Modules
    that say themselves how they are copied are left to it.
    """
    if id(module) in memo:
        return memo[id(module)]
    own = type(module)
    if any(name in vars(kind) for kind in own.__mro__ if kind not in (nn.Module, object) for name in _OWN_COPY):
        return copy.deepcopy(module, memo)
    made = memo[id(module)] = own.__new__(own)
    memo.setdefault(id(memo), []).append(module)  # as deepcopy does: held, so that its address does not come up twice
    values = made.__dict__
    for name, value in vars(module).items():
        if name == "_compiled_call_impl":
            continue  # as nn.Module leaves it out itself
        if name == "_modules":
            values[name] = {key: None if child is None else _copied(child, memo) for key, child in value.items()}
        elif name in ("_parameters", "_buffers"):
            values[name] = {key: None if tensor is None else memo[id(tensor)] for key, tensor in value.items()}
        elif isinstance(value, _PLAIN):
            values[name] = value
        elif type(value) in (dict, OrderedDict, set, list) and not value:
            values[name] = type(value)()
        else:
            values[name] = copy.deepcopy(value, memo)
    return made


def _no_hook(*args: Any, **kwargs: Any) -> None:
    """In the place of a user's hook, which must see no tensor without values."""
