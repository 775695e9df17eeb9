"""The ledger of what a network keeps for backward, by the rules that its operations state.

Nothing is computed: a copy of the network runs on the meta device, and every chain that runs is asked for its rule.
Counting is by storage, as memory is: an input that two chains keep is one tensor. What the network keeps outside the
lean operations is known too (dropout) or refused: nothing is counted as zero because it is unknown.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinytl.errors import UnsupportedLayerError
from tinytl.ops.chain import Stage, chain_keeps, observe_chains

from .lean import ImageDropout, LeanModule

_KEEPS_NOTHING: tuple[type[nn.Module], ...] = (nn.Identity, nn.Flatten)


@dataclass(frozen=True)
class KeptEntry:
    """One line of the ledger: which layer keeps how many bytes, and of what (input, mask, statistics)."""

    layer: str
    what: str
    bytes: int


@dataclass(frozen=True)
class Kept:
    """What a network keeps between forward and backward."""

    entries: tuple[KeptEntry, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.bytes for entry in self.entries)


def kept(model: nn.Module, input_shape: Sequence[int]) -> Kept:
    """What `model`, adapted, keeps for backward in training mode for an input (N, 3, H, W) of its own type.

    Parameters, buffers and the loss are left out; an input image that an operation keeps is counted.

    Raises:
        UnsupportedLayerError: a layer that is not lean, through which a gradient flows, and whose rule is unknown.
    """
    ghost = copy.deepcopy(model).to("meta").train()
    names = {id(tensor): name for name, tensor in ghost.named_parameters()}
    dtype = next((p.dtype for p in ghost.parameters()), torch.float32)
    entries: list[KeptEntry] = []
    seen: dict[int, Tensor] = {}  # by storage; holding the tensor keeps its address from coming up twice

    def on_chain(x: Tensor, stages: list[Stage]) -> None:
        for rule in chain_keeps(tuple(x.shape), x.dtype, stages, x_needs=x.requires_grad):
            if rule.is_chain_input:
                storage = x.untyped_storage()._cdata
                if storage in seen:
                    continue
                seen[storage] = x
            entries.append(KeptEntry(_layer(stages, rule.stage, names), rule.what, rule.bytes))

    handles = [
        module.register_forward_hook(_on_leaf(name, entries))
        for name, module in ghost.named_modules()
        if not isinstance(module, LeanModule) and not any(True for _ in module.children())
    ]
    try:
        with observe_chains(on_chain), torch.enable_grad():
            ghost(torch.empty(tuple(input_shape), dtype=dtype, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return Kept(tuple(entries))


def _on_leaf(name: str, entries: list[KeptEntry]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A hook that books what a leaf outside the lean operations keeps."""

    def book(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if type(module) in _KEEPS_NOTHING or not (isinstance(output, Tensor) and output.requires_grad):
            return
        if type(module) is not ImageDropout:
            raise UnsupportedLayerError(
                f"{name} ({type(module).__name__}): what it keeps for backward is not known; "
                "adapt the network with adapt_ first, or replace the layer by a supported one"
            )
        if module.p > 0.0:
            entries.append(KeptEntry(name, "mask", output.numel() * output.element_size()))

    return book


def _layer(stages: list[Stage], index: int, names: dict[int, str]) -> str:
    """The path of the layer that a stage belongs to, or of the nearest one before it that has a tensor."""
    for _, tensors in reversed(stages[: index + 1]):
        for tensor in tensors:
            if tensor is not None and id(tensor) in names:
                return names[id(tensor)].rpartition(".")[0]
    return "(input)"
