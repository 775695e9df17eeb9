"""A program while it grows: its tensors, their values, its instructions, and on whose behalf the next one runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinytl.errors import UnsupportedLayerError

from .program import Instruction, instruction
from .program import Tensor as ProgramTensor

Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]

LAYOUTS = ("as-is", "OHWI", "HWC")
"""How a weight (O, I, kh, kw), or (C, 1, kh, kw), lies: as it is, (O, kh, kw, I), or (kh, kw, C)."""


def key_of(tensor: Tensor) -> Key:
    """What two tensor objects have in common that are the same numbers in the same order."""
    place = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    return *place, tuple(tensor.shape), tuple(tensor.stride())


class Builder:
    """Puts a program together.

    Args:
        model: whose tensors are named; those that require a gradient are trained.
        blocks: paths of its blocks.

    Attributes:
        layer: path of the layer on whose behalf the next instructions run.
        tensors, values, instructions: of the program, so far.
        trained: key of a trained tensor of the model -> (its number, its layout).
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.layer = ""
        self.tensors: list[ProgramTensor] = []
        self.values: dict[int, Tensor] = {}
        self.instructions: list[Instruction] = []
        self.trained: dict[Key, tuple[int, str]] = {}
        self._blocks = tuple(blocks)
        self._dropouts = 0
        self._taken: set[str] = set()
        self._constants: dict[Any, tuple[int, Sequence[Tensor | None]]] = {}
        self._names: dict[Key, str] = {}
        self._trained_storages: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(key_of(tensor), name)
            if tensor.requires_grad:
                self._trained_storages[tensor.untyped_storage()._cdata] = name

    # ------------------------------------------------------------ tensors

    def shape(self, number: int) -> tuple[int, ...]:
        """Of that tensor, without the axis of images."""
        return self.tensors[number].shape

    def new(self, name: str, role: str, shape: Iterable[int], dtype: str = "f32", scope: str = "fixed") -> int:
        """The number of a new tensor, whose name is made unique."""
        unique, count = name, 1
        while unique in self._taken:
            count += 1
            unique = f"{name}#{count}"
        self._taken.add(unique)
        self.tensors.append(ProgramTensor(unique, role, dtype, tuple(int(side) for side in shape), scope))
        return len(self.tensors) - 1

    def activation(self, what: str, shape: Iterable[int]) -> int:
        """A new image (H, W, C) that the current layer makes."""
        return self.new(f"{self.layer}:{what}", "activation", shape, scope="micro")

    def derived(self, name: str, like: Sequence[int]) -> int:
        """A new tensor made of trained ones, of that shape."""
        return self.new(name, "derived", like)

    def constant(
        self,
        kind: str,
        sources: Sequence[Tensor | None],
        make: Callable[[], Tensor],
        dtype: str = "f32",
        variant: Any = None,
    ) -> int:
        """A constant made of frozen tensors, named by the first of them; only one for equal arguments."""
        identity = (kind, variant, *(None if t is None else key_of(t) for t in sources))
        if identity not in self._constants:
            value = make().detach()
            value = (stored(value) if dtype == "f32" else value.cpu()).contiguous()
            named = (self._names.get(key_of(t)) for t in sources if t is not None)
            name = next((name for name in named if name is not None), self.layer)
            number = self.new(f"{name}:{kind}" if kind else name, "constant", value.shape, dtype)
            self.values[number] = value
            self._constants[identity] = number, sources  # held, so that their addresses do not come up again
        return self._constants[identity][0]

    def parameter(self, tensor: Tensor, layout: str, arrange: Callable[[Tensor], Tensor]) -> int:
        """The trained tensor that is that parameter of the model, laid out by `arrange`, which `layout` names.

        Raises:
            UnsupportedLayerError: it is not a parameter but was computed from one, or lies in two layouts.
        """
        key = key_of(tensor)
        name = self._names.get(key)
        if name is None:
            source = self._trained_storages[tensor.untyped_storage()._cdata]
            raise self.refusal(source, "trains, and the layer computes with only a part or another view of it")
        if key not in self.trained:
            value = stored(arrange(tensor.detach())).clone(memory_format=torch.contiguous_format)
            number = self.new(name, "trained", value.shape)
            self.values[number] = value
            self.trained[key] = number, layout
        number, before = self.trained[key]
        if before != layout:
            raise self.refusal(name, "trains, and is used by layers that need it in two layouts")
        return number

    def vector(self, tensor: Tensor | None) -> int | None:
        """A bias, scale or shift (C,) as it is: trained or constant; None if there is none."""
        if tensor is None:
            return None
        if self.trains(tensor):
            return self.parameter(tensor, "as-is", lambda t: t)
        return self.constant("", [tensor], lambda: tensor)

    def trains(self, tensor: Tensor | None) -> bool:
        """Whether it is a trained parameter, or lies in the memory of one."""
        return tensor is not None and tensor.untyped_storage()._cdata in self._trained_storages

    def trained_name(self, tensor: Tensor) -> str:
        """The name of the trained parameter that the tensor is, or lies in."""
        return self._trained_storages[tensor.untyped_storage()._cdata]

    def name_of(self, tensor: Tensor) -> str:
        """The name in the model, or one made from the current layer's path."""
        return self._names.get(key_of(tensor), f"{self.layer}:computed")

    def layer_of(self, tensor: Tensor | None) -> str | None:
        """Path of the layer whose tensor it is; None if it is none of the model's."""
        name = None if tensor is None else self._names.get(key_of(tensor))
        return None if name is None else name.rpartition(".")[0]

    # ------------------------------------------------------------ instructions

    def emit(self, op: str, attributes: Mapping[str, Any] | None = None, **operands: int | None) -> None:
        """Put an instruction behind what is there."""
        made: Any = operands
        block = self.block_of(self.layer)
        self.instructions.append(instruction(op, attributes, layer=self.layer, block=block, **made))

    def block_of(self, layer: str) -> int:
        """Number of the innermost block that the layer is in; -1: none."""
        inside = [path for path in self._blocks if layer == path or layer.startswith(f"{path}.")]
        return self._blocks.index(max(inside, key=len)) if inside else -1

    def next_dropout(self) -> int:
        """Number of the next dropout, in the order of the forward."""
        self._dropouts += 1
        return self._dropouts - 1

    def refusal(self, what: str, why: str = "has no instruction in a program") -> UnsupportedLayerError:
        """The error that names the current layer."""
        return UnsupportedLayerError(
            f"{self.layer or 'the network itself'}: {what} {why}; train this network with the lab's engine "
            "(tinytl train without --engine device)"
        )


def stored(tensor: Tensor) -> Tensor:
    """As a value of type f32: float64 stays what it is, for exact comparison; the file has float32."""
    return tensor.to("cpu", torch.float64 if tensor.dtype == torch.float64 else torch.float32)
