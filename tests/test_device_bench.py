"""`tinytl bench device`: the promised keys, and figures that agree with one another."""

from __future__ import annotations

import json

import pytest

from tinytl._device_bench import DeviceRow, device_rows
from tinytl.cli import main
from tinytl.errors import InputError
from tinytl.memory import StepSpec

from .native import needs_executor

SMALL = StepSpec("mcunet_5fps", "tinytl-b", resolution=64, classes=3, batch_size=2, threads=1)
KEYS = {
    *("method", "norm", "optimizer_bits", "frozen_bits", "threads", "peak_rss_bytes", "arena_planned_bytes"),
    *("arena_used_bytes", "step_seconds", "stock_step_seconds", "stock_full_step_seconds", "stock_peak_rss_bytes"),
    "gemm_peak_share",
}
"""As issue 5 names them."""


@needs_executor
@pytest.mark.slow
def test_a_row_has_the_promised_keys_and_adds_up() -> None:
    (row,) = device_rows(SMALL, [DeviceRow("tinytl-l+b", optimizer_bits=8)], turns=2)
    assert row.keys() >= KEYS
    assert row["arena_planned_bytes"] == row["arena_used_bytes"]
    assert row["arena_planned_bytes"] < row["peak_rss_bytes"] < row["python_peak_rss_bytes"]
    assert row["python_peak_rss_bytes"] < row["stock_peak_rss_bytes"]
    assert row["multiply_adds"] == sum(entry.get("multiply_adds", 0) for entry in row["by_op"].values())
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["gemm_peak_share"] == pytest.approx(row["multiply_adds"] / row["step_seconds"] / row["gemm_peak"])


def test_one_turn_is_refused() -> None:
    with pytest.raises(InputError, match="turns is 1: expected 2 or more"):
        device_rows(SMALL, turns=1)


@needs_executor
@pytest.mark.slow
def test_the_command_prints_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--backbone efficientnet_lite0 --resolution 64 --classes 3 --batch-size 2 --threads 1"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "device", *small.split(), "--turns", "2", "--no-stock", "--json"])
    assert ended.value.code in (0, None)
    rows = json.loads(capsys.readouterr().out)
    assert [row["stock_step_seconds"] for row in rows] == [None] * len(rows)
