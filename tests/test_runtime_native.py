"""Runs of the native executor itself, in processes of their own: the same bits whatever happened to them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tinytl._run_folder import CHECKPOINT, DELTA, SETTINGS
from tinytl._sealed import SealedFile
from tinytl.errors import NotFiniteError, RunError
from tinytl.runtime import Executor
from tinytl.runtime.checkpoint import KIND
from tinytl.runtime.training import Intervals, train

from .native import needs_executor, rehashed, section, written
from .photographs import make_photographs
from .small_program import small_program
from .stand_in import CLASSES, StandIn, write_program
from .test_runtime_training import Watch, left_behind

pytestmark = needs_executor
ROOT = Path(__file__).parents[1]
EPOCHS, BATCHES = 4, 6


class Place:
    """A hand-made program in a file, photographs, and what a run that nobody disturbed left."""

    def __init__(self, folder: Path) -> None:
        about = StandIn(write_program(folder / "about.ttl", epochs=EPOCHS, lr=0.02)).meta
        small = small_program(batch=4, micro_batch=2, side=16, classes=len(CLASSES))
        meta = {**small.meta, "delta": about["delta"], "train": about["train"], "plan": {}}
        self.program = written(replace(small, meta=meta), folder / "program.ttl")
        self.photos = make_photographs(folder / "photos", each=10, size=(40, 36))
        self.out = folder / "undisturbed"
        done = self.run(self.out)
        assert done.returncode == 0, done.stderr
        self.hashes = left_behind(self.out)

    def command(self, out: Path, *more: str) -> list[str]:
        given = [str(self.program), str(self.photos), "--out", str(out), "--checkpoint-steps", "1", "--quiet"]
        return [sys.executable, "-m", "tinytl.runtime", "train", *given, *more]

    def run(self, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(out, *more), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("native"))


def test_a_process_of_its_own_gives_the_same_bits(place: Place, tmp_path: Path) -> None:
    done = place.run(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert left_behind(tmp_path / "run") == place.hashes
    saved = SealedFile(place.out / CHECKPOINT, KIND)
    assert saved.metadata["progress"]["step"] == EPOCHS * BATCHES
    with Executor(place.program) as executor:
        assert saved.places["state"].nbytes == len(executor.state)


@pytest.mark.parametrize("step", [1, 9, 12, 23])
def test_cut_anywhere_it_ends_in_the_same_bits(place: Place, step: int, tmp_path: Path) -> None:
    class Cut(BaseException):
        pass

    def act(line) -> None:
        if line["step"] == step:
            raise Cut

    with Executor(place.program) as executor, pytest.raises(Cut):
        train(
            executor,
            place.program,
            str(place.photos),
            tmp_path / "run",
            intervals=Intervals(checkpoint_steps=2),
            shown=Watch(act),
        )
    done = place.run(tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert left_behind(tmp_path / "run") == place.hashes


def test_a_loss_or_a_gradient_that_is_not_finite_is_named(place: Place, tmp_path: Path) -> None:
    with Executor(place.program) as executor:
        # biases that leave no finite logit: the loss is seen first, and nothing is updated
        executor.tensor(5).cast("f")[0] = float("inf")
        before = bytes(executor.state)
        with pytest.raises(NotFiniteError, match=r"the loss is NaN or infinite at step 1 \(epoch 1, batch 1 of 6\)"):
            train(executor, place.program, str(place.photos), tmp_path / "run")
        assert bytes(executor.state) == before
    done = place.run(tmp_path / "other", "--lr", "1e300")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_another_program_is_refused_and_the_difference_named(place: Place, tmp_path: Path) -> None:
    assert place.run(tmp_path / "run", "--epochs", "1").returncode == 0
    done = place.run(tmp_path / "run", "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "epochs is 4, was 1" in done.stderr
    small = small_program(batch=4, micro_batch=4, side=16)
    with Executor(place.program) as executor:
        meta = executor.meta
    other = written(
        replace(small, meta={**small.meta, **{name: meta[name] for name in ("delta", "train", "plan")}}),
        tmp_path / "o.ttl",
    )
    with Executor(other) as executor, pytest.raises(RunError, match="program is "):
        train(executor, other, str(place.photos), tmp_path / "run", given={"epochs": 1}, resume=True)


@pytest.mark.parametrize("damage", ["cut", "flipped", "newer", "foreign"])
def test_a_damaged_program_is_one_line(place: Place, damage: str, tmp_path: Path) -> None:
    data = bytearray(place.program.read_bytes())
    if damage == "cut":
        del data[-100:]
    elif damage == "flipped":
        data[-100] ^= 1
    elif damage == "newer":
        data[8] = 2
    else:
        data[:8] = b"whatever"
    path = tmp_path / "damaged.ttl"
    path.write_bytes(data)
    words = ["train", str(path), str(place.photos), "--out", str(tmp_path / "r")]
    words = [sys.executable, "-m", "tinytl.runtime", *words]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "damaged.ttl" in done.stderr
    assert not (tmp_path / "r").exists()


def test_more_threads_than_it_was_compiled_for_are_refused(place: Place, tmp_path: Path) -> None:
    done = place.run(tmp_path / "run", "--threads", "64")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "64" in done.stderr


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_it_ends_in_the_same_bits(place: Place, tmp_path: Path) -> None:
    out, draws, kills, finished = tmp_path / "run", random.Random(11), 0, 0
    while kills < 20 or not finished:
        begun = (out / SETTINGS).exists() or (out / "run.lock").exists()
        command = place.command(out, *(["--resume"] if begun else []))
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            _, error = process.communicate(timeout=draws.uniform(0.1, 1.0) if kills < 20 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, error
        assert left_behind(out) == place.hashes
        assert (out / DELTA).read_bytes() == (place.out / DELTA).read_bytes()
        finished += 1
        for path in out.iterdir():
            os.unlink(path)


SMALL_MEMORY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
from tinytl.runtime.command import main
main(["info", sys.argv[1]])
"""


def test_memory_that_is_not_there_is_one_line_and_for_the_user_to_mend(place: Place, tmp_path: Path) -> None:
    data = bytearray(place.program.read_bytes())
    word = section(bytes(data), b"CODE")[0] + 8 * 8  # of the arena's size
    with Executor(place.program) as executor:
        assert int.from_bytes(data[word : word + 8], "little") == executor.arena_bytes
    data[word : word + 8] = (1 << 40).to_bytes(8, "little")
    path = tmp_path / "large.ttl"
    path.write_bytes(rehashed(bytes(data)))
    words = [sys.executable, "-c", SMALL_MEMORY, str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "compile it with a smaller --memory-budget" in done.stderr


@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_a_number_that_is_none_in_meta_is_one_line(place: Place, number: str, tmp_path: Path) -> None:
    data = place.program.read_bytes()
    begin, size = section(data, b"META")
    meta = data[begin : begin + size]
    old = b'"crop_fraction":0.875'
    assert meta.count(old) == 1
    changed = meta.replace(old, b'"crop_fraction":%b' % number.encode())
    path = tmp_path / "changed.ttl"
    path.write_bytes(rehashed(data[:begin] + changed.ljust(size) + data[begin + size :]))
    words = [sys.executable, "-m", "tinytl.runtime", "info", str(path), "--json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "its META is no JSON" in done.stderr
