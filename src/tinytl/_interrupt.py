"""SIGINT and SIGTERM made into a question that a run asks itself where it can stop without loss.

A signal may come in the middle of an optimizer step, where nothing can be saved. So its handler only takes note, and
the run asks at every step boundary and between batches of validation. A second Ctrl-C does not wait for that: it is
Python's ordinary KeyboardInterrupt, and what the last checkpoint holds is what is left. A second SIGTERM changes
nothing (service managers send more than one); what does not want to wait sends SIGKILL.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from tinytl.errors import Interrupted

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a signal has asked the run to stop.

    Attributes:
        asked: the signal that came first; None: none yet.
        advice: the end of the message, such as how to go on.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.advice = "nothing has begun yet"

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.asked is not None:
            name = "Ctrl-C" if self.asked == signal.SIGINT else self.asked.name
            raise Interrupted(f"stopped by {name}; {self.advice}", self.asked)

    def between(self, items: Iterator[T]) -> Generator[T, None, None]:
        """Yield the items, and `check` before each, and after the last; closes a generator that is left early."""
        try:
            self.check()
            for item in items:
                yield item
                del item  # or it would be alive while the next is waited for
                self.check()
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Take note of SIGINT and SIGTERM for the length of the block; the handlers before it come back afterwards.

    Only the main thread may handle signals: in another, the block changes nothing. A signal that is ignored (nohup, a
    shell's background job) stays so. One that came after the run's last question raises Interrupted at the block's end.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: object) -> None:
        if stop.asked is None:
            stop.asked = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            # None: somebody's handler in C, which could not be put back
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stop.check()
