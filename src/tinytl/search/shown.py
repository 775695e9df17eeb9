"""A search's result as plain data, and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tinytl.nn.lite_residual import lite_middle

from .architecture import OnceForAll
from .drawing import BlockRow, LiteRow, draw_network
from .pictures import Point, draw_front, draw_predicted
from .records import Finalist
from .space import Space

FRONT, PREDICTED, NETWORK = "front.png", "predicted.png", "winner.png"


def record(result: Any) -> dict[str, Any]:
    """A `SearchResult` as ``tinytl search --json`` prints it: bytes, fractions, seconds."""
    run = result.run
    return {
        "out": str(result.out),
        "winner": result.choice.to_json(),
        "cost": result.cost.to_json(),
        "tau": result.tau,
        "pairs": len(result.pairs),
        "front": [
            {"memory_bytes": c.planned.memory_bytes, "predicted": c.accuracy, **_named(result.space, c.genome)}
            for c in result.front
        ],
        "finalists": [_finalist(result.space, finalist) for finalist in result.finalists],
        "top1": None if run is None else run.evaluation.top1,
        "balanced_accuracy": None if run is None else run.evaluation.balanced_accuracy,
        "profile": result.profile.seconds,
        "evaluation_share": result.profile.evaluation_share,
    }


def _named(space: Space, genome: tuple[int, ...]) -> dict[str, Any]:
    return space.choice(np.array(genome)).to_json()


def _finalist(space: Space, finalist: Finalist) -> dict[str, Any]:
    return {
        **_named(space, finalist.genome),
        **finalist.cost.to_json(),
        "predicted": finalist.predicted,
        "shared_top1": finalist.shared_top1,
        "trained_top1": finalist.trained_top1,
        "step_seconds": finalist.step_seconds,
        "default": finalist.default,
    }


def draw(result: Any, budget_bytes: int) -> list[Path]:
    """Draw the three pictures of a `SearchResult` into its folder; the paths.

    Raises RunError when one cannot be written.
    """
    best, default = result.finalists[0], next((f for f in result.finalists if f.default), None)
    trained = best.trained_top1 is not None
    title = f"{result.choice.backbone.partition('@')[0]}: accuracy over planned memory"
    front = draw_front(
        result.out / FRONT,
        pairs=[Point(pair.cost.memory_bytes, pair.top1) for pair in result.pairs],
        front=[Point(c.planned.memory_bytes, c.accuracy) for c in result.front],
        finalists=[_point(finalist) for finalist in result.finalists],
        winner=_point(best),
        budget_bytes=budget_bytes,
        default=None if default is None else _point(default),
        pairs_measured="random sub-networks, in the super-network",
        finalists_measured="finalists, trained by themselves" if trained else "finalists, in the super-network",
        title=title,
    )
    measured = [pair.top1 for pair in result.pairs]
    predicted = draw_predicted(
        result.out / PREDICTED, predicted=result.unseen, measured=measured, title="sub-networks not seen in fitting"
    )
    rows = block_rows(result.space, np.array(best.genome))
    network = draw_network(
        result.out / NETWORK, rows, resolution=result.choice.resolution, title=result.choice.backbone
    )
    return [front, predicted, network]


def _point(finalist: Finalist) -> Point:
    top1 = finalist.shared_top1 if finalist.trained_top1 is None else finalist.trained_top1
    return Point(finalist.cost.memory_bytes, top1)


def block_rows(space: Space, genome: np.ndarray) -> list[BlockRow]:
    """What was chosen for each block of the full network."""
    active, lite, biases = set(space.active(genome)), space.lite(genome), set(space.biases(genome))
    pixels = -(-space.resolution(genome) // 2)  # behind the stem
    forms = _forms(space, genome)
    rows = [BlockRow("0", True, space.first[0], space.first[1], space.first[2], pixels, 0 in biases)]
    for slot, site in enumerate(space.sites, 1):
        pixels = -(-pixels // site.stride)
        module = lite.get(slot)
        middle = None if module is None else lite_middle(site.in_channels, module[1], module[2])[0]
        kernel, expand = forms.get(slot, (None, None))
        rows.append(
            BlockRow(
                str(slot),
                slot in active,
                site.in_channels,
                site.out_channels,
                site.stride,
                pixels,
                slot in biases,
                kernel,
                expand,
                None if module is None or middle is None else LiteRow(*module, middle),
            )
        )
    return rows


def _forms(space: Space, genome: np.ndarray) -> dict[int, tuple[int, float]]:
    """Slot -> (kernel, expand) where there was a choice of them."""
    if not isinstance(space.architecture, OnceForAll):
        return {}
    genes = space.split(genome)[1]
    found, active = space.architecture.architecture(genes), space.architecture.active(genes)[1:]
    return {
        slot: (kernel, float(expand)) for slot, kernel, expand in zip(active, found.kernels, found.expands, strict=True)
    }
