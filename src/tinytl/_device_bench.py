"""The compiled step beside stock PyTorch's, measured in one run: bytes, seconds, and where the seconds go.

Of each row a program is compiled, and four things are done with it:

- a process of its own, the stand-alone program without Python, takes a few steps and tells its resident set at the
  most, and how long it was from the file on the disk to the end of the first step;
- in this process its steps take turns with those of stock PyTorch training the same method, and FT-Full, each in both
  memory layouts, of which the one with the lower median counts. Before each step there is a pause, in which the threads
  of whoever was before stop waiting for more;
- Python trains with it for an epoch on photographs made for that, without PyTorch, and tells its resident set;
- its instructions are timed one by one, and the multiply-adds of the step are held against what the machine's units
  reach at best (`Executor.gemm_peak`).

The weights are random, which no byte and no time depends on.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tinytl.compiler.compile import compile_classes, compile_network
from tinytl.compiler.cost import multiply_adds
from tinytl.compiler.file import write_program
from tinytl.compiler.program import Program
from tinytl.errors import BudgetError, InputError, TinyTLError
from tinytl.memory.profile import candidate, stock_layouts
from tinytl.memory.rss import rss_delta
from tinytl.memory.step import StepSpec, build_network
from tinytl.runtime._library import stand_alone
from tinytl.runtime.executor import Executor
from tinytl.spec import FitOptions, TrainSpec

PAUSE_SECONDS = 0.02
STANDALONE_STEPS = 4
STREAMS = ("begin", "micro", "finish")


@dataclass(frozen=True)
class DeviceRow:
    """One program to measure: its method, norm and bits.

    Attributes:
        process_bytes: that the whole process is to take at most: the step is the fastest that does; where that is less
            than the least there is, or None, the step takes as little memory as it can.
    """

    method: str
    norm: str = "bn"
    frozen_bits: int = 8
    optimizer_bits: int = 32
    process_bytes: int | None = None

    @property
    def memory_budget(self) -> int | None:
        """Bytes of the process that are the arena's and the constants'."""
        return None if self.process_bytes is None else self.process_bytes - PROGRAM_BYTES


PROGRAM_BYTES = 2_100_000
"""Of the stand-alone process beside the arena and the constants: its code, its stack, what a file's tables become."""
ROWS = (
    DeviceRow("tinytl-b", process_bytes=16_000_000),
    DeviceRow("tinytl-b", frozen_bits=32, process_bytes=24_000_000),
    DeviceRow("tinytl-l+b", process_bytes=44_000_000),
    DeviceRow("tinytl-l+b", optimizer_bits=8, process_bytes=32_000_000),
    DeviceRow("tinytl-l+b", "gn", process_bytes=48_000_000),
    DeviceRow("tinytl-l+b", "gn", optimizer_bits=8, process_bytes=36_000_000),
)
"""Those of issue 5, with what it allows each process."""


def device_rows(
    base: StepSpec,
    rows: Sequence[DeviceRow] = ROWS,
    *,
    turns: int = 15,
    stock: bool = True,
    on_row: Callable[[str], object] = lambda name: None,
) -> list[dict[str, Any]]:
    """Measure `rows` as variations of `base`, of which backbone, resolution, classes, batch and threads are taken.

    Args:
        base: its `threads` are those of both sides; None: PyTorch's.
        rows: what to measure.
        turns: steps of each side, one after the other; 2 or more.
        stock: compare with stock PyTorch; else those figures are None.
        on_row: told what is measured next.

    Returns:
        For each row a dict: `method`, `norm`, `optimizer_bits`, `frozen_bits`, `threads`, `isa`, `micro_batch`,
        `process_budget_bytes` (by which the step was planned, None: as little as it can), `peak_rss_bytes`,
        `python_peak_rss_bytes`, `first_step_seconds` (from the file to the end of the first step),
        `arena_planned_bytes`, `arena_used_bytes`, `data_bytes`, `step_seconds` (median), `stock_step_seconds`,
        `stock_full_step_seconds`,
        `ratio`, `ratio_low`, `ratio_high` (of turns, against stock of the same method; `full_ratio...`: FT-Full),
        `stock_peak_rss_bytes`, `multiply_adds` (of a step), `gemm_peak` (multiply-adds a second), `gemm_peak_share`,
        `by_op` ({op: {`seconds`, `multiply_adds`, `share`}}, a step).

    Raises:
        InputError: fewer than 2 turns, or the executor or the stand-alone program was not built.
    """
    if turns < 2:
        raise InputError(f"turns is {turns}: expected 2 or more, quartiles need them")
    program_path = stand_alone()
    threads = base.threads or torch.get_num_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for norm in dict.fromkeys(row.norm for row in rows):
                mine = [row for row in rows if row.norm == norm]
                programs = []
                for number, row in enumerate(mine):
                    on_row(f"{row.method}, {norm}: compiling")
                    path = Path(folder) / f"{norm}{number}.ttl"
                    programs.append((row, _compiled(base, row, threads, path), path))
                found += _measured(base, programs, program_path, threads, turns, stock, on_row)
    finally:
        torch.set_num_threads(before)
    return found


def _compiled(base: StepSpec, row: DeviceRow, threads: int, path: Path) -> Program:
    spec = replace(base, method=row.method, norm=row.norm, frozen_bits=row.frozen_bits)  # pyright: ignore
    model, adaptation = build_network(spec)
    compiled = functools.partial(
        compile_network,
        model,
        adaptation,
        resolution=base.resolution,
        batch=base.batch_size,
        optimizer_bits=row.optimizer_bits,
        threads=threads,
    )
    try:
        program = compiled(budget_bytes=row.memory_budget)
    except BudgetError:
        program = compiled()
    write_program(program, path)
    return program


def _measured(
    base: StepSpec,
    programs: list[tuple[DeviceRow, Program, Path]],
    program_path: Path,
    threads: int,
    turns: int,
    stock: bool,
    on_row: Callable[[str], object],
) -> list[dict[str, Any]]:
    """The rows of one norm, whose stock steps they share."""
    norm = programs[0][0].norm
    alone = []
    for row, program, path in programs:
        on_row(f"{row.method}, {norm}: alone")
        alone.append(run_standalone(program_path, path, threads))
        on_row(f"{row.method}, {norm}: from Python")
        budget = program.meta["plan"]["budget_bytes"]
        alone[-1]["python_peak_rss_bytes"] = python_peak(base, row, budget, threads, path.with_suffix(""))
    steps: dict[Any, Callable[[], object]] = {}
    executors = [Executor(path, threads) for _, _, path in programs]
    rss: dict[str, int | None] = {}
    try:
        for number, executor in enumerate(executors):
            _fill(executor)
            steps["device", number] = _step_of(executor)
        for method in dict.fromkeys([row.method for row, _, _ in programs] + ["ft-full"]) if stock else ():
            on_row(f"{method}, {norm}: stock")
            spec = replace(base, method=method, norm=norm, lean=False, threads=threads, memory_budget=None)  # pyright: ignore
            for layout in stock_layouts(spec):
                steps["stock", method, layout] = candidate(spec, layout).step
            grown = rss_delta(spec)
            rss[method] = None if grown is None else int(grown["rss_peak_bytes"])
        on_row(f"{norm}: steps in turns")
        seconds = _in_turns(steps, turns)
        timed = []
        for (row, _, _), executor in zip(programs, executors, strict=True):
            on_row(f"{row.method}, {norm}: instruction by instruction")
            timed.append((executor.gemm_peak() * 1e9, _by_op(executor, _step_of(executor), turns)))
    finally:
        for executor in executors:
            executor.close()
    rows = []
    for number, (row, program, _) in enumerate(programs):
        own, process = seconds["device", number], alone[number]
        peak, by_op = timed[number]
        work = step_multiply_adds(program)
        for op, share in work.items():
            by_op[op] |= {"multiply_adds": share, "share": share / by_op[op]["seconds"] / peak}
        total = sum(work.values())
        rows.append(
            {
                "method": row.method,
                "norm": row.norm,
                "optimizer_bits": row.optimizer_bits,
                "frozen_bits": row.frozen_bits,
                "threads": threads,
                "isa": process["isa"],
                "micro_batch": process["micro_batch"],
                "process_budget_bytes": row.process_bytes if program.meta["plan"]["budget_bytes"] else None,
                "peak_rss_bytes": process["peak_rss_bytes"],
                "python_peak_rss_bytes": process["python_peak_rss_bytes"],
                "first_step_seconds": process["open_seconds"] + process["first_step_seconds"],
                "arena_planned_bytes": process["arena_planned_bytes"],
                "arena_used_bytes": process["arena_used_bytes"],
                "data_bytes": process["data_bytes"],
                "step_seconds": statistics.median(own),
                **_against(own, seconds, row.method, "stock_step_seconds", ""),
                **_against(own, seconds, "ft-full", "stock_full_step_seconds", "full_"),
                "stock_peak_rss_bytes": rss.get(row.method),
                "multiply_adds": total,
                "gemm_peak": peak,
                "gemm_peak_share": total / statistics.median(own) / peak,
                "by_op": dict(by_op),
            }
        )
    return rows


def run_standalone(program: Path, path: Path, threads: int) -> dict[str, Any]:
    """What `tinytl-step --json` tells of a few steps of the program at `path`, in a process of its own."""
    command = [str(program), str(path), "--steps", str(STANDALONE_STEPS), "--threads", str(threads), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TinyTLError(f"{program.name} ended with status {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def python_peak(base: StepSpec, row: DeviceRow, budget: int | None, threads: int, folder: Path) -> int:
    """The most that Python has resident while it trains for an epoch on photographs, which are made in `folder`."""
    classes = [f"class{number:03d}" for number in range(base.classes)]
    photos = folder / "photos"
    for number, name in enumerate(classes):
        (photos / name).mkdir(parents=True)
        for copy in range(2):
            pixels = bytes((i * (number + 3) + (i >> 7) * (copy + 5)) & 255 for i in range(48 * 48 * 3))
            image = Image.frombytes("RGB", (48, 48), pixels).resize((320, 240))
            image.save(photos / name / f"{copy}.jpg")
    spec = TrainSpec(
        photos=str(photos),
        backbone=base.backbone,
        method=row.method,
        norm=row.norm,
        pretrained=False,
        resolution=base.resolution,
        batch_size=base.batch_size,
        frozen_bits=row.frozen_bits,
        memory_budget=None if budget is None else str(budget),
        fit=FitOptions(epochs=1, optimizer_bits=row.optimizer_bits),
    )
    path = folder / "program.ttl"
    write_program(compile_classes(spec, classes, threads=threads).program, path)
    command = [sys.executable, "-m", "tinytl.runtime", "train", str(path), str(photos), "--out", str(folder / "run")]
    # what Python compiles when it first imports a module is kept, as on a device that has run it before
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    peak = 0
    for _ in range(2):  # the first time compiles
        shutil.rmtree(folder / "run", ignore_errors=True)
        done = subprocess.run([*command, "--val-fraction", "0.5", "--json"], capture_output=True, text=True, env=env)
        if done.returncode:
            raise TinyTLError(f"training from Python ended with status {done.returncode}: {done.stderr.strip()}")
        peak = int(json.loads(done.stdout)["peak_bytes"])
    return peak


def step_multiply_adds(program: Program) -> dict[str, int]:
    """Multiply-adds of one step on a whole batch, by op, of convolutions in every direction; others have none."""
    found: dict[str, int] = defaultdict(int)
    for stream in STREAMS:
        for one in program.streams.get(stream, ()):
            work = multiply_adds(program, one) * (program.batch if stream == "micro" else 1)
            if work:
                found[one.op] += work
    return dict(found)


def _fill(executor: Executor) -> None:
    """Give it a batch: bytes and labels that look like nothing in particular."""
    pixels = memoryview(executor.images).cast("B")
    pattern = bytes((i * 151 + (i >> 5) * 29) & 255 for i in range(4099))  # a prime's length: no two images alike
    for begin in range(0, len(pixels), len(pattern)):
        end = min(begin + len(pattern), len(pixels))
        pixels[begin:end] = pattern[: end - begin]
    for number in range(executor.batch):
        executor.labels[number] = number % executor.classes


def _step_of(executor: Executor) -> Callable[[], object]:
    return lambda: executor.step(executor.batch, 1e-5)


def _in_turns(steps: dict[Any, Callable[[], object]], turns: int) -> dict[Any, list[float]]:
    """Seconds of each step, one of each a turn, behind a first turn that is not counted."""
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            time.sleep(PAUSE_SECONDS)
            begun = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _by_op(executor: Executor, step: Callable[[], object], steps: int) -> dict[str, dict[str, float]]:
    """Seconds a step of each op, the median of so many steps, the longest first."""
    ops = {stream: executor.instructions(stream) for stream in STREAMS}
    found: dict[str, list[float]] = {op: [0.0] * steps for names in ops.values() for op in names}
    executor.timing(True)
    for number in range(steps):
        time.sleep(PAUSE_SECONDS)
        step()
        for stream, names in ops.items():
            for op, spent in zip(names, executor.seconds(stream), strict=True):
                found[op][number] += spent
    executor.timing(False)
    medians = {op: statistics.median(times) for op, times in found.items()}
    return {op: {"seconds": medians[op]} for op in sorted(medians, key=medians.__getitem__, reverse=True)}


def _against(
    own: Sequence[float], seconds: dict[Any, list[float]], method: str, name: str, prefix: str
) -> dict[str, Any]:
    """The faster layout of stock's median, and the ratio of turns with its quartiles."""
    others: Iterable[list[float]] = [times for key, times in seconds.items() if key[:2] == ("stock", method)]
    best = min(others, key=statistics.median, default=None)
    keys = (f"{prefix}ratio_low", f"{prefix}ratio", f"{prefix}ratio_high")
    if best is None:
        return {name: None, **dict.fromkeys(keys)}
    quartiles = statistics.quantiles([a / b for a, b in zip(own, best, strict=True)], n=4)
    return {name: statistics.median(best), **dict(zip(keys, quartiles, strict=True))}
