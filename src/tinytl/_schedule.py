"""What a run's steps have of their own: the learning rate (the paper's cosine, arXiv 2007.11622) and the seed."""

from __future__ import annotations

import math
from typing import Protocol

from tinytl._digest import sha256


class Rates(Protocol):
    """What the rate depends on: `tinytl.spec.FitOptions`, or anything of this shape."""

    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup_epochs(self) -> int: ...


def learning_rate(step: int, batches: int, options: Rates) -> float:
    """Return the rate of a step (from 0): linear warm-up, then ``lr/2 (1 + cos(pi t/T))`` over T steps."""
    warmup = options.warmup_epochs * batches
    if step < warmup:
        return options.lr * (step + 1) / warmup
    done = (step - warmup) / (options.epochs * batches - warmup)
    return 0.5 * options.lr * (1.0 + math.cos(math.pi * done))


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step's own draws (dropout), below 2**63: equal pairs, equal seeds."""
    return int.from_bytes(sha256(f"{seed}/{step}".encode()).digest()[:8], "little") >> 1
