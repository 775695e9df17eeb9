"""A search: photographs, a space and a memory budget in, the network that suits them out.

1. The super-network is fine-tuned on four fifths of the training photographs, a random sub-network each step.
2. Random sub-networks are measured on the other fifth, and each is planned.
3. A predictor learns accuracy from them; an evolution looks for what is best within the budget, by planned bytes.
4. The best, and the default network of that size, are trained a little and measured again; the first of them is found.
5. That network is trained on all training photographs, as `tinytl train` does.

The folder holds a file for each of these, and the whole can be cut at any instant and gone on with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinytl._atomic import remove_temporaries, write_bytes
from tinytl._found import SEARCH, WINNER
from tinytl._interrupt import Stop, stop_on_signals
from tinytl._lock import lock_folder
from tinytl._run_folder import CHECKPOINT, PREVIOUS, SETTINGS, made_folder
from tinytl._threads import threads
from tinytl.data import refuse_among, resolve_split
from tinytl.delta import check_names
from tinytl.run import Callbacks, RunResult, train
from tinytl.spec import FitOptions, RunOptions, TrainSpec

from .archive import Candidate
from .begin import (
    conditions_of,
    kept_stopwatch,
    refuse_other,
    refuse_too_small,
    refuse_unless_free,
    settings_of,
)
from .generations import require_pymoo
from .planned import Cost
from .profile import Stopwatch
from .records import PLANS, Finalist, Pair
from .session import make_shared, own_weights
from .shared import SharedNet
from .space import Choice, Space, make_space
from .spec import SearchOptions, SearchSpec
from .stages import EVOLUTION, FINALISTS, PAIRS, TIMES, Stages
from .target import Target, make_target
from .tuning import TuneInfo, Tuning
from .workers import Crew, Work

SHARED, PROFILE, RESULT, WINNERS_RUN = "shared.safetensors", "profile.json", "result.json", "winner"
FILES = (SEARCH, SHARED, PAIRS, PLANS, TIMES, EVOLUTION, FINALISTS, PROFILE, RESULT, WINNER)


@dataclass(frozen=True)
class SearchCallbacks:
    """What a search tells while it goes; each may be left out.

    Attributes:
        on_start: told the space and the target before anything is learned.
        on_progress: told a stage's name, how much of it is done, and how much there is.
        on_tune: told each step of fine-tuning.
        on_front: told after each generation the candidates that no other beats so far, and the space.
        on_notice: told what the user should know.
        run: of the winner's run.
    """

    on_start: Callable[[Space, Target], object] | None = None
    on_progress: Callable[[str, int, int], object] | None = None
    on_tune: Callable[[TuneInfo], object] | None = None
    on_front: Callable[[tuple[Candidate, ...], Space], object] | None = None
    on_notice: Callable[[str], object] | None = None
    run: Callbacks | None = None


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        out: its folder.
        space: what could be chosen.
        choice, cost: the winner, and its cost as planned.
        pairs: what was measured for the predictor.
        unseen: what the predictor says of each pair that it has not seen (cross-validated).
        tau: Kendall's, of that against the measured.
        front: predicted accuracy over planned memory.
        finalists: best first; the first is the winner.
        run: the winner's own run; None where none was asked for.
        profile: seconds of each kind of work.
    """

    out: Path
    space: Space
    choice: Choice
    cost: Cost
    pairs: tuple[Pair, ...]
    unseen: tuple[float, ...]
    tau: float
    front: tuple[Candidate, ...]
    finalists: tuple[Finalist, ...]
    run: RunResult | None
    profile: Stopwatch


def search(
    spec: SearchSpec,
    out: Path,
    *,
    options: SearchOptions | None = None,
    resume: bool = False,
    callbacks: SearchCallbacks | None = None,
) -> SearchResult:
    """Find the sub-network that suits the photographs and the memory, and train it.

    Args:
        spec: what to search, on what, for how much memory.
        out: folder of the search, made if missing.
        options: how to carry it out; the result does not depend on it.
        resume: go on with the search in the folder.
        callbacks: what to tell while it goes.

    Raises:
        InputError: something in `spec` or `out` cannot be used; BudgetError: the budget is below the smallest
            sub-network, whose bytes are named; RunError: the folder cannot be written, or was begun with other
            settings; Interrupted: a signal came.
    """
    options, callbacks, out = options or SearchOptions(), callbacks or SearchCallbacks(), Path(out)
    with stop_on_signals() as stop, threads(options.threads):
        refuse_among(spec.photos, out)
        refuse_unless_free(out, resume)
        require_pymoo()  # now, and not after an hour of fine-tuning
        space = make_space(spec.space, spec.resolution_list)
        train_set, test_set = resolve_split(
            spec.photos, spec.val_fraction, spec.split_seed, strict=options.strict, workers=options.workers
        )
        target = make_target(spec, train_set)
        check_names(train_set.classes, dataclasses.asdict(target.preprocessing))
        for note in (*train_set.notes, *test_set.notes):
            _tell(callbacks.on_notice, note)
        asked = settings_of(spec, space, train_set, test_set)
        conditions = conditions_of(spec, len(train_set.classes))
        refuse_too_small(spec, space, conditions)
        shared = make_shared(target, space)  # refuses weights that do not fit; nothing is written yet
        with made_folder(out), lock_folder(out, callbacks.on_notice or (lambda _: None)):
            refuse_other(out / SEARCH, asked)
            stop.advice = f"the same command with --resume goes on from {out}"
            work = Work(target, space, conditions, out / SHARED, options.threads)
            with Crew(work, options.processes) as crew:
                found = _choose(spec, out, options, callbacks, stop, asked, work, crew, [shared])
    found.profile.stop()
    run = _train(spec, out, options, callbacks, found.choice, found.weights) if spec.epochs else None
    return SearchResult(out, space, run=run, **{f.name: getattr(found, f.name) for f in dataclasses.fields(_Found)
                                                if f.name != "weights"})  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Found:
    """A search's result before the winner is trained, and the file of its main branch's weights, if it has its own."""

    choice: Choice
    cost: Cost
    pairs: tuple[Pair, ...]
    unseen: tuple[float, ...]
    tau: float
    front: tuple[Candidate, ...]
    finalists: tuple[Finalist, ...]
    profile: Stopwatch
    weights: str | None


def _choose(
    spec: SearchSpec,
    out: Path,
    options: SearchOptions,
    callbacks: SearchCallbacks,
    stop: Stop,
    settings: dict[str, Any],
    work: Work,
    crew: Crew,
    fresh: list[SharedNet],
) -> _Found:
    """Everything up to the winner's name, in a folder that nobody else writes to.

    ``fresh`` holds the super-network, and lets go of it when it is tuned: `Work` reads it from its file.
    """
    space, target = work.space, work.target
    with kept_stopwatch(out / PROFILE) as watch:
        stages = Stages(
            spec,
            space,
            out,
            crew,
            stop,
            watch,
            lambda *done: _tell(callbacks.on_progress, *done),
            lambda front: _tell(callbacks.on_front, front, space),
        )
        remove_temporaries(out / name for name in FILES)
        if not (out / SEARCH).exists():
            write_bytes(out / SEARCH, json.dumps(settings, indent=2).encode() + b"\n")
        _tell(callbacks.on_start, space, target)
        tuning = Tuning(fresh.pop(), target, out / SHARED, options.checkpoint_seconds)
        with watch.phase("fine-tune"):
            tuning.resume() if (out / SHARED).exists() else tuning.begin()
            tuning.run(stop, callbacks.on_tune)
        del tuning
        pairs = stages.pairs()
        predictor, unseen, tau = stages.predictor(pairs)
        front = stages.evolve(predictor, pairs, stages.line(pairs))
        finalists = stages.finalists(front, predictor)
        best = finalists[0]
        choice = space.choice(np.array(best.genome))
        weights = own_weights(space, target, np.array(best.genome), out)
        winner = {
            **choice.to_json(),
            "weights": spec.weights if weights is None else str(weights.relative_to(out)),
            "norm": spec.norm,
            "pretrained": spec.pretrained or weights is not None,
        }
        write_bytes(out / WINNER, json.dumps(winner, indent=2).encode() + b"\n")
    own = spec.weights if weights is None else str(weights)
    return _Found(choice, best.cost, tuple(pairs), tuple(unseen), tau, front.candidates, tuple(finalists), watch, own)


def _train(
    spec: SearchSpec, out: Path, options: SearchOptions, callbacks: SearchCallbacks, choice: Choice, weights: str | None
) -> RunResult:
    """Train the winner, or any other choice, on all training photographs."""
    folder = out / WINNERS_RUN
    begun = any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS, SETTINGS))
    run_options = RunOptions(workers=options.workers, threads=options.threads, strict=options.strict)
    asked = run_spec(spec, choice, weights)
    return train(asked, folder, options=run_options, resume=begun, callbacks=callbacks.run)


def run_spec(spec: SearchSpec, choice: Choice, weights: str | None, *, epochs: int | None = None) -> TrainSpec:
    """What `tinytl train` is asked for, to train a choice as the search would.

    Args:
        spec: of the search.
        choice: of its space.
        weights: of its main branch (`tinytl.search.session.own_weights`, or the search's own).
        epochs: in place of the search's.
    """
    return TrainSpec(
        photos=spec.photos,
        backbone=choice.backbone,
        method=choice.method,
        norm=spec.norm,
        weights=weights,
        pretrained=spec.pretrained or weights is not None,
        resolution=choice.resolution,
        batch_size=spec.batch_size,
        val_fraction=spec.val_fraction,
        split_seed=spec.split_seed,
        min_scale=spec.min_scale,
        flip=spec.flip,
        color=spec.color,
        frozen_bits=spec.frozen_bits,
        memory_budget=spec.memory_budget,
        fit=FitOptions(
            epochs=epochs or spec.epochs,
            lr=spec.lr,
            label_smoothing=spec.label_smoothing,
            micro_batch=spec.micro_batch,
            optimizer_bits=spec.optimizer_bits,
            seed=spec.seed,
        ),
    )


def _tell(whom: Callable[..., object] | None, *what: Any) -> None:
    if whom is not None:
        whom(*what)
