"""What is measured and planned, in this process or in several side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .architecture import Genes
from .pairs import Accuracy, Meter
from .planned import Conditions, Cost, cost_of
from .session import make_shared, own_weights
from .space import Space
from .target import Target
from .trial import Trial, try_out
from .tuning import read_shared_


@dataclass(frozen=True)
class Work:
    """All that a worker needs, small enough to be sent to a process.

    Attributes:
        target: the data set.
        space: of the genomes.
        conditions: that costs are planned for.
        shared: file of the fine-tuned super-network.
        threads: that compute in each process; None leaves PyTorch's choice.
    """

    target: Target
    space: Space
    conditions: Conditions
    shared: Path
    threads: int | None


class Worker:
    """Measures and plans genomes; the super-network is opened when it is first needed."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._meter: Meter | None = None

    def accuracy(self, genome: Genes) -> Accuracy:
        """Of a sub-network in the super-network, on the held-out photographs."""
        if self._meter is None:
            shared = make_shared(self._work.target, self._work.space)
            read_shared_(shared, self._work.shared)
            self._meter = Meter(shared, self._work.target)
        return self._meter(genome)

    def cost(self, genome: Genes) -> Cost:
        """Of its training step, as planned."""
        return cost_of(self._work.space.choice(genome), self._work.conditions)

    def trial(self, genome: Genes) -> Trial:
        """Of a finalist, trained by itself."""
        work, space = self._work, self._work.space
        weights = own_weights(space, work.target, genome, work.shared.parent)
        return try_out(space.choice(genome), work.target, weights, work.target.spec.finalist_epochs)


class Crew:
    """Workers in so many processes; with one, the work is done here. Use as a context manager."""

    def __init__(self, work: Work, processes: int) -> None:
        self._work, self._processes = work, processes
        self._here = Worker(work)
        self._pool: ProcessPoolExecutor | None = None

    @property
    def conditions(self) -> Conditions:
        """That costs are planned for."""
        return self._work.conditions

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *ignored: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def each(self, what: str, genomes: Iterable[Genes]) -> Generator[tuple[int, Any], None, None]:
        """(index, result) of 'accuracy', 'cost' or 'trial' for each genome, as they are ready."""
        genomes = [np.asarray(genome) for genome in genomes]
        if self._processes == 1 or len(genomes) < 2:
            call: Callable[[Genes], Any] = getattr(self._here, what)
            yield from ((index, call(genome)) for index, genome in enumerate(genomes))
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),  # fork would copy threads' locks
                initializer=_begin,
                # a target of its own: what this process has decoded stays here
                initargs=(replace(self._work, target=replace(self._work.target)), os.getpid()),
            )
        waiting: dict[Future[Any], int] = {}
        numbers = iter(range(len(genomes)))

        def submit() -> None:
            while len(waiting) < 2 * self._processes and (number := next(numbers, None)) is not None:
                assert self._pool is not None
                waiting[self._pool.submit(_do, what, genomes[number])] = number

        submit()
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
            submit()

    def all(self, what: str, genomes: Iterable[Genes]) -> list[Any]:
        """The results in the order of the genomes."""
        found = dict(self.each(what, genomes))
        return [found[index] for index in sorted(found)]


_WORKER: list[Worker] = []


def _begin(work: Work, parent: int) -> None:
    """In a new process: threads as asked for, signals left to the parent, an end where the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(work.threads or 1)
    end_with(parent)
    _WORKER[:] = [Worker(work)]


def end_with(parent: int) -> None:
    """Have this process end within a second or two of the one whose child it is, even if that is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do(what: str, genome: Genes) -> Any:
    return getattr(_WORKER[0], what)(genome)
