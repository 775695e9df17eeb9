"""`tinytl compile` and `tinytl inspect`: from photographs, a configuration, a run or a number of classes to a file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import small_run
from tests.command_line import tinytl
from tests.native import rehashed
from tests.photographs import make_photographs
from tinytl.backbones import BACKBONES
from tinytl.compiler.file import read_program
from tinytl.config import write_config
from tinytl.delta import load_delta
from tinytl.run import train
from tinytl.spec import RunOptions

SMALL = ("--backbone", small_run.NAME, "--no-pretrained", "--resolution", 32, "--batch-size", 4)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    BACKBONES[small_run.NAME] = small_run.entry()
    yield
    del BACKBONES[small_run.NAME]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the lab."""
    folder = tmp_path_factory.mktemp("finished")
    spec = small_run.make_spec(folder / "photos")
    train(spec, folder / "run")
    return folder / "run"


def test_of_a_number_of_classes(tmp_path: Path) -> None:
    done = tinytl("compile", "--classes", 12, *SMALL, "-o", tmp_path / "a.ttl", "--json")
    found = done.json
    assert found["classes"] == [f"{n:02d}" for n in range(12)]
    assert (found["batch"], found["micro_batch"], found["resolution"], found["threads"]) == (4, 1, 32, 2)
    assert (
        found["total_bytes"]
        == found["arena_bytes"] + found["constant_bytes"]
        == found["bytes"]["arena"] + found["bytes"]["constant"]
    )
    assert "statistics are not measured" in found["notes"][0]
    assert found["file_bytes"] == (tmp_path / "a.ttl").stat().st_size
    program = read_program(tmp_path / "a.ttl")
    assert program.meta["delta"]["extra"] == {
        "pretrained": False,
        "base_seed": 0,
        "frozen_bits": 32,
        "codebook": False,
    }
    assert program.meta["train"]["lr"] == 6e-4
    again = tinytl("compile", "--classes", 12, *SMALL, "-o", tmp_path / "b.ttl", "--json")
    assert again.json["sha256"] == found["sha256"]
    assert (tmp_path / "a.ttl").read_bytes() == (tmp_path / "b.ttl").read_bytes()


def test_the_same_of_photographs_and_of_a_configuration(tmp_path: Path) -> None:
    spec = small_run.make_spec(tmp_path / "photos")
    write_config(tmp_path / "config.toml", spec, RunOptions())
    by_file = tinytl("compile", tmp_path / "config.toml", "-o", tmp_path / "a.ttl", "--json").json
    typed = ("--val-fraction", 0.25, "--color", "--epochs", 2, "--lr", 3e-3, "--seed", 1, "--micro-batch", 2)
    by_hand = tinytl("compile", spec.photos, *SMALL, *typed, "-o", tmp_path / "b.ttl", "--json").json
    assert by_file["sha256"] == by_hand["sha256"]
    assert by_file["micro_batch"] == 2
    assert by_file["train"]["epochs"] == 2
    assert by_file["train"]["color"] is True
    assert "photos" not in by_file["train"]
    carried = {entry["key"]: entry["values"] for entry in read_program(tmp_path / "a.ttl").meta["carried"]}
    variances = [value for key, value in carried.items() if key.endswith("running_var")]
    assert variances
    assert not any(torch.equal(value, torch.ones_like(value)) for value in variances)  # calibrated


def test_a_finished_run_is_gone_on_with(finished: Path, tmp_path: Path) -> None:
    found = tinytl("compile", finished, "-o", tmp_path / "a.ttl", "--json").json
    assert found["train"]["lr"] == 3e-3
    program = read_program(tmp_path / "a.ttl")
    delta = load_delta(finished / "delta.safetensors")
    learned = {entry["key"]: entry for entry in program.meta["learned"]}
    carried = {entry["key"]: entry["values"] for entry in program.meta["carried"]}
    assert {*learned, *carried} == set(delta.tensors)
    for key, entry in learned.items():
        value = program.values[entry["tensor"]]
        wanted = delta.tensors[key]
        if entry["layout"] == "OHWI":
            wanted = wanted.permute(0, 2, 3, 1)
        elif entry["layout"] == "HWC":
            wanted = wanted[:, 0].permute(1, 2, 0)
        assert torch.equal(value.reshape(-1), wanted.reshape(-1)), key
    for key, value in carried.items():
        assert torch.equal(value, delta.tensors[key])
    assert program.meta["delta"]["base_hash"] == delta.base_hash
    assert tuple(program.meta["delta"]["classes"]) == delta.classes
    assert program.meta["delta"]["extra"] == dict(delta.extra)
    alone = tinytl("compile", finished / "delta.safetensors", "--batch-size", 2, "--json", "-o", tmp_path / "b.ttl")
    assert alone.json["batch"] == 2
    packed = tinytl("compile", finished, "--frozen-bits", 8, "--json", "-o", tmp_path / "c.ttl").json
    assert packed["constant_bytes"] < found["constant_bytes"]
    assert read_program(tmp_path / "c.ttl").meta["delta"]["extra"]["frozen_bits"] == 8


def test_inspect_tells_what_compile_told(tmp_path: Path) -> None:
    path = tmp_path / "a.ttl"
    done = tinytl("compile", "--classes", "cat,dog", *SMALL, "--norm", "gn", "--frozen-bits", 8, "-o", path)
    assert done.status == 0, done.err
    told = tinytl("compile", "--classes", "cat,dog", *SMALL, "--norm", "gn", "--frozen-bits", 8, "-o", path, "--json")
    found = tinytl("inspect", path, "--json").json
    assert {key: value for key, value in told.json.items() if key not in ("sha256", "notes")} == found
    assert found["classes"] == ["cat", "dog"]
    whole = tinytl("inspect", path, "--json", "--instructions").json
    assert len(whole["instruction_list"]) == sum(found["instructions"].values())
    ends = [row["offset"] + row["bytes"] for row in whole["tensors"]]
    assert max(ends) <= found["arena_bytes"]
    text = tinytl("inspect", path, "--instructions", "--picture", tmp_path / "arena.png")
    assert (tmp_path / "arena.png").read_bytes().startswith(b"\x89PNG")
    for word in ("frozen weights", "run again in backward", "group_norm_grad", "2 classes", "peak is at"):
        assert word in text.out
    json.dumps(whole)


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, finished: Path) -> None:
    photos = make_photographs(tmp_path / "photos", each=3, size=(40, 36))
    out = tmp_path / "out"
    out.mkdir()
    o = ("-o", out / "a.ttl")
    assert "nothing is given to compile for" in tinytl("compile", *o).line
    assert "and --classes are given" in tinytl("compile", photos, "--classes", 3, *o).line
    assert "classes is 'x'" in tinytl("compile", "--classes", "x", *o).line
    assert "classes is 100001, expected 1 to 100,000" in tinytl("compile", "--classes", 100_001, *o).line
    many = "9" * 5000  # more digits than Python reads
    assert "a number of 5,000 digits, expected 1 to 100,000" in tinytl("compile", "--classes", many, *o).line
    assert "is a folder: name the file" in tinytl("compile", "--classes", 3, *SMALL, "-o", out).line
    assert "cannot write" in tinytl("compile", "--classes", 3, *SMALL, "-o", out / "no" / "a.ttl").line
    line = tinytl("compile", "--classes", 3, *SMALL, "--memory-budget", "1kB", *o).line
    assert "memory_budget is 1,000 bytes: the least that a compiled step takes here is" in line
    least = line.split("here is ")[1].split(" bytes")[0].replace(",", "")
    fits = tinytl("compile", "--classes", 3, *SMALL, "--memory-budget", least, "-o", tmp_path / "fits.ttl", "--json")
    assert fits.json["total_bytes"] <= int(least)
    assert "unknown backbone 'proxyles'" in tinytl("compile", "--classes", 3, "--backbone", "proxyles", *o).line
    assert "micro_batch is 9" in tinytl("compile", "--classes", 3, *SMALL, "--micro-batch", 9, *o).line
    assert "no option '--optimiser'" in tinytl("compile", "--classes", 3, "--optimiser", "sgd", *o).line
    assert "norm is given" in tinytl("compile", finished, "--norm", "gn", *o).line
    assert "seed is 7" in tinytl("compile", finished, "--seed", 7, *o).line
    assert "cannot read" in tinytl("compile", tmp_path / "no.toml", *o).line
    assert not list(out.iterdir())
    assert "cannot be read" in tinytl("inspect", tmp_path / "no.ttl").line
    content = bytearray((tmp_path / "fits.ttl").read_bytes())
    content[-1] ^= 1
    (tmp_path / "bad.ttl").write_bytes(content)
    assert "SHA-256" in tinytl("inspect", tmp_path / "bad.ttl").line
    content[8] = 2
    (tmp_path / "bad.ttl").write_bytes(content)
    line = tinytl("inspect", tmp_path / "bad.ttl").line
    assert line.endswith("of version 2, and this tinytl reads 1; upgrade tinytl (pip install --upgrade tinytl)")
    content = bytearray((tmp_path / "fits.ttl").read_bytes())
    struct.pack_into("<Q", content, 96, struct.unpack_from("<Q", content, 96)[0] + 4)  # where CODE begins
    struct.pack_into("<Q", content, 104, struct.unpack_from("<Q", content, 104)[0] - 4)
    (tmp_path / "bad.ttl").write_bytes(rehashed(bytes(content)))
    assert "its CODE lies at" in tinytl("inspect", tmp_path / "bad.ttl").line
    assert "cannot write" in tinytl("inspect", tmp_path / "fits.ttl", "--picture", tmp_path / "no" / "a.png").line
