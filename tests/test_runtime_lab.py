"""Trained on the device and read in the lab: the same answers; and `tinytl train --engine device`, which does both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinytl._device_run import PROGRAM, command, compiled_into
from tinytl.backbones import BACKBONES
from tinytl.compiler.compile import compile_run, compile_spec
from tinytl.compiler.file import write_program
from tinytl.config import FILE as CONFIG
from tinytl.data import open_photo, scan
from tinytl.errors import InputError, RunError
from tinytl.run import train as train_in_the_lab
from tinytl.runtime import Executor, _library
from tinytl.runtime.command import _parser
from tinytl.runtime.pixels import Recipe
from tinytl.runtime.settings import OF_FIT
from tinytl.runtime.training import train
from tinytl.spec import FitOptions, RunOptions, TrainSpec
from tinytl.trained import open_run, photos_for

from . import small_run
from .native import needs_executor
from .photographs import make_photographs

pytestmark = needs_executor
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def _small_backbone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, small_run.NAME, small_run.entry())
        yield


@pytest.mark.parametrize(
    ("method", "norm", "bits", "optimizer_bits"),
    [("tinytl-b", "bn", 32, 32), ("tinytl-l+b", "bn", 8, 8), ("tinytl-l+b", "gn", 32, 32), ("ft-full", "bn", 32, 32)],
)
def test_a_delta_of_the_device_answers_in_the_lab_as_on_the_device(
    method: str, norm: str, bits: int, optimizer_bits: int, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    spec = small_run.make_spec(tmp_path / "photos")
    spec = replace(spec, method=method, norm=norm, frozen_bits=bits, weights=None)
    spec = replace(spec, fit=replace(spec.fit, optimizer_bits=optimizer_bits, epochs=3))
    program, out = tmp_path / "program.ttl", tmp_path / "run"
    write_program(compile_spec(spec).program, program)
    with Executor(program) as executor:
        first = bytes(executor.state)
        result = train(executor, program, spec.photos, out)
        assert bytes(executor.state) != first
        run = open_run(out)
        recipe = Recipe(executor.meta["delta"]["preprocessing"])
        for path, _ in scan(spec.photos).items[::4]:
            with open_photo(path) as photo:
                pixels = recipe.evaluation(photo).tobytes()
            executor.images[: len(pixels)] = pixels
            ours = torch.tensor(executor.evaluate(1))
            with open_photo(path) as photo, torch.inference_mode():
                theirs = run.model(torch.from_numpy(run.transform(photo)).unsqueeze(0))[0]
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4), (ours, theirs)
    held_out = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["validation"]
    assert held_out["top1"] == result.scores.top1
    record = run.evaluate(photos_for(run, spec.photos), batch_size=4, workers=0)
    assert record.images == 30
    assert run.trained_on == spec.photos


def test_a_run_of_the_device_can_be_compiled_to_go_on_from(tmp_path: Path) -> None:
    spec = small_run.make_spec(tmp_path / "photos")
    program, out = tmp_path / "program.ttl", tmp_path / "run"
    write_program(compile_spec(spec).program, program)
    with Executor(program) as executor:
        train(executor, program, spec.photos, out)
        learned = {entry["key"]: bytes(executor.tensor(entry["tensor"])) for entry in executor.meta["learned"]}
    again = compile_run(out, {})
    assert again.program.meta["train"]["lr"] == spec.fit.lr
    write_program(again.program, program)
    with Executor(program) as executor:
        for entry in executor.meta["learned"]:
            assert bytes(executor.tensor(entry["tensor"])) == learned[entry["key"]]


def test_the_names_of_fit_are_the_labs() -> None:
    assert sorted(OF_FIT) == sorted(FitOptions.__dataclass_fields__)


def test_what_the_device_does_not_have_is_refused(tmp_path: Path) -> None:
    spec = replace(small_run.make_spec(tmp_path / "photos"), engine="device")
    for options in (
        RunOptions(workers=0),
        RunOptions(cache="1MB"),
        RunOptions(tensorboard=True),
        RunOptions(report=True),
    ):
        with pytest.raises(InputError, match="which engine 'device' does not have: leave it out"):
            compiled_into(spec, tmp_path / "run", options, False, print)
    with pytest.raises(InputError, match="trains in a process of its own"):
        train_in_the_lab(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_program_and_refuses_another(tmp_path: Path) -> None:
    spec, out, said = replace(small_run.make_spec(tmp_path / "photos"), engine="device"), tmp_path / "run", []
    program = compiled_into(spec, out, RunOptions(), False, said.append)
    assert program == out / PROGRAM
    assert (out / CONFIG).exists()
    content = program.read_bytes()
    with Executor(program) as executor:
        train(executor, program, spec.photos, out)
    with pytest.raises(RunError, match="holds a run already"):
        compiled_into(spec, out, RunOptions(), False, said.append)
    said.clear()
    assert compiled_into(spec, out, RunOptions(), True, said.append) == program
    assert not said  # nothing was compiled
    other = replace(spec, fit=replace(spec.fit, label_smoothing=0.3))
    with pytest.raises(RunError, match=r"made with other settings: fit\.label_smoothing is 0.3, was 0.1"):
        compiled_into(other, out, RunOptions(), True, said.append)
    assert program.read_bytes() == content


def test_a_run_of_the_lab_is_not_resumed_on_the_device_and_stays_as_it_was(tmp_path: Path) -> None:
    spec, out = small_run.make_spec(tmp_path / "photos"), tmp_path / "run"
    train_in_the_lab(spec, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(RunError, match='made with other settings: engine is "device", was "lab"'):
        compiled_into(replace(spec, engine="device"), out, RunOptions(), True, print)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_without_the_executor_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, out, said = replace(small_run.make_spec(tmp_path / "photos"), engine="device"), tmp_path / "run", []
    monkeypatch.setattr(_library, "HERE", tmp_path)
    _library.library.cache_clear()
    with pytest.raises(InputError, match="executor of compiled programs was not built"):
        compiled_into(spec, out, RunOptions(), False, said.append)
    assert not said
    assert not out.exists()


@pytest.mark.parametrize(("out", "photos"), [("-run", "--lr=2"), ("runs/device", "-"), ("--resume", "photos")])
def test_names_that_begin_as_options_do_are_none(out: str, photos: str) -> None:
    words = command(
        TrainSpec(photos), Path(out), Path(out) / PROGRAM, RunOptions(), resume=False, as_json=True, quiet=False
    )
    read = _parser().parse_args(words[3:])
    assert (read.out, read.program, read.photos) == (out, f"{out}/{PROGRAM}", photos)
    assert (read.resume, read.json, read.lr) == (False, True, FitOptions.lr)


TRAIN = [sys.executable, "-m", "tinytl", "train", "--engine", "device", "--backbone", "mbv2_w035", "--no-pretrained"]
TRAIN += ["--resolution", "32", "--method", "tinytl-b", "--checkpoint-steps", "1", "--lr", "1e-3"]


@pytest.mark.slow
def test_one_command_compiles_and_trains(tmp_path: Path) -> None:
    photos, out = make_photographs(tmp_path / "photos", each=8), tmp_path / "run"
    words = [*TRAIN, str(photos), "--out", str(out), "--epochs", "2"]
    done = subprocess.run([*words, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["steps"] == 2 * 3
    assert record["peak_bytes"] < 100e6  # PyTorch alone is more: it is not in that process
    again = subprocess.run(
        [sys.executable, "-m", "tinytl", "train", "--resume", "--out", str(out), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["loss"] == record["loss"]
    refused = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    said = [sys.executable, "-m", "tinytl", "evaluate", str(out), str(photos), "--json"]
    found = json.loads(subprocess.run(said, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    device = [
        sys.executable,
        "-m",
        "tinytl.runtime",
        "evaluate",
        str(out / PROGRAM),
        str(photos),
        "--run",
        str(out),
        "--json",
    ]
    ours = json.loads(subprocess.run(device, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    assert found["images"] == ours["images"] == 24
    assert found["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    assert abs(found["top1"] - ours["top1"]) <= 1 / 24  # one photograph may stand on the line between two classes


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_one_that_trains(number: signal.Signals, status: int, tmp_path: Path) -> None:
    photos, out = make_photographs(tmp_path / "photos", each=8), tmp_path / "run"
    words = [*TRAIN, str(photos), "--out", str(out), "--epochs", "1000"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()  # where it did not stop: it would train on beside the tests that follow
    assert process.returncode == status
    assert "--resume goes on from" in error.splitlines()[-1]
