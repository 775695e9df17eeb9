"""How good a program is on photographs, from its logits; the lab's measures (`tinytl.engine.Evaluation`)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from tinytl.errors import InputError, NotFiniteError

BROKEN = (
    "the network's answers are NaN or infinite: its training went too far; train it again with a lower learning rate "
    "(train --lr)"
)


class Scores(NamedTuple):
    """How good a program is on a set of images.

    Attributes:
        top1: share of the images whose largest logit is the label's, in [0, 1].
        balanced_accuracy: mean recall of the classes that are present, in [0, 1].
        images: how many there were.
        loss: mean cross entropy without label smoothing, in nats.
        majority_share: share of the most frequent true class: the top-1 of always answering that.
    """

    top1: float
    balanced_accuracy: float
    images: int
    loss: float
    majority_share: float

    def record(self) -> dict[str, Any]:
        """As JSON values by name."""
        return self._asdict()


class Tally:
    """Adds up answers, batch by batch."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._support, self._right = [0] * classes, [0] * classes
        self._loss = 0.0

    def add(self, logits: array[float], labels: Sequence[int]) -> None:
        """Add the answers to images: `logits` (images, classes), row after row."""
        for number, label in enumerate(labels):
            row = logits[number * self._classes : (number + 1) * self._classes]
            largest = max(row)
            self._support[label] += 1
            self._right[label] += row.index(largest) == label if largest == largest else 0
            self._loss += _log_sum(row, largest) - row[label]

    def scores(self) -> Scores:
        """What was added so far. Raises InputError where that is nothing."""
        images = sum(self._support)
        if not images:
            raise InputError("there is no image to evaluate on")
        recalls = [right / there for right, there in zip(self._right, self._support, strict=True) if there]
        return Scores(
            top1=sum(self._right) / images,
            balanced_accuracy=sum(recalls) / len(recalls),
            images=images,
            loss=self._loss / images,
            majority_share=max(self._support) / images,
        )


def probabilities(row: Sequence[float]) -> list[float]:
    """Softmax of one image's logits. Raises NotFiniteError where one of them is NaN or infinite."""
    shift = _log_sum(row, max(row))
    if not math.isfinite(shift):
        raise NotFiniteError(BROKEN)
    return [math.exp(value - shift) for value in row]


def _log_sum(row: Sequence[float], largest: float) -> float:
    """log(sum(exp(row))); NaN where a logit is not finite."""
    if not all(map(math.isfinite, row)):
        return math.nan
    return largest + math.log(math.fsum([math.exp(value - largest) for value in row]))
