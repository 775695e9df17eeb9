"""Memory as it is: live tensor bytes over one training step, from torch's own allocator.

On the CPU the profiler reports every allocation and release of the tensor allocator, with address, size and
time. Adding them up gives the live bytes at each instant, temporaries inside operators included (padded or
reordered copies, workspaces, gradients on the autograd side). On CUDA the caching allocator keeps the same
peak itself.

What is seen, and what is not:

- Bytes are those that tensors asked for; the allocator's rounding, fragmentation and caches are not in them.
- A block that was alive before the step and dies in it is left alive in the sum: the peak can only be too
  high by that, never too low. Gradients are therefore dropped before the step, so that all of them belong to
  the step.
- Memory that is no tensor (numpy, Python objects, MKL's and oneDNN's private buffers, the runtime's code) and
  what a worker thread allocates inside an operator are unseen; :mod:`tinytl.memory.rss` sees them, less
  sharply.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tinytl.engine.eight_bit import BlockWise
from tinytl.engine.step import run_step

from .step import pieces_of, trained_dtype

# What the profiler's C++ writes to the process's stderr; nothing in it asks the user for anything.
_CHATTER = re.compile(rb"Memory block of unknown size was allocated before the profiling|^USDT:|ActivityProfiler")


@dataclass(frozen=True)
class Timeline:
    """Live bytes of the step after each allocator event: ``live_bytes[i]`` holds from ``seconds[i]`` on.

    Both arrays have shape (events + 1,) and begin with (0, 0), the start of the step. ``live_bytes`` counts
    what the step added: resident tensors are not in it.
    """

    seconds: np.ndarray
    live_bytes: np.ndarray


@dataclass(frozen=True)
class Measured:
    """One measured training step.

    ``peak_bytes`` = ``resident_bytes`` + ``step_peak_bytes``: all live tensor bytes at the worst instant.
    ``step_peak_bytes``: the most that the step added (activations, gradients, temporaries).
    ``step_seconds``: median time of the un-profiled repeats, None when none were asked for.
    ``timeline``: None on CUDA, where the allocator keeps the peak alone.
    """

    resident_bytes: int
    step_peak_bytes: int
    peak_bytes: int
    step_seconds: float | None
    timeline: Timeline | None


def training_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    micro_batch: int | None = None,
    label_smoothing: float = 0.0,
    update: str = "end",
) -> Callable[[], None]:
    """Return a function that takes one step on ``images`` (N, C, H, W) and ``labels`` (N,), as the engine does.

    The batch runs as pieces of ``micro_batch`` images (default: all N at once); each piece's mean loss is
    weighted by its share of N, so that the summed gradient is the whole batch's. Images held as bytes (uint8) become
    the network's input a piece at a time. ``update``: 'end' or 'backward' (`tinytl.engine.run_step`). The model's mode
    is left as it is.

    Raises ValueError when ``micro_batch`` is below 1.
    """
    size = len(images) if micro_batch is None else micro_batch
    if size < 1:
        raise ValueError(f"micro_batch is {size}, expected at least 1")

    def step() -> None:
        pieces = pieces_of(images, labels, size, trained_dtype(model))
        run_step(model, optimizer, pieces, len(labels), label_smoothing=label_smoothing, update=update)

    return step


def adam(trained: nn.Module | Iterable[nn.Parameter], lr: float = 1e-3) -> torch.optim.Adam:
    """Return Adam over what trains in ``trained``; fused if possible: the other forms copy all gradients."""
    every = trained.parameters() if isinstance(trained, nn.Module) else trained
    parameters = [p for p in every if p.requires_grad]
    fused = all(p.dtype in (torch.float32, torch.float64) for p in parameters)
    return torch.optim.Adam(parameters, lr=lr, fused=fused)


def resident_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None, *others: Tensor) -> list[Tensor]:
    """Return what is alive between steps: parameters, buffers, the optimizer's state now, and ``others``.

    With an 8-bit state, the tables of its code are in it.
    """
    state = optimizer.state.values() if optimizer is not None else ()
    tables = optimizer.tables() if isinstance(optimizer, BlockWise) else ()
    return [
        *model.parameters(),
        *model.buffers(),
        *(value for entry in state for value in entry.values() if isinstance(value, Tensor)),
        *tables,
        *others,
    ]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages under ``tensors``, each storage once however many views it has."""
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure_step(step: Callable[[], object], resident: Iterable[Tensor] = (), *, repeats: int = 0) -> Measured:
    """Measure one call of ``step``, then time ``repeats`` more.

    ``resident`` are the tensors that are alive at the start (:func:`resident_tensors`). Their ``.grad`` is
    set to None first: gradients are what the step makes. Run ``step`` once before (or use
    :func:`measure_training_step`), so that the optimizer's state exists and is not taken for the step's. The
    device is the resident tensors': any on CUDA makes it a CUDA measurement, on one device.

    While a CPU step is profiled, the process's stderr (file descriptor 2) is held back; the profiler's own
    chatter is dropped and everything else is written when the step ends.

    Raises ValueError when ``resident`` lies on several CUDA devices, or ``repeats`` is negative.
    """
    if repeats < 0:
        raise ValueError(f"repeats is {repeats}, expected at least 0")
    tensors = list(resident)
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    if len(devices) > 1:
        raise ValueError(f"resident tensors lie on {sorted(map(str, devices))}, expected one CUDA device")
    for tensor in tensors:
        if tensor.is_leaf:
            tensor.grad = None
    gc.collect()  # A cycle that dies inside the step would look like memory that the step gave back.
    resident_bytes = storage_bytes(tensors)

    device = devices.pop() if devices else None
    if device is not None:
        timeline, peak = None, _cuda_peak(step, device)
    else:
        timeline = _cpu_timeline(step)
        peak = int(timeline.live_bytes.max())
    return Measured(
        resident_bytes=resident_bytes,
        step_peak_bytes=peak,
        peak_bytes=resident_bytes + peak,
        step_seconds=_median_seconds(step, repeats, device) if repeats else None,
        timeline=timeline,
    )


def measure_training_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    micro_batch: int | None = None,
    *,
    label_smoothing: float = 0.0,
    repeats: int = 5,
) -> Measured:
    """Measure one step of ``model``: a warm-up step, one step watched, and ``repeats`` timed.

    The model is trained by all of these steps: measure a copy, or one built for it. Resident are its
    parameters and buffers, the optimizer's state, ``images`` (N, C, H, W) and ``labels`` (N,).
    """
    step = training_step(model, images, labels, optimizer, micro_batch, label_smoothing)
    step()  # Makes the optimizer's state, and any table that a layer builds at its first call.
    return measure_step(step, resident_tensors(model, optimizer, images, labels), repeats=repeats)


def _cpu_timeline(step: Callable[[], object]) -> Timeline:
    with _without_chatter(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        begin = time.time_ns()
        step()
    # No public call hands out the addresses, and only they tell a release of the step's own block from
    # one of a block that an earlier profile saw.
    kineto: Any = profiler.profiler and profiler.profiler.kineto_results
    events: list[tuple[int, int, int]] = []
    _collect(kineto.experimental_event_tree(), events)
    events.sort(key=lambda event: event[0])  # Stable: equal times stay in the order they were recorded in.

    seconds, live_bytes = [0.0], [0]
    blocks: dict[int, int] = {}
    for nanoseconds, address, size in events:
        if size < 0 and address not in blocks:
            continue  # Born before the step: not the step's to give back.
        change = size if size > 0 else -blocks.pop(address)
        if size > 0:
            blocks[address] = size
        seconds.append(max(0.0, (nanoseconds - begin) * 1e-9))
        live_bytes.append(live_bytes[-1] + change)
    return Timeline(np.asarray(seconds), np.asarray(live_bytes, dtype=np.int64))


def _collect(nodes: Iterable[Any], events: list[tuple[int, int, int]]) -> None:
    """Append (time in ns, address, signed bytes) of every CPU allocator event at or under ``nodes``."""
    stack = list(nodes)[::-1]
    while stack:
        node = stack.pop()
        fields = node.extra_fields
        if hasattr(fields, "alloc_size") and fields.device.type == "cpu" and fields.alloc_size:
            events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
        stack.extend(node.children[::-1])


def _cuda_peak(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _median_seconds(step: Callable[[], object], repeats: int, device: torch.device | None) -> float:
    def wait() -> None:
        if device is not None:
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Hold back file descriptor 2, then write on what is not the profiler's: C++ writes past sys.stderr."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        try:
            real = os.dup(2)
        except OSError:  # A process without stderr has nothing to hold back.
            yield
            return
        try:
            os.dup2(held.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(real, 2)
                held.seek(0)
                kept = b"".join(line for line in held if not _CHATTER.search(line))
                if kept:
                    os.write(real, kept)
        finally:
            os.close(real)
