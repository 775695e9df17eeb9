"""Ctrl-C and SIGTERM: stopped where nothing is lost, resumed to the same bits, told by the exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tinytl._atomic import read_sealed
from tinytl._interrupt import Stop, stop_on_signals
from tinytl.backbones import BACKBONES
from tinytl.checkpoint import KIND
from tinytl.errors import Interrupted
from tinytl.run import CHECKPOINT, DELTA, METRICS, SETTINGS, Callbacks, Prepared, train
from tinytl.spec import RunOptions, TrainSpec

from . import small_run
from .photographs import make_photographs
from .small_run import left_behind

# no interval: what is saved in the middle of an epoch is saved because of the signal
OPTIONS = RunOptions(workers=1, threads=1, checkpoint_seconds=None)
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(autouse=True)
def _python_s_own_handlers() -> Iterator[None]:
    """Whatever this process was started with (a background job ignores Ctrl-C): Python's handlers, and back."""
    before = {SIGINT: signal.getsignal(SIGINT), SIGTERM: signal.getsignal(SIGTERM)}
    signal.signal(SIGINT, signal.default_int_handler)
    signal.signal(SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def _small_backbone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, small_run.NAME, small_run.entry())
        yield


@pytest.fixture(scope="module")
def undisturbed(_small_backbone: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, dict[str, str]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("interrupt")
    spec = small_run.make_spec(folder / "photos")
    train(spec, folder / "run", options=OPTIONS)
    return spec, left_behind(folder / "run")


def at_step(step: int, number: signal.Signals) -> Callbacks:
    return Callbacks(on_step=lambda info: signal.raise_signal(number) if info.step == step else None)


def at_epoch_end(epoch: int, number: signal.Signals) -> Callbacks:
    return Callbacks(on_epoch=lambda info: signal.raise_signal(number) if info.epoch == epoch else None)


def in_validation(calls: int, number: signal.Signals) -> Callbacks:
    """During the forward pass of the n-th micro-batch of validation (five an epoch)."""
    seen = 0

    def watch(prepared: Prepared) -> None:
        def count(*_: object) -> None:
            nonlocal seen
            seen += torch.is_inference_mode_enabled()
            if seen == calls:
                seen += 1
                signal.raise_signal(number)

        prepared.model.register_forward_hook(count)

    return Callbacks(on_start=watch)


def step_in(out: Path) -> int:
    return read_sealed(out / CHECKPOINT, KIND)[1]["progress"]["step"]


@pytest.mark.parametrize(
    ("callbacks", "number", "step"),
    [
        (at_step(1, SIGINT), SIGINT, 1),
        (at_step(4, SIGTERM), SIGTERM, 4),
        (at_step(6, SIGINT), SIGINT, 6),
        (in_validation(1, SIGTERM), SIGTERM, 6),
        (at_epoch_end(1, SIGINT), SIGINT, 6),
        (in_validation(9, SIGINT), SIGINT, 12),
        (at_epoch_end(2, SIGTERM), SIGTERM, 12),
    ],
    ids=["step-1", "step-4", "last-step", "validation", "epoch-end", "last-validation", "last-epoch-end"],
)
def test_stopped_and_resumed_it_ends_in_the_same_bits(
    undisturbed: tuple[TrainSpec, dict[str, str]],
    callbacks: Callbacks,
    number: signal.Signals,
    step: int,
    tmp_path: Path,
) -> None:
    spec, expected = undisturbed
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="--resume goes on from") as caught:
        train(spec, out, options=OPTIONS, callbacks=callbacks)
    assert caught.value.exit_status == 128 + number
    assert "\n" not in str(caught.value)
    assert step_in(out) == step
    assert not (out / DELTA).exists()
    assert signal.getsignal(SIGINT) is signal.default_int_handler
    train(spec, out, resume=True, options=OPTIONS)
    assert left_behind(out) == expected


@pytest.mark.parametrize("where", ["check", "calibration"])
def test_stopped_before_the_first_step_nothing_is_left(
    undisturbed: tuple[TrainSpec, dict[str, str]], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> None:
        signal.raise_signal(SIGTERM)

    def calibrate(model: object, adaptation: object, images: Any) -> None:
        ask()
        list(images)
        raise AssertionError("it went on")

    if where == "calibration":
        monkeypatch.setattr("tinytl._prepared.calibrate_", calibrate)
    callbacks = Callbacks(on_check=ask) if where == "check" else Callbacks()
    with pytest.raises(Interrupted, match="SIGTERM; nothing has begun yet"):
        train(undisturbed[0], tmp_path / "new" / "run", options=OPTIONS, callbacks=callbacks)
    assert not list(tmp_path.iterdir())


def test_a_signal_that_comes_while_the_last_files_are_written_comes_too_late(
    undisturbed: tuple[TrainSpec, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinytl.run import plot_curves

    def draw(*paths: Path) -> None:
        signal.raise_signal(SIGINT)
        plot_curves(*paths)

    monkeypatch.setattr("tinytl.run.plot_curves", draw)
    with pytest.raises(Interrupted, match="is finished"):
        train(undisturbed[0], tmp_path / "run", options=OPTIONS)
    assert left_behind(tmp_path / "run") == undisturbed[1]


def test_a_second_ctrl_c_stops_at_once(undisturbed: tuple[TrainSpec, dict[str, str]], tmp_path: Path) -> None:
    spec, expected = undisturbed
    out, steps = tmp_path / "run", []

    def twice(info) -> None:
        steps.append(info.step)
        if info.step == 8:
            signal.raise_signal(SIGINT)
            signal.raise_signal(SIGTERM)  # more of these change nothing
            signal.raise_signal(SIGINT)
            raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        train(spec, out, options=OPTIONS, callbacks=Callbacks(on_step=twice))
    assert steps[-1] == 8
    assert step_in(out) == 6  # of the epoch's end
    train(spec, out, resume=True, options=OPTIONS)
    assert left_behind(out) == expected


def test_what_cannot_be_saved_is_what_is_told(
    undisturbed: tuple[TrainSpec, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinytl.errors import RunError

    def full(*_: object) -> None:
        raise RunError("cannot write it")

    monkeypatch.setattr("tinytl.checkpoint.write_sealed", full)
    with pytest.raises(RunError, match="cannot write it"):
        train(undisturbed[0], tmp_path / "run", options=OPTIONS, callbacks=at_step(2, SIGINT))


def test_handlers_of_others_are_left_alone() -> None:
    found: list[Any] = []

    def elsewhere() -> None:
        with stop_on_signals():
            found.append(signal.getsignal(SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
    signal.signal(SIGTERM, signal.SIG_IGN)  # as nohup does with another
    with stop_on_signals() as stop:
        signal.raise_signal(SIGTERM)
        assert signal.getsignal(SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(SIGINT) is not signal.default_int_handler
    assert stop.asked is None
    assert signal.getsignal(SIGINT) is signal.default_int_handler


def test_what_comes_after_the_last_question_is_not_swallowed() -> None:
    def late(error: type[Exception] | None) -> None:
        with stop_on_signals():
            signal.raise_signal(SIGTERM)
            if error is not None:
                raise error

    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        late(None)
    with pytest.raises(ZeroDivisionError):  # what the block raised is what is told
        late(ZeroDivisionError)


def test_between_asks_before_and_after_each() -> None:
    stop, closed, seen = Stop(), [], []

    def items() -> Iterator[int]:
        try:
            yield from range(5)
        finally:
            closed.append(True)

    def take(item: int) -> None:
        seen.append(item)
        stop.asked = SIGINT if item == 2 else None

    with pytest.raises(Interrupted):
        list(map(take, stop.between(items())))
    assert seen == [0, 1, 2]
    assert closed == [True]
    with pytest.raises(Interrupted):
        next(stop.between(items()))
    assert list(Stop().between(iter("ab"))) == ["a", "b"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_exit_statuses_of_the_command_line(tmp_path: Path) -> None:
    """130 after Ctrl-C, 143 after SIGTERM; one line; and the second process goes on where the first stopped."""
    photos, out = make_photographs(tmp_path / "photos"), tmp_path / "run"
    command = [sys.executable, "-m", "tinytl", "train", str(photos), "--out", str(out), "--quiet"]
    command += ["--backbone", "proxylessnas_mobile", "--no-pretrained", "--method", "tinytl-b", "--resolution", "64"]
    command += ["--batch-size", "4", "--epochs", "500", "--threads", "1", "--checkpoint-seconds", "3600"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log, steps = out / METRICS, 0
    for number, more in ((SIGINT, []), (SIGTERM, ["--resume"])):
        process = subprocess.Popen(
            [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        with contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            begun = log.stat().st_size if log.exists() else 0
            wait_for(lambda: log.exists() and log.stat().st_size > begun + 1000, process)  # noqa: B023
            process.send_signal(number)
            printed, said = process.communicate(timeout=120)
        assert process.returncode == 128 + number, said
        assert printed == ""
        assert len(said.splitlines()) == 1
        assert said.startswith("tinytl: stopped by ")
        assert f"--resume goes on from {out}" in said
        assert step_in(out) > steps
        steps = step_in(out)
    assert (out / SETTINGS).exists()
    assert not (out / DELTA).exists()
