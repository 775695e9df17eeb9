"""Memory as the paper counts it: ``parameters + batch x peak activation``.

Source: Cai et al., NeurIPS 2020 (arXiv 2007.11622), by the authors' published profiler.

The rule, one layer after another in forward order, all sizes of one image at 32 bits::

    bytes at a layer = temporary + kept by earlier layers + input of the identity shortcut around it

    layer            temporary                 kept for backward
    convolution      input + output // groups  input if its weight trains
    linear           input + output            input if its weight trains
    norm             input                     input if its weight trains
    ReLU, ReLU6, ..  input                     1 bit an element, see below
    other activation input                     input, see below
    pooling, dropout, reshaping, upsampling, add: 0

Activations keep nothing where back-propagation reaches none of them (only the classifier trains); as soon as
it reaches one, all of them are charged, also those that nothing trains in front of. The published 37.1 MB of
TinyTL-L needs that: by what each mask needs for itself, that count would be 36.3. FT-Norm+Last's and
FT-Full's published counts are those of a network with lite residual modules of which the norms, or
everything, train as well.

One figure of the authors' profiler is not this rule's. It charges a module that is called again what its call before
cost, and a block's input until the block's end. ResNet-50's blocks call one ReLU three times, the last time behind the
sum: FT-Full there gives 805.3 MB, by the rule 804.4 (`tests/test_memory_counted.py` repeats that walk). Here every call
is charged for itself, and a shortcut's input while the layers run that it goes around.

A trainable parameter weighs 4 bytes, a frozen one 1 (the paper keeps those at 8 bits). The count describes a
system that no framework is: gradients, optimizer state, backward's temporaries, group norm's true needs and
padding are not in it. It is here because the published figures are counts; :mod:`tinytl.memory.measured` says
what is used.

Nothing is computed: a copy on the meta device is walked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinytl.errors import UnsupportedLayerError
from tinytl.nn.frozen_norm import FrozenStatsBatchNorm2d
from tinytl.nn.layers import Conv2dSame, Residual, StandardizedConv2d
from tinytl.nn.lite_residual import LiteBlock
from tinytl.nn.meta import meta_copy

_ACTIVATION_BYTES = 4
_TRAINABLE_BYTES = 4
_FROZEN_BYTES = 1

# Exact types: a subclass may keep what its base does not.
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, StandardizedConv2d)
_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    FrozenStatsBatchNorm2d,
    nn.GroupNorm,
    nn.LayerNorm,
)
_BIT_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
_FULL_ACTIVATIONS = (nn.Sigmoid, nn.Hardsigmoid, nn.SiLU, nn.Hardswish, nn.GELU, nn.Tanh)
_FREE = (
    nn.Identity,
    nn.Sequential,  # an empty one
    nn.Flatten,
    nn.Dropout,
    nn.Dropout2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.UpsamplingBilinear2d,
    nn.ZeroPad2d,
)
_KNOWN = (*_CONVS, nn.Linear, *_NORMS, *_BIT_ACTIVATIONS, *_FULL_ACTIVATIONS, *_FREE)


@dataclass(frozen=True)
class Counted:
    """The paper's count of one training step.

    ``total_bytes`` = ``parameter_bytes`` + ``activation_bytes``; ``activation_bytes`` = batch size x the peak
    of one image, which is reached at the layer whose path is ``peak_layer``.
    """

    total_bytes: int
    parameter_bytes: int
    activation_bytes: int
    peak_layer: str


def count(model: nn.Module, input_shape: Sequence[int]) -> Counted:
    """Count the training memory of ``model`` by the paper's rule.

    ``model`` is the stock form of an adapted network (``adapt_(..., lean=False)``): ``requires_grad`` says
    what trains. It is not changed, and nothing is computed. ``input_shape`` is (N, C, H, W); run in
    micro-batches, give the micro-batch's.

    Raises:
        UnsupportedLayerError: a layer that the rule says nothing about; its path and type are named.
    """
    _refuse_unknown(model)
    # Evaluation: batch statistics of a single 1 x 1 image are refused, and the count is the same.
    ghost = meta_copy(model).eval()
    peak_bits, peak_layer = _peak(_walk(ghost, torch.empty(1, *input_shape[1:], device="meta")))
    parameters = sum(p.numel() * (_TRAINABLE_BYTES if p.requires_grad else _FROZEN_BYTES) for p in model.parameters())
    # Masks of one image may end in part of a byte; a whole step rounds up once.
    activations = math.ceil(input_shape[0] * peak_bits / 8)
    return Counted(parameters + activations, parameters, activations, peak_layer)


def _refuse_unknown(model: nn.Module) -> None:
    for path, module in model.named_modules():
        is_leaf = next(module.children(), None) is None
        owns_parameters = next(module.parameters(recurse=False), None) is not None
        if (is_leaf or owns_parameters) and type(module) not in _KNOWN:
            raise UnsupportedLayerError(
                f"the paper's rule does not say what {path or 'the model'!r} ({type(module).__qualname__}) "
                "keeps: count the stock form, adapt_(..., lean=False), of a network of convolutions, "
                "linear layers, norms, activations and pooling"
            )


@dataclass(frozen=True)
class _Layer:
    """What one call of one layer costs an image, in bits (a mask is one bit an element)."""

    path: str
    temporary_bits: int
    kept_bits: int  # because its weight trains
    activation_bits: int  # kept because it is an activation that back-propagation passes
    shortcut_bits: int  # inputs of the identity shortcuts that it runs beside
    in_backward: bool  # something before it trains


def _walk(model: nn.Module, image: Tensor) -> list[_Layer]:
    """Run ``image`` (1, C, H, W) through ``model``, both on the meta device; return its layers in order."""
    layers: list[_Layer] = []
    shortcuts: list[int] = []

    def enter_shortcut(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shortcuts.append(_bits(inputs[0]))

    def leave_shortcut(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shortcuts.pop()

    def watch(path: str, module: nn.Module) -> None:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            costs = _layer_bits(module, x, output)
            layers.append(_Layer(path, *costs, shortcut_bits=sum(shortcuts), in_backward=x.requires_grad))

        module.register_forward_hook(record)

    # Layers first: hooks run in this order, and a layer that is itself a shortcut's body is beside it.
    for path, module in model.named_modules():
        if next(module.children(), None) is None:
            watch(path, module)
    for module in model.modules():
        beside_shortcut = None
        if isinstance(module, Residual):
            beside_shortcut = module.body
        elif isinstance(module, LiteBlock) and isinstance(module.block, Residual):
            beside_shortcut = module.lite  # The lite branch belongs to the block, whose input it shares.
        if beside_shortcut is not None:
            beside_shortcut.register_forward_pre_hook(enter_shortcut)
            beside_shortcut.register_forward_hook(leave_shortcut)
    with torch.enable_grad():
        model(image)
    return layers


def _peak(layers: Iterable[_Layer]) -> tuple[int, str]:
    """Return (bits, path) of the layer at which most is alive; the first of equals."""
    layers = list(layers)
    activations_kept = any(layer.activation_bits and layer.in_backward for layer in layers)
    kept = peak = 0
    path = ""
    for layer in layers:
        alive = layer.temporary_bits + kept + layer.shortcut_bits
        if alive > peak:
            peak, path = alive, layer.path
        kept += layer.kept_bits + (layer.activation_bits if activations_kept else 0)
    return peak, path


def _bits(tensor: Tensor) -> int:
    return tensor.numel() * _ACTIVATION_BYTES * 8


def _layer_bits(module: nn.Module, x: Tensor, y: Tensor) -> tuple[int, int, int]:
    """Return (temporary, kept, activation) bits of a layer: input ``x``, output ``y``, each (1, ...)."""
    kind = type(module)
    if kind in _FREE:
        return 0, 0, 0
    if kind in _BIT_ACTIVATIONS:
        return _bits(x), 0, x.numel()
    if kind in _FULL_ACTIVATIONS:
        return _bits(x), 0, _bits(x)
    weight: Any = module.weight  # None in a norm without scale
    kept = _bits(x) if weight is not None and weight.requires_grad else 0
    if kind in _NORMS:
        return _bits(x), kept, 0
    groups: Any = module.groups if kind in _CONVS else 1
    return _bits(x) + _bits(y) // groups, kept, 0
