"""Optimizer state at 8 bits: the code, the updates, and runs that are cut and go on."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.test_engine import FakeLoader, bits, one_thread
from tinytl._atomic import read_sealed
from tinytl.checkpoint import KIND, Boundary, Checkpointer, Progress, Resume
from tinytl.engine import (
    Adam8bit,
    FitOptions,
    SGD8bit,
    fit,
    make_optimizer,
    scratch_bytes,
    train_step,
)
from tinytl.engine.block_code import BLOCK, CODE_BYTES, Code, blocks, code, decode, encode
from tinytl.errors import InputError, RunError
from tinytl.memory import measure_step, resident_tensors

__all__ = ["one_thread"]  # a fixture for this module too

CPU = torch.device("cpu")
CHOICES = [("adam", 32), ("adam", 8), ("sgd", 32), ("sgd", 8)]


def medium_model(dropout: float = 0.0) -> nn.Module:
    """As `small_model`, with two weights that are large enough for 8 bits; one is channels last, one of odd size."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 64, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64, 67),
        nn.ReLU(),
        nn.Linear(67, 3),
    ).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model.train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---- the code ----


def held(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of values (n,)."""
    padded = torch.zeros(blocks(len(values)) * BLOCK)
    padded[: len(values)] = values
    codes, absmax = torch.zeros(len(values), dtype=torch.uint8), torch.zeros(blocks(len(values)))
    spare, index = torch.empty_like(padded), torch.empty_like(padded, dtype=torch.int32)
    encode(padded, codes, absmax, code(signed, CPU), spare, index)
    return codes, absmax


def opened(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    out = torch.full((len(absmax) * BLOCK,), math.nan)
    decode(codes, absmax, code(signed, CPU), out, torch.empty_like(out, dtype=torch.int32))
    assert not out[len(codes) :].any()
    return out[: len(codes)]


@pytest.mark.parametrize(("signed", "least"), [(True, 0.55e-6), (False, 0.325e-6)])
def test_the_code_is_the_paper_s(signed: bool, least: float) -> None:
    table = code(signed, CPU).values.tolist()
    assert len(set(table)) == 256
    assert table == sorted(table)
    zero = table.index(0.0)
    assert (zero, table[-1]) == (127 if signed else 0, 1.0)
    assert table[zero + 1] == pytest.approx(least)
    assert table[-2] == pytest.approx(0.1 + 0.9 * (63.5 / 64 if signed else 127.5 / 128))
    parts = dataclasses.asdict(code(signed, CPU)).values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in parts) == CODE_BYTES
    if signed:
        assert table[:127] == [-value for value in table[-2:127:-1]]


def nearest(scaled: Tensor, table: Code, signed: bool) -> Tensor:
    """Distance of the nearest entry, searched for among all."""
    values = table.values if signed else table.values[1:]
    distances = (scaled[:, None].double() - values.double()).abs().amin(1)
    return distances if signed else torch.where(scaled > 0, distances, scaled.double())


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700), spread=st.floats(0, 12), size=st.floats(-30, 30), seed=st.integers(0, 99))
@pytest.mark.parametrize("signed", [True, False])
def test_every_value_is_held_as_the_nearest_entry(signed: bool, n: int, spread: float, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10 ** (size + spread * torch.randn(n, generator=generator) / 4)
    values = values if signed else values.abs()
    codes, absmax = held(values, signed)
    scale = absmax.repeat_interleave(BLOCK)[:n]
    assert torch.equal(absmax, torch.stack([part.abs().max() for part in values.split(BLOCK)]))
    scaled, back = values / scale, opened(codes, absmax, signed) / scale
    table = code(signed, CPU)
    distance = (scaled.double() - table.values[codes.long()].double()).abs()
    torch.testing.assert_close(distance, nearest(scaled, table, signed), rtol=0, atol=1e-9)
    error = (scaled - back).abs()
    assert error.max() <= (0.0071 if signed else 0.0036)
    large = scaled.abs() >= 0.1
    assert (error[large] / scaled[large].abs()).max() <= (0.071 if signed else 0.036)
    if not signed:
        assert bool((opened(codes, absmax, signed)[scaled > 0] > 0).all())
        assert torch.equal(held(opened(codes, absmax, signed), signed)[0], codes)  # what is rounded stays


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_and_the_search_agree_at_every_border(signed: bool) -> None:
    table = code(signed, CPU)
    border = table.upper[:-1]
    near = torch.cat([border, torch.nextafter(border, border + 1), torch.nextafter(border, border - 1), table.values])
    for part in near[near.abs() <= 1].split(BLOCK - 1):
        if not signed:
            part = part.abs()
        values = torch.cat([torch.ones(1), part])  # so that the scale is 1
        assert torch.equal(held(values, signed)[0].long(), torch.bucketize(values, border))


def test_zero_and_what_is_not_finite_stay_so_in_their_block() -> None:
    values = torch.zeros(4 * BLOCK)
    values[BLOCK], values[2 * BLOCK], values[3 * BLOCK + 1] = math.nan, math.inf, 1e-42
    back = opened(*held(values, True), True)
    assert torch.equal(back[:BLOCK].abs(), torch.zeros(BLOCK))
    assert not math.isfinite(back[BLOCK])
    assert not math.isfinite(back[2 * BLOCK])
    assert torch.equal(back[3 * BLOCK :], values[3 * BLOCK :])


# ---- the optimizers ----


def make(kind: str, parameters: list[nn.Parameter], bits: int, decay: float = 0.0) -> torch.optim.Optimizer:
    return make_optimizer(parameters, FitOptions(optimizer=kind, optimizer_bits=bits, lr=0.01, weight_decay=decay))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())


@pytest.mark.parametrize("n", [1, 4095, 4096, 4097, 16_384, 50_001])
def test_the_state_takes_the_bytes_of_the_rule(n: int) -> None:
    for kind, averages, count in (("adam", 2, 4), ("sgd", 1, 0)):
        parameter = nn.Parameter(torch.randn(n))
        optimizer = make(kind, [parameter], 8)
        parameter.grad = torch.randn(n)
        optimizer.step()
        each = n + 4 * math.ceil(n / 256) if n >= 4096 else 4 * n
        assert state_bytes(optimizer) == averages * each + count


@pytest.mark.parametrize("n", [4096, 5000, 16_384, 60_001])
def test_an_update_allocates_what_the_rule_says(n: int) -> None:
    for kind, averages in (("adam", 2), ("sgd", 1)):
        parameter, gradient = nn.Parameter(torch.randn(n)), torch.randn(n)
        optimizer = make(kind, [parameter], 8)

        def step(optimizer=optimizer, parameter=parameter, gradient=gradient) -> None:
            parameter.grad = gradient
            optimizer.step()

        step()
        module = nn.ParameterList([parameter])
        measured = measure_step(step, resident_tensors(module, optimizer, gradient))
        assert measured.step_peak_bytes == scratch_bytes(n, averages)
        assert measured.resident_bytes == 8 * n + state_bytes(optimizer) + averages * CODE_BYTES


def exact_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A large parameter's averages as float32."""
    state, opened_up = optimizer.state[parameter], {}
    for name, value in state.items():
        if value.dtype == torch.uint8:
            order = sorted(range(value.dim()), key=value.stride, reverse=True)
            flat = value.permute(order).reshape(-1)
            full = opened(flat, state[f"{name}_absmax"], name != "exp_avg_sq")
            back = full.view([value.shape[i] for i in order])
            opened_up[name] = back.permute([order.index(i) for i in range(value.dim())])
        elif value.dim() == 0:
            opened_up[name] = value.clone()
    return opened_up


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(64, 8, 3, 3), (70, 59), (20_011,)])
def test_each_update_is_the_exact_one_on_the_state_that_is_held(
    kind: str, decay: float, shape: tuple[int, ...]
) -> None:
    """All that is approximate is what the state is rounded to afterwards."""
    start = torch.randn(shape)
    if len(shape) == 4:
        start = start.contiguous(memory_format=torch.channels_last)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer, exact = make(kind, [ours], 8, decay), make(kind, [theirs], 32, decay)
    for number in range(6):
        gradient = torch.randn(shape) * 10 ** torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), torch.empty_like(theirs).copy_(gradient)
        if number:
            exact.state[theirs].update(exact_state(optimizer, ours))
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if name in exact.state[theirs]:
                    value = exact.state[theirs][name]
                    exact.state[theirs][name] = torch.empty_like(theirs, requires_grad=False).copy_(value)
        with torch.no_grad():
            theirs.copy_(ours)
        optimizer.step()
        exact.step()
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
        # and the state is the exact one, rounded
        after, rounded = exact.state[theirs], exact_state(optimizer, ours)
        for name, value in rounded.items():
            largest = after[name].abs().max().item()
            torch.testing.assert_close(value, after[name], rtol=0, atol=0.0072 * largest)


def test_small_parameters_are_updated_as_by_torch_to_the_bit() -> None:
    for kind in ("adam", "sgd"):
        results = []
        for bits_a_value in (32, 8):
            torch.manual_seed(2)
            parameters = [nn.Parameter(torch.randn(shape)) for shape in ((), (7,), (4, 1023))]
            optimizer = make(kind, parameters, bits_a_value, 0.1)
            for _ in range(4):
                for parameter in parameters:
                    parameter.grad = torch.randn(parameter.shape)
                optimizer.step()
            results.append(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
        assert torch.equal(*results)


@pytest.mark.parametrize(("kind", "bound"), [("adam", 0.25), ("sgd", 0.06)])
def test_the_way_stays_close_to_the_exact_one(kind: str, bound: float) -> None:
    """The same gradients, of very unequal sizes, for 300 steps: how far apart the two end, by the way's length."""
    n = 8192
    scale = torch.exp(1.5 * torch.randn(n))
    mean = 0.3 * scale * torch.randn(n)
    ours, theirs = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))
    optimizer, exact = make(kind, [ours], 8), make(kind, [theirs], 32)
    apart = []
    for _ in range(300):
        ours.grad = mean + scale * torch.randn(n)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        exact.step()
        apart.append(((ours - theirs).norm() / theirs.norm()).item())
    assert max(apart) < bound
    assert ours.detach().norm() == pytest.approx(theirs.detach().norm().item(), rel=0.1)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_it_learns_as_the_exact_one_does(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 64, generator=generator)
    labels = (inputs @ torch.randn(64, 10, generator=generator)).argmax(1)
    ends = []
    for bits_a_value in (32, 8):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = make(kind, trained(model), bits_a_value)
        losses = []
        for _ in range(120):
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ends.append(losses)
    assert ends[0][-1] < 0.5 * ends[0][0]
    assert ends[1][-1] == pytest.approx(ends[0][-1], rel=0.1)


def test_a_gradient_that_vanishes_is_no_long_step() -> None:
    """Rounding a second average to 0 would leave a first one to be divided by eps: a step of 1e4 learning rates."""
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = Adam8bit([parameter], lr=1.0)
    for size in (1e-4, 1e-4, 0.0, 0.0):
        parameter.grad = torch.full((4096,), size)
        parameter.grad[::BLOCK] = 1.0
        optimizer.step()
        assert parameter.abs().max() < 5


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_strides_of_the_gradient_do_not_matter_and_those_of_the_parameter_may_not_change(kind: str) -> None:
    results = []
    start = torch.randn(64, 8, 3, 3)
    gradients = [torch.randn(64, 8, 3, 3) for _ in range(3)]
    for gradient_format in (torch.channels_last, torch.contiguous_format):
        parameter = nn.Parameter(start.contiguous(memory_format=torch.channels_last))
        optimizer = make(kind, [parameter], 8)
        for gradient in gradients:
            parameter.grad = gradient.contiguous(memory_format=gradient_format)
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)
    parameter = nn.Parameter(results[0].clone())
    optimizer = make(kind, [parameter], 8)
    parameter.grad = gradients[0]
    optimizer.step()
    parameter.data = parameter.data.contiguous()
    with pytest.raises(InputError, match="make the optimizer after changing that"):
        optimizer.step()
    gaps = nn.Parameter(torch.zeros(5000, 2)[:, 0])
    gaps.grad = torch.zeros(5000)
    with pytest.raises(InputError, match="cannot be walked in memory order"):
        make(kind, [gaps], 8).step()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_state_dict_goes_on_to_the_same_bits(kind: str) -> None:
    batches = list(FakeLoader(batches=6).epoch(0))
    model = medium_model()
    optimizer = make(kind, trained(model), 8)
    options = FitOptions()
    for batch in batches[:3]:
        train_step(model, optimizer, batch, 0.01, options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    again = make(kind, trained(other), 8)
    again.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[3:]:
        train_step(model, optimizer, batch, 0.01, options)
        train_step(other, again, batch, 0.01, options)
    assert bits(model) == bits(other)
    kinds = {value.dtype for state in again.state.values() for value in state.values()}
    assert kinds == {torch.uint8, torch.float32}
    exact = make(kind, trained(other), 32)
    train_step(other, exact, batches[0], 0.01, options)
    with pytest.raises(InputError, match=r"the state of a parameter \(64, 8, 3, 3\) is .*, expected .*_absmax float32"):
        again.load_state_dict(exact.state_dict())


def test_float64_and_bfloat16_parameters_are_updated_too() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        for kind in ("adam", "sgd"):
            parameters = [nn.Parameter(torch.ones(n, dtype=dtype)) for n in (10, 5000)]
            optimizer = make(kind, parameters, 8)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            for parameter in parameters:
                torch.testing.assert_close(parameter, torch.full_like(parameter, 0.99), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda p: Adam8bit(p, lr=-1.0), "lr is -1.0"),
        (lambda p: Adam8bit(p, betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\)"),
        (lambda p: Adam8bit(p, eps=0.0), "eps is 0.0"),
        (lambda p: SGD8bit(p, momentum=0.0), "momentum is 0.0"),
        (lambda p: SGD8bit(p, weight_decay=-1.0), "weight_decay is -1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(build: Callable[[list[nn.Parameter]], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build([nn.Parameter(torch.zeros(1))])


# ---- checkpoints ----


@dataclasses.dataclass(frozen=True)
class MediumAdaptation:
    base_hash: str = "ab" * 32
    delta_keys: tuple[str, ...] = ("2.weight", "2.bias", "7.weight", "7.bias", "9.weight", "9.bias")


class Killed(BaseException):
    """Stands for a SIGKILL."""


def run(folder: Path, options: FitOptions, kill_at: int = -1) -> nn.Module:
    """Start or go on, as a process would, with a checkpoint a step; dies at boundary ``kill_at``."""
    folder.mkdir(exist_ok=True)
    model = medium_model(dropout=0.4)
    saver = Checkpointer(folder / "checkpoint.safetensors", model, MediumAdaptation(), dataclasses.asdict(options))
    count = 0

    def on_boundary(at: Boundary) -> None:
        nonlocal count
        saver.save(at)
        count += 1
        if count == kill_at:
            raise Killed

    resume = saver.load()
    fit(model, FakeLoader(), FakeLoader(seed=1), options, on_boundary=on_boundary, resume=resume)
    return model


@pytest.mark.parametrize("update", ["end", "backward"])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("kill_at", [1, 4, 6])
def test_a_run_cut_at_a_step_ends_in_the_same_bits(tmp_path: Path, kind: str, update: str, kill_at: int) -> None:
    options = FitOptions(epochs=2, lr=0.01, seed=5, optimizer=kind, optimizer_bits=8, update=update)
    straight = run(tmp_path / "straight", options)
    with pytest.raises(Killed):
        run(tmp_path / "cut", options, kill_at)
    resumed = run(tmp_path / "cut", options)
    assert bits(straight) == bits(resumed)
    files = [(tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("straight", "cut")]
    assert files[0] == files[1]
    tensors = read_sealed(tmp_path / "cut" / "checkpoint.safetensors", KIND)[0]
    slots = {name for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    names = ("exp_avg", "exp_avg_sq") if kind == "adam" else ("momentum_buffer",)
    assert slots == {f"optimizer/{weight}.weight/{name}" for weight in (2, 7) for name in names}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"2.weight/exp_avg": torch.zeros(64, 8, 3, 3)}, r"'2\.weight/exp_avg' is float32"),
        ({"2.weight/exp_avg_absmax": torch.zeros(17)}, r"exp_avg_absmax' is float32 \(17,\)"),
        ({"2.weight/exp_avg_absmax": None}, "'exp_avg, exp_avg_sq, exp_avg_sq_absmax, step' of '2.weight'"),
        ({"2.bias/exp_avg_absmax": torch.zeros(1)}, "exp_avg_absmax.* of '2.bias', expected exp_avg, exp_avg_sq, step"),
        ({"2.weight/step": torch.zeros(1)}, r"'2\.weight/step' is float32 \(1,\)"),
    ],
)
def test_8_bit_state_that_misfits_is_refused(change: dict[str, Tensor | None], says: str) -> None:
    model, options = medium_model(), FitOptions(optimizer_bits=8)
    good: dict[str, Tensor] = {}
    fit(
        model,
        FakeLoader(),
        None,
        dataclasses.replace(options, epochs=1),
        on_boundary=lambda at: good.update({k: v.clone() for k, v in at.optimizer_tensors().items()}),
    )
    tensors = {name: value for name, value in (good | change).items() if value is not None}
    with pytest.raises(RunError, match=says) as caught:
        fit(medium_model(), FakeLoader(), None, options, resume=Resume(Progress(1, 0, 3), tensors))
    assert "\n" not in str(caught.value)
