"""The int8 weights of ``mcu.py``'s networks, from either form that they are to be had in, as floating-point tensors.

Per convolution: int8 weight (out, in / groups, k, k), int32 bias (out), a weight scale per output channel (out) and the
scale of the input, x_scale::

    weight = int8 * weight_scale        bias = int32 * x_scale * weight_scale

(computed in float64, kept in float32). The scale and zero point of the output belong to 8-bit arithmetic and are not
used: zero padding of the published arithmetic is padding by the zero point, that is, by 0.

Two forms are read:

- ``.pkl``, as published: dictionaries of arrays, ``first_conv``, ``blocks`` (``pointwise1``, ``depthwise``,
  ``pointwise2``), ``classifier``; each with ``params`` ``weight``, ``bias``, ``w_scales``, ``x_scale``. Read by
  ``array_pickle.py``.
- ``.safetensors``: ``NAME.weight_int8``, ``NAME.bias_int32``, ``NAME.weight_scale``, and in the metadata
  ``architecture``, JSON with ``x_scale`` and the geometry of each convolution.

The geometry that a file states (strides, groups, shortcuts) must be the network's: shapes alone would not tell.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinytl.backbones._inverted_residual import BlockSpec
from tinytl.backbones._layouts import unit_path
from tinytl.backbones.array_pickle import read_array_pickle
from tinytl.backbones.weights import read_state
from tinytl.errors import WeightsError

_UNITS = {"expand": "pointwise1", "depthwise": "depthwise", "project": "pointwise2"}


@dataclass(frozen=True)
class _Conv:
    """A convolution of the network: our layer's path, the file's name, and its shape."""

    ours: str
    name: str
    shape: tuple[int, int, int, int]
    stride: int
    groups: int


def read_mcu_state(path: Path, specs: Sequence[BlockSpec], num_classes: int = 1000) -> dict[str, Tensor]:
    """The float32 state dict of ``FoldedNet(specs)`` that the file stands for.

    A file of neither int8 form is taken for a state dict of our own network and returned as it is.

    Raises:
        WeightsError: unreadable, or not this network's: names, shapes, types, scales, geometry; one line.
    """
    convs = list(_convolutions(specs, num_classes))
    if path.suffix.lower() == ".pkl":
        published = _Published(path)
    elif path.suffix == ".safetensors" and _architecture(path) is not None:
        published = _Repacked(path)
    else:
        return read_state(path)
    state: dict[str, Tensor] = {}
    try:
        published.check_blocks([spec.has_shortcut for spec in specs], [spec.expand != 1 for spec in specs])
        for conv in convs:
            weight, bias = published.floats(conv)
            state[f"{conv.ours}.weight"] = weight.flatten(1) if conv.ours == "classifier" else weight
            state[f"{conv.ours}.bias"] = bias
    except _Misfit as misfit:
        raise WeightsError(f"{str(path)!r} does not hold this network's int8 weights: {misfit}") from None
    return state


class _Misfit(Exception):
    """What does not fit, for one line."""


def _said(value: Any) -> str:
    """A hostile file's value in a message: short, and never a container's content."""
    return repr(value)[:40] if isinstance(value, (int, float, str, type(None))) else f"a {type(value).__name__}"


def _convolutions(specs: Sequence[BlockSpec], num_classes: int) -> Iterator[_Conv]:
    stem, last = specs[0].in_channels, specs[-1].out_channels
    yield _Conv("features.stem.conv", "first_conv", (stem, 3, 3, 3), 2, 1)
    for index, spec in enumerate(specs):
        middle = spec.in_channels * spec.expand
        shapes = {
            "expand": ((middle, spec.in_channels, 1, 1), 1, 1),
            "depthwise": ((middle, 1, spec.kernel, spec.kernel), spec.stride, middle),
            "project": ((spec.out_channels, middle, 1, 1), 1, 1),
        }
        for unit, (shape, stride, groups) in shapes.items():
            if unit != "expand" or spec.expand != 1:
                ours = f"{unit_path(index, spec)}.{unit}.conv"
                yield _Conv(ours, f"blocks.{index}.{_UNITS[unit]}", shape, stride, groups)
    yield _Conv("classifier", "classifier", (num_classes, last, 1, 1), 1, 1)


class _Int8File(ABC):
    """A file of either form; ``entry`` finds a convolution's description by name."""

    description: dict[str, Any]

    def entry(self, name: str) -> dict[str, Any]:
        found: Any = self.description
        for key in name.split("."):
            if key.isdigit():
                found = found[int(key)] if isinstance(found, list) and int(key) < len(found) else None
            else:
                found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise _Misfit(f"{name} is missing")
        return found

    def check_blocks(self, shortcuts: list[bool], expands: list[bool]) -> None:
        blocks = self.description.get("blocks")
        count = len(blocks) if isinstance(blocks, list) else 0
        if count != len(shortcuts):
            raise _Misfit(f"{count} blocks, expected {len(shortcuts)}")
        for index, (shortcut, expand) in enumerate(zip(shortcuts, expands, strict=True)):
            block = self.entry(f"blocks.{index}")
            residual = block.get("residual")  # a description of the sum, or true; None or false: no shortcut
            if (residual is not None and residual is not False) != shortcut:
                raise _Misfit(f"blocks.{index}: {'no ' if shortcut else 'a '}shortcut, expected the contrary")
            if (block.get("pointwise1") is not None) != expand or block.get("se") is not None:
                raise _Misfit(f"blocks.{index}: has other layers than expected")
        if self.description.get("feature_mix") is not None:
            raise _Misfit("has a feature_mix layer, expected none")

    def floats(self, conv: _Conv) -> tuple[Tensor, Tensor]:
        weight, bias, scale, x_scale = self.integers(conv)
        count = conv.shape[0]
        for what, array, shape, kind in (
            ("weight", weight, conv.shape, np.int8),
            ("bias", bias, (count,), np.int32),
            ("weight scale", scale, (count,), np.float32),
        ):
            if not isinstance(array, np.ndarray) or array.dtype != kind or array.shape != shape:
                given = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                raise _Misfit(f"{conv.name}: {what} is {given}, expected {np.dtype(kind)} {shape}")
        if not (type(x_scale) is float and math.isfinite(x_scale) and x_scale > 0):
            raise _Misfit(f"{conv.name}: x_scale is {_said(x_scale)}, expected a number above 0")
        if not (np.isfinite(scale).all() and (scale >= 0).all()):
            raise _Misfit(f"{conv.name}: weight scales that are negative or not finite")
        wide = scale.astype(np.float64)
        floats = weight * wide[:, None, None, None], bias * (x_scale * wide)
        if max(np.abs(array).max() for array in floats) > np.finfo(np.float32).max:
            raise _Misfit(f"{conv.name}: scales that lead out of float32")
        return torch.from_numpy(floats[0].astype(np.float32)), torch.from_numpy(floats[1].astype(np.float32))

    @abstractmethod
    def integers(self, conv: _Conv) -> tuple[Any, Any, Any, Any]:
        """Weight, bias, weight scale and x_scale of a convolution, unchecked but for its geometry."""

    def check_geometry(self, conv: _Conv, kernel: Any, stride: Any, groups: Any) -> None:
        for what, given, expected in (
            ("kernel", kernel, conv.shape[2]),
            ("stride", stride, conv.stride),
            ("groups", groups, conv.groups),
        ):
            if type(given) is not int or given != expected:
                raise _Misfit(f"{conv.name}: {what} {_said(given)}, expected {expected}")


class _Published(_Int8File):
    def __init__(self, path: Path) -> None:
        found = read_array_pickle(path)
        if not isinstance(found, dict):
            raise WeightsError(f"{str(path)!r} does not hold int8 weights: a {type(found).__name__}, not a dictionary")
        self.description = found

    def integers(self, conv: _Conv) -> tuple[Any, Any, Any, Any]:
        entry, params = self.entry(conv.name), self.entry(f"{conv.name}.params")
        kernel = entry.get("kernel_size")
        square = kernel[0] if isinstance(kernel, tuple) and len(set(kernel)) == 1 else kernel
        self.check_geometry(conv, square, entry.get("stride"), entry.get("groups"))
        return params.get("weight"), params.get("bias"), params.get("w_scales"), params.get("x_scale")


class _Repacked(_Int8File):
    def __init__(self, path: Path) -> None:
        self.path, found = path, _architecture(path)
        if not isinstance(found, dict):
            raise WeightsError(f"{str(path)!r} does not hold int8 weights: its architecture is not a dictionary")
        self.description = found
        with safe_open(path, "numpy") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)

    def check_blocks(self, shortcuts: list[bool], expands: list[bool]) -> None:
        super().check_blocks(shortcuts, expands)
        count = 3 * (2 * len(expands) + sum(expands) + 2)
        if len(self.tensors) != count:
            raise _Misfit(f"{len(self.tensors)} tensors, expected {count}")

    def integers(self, conv: _Conv) -> tuple[Any, Any, Any, Any]:
        entry = self.entry(conv.name)
        self.check_geometry(conv, entry.get("k"), entry.get("stride"), entry.get("groups"))
        keys = [f"{conv.name}.{kind}" for kind in ("weight_int8", "bias_int32", "weight_scale")]
        missing = [key for key in keys if key not in self.tensors]
        if missing:
            raise _Misfit(f"{missing[0]} is missing")
        weight, bias, scale = (self.tensors[key] for key in keys)
        return weight, bias, scale, entry.get("x_scale")


def _architecture(path: Path) -> Any:
    """The metadata's description of the network; None where there is none.

    Raises:
        WeightsError: not a safetensors file, or the description is not JSON.
    """
    try:
        with safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get("architecture")
    except (OSError, SafetensorError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"cannot read the weights in {str(path)!r}: {why}") from error
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise WeightsError(f"cannot read the weights in {str(path)!r}: its architecture is not JSON") from None
