"""The command line as a user meets it: what it prints, exit statuses, one clear line for bad input."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import tinytl as package
from tinytl.cli.display import TrainingDisplay
from tinytl.engine import StepInfo
from tinytl.errors import Interrupted

from .command_line import QUICK, SMALL, tinytl
from .photographs import make_photographs

PAGE = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()


def promised(command: str) -> set[str]:
    """The keys that docs/cli.md promises of a command's JSON, its first column."""
    table = PAGE.split(f"### JSON of {command}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return set(re.findall(r"`(\w+)`", " ".join(rows)))


def promised_parts(command: str, key: str) -> set[str]:
    """The keys inside of one key, its second column."""
    (row,) = [line for line in PAGE.split(f"### JSON of {command}\n")[1].splitlines() if line.startswith(f"| `{key}`")]
    return set(re.findall(r"`(\w+)`", row.split("|")[2])) - {"null"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    done = tinytl("train", photos, *QUICK, "--cache", "1MB", "--out", out)
    assert done.status == 0, done.err
    assert "epoch 1/1" in done.out
    assert "top-1" in done.out
    assert "images/s in training" in done.out
    assert "% of the time in steps" in done.out
    assert "reads" in done.out.splitlines()[-1]
    return out


def test_train_prints_one_json_value_and_nothing_else(photos: Path, tmp_path: Path) -> None:
    done = tinytl("train", photos, *QUICK, "--cache", "1MB", "--out", tmp_path / "run", "--json")
    found = done.json
    assert done.err == ""
    assert set(found) == promised("train")
    assert set(found["cache"]) == promised_parts("train", "cache")
    assert (found["images"], found["train_images"], found["steps"]) == (3, 15, 4)
    assert found["out"] == str(tmp_path / "run")
    assert found["delta_bytes"] == (tmp_path / "run" / "delta.safetensors").stat().st_size
    assert 0 < found["step_share"] <= 1
    assert 0 < found["cache"]["held_bytes"] <= found["cache"]["limit_bytes"] == 10**6
    assert found["peak_bytes"] > 10**6


def test_resume_of_a_finished_run(run: Path, photos: Path) -> None:
    done = tinytl("train", photos, *QUICK, "--out", run, "--resume", "--quiet")
    assert done.status == 0, done.err
    assert done.err == ""
    assert len(done.out.split("\n")) == 2, "--quiet prints the result only"
    found = tinytl("train", "--out", run, "--resume", "--json").json
    assert (found["images_per_second"], found["step_share"], found["peak_bytes"]) == (None, None, None)
    assert "--resume" in tinytl("train", photos, *QUICK, "--out", run).line


def test_evaluate_prints_the_promised_keys(run: Path, photos: Path) -> None:
    done = tinytl("evaluate", run, photos, "--json")
    assert set(done.json) == promised("evaluate")
    assert done.json["images"] == 18
    assert 0.0 <= done.json["top1"] <= 1.0
    assert "trained on" in done.json["notes"][0]
    assert done.err == ""


def test_evaluate_prints_a_table_and_its_notes_apart(run: Path, photos: Path) -> None:
    done = tinytl("evaluate", run, photos)
    assert "balanced accuracy" in done.out
    assert done.err.startswith("note: ")
    assert tinytl("evaluate", run, photos, "--quiet").err == ""


def test_predict(run: Path, photos: Path) -> None:
    image = photos / "red" / "0.jpg"
    answers = tinytl("predict", run, image, image, "--top", "2", "--json").json
    assert [set(answer) for answer in answers] == [promised("predict") - {"error"}] * 2
    assert [answer["image"] for answer in answers] == [str(image)] * 2
    assert [[set(label) for label in answer["labels"]] for answer in answers] == [
        [promised_parts("predict", "labels")] * 2
    ] * 2
    assert tinytl("predict", run, image).out.count("%") == 3


def test_a_name_cannot_command_the_terminal(run: Path, photos: Path, tmp_path: Path) -> None:
    image = tmp_path / "a\x1b[31m\u200b[bold]ü猫.jpg"
    image.write_bytes((photos / "red" / "0.jpg").read_bytes())
    shown = tinytl("predict", run, image).out
    assert "a\\x1b[31m\\u200b[bold]ü猫.jpg" in shown
    assert "\x1b" not in shown


def test_a_photograph_that_cannot_be_read(run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not a photograph")
    done = tinytl("predict", run, tmp_path / "broken.jpg", photos / "red" / "0.jpg", "--json")
    assert "broken.jpg" in done.line
    assert [set(answer) for answer in json.loads(done.out)] == [{"image", "error"}, {"image", "labels"}]


def test_profile_prints_the_promised_keys() -> None:
    found = tinytl(
        *("profile", "--backbone", "proxylessnas_mobile", "--method", "tinytl-b", "--resolution", "64"),
        *("--batch-size", "2", "--micro-batch", "1", "--classes", "5", "--norm", "gn", "--compare", "stock"),
        *("--repeats", "1", "--threads", "1", "--json"),
    ).json
    assert set(found) == promised("profile")
    assert found["counted"] > 0
    assert found["kept_bytes"] > 0
    for measured in (found["measured"], found["stock"]["measured"]):
        assert set(measured) == promised_parts("profile", "measured")
        assert measured["peak_bytes"] > measured["step_peak_bytes"] > 0
        assert measured["step_seconds"] > 0
        if sys.platform.startswith("linux"):
            assert measured["rss_delta_bytes"] > 0
    assert set(found["planned"]) == promised_parts("profile", "planned")
    assert found["planned"]["peak_bytes"] == pytest.approx(found["measured"]["peak_bytes"], rel=0.01)
    assert found["measured"]["step_peak_bytes"] < found["stock"]["measured"]["step_peak_bytes"]


def test_profile_prints_a_table() -> None:
    done = tinytl("profile", "--method", "ft-last", "--resolution", "64", "--no-rss", "--repeats", "0", "--layers")
    assert done.status == 0, done.err
    assert "kept for backward" in done.out
    assert "classifier" in done.out


@pytest.mark.parametrize("command", ["backbones", "methods"])
def test_lists(command: str) -> None:
    rows = tinytl(command, "--json").json
    assert all(set(row) == promised(command) for row in rows)
    names = {row["name"] for row in rows}
    expected = {
        "backbones": {"efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "proxylessnas_mobile"},
        "methods": {"ft-last", "ft-norm+last", "ft-full", "tinytl-b", "tinytl-l", "tinytl-l+b"},
    }[command]
    assert expected <= names
    text = tinytl(command)
    assert text.status == 0
    assert all(name in text.out for name in expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nowhere"], "nowhere"),
        (["train", "PHOTOS", "--method", "tinytl-x"], "did you mean 'tinytl-l'"),
        (["train", "PHOTOS", "--backbone", "resnet"], "unknown backbone 'resnet'"),
        (["train", "PHOTOS", *SMALL, "--norm", "ln"], "unknown norm 'ln'"),
        (["train", "PHOTOS", *SMALL, "--epochs", "0"], "epochs is 0, expected a whole number of at least 1"),
        (["train", "PHOTOS", *SMALL, "--epochs", "many"], "epochs is 'many', expected a whole number"),
        (["train", "PHOTOS", *SMALL, "--lr", "-1"], "lr is -1.0"),
        (["train", "PHOTOS", *SMALL, "--lr", "nan"], "lr is nan"),
        (["train", "PHOTOS", *SMALL, "--optimizer", "lion"], "unknown optimizer 'lion'"),
        (["train", "PHOTOS", *SMALL, "--momentum", "0.5"], "momentum is 0.5, but optimizer 'adam'"),
        (["train", "PHOTOS", "--weights", "w.pth", "--no-pretrained"], "leave one of the two out"),
        (["train", "PHOTOS", *SMALL, "--warmup-epochs", "50"], "fewer than the 50 epochs"),
        (["train", "PHOTOS", *SMALL, "--cache", "256 sheep"], "cache is '256 sheep'"),
        (["train", "PHOTOS", *SMALL, "--checkpoint-seconds", "0"], "checkpoint_seconds is 0.0"),
        (["train", "PHOTOS", "--backbone", "proxylessnas_mobile"], "--weights"),
        (["train", "PHOTOS", *SMALL, "--last-blocks", "99"], "last blocks 99"),
        (["train", "PHOTOS", *SMALL, "--threads", "0"], "threads is 0"),
        (["train", "PHOTOS", *SMALL, "--workers", "-1"], "workers is -1"),
        (["train", "PHOTOS", *SMALL, "--seed", str(2**63)], "seed is 9223372036854775808"),
        (["train", "PHOTOS", *SMALL[:3], "--resolution", "5000"], "4096"),
        (["train", "--resume", "--out", "nowhere"], "no photographs are given"),
        (["train", "PHOTOS", *SMALL, "--resume", "--out", "nowhere"], "no run to resume"),
        (["train", "PHOTOS", "--config", "nowhere.toml"], "cannot read nowhere.toml"),
        (["profile", "--threads", "0"], "threads 0"),
        (["evaluate", "nowhere", "PHOTOS"], "nowhere"),
        (["predict", "nowhere", "x.jpg"], "nowhere"),
        (["predict", "nowhere", "x.jpg", "--top", "0"], "top is 0"),
        (["profile", "--method", "nothing"], "unknown method"),
        (["profile", "--compare", "jax"], "unknown comparison"),
        (["profile", "--resolution", "8"], "resolution is 8"),
        (["profile", "--micro-batch", "0"], "micro_batch is 0"),
        (["trian", "PHOTOS"], "unknown command 'trian': did you mean 'train'?"),
        (["train", "PHOTOS", "--epoch", "5"], "no option '--epoch': did you mean '--epochs'? see tinytl train --help"),
        (["train", "PHOTOS", "--epochs"], "option '--epochs' requires an argument"),
        (["train", "PHOTOS", "photos2"], "unexpected extra argument"),
        (["evaluate"], "missing argument"),
        (["profile", "--batch-size", "eight"], "--batch-size"),
        (["--nonsense"], "no option '--nonsense'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], says: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = tinytl(*[photos if word == "PHOTOS" else word for word in arguments])
    assert says in done.line
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (Interrupted("stopped", 2), 130), (Interrupted("stopped", 15), 143)],
)
def test_interrupted(error: BaseException, status: int, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tinytl.run.train", stop)
    done = tinytl("train", photos)
    assert done.status == status
    assert re.fullmatch(r"tinytl: (interrupted|stopped)\n", done.err)


def test_a_bug_shows_its_traceback(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tinytl.run.train", fail)
    with pytest.raises(ZeroDivisionError):  # which Python ends with a traceback and status 1
        tinytl("train", photos)


def test_the_display_draws_its_bars_on_a_terminal_and_notes_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    step = StepInfo(
        2, 3, 5, 8, 10, loss=0.25, accuracy=0.5, lr=1e-3, images=4, seconds=0.5, wait_seconds=0.5, peak_bytes=10**8
    )
    with TrainingDisplay(Console(file=screen, force_terminal=True, width=120)) as display:
        for done in range(3):
            display.check(done, 12)
        display.notice("3 photographs cannot be read")
        display.check(12, 12)
        display.step(step)
    shown = screen.getvalue()
    for text in ("checking photographs", "0/12", "epoch 2/2", "8/10", "loss 0.250  4 images/s  process 100 MB"):
        assert text in shown
    assert display.notes == ["3 photographs cannot be read"]
    assert "note: 3 photographs cannot be read" in shown + capsys.readouterr().err


def test_help_and_version() -> None:
    assert tinytl("--version").out == f"tinytl {package.__version__}\n"
    alone = tinytl()
    assert alone.status == 0
    assert all(command in alone.out for command in ("train", "evaluate", "predict", "profile", "doctor"))
    assert "--checkpoint-seconds" in tinytl("train", "--help").out
    assert tinytl("train", "-h").status == 0


def as_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_a_process_ends_with_the_status_and_loads_pytorch_only_to_work() -> None:
    code = "import atexit, sys; from tinytl.cli import main; atexit.register(lambda: print('torch' in sys.modules)); "
    refused = as_a_process(code + "main(['train', '--epoch', '1'])")
    assert (refused.returncode, refused.stdout) == (2, "False\n")
    assert refused.stderr.startswith("tinytl: no option")
    helped = as_a_process(code + "main(['train', '--help'])")
    assert helped.returncode == 0
    assert helped.stdout.endswith("False\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
@pytest.mark.parametrize("arguments", [["--help"], ["methods"]])
def test_the_reader_of_a_pipe_goes_away(arguments: list[str]) -> None:
    code = (
        "import os, sys; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); "
        f"from tinytl.cli import main; main({json.dumps(arguments)})"
    )
    done = as_a_process(code)
    assert (done.returncode, done.stderr) == (141, "")
