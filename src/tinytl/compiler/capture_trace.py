"""Runs a network's own forward on images without memory, and lowers what it does to instructions as it does it.

Chains and dropout are taken whole, before they become operators of PyTorch; what the forward calls between them comes
as operators. Operators on numbers alone, such as a weight that is made anew from frozen ones, are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from tinytl.memory.recorder import Recorder
from tinytl.nn.lean import take_dropout
from tinytl.ops._ghost import Ghost
from tinytl.ops.chain import Stage, take_chains

from .lower_aten import RULES
from .lower_builder import Builder
from .lower_call import AtenLowering
from .lowering import Value, dropout, lower_stage

IMAGES = 2
"""Images that the forward is run on: more than one, so that what mixes them does not pass for what does not."""


class Tracer(Recorder):
    """The mode in which a forward runs to be lowered, by a network's rules of shapes for planning.

    Args:
        builder: what the instructions are added to.
        model: whose layers are named.
    """

    def __init__(self, builder: Builder, model: nn.Module) -> None:
        super().__init__()
        self._b = builder
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._inside = [""]  # paths of the modules that are running, outermost first
        self._known: dict[int, tuple[Ghost, Value, int]] = {}  # by id of the ghost, which is held
        self._versions: dict[int, int] = {}  # number of a storage -> how often it was overwritten
        self._aten = AtenLowering(builder, self, RULES)

    # ------------------------------------------------------------ what stands for what

    def image(self, shape: tuple[int, ...], dtype: torch.dtype, value: Value) -> Ghost:
        """A tensor without memory that stands for `value`; images are channels-last."""
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        ghost = self.resident(torch.empty(shape, dtype=dtype, device="meta", memory_format=layout), "working", "")
        self.stands_for(ghost, value)
        return ghost

    def stands_for(self, ghost: Ghost, value: Value, overwritten: bool = False) -> None:
        """From now on, `ghost` is `value`; `overwritten`: what else lies in its memory is lost."""
        storage: int = ghost.token.number  # pyright: ignore[reportAttributeAccessIssue]
        version = self._versions.get(storage, 0) + overwritten
        self._versions[storage] = version
        self._known[id(ghost)] = ghost, value, version

    def value(self, ghost: Ghost) -> Value:
        """What it stands for.

        Raises:
            UnsupportedLayerError: nothing that is known, or its memory was overwritten through another view.
        """
        found = self._known.get(id(ghost))
        if found is None or found[2] != self._versions[ghost.token.number]:  # pyright: ignore
            raise self._b.refusal("a tensor that was made, or overwritten, by parts,")
        return found[1]

    # ------------------------------------------------------------ what the forward does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._b.layer = self._inside[-1]
            raise self._b.refusal(f"{func}, which draws random numbers,")
        if any(isinstance(leaf, Ghost) for leaf in leaves):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if func is not torch.ops.prim.device.default:
                self._b.layer = self._inside[-1]
                self._aten.lower(func, args, kwargs, out)
            return out
        out = func(*args, **kwargs)
        trained = next((t for t in leaves if isinstance(t, Tensor) and self._b.trains(t)), None)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if trained is not None and not all(self._b.trains(t) for t in made):
            self._b.layer = self._inside[-1]
            raise self._b.refusal(f"{func} on {self._b.trained_name(trained)}, which trains,")
        return out

    def chain(self, x: Tensor, stages: list[Stage]) -> Tensor | None:
        """In the place of a chain; None where no image goes into it."""
        if not isinstance(x, Ghost):
            return None
        if not stages:
            return x
        shape = tuple(x.shape)
        self._b.layer = self._inside[-1]
        value = self.value(x)
        with _disable_current_modes():  # what is done to weights here is no part of the forward
            for at, (op, tensors) in enumerate(stages):
                self._b.layer = self._layer(stages, at)
                value = lower_stage(self._b, op, tensors, value, shape)
                shape = op.out_shape(shape)
            return self.image(shape, x.dtype, value)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """In the place of dropout."""
        self._b.layer = self._inside[-1]
        if not isinstance(x, Ghost) or not self.value(x).plain:
            raise self._b.refusal("dropout of anything but an image or a vector")
        with _disable_current_modes():
            return self.image(tuple(x.shape), x.dtype, dropout(self._b, self.value(x), p))

    def _layer(self, stages: list[Stage], at: int) -> str:
        """The layer of that stage, or of the nearest before it that has tensors, or else behind it."""
        for _, tensors in (*reversed(stages[: at + 1]), *stages[at + 1 :]):
            for tensor in tensors:
                found = self._b.layer_of(tensor)
                if found is not None:
                    return found
        return self._inside[-1]

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """What runs while the context lasts is lowered."""

        def enter(module: nn.Module, args: Any) -> None:
            self._inside.append(self._paths.get(id(module), self._inside[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside.pop()

        # not hooks of each module: a module with hooks is called as a module, and no longer part of a chain
        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            with torch.no_grad(), take_chains(self.chain), take_dropout(self.dropout), self:
                yield
        finally:
            for handle in handles:
                handle.remove()
