"""A super-network's tensors by their published names, and the cut of a sub-network out of them.

Names, for block N of the super-network (0 is the fixed first block)::

    first_conv.conv.weight                first_conv.bn.*
    blocks.0.conv.depth_conv.conv.weight  .bn.*      blocks.0.conv.point_linear.conv.weight  .bn.*
    blocks.N.conv.inverted_bottleneck.conv.conv.weight  .bn.bn.*
    blocks.N.conv.depth_conv.conv.conv.weight  .conv.7to5_matrix  .conv.5to3_matrix  .bn.bn.*
    blocks.N.conv.depth_conv.se.fc.reduce.*  .expand.*                          where the stage has it
    blocks.N.conv.point_linear.conv.conv.weight  .bn.bn.*
    feature_mix_layer.conv.weight  .bn.*                                        family 'proxyless'
    final_expand_layer.conv.weight  .bn.*    feature_mix_layer.conv.weight      family 'mbv3'
    classifier.linear.*

Older files say ``mobile_inverted_conv`` for a block's ``conv`` and leave the doubled ``conv.conv``, ``bn.bn`` single.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tinytl.backbones.once_for_all import (
    OfaArchitecture,
    OfaSpace,
    active_blocks,
    elastic_kernel,
    matrix_names,
    middle_channels,
)
from tinytl.backbones.weights import read_state
from tinytl.errors import WeightsError
from tinytl.nn.lite_residual import make_divisible

Shape = tuple[int, ...]
_LISTED = 8  # names of a kind in one message
_NORM = ("weight", "bias", "running_mean", "running_var")
_TRACKED = "num_batches_tracked"


def squeezed_channels(middle: int) -> int:
    """Width between the two layers of squeeze and excite over ``middle`` channels."""
    return make_divisible(middle // 4)


def super_state_shapes(space: OfaSpace, num_classes: int = 1000) -> dict[str, Shape]:
    """Every key of the super-network's state dict -> its shape, in forward order."""
    shapes: dict[str, Shape] = {}

    def norm(path: str, channels: int) -> None:
        shapes.update({f"{path}.{tensor}": (channels,) for tensor in _NORM})
        shapes[f"{path}.{_TRACKED}"] = ()

    shapes["first_conv.conv.weight"] = (space.stem, 3, 3, 3)
    norm("first_conv.bn", space.stem)
    shapes["blocks.0.conv.depth_conv.conv.weight"] = (space.stem, 1, 3, 3)
    norm("blocks.0.conv.depth_conv.bn", space.stem)
    shapes["blocks.0.conv.point_linear.conv.weight"] = (space.first, space.stem, 1, 1)
    norm("blocks.0.conv.point_linear.bn", space.first)
    for block in space.blocks:
        path, kernel = f"blocks.{block.number}.conv", space.kernels[-1]
        middle = middle_channels(space, block.number, space.expands[-1])
        shapes[f"{path}.inverted_bottleneck.conv.conv.weight"] = (middle, block.in_channels, 1, 1)
        norm(f"{path}.inverted_bottleneck.bn.bn", middle)
        shapes[f"{path}.depth_conv.conv.conv.weight"] = (middle, 1, kernel, kernel)
        for name, small in matrix_names(space.kernels):
            shapes[f"{path}.depth_conv.conv.{name}"] = (small * small, small * small)
        norm(f"{path}.depth_conv.bn.bn", middle)
        if space.stages[block.stage].excites:
            excite, squeezed = f"{path}.depth_conv.se.fc", squeezed_channels(middle)
            shapes[f"{excite}.reduce.weight"] = (squeezed, middle, 1, 1)
            shapes[f"{excite}.reduce.bias"] = (squeezed,)
            shapes[f"{excite}.expand.weight"] = (middle, squeezed, 1, 1)
            shapes[f"{excite}.expand.bias"] = (middle,)
        shapes[f"{path}.point_linear.conv.conv.weight"] = (block.out_channels, middle, 1, 1)
        norm(f"{path}.point_linear.bn.bn", block.out_channels)
    head, last = _head_path(space), space.stages[-1].width
    shapes[f"{head}.conv.weight"] = (space.head, last, 1, 1)
    norm(f"{head}.bn", space.head)
    if space.hidden:
        shapes["feature_mix_layer.conv.weight"] = (space.hidden, space.head, 1, 1)
    shapes["classifier.linear.weight"] = (num_classes, space.hidden or space.head)
    shapes["classifier.linear.bias"] = (num_classes,)
    return shapes


def _head_path(space: OfaSpace) -> str:
    return "final_expand_layer" if space.hidden else "feature_mix_layer"


def is_super_state(keys: Iterable[str]) -> bool:
    """Whether a file's keys are a super-network's (in any spelling) and not a sub-network's own."""
    return any(key.startswith(("blocks.", "first_conv.")) for key in keys)


def published_state(space: OfaSpace, state: Mapping[str, Tensor], origin: str = "weights") -> dict[str, Tensor]:
    """A super-network's state dict under the names of ``super_state_shapes``, for whichever number of classes it has.

    Args:
        space: of the super-network.
        state: in the published names or their older spelling; ``num_batches_tracked`` may be absent.
        origin: what to call it in an error.

    Raises:
        WeightsError: lists keys that are missing, unknown or of a wrong shape.
    """
    names = {_short(key): key for key in super_state_shapes(space)}
    known = {names.get(_short(key), key): value for key, value in state.items()}
    weight = known.get("classifier.linear.weight")
    classes = weight.shape[0] if weight is not None and weight.ndim else 1000
    shapes = super_state_shapes(space, classes)
    missing = [key for key in shapes if key not in known and not key.endswith(_TRACKED)]
    unknown = [key for key in known if key not in shapes]
    wrong = [
        f"{key} {tuple(value.shape)} for {shapes[key]}"
        for key, value in known.items()
        if key in shapes and tuple(value.shape) != shapes[key]
    ]
    spelled = [key for key in state if known[names.get(_short(key), key)] is not state[key]]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:_LISTED])}{', ...' if len(keys) > _LISTED else ''}"
        for kind, keys in (
            ("missing", missing),
            ("unknown", unknown),
            ("of a wrong shape", wrong),
            ("there under two spellings", spelled),
        )
        if keys
    ]
    if problems:
        raise WeightsError(f"{origin} does not fit {space.name}: {'; '.join(problems)}")
    return known


def _short(key: str) -> str:
    """A spelling that the published names and their older forms have in common."""
    key = key.replace(".mobile_inverted_conv.", ".conv.")
    return key.replace(".conv.conv.", ".conv.").replace(".bn.bn.", ".bn.").replace(".linear.linear.", ".linear.")


def cut_state(space: OfaSpace, super_state: Mapping[str, Tensor], architecture: OfaArchitecture) -> dict[str, Tensor]:
    """The state dict of ``ofa_networks.sub_network(space, architecture)`` that the super-network holds.

    Of every tensor along a block's middle the first ``middle_channels`` are taken, of squeeze and excite's inner width
    the first ``squeezed_channels(middle)``, and then the kernel as ``elastic_kernel`` has it. Nothing else is computed,
    so a super-network that slices in this order gives the sub-network's bits. Batch norm's statistics are sliced too;
    they are those of the largest network, and a sub-network of some accuracy wants its own.

    Args:
        space: of the super-network.
        super_state: under the published names (see ``published_state``).
        architecture: of the sub-network.

    Returns:
        Contiguous tensors of their own, in our names.

    Raises:
        InputError: no architecture of this space.
    """
    state: dict[str, Tensor] = {}

    def norm(ours: str, theirs: str, channels: int) -> None:
        for tensor in _NORM:
            state[f"{ours}.norm.{tensor}"] = super_state[f"{theirs}.{tensor}"][:channels]
        if f"{theirs}.{_TRACKED}" in super_state:
            state[f"{ours}.norm.{_TRACKED}"] = super_state[f"{theirs}.{_TRACKED}"]

    def unit(ours: str, theirs: str, channels: int) -> None:
        state[f"{ours}.conv.weight"] = super_state[f"{theirs}.conv.weight"]
        norm(ours, f"{theirs}.bn", channels)

    unit("features.stem", "first_conv", space.stem)
    first = "features.block0" + (".body" if space.first_has_shortcut else "")
    unit(f"{first}.depthwise", "blocks.0.conv.depth_conv", space.stem)
    unit(f"{first}.project", "blocks.0.conv.point_linear", space.first)
    blocks = active_blocks(space, architecture)
    for index, (block, kernel, expand) in enumerate(
        zip(blocks, architecture.kernels, architecture.expands, strict=True), start=1
    ):
        ours, theirs = f"features.block{index}" + (".body" if block.has_shortcut else ""), f"blocks.{block.number}.conv"
        middle = middle_channels(space, block.number, expand)
        state[f"{ours}.expand.conv.weight"] = super_state[f"{theirs}.inverted_bottleneck.conv.conv.weight"][:middle]
        norm(f"{ours}.expand", f"{theirs}.inverted_bottleneck.bn.bn", middle)
        state[f"{ours}.depthwise.conv.weight"] = _kernel(
            space, super_state, f"{theirs}.depth_conv.conv", middle, kernel
        )
        norm(f"{ours}.depthwise", f"{theirs}.depth_conv.bn.bn", middle)
        if space.stages[block.stage].excites:
            excite, squeezed = f"{theirs}.depth_conv.se.fc", squeezed_channels(middle)
            state[f"{ours}.excite.fc1.weight"] = super_state[f"{excite}.reduce.weight"][:squeezed, :middle]
            state[f"{ours}.excite.fc1.bias"] = super_state[f"{excite}.reduce.bias"][:squeezed]
            state[f"{ours}.excite.fc2.weight"] = super_state[f"{excite}.expand.weight"][:middle, :squeezed]
            state[f"{ours}.excite.fc2.bias"] = super_state[f"{excite}.expand.bias"][:middle]
        state[f"{ours}.project.conv.weight"] = super_state[f"{theirs}.point_linear.conv.conv.weight"][:, :middle]
        norm(f"{ours}.project", f"{theirs}.point_linear.bn.bn", block.out_channels)
    unit("features.head", _head_path(space), space.head)
    if space.hidden:
        state["hidden.linear.weight"] = super_state["feature_mix_layer.conv.weight"].flatten(1)
    for tensor in ("weight", "bias"):
        state[f"classifier.{tensor}"] = super_state[f"classifier.linear.{tensor}"]
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _kernel(space: OfaSpace, state: Mapping[str, Tensor], path: str, middle: int, kernel: int) -> Tensor:
    matrices = {name: state[f"{path}.{name}"] for name, _ in matrix_names(space.kernels)}
    return elastic_kernel(state[f"{path}.conv.weight"][:middle], matrices, kernel)


def read_sub_network(path: Path, space: OfaSpace, architecture: OfaArchitecture) -> dict[str, Tensor]:
    """The sub-network's state dict out of a file: cut from a super-network's, or as it is in any other.

    Raises:
        WeightsError: unreadable, or a super-network's that does not fit the space.
    """
    state = read_state(path)
    if not is_super_state(state):
        return dict(state)
    return cut_state(space, published_state(space, state, repr(str(path))), architecture)
