"""`pack_frozen_(model, bits)`: hold the frozen weights of a lean network in 8 or 16 bits each.

    adapt_(model, method)
    packed = pack_frozen_(model, 8)     # or 16; or 8 with codebook=True
    print(packed)

The codes take the place of the weights for good; each layer expands its own for the one operator that needs it, in
forward and in backward, so that no more than one layer's weights are there in full. The weights are rounded by this
(`tinytl.ops.packing` has the bounds), before anything is learned: training, evaluation and the saved delta belong to
the network with the rounded weights, and its gradients are exact. What trains, and every vector (biases, scales,
statistics), stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from tinytl.errors import InputError
from tinytl.ops.packing import Packing

from .lean import LeanForward, LeanModule
from .lean_layers import CODES, TABLE, hold_packed_


@dataclass(frozen=True)
class PackedLayer:
    """One weight that was packed.

    Attributes:
        layer: path of the layer.
        elements: values in the weight.
        bytes_before, bytes_after: of the weight; of its codes and table.
        error: the largest rounding error, relative to the layer's largest weight; 0 for a network without values.
    """

    layer: str
    elements: int
    bytes_before: int
    bytes_after: int
    error: float


@dataclass(frozen=True)
class LeftTensor:
    """A frozen tensor that stayed as it was: its name, its bytes, and why."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Packed:
    """What `pack_frozen_` did.

    Attributes:
        packing: how the weights are held now.
        layers: what was packed, in the network's order.
        left: the frozen tensors that stayed as they were.
    """

    packing: Packing
    layers: tuple[PackedLayer, ...]
    left: tuple[LeftTensor, ...]

    @property
    def bytes_before(self) -> int:
        """Of the weights that were packed."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of their codes and tables."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def left_bytes(self) -> int:
        """Of the frozen tensors that stayed as they were."""
        return sum(tensor.bytes for tensor in self.left)

    @property
    def largest_error(self) -> float:
        """The largest rounding error of any layer, relative to that layer's largest weight."""
        return max((layer.error for layer in self.layers), default=0.0)

    def rows(self) -> list[tuple[str, str]]:
        """What was done, as (name, value) lines for a table."""
        values = sum(layer.elements for layer in self.layers)
        return [
            ("packed", f"{values:,} frozen values in {len(self.layers)} layers ({self.packing.kind})"),
            ("their bytes", f"{self.bytes_before / 1e6:.2f} MB before, {self.bytes_after / 1e6:.2f} MB now"),
            ("largest error", f"{self.largest_error:.2%} of the layer's largest weight"),
            ("not packed", f"{self.left_bytes / 1e6:.2f} MB in {len(self.left)} frozen tensors"),
        ]

    def __str__(self) -> str:
        """The table as plain text."""
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())


def pack_frozen_(model: nn.Module, bits: int, codebook: bool = False) -> Packed:
    """Put codes of `bits` bits in the place of the frozen weights of `model`, in place.

    Which weights: those of the lean convolutions, linear layers and squeeze-and-excite layers, unless codes and table
    would be larger than the weight, or a forward of the user's own takes the weight by itself. The codes are a buffer
    `weight_codes` (int8, uint8 or int16), the table beside them a buffer `weight_table` in the weight's type; `weight`
    is None then. `model.to(dtype)` leaves codes as they are.

    Args:
        model: lean, as `adapt_` leaves it. On the meta device its shapes alone are packed.
        bits: 8 (a scale for each output channel) or 16 (half precision).
        codebook: with 8 bits, a table of 256 values a layer.

    Raises:
        InputError: other bits; a network that is not lean, or is packed already; a weight that is NaN or infinite.
            The model is as it was then.
    """
    try:
        packing = Packing.of(bits, codebook)
    except ValueError as error:
        raise InputError(f"cannot pack frozen weights into {error}") from None
    lean = [module for module in model.modules() if isinstance(module, LeanModule)]
    if not lean:
        raise InputError(
            "the network is not lean, so that nothing could expand its weights: adapt it with adapt_ first"
        )
    paths = {id(module): path for path, module in model.named_modules()}
    holders = [(module, which, holder) for module in lean for which, holder in enumerate(module.holders())]
    for _, _, holder in holders:
        if CODES in holder._buffers:
            raise InputError(f"the network is packed already ({paths[id(holder)]}): pack a fresh copy of its base")
    taken = {id(tensor) for tensor in _taken_directly(model)}
    left: dict[int, str] = {}
    chosen: list[tuple[LeanModule, int, nn.Module, Tensor]] = []
    for module, which, holder in holders:
        weight = holder._parameters["weight"]
        if weight is None or weight.requires_grad:
            continue
        if id(weight) in taken:
            left[id(weight)] = "a forward of its own takes it, too"
        elif packing.packed_bytes(weight) >= weight.numel() * weight.element_size():
            left[id(weight)] = "codes and table would be no smaller"
        elif not weight.is_meta and not bool(weight.isfinite().all()):
            raise InputError(f"{paths[id(holder)]}.weight holds NaN or infinity: give the network weights that work")
        else:
            chosen.append((module, which, holder, weight))
    made: dict[int, tuple[Tensor, Tensor]] = {}  # a weight that two layers share stays shared
    layers: list[PackedLayer] = []
    for module, which, holder, weight in chosen:
        if id(weight) not in made:
            made[id(weight)] = packing.pack(weight)
            layers.append(_report(paths[id(holder)], packing, weight, *made[id(weight)]))
        hold_packed_(holder, *made[id(weight)])
        module.set_packing_(which, packing)
    remaining = (
        LeftTensor(name, tensor.numel() * tensor.element_size(), left.get(id(tensor), "no weight of a lean layer"))
        for name, tensor in _frozen_tensors(model)
    )
    return Packed(packing, tuple(layers), tuple(remaining))


def _taken_directly(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that a traced forward takes itself: it would take codes for weights."""
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, LeanForward):
            yield from own.own_tensors()


def _report(layer: str, packing: Packing, weight: Tensor, codes: Tensor, table: Tensor) -> PackedLayer:
    error = 0.0
    if not weight.is_meta:
        largest = float(weight.abs().max())
        off = float((packing.expand(codes, table) - weight).abs().max())
        error = off / largest if largest else 0.0
    before = weight.numel() * weight.element_size()
    return PackedLayer(layer, weight.numel(), before, packing.packed_bytes(weight), error)


def _frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Frozen parameters, and weights that were made in advance: buffers that are more than a vector."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
    for name, buffer in model.named_buffers():
        packed = name.rpartition(".")[2] in (CODES, TABLE)
        if not packed and buffer.is_floating_point() and buffer.dim() > 1:
            yield name, buffer
