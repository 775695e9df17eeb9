"""The executor against the interpreter, tensor by tensor: every instruction of a step and of an evaluation.

The interpreter computes in float64 from what the executor holds: after each instruction what the executor made takes
the place of the interpreter's, so that an instruction answers for its own error alone. Tolerances are relative to the
largest value of the tensor: 1e-5 for what an instruction makes, 1e-4 for sums over images and pixels, to which more is
added. A bit of a mask may differ where the activation's input lies on its edge to that tolerance, a winner of a pool
where two pixels are equal, a code of 8 bits by one.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tinytl.backbones import BACKBONES, load
from tinytl.backbones._inverted_residual import InvertedResidualNet
from tinytl.compiler.again import stretches
from tinytl.compiler.arena import lay_out
from tinytl.compiler.differentiate import training_program
from tinytl.compiler.file import read_program
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.program import Instruction
from tinytl.compiler.step_options import StepOptions
from tinytl.compiler.tiles import early_ranges, tiled
from tinytl.errors import InputError
from tinytl.methods import METHODS
from tinytl.runtime import Executor

from .native import needs_executor, photographs, put, value, written
from .pairs import pairs
from .test_adapt import enliven_
from .test_interpreter_steps import BLOCKS, CLASSES, SIDE, Pair, adapted

pytestmark = needs_executor

MADE, SUMMED = 1e-5, 1e-4
LB = "tinytl-l+b"
OPTIONS = StepOptions(batch=5, micro_batch=2, evaluate_images=3)


def small(norm: str, method: str, head: int = 32, pack: tuple[int, bool] | None = None, drop: float = 0.0) -> Pair:
    """A network of three blocks, in float32 as a file holds it."""
    torch.manual_seed(0)
    model = enliven_(InvertedResidualNet(BLOCKS, head_channels=head, num_classes=CLASSES, norm=norm))  # type: ignore[arg-type]
    return adapted(model, METHODS[method], BACKBONES["proxylessnas_mobile"].preprocessing, SIDE, pack, drop)


class Lockstep:
    """An executor and the interpreter that follows it."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        self.executor = Executor(path, threads=threads)
        self.program = read_program(path)
        self.interpreter = Interpreter(self.program)
        self.compared: set[str] = set()

    def step(self, count: int, seed: int = 0) -> None:
        """One step on random images; then its evaluation."""
        program = self.program
        assert program.metrics is not None
        assert program.step_count is not None
        images, labels = photographs(self.executor, count, seed)
        self.interpreter.load(images, labels.long())
        number = torch.tensor(self.executor.steps + 1)
        put(self.executor, program.step_count, number)
        self.interpreter.set_tensor(program.step_count, number)
        put(self.executor, program.metrics, torch.zeros(2, dtype=torch.float64))
        self._stream("begin", 0, min(program.micro_batch, count), count, seed)
        for first in range(0, count, program.micro_batch):
            self._stream("micro", first, min(program.micro_batch, count - first), count, seed)
        self._stream("finish", 0, min(program.micro_batch, count), count, seed)
        for first in range(0, count, program.evaluate_images):
            self._stream("evaluate", first, min(program.evaluate_images, count - first), count, seed)

    def _stream(self, stream: str, first: int, images: int, count: int, seed: int) -> None:
        for at, end in self.program.runs(stream):
            if (at, end) in (self.program.tiles if stream == "micro" else ()):
                self._tile(at, end, first, images, count, seed)
                continue
            one = self.program.streams[stream][at]
            before = {n: self._held(n, first + images) for n in one.writes() if n in self.interpreter._alive}
            for who in (self.executor, self.interpreter):
                who.run(stream, at, end, first=first, images=images, count=count, lr=0.01, seed=seed)
            for (name, mode, _), number in zip(one.kind.operands, one.operands, strict=True):
                if number is None or mode == "in":
                    continue
                self._compare(one, f"{stream} {at} {one.op} {name}", number, mode, first, images, before.get(number))
            self.compared.add(one.op)

    def _tile(self, at: int, end: int, first: int, images: int, count: int, seed: int) -> None:
        """What is left of a range that runs in tiles: each micro-batch's parts, and the sums."""
        for who in (self.executor, self.interpreter):
            who.run("micro", at, end, first=first, images=images, count=count, lr=0.01, seed=seed)
        compared = set()
        for one in self.program.streams["micro"][at:end]:
            for (name, mode, _), number in zip(one.kind.operands, one.operands, strict=True):
                left = number is not None and self.program.tensors[number].scope != "tile"
                if number is None or mode == "in" or not left or number not in self.interpreter._alive:
                    continue
                where = f"micro {at} to {end} {one.op} {name}"
                self._compare(one, where, number, "add", first, images, None)
                compared.add(number)
            self.compared.add(one.op)
        assert compared

    def _held(self, number: int, images: int) -> Tensor:
        return value(self.executor, self.program, number, images)

    def _compare(
        self, one: Instruction, where: str, number: int, mode: str, first: int, images: int, before: Tensor | None
    ) -> None:
        tensor = self.program.tensors[number]
        whole = first + images if tensor.scope == "batch" else images
        found, expected = self._held(number, whole), self.interpreter.tensor(number)
        if tensor.scope == "batch":
            expected = expected[:whole]  # behind them lies what an earlier batch left
        assert found.shape == expected.shape, where
        if tensor.dtype == "bits":
            self._compare_bits(one, where, found, expected, images)
        elif tensor.dtype == "u8" and one.op == "max_pool":
            assert (found == expected).float().mean() >= 0.999, where
        elif tensor.dtype == "u8":
            assert (found.int() - expected.int()).abs().max() <= 1, where
        else:
            assert found.isfinite().all(), where
            summed = mode == "add" or one.op in ("conv_dw", "gate_grad", "group_norm_grad", "standardize_grad")
            scale = max(float(expected.abs().max()), float(before.abs().max()) if before is not None else 0.0, 1e-30)
            error = float((found.double() - expected.double()).abs().max()) / scale
            assert error <= (SUMMED if summed else MADE), f"{where} ({tensor.name}): {error:.2e}"
        held = self.interpreter._values[number]
        held[: len(found)] = found.to(held.dtype)

    def _compare_bits(self, one: Instruction, where: str, found: Tensor, expected: Tensor, images: int) -> None:
        differ = found != expected
        if not differ.any():
            return
        assert one.op != "dropout", where
        made = one.operand("y")
        assert made is not None
        y = self._held(made, images)
        edges = torch.zeros_like(y, dtype=torch.bool)
        for edge in (one.attributes["lo"], one.attributes["hi"]):
            if math.isfinite(edge):
                edges |= (y - edge).abs() <= MADE * max(float(y.abs().max()), abs(edge))
        channels = y.shape[-1]
        bits = torch.stack([((found ^ expected) >> bit) & 1 for bit in range(8)], -1).flatten(-2)[..., :channels].bool()
        assert not (bits & ~edges).any(), where


def hold_together(pair: Pair, options: StepOptions, folder: Path, steps: int = 2, threads: int = 0) -> Lockstep:
    path = written(lay_out(training_program(pair.captured, options), options.threads), folder / "program.ttl")
    lockstep = Lockstep(path, threads)
    for step in range(steps):
        lockstep.step(options.batch - step % 2, step)
    lockstep.executor.close()
    return lockstep


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, norm: str, tmp_path: Path) -> None:
    hold_together(small(norm, method), OPTIONS, tmp_path)


VARIANTS: dict[str, dict[str, Any]] = {
    "one piece": {"micro_batch": 5},
    "one by one": {"micro_batch": 1},
    "nothing fused": {"fuse": False},
    "updates in backward": {"micro_batch": 5, "updates": "backward"},
    "decay": {"weight_decay": 0.05, "betas": (0.8, 0.99), "eps": 1e-6},
    "sgd": {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.01},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "label_smoothing": 0.0},
}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_step(variant: str, again: bool, tmp_path: Path) -> None:
    pair = small("gn" if variant in ("one by one", "decay") else "bn", LB)
    recompute = frozenset(stretches(pair.captured)) if again else frozenset()
    hold_together(pair, dataclasses.replace(OPTIONS, recompute=recompute, **VARIANTS[variant]), tmp_path)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("images", [1, 2])
def test_tiles(images: int, norm: str, again: bool, tmp_path: Path) -> None:
    """The last micro-batch, and the last tile of each, are smaller."""
    pair = small(norm, LB, drop=0.3)
    recompute = frozenset(stretches(pair.captured)) if again else frozenset()
    options = dataclasses.replace(OPTIONS, micro_batch=3, recompute=recompute)
    program = training_program(pair.captured, options)
    ranges = early_ranges(program, lambda one: 0 <= one.block < 2 or one.layer.startswith("stem"))
    program = lay_out(tiled(program, ranges, images), options.threads)
    lockstep = Lockstep(written(program, tmp_path / "program.ttl"))
    assert lockstep.program.tiles == program.tiles
    assert lockstep.program.tile_images == images
    for step in range(2):
        lockstep.step(options.batch - step, step)
    first, end = program.tiles[0]
    for cut in ((first + 1, end), (first, end - 1)):
        with pytest.raises(InputError, match=f"those from {first} to {end} run together, in tiles"):
            lockstep.executor.run("micro", *cut)
    lockstep.executor.close()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_state_of_8_bits(optimizer: str, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, optimizer=optimizer, optimizer_bits=8)
    lockstep = hold_together(small("bn", "ft-last", head=1024), options, tmp_path, steps=3)
    assert f"{optimizer}8" in lockstep.compared


@pytest.mark.parametrize("pack", [(8, False), (8, True), (16, False)], ids=["int8", "codebook", "half"])
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_packed_weights(norm: str, pack: tuple[int, bool], tmp_path: Path) -> None:
    lockstep = hold_together(small(norm, LB, pack=pack), OPTIONS, tmp_path)
    held = {tensor.dtype for tensor in lockstep.program.tensors if tensor.role == "constant"}
    assert held & {"i8", "u8", "f16"}


def test_dropout(tmp_path: Path) -> None:
    lockstep = hold_together(small("bn", LB, drop=0.3), OPTIONS, tmp_path)
    assert {"dropout", "dropout_grad"} <= lockstep.compared


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_whole_steps(norm: str, tmp_path: Path) -> None:
    """Five steps with nothing copied between the two: losses, and what training has learned."""
    path = written(lay_out(training_program(small(norm, LB).captured, OPTIONS)), tmp_path / "program.ttl")
    program = read_program(path)
    interpreter = Interpreter(program)
    with Executor(path) as executor:
        for step in range(5):
            images, labels = photographs(executor, OPTIONS.batch - step % 2, step)
            loss, _ = executor.step(len(images), 1e-3, seed=3)
            expected, _ = interpreter.step(images, labels.long(), 1e-3, 3)
            assert loss == pytest.approx(expected, rel=1e-3)
        learned = interpreter.learned()
        for number in program.trained:
            found = value(executor, program, number, 1).double().flatten().sort().values
            expected = learned[program.tensors[number].name].flatten().sort().values
            # Adam's first steps are as large for a gradient of rounding errors as for any other
            torch.testing.assert_close(found, expected, rtol=0, atol=5 * 1e-3, msg=program.tensors[number].name)
        images, _ = photographs(executor, 4, 9)
        found = torch.tensor(executor.evaluate(4)).reshape(4, -1).double()
        wanted = interpreter.evaluate(images)
        assert (found - wanted).abs().max() <= 1e-2 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "plain"])
def test_every_instruction_set(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYTL_ISA", isa)
    pair = small("gn", LB, pack=(8, False))
    path = written(lay_out(training_program(pair.captured, OPTIONS)), tmp_path / "program.ttl")
    try:
        with Executor(path) as executor:
            assert executor.isa == isa
    except InputError as error:
        pytest.skip(f"not on this machine: {error}")
    for norm in ("bn", "gn"):
        hold_together(small(norm, LB), OPTIONS, tmp_path, threads=1)
        hold_together(small(norm, "ft-full"), OPTIONS, tmp_path)
    hold_together(pair, OPTIONS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm", "method"), pairs(LB, "ft-full"))
def test_every_backbone(name: str, norm: str, method: str, tmp_path: Path) -> None:
    """One step at 48 pixels."""
    options = dataclasses.replace(OPTIONS, batch=2, micro_batch=2, evaluate_images=2)
    torch.manual_seed(1)
    backbone = load(name, pretrained=False, norm=norm, num_classes=CLASSES)  # type: ignore[arg-type]
    pair = adapted(enliven_(backbone.model), METHODS[method], backbone.preprocessing, 48)
    hold_together(pair, options, tmp_path, steps=1)
