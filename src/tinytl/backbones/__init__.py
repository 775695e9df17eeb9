"""Backbones: pretrained networks in plain PyTorch, by name.

>>> load("proxylessnas_mobile", pretrained=False, num_classes=10).model.classifier
Linear(in_features=1280, out_features=10, bias=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from tinytl.backbones._base import Backbone, Preprocessing
from tinytl.backbones._complexity import Complexity, complexity
from tinytl.backbones._layouts import recognize
from tinytl.backbones._registry import BACKBONES, PREFIX, BackboneEntry, canonical_name, find
from tinytl.backbones.architecture import droppable, dropped_paths, holds_any, remove_
from tinytl.backbones.timm_models import load_timm
from tinytl.backbones.weights import fetch, load_strict_, need_file
from tinytl.errors import InputError, UnknownNameError, WeightsError
from tinytl.nn.layers import Norm
from tinytl.nn.lite_residual import insert_lite_blocks_

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneEntry",
    "Complexity",
    "Preprocessing",
    "canonical_name",
    "complexity",
    "droppable",
    "find",
    "load",
]


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
        name: a key of ``BACKBONES``, ``mobilenet_v2_NNN`` for a width of NNN percent, or ``timm:NAME`` for a
            network of timm; with ``@BLOCKS`` only these blocks of it are kept, and a once-for-all space with
            ``@ARCHITECTURE`` is that sub-network (docs/backbones.md).
        pretrained: read ImageNet weights; else they are random.
        norm: 'bn', or 'gn' (group norm with weight standardization).
        weights: a file with them, in any layout that is read for this network (docs/backbones.md) or our own;
            None: wherever they can be had. For a name with ``@`` it holds the full network or the super-network, out
            of which the sub-network is cut, or the sub-network itself.
        lite: insert lite residual modules. They take their weights from the file if it holds any, else they
            are fresh and leave the output as it is (``Backbone.lite`` says which). None: if the file holds any.
        num_classes: put a fresh linear classifier in place of the loaded one (initialized as torch.nn does).

    Raises:
        UnknownNameError: no such backbone.
        InputError: no such architecture; a combination that cannot be (norm 'gn' where weights have batch norm, or
            where there is no norm to replace; weights, not pretrained).
        WeightsError: no weights to be had, or they do not fit; the message says how to mend it.
    """
    name = canonical_name(name)
    if name.startswith(PREFIX):
        return load_timm(name, pretrained=pretrained, norm=norm, weights=weights, lite=lite, num_classes=num_classes)
    entry = find(name)
    if norm not in ("bn", "gn"):
        raise UnknownNameError("norm", norm, ("bn", "gn"))
    if weights is not None and not pretrained:
        raise InputError(f"weights {str(weights)!r} given with pretrained=False: leave one of the two out")
    if norm not in entry.norms:
        raise InputError(f"{name}: its norms are folded into its weights, norm {norm!r} has none to replace: take 'bn'")
    if pretrained and norm not in entry.weights_norms:
        raise InputError(
            f"{name}: the weights have batch norm, norm {norm!r} has none: take norm='bn' or pretrained=False"
        )
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: take at least 1")
    model, lite_state = (entry.whole or entry).build(norm=norm).eval(), "none"
    dropped = dropped_paths(model, entry.kept, name) if entry.whole else []
    if pretrained:
        lite_state = _load_weights_(model, name, entry, norm, weights, lite, dropped)
    else:
        remove_(model, dropped)
    paths = block_paths(model)[1:]
    if lite and lite_state == "none":
        insert_lite_blocks_(model, paths, norm=norm)
        lite_state = "fresh"
    if num_classes is not None:
        model.classifier = nn.Linear(classifier(model).in_features, num_classes).eval()
    return Backbone(name, model, entry.preprocessing, norm, pretrained, paths, lite_state)


def block_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of a backbone's blocks, in forward order, as the network itself says."""
    return tuple(model.block_paths)  # pyright: ignore[reportArgumentType]


def classifier(model: nn.Module) -> nn.Linear:
    """A backbone's linear classifier."""
    found = model.get_submodule("classifier")
    assert isinstance(found, nn.Linear)
    return found


def _load_weights_(
    model: nn.Module,
    name: str,
    entry: BackboneEntry,
    norm: Norm,
    weights: Path | None,
    lite: bool | None,
    dropped: Sequence[str],
) -> str:
    """Fill ``model`` and take the blocks at ``dropped`` out of it.

    Lite residual modules are inserted only when the file holds them ('pretrained').
    """
    if weights is not None:
        path = need_file(weights)
    elif entry.source is not None:
        path = fetch(entry.source)
    else:
        raise WeightsError(
            f"{name}: no published weights can be fetched: give a checkpoint with --weights FILE (weights=),"
            " or take random weights with pretrained=False"
        )
    state, origin = entry.read(path), repr(str(path))
    keys = list(model.state_dict())
    layout = recognize(state, keys, entry.layouts, origin)
    holds_lite = layout.holds_lite(state)
    if holds_lite and lite is False:
        raise WeightsError(f"{origin} holds lite residual modules: leave lite=False out")
    if holds_lite:  # beside a module of that kind, a block's own tensors are one level down
        keys += [f"{path}.block{key[len(path) :]}" for path in dropped for key in keys if key.startswith(f"{path}.")]
    if not holds_any(state, layout.names(keys), dropped):
        remove_(model, dropped)  # the file is the sub-network's own
    state = layout.prepared_(model, state)
    if holds_lite:
        insert_lite_blocks_(model, block_paths(model)[1:], norm=norm)
    names = layout.names(list(model.state_dict()))
    if entry.any_classes:
        _fit_classes_(model, state.get(names["classifier.weight"]))
    load_strict_(model, state, names, origin=origin)
    remove_(model, dropped)
    return "pretrained" if holds_lite else "none"


def _fit_classes_(model: nn.Module, weight: Tensor | None) -> None:
    """Give ``model`` a classifier for as many classes as the file's has."""
    own = classifier(model)
    if weight is not None and weight.ndim == 2 and len(weight) not in (0, own.out_features):
        model.classifier = nn.Linear(own.in_features, len(weight)).eval()
