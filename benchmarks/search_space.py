"""The paper's setting, counted and planned: sub-networks of its once-for-all space at 256 and 352 px."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

from tinytl.backbones import find
from tinytl.memory.counted import count
from tinytl.methods import adapt_, method
from tinytl.search.planned import Conditions, cost_of
from tinytl.search.space import Choice, make_space

SPACE = "ofa_proxyless_d234_e346_k357_w1.3"
PUBLISHED = {256: 66e6, 352: 114e6}
"""Counted bytes at batch 8 of the networks that the paper chose, which it does not name (PAPER.md, table 3)."""
CLASSES, BATCH, NETWORKS = 102, 8, 15


def counted_bytes(choice: Choice) -> int:
    """By the paper's rule, at batch 8 with the Flowers head."""
    with torch.device("meta"):
        model = find(choice.backbone).build(num_classes=CLASSES).eval()
    model.to_empty(device="cpu")  # what is hashed on the way must be there; its values count for nothing
    adapt_(model, method(choice.method), resolution=choice.resolution, lean=False)
    return count(model, (BATCH, 3, choice.resolution, choice.resolution)).total_bytes


def paper_setting() -> list[dict[str, Any]]:
    """For each of the paper's resolutions: smallest, median and largest of the space, counted and planned."""
    found = []
    for resolution, published in PUBLISHED.items():
        space = make_space(SPACE, (resolution,))
        rng = np.random.default_rng(0)
        full = space.split(space.default(0))
        networks = [space.joined(0, space.architecture.sample(rng), full[2], full[3]) for _ in range(NETWORKS)]
        ends = [space.joined(0, end, full[2], full[3]) for end in (space.architecture.smallest(), full[1])]
        rows = []
        for genome in [*ends, *networks]:
            choice = space.choice(genome)
            planned = cost_of(choice, Conditions(CLASSES, batch_size=BATCH, frozen_bits=8)).memory_bytes
            rows.append((counted_bytes(choice), planned))
        found.append(
            {
                "resolution": resolution,
                "published_bytes": published,
                "counted": [rows[0][0], statistics.median(row[0] for row in rows[2:]), rows[1][0]],
                "planned": [rows[0][1], statistics.median(row[1] for row in rows[2:]), rows[1][1]],
                "networks": NETWORKS,
            }
        )
    return found
