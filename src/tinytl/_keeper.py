"""When a run is saved.

At its step boundaries: after so many steps, after so many seconds, at each epoch's end, when a signal asks it to stop,
and when an error ends it where what it has learned is whole, such as at a loss that is NaN or a photograph that has
vanished. A kill or a power cut costs what came after the last of these, and no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from tinytl._interrupt import Stop


class Place(Protocol):
    """Where a run stands at a step boundary: `tinytl.checkpoint.Boundary`, or anything of this shape."""

    @property
    def progress(self) -> Any:
        """It has a ``step``, counted from the start."""
        ...

    @property
    def epoch_end(self) -> bool:
        """Whether an epoch ends there."""
        ...


class Saver(Protocol):
    """What writes where a run stands to the disk: `tinytl.checkpoint.Checkpointer`, or anything of this shape."""

    def save(self, boundary: Any, /) -> None:
        """Write it whole or not at all."""
        ...


class Intervals(Protocol):
    """How often to save: `tinytl.spec.RunOptions`, or anything of this shape; None: not for that reason."""

    @property
    def checkpoint_steps(self) -> int | None: ...
    @property
    def checkpoint_seconds(self) -> float | None: ...


class Keeper:
    """Saves to one `Saver`; `boundary` is made to be the ``on_boundary`` of `fit`, and `moved` its ``on_step``.

    ``sync`` is called before each save: what a log says of the steps done is on the disk before they count as done.
    """

    def __init__(self, saver: Saver, options: Intervals, stop: Stop, sync: Callable[[], object]) -> None:
        self._saver = saver
        self._steps, self._seconds = options.checkpoint_steps, options.checkpoint_seconds
        self._stop, self._sync = stop, sync
        self._saved_at = time.monotonic()
        self._unsaved: Place | None = None  # where the run stands, unless that is saved or no boundary

    def moved(self, info: Any) -> None:
        """Note that a step was taken: until the next boundary there is nothing that could be saved."""
        self._unsaved = None

    def boundary(self, at: Place) -> None:
        """Save, if it is time to. Raises Interrupted when a signal has come, RunError when it cannot be written."""
        self._unsaved = at
        if at.epoch_end or self._is_due(at.progress.step):
            self.keep()
        self._stop.check()

    def keep(self) -> bool:
        """Save where the run stands, unless that is done; return whether its last step is on the disk then."""
        if self._unsaved is not None:
            self._sync()
            self._saver.save(self._unsaved)
            self._saved_at, self._unsaved = time.monotonic(), None
            return True
        return False

    def _is_due(self, step: int) -> bool:
        by_steps = self._steps is not None and step % self._steps == 0
        return by_steps or (self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds)
