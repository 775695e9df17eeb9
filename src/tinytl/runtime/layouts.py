"""Trained tensors between the executor's order of axes (NHWC kernels) and the delta's (PyTorch's), in plain Python.

A weight is a row of `outer` blocks; in each the executor has (positions, channels) and the delta (channels, positions):

    OHWI    delta (O, I, kh, kw), executor (O, kh, kw, I)     outer O, positions kh x kw, channels I
    HWC     delta (C, 1, kh, kw), executor (kh, kw, C)        outer 1, positions kh x kw, channels C

A slice assignment with a stride moves a whole row at once, so that a million floats take some tens of milliseconds.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence


def to_delta(data: memoryview, shape: Sequence[int], layout: str) -> memoryview:
    """Return the bytes of a float32 tensor of the delta's `shape`, row-major, of those that the executor has."""
    outer, positions, channels = _blocks(shape, layout)
    if positions == 1 or channels == 1:
        return data
    source, target = _floats(data), _floats(bytes(len(data)))
    size = positions * channels
    for block in range(0, outer * size, size):
        for at in range(positions):
            row = block + at * channels
            target[block + at : block + size : positions] = source[row : row + channels]
    return memoryview(target).cast("B")


def from_delta(data: memoryview, shape: Sequence[int], layout: str) -> memoryview:
    """The reverse of `to_delta`: the bytes that the executor has."""
    outer, positions, channels = _blocks(shape, layout)
    if positions == 1 or channels == 1:
        return data
    source, target = _floats(data), _floats(bytes(len(data)))
    size = positions * channels
    for block in range(0, outer * size, size):
        for at in range(positions):
            row = block + at * channels
            target[row : row + channels] = source[block + at : block + size : positions]
    return memoryview(target).cast("B")


def _floats(data: bytes | memoryview) -> array[float]:
    values = array("f")
    values.frombytes(data)
    return values


def _blocks(shape: Sequence[int], layout: str) -> tuple[int, int, int]:
    """(outer, positions, channels) of a tensor of the delta's shape."""
    if layout == "as-is":
        return 1, 1, 1
    first, second, height, width = shape
    if layout == "OHWI":
        return first, height * width, second
    if layout == "HWC" and second == 1:
        return 1, height * width, first
    raise ValueError(f"layout {layout!r} of a tensor of shape {list(shape)}")
