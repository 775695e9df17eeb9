"""The command line as a user meets it: real processes, exit statuses, one clear line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .photographs import make_photographs

SMALL = ["--backbone", "proxylessnas_mobile", "--no-pretrained", "--resolution", "64", "--threads", "1"]


def tinytl(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from tinytl.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    done = tinytl("train", str(photos), *SMALL, "--epochs", "1", "--batch-size", "4", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout
    return out


def test_evaluate_prints_the_promised_keys(run: Path, photos: Path) -> None:
    done = tinytl("evaluate", str(run), str(photos), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"top1", "balanced_accuracy", "images"} <= found.keys()
    assert found["images"] == 18
    assert 0.0 <= found["top1"] <= 1.0


def test_evaluate_prints_a_table(run: Path, photos: Path) -> None:
    done = tinytl("evaluate", str(run), str(photos))
    assert done.returncode == 0, done.stderr
    assert "balanced accuracy" in done.stdout


def test_predict(run: Path, photos: Path) -> None:
    image = photos / "red" / "0.jpg"
    done = tinytl("predict", str(run), str(image), str(image), "--top", "2", "--json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [answer["image"] for answer in answers] == [str(image)] * 2
    assert [len(answer["labels"]) for answer in answers] == [2, 2]
    plain = tinytl("predict", str(run), str(image))
    assert plain.stdout.count("%") == 3


def test_resume_of_a_finished_run(run: Path, photos: Path) -> None:
    arguments = [*SMALL, "--epochs", "1", "--batch-size", "4", "--out", str(run)]
    assert tinytl("train", str(photos), *arguments, "--resume", "--quiet").returncode == 0
    refused = tinytl("train", str(photos), *arguments)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr


def test_profile_prints_the_promised_keys() -> None:
    done = tinytl(
        *("profile", "--backbone", "proxylessnas_mobile", "--method", "tinytl-b", "--resolution", "64"),
        *("--batch-size", "2", "--micro-batch", "1", "--classes", "5", "--norm", "gn", "--compare", "stock"),
        *("--repeats", "1", "--threads", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["counted"] > 0
    assert found["kept_bytes"] > 0
    for measured in (found["measured"], found["stock"]["measured"]):
        assert measured["peak_bytes"] > measured["step_peak_bytes"] > 0
        assert measured["step_seconds"] > 0
        if sys.platform.startswith("linux"):
            assert measured["rss_delta_bytes"] > 0
    assert found["measured"]["step_peak_bytes"] < found["stock"]["measured"]["step_peak_bytes"]


def test_profile_prints_a_table() -> None:
    done = tinytl("profile", "--method", "ft-last", "--resolution", "64", "--no-rss", "--repeats", "0", "--layers")
    assert done.returncode == 0, done.stderr
    assert "kept for backward" in done.stdout
    assert "classifier" in done.stdout


@pytest.mark.parametrize("command", ["backbones", "methods"])
def test_lists(command: str) -> None:
    names = {entry["name"] for entry in json.loads(tinytl(command, "--json").stdout)}
    expected = {
        "backbones": {"efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "proxylessnas_mobile"},
        "methods": {"ft-last", "ft-norm+last", "ft-full", "tinytl-b", "tinytl-l", "tinytl-l+b"},
    }[command]
    assert expected <= names
    text = tinytl(command)
    assert text.returncode == 0
    assert all(name in text.stdout for name in expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nowhere"], "nowhere"),
        (["train", "PHOTOS", "--method", "tinytl-x"], "did you mean 'tinytl-l'"),
        (["train", "PHOTOS", "--backbone", "resnet"], "unknown backbone 'resnet'"),
        (["train", "PHOTOS", *SMALL, "--norm", "ln"], "unknown norm 'ln'"),
        (["train", "PHOTOS", *SMALL, "--epochs", "0"], "epochs"),
        (["train", "PHOTOS", *SMALL, "--lr", "-1"], "lr"),
        (["train", "PHOTOS", *SMALL, "--optimizer", "lion"], "unknown optimizer 'lion'"),
        (["train", "PHOTOS", "--backbone", "proxylessnas_mobile"], "--weights"),
        (["train", "PHOTOS", *SMALL, "--last-blocks", "99"], "last blocks 99"),
        (["train", "PHOTOS", *SMALL, "--threads", "0"], "threads 0"),
        (["train", "PHOTOS", *SMALL, "--workers", "-1"], "workers"),
        (["train", "PHOTOS", *SMALL, "--seed", str(2**63)], "seed"),
        (["train", "PHOTOS", *SMALL[:3], "--resolution", "5000"], "4096"),
        (["profile", "--threads", "0"], "threads 0"),
        (["evaluate", "nowhere", "PHOTOS"], "nowhere"),
        (["predict", "nowhere", "x.jpg"], "nowhere"),
        (["profile", "--method", "nothing"], "unknown method"),
        (["profile", "--compare", "jax"], "unknown comparison"),
        (["profile", "--resolution", "8"], "resolution is 8"),
        (["profile", "--micro-batch", "0"], "micro_batch is 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], says: str, photos: Path, tmp_path: Path) -> None:
    done = tinytl(*[str(photos) if word == "PHOTOS" else word for word in arguments], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_photograph_that_cannot_be_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not a photograph")
    done = tinytl("predict", str(run), str(tmp_path / "broken.jpg"))
    assert done.returncode == 2
    assert "broken.jpg" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
