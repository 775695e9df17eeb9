"""The int8 networks' files as their publishers write them, from any values: for tests that spoil one."""

from __future__ import annotations

import functools
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinytl.backbones import Backbone, load
from tinytl.backbones._inverted_residual import BlockSpec

MCU_WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "mcu-weights"
"""Beside the project on a development machine; tests that need it skip where it is absent."""

MCU_FILES = {
    "proxyless_w03": "proxyless-w0.3.safetensors",
    "mcunet_5fps": "mcunet-5fps.safetensors",
    "mbv2_w035": "mbv2-w0.35.safetensors",
}

UNITS = ("pointwise1", "depthwise", "pointwise2")


def need(file: str) -> Path:
    """A published file, or skip the test and say why."""
    path = MCU_WEIGHTS / file
    if not path.is_file():
        pytest.skip(f"no {file} in {MCU_WEIGHTS.relative_to(MCU_WEIGHTS.parents[2])} beside the project")
    return path


@functools.cache
def published(name: str) -> Backbone:
    """The network with its published weights (do not change it), or skip the test."""
    return load(name, weights=need(MCU_FILES[name]))


def shapes(specs: Sequence[BlockSpec], num_classes: int = 1000) -> dict[str, tuple[int, int, int, int]]:
    """Name -> weight shape of every convolution, in forward order."""
    found = {"first_conv": (specs[0].in_channels, 3, 3, 3)}
    for index, spec in enumerate(specs):
        middle = spec.in_channels * spec.expand
        if spec.expand > 1:
            found[f"blocks.{index}.pointwise1"] = (middle, spec.in_channels, 1, 1)
        found[f"blocks.{index}.depthwise"] = (middle, 1, spec.kernel, spec.kernel)
        found[f"blocks.{index}.pointwise2"] = (spec.out_channels, middle, 1, 1)
    found["classifier"] = (num_classes, specs[-1].out_channels, 1, 1)
    return found


def architecture(specs: Sequence[BlockSpec], x_scales: Mapping[str, float], num_classes: int = 1000) -> dict[str, Any]:
    """The metadata's description of a network, as in the published .safetensors."""
    weights = shapes(specs, num_classes)

    def entry(name: str, stride: int = 1, groups: int = 1) -> dict[str, Any] | None:
        if name not in weights:
            return None
        out, inner, kernel, _ = weights[name]
        geometry = {"cin": inner * groups, "cout": out, "k": kernel, "stride": stride, "groups": groups}
        return {"name": name, **geometry, "x_scale": x_scales[name]}

    blocks = []
    for index, spec in enumerate(specs):
        block: dict[str, Any] = {unit: entry(f"blocks.{index}.{unit}") for unit in UNITS}
        middle = spec.in_channels * spec.expand
        block["depthwise"] = entry(f"blocks.{index}.depthwise", spec.stride, middle)
        blocks.append({**block, "residual": spec.has_shortcut})
    return {"first_conv": entry("first_conv", 2), "blocks": blocks, "classifier": entry("classifier")}


def published_pickle(description: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The dictionary that is published as a pickle, from the other form's description and tensors."""

    def layer(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if entry is None:
            return None
        kinds = {"weight": "weight_int8", "bias": "bias_int32", "w_scales": "weight_scale"}
        params: dict[str, Any] = {ours: tensors[f"{entry['name']}.{kind}"] for ours, kind in kinds.items()}
        params["x_scale"] = entry["x_scale"]
        geometry = {"kernel_size": (entry["k"], entry["k"]), "stride": entry["stride"], "groups": entry["groups"]}
        return {**geometry, "params": params}

    blocks = []
    for block in description["blocks"]:
        residual = (
            {"in_channel": block["pointwise2"]["cout"], "params": {"x_scale": 0.1}} if block["residual"] else None
        )
        blocks.append({**{unit: layer(block[unit]) for unit in UNITS}, "residual": residual, "se": None})
    first, last = layer(description["first_conv"]), layer(description["classifier"])
    return {"first_conv": first, "blocks": blocks, "feature_mix": None, "classifier": last}


def torch_zip(path: Path, data: bytes) -> Path:
    """A file in torch.save's container around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
    return path


def write_pickle(path: Path, value: Any, protocol: int = 2) -> Path:
    """``value`` as torch.save writes it (protocol 2), without torch."""
    return torch_zip(path, pickle.dumps(value, protocol))
