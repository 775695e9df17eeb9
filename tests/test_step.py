"""One step: updates in backward, batches read in pieces, and what is refused before anything changes."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.test_engine import FakeBatch, FakeLoader, bits, one_thread
from tests.test_optimizers import CHOICES, CPU, MediumAdaptation, medium_model, trained
from tinytl._atomic import read_sealed
from tinytl.backbones import BACKBONES, load
from tinytl.checkpoint import KIND, Boundary, Checkpointer
from tinytl.engine import (
    FitOptions,
    StepObserver,
    evaluate,
    fit,
    make_optimizer,
    pieces,
    run_step,
    seed_generators,
    train_step,
)
from tinytl.engine.finite import origin
from tinytl.errors import InputError, NotFiniteError, RunError
from tinytl.memory import measure_step, resident_tensors
from tinytl.methods import adapt_, method
from tinytl.run import CHECKPOINT, Callbacks, Prepared, train
from tinytl.spec import RunOptions, TrainSpec

from . import small_run

__all__ = ["one_thread"]  # a fixture for this module too


# ---- updates in backward ----


@pytest.mark.parametrize(
    ("method_name", "norm"),
    [("", "bn"), ("tinytl-l+b", "bn"), ("tinytl-l+b", "gn"), ("ft-full", "gn"), ("ft-norm+last", "bn")],
)
@pytest.mark.parametrize(("kind", "bits_a_value"), CHOICES)
def test_updates_in_backward_are_those_at_the_end_to_the_bit(
    method_name: str, norm: str, kind: str, bits_a_value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, small_run.NAME, small_run.entry())
    batches = list(FakeLoader(batches=4).epoch(0))
    results = []
    for update in ("end", "backward"):
        options = FitOptions(
            optimizer=kind, optimizer_bits=bits_a_value, update=update, weight_decay=0.01, label_smoothing=0.1
        )
        if method_name:
            torch.manual_seed(0)
            model = load(small_run.NAME, pretrained=False, norm=norm, num_classes=3).model.train()  # pyright: ignore[reportArgumentType]
            adapt_(model, method(method_name), resolution=32)
        else:
            model = medium_model(dropout=0.4)
        optimizer = make_optimizer(trained(model), options)
        told = []
        for number, batch in enumerate(batches):
            seed_generators(0, number, CPU)
            images = F.interpolate(batch.images, 32) if method_name else batch.images
            told.append(train_step(model, optimizer, FakeBatch(images, batch.labels), 0.01, options))
        state = {
            (number, slot): value.contiguous().numpy().tobytes()
            for number, entry in optimizer.state_dict()["state"].items()
            for slot, value in entry.items()
        }
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        results.append((bits(model), state, told))
    assert results[0][2] == results[1][2]
    for ours, theirs in zip(results[0][:2], results[1][:2], strict=True):
        assert not [key for key in ours if ours[key] != theirs[key]]


def test_updates_in_backward_hold_one_layer_s_gradients_at_a_time() -> None:
    width, depth, peaks = 128, 12, {}
    for update in ("end", "backward"):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        images, labels = torch.randn(4, width), torch.randint(width, (4,))
        optimizer = make_optimizer(list(model.parameters()), FitOptions(optimizer="sgd"))

        def step(model=model, optimizer=optimizer, batch=(images, labels), update=update) -> None:
            run_step(model, optimizer, [batch], 4, update=update)

        step()
        peaks[update] = measure_step(step, resident_tensors(model, optimizer, images, labels)).step_peak_bytes
    weight = 4 * width * width
    assert peaks["end"] > depth * weight
    assert peaks["backward"] < 2 * weight


def test_a_parameter_used_twice_is_updated_once() -> None:
    results = []
    for update in ("end", "backward"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        model[2].weight = model[0].weight  # pyright: ignore[reportArgumentType, reportIndexIssue]
        optimizer = make_optimizer(list(model.parameters()), FitOptions())
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            part = (torch.randn(4, 6, generator=generator), torch.randint(6, (4,), generator=generator))
            run_step(model, optimizer, [part], 4, update=update)
        results.append(bits(model))
    assert results[0] == results[1]


def test_a_gradient_that_comes_in_parts_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            inside = checkpoint(self.layer, x.clone().requires_grad_(), use_reentrant=True)
            assert isinstance(inside, Tensor)
            return self.layer(inside)

    model = Twice()
    optimizer = make_optimizer(list(model.parameters()), FitOptions())
    with pytest.raises(InputError, match="got its gradient in several parts"):
        run_step(model, optimizer, [(torch.randn(2, 6), torch.tensor([0, 1]))], 2, update="backward")
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_micro_batches_and_updates_in_backward_contradict() -> None:
    options = FitOptions(update="backward", micro_batch=2)
    with pytest.raises(InputError, match="update is 'backward' and micro_batch 2 of a batch_size of 8") as caught:
        TrainSpec("photos", fit=options)
    assert "\n" not in str(caught.value)
    TrainSpec("photos", batch_size=2, fit=options)
    model = medium_model()
    before = bits(model)
    with pytest.raises(InputError, match="a micro-batch of 2 of 6 images"):
        fit(model, FakeLoader(), None, options)
    assert bits(model) == before
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    with pytest.raises(InputError, match="'sgd' with momentum 0 keeps no state"):
        FitOptions(optimizer="sgd", momentum=0.0, optimizer_bits=8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_stops_before_backward(value: float) -> None:
    model, options = medium_model(), FitOptions(update="backward")
    optimizer = make_optimizer(trained(model), options)
    batch = next(FakeLoader().epoch(0))
    train_step(model, optimizer, batch, 0.01, options)
    before, changed = bits(model), []
    model[9].register_forward_hook(lambda *values: values[2] * value)  # pyright: ignore[reportIndexIssue, reportCallIssue]
    with pytest.raises(
        NotFiniteError, match=r"the loss is .*: the first bad layer is 9 \(Linear\), its input was finite"
    ):
        train_step(model, optimizer, batch, 0.01, options, before_change=lambda: changed.append(True))
    assert bits(model) == before
    assert not changed


def spoil(model: nn.Module, name: str) -> None:
    """Make one parameter's gradient NaN, before it is accumulated."""
    model.get_parameter(name).register_hook(lambda grad: grad * math.nan)


@pytest.mark.parametrize(("name", "says"), [("9.bias", "it came first"), ("7.weight", "the [23] parameters whose")])
def test_a_bad_gradient_in_backward_says_what_was_updated(name: str, says: str) -> None:
    model, options = medium_model(), FitOptions(update="backward")
    optimizer = make_optimizer(trained(model), options)
    before, changed = bits(model), []
    spoil(model, name)
    batch = next(FakeLoader().epoch(0))
    with pytest.raises(NotFiniteError, match=rf"the loss is \d.*: the gradient of {name} holds NaN; {says}") as caught:
        train_step(model, optimizer, batch, 0.01, options, before_change=lambda: changed.append(True))
    assert "\n" not in str(caught.value)
    after = bits(model)
    moved = {key for key in before if before[key] != after[key]}
    assert bool(moved) == bool(changed) == (name != "9.bias")
    assert not moved & {"2.weight", "2.bias", name}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_half_updated_network_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper saves the last boundary when a loss is NaN; when parameters have moved on, that would be a lie."""
    monkeypatch.setitem(BACKBONES, small_run.NAME, small_run.entry())
    spec = small_run.make_spec(tmp_path / "photos")
    spec = dataclasses.replace(spec, fit=dataclasses.replace(spec.fit, micro_batch=None, update="backward"))
    options = RunOptions(workers=0, threads=1, checkpoint_seconds=None, checkpoint_steps=2)
    train(spec, tmp_path / "whole", options=options)
    calls = 0

    def on_start(prepared: Prepared) -> None:
        name = next(name for name, p in prepared.model.named_parameters() if p.requires_grad)

        def spoil_fourth(gradient: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return gradient * math.nan if calls == 4 else gradient

        prepared.model.get_parameter(name).register_hook(spoil_fourth)

    out = tmp_path / "run"
    with pytest.raises(NotFiniteError, match=r"were updated already.*; the state after step 2 is in") as caught:
        train(spec, out, options=options, callbacks=Callbacks(on_start=on_start))
    assert "at step 4 (epoch 1, batch 4 of 6)" in str(caught.value)
    assert read_sealed(out / CHECKPOINT, KIND)[1]["progress"]["step"] == 2
    train(spec, out, resume=True, options=options)
    assert small_run.left_behind(out) == small_run.left_behind(tmp_path / "whole")


def test_a_boundary_that_is_past_is_not_saved(tmp_path: Path) -> None:
    model = medium_model()
    saver = Checkpointer(tmp_path / "checkpoint.safetensors", model, MediumAdaptation(), {})
    boundaries: list[Boundary] = []
    fit(model, FakeLoader(), None, FitOptions(epochs=1), on_boundary=boundaries.append)
    assert [at.past for at in boundaries] == [True, True, False, False]
    with pytest.raises(RunError, match="after step 1 cannot be saved any more"):
        saver.save(boundaries[0])
    saver.save(boundaries[-1])


# ---- batches in pieces, and the step that they all share ----


class PackedBatch:
    """Images as bytes, which become floats a micro-batch at a time, and whose lives are watched."""

    def __init__(self, batch: FakeBatch) -> None:
        self._packed = (batch.images * 10).round().to(torch.int8)
        self.labels = batch.labels
        self.made: list[weakref.ref[Tensor]] = []
        self.alive_beside: list[int] = []

    @property
    def images(self) -> Tensor:
        raise AssertionError("a batch with pieces is not asked for all its images")

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.made)

    def pieces(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self._packed.split(size), self.labels.split(size), strict=True):
            self.alive_beside.append(self.alive)
            yield self._floats(images), labels

    def _floats(self, images: Tensor) -> Tensor:
        made = images.to(torch.float32, memory_format=torch.channels_last) / 10
        self.made.append(weakref.ref(made))
        return made

    def plain(self) -> FakeBatch:
        return FakeBatch(self._packed.to(torch.float32, memory_format=torch.channels_last) / 10, self.labels)


class PackedLoader(FakeLoader):
    def __init__(self, last: int | None = None) -> None:
        super().__init__(last=last)
        self.packed: list[PackedBatch] = []

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[PackedBatch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for batch in super().epoch(epoch, start_batch):
            self.packed.append(PackedBatch(batch))
            yield self.packed[-1]


class PlainLoader(FakeLoader):
    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[FakeBatch]:
        for batch in super().epoch(epoch, start_batch):
            yield PackedBatch(batch).plain()


def test_batches_that_make_their_pieces_are_read_so_and_give_the_same_bits() -> None:
    results = []
    for loader in (PackedLoader(last=5), PlainLoader(last=5)):
        model = medium_model()
        result = fit(model, loader, loader, FitOptions(epochs=2, micro_batch=2))
        assert result.validation is not None
        results.append((bits(model), result.validation.loss, result.epochs[1].loss))
        if isinstance(loader, PackedLoader):
            assert len(loader.packed) == 12
            assert all(len(batch.made) == 3 for batch in loader.packed)
            # a piece is gone before the next is made, and when its batch is done with
            assert all(batch.alive_beside == [0, 0, 0] for batch in loader.packed)
            assert not any(batch.alive for batch in loader.packed)
    assert results[0] == results[1]


def test_a_piece_is_gone_when_backward_begins() -> None:
    """The first layer is frozen, so that backward needs no image."""
    alive: list[int] = []

    class Watch(StepObserver):
        def before_backward(self, loss: Tensor) -> None:
            alive.append(batch.alive)

    batch, model = PackedBatch(next(FakeLoader().epoch(0))), medium_model()
    run_step(model, make_optimizer(trained(model), FitOptions()), pieces(batch, 2), 6, observer=Watch())
    assert alive == [0, 0, 0]


def test_the_origin_of_a_nan_is_looked_for_piece_by_piece() -> None:
    loader, model = PackedLoader(), medium_model()
    model[9].register_forward_hook(  # pyright: ignore[reportIndexIssue, reportCallIssue]
        lambda module, args, output: output * (1.0 if module.training else math.nan)
    )
    with pytest.raises(NotFiniteError, match=r"the first bad layer is 9 \(Linear\)"):
        fit(model, loader, loader, FitOptions(micro_batch=2))
    assert not any(sum(batch.alive_beside) for batch in loader.packed)
    assert math.isnan(evaluate(model, loader, micro_batch=2).loss)
    packed = PackedBatch(next(FakeLoader().epoch(0)))
    assert origin(model.train(), (images for images, _ in packed.pieces(2))).startswith("every layer's output is")


class Told(StepObserver):
    """Writes down what a step tells."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before_backward(self, loss: Tensor) -> None:
        self.calls.append("backward")

    def after_backward(self) -> None:
        self.calls.append("done")

    def before_parameter(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.calls.append("parameter")

    def before_update(self, loss: Tensor) -> None:
        self.calls.append("update")


@pytest.mark.parametrize(("kind", "bits_a_value"), CHOICES)
def test_a_step_can_be_taken_on_tensors_without_memory(kind: str, bits_a_value: int) -> None:
    """So that its memory can be described: nothing in it asks for a value."""
    model = medium_model().to("meta")
    optimizer = make_optimizer(trained(model), FitOptions(optimizer=kind, optimizer_bits=bits_a_value))
    images, labels = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    told = Told()
    for _ in range(2):
        run_step(model, optimizer, [(images, labels)], 6, update="backward", observer=told)
    assert told.calls == ["backward", *["parameter"] * 6, "done"] * 2
    told = Told()
    parts = list(zip(images.split(4), labels.split(4), strict=True))
    total, correct = run_step(model, optimizer, parts, 6, observer=told)
    assert told.calls == ["backward", "done"] * 2 + ["update"]
    assert (total.shape, correct.shape) == ((), ())


def test_a_step_without_an_optimizer_leaves_the_gradients() -> None:
    model, batch = medium_model(), next(FakeLoader().epoch(0))
    total, correct = run_step(model, None, pieces(batch, 4), 6)
    assert all(parameter.grad is not None for parameter in trained(model))
    logits = model(batch.images)
    assert total.item() == pytest.approx(F.cross_entropy(logits, batch.labels).item(), rel=1e-6)
    assert correct.item() == (logits.argmax(1) == batch.labels).sum().item()
