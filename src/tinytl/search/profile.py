"""What a search's time goes to, over all the times that it is gone on with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tinytl.report import Column

PHASES = {
    "fine-tune": "fine-tuning the super-network",
    "measure": "measuring sub-networks",
    "plan": "planning their memory",
    "predict": "predicting their accuracy",
    "evolve": "evolution itself",
    "other": "everything else",
}
"""What time is counted under, and what that is."""
EVALUATION = ("fine-tune", "measure")
"""Phases in which the network looks at photographs; the others are bookkeeping."""
COLUMNS = (Column("phase", "phase"), Column("seconds", "time", "s"), Column("share", "share", "%"))


class Stopwatch:
    """Counts seconds by phase, from when it is made until `stop`; what is in no phase counts as 'other'.

    A phase within a phase has its time to itself: every second counts once. For one thread.

    Args:
        clock: tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._open = ["other"]
        self._since: float | None = clock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside under this name. Raises ValueError for a name that is not in `PHASES`."""
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}: known: {', '.join(PHASES)}")
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def stop(self) -> None:
        """Count no more."""
        self._count()
        self._since = None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, up to now."""
        self._count()
        return dict(self._seconds)

    @property
    def evaluation_share(self) -> float:
        """The share of all time that evaluation took (`EVALUATION`); 0.0 before any time has passed."""
        seconds = self.seconds
        total = sum(seconds.values())
        return sum(seconds[name] for name in EVALUATION) / total if total else 0.0

    def rows(self) -> list[dict[str, object]]:
        """Rows for `tinytl.report.table` under `COLUMNS`: a phase each, evaluation, and the whole."""
        seconds = self.seconds
        total = sum(seconds.values())

        def row(text: str, value: float) -> dict[str, object]:
            return {"phase": text, "seconds": value, "share": value / total if total else None}

        evaluation = sum(seconds[name] for name in EVALUATION)
        return [
            *(row(text, seconds[name]) for name, text in PHASES.items()),
            row("of it, evaluation (the first two)", evaluation),
            row("all", total),
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data up to now, from which `from_json` goes on."""
        return {"seconds": self.seconds}

    @staticmethod
    def from_json(data: Mapping[str, Any], clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
        """A stopwatch that goes on from `to_json`; the time between does not count."""
        watch = Stopwatch(clock)
        watch._seconds.update({name: float(data["seconds"][name]) for name in PHASES})
        return watch

    def _count(self) -> None:
        if self._since is not None:
            now = self._clock()
            self._seconds[self._open[-1]] += now - self._since
            self._since = now
