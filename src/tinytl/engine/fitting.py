"""Training: plain loops over batches and micro-batches.

One step (`tinytl.engine.step`) on a batch of N images, run as micro-batches of n_1 + n_2 + ... = N images:

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

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from tinytl.checkpoint import Boundary, Progress, Resume, load_optimizer
from tinytl.errors import InputError, NotFiniteError, RunError
from tinytl.spec import FitOptions

from .batches import BatchSource, closing, images_of
from .evaluation import Evaluation, evaluate, module_modes, restore_modes
from .finite import origin
from .infos import EpochInfo, FitResult, StepInfo, peak_bytes
from .optimizer import learning_rate, make_optimizer, seed_generators
from .step import MEND, train_step


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

    Raises InputError when nothing trains, a loader is empty, or ``options.update`` is 'backward' and a batch would run
    in several micro-batches; NotFiniteError when a loss or a gradient is NaN or infinite (the model is left as before
    that step; with update 'backward' and a bad gradient it may not be, and the last boundary cannot be saved any more:
    see `train_step`); RunError when ``resume`` does not fit.
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
    modes = module_modes(model)
    infos: list[EpochInfo] = []
    boundary: Boundary | None = None
    begun = time.perf_counter()

    def reached(epoch_end: bool) -> None:
        """Offer where the run stands."""
        nonlocal boundary
        if on_boundary is not None:
            boundary = Boundary(at, epoch_end, optimizer, names)
            on_boundary(boundary)

    def leave() -> None:
        """The last boundary's state is about to change."""
        if boundary is not None:
            boundary.past = True

    def train_epoch() -> tuple[int, float, float]:
        """Take the steps that are left of this epoch; return images, seconds and seconds waited."""
        nonlocal at
        trained, seconds, waited = 0, 0.0, 0.0
        asked = time.perf_counter()
        with closing(loader.epoch(at.epoch, start_batch=at.batch)) as source:
            for batch in source:
                start = time.perf_counter()
                lr = learning_rate(at.step, batches, options)
                seed_generators(options.seed, at.step, device)
                loss, correct = train_step(model, optimizer, batch, lr, options, _describe(at, batches), leave)
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
                reached(epoch_end=False)
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
                validation = _validate(model, val_loader, options.micro_batch, epoch)
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
            reached(epoch_end=True)
    restore_modes(modes)
    return FitResult(
        epochs=tuple(infos),
        validation=infos[-1].validation if infos else None,
        best_top1=at.best_top1,
        best_epoch=at.best_epoch,
        steps=at.step,
        seconds=time.perf_counter() - begun,
    )


def _validate(model: nn.Module, loader: BatchSource, micro_batch: int | None, epoch: int) -> Evaluation:
    validation = evaluate(model, loader, micro_batch=micro_batch)
    if math.isfinite(validation.loss):
        return validation
    modes = module_modes(model)
    model.eval()
    try:
        with closing(loader.epoch(0)) as source:
            images = (images_of(batch, micro_batch or 1) for batch in source)
            fault = origin(model, itertools.chain.from_iterable(images))
    finally:
        restore_modes(modes)
    raise NotFiniteError(f"the validation loss is {validation.loss} after epoch {epoch}: {fault}; {MEND}")


def _trainable(model: nn.Module) -> tuple[tuple[str, ...], list[nn.Parameter]]:
    pairs = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not pairs:
        raise InputError("nothing to train: no parameter requires gradients; adapt the model with adapt_ first")
    return tuple(name for name, _ in pairs), [parameter for _, parameter in pairs]


def _check_progress(at: Progress, epochs: int, batches: int) -> None:
    if at.epoch > epochs or at.batch > batches or at.step != at.epoch * batches + at.batch:
        raise RunError(
            f"cannot resume: the checkpoint is at step {at.step} ({at.epoch} epochs, {at.batch} batches), "
            f"this run has {epochs} epochs of {batches} batches; were photographs added or removed?"
        )


def _describe(at: Progress, batches: int) -> str:
    return f"step {at.step + 1} (epoch {at.epoch + 1}, batch {at.batch + 1} of {batches})"
