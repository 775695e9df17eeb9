"""The loop of a super-network's training: phases, epochs, steps; it can be cut at any step.

What is drawn for a step depends on (seed, step) and (seed, epoch) alone, so weights, teacher, optimizer slots and a
`Progress` are all that a resumed run needs. What a phase begins with (the teacher's copy, sorted channels, a new
optimizer) is done again from the state at the end of the phase before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinytl._interrupt import Stop
from tinytl._schedule import learning_rate
from tinytl.backbones.once_for_all import OfaArchitecture, OfaSpace, largest
from tinytl.checkpoint import Boundary, Progress, Resume
from tinytl.data import Batch
from tinytl.engine import StepInfo, peak_bytes
from tinytl.engine.step import MEND
from tinytl.errors import NotFiniteError, RunError
from tinytl.report import evaluation_record

from .distill import accumulate, first_bad_gradient, make_sgd, names_in_order, teacher_of
from .elastic import ElasticNet
from .measuring import SubnetResult, measure
from .processes import Group
from .setup import PreparedSupernet
from .shrinking import Phase, drawn, sort_channels_


class Trained(nn.Module):
    """The super-network and its teacher: all tensors of a checkpoint (`tinytl.checkpoint.Learned`).

    Before the largest network is trained, the teacher is its first copy, which nobody asks.
    """

    def __init__(self, space: OfaSpace, num_classes: int, seed: int) -> None:
        super().__init__()
        self.net = ElasticNet(space, num_classes, seed)
        self.teacher = teacher_of(self.net)
        self.base_hash = f"{space.name}, {num_classes} classes"

    @property
    def delta_keys(self) -> tuple[str, ...]:
        """Every key: nothing is frozen that could be read elsewhere."""
        return tuple(self.state_dict())


@dataclass(frozen=True, eq=False)
class PhaseInfo:
    """One epoch; of a phase's last one also how good the sub-networks at its ends are.

    Attributes:
        phase: its name.
        epoch, step: done since the start; ``epochs`` are the whole run's.
        loss, accuracy: means over the epoch's images and sub-networks, as they came.
        lr: of the last step.
        results: the largest and the smallest sub-network of the phase; (): not measured.
    """

    phase: str
    epoch: int
    epochs: int
    step: int
    loss: float
    accuracy: float
    lr: float
    results: tuple[SubnetResult, ...] = ()

    def record(self) -> dict[str, Any]:
        """As a line of metrics.jsonl; ``validation`` is the largest sub-network's."""
        line = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "results"}
        validation = evaluation_record(self.results[0].evaluation) if self.results else None
        return {"kind": "epoch", **line, "validation": validation, "subnets": [r.record() for r in self.results]}


class Course:
    """A training that begins, or goes on, with `train`.

    Args:
        prepared: what is trained on what.
        trained: the network, changed in place.
        group: the processes.
        stop: what this process's signals ask.
        agreed: what all processes have agreed on; alone it is ``stop``.

    Attributes:
        at: where it stands.
        on_step, on_epoch, on_boundary: hooks of the first process, in the order in which they are called.
    """

    def __init__(self, prepared: PreparedSupernet, trained: Trained, group: Group, stop: Stop, agreed: Stop) -> None:
        self.prepared, self.trained, self.group = prepared, trained, group
        self.at = Progress()
        self.on_step: Callable[[StepInfo, str, int], object] | None = None
        self.on_epoch: Callable[[PhaseInfo], object] | None = None
        self.on_boundary: Callable[[Boundary], object] | None = None
        self._stop, self._agreed = stop, agreed
        self._boundary: Boundary | None = None

    def train(self, resume: Resume | None = None) -> None:
        """Take every step that is left.

        Raises:
            NotFiniteError: a loss or a gradient is NaN or infinite; nothing has changed in that step.
            Interrupted: a signal asked to stop, in whichever process.
            RunError: ``resume`` does not fit.
        """
        if resume is not None:
            self.at = resume.progress
            batches = len(self.prepared.training)
            if self.at.epoch > self.prepared.epochs or self.at.step != self.at.epoch * batches + self.at.batch:
                raise RunError(f"cannot resume: no such run stands at epoch {self.at.epoch}, step {self.at.step}")
        for number, phase in enumerate(self.prepared.phases):
            if self.at.epoch < phase.end:
                self._train_phase(number, phase, resume)
        self.trained.net.zero_grad(set_to_none=True)

    def _train_phase(self, number: int, phase: Phase, resume: Resume | None) -> None:
        spec, trained = self.prepared.spec, self.trained
        if self.at.epoch == phase.begin and self.at.batch == 0:
            self._leave()
            if number == 1:
                trained.teacher = teacher_of(trained.net)
            if phase.sorted_within is not None:
                sort_channels_(trained.net, phase.sorted_within)
            resume = None
        optimizer = make_sgd(trained.net, phase.lr, spec.momentum, spec.weight_decay)
        names = tuple(f"net.{name}" for name in names_in_order(trained.net, optimizer))
        if resume is not None and self.at == resume.progress:
            restore_slots_(optimizer, names, resume)
        while self.at.epoch < phase.end:
            self._train_epoch(phase, number > 0, optimizer, names)
            last = self.at.epoch + 1 == phase.end
            results = self._ends(phase) if last else ()
            if self.at.batch == 0:
                raise RunError("the training photographs give no batch")
            done = self.at
            self.at = Progress(epoch=done.epoch + 1, step=done.step)
            if self.on_epoch is not None:
                self.on_epoch(
                    PhaseInfo(
                        phase.name,
                        self.at.epoch,
                        self.prepared.epochs,
                        done.step,
                        done.loss_sum / done.images,
                        done.correct / done.images,
                        self._rate(phase, done.step - 1),
                        results,
                    )
                )
            self._reached(True, optimizer, names)

    def _train_epoch(
        self, phase: Phase, shrinks: bool, optimizer: torch.optim.Optimizer, names: tuple[str, ...]
    ) -> None:
        """Take the steps that are left of this epoch."""
        training, spec = self.prepared.training, self.prepared.spec
        batches, epochs = len(training), self.prepared.epochs
        self.trained.net.train()
        asked = time.perf_counter()
        with contextlib.closing(training.epoch(self.at.epoch, start_batch=self.at.batch)) as source:
            for batch in source:
                start = time.perf_counter()
                step = self.at.step
                lr = self._rate(phase, step)
                chosen = (
                    drawn(self.prepared.space, phase, spec.subnets, spec.seed, step)
                    if shrinks
                    else (largest(self.prepared.space),)
                )
                loss, correct, images = self._step(batch, chosen, optimizer, shrinks, phase, lr)
                size = batch.images.shape[-1]
                del batch
                self.at = replace(
                    self.at,
                    batch=self.at.batch + 1,
                    step=step + 1,
                    loss_sum=self.at.loss_sum + loss * images * len(chosen),
                    correct=self.at.correct + correct,
                    images=self.at.images + images * len(chosen),
                )
                end = time.perf_counter()
                if self.on_step is not None:
                    info = StepInfo(
                        epoch=self.at.epoch + 1,
                        batch=self.at.batch,
                        batches=batches,
                        step=self.at.step,
                        steps=batches * epochs,
                        loss=loss,
                        accuracy=correct / (images * len(chosen)),
                        lr=lr,
                        images=images,
                        seconds=end - start,
                        wait_seconds=start - asked,
                        peak_bytes=peak_bytes(torch.device("cpu")),
                    )
                    self.on_step(info, phase.name, size)
                self._reached(False, optimizer, names)
                asked = time.perf_counter()

    def _step(
        self,
        batch: Batch,
        chosen: tuple[OfaArchitecture, ...],
        optimizer: torch.optim.Optimizer,
        shrinks: bool,
        phase: Phase,
        lr: float,
    ) -> tuple[float, int, int]:
        """Take one step; return its loss, right answers and images, of all processes together."""
        spec, net, group = self.prepared.spec, self.trained.net, self.group
        teacher = self.trained.teacher if shrinks else None
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss, correct = accumulate(
            net,
            teacher,
            chosen,
            batch.normalized(),
            batch.labels,
            kd_ratio=spec.kd_ratio,
            label_smoothing=spec.label_smoothing,
        )
        asked = float(self._stop.asked is not None)
        loss, right, images, asked = group.sums(loss, correct, len(batch.labels), asked)
        loss /= group.size
        if group.size > 1 and asked:
            self._agreed.asked = self._stop.asked or signal.SIGTERM  # which torchrun hands on
        group.average_gradients_(net)
        # the same in all processes, so that none is left waiting
        where = f"at step {self.at.step + 1} (phase {phase.name}, learning rate {lr:.3g})"
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss:.4g} {where}; {MEND}")
        bad = first_bad_gradient(net)
        if bad is not None:
            raise NotFiniteError(f"the loss is {loss:.4g} {where}: the gradient of {bad} is not finite; {MEND}")
        self._leave()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss, int(right), int(images)

    def _rate(self, phase: Phase, step: int) -> float:
        """The learning rate of a step, which counts from the start of the run."""
        batches = len(self.prepared.training)
        return learning_rate(step - phase.begin * batches, batches, phase)

    def _ends(self, phase: Phase) -> tuple[SubnetResult, ...]:
        """Measure the largest sub-network and the smallest of the phase."""
        space, p = self.prepared.space, self.prepared
        named = [("largest", largest(space))]
        depths = tuple(space.stages[i].depths[-phase.depth_choices :][0] for i in space.elastic_stages)
        blocks = sum(depths) + sum(stage.depths[0] for stage in space.stages if len(stage.depths) == 1)
        small = OfaArchitecture(depths, (phase.kernels[0],) * blocks, (phase.expands[0],) * blocks)
        if small != named[0][1]:
            named.append((f"smallest of phase {phase.name}", small))

        def ask(done: int, total: int) -> None:
            self._agreed.check()

        return measure(self.trained.net, named, p.calibration(), p.evaluation, p.preprocessing, self.group, ask)

    def _reached(self, epoch_end: bool, optimizer: torch.optim.Optimizer, names: tuple[str, ...]) -> None:
        """Offer where the run stands, and stop where that has been agreed on."""
        if self.on_boundary is not None:
            self._boundary = Boundary(self.at, epoch_end, optimizer, names)
            self.on_boundary(self._boundary)
        self._agreed.check()

    def _leave(self) -> None:
        """The last boundary's state is about to change."""
        if self._boundary is not None:
            self._boundary.past = True


def restore_slots_(optimizer: torch.optim.Optimizer, names: tuple[str, ...], resume: Resume) -> None:
    """Give a new SGD its momenta back; a parameter that no sub-network has used yet has none.

    Raises:
        RunError: a slot that is none of this optimizer's.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in resume.optimizer.items():
        name, _, slot = key.rpartition("/")
        known = name in index and slot == "momentum_buffer"
        if not known or value.shape != parameters[index[name]].shape or value.dtype != parameters[index[name]].dtype:
            raise RunError(f"cannot resume: the checkpoint has the optimizer state {key[:80]!r}, which does not fit")
        state[index[name]] = {slot: value.clone()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
