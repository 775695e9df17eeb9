"""NaN and infinity: stopped before the step, with the step and the first bad layer named and the last state kept."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.test_engine import FakeLoader, bits, one_thread, small_model
from tinytl._atomic import read_sealed
from tinytl.backbones import BACKBONES
from tinytl.checkpoint import KIND
from tinytl.engine import FitOptions, StepInfo, evaluate, fit, make_optimizer, train_step
from tinytl.engine.finite import bad_gradient, origin
from tinytl.errors import NotFiniteError
from tinytl.run import CHECKPOINT, DELTA, Callbacks, Prepared, train
from tinytl.spec import RunOptions, TrainSpec

from . import small_run

__all__ = ["one_thread"]  # a fixture for this module too


class Net(nn.Module):
    """Two layers with something between them that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.first = nn.Sequential(self.conv, nn.ReLU())
        self.last = nn.Linear(4, 3)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).mean((2, 3)) * self.factor)


def images(value: float = 1.0) -> list[Tensor]:
    return [torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), value)]


def test_the_first_bad_layer_is_named_in_forward_order() -> None:
    model = Net()
    assert origin(model, images(math.nan)) == "the input images hold NaN"
    model.last.bias.data[1] = math.inf
    assert origin(model, images()) == "last.bias holds infinity"
    model.last.bias.data[1] = 0.0
    model.first.register_buffer("scale", torch.tensor([1.0, math.nan]))
    assert origin(model, images()) == "first.scale holds NaN"
    model.first.scale = torch.ones(2)
    model.conv.weight.data.fill_(1e30)
    # the second batch is the one that overflows
    assert origin(model, images(1e10)) == "the first bad layer is conv (Conv2d), its input was finite"
    model.conv.weight.data.fill_(1.0)
    model.factor = math.inf
    assert origin(model, images()).startswith("the first bad layer is last (Linear), its input was not finite: what")
    model.factor = 1.0
    assert origin(model, images()).startswith("every layer's output is finite")
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_that_are_no_tensor_are_looked_into() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            return {"x": [x, x / 0]}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)["x"][0] * self.weight

    assert origin(Outer(), images()) == "the first bad layer is pair (Pair), its input was finite"


class Exploding(torch.autograd.Function):
    """Passes its input on, and a gradient of the given size back."""

    @staticmethod
    def forward(ctx, x: Tensor, size: float) -> Tensor:
        ctx.size = size
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.full_like(grad, ctx.size), None


@pytest.mark.parametrize(
    ("size", "says"),
    [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity"), (1e25, r".*e\+25, too large to square")],
)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_bad_gradient_stops_before_the_step(size: float, says: str, optimizer: str) -> None:
    """The loss is finite, and the step would have poisoned the weights for good."""
    model, options = small_model(), FitOptions(optimizer=optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    slots = make_optimizer(parameters, options)
    batch = next(FakeLoader().epoch(0))
    train_step(model, slots, batch, 0.01, options)
    before, state = bits(model), repr(slots.state_dict())
    handle = model[4].register_forward_hook(  # pyright: ignore[reportIndexIssue, reportCallIssue]
        lambda module, args, output: Exploding.apply(output, size)
    )
    with pytest.raises(NotFiniteError, match=rf"the loss is \d.* the gradient of 2\.bias holds {says};") as caught:
        train_step(model, slots, batch, 0.01, options)
    assert "\n" not in str(caught.value)
    assert bits(model) == before
    assert repr(slots.state_dict()) == state
    assert all(parameter.grad is None for parameter in parameters)
    handle.remove()
    train_step(model, slots, batch, 0.01, options)


def test_of_several_bad_gradients_the_one_nearest_to_the_loss_is_named() -> None:
    model = Net()
    model(images()[0]).sum().backward()
    assert bad_gradient(model) is None
    for name in ("conv.weight", "last.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient[0] = math.nan
    assert bad_gradient(model) == "the gradient of last.weight holds NaN"


def test_a_bad_validation_names_its_layer_too() -> None:
    model = small_model()
    model[2].register_forward_hook(  # pyright: ignore[reportIndexIssue, reportCallIssue]
        lambda module, args, output: output if module.training else output * math.inf
    )
    with pytest.raises(NotFiniteError, match=r"validation loss is .* epoch 1: the first bad layer is 2 \(\w+\)"):
        fit(model, FakeLoader(), FakeLoader(), FitOptions(), on_step=lambda info: None)
    assert all(module.training for module in model.modules())
    assert not math.isfinite(evaluate(model, FakeLoader()).loss)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    monkeypatch.setitem(BACKBONES, small_run.NAME, small_run.entry())
    return small_run.make_spec(tmp_path / "photos")


def test_the_last_good_state_is_kept(spec: TrainSpec, tmp_path: Path) -> None:
    """A run without an interval: what is saved in the middle of the epoch is saved because of the NaN."""
    options = RunOptions(workers=0, threads=1, checkpoint_seconds=None)
    train(spec, tmp_path / "whole", options=options)
    steps = 0

    def poison(prepared: Prepared) -> None:
        block = prepared.model.get_submodule("features.block1")

        def spoil(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output * math.nan if steps == 4 else output

        block.register_forward_hook(spoil)

    def count(info: StepInfo) -> None:
        nonlocal steps
        steps = info.step

    out = tmp_path / "run"
    with pytest.raises(NotFiniteError) as caught:
        train(spec, out, options=options, callbacks=Callbacks(on_start=poison, on_step=count))
    message = str(caught.value)
    assert "the loss is nan at step 5 (epoch 1, batch 5 of 6), learning rate" in message
    assert "the first bad layer is features.block1 (" in message
    assert "its input was finite; start again with a lower learning rate (--lr)" in message
    assert message.endswith(f"; the state after step 4 is in {out / CHECKPOINT}")
    assert "\n" not in message
    assert read_sealed(out / CHECKPOINT, KIND)[1]["progress"]["step"] == 4
    assert not (out / DELTA).exists()
    train(spec, out, resume=True, options=options)  # without the poison
    assert small_run.left_behind(out) == small_run.left_behind(tmp_path / "whole")


def test_a_learning_rate_without_bounds_is_stopped(spec: TrainSpec, tmp_path: Path) -> None:
    """No poison: SGD on its own comes to numbers that are too large, and what is on the disk stays finite."""
    wild = dataclasses.replace(spec, fit=FitOptions(epochs=2, lr=1e30, optimizer="sgd"))
    with pytest.raises(NotFiniteError, match=r"at step \d+ \(epoch \d, batch \d of 6\)|after epoch 1"):
        train(wild, tmp_path / "run", options=RunOptions(workers=0, threads=1, checkpoint_steps=1))
    tensors = read_sealed(tmp_path / "run" / CHECKPOINT, KIND)[0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
