"""The engine against hand-written loops, on a small network and random images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.engine import (
    EpochInfo,
    FitOptions,
    StepInfo,
    evaluate,
    fit,
    learning_rate,
    make_optimizer,
    train_step,
)
from tinytl.errors import InputError, RunError, UnknownNameError


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class FakeBatch:
    images: Tensor
    labels: Tensor


@dataclass
class FakeLoader:
    """Random images that depend on (seed, epoch, batch) alone; counts how many iterators were closed."""

    batches: int = 3
    size: int = 6
    classes: int = 3
    dtype: torch.dtype = torch.float32
    last: int | None = None
    seed: int = 0
    closed: int = 0
    served: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[FakeBatch]:
        try:
            for number in range(start_batch, self.batches):
                generator = torch.Generator().manual_seed(10_000 * self.seed + 100 * epoch + number)
                size = self.last if self.last and number == self.batches - 1 else self.size
                images = torch.randn(size, 3, 8, 8, generator=generator, dtype=self.dtype)
                labels = torch.randint(self.classes, (size,), generator=generator)
                self.served.append((epoch, number))
                yield FakeBatch(images.contiguous(memory_format=torch.channels_last), labels)
        finally:
            self.closed += 1


def small_model(dtype: torch.dtype = torch.float32, dropout: float = 0.0, classes: int = 3) -> nn.Module:
    """A frozen convolution, a trained 3x3 convolution kept channels last, and a classifier."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(5, classes),
    ).to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model.train()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {key: value.contiguous().numpy().tobytes() for key, value in model.state_dict().items()}


def test_fit_is_the_plain_loop() -> None:
    options = FitOptions(epochs=3, lr=0.01, label_smoothing=0.3, weight_decay=0.01, warmup_epochs=1)
    model, loader = small_model(torch.float64), FakeLoader(dtype=torch.float64, last=2)
    frozen = model[0].weight.clone()  # pyright: ignore[reportCallIssue, reportIndexIssue]
    result = fit(model, loader, None, options)

    plain = small_model(torch.float64)
    adam = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], weight_decay=0.01)
    step = 0
    for epoch in range(3):
        losses = []
        for batch in FakeLoader(dtype=torch.float64, last=2).epoch(epoch):
            rate = 0.01 * (step + 1) / 3 if step < 3 else 0.005 * (1 + math.cos(math.pi * (step - 3) / 6))
            adam.param_groups[0]["lr"] = rate
            adam.zero_grad()
            loss = F.cross_entropy(plain(batch.images), batch.labels, label_smoothing=0.3)
            loss.backward()
            adam.step()
            step += 1
            losses.append((loss.item(), len(batch.labels)))
        mean = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
        assert result.epochs[epoch].loss == pytest.approx(mean, rel=1e-12)
    assert result.steps == step == 9
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert torch.equal(model[0].weight, frozen)  # pyright: ignore[reportIndexIssue, reportArgumentType]


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 6, 100])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_micro_batches_take_the_same_step(micro_batch: int, optimizer: str) -> None:
    batch = next(FakeLoader(dtype=torch.float64).epoch(0))
    results = []
    for size in (None, micro_batch):
        model = small_model(torch.float64)
        options = FitOptions(micro_batch=size, optimizer=optimizer, lr=0.1)
        parameters = [p for p in model.parameters() if p.requires_grad]
        results.append(train_step(model, make_optimizer(parameters, options), batch, 0.1, options))
        results.append([p.detach().clone() for p in parameters])
        assert all(p.grad is None for p in model.parameters())
    assert results[0][0] == pytest.approx(results[2][0], rel=1e-13)
    assert results[0][1] == results[2][1]
    for whole, parts in zip(results[1], results[3], strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-11)


def test_only_one_micro_batch_is_alive() -> None:
    model, largest = small_model(), []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        largest.append(len(inputs[0]))

    model.register_forward_pre_hook(note)
    fit(model, FakeLoader(last=5), FakeLoader(last=3), FitOptions(epochs=1, micro_batch=2))
    assert largest == [2, 2, 2, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 2, 1]


def test_gradient_of_other_strides_is_put_right() -> None:
    """Torch's fused CPU Adam walks raw memory; this fails without the engine's guard."""
    batch, updated = next(FakeLoader().epoch(0)), []
    for scramble in (False, True):
        model, options = small_model(), FitOptions(lr=0.1)
        weight = model[2].weight  # pyright: ignore[reportIndexIssue]
        assert isinstance(weight, nn.Parameter)
        if scramble:

            def contiguous(parameter: Tensor) -> None:
                assert parameter.grad is not None
                parameter.grad = parameter.grad.contiguous()

            weight.register_post_accumulate_grad_hook(contiguous)
        parameters = [p for p in model.parameters() if p.requires_grad]
        train_step(model, make_optimizer(parameters, options), batch, 0.1, options)
        updated.append(weight.detach())
    assert updated[0].stride() != updated[0].contiguous().stride()
    assert torch.equal(updated[0], updated[1])


def test_hooks_see_every_step_and_epoch_in_order() -> None:
    calls: list[tuple[object, ...]] = []

    def on_step(info: StepInfo) -> None:
        calls.append(("step", info.epoch, info.batch, info.step))
        assert (info.batches, info.steps, info.images) == (3, 6, 6)
        assert info.peak_bytes > 0
        assert info.seconds > 0
        assert info.wait_seconds >= 0
        assert info.images_per_second > 0
        assert 0 <= info.accuracy <= 1

    def on_epoch(info: EpochInfo) -> None:
        calls.append(("epoch", info.epoch, info.step))
        assert info.validation is not None
        assert (info.trained_images, info.validation.images) == (18, 18)

    fit(
        small_model(),
        FakeLoader(),
        FakeLoader(seed=1),
        FitOptions(epochs=2),
        on_step=on_step,
        on_epoch=on_epoch,
        on_boundary=lambda at: calls.append(("boundary", at.epoch_end, at.progress.epoch, at.progress.batch)),
    )
    assert calls[:6] == [
        ("step", 1, 1, 1),
        ("boundary", False, 0, 1),
        ("step", 1, 2, 2),
        ("boundary", False, 0, 2),
        ("step", 1, 3, 3),
        ("boundary", False, 0, 3),
    ]
    assert calls[6:8] == [("epoch", 1, 3), ("boundary", True, 1, 0)]
    assert len(calls) == 16


def test_the_share_of_the_step_is_what_was_not_waited() -> None:
    class Slow(FakeLoader):
        def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[FakeBatch]:
            for batch in super().epoch(epoch, start_batch):
                time.sleep(0.02)
                yield batch

    result = fit(small_model(), Slow(), None, FitOptions(epochs=2))
    waited, stepped = (sum(getattr(e, key) for e in result.epochs) for key in ("wait_seconds", "seconds"))
    assert waited >= 6 * 0.02
    assert result.step_share == pytest.approx(stepped / (stepped + waited))


def test_draws_depend_on_seed_and_step_alone_and_leave_the_caller_s_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    weights = []
    for noise, seed in ((0, 1), (5, 1), (0, 2)):
        model = small_model(dropout=0.5)
        torch.manual_seed(3)
        fit(
            model,
            FakeLoader(),
            None,
            FitOptions(epochs=1, seed=seed),
            on_step=lambda _, n=noise: torch.rand(n),
        )
        assert torch.equal(torch.rand(2), expected)
        weights.append(bits(model))
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_stops_before_the_step(value: float) -> None:
    model, loader = small_model(), FakeLoader()
    states: list[dict[str, bytes]] = []

    def poison(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * value if len(states) == 4 else output  # the fifth step: epoch 2, batch 2

    model.register_forward_hook(poison)
    with pytest.raises(RunError, match=r"the loss is .* at step 5 \(epoch 2, batch 2 of 3\)") as caught:
        fit(model, loader, None, FitOptions(epochs=2), on_step=lambda _: states.append(bits(model)))
    assert "\n" not in str(caught.value)
    assert bits(model) == states[-1]
    assert all(p.grad is None for p in model.parameters())
    assert loader.closed == 2


def test_a_bad_validation_loss_stops_before_the_boundary() -> None:
    model, ends = small_model(), []

    def poison(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output if module.training else output * math.nan

    model.register_forward_hook(poison)
    with pytest.raises(RunError, match="validation loss is nan after epoch 1"):
        fit(model, FakeLoader(), FakeLoader(), FitOptions(), on_boundary=lambda at: ends.append(at.epoch_end))
    assert ends == [False] * 3


class Fixed(nn.Module):
    """Answers the class that the image's first pixel names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(x[:, 0, 0, 0].long(), 4) * self.scale


class FixedLoader(FakeLoader):
    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[FakeBatch]:
        labels, answers = torch.tensor([0, 0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 0, 2, 1, 0, 3])
        images = answers.float().reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        for part in range(0, 7, 3):
            yield FakeBatch(images[part : part + 3], labels[part : part + 3])


@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_evaluation_by_hand(micro_batch: int | None) -> None:
    model = Fixed().train()
    result = evaluate(model, FixedLoader(), micro_batch=micro_batch)
    assert model.training
    assert result.images == 7
    assert result.top1 == 5 / 7
    assert result.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2 + 1) / 3, abs=1e-15)  # class 2 is absent
    assert result.majority_share == 4 / 7
    assert result.confusion.tolist() == [[3, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    right, wrong = math.log(math.e + 3) - 1, math.log(math.e + 3)
    assert result.loss == pytest.approx((5 * right + 2 * wrong) / 7, rel=1e-6)


def test_best_is_the_first_of_equals() -> None:
    model = Fixed()
    batches = FixedLoader(batches=3)
    result = fit(model, batches, batches, FitOptions(epochs=3, lr=1e-9))
    assert (result.best_top1, result.best_epoch) == (5 / 7, 1)
    assert result.validation is result.epochs[-1].validation


def test_learning_rate_ends_at_zero_and_peaks_after_the_warm_up() -> None:
    options = FitOptions(epochs=4, lr=0.5, warmup_epochs=1)
    rates = [learning_rate(step, 5, options) for step in range(21)]
    assert rates[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert rates[20] == pytest.approx(0.0, abs=1e-16)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_empty_or_frozen_is_refused() -> None:
    model = small_model()
    with pytest.raises(InputError, match="holds no batch"):
        fit(model, FakeLoader(batches=0), None, FitOptions())
    with pytest.raises(InputError, match="no image to evaluate"):
        evaluate(model, FakeLoader(batches=0))
    with pytest.raises(InputError, match="nothing to train"):
        fit(model.requires_grad_(False), FakeLoader(), None, FitOptions())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "fast"),
        ("weight_decay", -0.1),
        ("label_smoothing", 1.0),
        ("momentum", 1.0),
        ("micro_batch", 0),
        ("seed", -1),
        ("warmup_epochs", 50),
        ("optimizer", "adamm"),
    ],
)
def test_bad_options_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name) as caught:
        FitOptions(**{name: value})  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UnknownNameError) == (name == "optimizer")
