"""A super-network's training as a run: photographs and a specification in, a folder with the super-network out.

The folder holds `run.json` (the specification), `metrics.jsonl` and `checkpoint.safetensors`, and at the end
`supernet.safetensors` and `subnets.json`, how good some of its sub-networks are. Each is written whole or not at all,
and the run can be killed at any instant: resumed, it ends in the same files as one that nobody disturbed.

    torchrun --nproc-per-node 2 -m tinytl supernet PHOTOS --out RUN

Of several processes the first writes. They stop together, where a step ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinytl._atomic import remove_temporaries, write_bytes, write_sealed
from tinytl._interrupt import Stop, stop_on_signals
from tinytl._keeper import Keeper
from tinytl._lock import lock_folder
from tinytl._metrics_log import MetricsFile
from tinytl._run_folder import CHECKPOINT, METRICS, PREVIOUS, SETTINGS, made_folder, refuse_unless_free
from tinytl._threads import threads
from tinytl.backbones.once_for_all import OfaArchitecture, largest, smallest
from tinytl.checkpoint import Checkpointer, Progress, Resume
from tinytl.data import refuse_among
from tinytl.engine import StepInfo
from tinytl.errors import DataError, Interrupted, NotFiniteError, RunError, TinyTLError
from tinytl.report import record
from tinytl.spec import RunOptions

from .elastic import ElasticNet
from .loop import Course, PhaseInfo, Trained
from .measuring import SubnetResult, measure
from .processes import Group, joined
from .recalibration import recalibrate_
from .setup import PreparedSupernet, prepare_supernet
from .shrinking import everything, sample
from .spec import SupernetSpec

KIND = "tinytl-supernet/1"
SUPERNET, SUBNETS = "supernet.safetensors", "subnets.json"
FILES = (CHECKPOINT, PREVIOUS, METRICS, SETTINGS, SUPERNET, SUBNETS)


@dataclass(frozen=True)
class SupernetCallbacks:
    """What a run tells while it goes, in its first process alone: each may be left out."""

    on_start: Callable[[PreparedSupernet], object] | None = None
    on_step: Callable[[StepInfo, str], object] | None = None  # and the phase's name
    on_phase: Callable[[PhaseInfo], object] | None = None
    on_notice: Callable[[str], object] | None = None
    on_check: Callable[[int, int], object] | None = None  # photographs read before training, of how many
    on_measured: Callable[[int, int], object] | None = None  # sub-networks measured at the end, of how many

    def notice(self, text: str) -> None:
        """Call ``on_notice``, if there is one."""
        if self.on_notice is not None:
            self.on_notice(text)


@dataclass(frozen=True, eq=False)
class SupernetResult:
    """What a run left behind.

    Attributes:
        out: its folder.
        prepared: what was trained on what.
        net: the super-network, the largest sub-network chosen, with that one's statistics.
        subnets: the largest, the smallest and some random sub-networks.
        steps: taken since the start.
        is_first: whether this process is the one that prints.
    """

    out: Path
    prepared: PreparedSupernet
    net: ElasticNet
    subnets: tuple[SubnetResult, ...]
    steps: int
    is_first: bool


def train_supernet(
    spec: SupernetSpec,
    out: Path,
    *,
    options: RunOptions | None = None,
    resume: bool = False,
    callbacks: SupernetCallbacks | None = None,
) -> SupernetResult:
    """Train a super-network as ``spec`` says and leave it in the folder ``out``.

    SIGINT and SIGTERM are taken note of (in the main thread) and stop the run where nothing is lost. Started by
    torchrun, the processes train together; every one must see the same photographs and the same folder.

    Args:
        spec: what to train, on what, and how.
        out: made if missing; refused if it holds a run already, unless ``resume``, or if another run writes to it.
        options: how to carry it out (``tensorboard`` and ``report`` are of ordinary runs).
        resume: go on from the folder's checkpoint; a finished run is only measured again.
        callbacks: what to tell while it goes.

    Raises:
        InputError: something in ``spec`` or ``out`` cannot be used; RunError: the loss is not finite, or the folder
            cannot be written or resumed (settings that differ are listed); Interrupted: a signal came.
    """
    options, out = options or RunOptions(), Path(out)
    with joined() as group, stop_on_signals() as stop, threads(options.threads), contextlib.ExitStack() as stack:
        told = (callbacks or SupernetCallbacks()) if group.is_first else SupernetCallbacks()
        refuse_among(spec.photos, out)
        group.first(lambda: _refuse_unless_free(out, resume))
        alone = stop if group.size == 1 else None
        prepared = prepare_supernet(spec, options, group, alone, _checking(stop, told))
        for note in (*prepared.train.notes, *prepared.validation.notes):
            told.notice(note)
        if alone is not None:
            stop.check()
        group.first(lambda: stack.enter_context(_held(out, resume, told)))
        return _run(prepared, out, options, resume, told, stop, group)


def _run(
    prepared: PreparedSupernet,
    out: Path,
    options: RunOptions,
    resume: bool,
    told: SupernetCallbacks,
    stop: Stop,
    group: Group,
) -> SupernetResult:
    """Train and finish, in a folder that nobody else writes to."""
    spec, settings = prepared.spec, prepared.settings()
    trained = Trained(prepared.space, len(prepared.train.classes), spec.seed)
    checkpointer = Checkpointer(out / CHECKPOINT, trained, trained, settings)
    at = checkpointer.load() if resume else None
    _refuse_apart(group, at, out)
    if checkpointer.notice:
        told.notice(checkpointer.notice)
    if at is None:
        group.first(lambda: write_bytes(out / SETTINGS, json.dumps(settings, indent=2).encode() + b"\n"))
    stop.advice = f"the same command with --resume goes on from {out}"
    agreed = stop if group.size == 1 else Stop()  # several processes stop when all of them know
    agreed.advice = stop.advice
    if told.on_start is not None:
        told.on_start(prepared)
    with contextlib.ExitStack() as stack:
        progress = None if at is None else at.progress
        log = group.first(lambda: stack.enter_context(MetricsFile(out / METRICS, progress)))
        course = Course(prepared, trained, group, stop, agreed)
        if log is not None:
            keeper = Keeper(checkpointer, options, agreed, log.sync)
            _tell(course, log, keeper, told)
            stack.enter_context(_kept_at_errors(keeper, checkpointer))
        course.train(at)
    calibration = prepared.calibration()
    subnets = measure(
        trained.net,
        _to_measure(prepared),
        calibration,
        prepared.evaluation,
        prepared.preprocessing,
        group,
        _asking(agreed, told.on_measured),
    )
    trained.net.choose(largest(prepared.space))
    recalibrate_(trained.net, calibration)
    group.first(lambda: _write(out, prepared, trained.net, subnets))
    agreed.advice = stop.advice = f"the run in {out} is finished"
    return SupernetResult(out, prepared, trained.net, subnets, course.at.step, group.is_first)


def _write(out: Path, prepared: PreparedSupernet, net: ElasticNet, subnets: tuple[SubnetResult, ...]) -> None:
    metadata = {
        "space": prepared.space.name,
        "classes": list(prepared.train.classes),
        "preprocessing": dataclasses.asdict(prepared.preprocessing),
        "resolutions": list(prepared.spec.sizes),
    }
    text = json.dumps([entry.record() for entry in subnets], indent=2)
    write_bytes(out / SUBNETS, text.encode() + b"\n")
    write_sealed(out / SUPERNET, KIND, net.state_dict(), metadata)


def _to_measure(prepared: PreparedSupernet) -> list[tuple[str, OfaArchitecture]]:
    space, spec = prepared.space, prepared.spec
    draws = random.Random(f"measured/{spec.seed}")
    found = [("largest", largest(space)), ("smallest", smallest(space))]
    return found + [(f"random {i + 1}", sample(space, everything(space), draws)) for i in range(spec.measured)]


def _tell(course: Course, log: MetricsFile, keeper: Keeper, told: SupernetCallbacks) -> None:
    """Have a course write to the log, save to the disk and tell whoever listens."""

    def step(info: StepInfo, phase: str, resolution: int) -> None:
        keeper.moved(info)
        log.append({**record(info), "phase": phase, "resolution": resolution})
        if told.on_step is not None:
            told.on_step(info, phase)

    def epoch(info: PhaseInfo) -> None:
        log.append(info.record())
        if info.results and told.on_phase is not None:
            told.on_phase(info)

    course.on_step, course.on_epoch, course.on_boundary = step, epoch, keeper.boundary


def _refuse_unless_free(out: Path, resume: bool) -> None:
    refuse_unless_free(out, resume)
    if (out / SUPERNET).exists() and not (out / CHECKPOINT).exists():
        raise RunError(f"{out} holds a super-network but no checkpoint to resume: give another folder with --out")


def _refuse_apart(group: Group, at: Resume | None, out: Path) -> None:
    """Refuse to go on where the processes do not stand at the same step: they would wait for each other forever."""
    places = group.gathered(at.progress if at is not None else Progress())
    if any(place != places[0] for place in places):
        raise RunError(f"the processes found different checkpoints in {out}: every one must see the same folder")


@contextlib.contextmanager
def _held(out: Path, resume: bool, told: SupernetCallbacks) -> Iterator[None]:
    with made_folder(out), lock_folder(out, told.notice):
        _refuse_unless_free(out, resume)  # again: another run may have ended just now
        remove_temporaries(out / name for name in FILES)
        yield


@contextlib.contextmanager
def _kept_at_errors(keeper: Keeper, checkpointer: Checkpointer) -> Iterator[None]:
    """Where the block raises what is raised at a step boundary or before a step, save the state there and say so."""
    try:
        yield
    except Interrupted:
        keeper.keep()
        raise
    except TinyTLError as error:
        with contextlib.suppress(RunError):  # what stopped the run is what there is to tell
            keeper.keep()
        if isinstance(error, NotFiniteError | DataError) and checkpointer.saved_step is not None:
            error.args = (f"{error}; the state after step {checkpointer.saved_step} is in {checkpointer.path}",)
        raise


def _checking(stop: Stop, told: SupernetCallbacks) -> Callable[[int, int], None]:
    def check(done: int, total: int) -> None:
        stop.check()
        if told.on_check is not None:
            told.on_check(done, total)

    return check


def _asking(stop: Stop, hook: Callable[[int, int], object] | None) -> Callable[[int, int], None]:
    """Between sub-networks, ask whether to stop: what has been trained is on the disk."""

    def measured(done: int, total: int) -> None:
        stop.check()
        if hook is not None:
            hook(done, total)

    return measured
