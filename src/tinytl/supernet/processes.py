"""One process, or several that torchrun has started: what they have to tell each other.

    with joined() as group:
        group.average_gradients_(net)

Each takes its share of every batch, so all take the same step on the same weights. Batch statistics are a share's own,
as they are in PyTorch's DistributedDataParallel: a step exchanges its gradients and its loss, and nothing else. (What a
batch norm remembers is the first process's, and used by nobody: it is measured anew before anything is evaluated.)
Everything goes by gloo, in the CPU's memory. Alone, nothing is exchanged and torch.distributed is not even imported.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from tinytl.errors import InputError, TinyTLError

T = TypeVar("T")
_parted = False  # whether this process has been joined with others and has left them
_LONGEST = datetime.timedelta(hours=6)  # that one may be busy while the others wait; one that has died is seen at once


class Group:
    """The processes of a run.

    Attributes:
        rank: this one's number, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def sums(self, *values: float) -> tuple[float, ...]:
        """Each value summed over the processes."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together)
        return tuple(together.tolist())

    def average_gradients_(self, net: nn.Module) -> None:
        """Replace every gradient by the mean over the processes, in which the same parameters have one."""
        if self.size == 1:
            return
        import torch.distributed as dist

        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def gathered(self, value: T) -> list[T]:
        """What every process has, in the order of their numbers. It is pickled: our own processes' plain data only."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, action: Callable[[], T]) -> T | None:
        """Do something in the first process alone; the others wait, and get None.

        Raises:
            TinyTLError: what the action raises; in the others an InputError of the same words.
        """
        value: T | None = None
        error: TinyTLError | None = None
        if self.is_first:
            try:
                value = action()
            except TinyTLError as raised:
                error = raised
        told = self.gathered(None if error is None else (type(error).__name__, str(error)))[0]
        if error is not None:
            raise error
        if told is not None:
            raise InputError(told[1])
        return value


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The processes that torchrun has started, joined for the length of the block; without it, this one alone.

    Blocks may stand within each other: the outermost joins, or whoever has called ``init_process_group`` before.

    Raises:
        InputError: torchrun's variables are there but cannot be used, or the processes have been joined and parted
            before: they cannot meet twice.
    """
    global _parted
    words = [os.environ.get(name) for name in ("WORLD_SIZE", "RANK")]
    if words[0] in (None, "1"):
        yield Group()
        return
    try:
        size, rank = (int(word or "") for word in words)
        if not 0 <= rank < size:
            raise ValueError
    except ValueError:
        raise InputError(
            f"WORLD_SIZE is {words[0]!r} and RANK {words[1]!r}: expected what torchrun sets, or neither"
        ) from None
    import torch.distributed as dist

    if dist.is_initialized():
        yield Group(dist.get_rank(), dist.get_world_size())
        return
    if _parted:  # they would wait for each other at the place where they met before
        raise InputError("the processes were joined once already: put all that they do into one `with joined()`")
    dist.init_process_group("gloo", timeout=_LONGEST)
    try:
        yield Group(rank, size)
    finally:
        _parted = True
        dist.destroy_process_group()
