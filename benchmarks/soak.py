"""A thousand kills: `python -m benchmarks.soak --kills 1000`.

A process trains a small network on a few photographs until SIGKILL ends it; the next one goes on in the same folder.
When the run has come to its end, what it left must be what a run that nobody disturbed left: the same bits in delta,
checkpoint and curves, the same metrics but for the times. Then the next run begins. Writes
benchmarks/results/soak.json.

A process is killed at a random moment of its life, from its start to the writing of its last file, or, every fourth,
right before one of its calls to the file system (a random one: open, fsync, link, rename, remove, ...). How many
threads decode, and after how many steps it saves, is drawn anew for each. After every kill the newest checkpoint must
be whole, and not behind the one before.

Lives are forked from this process, which has imported PyTorch and trains nothing itself: a life costs a fraction of a
second, and is a process of its own for the kernel all the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # what every life would import, imported once
import matplotlib.figure  # noqa: F401
import torch

from tests import small_run
from tinytl._atomic import read_sealed
from tinytl.backbones import BACKBONES
from tinytl.checkpoint import KIND
from tinytl.run import CHECKPOINT, DELTA, PREVIOUS, SETTINGS, train
from tinytl.spec import RunOptions

from .machine import describe

RESULTS = Path("benchmarks/results/soak.json")


def step_in(out: Path) -> int:
    """The step that the newest checkpoint holds, which must be whole; 0: there is none yet."""
    newest = out / CHECKPOINT
    if not newest.exists():
        newest = out / PREVIOUS  # between two renames, where there are no hard links
    return int(read_sealed(newest, KIND)[1]["progress"]["step"]) if newest.exists() else 0


class Calls:
    """Counts this process's calls that change a folder, and ends it before the ``deadly`` one (counted from 1)."""

    EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock")

    def __init__(self, folder: Path, deadly: int | None) -> None:
        self.count = 0
        self._folder, self._deadly = str(folder), deadly
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            self._one()
            fsync(descriptor)

        os.fsync = counted

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "fcntl.flock" or (event in self.EVENTS and str(arguments[0]).startswith(self._folder)):
            self._one()

    def _one(self) -> None:
        self.count += 1
        if self.count == self._deadly:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Life:
    """How one process ended. ``killed``: by SIGKILL, otherwise it had finished."""

    killed: bool
    seconds: float


def live(body: Callable[[], object], log: Path, deadline: float | None = None) -> Life:
    """Run ``body`` in a process of its own, and kill that after ``deadline`` seconds.

    Raises RuntimeError, with what it printed, when it ends in any other way than well or by SIGKILL.
    """
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - begun
        if ended:
            break
        if deadline is not None and passed >= deadline:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            break
        time.sleep(0.001)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status != 0:
        raise RuntimeError(f"a process ended with status {status:#x}:\n{log.read_text(errors='replace')}")
    return Life(killed, passed)


@dataclass
class Soak:
    """The runs and their processes, all in the folder ``work``."""

    work: Path
    seed: int
    report: Callable[[str], object] = print

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        BACKBONES[small_run.NAME] = small_run.entry()
        self._spec = small_run.make_spec(self.work / "photos")
        self._log = self.work / "last-life.txt"
        self.lives = self.kills_by_time = self.kills_by_call = self.same = self.runs = 0
        self.lengths: list[float] = []

    @property
    def kills(self) -> int:
        """How many processes were killed."""
        return self.kills_by_time + self.kills_by_call

    def _body(self, out: Path, deadly: int | None = None, count_to: Path | None = None) -> Callable[[], None]:
        workers, every = self._random.choice((0, 1, 2)), self._random.choice((1, 1, 2, 3))
        if count_to is not None:
            every = 1  # the most calls that a run can make

        def body() -> None:
            calls = Calls(out, deadly)
            options = RunOptions(workers=workers, threads=1, checkpoint_steps=every)
            train(self._spec, out, options=options, resume=(out / SETTINGS).exists())
            if count_to is not None:
                count_to.write_text(str(calls.count))

        return body

    def undisturbed(self) -> tuple[dict[str, str], float, int]:
        """Train once to the end: what that leaves, how many seconds and how many calls it takes."""
        counted = self.work / "calls.txt"
        life = live(self._body(self.work / "undisturbed", count_to=counted), self._log)
        return small_run.left_behind(self.work / "undisturbed"), life.seconds, int(counted.read_text())

    def deal(self, kills: int) -> None:
        """Kill that many processes, and see each run that they were of to its end."""
        expected, length, calls = self.undisturbed()
        self.report(f"undisturbed: {length:.2f} s, {calls} calls to the file system, delta {expected[DELTA][:16]}")
        out, before = self._begin()
        while True:
            done = self.kills >= kills  # the last run is let go on to its end
            by_call = not done and self.lives % 4 == 3
            deadly = self._random.randint(1, calls) if by_call else None
            deadline = None if by_call or done else self._random.uniform(0.0, length)
            life = live(self._body(out, deadly), self._log, deadline)
            self.lives += 1
            self.lengths.append(life.seconds)
            if life.killed:
                self.kills_by_call += by_call
                self.kills_by_time += not by_call
                step = step_in(out)
                if step < before:
                    raise RuntimeError(f"{out} went back from step {before} to {step}")
                before = step
                if self.kills % 10 == 0:
                    self.report(f"{self.kills} of {kills} kills, {self.same} of {self.runs} finished runs the same")
                continue
            self.runs += 1
            found = small_run.left_behind(out)
            if found != expected:
                different = [name for name in expected if found[name] != expected[name]]
                raise RuntimeError(f"{out} differs from the undisturbed run in {', '.join(different)}")
            self.same += 1
            if done:
                return
            shutil.rmtree(out)
            out, before = self._begin()

    def _begin(self) -> tuple[Path, int]:
        return self.work / f"run-{self.runs:04d}", 0


def main() -> None:
    """Deal the kills and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep what the runs leave in this new folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        soak = Soak(work.resolve(), options.seed, functools.partial(print, flush=True))
        soak.deal(options.kills)
    results = {
        "machine": describe(),
        "kills": soak.kills,
        "kills_by_time": soak.kills_by_time,
        "kills_by_call": soak.kills_by_call,
        "lives": soak.lives,
        "runs": soak.runs,
        "same": soak.same,
        "life_seconds": sum(soak.lengths) / len(soak.lengths),
        "seconds": time.monotonic() - begun,
        "seed": options.seed,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"{soak.kills} processes killed, {soak.runs} runs finished, {soak.same} of them in the bits of the undisturbed "
        f"run; {results['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
