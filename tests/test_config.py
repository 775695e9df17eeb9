"""A run's options in a file: read with one clear line for what cannot be, written so that the run can be repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytl.config import FILE, OPTIONS, config_text, read_config, write_config
from tinytl.config import settings as made_of
from tinytl.errors import InputError, RunError
from tinytl.spec import FitOptions, RunOptions, TrainSpec

from .command_line import QUICK, tinytl
from .photographs import make_photographs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("config") / "run"
    done = tinytl("train", photos, *QUICK, "--method", "tinytl-b", "--lr", "1.1e-3", "--seed", "3", "--out", out, "-q")
    assert done.status == 0, done.err
    return out


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


def back(folder: Path, spec: TrainSpec, options: RunOptions) -> tuple[TrainSpec, RunOptions]:
    write_config(folder / FILE, spec, options)
    return made_of(read_config(folder / FILE))


def test_what_is_read(tmp_path: Path) -> None:
    text = '\ufeff# mine\nphotos = "ph\\u00f6tos"\nlr = 1\nbatch-size = 4\ncache = "1GiB"\nflip = false\nout = "x"\n'
    values = read(tmp_path, text)
    expected = {"photos": "phötos", "lr": 1.0, "batch_size": 4, "cache": "1GiB", "flip": False, "out": "x"}
    assert values == expected
    spec, options = made_of(values)
    assert (spec.photos, spec.batch_size, spec.flip, options.cache_bytes) == ("phötos", 4, False, 2**30)
    assert type(spec.fit.lr) is float


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
floats = st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True)


@settings(max_examples=80, deadline=None)
@given(
    photos=texts,
    weights=st.none() | texts.filter(lambda text: text.strip().lower() != "none"),
    resolution=st.none() | st.integers(32, 10**6),
    fraction=floats,
    flip=st.booleans(),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**63 - 1),
    seconds=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    cache=st.integers(0, 2**63 - 1) | st.sampled_from(["256MB", "1.5 GiB"]),
)
def test_what_is_written_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    photos: str,
    weights: str | None,
    resolution: int | None,
    fraction: float,
    flip: bool,
    lr: float,
    seed: int,
    seconds: float | None,
    cache: int | str,
) -> None:
    spec = TrainSpec(
        photos,
        weights=weights,
        resolution=resolution,
        val_fraction=fraction,
        flip=flip,
        fit=FitOptions(lr=lr, seed=seed),
    )
    options = RunOptions(checkpoint_seconds=seconds, cache=cache)
    assert back(tmp_path_factory.getbasetemp(), spec, options) == (spec, options)


def test_every_option_is_written_out(tmp_path: Path) -> None:
    spec, options = TrainSpec("photos"), RunOptions()
    text = config_text(spec, options)
    for name, entry in OPTIONS.items():
        if name != "out":
            assert f"{name} =" in text
            assert f"# {entry.help}" in text
    assert 'checkpoint_seconds = "none"' in config_text(spec, dataclasses.replace(options, checkpoint_seconds=None))
    assert back(tmp_path, spec, options) == (spec, options)


def test_a_name_that_is_no_unicode_is_said_and_the_rest_stands(tmp_path: Path) -> None:
    spec = TrainSpec(os.fsdecode(b"ph\xf6tos"), weights=os.fsdecode(b"w\xff"))
    write_config(tmp_path / FILE, spec, RunOptions())
    values = read_config(tmp_path / FILE)
    assert "photos" not in values
    assert values["epochs"] == 50
    assert "on the command line" in (tmp_path / FILE).read_text()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        write_config(tmp_path / "nowhere" / FILE, TrainSpec("photos"), RunOptions())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch = 5", r"line 1: 'epoch' is not an option that is known: did you mean 'epochs'\?"),
        ("\n\nbatch-sise = 5", "line 3: 'batch-sise' .* did you mean 'batch_size'"),
        ("[fit]\nepochs = 5", "line 1: 'fit' is not a table"),
        ("epochs.most = 5", "line 1: epochs is {'most': 5}, expected a whole number"),
        ("photos = 'x'\nepochs = 'five'", "line 2: epochs is 'five', expected a whole number of at least 1"),
        ("epochs = 5.0", "epochs is 5.0, expected a whole number"),
        ("epochs = true", "epochs is True, expected a whole number"),
        ("lr = true", "lr is True, expected a number"),
        ("lr = nan", "lr is nan, expected a number"),
        ("lr = 2020-01-01", "lr is datetime.date"),
        ("flip = 1", "flip is 1, expected true or false"),
        ("flip = 'true'", "flip is 'true', expected true or false"),
        ("photos = ''", "photos is '', expected a text"),
        ("photos = ['a', 'b']", "photos is .*, expected a text"),
        ("photos = 'none'\nresolution = 'None'", "line 2: resolution is 'None', expected a whole number"),
        ("epochs = 'none'", "epochs is 'none'"),
        ("norm = 'ln'", "line 1: unknown norm 'ln'"),
        ("cache = '1 sheep'", "cache is '1 sheep', expected a number of bytes or a size"),
        ("min-scale = 0", "line 1: min_scale is 0.0, expected a number above 0 and at most 1"),
        ("batch-size = 4\nbatch_size = 4", "'batch_size' is there twice"),
        ("resume = true", "line 1: 'resume' is an option of one command.*--resume"),
        ("config = 'other.toml'", "'config' is an option of one command"),
        ("epochs 5", "is no TOML: .*line 1"),
        ("epochs = 5\nepochs = 6", "is no TOML"),
        ("x = " + "[" * 5000, "is no TOML|not an option"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_file_and_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read(tmp_path, text)
    assert "run.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.toml").write_bytes(b"#" * (1 << 20) + b"#")
    for name, says in (
        ("nowhere.toml", "cannot read .*No such file"),
        (".", "cannot read .*directory"),
        ("a\0b", "cannot read"),
        ("binary.toml", "is not UTF-8"),
        ("large.toml", "more than 1048576 bytes"),
    ):
        with pytest.raises(InputError, match=says):
            read_config(tmp_path / name)


def test_settings_refuse_what_is_no_option() -> None:
    with pytest.raises(InputError, match="'epoch' is no option of a run: did you mean 'epochs'"):
        made_of({"photos": "photos", "epoch": 5})
    with pytest.raises(InputError, match="no photographs are given"):
        made_of({"epochs": 5})


def test_typed_wins_over_the_file_and_the_file_over_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Any] = []

    def stop(spec: TrainSpec, out: Path, *, options: RunOptions, **_: object) -> None:
        got.append((spec, out, options))
        raise InputError("enough")

    monkeypatch.setattr("tinytl.run.train", stop)
    file = tmp_path / "run.toml"
    file.write_text('photos = "a"\nout = "there"\nepochs = 7\nlr = 0.5\nflip = false\nworkers = 0\nresolution = 64\n')
    # what is typed wins also where it is the default
    tinytl("train", "--config", file, "b", "--lr", "0.0006", "--flip", "--resolution", "none")
    (spec, out, options) = got.pop()
    assert (spec.photos, spec.fit.epochs, spec.fit.lr, spec.flip, spec.resolution) == ("b", 7, 6e-4, True, None)
    assert (str(out), options.workers, spec.batch_size) == ("there", 0, 8)
    tinytl("train", "--config", file, "--out", "elsewhere")
    (spec, out, options) = got.pop()
    assert (spec.photos, spec.fit.lr, spec.flip, str(out)) == ("a", 0.5, False, "elsewhere")


def bits(out: Path) -> str:
    return hashlib.sha256((out / "delta.safetensors").read_bytes()).hexdigest()


def test_a_run_is_repeated_from_its_own_file(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = tinytl("train", "--config", run / FILE, "--out", again, "--quiet")
    assert done.status == 0, done.err
    assert bits(again) == bits(run)
    assert (again / FILE).read_bytes() == (run / FILE).read_bytes()
    other = tmp_path / "other"
    assert tinytl("train", "--config", run / FILE, "--out", other, "--seed", "4", "--quiet").status == 0
    assert bits(other) != bits(run)


def test_resume_needs_only_the_runs_folder(run: Path) -> None:
    before = bits(run)
    done = tinytl("train", "--resume", "--out", run)
    assert done.status == 0, done.err
    assert f"options that are not given are those of {run / FILE}" in done.err
    assert bits(run) == before


def test_a_resumed_run_with_other_settings_is_refused_by_name(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    line = tinytl("train", "--resume", "--out", run, "--epochs", "2", "--quiet").line
    assert "epochs" in line
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_folder_with_a_run_is_not_written_into_by_repeating(run: Path) -> None:
    assert "holds a run already" in tinytl("train", "--config", run / FILE, "--out", run).line
