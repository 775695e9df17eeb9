"""`capture(model, adaptation, preprocessing)`: an adapted network's forward as a program.

The network's own code runs once on images that have a shape and no memory, as it does for planning
(`tinytl.memory.capture`), and each lean operation becomes an instruction as it is called. A line changed in the network
changes it here. The forward of training is what is captured, since a step is made of it: dropout is there as an
instruction, and everything else must be what evaluation does too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinytl.checkpoint import Learned, learned_tensors
from tinytl.errors import UnsupportedLayerError
from tinytl.nn.execution import set_execution_
from tinytl.nn.meta import meta_copy
from tinytl.ops._ghost import Ghost

from .capture_trace import IMAGES, Tracer
from .lower_builder import Builder, key_of
from .lowering import Value
from .program import Program


class Adapted(Learned, Protocol):
    """What is read of `tinytl.methods.Adaptation`."""

    @property
    def blocks(self) -> Sequence[str]:
        """Return the paths of the network's blocks."""
        ...


class Normalized(Protocol):
    """What is read of `tinytl.backbones.Preprocessing`."""

    @property
    def resolution(self) -> int:
        """Return pixels a side."""
        ...

    @property
    def mean(self) -> tuple[float, float, float]:
        """Return the mean of each channel, in units of x / 255."""
        ...

    @property
    def std(self) -> tuple[float, float, float]:
        """Return what each channel is divided by, likewise."""
        ...


def capture(
    model: nn.Module, adaptation: Adapted, preprocessing: Normalized, *, resolution: int | None = None
) -> Program:
    """The forward of `model` as a program whose only stream is 'evaluate'; each instruction's phase is 'forward'.

    Constants and trained tensors have their values, in the program's layout: float32, or float64 where the network is
    (so that the program can be compared exactly; a file holds float32). `meta["learned"]` says what a delta takes from
    the program (see docs/program.md), `meta["carried"]` what it takes beside that: {"key", "shape", "dtype", "values"},
    the values a tensor in the delta's order.

    Args:
        model: adapted by `adapt_`, packed by `pack_frozen_` or not; left untouched. What requires a gradient trains.
        adaptation: what `adapt_` returned: its blocks, and the names of what is learned.
        preprocessing: mean and std by which bytes become the network's input, and its resolution.
        resolution: pixels a side of the images; None: as `preprocessing` has it.

    Raises:
        UnsupportedLayerError: a layer or operator that no instruction stands for; it is named.
        ValueError: the model is not as `adapt_` left it.
    """
    side = preprocessing.resolution if resolution is None else resolution
    state = learned_tensors(model, adaptation)
    b, images, logits, ours = _trace(model, adaptation.blocks, preprocessing, side, training=True)
    evaluated = _trace(model, adaptation.blocks, preprocessing, side, training=False)[0]
    _refuse_other_forward(b, evaluated)
    b.tensors[logits] = dataclasses.replace(b.tensors[logits], name="logits", scope="batch")
    learned, carried = _delta(b, ours, state)
    return Program(
        tensors=tuple(b.tensors),
        streams={"evaluate": tuple(b.instructions)},
        images=images,
        logits=logits,
        values=b.values,
        meta={"learned": learned, "carried": carried},
    )


def _trace(
    model: nn.Module, blocks: Sequence[str], preprocessing: Normalized, side: int, training: bool
) -> tuple[Builder, int, int, nn.Module]:
    """What the forward does; numbers of its images and logits; the copy that ran, which has the model's tensors."""
    ours = _shared_copy(model).train(training)
    b = Builder(ours, blocks)
    tracer = Tracer(b, ours)
    dtype = next((t.dtype for t in (*ours.parameters(), *ours.buffers()) if t.is_floating_point()), torch.float32)
    images = b.new("images", "input", (side, side, 3), "u8", "batch")
    x = _normalized(b, images, preprocessing, dtype)
    with tracer.tracing():
        out = ours(tracer.image((IMAGES, 3, side, side), dtype, Value(x)))
    b.layer = ""
    if not isinstance(out, Ghost) or out.dim() != 2 or not tracer.value(out).plain:
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise b.refusal(f"an output {found}", "was made where (N, classes) was expected")
    return b, images, tracer.value(out).number, ours


def _shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules, without policies of execution and hooks, that has the model's own tensors."""
    ours = meta_copy(model)
    set_execution_(ours, {})
    for theirs, mine in zip(model.modules(), ours.modules(), strict=True):
        for name in ("_parameters", "_buffers"):
            vars(mine)[name].update(vars(theirs)[name])
        vars(mine).update({name: value for name, value in vars(theirs).items() if isinstance(value, Tensor)})
    return ours


def _normalized(b: Builder, images: int, preprocessing: Normalized, dtype: torch.dtype) -> int:
    """(x / 255 - mean) / std as x scale + shift."""
    mean, std = (torch.tensor(three, dtype=torch.float64) for three in (preprocessing.mean, preprocessing.std))
    b.layer = "normalize"
    scale = b.constant("scale", [std], lambda: (1.0 / (255.0 * std)).to(dtype))
    shift = b.constant("shift", [mean], lambda: (-mean / std).to(dtype))
    x = b.activation("x", b.shape(images))
    b.layer = ""
    b.emit("normalize", x=images, scale=scale, shift=shift, y=x)
    return x


# ---------------------------------------------------------------- the same in both modes


def _refuse_other_forward(training: Builder, evaluation: Builder) -> None:
    """Raises UnsupportedLayerError where they differ by more than dropout."""
    one, other = _without_dropout(training), _without_dropout(evaluation)
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            training.layer = mine[0]
            raise training.refusal(mine[1], "is not what the network does there in evaluation mode")
    if len(one) != len(other):
        raise UnsupportedLayerError(
            f"the network runs {len(one)} operations in training mode and {len(other)} in evaluation mode: a compiled "
            "program has one forward for both; train this network with the lab's engine"
        )


def _without_dropout(b: Builder) -> list[tuple[Any, ...]]:
    """Instructions with weights by name, and all else numbered as it appears; a dropout's output is its input."""
    seen: dict[int, int] = {}
    count = itertools.count()

    def called(number: int) -> str | int:
        if b.tensors[number].role in ("constant", "trained"):
            return b.tensors[number].name
        if number not in seen:
            seen[number] = next(count)
        return seen[number]

    found = []
    for instruction in b.instructions:
        reads = [called(number) for number in instruction.reads()]
        if instruction.op == "dropout":
            seen.update((number, seen[next(instruction.reads())]) for number in instruction.makes())
        else:
            writes = [called(number) for number in instruction.writes()]
            found.append((instruction.layer, instruction.op, dict(instruction.attributes), reads, writes))
    return found


# ---------------------------------------------------------------- what a delta holds


_DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def _delta(b: Builder, ours: nn.Module, state: dict[str, Tensor]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of what training changes, and of what else is learned."""
    learned, carried = [], []
    for key, tensor in state.items():
        number, layout = b.trained.get(key_of(tensor), (None, ""))
        if number is not None and b.trains(tensor):
            learned.append({"key": key, "tensor": number, "shape": list(tensor.shape), "layout": layout})
            continue
        kept = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        if kept.dtype not in _DTYPES:
            raise b.refusal(f"{key} of type {kept.dtype}")
        carried.append(
            {"key": key, "shape": list(tensor.shape), "dtype": _DTYPES[kept.dtype], "values": kept.contiguous().clone()}
        )
    return learned, carried
