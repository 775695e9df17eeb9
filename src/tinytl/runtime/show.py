"""What a run shows: one line that moves while it goes, a line for each epoch, and what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tinytl.data.folder import PhotoSet
from tinytl.errors import one_line

from .machine import Machine
from .process import peak_bytes
from .shown import Result, Shown

_REDRAW_SECONDS = 0.1


def print_note(text: str) -> None:
    """Print what the user should know, on stderr."""
    print(f"note: {one_line(text)}", file=sys.stderr, flush=True)


class Display(Shown):
    """Shows a run on a terminal; into a file, what moves is left out.

    Attributes:
        notes: what the run said that the user should know, also printed on stderr unless ``quiet``.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.notes: list[str] = []
        self._quiet = quiet
        self._moves = not quiet and sys.stderr.isatty()
        self._drawn, self._drawn_at = 0, 0.0

    def check(self, done: int, count: int) -> None:
        """Move the line of photographs that are read once, before training."""
        self._move(f"checking photographs {done}/{count}", last=done == count)

    def start(self, machine: Machine, train: PhotoSet, validation: PhotoSet) -> None:
        """Say what trains on what."""
        if not self._quiet:
            self._line(described(machine))
            self._line(
                f"{len(train)} photographs to train on, {len(validation)} held out, {len(train.classes)} classes"
            )

    def step(self, line: Mapping[str, Any]) -> None:
        """Move the line."""
        self._move(
            f"epoch {line['epoch']}/{line['steps'] // line['batches']}  step {line['batch']}/{line['batches']}  "
            f"loss {line['loss']:.3f}  {line['images_per_second']:.0f} images/s  "
            f"process {line['peak_bytes'] / 1e6:.0f} MB"
        )

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Print one line."""
        if not self._quiet:
            found = line["validation"]
            self._line(
                f"epoch {line['epoch']}/{line['epochs']}  loss {line['loss']:.3f}  training {line['accuracy']:.1%}  "
                f"held out: top-1 {found['top1']:.1%}, balanced {found['balanced_accuracy']:.1%}  "
                f"{line['images_per_second']:.0f} images/s"
            )

    def notice(self, text: str) -> None:
        """Print what the user should know."""
        self.notes.append(text)
        if not self._quiet:
            self.clear()
            print_note(text)

    def clear(self) -> None:
        """Take the moving line away."""
        if self._drawn:
            sys.stderr.write("\r" + " " * self._drawn + "\r")
            sys.stderr.flush()
            self._drawn = 0

    def _line(self, text: str) -> None:
        self.clear()
        print(one_line(text), flush=True)

    def _move(self, text: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if not self._moves or (now - self._drawn_at < _REDRAW_SECONDS and not last):
            return
        self._drawn_at = now
        text = one_line(text)[:200]
        sys.stderr.write("\r" + text.ljust(self._drawn))
        sys.stderr.flush()
        self._drawn = len(text)


def described(machine: Machine) -> str:
    """A program in one line."""
    delta = machine.meta.get("delta", {})
    method = delta.get("method", {}).get("name", "a method without a name")
    pieces = -(-machine.batch // machine.micro_batch)
    return (
        f"{method} of {delta.get('backbone', 'a network without a name')}, {machine.classes} classes, "
        f"{machine.height} px; {machine.batch} images a step"
        + (f" in {pieces} micro-batches of {machine.micro_batch}" if pieces > 1 else "")
        + f"; {machine.threads} threads; arena {machine.arena_bytes / 1e6:.1f} MB"
    )


def result_record(result: Result, notes: list[str]) -> dict[str, Any]:
    """A finished run as `train --json` prints it, in the lab's words: bytes, seconds, fractions.

    What is about training is None where this process did not train, the resumed run being finished already.
    """
    seconds = result.step_seconds + result.wait_seconds
    return {
        "out": str(result.out),
        **result.scores.record(),
        "classes": list(result.classes),
        "train_images": result.train_images,
        "best_top1": result.best_top1,
        "best_epoch": result.best_epoch,
        "steps": result.steps,
        "delta_bytes": result.delta_bytes,
        "seconds": seconds,
        "images_per_second": result.images / seconds if result.images else None,
        "step_share": result.step_seconds / seconds if result.images else None,
        "peak_bytes": peak_bytes(),
        "notes": notes,
    }


def summary(result: Result) -> list[str]:
    """A finished run in one line, and another on how it was carried out if it was trained here."""
    found = result.scores
    lines = [
        f"top-1 {found.top1:.1%}, balanced {found.balanced_accuracy:.1%} (largest class alone: "
        f"{found.majority_share:.1%}) on {found.images} held-out photographs; learned "
        f"{result.delta_bytes / 1e6:.2f} MB in {result.out}"
    ]
    seconds = result.step_seconds + result.wait_seconds
    if result.images:
        lines.append(
            f"{result.images / seconds:.1f} images/s in training: {result.step_seconds / seconds:.0%} of the time in "
            f"steps, the rest waiting for photographs; process {peak_bytes() / 1e6:.0f} MB at its peak"
        )
    return lines
