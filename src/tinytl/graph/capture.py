"""Trace a network in both modes, and make sure that what was traced holds for other batches and other sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tinytl.errors import InputError, UnsupportedLayerError

from .frame import Trace, label
from .program import Program
from .tracer import trace

_ANOTHER_SIZE = 32  # pixels more: what networks divide their images by


@dataclass(frozen=True)
class Captured:
    """A network's traces: in training mode, and in evaluation mode."""

    training: Trace
    evaluation: Trace


def run_traced(ghost: nn.Module, resolution: int, is_leaf: Callable[[nn.Module], bool], *, batch: int = 2) -> Trace:
    """Trace `ghost`, a network on the meta device, in the mode it is in, on images of that size.

    Raises:
        UnsupportedLayerError: what it does cannot be traced where a gradient flows.
        InputError: it does not run on such images.
    """
    dtype = next((p.dtype for p in ghost.parameters()), torch.float32)
    images = torch.empty((batch, 3, resolution, resolution), dtype=dtype, device="meta")
    try:
        return trace(ghost, (images,), is_leaf)
    except _MISFITS as error:
        first = (str(error).splitlines() or [""])[0]
        sides = range(resolution + 8, resolution + 136, 8)
        larger = next((side for side in sides if _takes(ghost, images, side)), None)
        mend = "give the side that it takes with resolution=" if larger is None else f"it does with resolution={larger}"
        raise InputError(
            f"the network does not run on images (N, 3, {resolution}, {resolution}): {type(error).__name__}: "
            f"{first}; {mend}"
        ) from error


_MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def _takes(ghost: nn.Module, images: torch.Tensor, side: int) -> bool:
    """Whether the network runs on images of another size: most that do not are too small for it."""
    try:
        with torch.no_grad():
            ghost(images.new_empty((*images.shape[:2], side, side)))
    except _MISFITS:
        return False
    return True


def capture(ghost: nn.Module, resolution: int, is_leaf: Callable[[nn.Module], bool]) -> Captured:
    """Trace `ghost` in both modes.

    Raises:
        UnsupportedLayerError, InputError: as `run_traced`; and a forward that does something else for another number
            of images.
    """
    ghost.train()
    training = run_traced(ghost, resolution, is_leaf)
    _hold(ghost, training, resolution, is_leaf)
    ghost.eval()
    evaluation = run_traced(ghost, resolution, is_leaf)
    if _differing(training, evaluation):
        _hold(ghost, evaluation, resolution, is_leaf)
    else:
        evaluation = training
    ghost.train()
    return Captured(training, evaluation)


def _hold(ghost: nn.Module, found: Trace, resolution: int, is_leaf: Callable[[nn.Module], bool]) -> None:
    """Hold a trace against others: of another batch, which must not differ, and of another size, which may."""
    for path in _differing(found, run_traced(ghost, resolution, is_leaf, batch=3)):
        if path in found.modules and not found.modules[path].flows:  # it may be left as it is, then
            found.leave_alone(path)
            continue
        if path not in found.modules:
            continue
        raise UnsupportedLayerError(
            f"{label(path, ghost.get_submodule(path))}: cannot be adapted exactly: it does something else for another "
            "number of images; take sizes from x.shape, and leave them as they are (no int())"
        )
    try:
        fixed = _differing(found, run_traced(ghost, resolution + _ANOTHER_SIZE, is_leaf))
    except (InputError, UnsupportedLayerError):
        fixed = [""]  # stock cannot do it either, or it does something else there
    for path in fixed:
        entry = found.modules.get(path)
        if entry is not None and entry.program is not None:
            shapes = tuple(shape[1:] for shape in entry.inputs)
            entry.program = dataclasses.replace(entry.program, fixed=shapes)


def _differing(one: Trace, other: Trace) -> list[str]:
    """Paths of the modules whose programs are not the same."""

    def program(trace: Trace, path: str) -> Program | None:
        return trace.modules[path].program if path in trace.modules else None

    paths = dict.fromkeys((*one.modules, *other.modules))
    return [path for path in paths if path in one.modules and program(one, path) != program(other, path)]
