"""A network's answers to photographs one by one: how good they are, and the worst mistakes with a small picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tinytl.data import PhotoSet, open_photo
from tinytl.engine import BatchSource, Evaluation, evaluate

WORST = 24  # mistakes that are shown
THUMBNAIL_PIXELS = 192  # of the longer side: sharp on a phone's screen, some 6 kB as JPEG


@dataclass(frozen=True)
class Mistake:
    """A photograph whose class is not the one answered.

    Attributes:
        name: of the file, relative to the folder of photographs.
        label: its class.
        answer: the class with the largest logit.
        probability: of the answer.
        label_probability: of its class; the loss is minus the logarithm of this.
        thumbnail: a small JPEG of it, upright.
    """

    name: str
    label: str
    answer: str
    probability: float
    label_probability: float
    thumbnail: bytes


@dataclass(frozen=True, eq=False)
class Answers:
    """What a network answered: `evaluation` of all photographs, and `mistakes`, the one with the highest loss first."""

    evaluation: Evaluation
    mistakes: tuple[Mistake, ...]


def examine(
    model: nn.Module, loader: BatchSource, photos: PhotoSet, *, micro_batch: int | None = None, worst: int = WORST
) -> Answers:
    """Evaluate `model` and look at each answer.

    Args:
        model: put into evaluation mode meanwhile.
        loader: yields `photos` in order (a `Loader` with `shuffle=False`).
        photos: what the loader reads.
        micro_batch: most images put through the model at once.
        worst: how many mistakes to return.

    Raises:
        DataError: a photograph cannot be read.
    """
    listening = _Listening(model, [label for _, label in photos.items])
    evaluation = evaluate(listening, loader, micro_batch=micro_batch)
    rows = torch.cat(listening.rows)  # (photographs, 3): answer, its probability, the label's
    labels = torch.tensor(listening.labels)
    wrong = (rows[:, 0] != labels).nonzero().flatten()
    ordered = wrong[rows[wrong, 2].argsort(stable=True)][:worst]
    mistakes = []
    for index in ordered.tolist():
        answer, probability, of_label = rows[index].tolist()
        path, label = photos.items[index]
        names = photos.classes
        mistakes.append(
            Mistake(photos.name(index), names[label], names[int(answer)], probability, of_label, thumbnail(path))
        )
    return Answers(evaluation, tuple(mistakes))


def thumbnail(path: Path, side: int = THUMBNAIL_PIXELS) -> bytes:
    """A photograph as a JPEG of at most `side` pixels a side, upright. Raises PhotoError when it cannot be read."""
    with open_photo(path) as photo:
        image = photo.reduced(max(photo.size) / (2 * side))[0]  # decoded small, and then resized well
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82, optimize=True)
    return data.getvalue()


class _Listening(nn.Module):
    """A model that notes, as images pass in the order of `labels`, what it answers; so they are looked at once."""

    def __init__(self, model: nn.Module, labels: Sequence[int]) -> None:
        super().__init__()
        self.model, self.labels = model, labels
        self.rows: list[Tensor] = []
        self._at = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)  # (n, classes)
        count = len(logits)
        labels = torch.tensor(self.labels[self._at : self._at + count])
        self._at += count
        probabilities = F.softmax(logits.double(), 1).cpu()
        best, answer = probabilities.max(1)
        self.rows.append(torch.stack([answer.double(), best, probabilities[torch.arange(count), labels]], 1))
        return logits
