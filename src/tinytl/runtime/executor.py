"""One compiled program, open: its batch, its steps, its state. Needs neither PyTorch nor numpy.

    with Executor("program.ttl") as executor:
        executor.images[: len(pixels)] = pixels          # (batch, H, W, 3) bytes
        executor.labels[0] = 3
        loss_sum, correct = executor.step(executor.batch, lr=0.01, seed=0)

Memory that is handed out (`images`, `labels`, `state`, `tensor()`) is the executor's own: it is valid until `close`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
from array import array
from types import TracebackType
from typing import Any

from tinytl.errors import InputError, NotFiniteError, ProgramError, TinyTLError

from . import _library

STREAMS = ("begin", "micro", "finish", "evaluate")
"""Streams of a program, by the number that the library knows them by."""


def _finite(text: str) -> float:
    """A number of JSON; Python would read 1e999, NaN and Infinity, too, which could not be written again."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


class Executor:
    """A program, its arena and the threads that run it. Used by one thread at a time.

    Attributes:
        path: of the program.
        batch, micro_batch, evaluate_images: images of a step at most, of a micro-batch, of one pass of `evaluate`.
        classes, height, width: of the network that it trains.
        threads: that run it.
        arena_bytes: planned; all that it allocates beside its own records.
        state_bytes: of `state`.
        data_bytes: weights in the file, which are mapped and not copied.
        tensors: how many it has.
        isa: which kernels run: 'avx512', 'avx2', 'neon' or 'plain'.
        meta: the file's META section (docs/program.md).
        images: bytes (batch, H, W, 3), to be written to.
        labels: int32 (batch), to be written to.
        state: what a checkpoint holds; written to, it takes effect at once.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, check: bool = True) -> None:
        """Open a program and give its tensors their first values.

        Args:
            path: a `.ttl` file.
            threads: how many to run on; 0: as many as it was compiled for, which is also the most.
            check: whether the file's hash is verified.

        Raises:
            ProgramError: the file is missing, damaged, truncated, of a newer version, or no program.
            InputError: more threads than the program was compiled for; no executor was built; the system does not
                give the memory.
        """
        self._handle: int | None = None
        self._library = library = _library.library()
        self.path = os.fspath(path)
        name = os.fsencode(path)
        if b"\0" in name:
            raise ProgramError(f"program {self.path!r}: a name cannot hold a zero byte: give a file that exists")
        handle = ctypes.c_void_p()
        self._check(library.tinytl_open(name, threads, int(check), ctypes.byref(handle)))
        self._handle = handle.value
        numbers = {key: library.tinytl_number(handle, n) for n, key in enumerate(_library.KEYS)}
        self.batch: int = numbers["batch"]
        self.micro_batch: int = numbers["micro_batch"]
        self.evaluate_images: int = numbers["evaluate_images"]
        self.classes: int = numbers["classes"]
        self.height: int = numbers["height"]
        self.width: int = numbers["width"]
        self.threads: int = numbers["threads"]
        self.arena_bytes: int = numbers["arena_bytes"]
        self.state_bytes: int = numbers["state_bytes"]
        self.data_bytes: int = numbers["data_bytes"]
        self.tensors: int = numbers["tensors"]
        self.isa: str = library.tinytl_isa().decode()
        self.images = self._view(library.tinytl_images(handle), self.batch * self.height * self.width * 3)
        self.labels = self._view(library.tinytl_labels(handle), self.batch * 4).cast("i")
        self.state = self._view(library.tinytl_state(handle), self.state_bytes)
        self._meta_bytes: int = numbers["meta_bytes"]

    @property
    def meta(self) -> dict[str, Any]:
        """The file's META section, read anew at each call.

        Raises:
            ProgramError: it is no JSON object.
        """
        text = ctypes.string_at(self._library.tinytl_meta(self._open), self._meta_bytes)
        try:
            found = json.loads(text, parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError) as error:
            raise ProgramError(f"{self.path}: its META is no JSON ({error}): compile it again") from error
        if not isinstance(found, dict):
            raise ProgramError(f"{self.path}: its META is no JSON object: compile it again")
        return found

    @property
    def arena_used(self) -> int:
        """Highest byte of the arena, by address, that an instruction has been given so far."""
        return self._number("arena_used")

    @property
    def steps(self) -> int:
        """Steps taken so far; part of the state."""
        return self._number("steps")

    @property
    def bad_tensor(self) -> int:
        """Number of the tensor whose gradient was not finite in the step that raised; -1: it was the loss."""
        return self._library.tinytl_bad_tensor(self._open)

    def step(self, count: int, lr: float, seed: int = 0) -> tuple[float, int]:
        """Take one training step on the first `count` images of the slot.

        Args:
            count: 1 to `batch`.
            lr: learning rate of this step.
            seed: of dropout.

        Returns:
            The sum over images of the cross entropy, and how many were right before the step.

        Raises:
            NotFiniteError: a loss or a gradient is NaN or infinite. Where it is the loss nothing has been updated.
            InputError: an argument or a label is out of range.
        """
        loss, correct = ctypes.c_double(), ctypes.c_int64()
        self._check(
            self._library.tinytl_step(self._open, count, lr, seed, ctypes.byref(loss), ctypes.byref(correct)),
        )
        return loss.value, correct.value

    def evaluate(self, count: int) -> array[float]:
        """Return the logits of the first `count` images of the slot: (count, classes) float32, row after row.

        Raises:
            InputError: `count` is out of range.
        """
        logits = array("f", bytes(4 * max(count, 0) * self.classes))
        self._check(self._library.tinytl_evaluate(self._open, count, logits.buffer_info()[0]))
        return logits

    def run(
        self,
        stream: str,
        begin: int,
        end: int,
        *,
        first: int = 0,
        images: int | None = None,
        count: int | None = None,
        lr: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Run the instructions [begin, end) of a stream alone, for tests and measurements.

        The number of the step is that of `steps` (1 before the first): the count does not grow.

        Args:
            stream: one of `STREAMS`.
            begin: first instruction.
            end: the one behind the last.
            first: number in the batch of the first image.
            images: how many images; at most those of a pass of the stream, which is also the default.
            count: images of the whole batch, by which the loss is divided; default: `images`.
            lr: learning rate.
            seed: of dropout.

        Raises:
            InputError: an argument is out of range.
            NotFiniteError: as `step`.
        """
        if images is None:
            images = min(self.batch - first, self.evaluate_images if stream == "evaluate" else self.micro_batch)
        count = images if count is None else count
        number = self._stream(stream)
        self._check(self._library.tinytl_run(self._open, number, begin, end, first, images, count, lr, seed))

    def instructions(self, stream: str) -> list[str]:
        """The op of each instruction of a stream."""
        number = self._stream(stream)
        count = self._library.tinytl_instructions(self._open, number)
        return [self._library.tinytl_op(self._open, number, at).decode() for at in range(count)]

    def tensor(self, number: int) -> memoryview:
        """The bytes of a tensor, for as many images as a stream takes at once; read-only for a constant.

        What lies there is the tensor's only while it is alive: the arena's bytes are shared.

        Raises:
            InputError: no such tensor, or one that lies nowhere.
        """
        size = ctypes.c_int64()
        address = self._library.tinytl_tensor(self._open, number, ctypes.byref(size))
        if not address:
            raise InputError(f"tensor {number}: the program has 0 to {self.tensors - 1}")
        view = self._view(address, size.value)
        begin = ctypes.addressof(self._arena())
        return view if begin <= address < begin + self.arena_bytes else view.toreadonly()

    def timing(self, on: bool) -> None:
        """Measure, or no longer, the time of each instruction; what was measured before is forgotten."""
        self._library.tinytl_timing(self._open, int(on))

    def seconds(self, stream: str) -> array[float]:
        """Seconds spent in each instruction of a stream since the last call, while timing is on."""
        number = self._stream(stream)
        spent = array("d", bytes(8 * self._library.tinytl_instructions(self._open, number)))
        self._check(self._library.tinytl_seconds(self._open, number, spent.buffer_info()[0]))
        return spent

    def gemm_peak(self) -> float:
        """Multiply-adds a second, in billions, that this machine's units reach at best, on this executor's threads."""
        return self._library.tinytl_gemm_peak(self._open)

    def close(self) -> None:
        """Give everything back; whoever still holds a view of the memory must not touch it again."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            for view in (self.images, self.labels, self.state):
                with contextlib.suppress(BufferError):  # somebody else's array shares it
                    view.release()
            self._library.tinytl_close(handle)

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    @property
    def _open(self) -> int:
        if self._handle is None:
            raise ValueError("this executor is closed")
        return self._handle

    def _number(self, key: str) -> int:
        return self._library.tinytl_number(self._open, _library.KEYS.index(key))

    def _arena(self) -> ctypes.Array[ctypes.c_ubyte]:
        return (ctypes.c_ubyte * self.arena_bytes).from_address(self._library.tinytl_state(self._open))

    @staticmethod
    def _view(address: int, size: int) -> memoryview:
        return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")

    @staticmethod
    def _stream(name: str) -> int:
        if name not in STREAMS:
            raise InputError(f"stream {name!r}: expected one of {', '.join(STREAMS)}")
        return STREAMS.index(name)

    def _check(self, status: int) -> None:
        if status:
            raise self._error(status)

    def _error(self, status: int) -> TinyTLError:
        text = self._library.tinytl_error().decode(errors="surrogateescape")
        if status == _library.BAD_FILE:
            return ProgramError(f"program {text}")
        if status == _library.NOT_FINITE:
            return NotFiniteError(text)
        # memory, too, is what the user can mend: the text says how
        mendable = (_library.BAD_INPUT, _library.NO_MEMORY)
        return InputError(text) if status in mendable else TinyTLError(text)
