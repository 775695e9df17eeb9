"""When a run is saved, in what order with its log, and that no bit of what is saved can flip unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.test_checkpoint import SETTINGS, FakeAdaptation
from tests.test_engine import FakeLoader, bits, one_thread, small_model
from tinytl._interrupt import Stop
from tinytl._keeper import Keeper
from tinytl.checkpoint import Boundary, Checkpointer
from tinytl.engine import FitOptions, fit
from tinytl.errors import RunError
from tinytl.spec import RunOptions

__all__ = ["one_thread"]  # a fixture for this module too


def checkpointer_of(folder: Path, model: nn.Module) -> Checkpointer:
    return Checkpointer(folder / "checkpoint.safetensors", model, FakeAdaptation(), SETTINGS)


def saves(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: float | None) -> list[tuple[int, bool]]:
    """(step, whether at an epoch's end) of each save in two epochs of three steps, which take 10 seconds each."""
    clock, seen = [0.0], []
    monkeypatch.setattr("tinytl._keeper.time.monotonic", lambda: clock[0])
    model = small_model()
    checkpointer = checkpointer_of(folder, model)
    save = checkpointer.save

    def note(at: Boundary) -> None:
        assert seen[-1] == "sync"  # the log is on the disk before its steps count as done
        seen[-1] = (at.progress.step, at.epoch_end)
        save(at)

    def tick(info: object) -> None:
        keeper.moved(info)
        clock[0] += 10.0

    monkeypatch.setattr(checkpointer, "save", note)
    run = RunOptions(**options)  # pyright: ignore[reportArgumentType]
    keeper = Keeper(checkpointer, run, Stop(), lambda: seen.append("sync"))
    fit(model, FakeLoader(), None, FitOptions(epochs=2), on_step=tick, on_boundary=keeper.boundary)
    assert not keeper.keep()
    return seen


def test_intervals_in_steps_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [(3, True), (6, True)]
    assert saves(tmp_path, monkeypatch, checkpoint_seconds=None) == ends
    assert saves(tmp_path, monkeypatch, checkpoint_seconds=1000.0) == ends
    assert saves(tmp_path, monkeypatch, checkpoint_seconds=None, checkpoint_steps=2) == sorted(
        [*ends, (2, False), (4, False), (6, False)]
    )
    # the seconds count from the last save, the epoch's end among them
    assert saves(tmp_path, monkeypatch, checkpoint_seconds=20.0) == sorted([*ends, (2, False), (5, False)])
    assert len(saves(tmp_path, monkeypatch, checkpoint_seconds=1e-9)) == 8


def test_between_a_step_and_its_boundary_there_is_nothing_to_save(tmp_path: Path) -> None:
    model = small_model()
    checkpointer = checkpointer_of(tmp_path, model)
    keeper = Keeper(checkpointer, RunOptions(checkpoint_seconds=None), Stop(), lambda: None)
    states: list[dict[str, bytes]] = []

    def step(info) -> None:
        keeper.moved(info)
        if info.step == 2:  # the model has moved on; the last boundary's progress would be a lie
            assert not keeper.keep()
            raise RunError("the log cannot be written")
        states.append(bits(model))

    with pytest.raises(RunError, match="the log"):
        fit(model, FakeLoader(), None, FitOptions(epochs=1), on_step=step, on_boundary=keeper.boundary)
    assert not keeper.keep()
    assert not checkpointer.path.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A folder, and the newest checkpoint and the one before as bytes (steps 3 and 2)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("saved")
    model = small_model()
    checkpointer = checkpointer_of(folder, model)

    def save(at: Boundary) -> None:
        if not at.epoch_end:
            checkpointer.save(at)

    fit(model, FakeLoader(), None, FitOptions(epochs=1), on_boundary=save)
    newest, before = checkpointer.path.read_bytes(), checkpointer.previous.read_bytes()
    checkpointer.path.unlink()
    checkpointer.previous.unlink()
    return folder, newest, before


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_bit_flips_and_wherever_it_is_torn_the_one_before_is_used(
    saved: tuple[Path, bytes, bytes], data: st.DataObject
) -> None:
    folder, newest, before = saved
    model = small_model()
    checkpointer = checkpointer_of(folder, model)
    damaged = bytearray(newest)
    if data.draw(st.booleans(), "torn"):
        del damaged[data.draw(st.integers(0, len(newest) - 1), "length") :]
    else:
        for _ in range(data.draw(st.integers(1, 3), "flips")):
            damaged[data.draw(st.integers(0, len(newest) - 1), "at")] ^= 1 << data.draw(st.integers(0, 7), "bit")
    if bytes(damaged) == newest:  # the same bit twice
        return
    checkpointer.path.write_bytes(damaged)
    checkpointer.previous.write_bytes(before)
    resume = checkpointer.load()
    assert resume is not None
    assert resume.progress.step == 2
    assert checkpointer.notice is not None
    assert "going on from the checkpoint before it, at step 2" in checkpointer.notice
    checkpointer.previous.write_bytes(damaged)
    unchanged = bits(model)
    with pytest.raises(RunError, match="no checkpoint can be used") as caught:
        checkpointer.load()
    assert "\n" not in str(caught.value)
    assert bits(model) == unchanged
