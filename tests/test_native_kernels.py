"""Every kernel of the executor against the interpreter in float64, one instruction at a time, for random shapes.

Each instruction runs on every instruction set of this machine, on one thread and on two: their results must be the
same bits. float32 is held to 1e-5 of the largest value (of what was there before, too, where something is added to
it). A bit of a mask may differ where the value lies on the activation's edge to that tolerance, a code of 8 bits by
one step.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinytl.compiler.arena import lay_out
from tinytl.compiler.file import write_program
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.liveness import IN_PLACE
from tinytl.compiler.op_table import OPS
from tinytl.compiler.program import Program
from tinytl.compiler.program import Tensor as Described
from tinytl.engine.block_code import BLOCK, blocks, code, encode
from tinytl.errors import TinyTLError
from tinytl.runtime import Executor

from .kernel_cases import CASES, Case, cases
from .native import needs_executor, put, value
from .one_instruction import NO_ACT, bits, program_of

pytestmark = needs_executor

ISAS = ("avx512", "avx2", "neon", "plain")


def runnable(case: Case, op: str, in_place: bool = False) -> tuple[Program, dict[str, int]]:
    """A laid out program of that instruction alone, and the numbers of its operands.

    `in_place`: what it makes lies where an input lies, if the op allows that and the input is there.
    """
    program = program_of(op, case.attributes, case.operands, case.images)
    numbers = {tensor.name: n for n, tensor in enumerate(program.tensors)}
    classes = case.operands["logits"].shape[-1] if op == "softmax_loss" else 1
    slots = (
        Described("images", "input", "u8", (1, 1, 3), "batch"),
        Described("answers", "activation", "f32", (1, 1, classes), "batch"),
        Described("step", "state", "i64", ()),
    )
    if op != "softmax_loss":
        slots += (Described("labels", "input", "i32", (), "batch"), Described("metrics", "metric", "f64", (2,)))
    names = {**numbers, **{slot.name: len(program.tensors) + n for n, slot in enumerate(slots)}}
    whole = dataclasses.replace(
        program,
        tensors=tuple(
            dataclasses.replace(tensor, scope="batch") if tensor.name == "labels" else tensor
            for tensor in (*program.tensors, *slots)
        ),
        images=names["images"],
        labels=names["labels"],
        logits=names["answers"],
        metrics=names["metrics"],
        step_count=names["step"],
        batch=max(case.images, case.scalars.get("count", 1)),
        evaluate_images=1,
        meta={"learned": [], "carried": [], "delta": {}, "train": {}},
    )
    laid_out = lay_out(whole, threads=2)
    if in_place and op in IN_PLACE:
        made, inputs = IN_PLACE[op]
        taken = next((name for name in inputs if name in case.operands), None)
        if taken is not None:
            tensors = list(laid_out.tensors)
            tensors[numbers[made]] = dataclasses.replace(tensors[numbers[made]], offset=tensors[numbers[taken]].offset)
            laid_out = dataclasses.replace(laid_out, tensors=tuple(tensors))
    return laid_out, numbers


def executed(program: Program, numbers: dict[str, int], case: Case, threads: int, folder: Path) -> dict[str, Tensor]:
    """What the executor makes of it: every operand that is written."""
    write_program(program, folder / "one.ttl")
    one = program.streams["micro"][0]
    with Executor(folder / "one.ttl", threads=threads) as executor:
        made = {program.tensors[n].name for n in one.makes()}
        for name, number in numbers.items():
            if isinstance(case.operands[name], Tensor):
                put(executor, number, case.operands[name])
            elif name in made and not shares(program, number):
                executor.tensor(number)[:] = b"\xa5" * len(executor.tensor(number))  # must be overwritten, all of it
        assert program.step_count is not None
        put(executor, program.step_count, torch.tensor(case.scalars.get("step", 1)))
        scalars = {key: given for key, given in case.scalars.items() if key != "step"}
        executor.run("micro", 0, 1, images=case.images, **scalars)
        return {program.tensors[n].name: value(executor, program, n, case.images) for n in one.writes()}


def shares(program: Program, number: int) -> bool:
    """Whether a tensor lies where another one lies."""
    offset = program.tensors[number].offset
    return any(n != number and tensor.offset == offset for n, tensor in enumerate(program.tensors))


def expected(program: Program, numbers: dict[str, int], case: Case) -> dict[str, Tensor]:
    """The interpreter's values of the same."""
    interpreter = Interpreter(program)
    for name, number in numbers.items():
        if isinstance(given := case.operands[name], Tensor):
            interpreter.set_tensor(number, given)
    interpreter.run("micro", images=case.images, **{"step": 1, **case.scalars})
    one = program.streams["micro"][0]
    return {program.tensors[n].name: interpreter.tensor(n) for n in one.writes()}


def isas() -> Iterator[str]:
    """Instruction sets that this machine runs, each set while the caller is at it."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.ttl"
        write_program(runnable(Case({}, {"x": ((1,), "f32")}), "zero")[0], path)
        for isa in ISAS:
            patch.setenv("TINYTL_ISA", isa)
            try:
                Executor(path).close()
            except TinyTLError:
                continue
            yield isa


def hold_together(op: str, case: Case, in_place: bool) -> None:
    program, numbers = runnable(case, op, in_place)
    wanted = expected(program, numbers, case)
    found_isas = []
    with tempfile.TemporaryDirectory() as folder:
        for isa in isas():
            found_isas.append(isa)
            found = executed(program, numbers, case, 1, Path(folder))
            again = executed(program, numbers, case, 2, Path(folder))
            for name, theirs in wanted.items():
                where = f"{isa} {op} {name}"
                assert same_bits(again[name], found[name]), f"{where}: other bits on two threads"
                compare(where, op, case, name, found, theirs)
    assert found_isas


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def compare(where: str, op: str, case: Case, name: str, found: dict[str, Tensor], theirs: Tensor) -> None:
    ours, before = found[name], case.operands[name]
    assert ours.shape == theirs.shape, where
    if name == "mask":
        y = found["y"]
        wrong = bits(ours, y) != bits(theirs, y)
        if "lo" in case.attributes:
            wrong &= ~on_edge(y, case.attributes, case.tolerance)
        assert not wrong.any(), where
    elif ours.dtype == torch.uint8 and op in ("sgd8", "adam8"):
        assert (ours.int() - theirs.int()).abs().max() <= 1, where
        assert (ours == theirs).float().mean() > 0.98 or len(ours) < 100, where
    elif ours.dtype == torch.uint8:
        assert torch.equal(ours, theirs), where
    else:
        ours, theirs = ours.double(), theirs.double()
        assert torch.equal(ours.isnan(), theirs.isnan()), where
        infinite = theirs.isinf()
        assert torch.equal(ours[infinite], theirs[infinite]), where
        finite = theirs.isfinite()
        values = [t[t.isfinite()].abs().max().item() for t in (theirs, before) if large(t)]
        scale = max([case.terms.get(name, 0.0), *values])
        error = (ours[finite] - theirs[finite]).abs().max().item() if finite.any() else 0.0
        assert error <= case.tolerance * scale, f"{where}: {error:.3e} of {scale:.3e}"


def large(t: Any) -> bool:
    return isinstance(t, Tensor) and bool(t.isfinite().any())


def on_edge(y: Tensor, act: dict[str, Any], tolerance: float) -> Tensor:
    near = torch.zeros(y.shape, dtype=torch.bool)
    for edge in (act["lo"], act["hi"]):
        if math.isfinite(edge):
            near |= (y - edge).abs() <= tolerance * max(y.abs().max().item(), abs(edge))
    return near


@pytest.mark.parametrize("op", CASES)
def test_kernel(op: str) -> None:
    @settings(max_examples=40 if op.startswith("conv") else 15, deadline=None)
    @given(case=cases(op), in_place=st.booleans())
    def check(case: Case, in_place: bool) -> None:
        hold_together(op, case, in_place)

    check()


def test_every_op_has_its_cases() -> None:
    assert set(CASES) == set(OPS)


# ---- what random values do not meet


@pytest.mark.parametrize("channels", [5, 16, 64])
def test_nan_and_infinity_pass_an_activation_as_in_pytorch(channels: int) -> None:
    x = torch.randn(2, 3, 4, channels)
    x[0, 0, 0, 0], x[0, 1, 1, -1], x[1, 2, 3, 2] = math.nan, math.inf, -math.inf
    acts = (
        (NO_ACT, x),
        ({"lo": 0.0, "hi": 6.0, "slope": 0.0}, F.relu6(x)),
        ({"lo": 0.0, "hi": math.inf, "slope": 0.1}, F.leaky_relu(x, 0.1)),
    )
    for act, wanted in acts:
        operands = {"x": x, "y": (x.shape[1:], "f32"), "mask": (x.shape[1:], "bits")}
        case = Case(act, operands, 2)
        program, numbers = runnable(case, "activation")
        inside = ~((x <= act["lo"]) | (x >= act["hi"]))
        with tempfile.TemporaryDirectory() as folder:
            for isa in isas():
                found = executed(program, numbers, case, 2, Path(folder))
                torch.testing.assert_close(found["y"], wanted, equal_nan=True, rtol=1e-6, atol=1e-6)
                assert torch.equal(bits(found["mask"], x), inside), isa


@pytest.mark.parametrize(
    ("op", "shape"), [("activation", (56, 56, 24)), ("act_grad", (56, 56, 72)), ("gate_grad", (28, 28, 96))]
)
def test_large_images_are_divided_among_threads(op: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    mask = torch.randint(0, 256, (2, *shape[:2], -(-shape[2] // 8)), dtype=torch.uint8, generator=generator)
    operands: dict[str, Any] = {"y": (shape, "f32")}
    attributes: dict[str, Any] = {}
    if op == "activation":
        operands |= {"x": random(2, *shape), "mask": (shape, "bits")}
        attributes = {"lo": 0.0, "hi": 1.0, "slope": 0.0}
    elif op == "act_grad":
        operands |= {"grad": random(2, *shape), "mask": mask, "bias": random(shape[2])}
        attributes = {"slope": 0.0}
    else:
        operands |= {"grad": random(2, *shape), "x": random(2, *shape), "s": random(2, 1, 1, shape[2])}
        operands["s_grad"] = ((1, 1, shape[2]), "f32")
    hold_together(op, Case(attributes, operands, 2), in_place=True)


@pytest.mark.parametrize("channels", [5, 36])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)])
def test_depthwise_convolutions_of_wide_images(kernel: int, stride: int, channels: int) -> None:
    """Wide enough for the code without checks at the edges, on either side of which the checks are needed."""
    generator = torch.Generator().manual_seed(kernel)
    pad, side = kernel // 2, 61
    out = (side + 2 * pad - kernel) // stride + 1
    x = torch.randn((2, 9, side, channels), generator=generator)
    rows = (9 + 2 * pad - kernel) // stride + 1
    grad = torch.randn((2, rows, out, channels), generator=generator)
    w, bias = (torch.randn(shape, generator=generator) for shape in ((kernel, kernel, channels), (channels,)))
    mask = torch.randint(0, 256, (2, 9, side, -(-channels // 8)), dtype=torch.uint8, generator=generator)
    geometry = {"kh": kernel, "kw": kernel, "sh": stride, "sw": stride, "dh": 1, "dw": 1}
    geometry |= {**dict.fromkeys(("top", "left", "bottom", "right"), pad), "groups": channels, "depthwise": 1}
    shapes = {"x": x.shape[1:], "grad": grad.shape[1:]}
    relu6 = {"lo": 0.0, "hi": 6.0, "slope": 0.0}
    table = torch.randn(channels, generator=generator)
    forward = {"x": x, "w": w, "table": table, "bias": bias, "y": (shapes["grad"], "f32")}
    hold_together("conv", Case({**geometry, **relu6}, forward, 2), False)
    hold_together("conv", Case({**geometry, **relu6}, {**forward, "mask": (shapes["grad"], "bits")}, 2), False)
    back = {"grad": grad, "w": w, "table": table, "bias": bias, "mask": mask, "y": (shapes["x"], "f32")}
    hold_together("conv_dx", Case({**geometry, "slope": 0.0}, back, 2), False)
    hold_together("conv_dw", Case(geometry, {"x": x, "grad": grad, "w": w}, 2), False)


@pytest.mark.parametrize("op", ["group_norm", "group_norm_grad"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_group_norm_of_large_images_and_means(op: str, mean: float) -> None:
    """The variance does not suffer from a mean that is hundreds of deviations away."""
    generator = torch.Generator().manual_seed(1)
    shape, groups = (40, 41, 24), 8
    x = torch.randn((2, *shape), generator=generator) + mean
    if op == "group_norm":
        operands = {"x": x, "y": (shape, "f32"), "stats": ((groups, 2), "f32")}
        hold_together(op, Case({"groups": groups, "eps": 1e-5, **NO_ACT}, operands, 2, tolerance=2e-5), False)
        return
    parts = x.double().reshape(2, -1, groups, 3)
    stats = torch.stack([parts.mean((1, 3)), parts.var((1, 3), correction=0).rsqrt()], -1).float()
    operands = {
        "grad": torch.randn((2, *shape), generator=generator),
        "x": x,
        "stats": stats,
        "y": (shape, "f32"),
        "gamma_grad": torch.zeros(24),
        "beta_grad": torch.zeros(24),
    }
    hold_together(op, Case({"groups": groups}, operands, 2, tolerance=1e-4 if mean else 1e-5), True)


# ---- the code of 8 bits


def near_bounds(signed: bool) -> Tensor:
    """Values of a block's largest magnitude 1 at, just below and just above every bound between two entries."""
    upper = code(signed, torch.device("cpu")).upper[:-1]
    around = [upper, torch.nextafter(upper, torch.tensor(2.0)), torch.nextafter(upper, torch.tensor(-2.0))]
    dense = torch.rand(4096, generator=torch.Generator().manual_seed(0)) ** 4
    x = torch.cat([*around, dense, -dense if signed else dense / 1e3, torch.tensor([0.0, 1e-30])])
    x = x.clamp(-1.0 if signed else 0.0, 1.0)
    x = torch.nn.functional.pad(x, (0, -len(x) % (BLOCK - 1)))
    return torch.cat([torch.ones(len(x) // (BLOCK - 1), 1), x.reshape(-1, BLOCK - 1)], 1).flatten()


def encoded(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes, scales = torch.empty(len(x), dtype=torch.uint8), torch.empty(blocks(len(x)))
    spare, index = torch.empty_like(x), torch.empty(len(x), dtype=torch.int32)
    encode(x.clone(), codes, scales, code(signed, torch.device("cpu")), spare, index)
    return codes, scales


def test_the_signed_code_bit_for_bit() -> None:
    table = code(True, torch.device("cpu"))
    x, all_codes = near_bounds(True), torch.arange(256, dtype=torch.uint8)
    n = len(x)
    nothing = {"momentum": torch.zeros(n, dtype=torch.uint8), "momentum_scale": torch.zeros(blocks(n))}
    keep = {"weight_decay": 0.0, "momentum": 1.0}
    into = Case(keep, {"p": torch.zeros(n), "grad": x, **nothing}, 1, {"lr": 0.0})
    back = {"momentum": all_codes, "momentum_scale": torch.ones(1)}
    out = Case(keep, {"p": torch.zeros(256), "grad": torch.zeros(256), **back}, 1, {"lr": -1.0})
    with tempfile.TemporaryDirectory() as folder:
        for isa in isas():
            found = executed(*runnable(into, "sgd8"), into, 1, Path(folder))
            codes, scales = encoded(x, True)
            assert torch.equal(found["momentum"], codes), isa
            assert torch.equal(found["momentum_scale"], scales), isa
            found = executed(*runnable(out, "sgd8"), out, 1, Path(folder))
            assert torch.equal(found["p"], table.values), isa
            assert torch.equal(found["momentum"], all_codes), isa


def test_the_unsigned_code_bit_for_bit() -> None:
    table = code(False, torch.device("cpu"))
    root = near_bounds(False).sqrt()
    x, all_codes = root * root, torch.arange(256, dtype=torch.uint8)
    n = len(x)
    state = {
        "m": torch.zeros(n, dtype=torch.uint8),
        "m_scale": torch.zeros(blocks(n)),
        "v": torch.zeros(n, dtype=torch.uint8),
        "v_scale": torch.zeros(blocks(n)),
    }
    only_now = {"weight_decay": 0.0, "beta1": 0.0, "beta2": 0.0, "eps": 1.0}
    into = Case(only_now, {"p": torch.zeros(n), "grad": root, **state}, 1, {"lr": 0.0})
    # values are not read out, but kept: 0.5 v of the scale 2 is v of the scale 1
    halves = {
        "m": all_codes,
        "m_scale": torch.ones(1),
        "v": all_codes,
        "v_scale": torch.full((1,), 2.0),
        "p": torch.zeros(256),
        "grad": torch.zeros(256),
    }
    out = Case({**only_now, "beta2": 0.5}, halves, 1, {"lr": 0.0})
    with tempfile.TemporaryDirectory() as folder:
        for isa in isas():
            found = executed(*runnable(into, "adam8"), into, 1, Path(folder))
            codes, scales = encoded(x, False)
            assert torch.equal(found["v"], codes), isa
            assert torch.equal(found["v_scale"], scales), isa
            assert not (found["v"][x > 0] == 0).any(), isa
            found = executed(*runnable(out, "adam8"), out, 1, Path(folder))
            assert torch.equal(found["v"], all_codes), isa
            assert found["v_scale"].item() == table.values.max(), isa
