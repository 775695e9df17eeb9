"""The specification of a program that can be run: each instruction in plain PyTorch, in any precision.

A program is interpreted at any stage (captured, differentiated, laid out, read from a file), by tensor number and with
no regard to the arena, one function an op (`interpret_*.py`). The executor is held against it tensor by tensor. It is
written to be read and to be right: nothing is fused, nothing is in place, and what a faulty program would read is
refused (`interpret_memory`).

Tensors of f32 are held in the precision asked for, of the other types in their own: codes, bits, labels, the metrics in
float64, and the scales of an optimizer state of 8 bits in float32, which is that approximation's definition.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .interpret_call import Call, OpFunction, StepScalars
from .interpret_images import IMAGE_OPS
from .interpret_memory import Alive
from .interpret_norms import NORM_OPS
from .interpret_updates import UPDATE_OPS
from .interpret_weights import WEIGHT_OPS
from .interpret_windows import WINDOW_OPS
from .op_table import OPS
from .program import Instruction, Program

FUNCTIONS: dict[str, OpFunction] = {**IMAGE_OPS, **WINDOW_OPS, **NORM_OPS, **WEIGHT_OPS, **UPDATE_OPS}

_OWN = {
    "f64": torch.float64,
    "u8": torch.uint8,
    "i8": torch.int8,
    "f16": torch.float16,
    "i32": torch.int32,
    "i64": torch.int64,
    "bits": torch.uint8,
}


class Part(NamedTuple):
    """The images that an instruction is for.

    Attributes:
        stream: that it is of.
        first: number, in the batch, of the first image.
        inner: likewise in the micro-batch: above 0 in tiles behind the first.
        images: how many.
    """

    stream: str
    first: int
    inner: int
    images: int

    def begin(self, scope: str) -> int:
        """Where these images begin in a tensor of a scope that has one an image."""
        return {"batch": self.first, "micro": self.inner, "tile": 0}[scope]


class Interpreter:
    """A program with the values of its tensors.

    Args:
        program: at any stage. Its `values` are copied.
        dtype: of all f32 tensors but the scales of 8-bit optimizer states.
    """

    def __init__(self, program: Program, dtype: torch.dtype = torch.float64) -> None:
        self.program = program
        self.dtype = dtype
        self._exact = _scales_of_8_bits(program)
        self._alive = Alive(program)
        self._values: dict[int, Tensor] = {}
        for number, tensor in enumerate(program.tensors):
            if tensor.role in ("constant", "trained"):
                given = torch.as_tensor(program.values[number]).detach().reshape(tensor.shape)
                self._values[number] = given.to(self._held(number)).clone()
            elif tensor.role == "state":
                self._values[number] = torch.zeros(tensor.shape, dtype=self._held(number))

    # ---- whole steps

    def evaluate(self, images: Tensor) -> Tensor:
        """(n, H, W, 3) uint8, any n -> (n, classes) logits."""
        parts = [self._evaluate(part) for part in images.split(max(self.program.batch, 1))]
        return torch.cat(parts)

    def _evaluate(self, images: Tensor) -> Tensor:
        program, count = self.program, len(images)
        self.set_tensor(_known(program.images), images)
        logits = _known(program.logits)
        self._values.pop(logits, None)
        for first in range(0, count, program.evaluate_images):
            here = min(program.evaluate_images, count - first)
            self.run("evaluate", first=first, images=here, count=count)
        return self.tensor(logits).reshape(count, -1)

    def step(self, images: Tensor, labels: Tensor, lr: float, seed: int = 0) -> tuple[float, int]:
        """One training step.

        Args:
            images: (n, H, W, 3) uint8, n at most the program's batch.
            labels: (n,) integers.
            lr: learning rate.
            seed: of dropout's draws.

        Returns:
            Sum over images of the cross entropy, and how many were right; both before the update.

        Raises:
            ValueError: more images than the program's batch.
        """
        program, count = self.program, len(images)
        if not 0 < count <= program.batch:
            raise ValueError(f"{count} images: expected 1 to {program.batch}, the program's batch")
        self.load(images, labels)
        step_count = _known(program.step_count)
        number = int(self._values[step_count]) + 1
        self.set_tensor(step_count, torch.tensor(number))
        run = functools.partial(self.run, count=count, lr=lr, seed=seed, step=number)
        run("begin", images=min(program.micro_batch, count))
        for first in range(0, count, program.micro_batch):
            run("micro", first=first, images=min(program.micro_batch, count - first))
        run("finish", images=min(program.micro_batch, count))
        loss, correct = self.tensor(_known(program.metrics)).tolist()
        return loss, int(correct)

    def load(self, images: Tensor, labels: Tensor) -> None:
        """Take in a batch, as `step` does, and set the metrics to 0: what `run` needs before it.

        Args:
            images: (n, H, W, 3) uint8.
            labels: (n,) integers.
        """
        label, metrics = _known(self.program.labels), _known(self.program.metrics)
        self.set_tensor(_known(self.program.images), images)
        self.set_tensor(label, labels.reshape(len(labels), *self._shape(label)))
        self.set_tensor(metrics, torch.zeros(self._shape(metrics)))

    # ---- instruction by instruction

    def run(
        self,
        stream: str,
        begin: int = 0,
        end: int | None = None,
        *,
        first: int = 0,
        images: int | None = None,
        count: int | None = None,
        lr: float = 0.0,
        seed: int = 0,
        step: int | None = None,
    ) -> None:
        """Run the instructions [begin, end) of a stream. Where begin is 0, what does not outlive streams is forgotten.

        A range of `Program.tiles` runs as a whole; begin and end are at no instruction inside of one.

        Args:
            stream: one of `STREAMS`; one that the program does not have is empty.
            begin, end: numbers of instructions; all by default.
            first: number, in the batch, of the first image.
            images: how many of them; by default a whole micro-batch, in 'evaluate' a whole pass.
            count: images of the whole batch; by default `images`.
            lr, seed: as for `step`.
            step: number of the step; by default as many as are counted, at least 1, as in the executor.

        Raises:
            ValueError: begin or end is inside of a tile.
        """
        program, evaluate = self.program, stream == "evaluate"
        if begin == 0:
            self._forget(stream, keep_logits=evaluate and first > 0)
        if images is None:
            images = program.evaluate_images if evaluate else program.micro_batch
        if step is None:
            step = 1 if program.step_count is None else max(int(self._values[program.step_count]), 1)
        scalars = StepScalars(lr=lr, step=step, seed=seed, count=count or images, train=not evaluate)
        instructions = program.streams.get(stream, ())
        end = len(instructions) if end is None else end
        runs = [(a, b) for a, b in program.runs(stream) if b > begin and a < end]
        if runs and not begin <= runs[0][0] <= runs[-1][1] <= end:
            raise ValueError(f"instructions {begin} to {end} of {stream}: expected whole tiles of {program.tiles}")
        for run in runs:
            tile = program.tile_images if stream == "micro" and run in program.tiles else images
            for inner in range(0, images, tile):
                here = Part(stream, first + inner, inner, min(tile, images - inner))
                if tile < images:
                    self._alive.enter_tile()
                for at in range(*run):
                    one = instructions[at]
                    where = f"{stream} {at} ({one.op}{f' for {one.layer}' if one.layer else ''})"
                    self._execute(one, where, here, scalars)

    def _forget(self, stream: str, keep_logits: bool) -> None:
        """What does not outlive streams is forgotten; but logits gather over the passes of 'evaluate'."""
        logits = self.program.logits
        held = keep_logits and logits is not None and logits in self._alive
        self._alive.enter(stream)
        if held:
            self._alive.write(_known(logits), stream)

    def _execute(self, one: Instruction, where: str, here: Part, scalars: StepScalars) -> None:
        self._alive.check(one, where, here.stream)
        values = {
            name: self._part(number, here)
            for (name, mode, _), number in zip(one.kind.operands, one.operands, strict=True)
            if number is not None and mode != "out"
        }
        call = Call(self.program, one, values, here.images, here.first, scalars, self.dtype)
        results = FUNCTIONS[one.op](call)
        for (name, mode, _), number in zip(one.kind.operands, one.operands, strict=True):
            if number is None or mode == "in":
                continue
            value = results[name]
            if mode == "add":
                value = values[name] + value
            self._store(number, value, where, here)
            self._alive.write(number, here.stream, where)

    def _part(self, number: int, here: Part) -> Tensor:
        """The value as an instruction sees it."""
        value, scope = self._values[number], self.program.tensors[number].scope
        if scope == "fixed":
            return value
        begin = here.begin(scope)
        return value[begin : begin + here.images]

    def _store(self, number: int, value: Tensor, where: str, here: Part) -> None:
        tensor = self.program.tensors[number]
        shape = self._shape(number)
        expected = shape if tensor.scope == "fixed" else (here.images, *shape)
        if tuple(value.shape) != expected:
            raise RuntimeError(f"{where} makes {tensor.name} {tuple(value.shape)}, expected {expected}")
        value = value.to(self._held(number))
        held = self._values.get(number)
        begin = 0 if tensor.scope == "fixed" else here.begin(tensor.scope)
        if tensor.scope == "batch" or begin:  # a part of it
            held = value[:0] if held is None else held
            if len(held) < begin:
                raise RuntimeError(f"{where} writes image {begin} of {tensor.name}, {len(held)} are there before it")
            value = torch.cat([held[:begin], value, held[begin + here.images :]])
        self._values[number] = value

    # ---- values

    def tensor(self, number: int) -> Tensor:
        """The current value: (images, ...) where there is one an image; bits as bytes, ceil(C / 8) a pixel.

        Raises:
            RuntimeError: it has none now.
        """
        if number not in self._alive:
            raise RuntimeError(f"tensor {number} ({self.program.tensors[number].name}) has no value now")
        return self._values[number].clone()

    def set_tensor(self, number: int, value: Tensor) -> None:
        """Give a tensor a value: (images, ...) where there is one an image.

        Raises:
            ValueError: of another shape.
        """
        tensor, shape = self.program.tensors[number], self._shape(number)
        found = tuple(value.shape) if tensor.scope == "fixed" else tuple(value.shape[1:])
        if found != shape:
            raise ValueError(f"{tensor.name}: a value {tuple(value.shape)}, expected {shape} ({tensor.scope})")
        self._values[number] = value.detach().to(self._held(number)).clone()
        self._alive.write(number)

    def learned(self) -> dict[str, Tensor]:
        """What training has changed, by its name in the delta and in the delta's shape (`meta['learned']`)."""
        entries = self.program.meta["learned"]
        return {entry["key"]: _as_in_delta(self._values[entry["tensor"]], entry) for entry in entries}

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of what trains, by name and in the shape of the delta; alive until the next step begins.

        Those over which something else was written (updates in backward, in a program that is laid out) are left out.
        """
        gradients = self.program.gradients
        entries = [entry for entry in self.program.meta["learned"] if gradients[entry["tensor"]] in self._alive]
        return {entry["key"]: _as_in_delta(self._values[gradients[entry["tensor"]]], entry) for entry in entries}

    def _held(self, number: int) -> torch.dtype:
        """The type in which a tensor is held."""
        if number in self._exact:
            return torch.float32
        return _OWN.get(self.program.tensors[number].dtype, self.dtype)

    def _shape(self, number: int) -> tuple[int, ...]:
        """A tensor's shape as it is held, without the axis of images."""
        tensor = self.program.tensors[number]
        if tensor.dtype == "bits":
            return (*tensor.shape[:-1], -(-tensor.shape[-1] // 8))
        return tuple(tensor.shape)


def _known(number: int | None) -> int:
    """The number of a tensor that a program for this purpose has."""
    if number is None:
        raise ValueError(
            "the program has no tensor for this: evaluate needs images and logits, a step labels and metrics"
        )
    return number


def _as_in_delta(value: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """A value of an entry of `meta['learned']` in the delta's order of axes."""
    layout = entry["layout"]
    if layout == "OHWI":
        value = value.permute(0, 3, 1, 2)
    elif layout == "HWC":
        value = value.permute(2, 0, 1)
    elif layout != "as-is":
        raise ValueError(f"layout {layout!r} of {entry['key']}: expected as-is, OHWI or HWC")
    return value.reshape(tuple(entry["shape"])).clone()


def _scales_of_8_bits(program: Program) -> set[int]:
    """Numbers of the scales of optimizer states of 8 bits."""
    found = set()
    for _, one in program.instructions():
        for (name, _, _), number in zip(OPS[one.op].operands, one.operands, strict=True):
            if name.endswith("_scale") and one.op in ("sgd8", "adam8") and number is not None:
                found.add(number)
    return found
