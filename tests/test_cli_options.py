"""An option is described once: the command line's, the file's and the dataclasses' cannot drift apart."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.commands import COMMANDS
from tinytl._options import Option, check, number_of_bytes, options_of, parse
from tinytl.backbones import BACKBONES
from tinytl.cli import completion
from tinytl.config import OPTIONS
from tinytl.data.named import DATASETS
from tinytl.errors import InputError, UnknownNameError
from tinytl.memory import StepSpec
from tinytl.methods import METHODS
from tinytl.spec import FitOptions, RunOptions, TrainSpec

from .command_line import tinytl

# what is about one command, and not about the run that it makes
OF_THE_COMMAND = {"config", "resume", "as_json", "quiet", "help"}


def fields() -> dict[str, dataclasses.Field[Any]]:
    classes = (TrainSpec, FitOptions, RunOptions)
    found = [field for kind in classes for field in dataclasses.fields(kind) if field.name != "fit"]
    assert len({field.name for field in found}) == len(found), "two fields of one name would be one option"
    return {field.name: field for field in found}


def test_every_field_is_an_option_of_the_same_name_and_default_and_the_other_way_round() -> None:
    parameters = {parameter.name: parameter for parameter in COMMANDS["train"].params}
    assert set(parameters) == {*fields(), "out", *OF_THE_COMMAND} - {"help"}
    for name, field in fields().items():
        parameter = parameters[name]
        if field.default is dataclasses.MISSING:
            assert parameter.param_type_name == "argument"
            continue
        assert parameter.opts == ["--" + name.replace("_", "-")]
        default = parameter.default
        assert (default if default is None or isinstance(default, bool) else parse(OPTIONS[name], default)) == (
            str(field.default) if OPTIONS[name].kind == "bytes" and field.default is not None else field.default
        )
        assert parameter.help == field.metadata["option"]["help"]


def test_what_is_typed_arrives_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []

    def stop(spec: TrainSpec, out: object, *, options: RunOptions, **_: object) -> None:
        got.append((spec, str(out), options))
        raise InputError("enough")

    monkeypatch.setattr("tinytl.run.train", stop)
    tinytl("train", "somewhere")
    assert got.pop() == (TrainSpec("somewhere"), "runs/train", RunOptions())
    values = {
        "photos": "p",
        "backbone": "proxylessnas_mobile",
        "method": "tinytl-b",
        "last_blocks": 1,
        "norm": "gn",
        "weights": None,
        "pretrained": False,
        "resolution": 96,
        "batch_size": 6,
        "val_fraction": 0.25,
        "split_seed": 3,
        "min_scale": 0.5,
        "flip": False,
        "color": True,
        "calibrate": False,
        "epochs": 7,
        "lr": 0.0025,
        "weight_decay": 1e-4,
        "label_smoothing": 0.7,
        "micro_batch": 2,
        "optimizer": "sgd",
        "momentum": 0.8,
        "optimizer_bits": 8,
        "update": "end",
        "frozen_bits": 8,
        "codebook": True,
        "memory_budget": "48 MB",
        "engine": "lab",
        "report": True,
        "seed": 5,
        "warmup_epochs": 2,
        "workers": 0,
        "threads": 1,
        "checkpoint_steps": 9,
        "checkpoint_seconds": None,
        "cache": "1.5 MB",
        "strict": True,
        "tensorboard": True,
        "out": "there",
    }
    assert set(values) == set(OPTIONS)
    words: list[object] = [values["photos"]]
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name != "photos":
            words += [f"--{flag}", "none" if value is None else value]
    tinytl("train", *words)
    spec, out, options = got.pop()
    arrived = {**vars(spec), **vars(spec.fit), **vars(options), "out": out}
    del arrived["fit"]
    assert arrived == values
    assert options.cache_bytes == 1_500_000


def test_profile_has_an_option_for_every_field_of_a_step() -> None:
    names = {field.name for field in dataclasses.fields(StepSpec)} - {"lean"}
    assert names <= {parameter.name for parameter in COMMANDS["profile"].params}


def test_commands_share_the_words_for_what_they_share() -> None:
    reporting = {name: {p.name: p.opts for p in command.params} for name, command in COMMANDS.items()}
    for name, options in reporting.items():
        assert options["as_json"] == ["--json"], name
    for name in ("train", "evaluate"):
        assert reporting[name]["quiet"] == ["--quiet", "-q"]


@pytest.mark.parametrize(
    ("value", "count"),
    [(0, 0), (17, 17), ("17", 17), ("256MB", 256_000_000), ("1 GiB", 2**30), ("1.5kb", 1500), (" 2 KiB ", 2048)],
)
def test_sizes(value: object, count: int) -> None:
    assert number_of_bytes("cache", value) == count
    assert RunOptions(cache=value).cache_bytes == count  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "", "MB", "-1MB", "1.5", "1.5B", "1e3", "256 MB of it", "٣MB"])
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(InputError, match=r"cache is .* expected a number of bytes or a size such as 256MB"):
        RunOptions(cache=value)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (TrainSpec, "photos", ""),
        (TrainSpec, "photos", 5),
        (TrainSpec, "backbone", None),
        (TrainSpec, "last_blocks", -1),
        (TrainSpec, "weights", 3),
        (TrainSpec, "pretrained", "no"),
        (TrainSpec, "resolution", 31),
        (TrainSpec, "resolution", "64"),
        (TrainSpec, "batch_size", 0),
        (TrainSpec, "val_fraction", 0.0),
        (TrainSpec, "val_fraction", 1.0),
        (TrainSpec, "min_scale", 0),
        (TrainSpec, "min_scale", 1.01),
        (TrainSpec, "flip", 1),
        (RunOptions, "workers", -1),
        (RunOptions, "threads", 0),
        (RunOptions, "threads", 1025),
        (RunOptions, "checkpoint_steps", 0.5),
        (RunOptions, "checkpoint_seconds", float("nan")),
        (RunOptions, "strict", "yes"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range(kind: type, name: str, value: object) -> None:
    good = {} if name == "photos" or kind is RunOptions else {"photos": "photos"}
    with pytest.raises(InputError, match=rf"^{name} is .*, expected \w+ ") as caught:
        kind(**{**good, name: value})
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_ends_of_a_range() -> None:
    TrainSpec("photos", resolution=32, min_scale=1, last_blocks=0)
    FitOptions(seed=2**63 - 1, label_smoothing=0)
    with pytest.raises(InputError, match=r"at least 0 and below 2\*\*63"):
        FitOptions(seed=2**63)


def test_parse_reads_words_and_refuses_others() -> None:
    switch, count = Option("flip", "bool", True, ""), Option("threads", "int", None, "", optional=True, least=1)
    assert [parse(switch, word) for word in ("true", "NO", "on", "off", True)] == [True, False, True, False, True]
    assert [parse(count, word) for word in ("3", "None")] == [3, None]
    for entry, word in ((switch, "perhaps"), (count, "3.5"), (count, "")):
        with pytest.raises(InputError, match=f"{entry.name} is '{word}', expected"):
            parse(entry, word)
    with pytest.raises(UnknownNameError, match="did you mean 'adam'"):
        check(OPTIONS["optimizer"], "adan")


def test_the_docstrings_tell_the_options() -> None:
    for kind in (TrainSpec, FitOptions, RunOptions):
        for entry in options_of(kind):
            assert f"{entry.name}: {entry.help}" in (kind.__doc__ or "")


@pytest.mark.parametrize(
    ("known", "library"),
    [(completion.BACKBONES, BACKBONES), (completion.METHODS, METHODS), (completion.DATASETS, DATASETS)],
)
def test_the_names_that_a_shell_completes_are_the_librarys(known: tuple[str, ...], library: dict[str, Any]) -> None:
    assert sorted(known) == sorted(library)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], {"train"}),
        (["train", "--check"], {"--checkpoint-steps", "--checkpoint-seconds"}),
        (["train", "--backbone", "proxylessnas_m"], {"proxylessnas_mobile"}),
        (["train", "--norm", ""], {"bn", "gn"}),
        (["train", "--optimizer", "a"], {"adam"}),
        (["train", "el"], {"elpv"}),
        (["profile", "--method", "ft-l"], {"ft-last"}),
    ],
)
def test_completion(words: list[str], expected: set[str]) -> None:
    bash = {"COMP_WORDS": " ".join(["tinytl", *words]), "COMP_CWORD": str(len(words))}
    done = tinytl(_TINYTL_COMPLETE="complete_bash", **bash)
    assert done.status == 0
    assert set(done.out.split()) == expected
    for shell in ("zsh", "fish"):
        asked = {"_TYPER_COMPLETE_ARGS": bash["COMP_WORDS"], "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        text = tinytl(_TINYTL_COMPLETE=f"complete_{shell}", **asked).out
        assert all(word in text for word in expected), shell


def test_completion_does_not_wait_for_pytorch() -> None:
    code = (
        "import atexit, os, sys; os.environ.update(_TINYTL_COMPLETE='complete_bash', COMP_CWORD='3', "
        "COMP_WORDS='tinytl train --backbone ef'); from tinytl.cli import main; "
        "atexit.register(lambda: print('torch' in sys.modules, 'numpy' in sys.modules)); main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "efficientnet_lite0" in done.stdout
    assert done.stdout.endswith("False False\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script(shell: str) -> None:
    # the shell is found by looking at the process above; this hook lets it be told instead
    code = "import sys; sys.argv[0] = 'tinytl'; from tinytl.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--show-completion", shell],
        env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert f"_TINYTL_COMPLETE=complete_{shell}" in done.stdout
