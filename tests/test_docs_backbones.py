"""docs/backbones.md says what the code does."""

from __future__ import annotations

import pytest

from tinytl.backbones import BACKBONES
from tinytl.nn.lite_residual import lite_width

from .backbone_tables import PAGE, placement, written


def test_the_tables_are_those_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "run python -m tests.backbone_tables"
    assert all(f"| `{name}` |" in page for name in BACKBONES)


def test_a_place_without_a_table_is_seen() -> None:
    with pytest.raises(AssertionError, match="0 places"):
        written("no markers")


def test_the_modules_beside_wide_blocks_stay_lighter_than_the_network() -> None:
    [line] = [line for line in placement().splitlines() if "`resnet50`" in line]
    parameters = int(line.split("|")[-2].replace(",", ""))
    assert parameters < BACKBONES["resnet50"].complexity().parameters
    # the published networks keep the paper's width, so their published keys load
    assert [lite_width(channels) for channels in (16, 24, 192, 208, 256)] == [
        (16, 2),
        (24, 2),
        (192, 2),
        (208, 2),
        (256, 2),
    ]
    assert lite_width(1024, groups=4) == (256, 8)
    assert lite_width(330) == (256, 2)  # 4 groups do not divide it
