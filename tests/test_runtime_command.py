"""`python -m tinytl.runtime`: what it loads, what it prints, and one line for what cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest

from tinytl.delta import load_delta
from tinytl.runtime import command, executor

from .photographs import make_photographs
from .stand_in import StandIn, write_program

ROOT = Path(__file__).parents[1]

HEAVY = {"torch", "numpy", "safetensors", "rich", "typer", "click", "matplotlib"}
"""What must not be loaded, for the device has none of it."""
LARGE = {
    "dataclasses",
    "inspect",
    "concurrent",
    "asyncio",
    "multiprocessing",
    "_hashlib",
    "socket",
    "shutil",
    "difflib",
}
"""What would cost memory for nothing; parts of Python's library that Pillow does not bring itself."""

PROBE = """
import atexit, json, sys
atexit.register(lambda: open({file!r}, "w").write(json.dumps(sorted({{m.split(".")[0] for m in sys.modules}}))))
{code}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_program(tmp_path_factory.mktemp("program") / "program.ttl")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("photos"), each=6)


def loaded(code: str, folder: Path) -> set[str]:
    """Packages in a process at its end."""
    file = folder / "modules.json"
    probe = PROBE.format(file=str(file), code=code)
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(file.read_text()))


def test_importing_the_runtime_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    assert not loaded("import tinytl.runtime", tmp_path) & (HEAVY | LARGE | {"PIL"})


@pytest.mark.parametrize("action", ["train", "evaluate", "predict"])
def test_a_command_loads_neither_torch_nor_numpy(action: str, program: Path, photos: Path, tmp_path: Path) -> None:
    arguments = [action, str(program), str(photos), *(["--out", str(tmp_path / "run")] if action == "train" else [])]
    code = f"import sys; sys.argv = ['x', *{arguments!r}]\nimport tests.stand_in\ntests.stand_in.main()"
    found = loaded(code, tmp_path)
    assert "PIL" in found
    assert not found & (HEAVY | LARGE)


BROUGHT = {"selectors", "tokenize", "linecache"}
"""What `tinytl.runtime._later.UNUSED` would bring when they are loaded."""


@pytest.mark.parametrize("later", [True, False])
def test_what_pillow_names_and_training_never_uses_waits(
    later: bool, program: Path, photos: Path, tmp_path: Path
) -> None:
    lines = ["from tinytl.runtime._later import UNUSED, load_later", *(["load_later(*UNUSED)"] if later else [])]
    arguments = ["train", str(program), str(photos), "--out", str(tmp_path / "run")]
    lines += [f"sys.argv = ['x', *{arguments!r}]", "import tests.stand_in", "tests.stand_in.main()"]
    found = loaded("\n".join(lines), tmp_path)
    assert "PIL" in found
    assert found & BROUGHT == (set() if later else BROUGHT)  # without it they are there: else this could not fail


def test_the_command_has_them_wait(tmp_path: Path) -> None:
    code = "sys.argv = ['x', '--help']; import runpy; runpy.run_module('tinytl.runtime', run_name='__main__')"
    # `pathlib` names ipaddress, by way of urllib; only a stand-in has no name beside the import system's
    told = (
        f"atexit.register(lambda: open({str(tmp_path / 'told')!r}, 'w').write(' '.join(dir(sys.modules['ipaddress']))))"
    )
    loaded(f"{told}\n{code}", tmp_path)
    assert all(name.startswith("__") for name in (tmp_path / "told").read_text().split())


def test_what_waits_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    code = """
from tinytl.runtime._later import load_later
load_later("subprocess", "json", "no_such_module")
import subprocess
assert "selectors" not in sys.modules and "no_such_module" not in sys.modules and json.dumps
assert subprocess.run([sys.executable, "-c", "raise SystemExit(3)"]).returncode == 3
assert sys.modules["subprocess"] is subprocess
try:
    subprocess.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    assert "selectors" in loaded(code, tmp_path)


def test_the_probe_sees_what_is_loaded(tmp_path: Path) -> None:
    assert {"dataclasses", "inspect"} <= loaded("import dataclasses", tmp_path)


class Ran:
    """What a command printed, and its exit status."""

    def __init__(self, status: Any, out: str, error: str) -> None:
        self.status, self.out, self.error = status, out, error


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(executor, "Executor", StandIn)

    def call(*arguments: object) -> Ran:
        with pytest.raises(SystemExit) as stop:
            command.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ran(stop.value.code, printed.out, printed.err)

    return call


def test_train_evaluate_and_predict(run: Any, program: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run("train", program, photos, "--out", out, "--epochs", 3, "--json")
    assert (done.status, done.error) == (0, "")
    record = json.loads(done.out)
    assert record["out"] == str(out)
    assert record["top1"] == 1.0
    assert record["steps"] == 9
    assert record["delta_bytes"] == (out / "delta.safetensors").stat().st_size
    assert record["classes"] == ["blue", "green", "red"]
    assert record["images_per_second"] > 0
    assert record["peak_bytes"] > 1e6

    found = json.loads(run("evaluate", program, photos, "--run", out, "--json").out)
    assert found["images"] == 18
    assert found["top1"] == 1.0
    untrained = json.loads(run("evaluate", program, photos, "--json").out)
    assert untrained["loss"] > found["loss"]
    assert (
        run("evaluate", program, photos, "--run", out / "delta.safetensors", "--json").out
        == run("evaluate", program, photos, "--run", out, "--json").out
    )

    (tmp_path / "broken.jpg").write_bytes(b"none")
    said = run("predict", program, photos / "red", tmp_path / "broken.jpg", "--run", out, "--json", "--top", 2)
    answers = json.loads(said.out)
    assert len(answers) == 7
    assert all(answer["labels"][0]["label"] == "red" for answer in answers[:6])
    assert [len(answer["labels"]) for answer in answers[:6]] == [2] * 6
    assert answers[6] == {"image": str(tmp_path / "broken.jpg"), "error": "no known format"}
    assert said.status == 2
    assert said.error.count("\n") == 1


def test_resumed_by_the_command_line_it_says_so_and_prints_the_same(
    run: Any, program: Path, photos: Path, tmp_path: Path
) -> None:
    first = json.loads(run("train", program, photos, "--out", tmp_path / "run", "--json").out)
    refused = run("train", program, photos, "--out", tmp_path / "run")
    assert refused.status == 2
    assert "holds a run already" in refused.error
    again = json.loads(run("train", program, photos, "--out", tmp_path / "run", "--json", "--resume").out)
    assert (again["top1"], again["loss"]) == (first["top1"], first["loss"])
    assert again["images_per_second"] is None


def test_what_is_shown(run: Any, program: Path, photos: Path, tmp_path: Path) -> None:
    done = run("train", program, photos, "--out", tmp_path / "run")
    lines = done.out.splitlines()
    assert lines[0].startswith("tinytl-b of stand-in, 3 classes, 16 px; 4 images a step in 2 micro-batches of 2; ")
    assert lines[1] == "12 photographs to train on, 6 held out, 3 classes"
    assert lines[2].startswith("epoch 1/2  loss ")
    assert lines[4].startswith("top-1 100.0%")
    assert done.error == ""  # no terminal: nothing that moves
    quiet = run("train", program, photos, "--out", tmp_path / "quiet", "--quiet")
    assert quiet.out.splitlines()[0].startswith("top-1 100.0%")
    told = run("info", program)
    assert told.out == lines[0] + "\n"
    assert json.loads(run("info", program, "--json").out)["delta"]["backbone"] == "stand-in"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND; see python -m tinytl.runtime --help"),
        (("learn",), "invalid choice: 'learn'"),
        (("train", "PROGRAM"), "required: PHOTOS"),
        (("train", "PROGRAM", "PHOTOS", "--threads", "0"), "--threads: '0', expected a whole number of at least 1"),
        (("train", "PROGRAM", "PHOTOS", "--epochs", "many"), "--epochs: 'many', expected a whole number of at least 1"),
        (("train", "PROGRAM", "PHOTOS", "--lr", "0"), "lr is 0.0, expected a number above 0"),
        (("train", "PROGRAM", "PHOTOS", "--lr", "fast"), "--lr: 'fast', expected a number"),
        (("train", "PROGRAM", "PHOTOS", "--checkpoint-seconds", "-1"), "expected a number above 0, or none"),
        (("train", "PROGRAM", "PHOTOS", "--epoch", "1"), "unrecognized arguments: --epoch 1"),
        (("train", "PROGRAM", "nowhere"), "no folder 'nowhere'"),
        (("train", "nowhere.ttl", "PHOTOS"), "program nowhere.ttl: No such file"),
        (("evaluate", "PROGRAM", "PHOTOS", "--run", "nowhere"), "delta nowhere cannot be read"),
        (("evaluate", "PROGRAM", "PHOTOS", "--run", "EMPTY"), "holds no finished run"),
        (("predict", "PROGRAM", "EMPTY"), "holds no images"),
        (("predict", "PROGRAM", "PHOTOS", "--top", "0"), "--top: '0'"),
    ],
)
def test_one_line_for_what_cannot_be(
    run: Any, arguments: tuple[str, ...], message: str, program: Path, photos: Path, tmp_path: Path
) -> None:
    places = {"PROGRAM": program, "PHOTOS": photos, "EMPTY": tmp_path}
    done = run(*(places.get(word, word) for word in arguments))
    assert done.status == 2
    assert done.out == ""
    assert done.error.count("\n") == 1
    assert done.error.startswith("tinytl: ")
    assert message in done.error


def test_a_changed_program_is_one_line(run: Any, program: Path, photos: Path, tmp_path: Path) -> None:
    data = bytearray(program.read_bytes())
    data[200] ^= 1
    (tmp_path / "changed.ttl").write_bytes(data)
    done = run("train", tmp_path / "changed.ttl", photos, "--out", tmp_path / "run")
    assert (done.status, done.error.count("\n")) == (2, 1)
    assert "hash does not match" in done.error


def test_answers_that_are_none_are_one_line(
    run: Any, program: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert run("train", program, photos, "--out", out, "--quiet").status == 0
    monkeypatch.setattr(StandIn, "evaluate", lambda self, count: array("f", [float("inf")] * count * self.classes))
    for words in (
        ("evaluate", program, photos),
        ("predict", program, photos),
        ("train", program, photos, "--out", out, "--resume"),
    ):
        for more in ((), ("--json",)):
            done = run(*words, *more)
            assert (done.status, done.error.count("\n")) == (2, 1)
            assert "the network's answers are NaN or infinite: " in done.error
            assert "lower learning rate (train --lr)" in done.error


def put(*at: Any) -> Any:
    """What writes the last of `at` into a META, at the place that the others name."""

    def change(meta: Any) -> None:
        *way, key, value = at
        for step in way:
            meta = meta[step]
        meta[key] = value

    return change


LOOKS = ("delta", "preprocessing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.pop("learned"), "compiled without its learned"),
        (put("learned", {}), "learned is no list"),
        (put("learned", 0, "head.weight"), "learned holds an entry without a key"),
        (put("learned", 0, "key", 3), "learned holds an entry without a key"),
        (put("learned", 0, "shape", [3, -1]), "learned 'head.weight' has no shape"),
        (put("learned", 0, "shape", [3, 3, 2, 1]), "learned 'head.weight' is not what its tensor holds"),
        (put("learned", 0, "tensor", 4), "learned 'head.weight' is in no tensor"),
        (put("learned", 0, "tensor", True), "learned 'head.weight' is in no tensor"),
        (put("learned", 0, "layout", "HWC"), "learned 'head.weight' has no layout"),
        (put("learned", 1, "key", "head.weight"), "name a tensor twice"),
        (put("carried", None), "carried is no list"),
        (put("carried", 0, "dtype", ["F32"]), "carried 'norm.running_mean' has no place"),
        (put("carried", 0, "bytes", 4), "carried 'norm.running_mean' has no place"),
        (put("carried", 0, "offset", -64), "carried 'norm.running_mean' has no place"),
        (put("tensors", ["head.weight"]), "tensors are not 4 names"),
        (put("train", []), "train is no object"),
        (put("delta", "delta"), "delta is no object"),
        (put("delta", "method", "tinytl-b"), "delta does not name its method"),
        (put("delta", "backbone", None), "delta does not name its backbone"),
        (put("delta", "extra", None), "delta has an extra that is no object"),
        (put("delta", "classes", 3), "delta does not name its 3 classes"),
        (put("delta", "classes", ["a", "b"]), "delta does not name its 3 classes"),
        (put("delta", "classes", [[], [], []]), "delta does not name its 3 classes"),
        (put(*LOOKS, None), "delta has no preprocessing"),
        (lambda meta: meta["delta"].pop("preprocessing"), "delta has no preprocessing"),
        (put(*LOOKS, "mean", 0.5), "mean is not 3 numbers"),
        (put(*LOOKS, "crop_fraction", "0.9"), "crop_fraction is not above 0"),
        (put(*LOOKS, "interpolation", {}), "interpolation is no name"),
        (put(*LOOKS, "resolution", 32), "resolution is not that of the 16 x 16 pixels"),
        (put(*LOOKS, "resolution", 16.5), "resolution is not that of the 16 x 16 pixels"),
    ],
)
def test_a_foreign_meta_is_one_line(
    run: Any,
    change: Any,
    message: str,
    program: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Foreign(StandIn):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            meta = self.meta
            change(meta)
            self._text = json.dumps(meta).encode()

    monkeypatch.setattr(executor, "Executor", Foreign)
    for words in (
        ("train", program, photos, "--out", tmp_path / "run"),
        ("evaluate", program, photos),
        ("predict", program, photos),
        ("info", program),
        ("info", program, "--json"),
    ):
        done = run(*words)
        assert (done.status, done.out, done.error.count("\n")) == (2, "", 1)
        assert message in done.error
        assert "compile it again" in done.error
    assert not (tmp_path / "run").exists()


def test_a_reader_that_went_away_is_no_bug(program: Path, photos: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["predict", str(program), str(photos)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.stand_in", *arguments],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_it_learned_is_a_delta_of_the_lab(run: Any, program: Path, photos: Path, tmp_path: Path) -> None:
    run("train", program, photos, "--out", tmp_path / "run")
    assert load_delta(tmp_path / "run" / "delta.safetensors").backbone == "stand-in"
