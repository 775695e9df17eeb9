"""What the search's benchmark compares the winner with: random networks of its planned memory."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks import search_page
from benchmarks.search import NEAR, random_like
from tinytl.search.planned import Conditions, cost_of
from tinytl.search.records import key_of
from tinytl.search.space import Choice, make_space

SPACE = make_space("mcunet_5fps", (48, 64))


def planned(choice: Choice) -> int:
    return cost_of(choice, Conditions(7)).memory_bytes


def test_they_are_as_large_as_what_they_are_compared_with_and_fit() -> None:
    target, budget = 4_000_000, 4_200_000
    found = random_like(SPACE, planned, target, budget, seed=1)
    assert len({choice for choice, _ in found}) == 3
    for choice, memory in found:
        assert memory == planned(choice)
        assert abs(memory - target) <= NEAR * target
        assert memory <= budget
    assert found == random_like(SPACE, planned, target, budget, seed=1)
    assert found != random_like(SPACE, planned, target, budget, seed=2)


def test_none_is_taken_twice_nor_what_is_compared() -> None:
    asked: Counter[Choice] = Counter()

    def counted(choice: Choice) -> int:
        asked[choice] += 1
        return 100

    first = random_like(SPACE, counted, 100, 100, seed=0, count=20, draws=300)
    assert len({choice for choice, _ in first}) == 20
    assert max(asked.values()) == 1
    genome = key_of(SPACE.sample(np.random.default_rng((0, 9))))  # the first that is drawn
    others = random_like(SPACE, counted, 100, 100, seed=0, leave_out={genome}, count=19)
    assert others == first[1:]


def test_too_few_are_told() -> None:
    with pytest.raises(
        ValueError, match=r"7 random networks, and 0 of them within 10% of 50 planned bytes .* takes 9$"
    ):
        random_like(SPACE, lambda choice: 9, 50, 100, seed=0, draws=7)
    with pytest.raises(ValueError, match="within the budget of 99"):
        random_like(SPACE, lambda choice: 100, 100, 99, seed=0, draws=7)


def test_the_page_has_a_row_for_each_budget_and_says_what_is_random() -> None:
    trained = [{"kind": kind, "top1": 0.5, "planned_bytes": 9} for kind in ("winner", "default", "random")]
    cells = [{"data": "x", "budget_bytes": budget, "random_near": 0.1, "trained": trained} for budget in (10, 10, 20)]
    rows = search_page.rows_of({"cells": cells})
    assert [row["budget"] for row in rows] == [10] * 3 + [20] * 3
    assert rows[2]["kind"] == "median of random ones of the winner's planned memory, within 10 %"
