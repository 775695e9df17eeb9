"""Images a second, end to end, beside a plain PyTorch loop: `python -m benchmarks.throughput`.

Both sides read the same photographs from disk, decode and augment them by the same transform, train the same method on
the same network with the same batch and optimizer, and use the same two decoding workers. The plain side is what one
writes by hand: `torch.utils.data.DataLoader`, stock layers, cross entropy, backward, step. Ours is the step of
`tinytl.fit`, without and with a cache that holds all photographs. A turn is so many steps of each side, one side after
the other, the first steps of each not timed; reported is the median ratio and the quartiles over the turns. Evaluation
is compared in the same way: `tinytl.evaluate` beside stock inference in a plain loop, and both networks alone on images
in memory.
Writes benchmarks/results/throughput.json and docs/benchmarks/throughput.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tinytl.backbones import BACKBONES
from tinytl.data import EvalTransform, Loader, PhotoCache, PhotoSet, TrainTransform, resolve
from tinytl.data.decode import open_photo
from tinytl.data.transforms import Transform, sample_rng
from tinytl.engine import FitOptions
from tinytl.engine.fitting import train_step
from tinytl.engine.optimizer import make_optimizer
from tinytl.memory import StepSpec
from tinytl.memory.step import build_network
from tinytl.report import Column, markdown

from .machine import describe, sentence
from .turns import ratio_columns, ratios

RESULTS, PAGE = Path("benchmarks/results/throughput.json"), Path("docs/benchmarks/throughput.md")
BATCH, WORKERS, WARM_UP = 8, 2, 3
CASES = (
    ("efficientnet_lite0", "tinytl-l+b", 128),
    ("efficientnet_lite0", "tinytl-l+b", 224),
    ("mobilenet_v2", "tinytl-l+b", 224),
    ("mcunet_5fps", "tinytl-l+b", 128),
)
OPTIONS = FitOptions(lr=1e-4)


class Photographs(Dataset[tuple[torch.Tensor, int]]):
    """The plain side's data set: decode, augment, one tensor a photograph."""

    def __init__(self, photos: PhotoSet, transform: Transform) -> None:
        self.photos, self.transform = photos, transform

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.photos.items[index]
        with open_photo(path) as photo:
            return torch.from_numpy(self.transform(photo, sample_rng(0, 0, index))), label


def plain_loop(model: nn.Module, photos: PhotoSet, transform: Transform) -> Iterator[int]:
    """What one writes by hand; yields the number of images after each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loader = DataLoader(Photographs(photos, transform), BATCH, shuffle=True, num_workers=WORKERS)
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        yield len(labels)


def our_loop(model: nn.Module, photos: PhotoSet, transform: Transform, cache: PhotoCache | None) -> Iterator[int]:
    """The steps of `tinytl.fit`, one at a time."""
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], OPTIONS)
    loader = Loader(photos, transform, BATCH, shuffle=True, workers=WORKERS, cache=cache)
    with contextlib.closing(loader.epoch(0)) as batches:
        for batch in batches:
            train_step(model, optimizer, batch, 1e-4, OPTIONS)
            yield len(batch)


def plain_evaluation(model: nn.Module, photos: PhotoSet, transform: Transform) -> Iterator[int]:
    """Stock inference in a plain loop."""
    loader = DataLoader(Photographs(photos, transform), BATCH, num_workers=WORKERS)
    for images, _ in loader:
        with torch.inference_mode():
            model(images).argmax(1)
        yield len(images)


def our_evaluation(model: nn.Module, photos: PhotoSet, transform: Transform) -> Iterator[int]:
    """The batches of `tinytl.evaluate`, one at a time."""
    loader = Loader(photos, transform, BATCH, shuffle=False, workers=WORKERS)
    with contextlib.closing(loader.epoch(0)) as batches:
        for batch in batches:
            with torch.inference_mode():
                model(batch.normalized()).argmax(1)
            yield len(batch)


def alone(model: nn.Module, resolution: int) -> Iterator[int]:
    """The network on images that are in memory already."""
    images = torch.randn(BATCH, 3, resolution, resolution)
    while True:
        with torch.inference_mode():
            model(images)
        yield BATCH


def speed(loop: Iterator[int], steps: int) -> float:
    """Images a second over `steps` steps after the warm-up."""
    for _ in itertools.islice(loop, WARM_UP):
        pass
    start = time.perf_counter()
    images = sum(itertools.islice(loop, steps))
    seconds = time.perf_counter() - start
    close = getattr(loop, "close", None)
    if close is not None:
        close()
    return images / seconds


def in_turns(sides: dict[str, Callable[[], Iterator[int]]], turns: int, steps: int) -> dict[str, list[float]]:
    """Images a second of each side in each turn, after one turn that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, loop in sides.items():
            value = speed(loop(), steps)
            if turn:
                found[name].append(value)
    return found


def compare(found: dict[str, list[float]], ours: str, plain: tuple[str, ...]) -> dict[str, float]:
    """Median and quartiles of ours over the faster of the plain ones, turn by turn."""
    best = max(plain, key=lambda name: statistics.median(found[name]))
    return {
        "ours": statistics.median(found[ours]),
        "plain": statistics.median(found[best]),
        **ratios(found[ours], found[best]),
    }


def rows(turns: int, steps: int) -> list[dict[str, Any]]:
    """Every case: training, training with the cache, evaluation, inference alone."""
    photos = resolve("elpv")
    found = []
    for backbone, name, resolution in CASES:
        p = BACKBONES[backbone].preprocessing
        train = TrainTransform(resolution, p.mean, p.std, interpolation=p.interpolation)
        plain = EvalTransform(resolution, p.mean, p.std, p.crop_fraction, p.interpolation)
        spec = StepSpec(backbone, name, resolution=resolution, classes=len(photos.classes))
        lean = build_network(spec)[0]
        stock = build_network(replace(spec, lean=False))[0]
        last = build_network(replace(spec, lean=False))[0].to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        cache = PhotoCache(10**9)
        sides = {
            "ours": lambda lean=lean, train=train: our_loop(lean, photos, train, None),
            "cached": lambda lean=lean, train=train, cache=cache: our_loop(lean, photos, train, cache),
            "plain": lambda stock=stock, train=train: plain_loop(stock, photos, train),
            "plain, channels-last": lambda last=last, train=train: plain_loop(last, photos, train),
        }
        speeds = in_turns(sides, turns, steps)
        case = {"backbone": backbone, "method": name, "resolution": resolution}
        layouts = ("plain", "plain, channels-last")
        found.append({**case, "what": "training", **compare(speeds, "ours", layouts)})
        found.append({**case, "what": "training, cached", **compare(speeds, "cached", layouts)})
        for model in (lean, stock, last):
            model.eval()
        sides = {
            "ours": lambda lean=lean, plain=plain: our_evaluation(lean, photos, plain),
            "plain": lambda stock=stock, plain=plain: plain_evaluation(stock, photos, plain),
            "plain, channels-last": lambda last=last, plain=plain: plain_evaluation(last, photos, plain),
        }
        found.append({**case, "what": "evaluation", **compare(in_turns(sides, turns, steps), "ours", layouts)})
        sides = {
            "ours": lambda lean=lean, r=resolution: alone(lean, r),
            "plain": lambda stock=stock, r=resolution: alone(stock, r),
            "plain, channels-last": lambda last=last, r=resolution: alone(last, r),
        }
        found.append({**case, "what": "inference alone", **compare(in_turns(sides, turns, steps), "ours", layouts)})
        print(markdown(found[-4:], COLUMNS), flush=True)
    return found


COLUMNS = [
    Column("backbone", "backbone"),
    Column("method", "method"),
    Column("resolution", "px"),
    Column("what", "what"),
    Column("ours", "tinytl, images/s", "", 1),
    Column("plain", "plain PyTorch, images/s", "", 1),
    *ratio_columns("tinytl / plain"),
]


def page(results: dict[str, Any]) -> str:
    """The documentation page of the committed results."""
    return (
        "# Images a second, end to end\n\n"
        "Made by `python -m benchmarks.throughput`; do not edit. Photographs of 300 px (elpv) read from disk, batch "
        f"{BATCH}, {WORKERS} decoding workers on both sides, on {sentence(results['machine'])}. Medians over "
        f"{results['turns']} turns of {results['steps']} steps a side; ratios turn by turn, against the faster of "
        "PyTorch's two memory layouts.\n\n" + markdown(results["rows"], COLUMNS)
    )


def main() -> None:
    """Measure, write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--page-only", action="store_true", help="write the page from the committed JSON")
    options = parser.parse_args()
    if not options.page_only:
        results = {"machine": describe(), "turns": options.turns, "steps": options.steps}
        results["rows"] = rows(options.turns, options.steps)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
