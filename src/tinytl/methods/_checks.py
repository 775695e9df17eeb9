"""What is checked before a network is changed: what can be seen without running it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tinytl.errors import InputError, UnknownNameError, UnsupportedLayerError
from tinytl.graph.blocks import find_blocks, find_classifier, find_shape
from tinytl.graph.frame import Trace, label
from tinytl.nn.frozen_norm import FrozenStatsBatchNorm2d, StaysInEvaluation
from tinytl.nn.lean import ImageDropout, LeanForward, LeanLiteBlock, LeanModule, LeanResidual, LeanSequential

from ._text import shortened, spell
from .method import Method
from .parts import BlockBias, LastBlocks, LiteModules, LiteResidual

Shapes = list[tuple[int, int, int]]


def check_ready(model: nn.Module) -> None:
    """Refuse a network that is adapted already, and batch norms that have nothing to freeze."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _ADAPTED) or any(isinstance(v, _ATTACHED) for v in vars(module).values()):
            raise InputError(
                f"the network is adapted already ({path or 'it'} is a {kind}): adapt a fresh copy of its base"
            )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise UnsupportedLayerError(
                f"{path} ({kind}): has no running statistics and normalizes by the batch that it sees; "
                "train the network with track_running_stats=True"
            )
        own = vars(module).get("forward")
        if own is not None:
            raise UnsupportedLayerError(
                f"{label(path, module)}: its forward was replaced on the instance, which adapting would undo; "
                "make it a class of its own"
            )


def choose_classifier(model: nn.Module, classifier: str | None, trace: Trace) -> str:
    """The classifier's path: as given, or as found.

    Raises:
        InputError: there is none there, or none was found.
    """
    if classifier is None:
        found = find_classifier(model, trace)
        if found is None:
            raise InputError(
                "no classifier found: the last layer with parameters is no Linear and no 1x1 convolution; "
                "give the path of what trains for a new task with classifier="
            )
        return found
    if not classifier or not has_module(model, classifier):
        raise InputError(
            f"no classifier at {classifier!r}: give its path in the network with classifier=, or leave it out "
            f"(found: {find_classifier(model, trace)!r})"
        )
    if not any(True for _ in model.get_submodule(classifier).parameters()):
        raise InputError(f"the classifier at {classifier!r} has no parameters: give the path of one that has")
    return classifier


def choose_blocks(model: nn.Module, blocks: Sequence[str] | None, method: Method, trace: Trace) -> list[str]:
    """The blocks' paths in forward order: as given, as the network says (`block_paths`), or as found.

    Raises:
        UnknownNameError: no module at one of the paths.
        InputError: the method needs blocks and there are none, or too few.
    """
    own = getattr(model, "block_paths", None)
    paths = list(blocks) if blocks is not None else list(own) if own is not None else find_blocks(model, trace)
    last: LastBlocks | None = method.part(LastBlocks)
    if not paths and any(method.part(kind) is not None for kind in _NEED_BLOCKS):
        raise InputError(
            f"method {shortened(method.name)!r} needs to know the network's blocks, and none were found: give their "
            "paths in forward order with blocks=[...]"
        )
    for path in paths:
        if not path or not has_module(model, path):
            raise UnknownNameError("block", path, [name for name in trace.modules if name])
    if last is not None and last.count > len(paths):
        raise InputError(f"last blocks {last.count}: the network has {len(paths)}")
    for part in (method.part(BlockBias), method.part(LiteModules)):
        if part is not None and part.last_position >= len(paths):
            raise InputError(
                f"method part {shortened(spell(part))!r} names block {part.last_position}: the network has "
                f"{len(paths)} blocks, 0 to {len(paths) - 1}"
            )
    return paths


def blocks_of_lite(method: Method, paths: Sequence[str]) -> list[str]:
    """The blocks that the geometry of the method's lite modules looks at: all but the first, or up to the last named.

    Empty for a method without lite modules.
    """
    some: LiteModules | None = method.part(LiteModules)
    if some is not None:
        return list(paths[1 : some.last_position + 1])
    return list(paths[1:]) if method.part(LiteResidual) is not None else []


def lite_shapes(model: nn.Module, paths: Sequence[str], trace: Trace) -> Shapes | None:
    """(in channels, out channels, stride) of the blocks of `blocks_of_lite`, as measured on images.

    None for a network that says what its blocks are (`block_paths`): there they are read off the layers.

    Raises:
        InputError: a block that does not take one image to one image.
    """
    if getattr(model, "block_paths", None) is not None:
        return None
    found: Shapes = []
    for path in paths:
        shape = find_shape(trace, path)
        if shape is None:
            entry = trace.get(path)
            seen = "is never called" if entry is None else f"takes {entry.inputs} and gives {entry.outputs}"
            raise InputError(
                f"cannot insert a lite residual module at {path!r}: it {seen}; expected one image in and one out "
                "(N, C, H, W): name other blocks"
            )
        found.append(shape)
    return found


def has_module(model: nn.Module, path: str) -> bool:
    """Whether there is a module at `path`."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


_NEED_BLOCKS = (LiteResidual, LiteModules, BlockBias, LastBlocks)
_ADAPTED = (LeanModule, LeanSequential, LeanResidual, LeanLiteBlock, ImageDropout, FrozenStatsBatchNorm2d)
_ATTACHED = (LeanForward, StaysInEvaluation)
