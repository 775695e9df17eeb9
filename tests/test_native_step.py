"""The stand-alone program `tinytl-step`; and under the sanitizers, every family of networks and damaged files."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tinytl.backbones import load
from tinytl.compiler.again import stretches
from tinytl.compiler.arena import lay_out
from tinytl.compiler.differentiate import training_program
from tinytl.compiler.file import read_program
from tinytl.compiler.interpreter import Interpreter
from tinytl.methods import METHODS
from tinytl.runtime import _library

from .native import needs_compiler, needs_executor, rehashed, section, small_file, widest_isa, written
from .test_adapt import enliven_
from .test_interpreter_steps import CLASSES, Pair, adapted
from .test_native_programs import LB, OPTIONS, small

ROOT = Path(__file__).parents[1]


def step(*arguments: str | Path, program: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(program or _library.stand_alone()), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@needs_executor
def test_it_takes_the_steps_of_the_interpreter(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 6, 6, 3), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([0, 2, 1, 1, 0, 2], dtype=torch.int32)
    (tmp_path / "images").write_bytes(images.numpy().tobytes())
    (tmp_path / "labels").write_bytes(labels.numpy().tobytes())
    given = ("--images", tmp_path / "images", "--labels", tmp_path / "labels")
    done = step(path, *given, "--steps", "3", "--lr", "0.1", "--threads", "1", "--json", "--profile")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    interpreter = Interpreter(read_program(path))
    for at, loss in enumerate(found["losses"]):  # four at a time, again from the start when they end
        chosen = torch.arange(4 * at, 4 * at + 4) % 6
        expected, right = interpreter.step(images[chosen], labels[chosen].long(), 0.1)
        assert loss == pytest.approx(expected / 4, rel=1e-5)
        assert found["correct"][at] == right
    assert found["threads"] == 1
    assert found["arena_used_bytes"] == found["arena_planned_bytes"] - 256 * 1024  # of the second thread
    assert 0 < found["peak_rss_bytes"] < 50e6 or not sys.platform.startswith("linux")
    assert {part["op"] for part in found["profile"]} == {
        one.op for s in ("begin", "micro", "finish") for one in interpreter.program.streams[s]
    }


@needs_executor
def test_its_own_images_depend_on_the_seed_alone(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    losses = [json.loads(step(path, "--json", "--seed", seed).stdout)["losses"] for seed in ("0", "0", "1")]
    assert losses[0] == losses[1] != losses[2]
    assert "median of the rest" in step(path, "--profile").stdout


@needs_executor
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "usage: tinytl-step"),
        (["missing.ttl"], "missing.ttl: cannot be opened"),
        (["small.ttl", "--steps", "0"], "--steps 0: give a whole number from 1"),
        (["small.ttl", "--steps"], "--steps needs a value"),
        (["small.ttl", "--threads", "9"], "cannot run on 9 threads"),
        (["small.ttl", "--lr", "fast"], "--lr fast: give a number"),
        (["small.ttl", "--images", "missing"], "missing: cannot be opened"),
        (["small.ttl", "--images", "short"], "short: holds less than one item of 108 bytes"),
        (["small.ttl", "--labels", "labels"], "label 9 of image 0"),
        (["small.ttl", "more.ttl"], "unknown argument more.ttl"),
        (["small.ttl", "--lr", "1e300", "--steps", "9"], "is not finite"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_file(tmp_path)
    (tmp_path / "short").write_bytes(b"123")
    (tmp_path / "labels").write_bytes(struct.pack("<i", 9))
    monkeypatch.chdir(tmp_path)
    done = step(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinytl-step: ")
    assert expected in line


# ---------------------------------------------------------------- sanitizers

SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
RUN = ("--steps", "2", "--json")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tinytl-step`, built so that it ends where it leaves its memory or does what C++ leaves undefined.

    For the widest instruction set that this machine has, and for plain C++, whose accesses the compiler checks one by
    one, those to a part of a vector too, which elsewhere are instructions of their own.
    """
    folder = tmp_path_factory.mktemp("sanitized")
    cmake = (sys.executable, "-m", "cmake")
    widest = widest_isa()
    isas = widest if widest == "neon" else ";".join({"plain": None, widest: None})  # on ARM there is no plain
    options = ("-G", "Ninja", "-DTINYTL_SANITIZE=ON", "-DTINYTL_LAB=OFF", "-DCMAKE_BUILD_TYPE=Release")
    for command in (
        (*cmake, "-S", ROOT, "-B", folder, *options, f"-DTINYTL_ISAS={isas}"),
        (*cmake, "--build", folder, "--target", "tinytl-step", "--parallel", "2"),
    ):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            list(map(str, command)), env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "native" / "tinytl-step"


def possible_isas(program: Path, path: Path) -> list[str]:
    return [
        isa for isa in ("avx512", "avx2", "neon", "plain") if not step(path, program=program, TINYTL_ISA=isa).returncode
    ]


def assert_clean(program: Path, path: Path, **env: str) -> None:
    done = step(path, *RUN, program=program, **SANITIZERS, **env)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-6000:]


SMALL: dict[str, dict[str, Any]] = {
    "bn": {"norm": "bn", "method": LB},
    "gn": {"norm": "gn", "method": LB},
    "full bn": {"norm": "bn", "method": "ft-full"},
    "full gn": {"norm": "gn", "method": "ft-full"},
    "norms": {"norm": "gn", "method": "ft-norm+last"},
    "int8": {"norm": "bn", "method": LB, "pack": (8, False)},
    "codebook": {"norm": "gn", "method": LB, "pack": (8, True)},
    "half": {"norm": "bn", "method": LB, "pack": (16, False)},
    "dropout": {"norm": "bn", "method": LB, "drop": 0.3},
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "one by one": {"micro_batch": 1},
    "updates in backward": {"micro_batch": 5, "updates": "backward"},
    "nothing fused": {"fuse": False},
    "momentum": {"optimizer": "sgd"},
}


def program_of(pair: Pair, folder: Path, again: bool = False, **options: Any) -> Path:
    recompute = frozenset(stretches(pair.captured)) if again else frozenset()
    chosen = dataclasses.replace(OPTIONS, recompute=recompute, **options)
    return written(lay_out(training_program(pair.captured, chosen)), folder / "program.ttl")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
def test_sanitizers_find_nothing(kind: str, checked: Path, tmp_path: Path) -> None:
    path = program_of(small(**SMALL[kind]), tmp_path)
    isas = possible_isas(checked, path)
    assert isas
    for isa in isas:
        assert_clean(checked, path, TINYTL_ISA=isa)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("how", OTHERWISE)
def test_sanitizers_find_nothing_however_it_is_carried_out(how: str, checked: Path, tmp_path: Path) -> None:
    assert_clean(checked, program_of(small("gn", LB), tmp_path, again=True, **OTHERWISE[how]))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bits", ["adam", "sgd"])
def test_sanitizers_find_nothing_in_a_state_of_8_bits(bits: str, checked: Path, tmp_path: Path) -> None:
    assert_clean(checked, program_of(small("bn", "ft-last", head=1024), tmp_path, optimizer=bits, optimizer_bits=8))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm", "bits"),
    [
        ("resnet50", "bn", 32),
        ("mobilenet_v3_large", "bn", 32),
        ("proxylessnas_mobile", "gn", 32),
        ("efficientnet_lite0", "gn", 32),
        ("mcunet_5fps", "bn", 8),
    ],
)
def test_sanitizers_find_nothing_in_whole_networks(
    name: str, norm: str, bits: int, checked: Path, tmp_path: Path
) -> None:
    """One network of each kind of block, at few pixels: an odd number of them at most strides."""
    torch.manual_seed(1)
    backbone = load(name, pretrained=False, norm=norm, num_classes=CLASSES)  # type: ignore[arg-type]
    pack = None if bits == 32 else (bits, False)
    pair = adapted(enliven_(backbone.model), METHODS[LB], backbone.preprocessing, 40, pack)
    assert_clean(checked, program_of(pair, tmp_path, batch=2, micro_batch=2, evaluate_images=2))


@needs_compiler
@pytest.mark.slow
def test_sanitizers_find_nothing_in_damaged_files(checked: Path, tmp_path: Path) -> None:
    """Words of CODE changed, under a hash that is right: refused in one line, or run within their memory."""
    content = small_file(tmp_path).read_bytes()
    offset, size = section(content, b"CODE")
    generator = random.Random(1)
    path = tmp_path / "changed.ttl"
    refused = 0
    for _ in range(400):
        at = offset + 8 * generator.randrange(size // 8)
        (old,) = struct.unpack_from("<q", content, at)
        new = generator.choice((old + 1, old - 1, 0, -1, 2, 7, 64, 1 << 20))
        path.write_bytes(rehashed(content[:at] + struct.pack("<q", new) + content[at + 8 :]))
        done = step(path, *RUN, program=checked, **SANITIZERS)
        assert done.returncode in (0, 2), f"{at}: {old} -> {new}: {done.stderr[-4000:]}"
        if done.returncode == 2:
            assert len(done.stderr.splitlines()) == 1, f"{at}: {old} -> {new}: {done.stderr[-4000:]}"
            refused += 1
    assert 50 < refused < 400
