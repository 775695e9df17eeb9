"""What is measured of each contender: bytes and time in one process, in turns; the resident set in processes apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.turns import ratios
from tinytl.memory import measure_step, resident_tensors
from tinytl.memory.profile import LAYOUTS, Candidate, in_turns

from .contenders import BASELINE, CONTENDERS, Contender, Missing
from .rss import growth
from .step import Setting

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """A contender that took its first step in one layout."""

    key: str
    candidate: Candidate
    trained_elements: int
    first_seconds: float
    gradient_error: float
    whole_gradient_error: float


def compare(
    setting: Setting,
    keys: Iterable[str],
    *,
    turns: int,
    rss: bool = True,
    skip: Collection[str] = (),
    say: Callable[[str], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row for each contender of `CONTENDERS` that is named; the first has to be the one that ratios are taken of.

    Those of `skip` are not run, and told as missing.

    Keys of a row: `key`, `label`, `side`, `trains`, `approximate`, and either `missing` (why it did not run) or
    `peak_bytes`, `step_peak_bytes`, `resident_bytes`, `bytes_layout` (the layout of the lowest peak),
    `rss_first_bytes`, `rss_bytes` (None where not asked for, or not told by the system), `trained_elements`,
    `first_seconds` (the first forward and backward pass, compiling included), `seconds`, `layout` (the fastest),
    `ratio`, `ratio_low`, `ratio_high` (all None without turns), `gradient_error` and `whole_gradient_error` (the larger
    of the layouts').
    """
    keys = list(keys)
    references: dict[Any, Gradients] = {}
    entries: list[Entry] = []
    missing: dict[str, str] = {}
    for key in keys:
        if key in skip:
            missing[key] = "Left out of this run (--skip)"
            continue
        try:
            entries += [_take_first_step(key, layout, setting, references) for layout in CONTENDERS[key].layouts]
        except Missing as reason:
            missing[key] = str(reason)
        say(f"{key}: {missing.get(key, 'ready')}")
    seconds = in_turns([entry.candidate for entry in entries], turns)
    times = [(entry, found) for entry, found in zip(entries, seconds, strict=True)]
    best = _fastest(times, BASELINE)[1] if turns else []
    rows = []
    for key in keys:
        row = _told(key)
        if key in missing:
            rows.append({**row, "missing": missing[key]})
            continue
        mine = [entry for entry in entries if entry.key == key]
        lowest = min(mine, key=lambda entry: entry.candidate.measured.step_peak_bytes)
        measured = lowest.candidate.measured
        found: dict[str, Any] = dict.fromkeys(("seconds", "layout", "ratio", "ratio_low", "ratio_high"))
        if turns:
            fastest, taken = _fastest(times, key)
            found = {"seconds": statistics.median(taken), "layout": fastest.candidate.name, **ratios(taken, best)}
        grown = growth(key, setting, lowest.candidate.name) if rss else None
        rows.append(
            {
                **row,
                "peak_bytes": measured.peak_bytes,
                "step_peak_bytes": measured.step_peak_bytes,
                "resident_bytes": measured.resident_bytes,
                "bytes_layout": lowest.candidate.name,
                "rss_first_bytes": None if grown is None else grown["first_bytes"],
                "rss_bytes": None if grown is None else grown["later_bytes"],
                "trained_elements": lowest.trained_elements,
                "first_seconds": max(entry.first_seconds for entry in mine),
                **found,
                "gradient_error": max(entry.gradient_error for entry in mine),
                "whole_gradient_error": max(entry.whole_gradient_error for entry in mine),
            }
        )
        say(f"{key}: {rows[-1]['peak_bytes'] / 1e6:.1f} MB")
    return rows


def _told(key: str) -> dict[str, Any]:
    contender = CONTENDERS[key]
    names = ("label", "side", "trains", "approximate")
    return {"key": key, **{name: getattr(contender, name) for name in names}}


def _fastest(times: list[tuple[Entry, list[float]]], key: str) -> tuple[Entry, list[float]]:
    return min((pair for pair in times if pair[0].key == key), key=lambda pair: statistics.median(pair[1]))


def _take_first_step(key: str, layout: str, setting: Setting, references: dict[Any, Gradients]) -> Entry:
    contender = CONTENDERS[key]
    ready = contender.build(setting, LAYOUTS[layout])
    start = time.perf_counter()
    gradients = ready.gradients()
    first_seconds = time.perf_counter() - start
    if contender.reference not in references:
        references[contender.reference] = exact_gradients(contender, setting)
    worst, whole = gradient_errors(gradients, references[contender.reference])
    del gradients
    step = ready.step()
    step()  # so that the optimizer's state is there
    resident = resident_tensors(ready.model, ready.optimizer, ready.images, ready.labels)
    candidate = Candidate(layout, step, measure_step(step, resident))
    trained_elements = sum(parameter.numel() for parameter in ready.trained.values())
    return Entry(key, candidate, trained_elements, first_seconds, worst, whole)


def exact_gradients(contender: Contender, setting: Setting) -> dict[str, Tensor]:
    """The gradients of stock autograd in float64, of the same parametrization at the same weights."""
    return contender.reference(replace(setting, double=True), torch.contiguous_format).gradients()


def gradient_errors(found: Gradients, exact: Gradients) -> tuple[float, float]:
    """How far gradients are from the exact ones, as two relative errors.

    The first is the worst over the tensors of the largest difference over the largest exact value; infinite where an
    exact gradient is 0 and the other is not. The second takes all tensors as one vector: length of the difference over
    length of the exact one. A ReLU whose input is so near 0 that rounding turns it moves a small tensor by far more
    than rounding does, and the whole hardly.

    Raises ValueError when not the same tensors have gradients.
    """
    if found.keys() != exact.keys():
        raise ValueError(f"gradients of other tensors: {sorted(found.keys() ^ exact.keys())[:4]}")
    off = {name: found[name].double() - reference for name, reference in exact.items()}
    worst = max(_over(off[name].abs().max(), reference.abs().max()) for name, reference in exact.items())
    return worst, _over(_length(off.values()), _length(exact.values()))


def _length(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def _over(error: Tensor, size: Tensor) -> float:
    return (error / size).item() if error.item() else 0.0
