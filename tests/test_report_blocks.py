"""A described step by part of the network and by role: sums that must come out, what runs again, what is printed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.small_run import entry
from tinytl.backbones import BACKBONES
from tinytl.errors import RunError
from tinytl.memory import StepDescription, StepSpec, adam, capture_step
from tinytl.memory.by_block import UPDATE, by_part, operations_run_again, owners_at, part_of
from tinytl.memory.by_role import COLOURS, STACK, live_by_role, skyline
from tinytl.memory.description import Operation, Storage
from tinytl.memory.step import build_network
from tinytl.memory.timeline import draw_planned, phases
from tinytl.report import print_blocks
from tinytl.report.blocks import role_bar

from .command_line import tinytl

# a weight (0) and an image (1), two layers: a keeps 20 bytes, b works with 60 and 5 inside; then backward, then update
BY_HAND = StepDescription(
    operations=(
        Operation("conv", "forward", "stage.a.conv", (0, 1), (2,), 0),
        Operation("conv", "forward", "stage.b.conv", (2,), (3,), 5),
        Operation("back", "backward", "stage.a.conv", (2,), (4,), 0),
        Operation("step", "update", "", (4, 0), (), 7),
    ),
    storages=(
        Storage(100, "weight", "stage.a.conv", -1, None),
        Storage(10, "input", "", -1, None),
        Storage(20, "kept", "stage.a.conv", 0, 3),
        Storage(60, "working", "stage.b.conv", 1, 2),
        Storage(8, "gradient", "stage.a.conv", 2, None),
    ),
)


def captured(
    norm: str, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None = None
) -> tuple[StepDescription, tuple[str, ...]]:
    monkeypatch.setitem(BACKBONES, "small", entry())
    spec = StepSpec("small", "tinytl-l+b", norm=norm, resolution=32, batch_size=4, micro_batch=micro_batch, classes=3)  # type: ignore[arg-type]
    model, adaptation = build_network(spec)
    step = capture_step(model, spec.shape(4), micro_batch=micro_batch, optimizer=adam)
    return step, adaptation.blocks


def test_by_hand() -> None:
    a, b, update = by_part(BY_HAND, ["stage.a", "stage.b"])
    assert (a.path, a.kept_bytes, a.working_bytes, a.peak_bytes, a.operations) == ("stage.a", 20, 0, 138, 2)
    assert (b.path, b.kept_bytes, b.working_bytes, b.peak_bytes, b.operations) == ("stage.b", 0, 65, 195, 1)
    assert (update.path, update.working_bytes, update.peak_bytes) == (UPDATE, 7, 125)
    owners = [(owner.layer, owner.role, owner.bytes) for owner in owners_at(BY_HAND, 1)]
    assert owners == [
        ("stage.a.conv", "weight", 100),
        ("stage.b.conv", "working", 60),
        ("stage.a.conv", "kept", 20),
        ("", "input", 10),
        ("stage.b.conv", "workspace", 5),
    ]
    assert phases(BY_HAND) == [("forward", 0, 2), ("backward", 2, 3), ("update", 3, 4)]


def test_the_part_of_a_path() -> None:
    blocks = ["features.block1", "features.block10"]
    assert part_of("features.block1.lite.conv1", blocks) == "features.block1"
    assert part_of("features.block10", blocks) == "features.block10"
    assert part_of("features.stem.conv", blocks) == "features.stem"
    assert part_of("classifier", blocks) == "classifier"
    assert part_of("", blocks) == ""
    assert part_of("layers.0.conv", []) == "layers"


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_every_byte_has_a_role_an_owner_and_a_part(
    norm: str, micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, blocks = captured(norm, monkeypatch, micro_batch)
    live = live_by_role(step)
    assert tuple(live) == STACK == tuple(COLOURS)
    np.testing.assert_array_equal(sum(live.values()), step.live_bytes)
    peak = int(step.live_bytes.argmax())
    assert {role: int(values[peak]) for role, values in live.items()} == step.at_peak()
    for number in (0, peak, len(step.operations) - 1):
        assert sum(owner.bytes for owner in owners_at(step, number)) == step.live_bytes[number]
    parts = by_part(step, blocks)
    assert max(part.peak_bytes for part in parts) == step.peak_bytes
    assert sum(part.operations for part in parts) == len(step.operations)
    assert [part.path for part in parts if part.path in blocks] == list(blocks)
    assert sum(part.kept_bytes for part in parts) >= live["kept"].max()


def test_group_norm_runs_again_and_batch_norm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of the chains (tinytl.ops.chain), seen from outside: a chain with group norm keeps its input only."""
    step, blocks = captured("bn", monkeypatch)
    assert not operations_run_again(step)
    step, blocks = captured("gn", monkeypatch)
    again = operations_run_again(step)
    assert {step.operations[number].name for number in again} >= {"aten.convolution.default"}
    assert all(step.operations[number].phase == "backward" for number in again)
    assert all(part.run_again for part in by_part(step, blocks) if part.path in blocks)


@pytest.mark.parametrize("most", [1, 3, 50, 10**6])
def test_the_skyline_holds_the_peak(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = captured("bn", monkeypatch)
    shown = skyline(step, most)
    assert len(shown) == min(most, len(step.operations))
    assert shown == sorted(set(shown))
    assert int(step.live_bytes.argmax()) in shown
    assert skyline(BY_HAND, 2) == [1, 2]


def test_the_planned_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = captured("gn", monkeypatch)
    path = draw_planned(step, tmp_path / "planned.png", title="a step")
    with Image.open(path) as picture:
        colours = {f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b) in picture.convert("RGB").getcolors(1 << 24) or []}  # type: ignore[misc]
    assert {COLOURS[role] for role in ("weight", "optimizer state", "gradient", "kept", "working")} <= colours
    with pytest.raises(ValueError, match="no operations"):
        draw_planned(StepDescription((), ()), tmp_path / "none.png")
    with pytest.raises(RunError, match="cannot write"):
        draw_planned(step, tmp_path / "nowhere" / "planned.png")


def test_the_bar_is_as_wide_as_it_should_be() -> None:
    bar, legend = role_bar(BY_HAND.at_peak(), 40)
    assert bar.plain == "█" * 40
    assert legend.plain.count("■") == 5
    assert "weight 0.00 MB" in legend.plain


def test_the_terminal_names_the_peak_and_its_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    step, blocks = captured("bn", monkeypatch)
    console = Console(file=io.StringIO(), width=120)
    print_blocks(step, blocks, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    peak = int(step.live_bytes.argmax())
    assert f"operation {peak + 1:,} of {len(step.operations):,}" in printed
    assert all(f" {block} " in printed for block in blocks)
    assert owners_at(step, peak)[0].layer in printed


def test_profile_shows_blocks_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "small", entry())
    few = [
        "--backbone",
        "small",
        "--resolution",
        "32",
        "--batch-size",
        "2",
        "--classes",
        "3",
        "--repeats",
        "0",
        "--no-rss",
    ]
    done = tinytl("profile", *few, "--blocks", "--picture", tmp_path / "step.png")
    assert done.status == 0, done.err
    assert "largest owners there" in done.out
    assert (tmp_path / "step.png").exists()
    assert "cannot write" in tinytl("profile", *few, "--picture", tmp_path / "nowhere" / "step.png").line
