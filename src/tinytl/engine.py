"""Training and evaluation: plain loops over batches and micro-batches.

One step on a batch of N images, run as micro-batches of n_1 + n_2 + ... = N images:

    loss = sum_i (n_i / N) * mean cross entropy of micro-batch i

so the accumulated gradient is that of the batch's mean loss, and the step is the same up to the order of
floating-point sums, while only one micro-batch's activations are alive. (This needs layers that work an image
at a time: frozen batch norm, group norm. Batch statistics would differ.) Adam, and a cosine from ``lr`` to 0
over all steps, after a linear warm-up if asked for: the paper's recipe (arXiv 2007.11622).

**A run can be cut at any step.** The generators are seeded from (seed, step) before every step, so that no
generator state has to be kept: parameters, optimizer slots and a `Progress` are all there is. ``on_boundary``
is offered them after every step and every epoch; given back as ``resume`` they go on to the same bits.

The engine moves batches to the model's device and nothing else: it makes no folders, prints nothing, picks no
device.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.checkpoint import Boundary, Progress, Resume, load_optimizer
from tinytl.errors import InputError, RunError, UnknownNameError

OPTIMIZERS = ("adam", "sgd")


class LabelledBatch(Protocol):
    """What a loader yields: images (N, 3, R, R) float and labels (N,) int64."""

    @property
    def images(self) -> Tensor: ...  # noqa: D102
    @property
    def labels(self) -> Tensor: ...  # noqa: D102


class BatchSource(Protocol):
    """What `fit` and `evaluate` read: `tinytl.data.Loader`, or anything of this shape."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        ...

    def epoch(self, epoch: int, /, start_batch: int = 0) -> Iterator[LabelledBatch]:
        """Yield an epoch's batches from ``start_batch`` on (both from 0); equal arguments, equal batches."""
        ...


@dataclass(frozen=True)
class FitOptions:
    """How to train. Bad values are refused with an InputError.

    Attributes:
        epochs: passes over the training images.
        lr: peak learning rate; the paper's, tuned per data set at batch 8, run from 0.5e-4 to 16e-4.
        weight_decay: added to the gradient as ``weight_decay * parameter``.
        label_smoothing: the paper takes 0.7, and 0.1 for CIFAR and Food.
        micro_batch: most images whose activations are alive at once, in validation too; None: a whole batch.
        optimizer: 'adam' or 'sgd'.
        momentum: of SGD; Adam has its own.
        seed: of every random draw in the model.
        warmup_epochs: epochs over which the rate rises linearly from 0; they count among ``epochs``.
    """

    epochs: int = 50
    lr: float = 6e-4
    weight_decay: float = 0.0
    label_smoothing: float = 0.1
    micro_batch: int | None = None
    optimizer: str = "adam"
    momentum: float = 0.9
    seed: int = 0
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        _whole("epochs", self.epochs, 1)
        _whole("seed", self.seed, 0)
        _whole("warmup_epochs", self.warmup_epochs, 0)
        if self.micro_batch is not None:
            _whole("micro_batch", self.micro_batch, 1)
        _number("lr", self.lr)
        if self.lr == 0:
            raise InputError("lr is 0: nothing would be learned; the default is 6e-4")
        _number("weight_decay", self.weight_decay)
        _number("label_smoothing", self.label_smoothing, below=1.0)
        _number("momentum", self.momentum, below=1.0)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", str(self.optimizer), OPTIMIZERS)
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"warmup_epochs is {self.warmup_epochs}, expected fewer than the {self.epochs} epochs"
            )


@dataclass(frozen=True)
class StepInfo:
    """One step.

    Attributes:
        epoch, batch, step: counted from 1; ``batches`` are an epoch's, ``steps`` the whole run's.
        loss, accuracy: mean over the batch's images, before the step; accuracy as a fraction.
        seconds, wait_seconds: taken by the step; waited for the loader before it.
        peak_bytes: see `peak_bytes`.
    """

    epoch: int
    batch: int
    batches: int
    step: int
    steps: int
    loss: float
    accuracy: float
    lr: float
    images: int
    seconds: float
    wait_seconds: float
    peak_bytes: int

    @property
    def images_per_second(self) -> float:
        """Images a second, waiting for the loader included."""
        return self.images / max(self.seconds + self.wait_seconds, 1e-9)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a model is on a set of images.

    Attributes:
        top1: share of the images whose largest logit is the label's, in [0, 1].
        balanced_accuracy: mean recall of the classes that are present, in [0, 1].
        images: how many there were.
        loss: mean cross entropy without label smoothing, in nats.
        confusion: (C, C) int64; row: true class, column: predicted class.
        majority_share: share of the most frequent true class: the top-1 of always answering that.
    """

    top1: float
    balanced_accuracy: float
    images: int
    loss: float
    confusion: Tensor = field(repr=False)
    majority_share: float


@dataclass(frozen=True, eq=False)
class EpochInfo:
    """One epoch.

    Attributes:
        epoch, step: counted from 1; ``epochs`` are the whole run's.
        loss, accuracy: means over the epoch's training images as they came (augmented, the weights changing).
        lr: of the last step.
        validation: None without a validation loader.
        best_top1, best_epoch: best validation accuracy so far; -1 and 0 without validation.
        trained_images, seconds, wait_seconds, validation_seconds: this process's share of the epoch, which is
            not the whole of an epoch that was resumed; seconds as in `StepInfo`.
        peak_bytes: see `peak_bytes`.
    """

    epoch: int
    epochs: int
    step: int
    loss: float
    accuracy: float
    lr: float
    validation: Evaluation | None
    best_top1: float
    best_epoch: int
    trained_images: int
    seconds: float
    wait_seconds: float
    validation_seconds: float
    peak_bytes: int

    @property
    def images_per_second(self) -> float:
        """Training images a second, waiting for the loader included."""
        return self.trained_images / max(self.seconds + self.wait_seconds, 1e-9)


@dataclass(frozen=True, eq=False)
class FitResult:
    """What `fit` did.

    ``epochs`` are those that ended in this process and ``validation`` is the last one's: () and None when the
    resumed run was finished already. The model is left with the last step's weights, in the mode that it had.
    """

    epochs: tuple[EpochInfo, ...]
    validation: Evaluation | None
    best_top1: float
    best_epoch: int
    steps: int
    seconds: float


def fit(
    model: nn.Module,
    loader: BatchSource,
    val_loader: BatchSource | None,
    options: FitOptions,
    *,
    on_step: Callable[[StepInfo], object] | None = None,
    on_epoch: Callable[[EpochInfo], object] | None = None,
    on_boundary: Callable[[Boundary], object] | None = None,
    resume: Resume | None = None,
) -> FitResult:
    """Train, in place, the parameters of ``model`` that require gradients.

    ``on_boundary`` comes after every step and every epoch, behind ``on_step`` and ``on_epoch``: what they
    wrote down is there before a checkpoint says that it is done. A hook may save there and raise, and nothing
    is lost. The caller's random generators are left as they were.

    Raises InputError when nothing trains or a loader is empty; RunError when the loss is NaN or infinite (the
    model is left as before that step) or ``resume`` does not fit.
    """
    names, parameters = _trainable(model)
    optimizer = make_optimizer(parameters, options)
    batches = len(loader)
    if batches == 0:
        raise InputError("the training loader holds no batch: add photographs or lower the batch size")
    at = Progress()
    if resume is not None:
        at = resume.progress
        _check_progress(at, options.epochs, batches)
        load_optimizer(optimizer, names, resume)
    device = parameters[0].device
    was_training = model.training
    infos: list[EpochInfo] = []
    begun = time.perf_counter()

    def train_epoch() -> tuple[int, float, float]:
        """Take the steps that are left of this epoch; return images, seconds and seconds waited."""
        nonlocal at
        trained, seconds, waited = 0, 0.0, 0.0
        asked = time.perf_counter()
        with _closing(loader.epoch(at.epoch, start_batch=at.batch)) as source:
            for batch in source:
                start = time.perf_counter()
                lr = learning_rate(at.step, batches, options)
                seed_generators(options.seed, at.step, device)
                loss, correct = train_step(model, optimizer, batch, lr, options, _describe(at, batches))
                images = len(batch.labels)
                at = replace(
                    at,
                    batch=at.batch + 1,
                    step=at.step + 1,
                    loss_sum=at.loss_sum + loss * images,
                    correct=at.correct + correct,
                    images=at.images + images,
                )
                end = time.perf_counter()
                info = StepInfo(
                    epoch=at.epoch + 1,
                    batch=at.batch,
                    batches=batches,
                    step=at.step,
                    steps=batches * options.epochs,
                    loss=loss,
                    accuracy=correct / images,
                    lr=lr,
                    images=images,
                    seconds=end - start,
                    wait_seconds=start - asked,
                    peak_bytes=peak_bytes(device),
                )
                trained, seconds, waited = (
                    trained + images,
                    seconds + info.seconds,
                    waited + info.wait_seconds,
                )
                if on_step is not None:
                    on_step(info)
                if on_boundary is not None:
                    on_boundary(Boundary(at, False, optimizer, names))
                asked = time.perf_counter()
        if at.batch != batches:
            raise RunError(f"epoch {at.epoch + 1} ended after {at.batch} batches, expected {batches}")
        return trained, seconds, waited

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for epoch in range(at.epoch + 1, options.epochs + 1):
            model.train()
            trained, seconds, waited = train_epoch()
            start = time.perf_counter()
            validation, best = None, (at.best_top1, at.best_epoch)
            if val_loader is not None:
                validation = evaluate(model, val_loader, micro_batch=options.micro_batch)
                if not math.isfinite(validation.loss):
                    raise RunError(f"the validation loss is {validation.loss} after epoch {epoch}: {_MEND}")
                best = max(best, (validation.top1, epoch), key=lambda pair: pair[0])  # ties: the earlier
            info = EpochInfo(
                epoch=epoch,
                epochs=options.epochs,
                step=at.step,
                loss=at.loss_sum / at.images,
                accuracy=at.correct / at.images,
                lr=learning_rate(at.step - 1, batches, options),
                validation=validation,
                best_top1=best[0],
                best_epoch=best[1],
                trained_images=trained,
                seconds=seconds,
                wait_seconds=waited,
                validation_seconds=time.perf_counter() - start,
                peak_bytes=peak_bytes(device),
            )
            infos.append(info)
            at = Progress(epoch=epoch, step=at.step, best_top1=best[0], best_epoch=best[1])
            if on_epoch is not None:
                on_epoch(info)
            if on_boundary is not None:
                on_boundary(Boundary(at, True, optimizer, names))
    model.train(was_training)
    return FitResult(
        epochs=tuple(infos),
        validation=infos[-1].validation if infos else None,
        best_top1=at.best_top1,
        best_epoch=at.best_epoch,
        steps=at.step,
        seconds=time.perf_counter() - begun,
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: LabelledBatch,
    lr: float,
    options: FitOptions,
    where: str = "this step",
) -> tuple[float, int]:
    """Take one optimizer step on one batch; return its mean loss and how many images were right before it.

    Raises RunError, naming ``where``, when the loss is NaN or infinite. No parameter has changed then.
    """
    device = next(model.parameters()).device
    count = len(batch.labels)
    size = options.micro_batch or count
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    optimizer.zero_grad(set_to_none=True)
    for images, labels in zip(batch.images.split(size), batch.labels.split(size), strict=True):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = model(images)  # (n, classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
        loss = loss * (len(labels) / count)
        loss.backward()
        total += loss.detach()
        correct += (logits.detach().argmax(1) == labels).sum()
        del images, logits, loss  # or this micro-batch's graph would live on beside the next one's
    value = total.item()
    if not math.isfinite(value):
        optimizer.zero_grad(set_to_none=True)
        raise RunError(f"the loss is {value} at {where}, learning rate {lr:.3g}: {_MEND}")
    for group in optimizer.param_groups:
        group["lr"] = lr
        for parameter in group["params"]:
            _match_strides(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # no gradient is alive between steps
    return value, int(correct.item())


def evaluate(model: nn.Module, loader: BatchSource, *, micro_batch: int | None = None) -> Evaluation:
    """Measure a model on the batches of ``loader.epoch(0)``, in evaluation mode, which is undone afterwards.

    ``micro_batch`` bounds the images put through the model at once. Raises InputError when there is no image.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    guessed: list[Tensor] = []
    actual: list[Tensor] = []
    loss_sum, classes = 0.0, 0
    try:
        with torch.inference_mode(), _closing(loader.epoch(0)) as source:
            for batch in source:
                size = micro_batch or len(batch.labels)
                for images, labels in zip(batch.images.split(size), batch.labels.split(size), strict=True):
                    logits = model(images.to(device, non_blocking=True))  # (n, classes)
                    classes = logits.shape[1]
                    loss_sum += F.cross_entropy(logits, labels.to(device), reduction="sum").item()
                    guessed.append(logits.argmax(1).cpu())
                    actual.append(labels.cpu())
    finally:
        model.train(was_training)
    if not actual:
        raise InputError("there is no image to evaluate on: the loader is empty")
    pairs = torch.cat(actual) * classes + torch.cat(guessed)
    confusion = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    support = confusion.sum(1)  # images of each class
    right = confusion.diagonal()
    images = int(support.sum())
    return Evaluation(
        top1=int(right.sum()) / images,
        balanced_accuracy=(right[support > 0].double() / support[support > 0]).mean().item(),
        images=images,
        loss=loss_sum / images,
        confusion=confusion,
        majority_share=int(support.max()) / images,
    )


def learning_rate(step: int, batches: int, options: FitOptions) -> float:
    """Return the rate of a step (from 0): linear warm-up, then ``lr/2 (1 + cos(pi t/T))`` over T steps."""
    warmup = options.warmup_epochs * batches
    if step < warmup:
        return options.lr * (step + 1) / warmup
    done = (step - warmup) / (options.epochs * batches - warmup)
    return 0.5 * options.lr * (1.0 + math.cos(math.pi * done))


def make_optimizer(parameters: list[nn.Parameter], options: FitOptions) -> torch.optim.Optimizer:
    """Return the optimizer; one fused pass where torch has one (float32 and float64 on CPU and CUDA)."""
    dtypes, devices = (torch.float32, torch.float64), ("cpu", "cuda")
    fused = all(p.dtype in dtypes and p.device.type in devices for p in parameters)
    lr, decay = options.lr, options.weight_decay
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(parameters, lr=lr, momentum=options.momentum, weight_decay=decay, fused=fused)


def seed_generators(seed: int, step: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of ``device`` from (seed, step): equal pairs, equal draws."""
    value = int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "little") >> 1
    torch.default_generator.manual_seed(value)  # torch.manual_seed would also format a stack trace for CUDA
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory held so far: the allocator's on CUDA, else this process's resident set (RSS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS tells bytes, Linux KiB


_MEND = "lower the learning rate (--lr), or go on from the last checkpoint"


def _trainable(model: nn.Module) -> tuple[tuple[str, ...], list[nn.Parameter]]:
    pairs = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not pairs:
        raise InputError(
            "nothing to train: no parameter requires gradients; adapt the model with adapt_ first"
        )
    return tuple(name for name, _ in pairs), [parameter for _, parameter in pairs]


@contextlib.contextmanager
def _closing(source: Iterator[LabelledBatch]) -> Iterator[Iterator[LabelledBatch]]:
    """Close a generator at the end of the block: the loader's workers end there, also when a step raises."""
    try:
        yield source
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            close()


def _match_strides(parameter: nn.Parameter) -> None:
    # The fused CPU optimizers of torch 2.13 walk raw memory: a gradient or slot of other strides than its
    # parameter gives wrong numbers in silence. Autograd keeps them alike, but a hook may not.
    grad = parameter.grad
    if grad is not None and grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(grad)


def _check_progress(at: Progress, epochs: int, batches: int) -> None:
    if at.epoch > epochs or at.batch > batches or at.step != at.epoch * batches + at.batch:
        raise RunError(
            f"cannot resume: the checkpoint is at step {at.step} ({at.epoch} epochs, {at.batch} batches), "
            f"this run has {epochs} epochs of {batches} batches; were photographs added or removed?"
        )


def _describe(at: Progress, batches: int) -> str:
    return f"step {at.step + 1} (epoch {at.epoch + 1}, batch {at.batch + 1} of {batches})"


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}")


def _number(name: str, value: object, below: float = math.inf) -> None:
    # NaN and infinity fail the comparison too
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        end = "" if below == math.inf else f" and below {below:g}"
        raise InputError(f"{name} is {value!r}, expected a number of at least 0{end}")
