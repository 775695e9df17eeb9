"""The pictures of a search, pixel by pixel where it matters, and what its time went to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinytl.errors import RunError
from tinytl.report import markdown
from tinytl.search.drawing import LITE, TRAINED, BlockRow, LiteRow, draw_network
from tinytl.search.pictures import BLUE, GREEN, ORANGE, Point, draw_front, draw_predicted
from tinytl.search.profile import COLUMNS, PHASES, Stopwatch


def pixels(path: Path, colour: str) -> int:
    """How many pixels are of this colour, within a little."""
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    with Image.open(path) as image:
        return int((np.abs(np.asarray(image.convert("RGB")).astype(int) - rgb).max(2) <= 3).sum())


FRONT: dict[str, Any] = {
    "pairs": [Point(m * 1e6, 0.5 + 0.004 * m) for m in range(10, 60, 3)],
    "front": [Point(m * 1e6, 0.6 + 0.004 * m) for m in range(10, 45, 5)],
    "finalists": [Point(38e6, 0.74), Point(40e6, 0.77)],
    "winner": Point(40e6, 0.77),
    "default": Point(37e6, 0.7),
    "budget_bytes": 45e6,
}


def test_the_front_shows_each_of_its_parts(tmp_path: Path) -> None:
    path = draw_front(tmp_path / "front.png", **FRONT, title="a space, 45 MB")
    assert path == tmp_path / "front.png"
    for colour in (BLUE, ORANGE, GREEN):
        assert pixels(path, colour) > 50
    bare = {**FRONT, "pairs": [], "finalists": [], "default": None}
    fewer = draw_front(tmp_path / "bare.png", **bare)
    assert pixels(fewer, GREEN) == 0
    assert pixels(fewer, BLUE) > 50
    with pytest.raises(ValueError, match="no front"):
        draw_front(tmp_path / "none.png", **{**FRONT, "front": []})
    with pytest.raises(RunError, match="cannot write"):
        draw_front(tmp_path / "no" / "front.png", **FRONT)


def test_equal_searches_are_equal_pictures(tmp_path: Path) -> None:
    one, same, other = (
        draw_front(tmp_path / f"{at}.png", **{**FRONT, "winner": Point(m, 0.77)}).read_bytes()
        for at, m in enumerate((40e6, 40e6, 35e6))
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("measured", [[0.5, 0.6, 0.7], [0.5, 0.5, 0.5], [0.4]])
def test_predicted_against_measured(tmp_path: Path, measured: list[float]) -> None:
    path = draw_predicted(tmp_path / "p.png", predicted=[0.52, 0.58, 0.71][: len(measured)], measured=measured)
    with Image.open(path) as image:
        assert image.size == (780, 750)
    with pytest.raises(ValueError, match="no predictions"):
        draw_predicted(tmp_path / "none.png", predicted=[], measured=[])


def test_a_network_shows_what_was_chosen(tmp_path: Path) -> None:
    block = BlockRow("1", True, 16, 24, 2, 40, bias=True, kernel=5, expand=6, lite=LiteRow(5, 2, 50, 8))
    first = replace(block, name="0", bias=False, lite=None, kernel=None, expand=None)
    both = draw_network(tmp_path / "a.png", [first, block], resolution=80, title="the winner")
    legend = draw_network(tmp_path / "b.png", [first, replace(block, bias=False, lite=None)], resolution=80)
    for colour in (LITE, TRAINED):
        assert pixels(both, colour) > 1.5 * pixels(legend, colour) > 0
    gone = draw_network(tmp_path / "c.png", [first, replace(block, kept=False)], resolution=80)
    assert pixels(gone, LITE) == pixels(legend, LITE)
    with pytest.raises(ValueError, match="no blocks"):
        draw_network(tmp_path / "d.png", [], resolution=80)


class Clock:
    """Tells the seconds that it was given."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_every_second_counts_once(clock: Clock) -> None:
    watch = Stopwatch(clock)
    clock.now = 1
    with watch.phase("evolve"):
        clock.now = 3
        with watch.phase("plan"):
            clock.now = 7
        with watch.phase("predict"):
            clock.now = 8
        clock.now = 10
    with watch.phase("measure"):
        clock.now = 40
    assert watch.seconds == {"fine-tune": 0, "measure": 30, "plan": 4, "predict": 1, "evolve": 4, "other": 1}
    assert watch.evaluation_share == 0.75
    watch.stop()
    clock.now = 100
    assert sum(watch.seconds.values()) == 40


def test_a_phase_ends_with_what_was_raised_in_it(clock: Clock) -> None:
    watch = Stopwatch(clock)

    def fail() -> None:
        with watch.phase("plan"):
            clock.now = 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now = 5
    assert (watch.seconds["plan"], watch.seconds["other"]) == (2, 3)
    with pytest.raises(ValueError, match="unknown phase 'cook'"), watch.phase("cook"):
        pass


def test_time_goes_on_where_a_search_was_killed(clock: Clock) -> None:
    watch = Stopwatch(clock)
    with watch.phase("fine-tune"):
        clock.now = 5
        saved = json.dumps(watch.to_json())  # within a phase, as a search is killed
    clock.now = 1000
    rest = Stopwatch.from_json(json.loads(saved), clock)
    with rest.phase("fine-tune"):
        clock.now = 1002
    assert rest.seconds == {**dict.fromkeys(PHASES, 0.0), "fine-tune": 7.0}
    text = markdown(rest.rows(), COLUMNS)
    assert "| fine-tuning the super-network | 7.0 s | 100.0 % |" in text
    assert Stopwatch(clock).evaluation_share == 0.0
    assert "–" in markdown(Stopwatch(clock).rows(), COLUMNS)
