"""The ledger of what a network keeps for backward, by the rules that its operations state.

Nothing is computed: a copy of the network runs on the meta device, and every chain that runs is asked for its rule.
Counting is by storage, as memory is: an input that two chains keep is one tensor. What the network keeps outside the
lean operations is known too (dropout), or refused (a layer), or, for what a forward of the user's own calls (a
function of torch.nn.functional), what PyTorch's autograd saves in that run: nothing is counted as zero because it is
unknown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinytl.errors import UnsupportedLayerError
from tinytl.ops.chain import Stage, chain_keeps, observe_chains
from tinytl.ops.region import observe_regions
from tinytl.ops.strips import strips_now

from .lean import ImageDropout, LeanForward, LeanModule, LeanSequential, LeanShortcutBlock
from .meta import meta_copy

_KEEPS_NOTHING: tuple[type[nn.Module], ...] = (nn.Identity, nn.Flatten, nn.Sequential, LeanSequential)


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
    ghost = meta_copy(model).train()
    names = {id(tensor): name for name, tensor in (*ghost.named_parameters(), *ghost.named_buffers())}
    dtype = next((p.dtype for p in ghost.parameters()), torch.float32)
    entries: list[KeptEntry] = []
    seen: dict[int, Tensor] = {}  # by storage; holding the tensor keeps its address from coming up twice
    block = "(input)"  # the block with a shortcut that was entered last

    def first_seen(tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()._cdata
        new = storage not in seen
        seen.setdefault(storage, tensor)
        return new

    def on_region(name: str, inputs: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        for what, tensors in (("input", inputs), ("random state", states)):
            held = sum(t.untyped_storage().nbytes() for t in tensors if first_seen(t))
            if held:
                entries.append(KeptEntry(name, what, held))

    def on_chain(x: Tensor, stages: list[Stage], recompute: bool | None) -> None:
        if not torch.is_grad_enabled():
            return  # inside a region, which keeps its own input
        rules = chain_keeps(
            tuple(x.shape), x.dtype, stages, x_needs=x.requires_grad, recompute=recompute, strips=strips_now()
        )
        for rule in rules:
            if rule.is_chain_input and not first_seen(x):
                continue
            # of an input, the whole storage, as it stays: it may be some of the images, or of a batch, alone
            held = x.untyped_storage().nbytes() if rule.is_chain_input else rule.bytes
            entries.append(KeptEntry(_layer(stages, rule.stage, names) or block, rule.what, held))

    def enter(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal block
            block = path

        return note

    handles = [
        module.register_forward_hook(_on_leaf(name, entries))
        for name, module in ghost.named_modules()
        if not (
            isinstance(module, LeanModule)
            or isinstance(vars(module).get("forward"), LeanForward)
            or type(module) in _KEEPS_NOTHING
            or any(True for _ in module.children())
        )
    ]
    handles += [
        module.register_forward_pre_hook(enter(f"{path}.act"))
        for path, module in ghost.named_modules()
        if isinstance(module, LeanShortcutBlock)
    ]
    saved = _Saved(resident=(*ghost.parameters(), *ghost.buffers()))
    try:
        with observe_chains(on_chain), observe_regions(on_region), torch.enable_grad(), saved.watch():
            ghost(torch.empty(tuple(input_shape), dtype=dtype, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    outside = saved.total_bytes - sum(entry.bytes for entry in entries)
    if outside > 0:
        entries.append(KeptEntry("(functions of PyTorch's own)", "saved tensors", outside))
    total: dict[tuple[str, str], int] = {}  # one line a layer, however many parts it runs in
    for entry in entries:
        total[entry.layer, entry.what] = total.get((entry.layer, entry.what), 0) + entry.bytes
    return Kept(tuple(KeptEntry(layer, what, held) for (layer, what), held in total.items()))


class _Saved:
    """All that autograd saves while watched, by storage, `resident` tensors left out."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        self.total_bytes = 0
        self._seen: dict[int, Tensor] = {tensor.untyped_storage()._cdata: tensor for tensor in resident}

    def watch(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # held, so that its address does not come up twice
            self.total_bytes += storage.nbytes()
        return tensor


def _on_leaf(name: str, entries: list[KeptEntry]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A hook that books what a leaf outside the lean operations keeps."""

    def book(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (isinstance(output, Tensor) and output.requires_grad):
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
    """The path of the layer that a stage belongs to, or of the nearest before it that has a tensor, or else behind it.

    '' if none has.
    """
    for _, tensors in (*reversed(stages[: index + 1]), *stages[index + 1 :]):
        for tensor in tensors:
            if tensor is not None and id(tensor) in names:
                return names[id(tensor)].rpartition(".")[0]
    return ""
