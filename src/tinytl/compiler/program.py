"""A training step as a small typed program: tensors with roles, instructions over them, and where everything lies.

One form serves every stage: captured (forward instructions only), differentiated, scheduled, laid out (each tensor of
the arena has an offset). `tinytl.compiler.op_table` says what each instruction computes.

A step on a batch runs in micro-batches, whose gradients add up:

    begin               gradients become 0
    micro, n times      forward, loss and backward of `micro_batch` images
    finish              what is left to be done to gradients, and the updates

Where a batch is one micro-batch, updates may stand in `micro`, each as soon as its gradient is complete. Ranges of
`micro` may run in tiles, a few images of the micro-batch at a time (`tinytl.compiler.tiles`). `evaluate` is
forward alone, on the same `images` and `evaluate_images` of them at a time, into `logits`, which has the scope 'batch';
between the streams nothing is alive but what is resident (constants, trained, state) and what came in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .op_table import OPS, OpKind

DTYPES = {"f32": 4, "f64": 8, "u8": 1, "i8": 1, "f16": 2, "i32": 4, "i64": 8, "bits": 1}
"""Bytes an element; of 'bits', a byte holds 8."""

ROLES = (
    "constant",  # frozen: weights, codes, tables, vectors; in the file, mapped
    "trained",  # changed by the updates; its first values are in the file
    "state",  # of the optimizer; begins as 0
    "gradient",  # of a trained tensor, or of one made of it
    "derived",  # made of trained weights for one instruction
    "input",  # the batch's bytes and labels
    "activation",
    "mask",  # bits and winners, kept for backward
    "metric",
    "scratch",  # the threads' own memory
)
SCOPES = ("fixed", "batch", "micro", "tile")
"""What a tensor has one of: the step; each image of the batch; of a micro-batch; of a tile of one."""

STREAMS = ("begin", "micro", "finish", "evaluate")
ALIGN = 64
SCRATCH_PER_THREAD = 256 * 1024
"""Bytes of the arena that belong to each thread: an instruction needs no more, whatever its shapes."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a program.

    Attributes:
        name: readable and unique; of a trained one, the parameter's name in the adapted model.
        role: one of `ROLES`.
        dtype: one of `DTYPES`.
        shape: without the axis of images.
        scope: one of `SCOPES`.
        offset: bytes from the start of the arena; of a constant, from the start of the file's data; None: not laid
            out yet.
        initial: of a trained tensor, the offset of its first values in the file's data.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    scope: str = "fixed"
    offset: int | None = None
    initial: int | None = None

    @property
    def elements(self) -> int:
        """Of one image, or of all where the scope is 'fixed'."""
        return math.prod(self.shape)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image, or of all where the scope is 'fixed'."""
        if self.dtype == "bits":
            return math.prod(self.shape[:-1]) * -(-self.shape[-1] // 8)
        return self.elements * DTYPES[self.dtype]

    def bytes(self, program: Program, evaluate: bool = False) -> int:
        """All of its bytes in that program; `evaluate`: as a tensor of that stream."""
        micro = program.evaluate_images if evaluate else program.micro_batch
        images = {"fixed": 1, "batch": program.batch, "micro": micro, "tile": program.tile_images}
        return images[self.scope] * self.image_bytes


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        op: a name in `OPS`.
        operands: numbers of tensors, in the order of the op's operands; None where one is absent.
        attributes: by name.
        layer: path of the layer on whose behalf it runs.
        block: number of the block of the network that it belongs to, as `Adaptation.blocks`; -1: none.
        phase: 'forward', 'again' (forward once more, in backward), 'backward' or 'update'.
    """

    op: str
    operands: tuple[int | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    layer: str = ""
    block: int = -1
    phase: str = "forward"

    @property
    def kind(self) -> OpKind:
        """Its row of the table."""
        return OPS[self.op]

    def operand(self, name: str) -> int | None:
        """The tensor that stands for that operand."""
        return self.operands[self.kind.index(name)]

    def reads(self) -> Iterator[int]:
        """Tensors whose values it depends on."""
        for number, (_, mode, _) in zip(self.operands, self.kind.operands, strict=True):
            if number is not None and mode in ("in", "add", "inout"):
                yield number

    def writes(self) -> Iterator[int]:
        """Tensors that it changes or makes."""
        for number, (_, mode, _) in zip(self.operands, self.kind.operands, strict=True):
            if number is not None and mode in ("out", "add", "inout"):
                yield number

    def makes(self) -> Iterator[int]:
        """Tensors that it writes whole."""
        for number, (_, mode, _) in zip(self.operands, self.kind.operands, strict=True):
            if number is not None and mode == "out":
                yield number

    def with_operands(self, **operands: int | None) -> Instruction:
        """The same with some operands changed, by name."""
        found = list(self.operands)
        for name, number in operands.items():
            found[self.kind.index(name)] = number
        return replace(self, operands=tuple(found))

    def with_attributes(self, **attributes: Any) -> Instruction:
        """The same with some attributes changed."""
        return replace(self, attributes={**self.attributes, **attributes})


def instruction(
    op: str,
    attributes: Mapping[str, Any] | None = None,
    *,
    layer: str = "",
    block: int = -1,
    phase: str = "forward",
    **operands: int | None,
) -> Instruction:
    """An instruction with its operands by name, checked against the table.

    Raises:
        ValueError: an operand or attribute that the op does not have, or one that is missing.
    """
    kind = OPS[op]
    names = [name for name, _, _ in kind.operands]
    missing = [name for name, _, optional in kind.operands if not optional and operands.get(name) is None]
    attributes = dict(attributes or {})
    if not set(operands) <= set(names) or missing or set(attributes) != {name for name, _ in kind.attributes}:
        raise ValueError(f"{op}({sorted(operands)}, {sorted(attributes)}): expected {kind}")
    return Instruction(op, tuple(operands.get(name) for name in names), attributes, layer, block, phase)


@dataclass(frozen=True, eq=False)
class Program:
    """A program, at any stage.

    Attributes:
        tensors: by number.
        streams: name (of `STREAMS`) -> instructions in order. A captured program has 'evaluate' alone.
        batch, micro_batch, evaluate_images: images of a step at most, of a micro-batch, and of one pass of 'evaluate'.
        tile_images, tiles: of the stream 'micro', the ranges [first, end) of instructions that run as a whole for the
            first `tile_images` images, then for the next, and so on; in order and apart.
        images, labels, logits, metrics: numbers of these tensors; `logits` is that of the stream 'evaluate'.
        step_count: number of the i64 tensor () that counts steps (role 'state').
        gradients: trained tensor -> its gradient.
        arena_bytes, state_bytes: once laid out; the arena begins with what a checkpoint holds, `state_bytes` of it:
            the trained tensors and the optimizer's state, in the order of their numbers.
        threads: for which the arena has scratch memory.
        values: number of a constant or trained tensor -> its values (a torch tensor in the table's layout); those
            read from a file likewise.
        meta: what is not computed with, in the fields of META in docs/program.md (plain data; but what a delta holds
            beside the trained tensors, `carried`, is here with its "values", torch tensors, in the place of offsets).
    """

    tensors: tuple[Tensor, ...]
    streams: Mapping[str, tuple[Instruction, ...]]
    batch: int = 1
    micro_batch: int = 1
    evaluate_images: int = 1
    tile_images: int = 1
    tiles: tuple[tuple[int, int], ...] = ()
    images: int | None = None
    labels: int | None = None
    logits: int | None = None
    metrics: int | None = None
    step_count: int | None = None
    gradients: Mapping[int, int] = field(default_factory=dict)
    arena_bytes: int | None = None
    state_bytes: int | None = None
    threads: int = 2
    values: Mapping[int, Any] = field(default_factory=dict, repr=False)
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers of the trained tensors."""
        return tuple(n for n, tensor in enumerate(self.tensors) if tensor.role == "trained")

    def runs(self, stream: str) -> list[tuple[int, int]]:
        """Ranges [first, end) of a stream's instructions that run as a whole: its tiles, and each other instruction."""
        found: list[tuple[int, int]] = []
        tiles = iter(self.tiles if stream == "micro" else ())
        tile = next(tiles, None)
        at, count = 0, len(self.streams.get(stream, ()))
        while at < count:
            end = at + 1
            if tile is not None and at == tile[0]:
                end, tile = tile[1], next(tiles, None)
            found.append((at, end))
            at = end
        return found

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """(stream, instruction) of all streams in order."""
        for name in STREAMS:
            for one in self.streams.get(name, ()):
                yield name, one
