"""Backbones with an architecture in their name: ``NAME@BLOCKS``, the blocks of ``NAME`` that are kept.

Blocks go by their number in the full network, as in ``mcunet_5fps@0-5.7.10-13``: ranges with ``-``, lists with ``.``.
Only a block with an identity shortcut may be dropped: what goes around it stays, so every shape does, and the other
blocks keep their paths (``features.block7``) and their weights. Equal choices have one spelling, `kept_text`, and all
blocks together are the plain name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from tinytl._ranges import spell_ranges
from tinytl.errors import InputError
from tinytl.graph.blocks import find_blocks
from tinytl.graph.capture import run_traced
from tinytl.graph.frame import Trace
from tinytl.graph.program import ADDITIONS, Function
from tinytl.nn.layers import Residual, ShortcutBlock
from tinytl.nn.lite_residual import LiteBlock
from tinytl.nn.meta import meta_copy

_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)


def split_name(name: str) -> tuple[str, str | None]:
    """(name, architecture) of ``NAME@ARCHITECTURE``; None where there is none.

    >>> split_name("mcunet_5fps@0-4"), split_name("mcunet_5fps")
    (('mcunet_5fps', '0-4'), ('mcunet_5fps', None))
    """
    base, at, architecture = name.rpartition("@")
    return (base, architecture) if at else (name, None)


def parse_kept(text: str) -> tuple[int, ...]:
    """Block numbers of a text such as ``0-4.6.8-13``, ascending.

    Raises:
        InputError: not such a text, or a block twice.
    """
    kept: list[int] = []
    for part in text.split("."):
        found = _RANGE.fullmatch(part)
        first = int(found[1]) if found else 0
        last = int(found[2]) if found and found[2] else first
        if not found or last < first:
            raise InputError(f"blocks {text!r}: cannot read {part!r}: expected numbers and ranges, as in '0-5.7.10-13'")
        kept += range(first, last + 1)
    twice = [number for number in kept if kept.count(number) > 1]
    if twice:
        raise InputError(f"blocks {text!r}: block {twice[0]} is there twice: name it once")
    return tuple(sorted(kept))


def kept_text(kept: Iterable[int]) -> str:
    """Block numbers as `parse_kept` reads them; equal sets have equal texts.

    >>> kept_text([0, 1, 2, 5, 6, 9])
    '0-2.5-6.9'
    """
    return spell_ranges(kept)


def droppable(model: nn.Module, resolution: int = 224) -> tuple[int, ...]:
    """Numbers of the blocks that can be left out of a full network: those with an identity shortcut.

    Args:
        model: a network that says its ``block_paths``; any other is traced, without arithmetic.
        resolution: pixels a side of the images that a traced network runs on.

    Raises:
        InputError: a network in which no blocks can be told.
    """
    return blocks_of(model, "the network", resolution)[1]


def blocks_of(model: nn.Module, name: str, resolution: int = 224) -> tuple[int, tuple[int, ...]]:
    """(how many blocks a full network has, which of them may be dropped); arguments and errors as `drop_blocks_`."""
    paths, free = _droppable(model, resolution, name)
    return len(paths), free


def dropped_paths(model: nn.Module, kept: Sequence[int], name: str, resolution: int = 224) -> list[str]:
    """Paths of the blocks of a full network that are not kept; judged, for `drop_blocks_`.

    Args and errors as there.
    """
    paths, free = _droppable(model, resolution, name)
    check_kept(kept, len(paths), free, name)
    return [path for number, path in enumerate(paths) if number not in kept]


def drop_blocks_(model: nn.Module, kept: Sequence[int], name: str, resolution: int = 224) -> nn.Module:
    """Leave out all blocks of a full network but those numbered ``kept``, in place; also with lite modules beside them.

    Args:
        model: the full network; returned.
        kept: numbers, each once.
        name: what to call it in an error.
        resolution: as in `droppable`.

    Raises:
        InputError: no such block, a block that cannot be dropped, none kept, or blocks that cannot be told; untouched.
    """
    remove_(model, dropped_paths(model, kept, name, resolution))
    return model


def remove_(model: nn.Module, paths: Iterable[str]) -> None:
    """Take the modules at ``paths`` out of their sequences, whose other children keep their names.

    What is not there any more is passed over.
    """
    for path in paths:
        parent, _, child = path.rpartition(".")
        sequence = model.get_submodule(parent)
        if hasattr(sequence, child):
            delattr(sequence, child)  # unlike del in nn.Sequential, which numbers the rest anew


def holds_any(state: Iterable[str], names: Mapping[str, str], paths: Iterable[str]) -> bool:
    """Whether a file has a tensor of one of the blocks at ``paths``, so that it is the full network's.

    Args:
        state: the file's names.
        names: our name -> the file's, of every tensor of the full network.
        paths: of blocks.
    """
    under, there = tuple(f"{path}." for path in paths), set(state)
    return any(theirs in there for key, theirs in names.items() if key.startswith(under))


def check_kept(kept: Sequence[int], count: int, free: Sequence[int], name: str) -> None:
    """Judge a choice of blocks in a network of ``count`` blocks, of which those in ``free`` may be dropped.

    Raises:
        InputError: as `drop_blocks_`.
    """
    beyond = [number for number in kept if not 0 <= number < count]
    if beyond:
        raise InputError(f"{name}: no block {beyond[0]}: it has the blocks 0-{count - 1}")
    fixed = [number for number in range(count) if number not in kept and number not in free]
    may = f"may be dropped: {kept_text(free) or 'none'}"
    if fixed:
        raise InputError(f"{name}: block {fixed[0]} has no identity shortcut and cannot be dropped: {may}")
    if not kept:
        raise InputError(f"{name}: no block is kept: keep at least one; {may}")


def _droppable(model: nn.Module, resolution: int, name: str) -> tuple[list[str], tuple[int, ...]]:
    """The blocks' paths, and which of them can be dropped."""
    own = getattr(model, "block_paths", None)
    if own is not None:
        blocks = [model.get_submodule(path) for path in own]
        return list(own), tuple(number for number, block in enumerate(blocks) if _keeps_identity(block))
    ghost = meta_copy(model).requires_grad_(False).eval()
    trace = run_traced(ghost, resolution, _is_leaf)
    paths = find_blocks(ghost, trace)
    # Elsewhere than in a sequence, a forward of its own names its children, and would miss one.
    held = [type(ghost.get_submodule(path.rpartition(".")[0])) is nn.Sequential for path in paths]
    if not paths:
        raise InputError(f"{name}: no blocks were found in it, so none can be dropped: take it without '@'")
    free = [n for n, (path, there) in enumerate(zip(paths, held, strict=True)) if there and _adds_input(trace, path)]
    return paths, tuple(free)


def _keeps_identity(block: nn.Module) -> bool:
    if type(block) is LiteBlock:
        block = block.block
    if type(block) is ShortcutBlock:  # act(body(x) + x), and x has been through act already
        return type(block.shortcut) is nn.Identity
    return type(block) is Residual


def _adds_input(trace: Trace, path: str) -> bool:
    """Whether the block keeps the shape and adds its own input to what it makes of it."""
    entry = trace.get(path)
    if entry is None or entry.program is None or not entry.plain or entry.inputs != entry.outputs:
        return False
    given = entry.program.only_input
    return any(
        isinstance(step, Function) and step.name in ADDITIONS and any(ref == given for ref in step.refs())
        for step in entry.program.steps
    )


def _is_leaf(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
