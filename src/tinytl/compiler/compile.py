"""From a run, or from what a run is asked for, to a program: `tinytl compile` and `tinytl train --engine device`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tinytl._interrupt import stop_on_signals
from tinytl._options import number_of_bytes
from tinytl._prepared import calibrate, loaders, prepare
from tinytl.backbones import Preprocessing, find
from tinytl.delta import check_names, load_delta
from tinytl.errors import InputError
from tinytl.memory.step import NORMALIZE
from tinytl.methods import METHODS, Adaptation, adapt_, method
from tinytl.nn.packing import pack_frozen_
from tinytl.spec import FitOptions, RunOptions, TrainSpec
from tinytl.trained import MAX_RECORD_BYTES, base_network, open_run

from .capture import capture
from .plan import plan
from .program import Program
from .step_options import StepOptions

THREADS = 2
NO_PHOTOS = "-"
"""In the place of `TrainSpec.photos` where a program is compiled for classes and not for photographs."""
OF_THE_NETWORK = ("backbone", "method", "last_blocks", "norm", "pretrained", "resolution", "codebook", "calibrate")
"""Fields of `TrainSpec` that a finished run has settled."""
MOST_CLASSES = 100_000


@dataclass(frozen=True, eq=False)
class Compiled:
    """A program that is laid out, and what to know of it."""

    program: Program
    notes: tuple[str, ...] = ()


def compile_model(
    model: nn.Module,
    adaptation: Adaptation,
    preprocessing: Preprocessing,
    *,
    spec: TrainSpec,
    classes: Sequence[str],
    threads: int = THREADS,
) -> Program:
    """The training step of an adapted network as a program that is laid out, ready for `write_program`.

    Args:
        model: lean, as `adapt_` left it, packed or not; left untouched. Its trained tensors are the first values.
        adaptation: what `adapt_` returned.
        preprocessing: how images become its input; its resolution is the program's.
        spec: what a delta says of the base, and how to train: batch size, micro-batch, optimizer, memory budget.
        classes: names, in the order of the logits.
        threads: that will compute at most.

    Raises:
        InputError: nothing fits the budget (BudgetError), or names that a delta could not hold.
        UnsupportedLayerError: a layer that no instruction stands for.
    """
    plain = json.loads(json.dumps(dataclasses.asdict(preprocessing)))  # tuples become lists, as in a delta
    check_names(classes, plain)
    captured = capture(model, adaptation, preprocessing)
    fit = spec.fit
    options = StepOptions(
        batch=spec.batch_size,
        micro_batch=1,
        evaluate_images=1,
        label_smoothing=fit.label_smoothing,
        optimizer=fit.optimizer,
        optimizer_bits=fit.optimizer_bits,
        weight_decay=fit.weight_decay,
        momentum=fit.momentum,
        threads=threads,
    )
    budget = None if spec.memory_budget is None else number_of_bytes("memory_budget", spec.memory_budget)
    # 'end' is the default of a spec and no wish
    updates = "backward" if fit.update == "backward" else None
    size = fit.micro_batch if updates is None else spec.batch_size
    program = plan(captured, options, budget_bytes=budget, micro_batch=size, updates=updates)
    delta = {
        "method": {"name": adaptation.method.name, "parts": json.loads(json.dumps(adaptation.method.to_json()))},
        "backbone": spec.backbone,
        "norm": spec.norm,
        "classes": list(classes),
        "preprocessing": plain,
        "base_hash": adaptation.base_hash,
        "extra": {
            "pretrained": spec.pretrained,
            "base_seed": fit.seed,
            "frozen_bits": spec.frozen_bits,
            "codebook": spec.codebook,
        },
    }
    return replace(program, meta={**program.meta, "delta": delta, "train": _training(spec, preprocessing, adaptation)})


def compile_network(
    model: nn.Module,
    adaptation: Adaptation,
    *,
    resolution: int,
    batch: int = 8,
    optimizer: str = "adam",
    optimizer_bits: int = 32,
    micro_batch: int | None = None,
    budget_bytes: int | None = None,
    threads: int = THREADS,
) -> Program:
    """The step of an adapted network by itself, to be measured: laid out, of no named classes or base.

    Raises:
        InputError: nothing fits the budget (BudgetError); UnsupportedLayerError: as `compile_model`.
    """
    captured = capture(model, adaptation, Preprocessing(resolution, NORMALIZE.mean, NORMALIZE.std, "bilinear", 1.0))
    options = StepOptions(
        batch=batch,
        micro_batch=1,
        evaluate_images=1,
        optimizer=optimizer,
        optimizer_bits=optimizer_bits,
        threads=threads,
    )
    return plan(captured, options, budget_bytes=budget_bytes, micro_batch=micro_batch)


def compile_spec(spec: TrainSpec, *, options: RunOptions | None = None) -> Compiled:
    """The program that trains what `tinytl train` with this specification would train, on the same base.

    The classes are those of `spec.photos`, on whose first training images fresh lite modules are calibrated.

    Raises:
        InputError: as `tinytl.run.prepare` and `compile_model`.
    """
    options = options or RunOptions()
    prepared = prepare(replace(spec, memory_budget=None), options)  # the lab's plan is not the program's
    with stop_on_signals() as stop:
        if spec.calibrate:
            calibrate(prepared, loaders(prepared, options.workers, None, stop)[0])
    program = compile_model(
        prepared.model,
        prepared.adaptation,
        prepared.preprocessing,
        spec=spec,
        classes=prepared.train.classes,
        threads=options.threads or THREADS,
    )
    return Compiled(program, (*prepared.train.notes, *prepared.validation.notes))


def compile_classes(spec: TrainSpec, classes: Sequence[str], *, threads: int = THREADS) -> Compiled:
    """The same without photographs, for classes by their names; `spec.photos` is not looked at.

    Raises:
        InputError: as `compile_spec`.
    """
    known = find(spec.backbone).preprocessing
    preprocessing = replace(known, resolution=spec.resolution or known.resolution)
    backbone = base_network(spec.backbone, spec.pretrained, spec.norm, spec.weights, len(classes), spec.fit.seed)
    chosen = method(spec.method, last_blocks=spec.last_blocks)
    adaptation = adapt_(backbone.model, chosen, resolution=preprocessing.resolution, seed=spec.fit.seed)
    if spec.frozen_bits < 32:
        pack_frozen_(backbone.model, spec.frozen_bits, spec.codebook)
    program = compile_model(backbone.model, adaptation, preprocessing, spec=spec, classes=classes, threads=threads)
    notes = []
    if adaptation.inserted and spec.norm == "bn" and spec.calibrate:
        notes.append(
            "no photographs were given, so the lite modules' statistics are not measured (mean 0, variance 1): "
            "give the folder to train on in the place of --classes to have them calibrated"
        )
    return Compiled(program, tuple(notes))


def compile_run(path: Path, given: Mapping[str, Any], *, threads: int = THREADS) -> Compiled:
    """The program that goes on from a finished run: its trained tensors are the first values.

    Args:
        path: a run's folder, or its delta.
        given: options (of `TrainSpec` and `FitOptions`) in place of those of the run.
        threads: that will compute at most.

    Raises:
        InputError: no run there; an option of the network itself, which the run has settled.
    """
    weights = given.get("weights")
    run = open_run(path, weights=None if weights is None else Path(weights))
    file = path / "delta.safetensors" if os.path.isdir(path) else path
    delta = load_delta(file)
    recorded = _recorded(file)
    for name in OF_THE_NETWORK:
        if name in given:
            raise InputError(f"{name} is given, and {path} is a run, which has its own: leave it out")
    extra = dict(delta.extra)
    bits = extra.get("frozen_bits", 32)
    asked = given.get("frozen_bits", bits)
    if bits != 32 and asked != bits:
        raise InputError(f"frozen_bits is {asked}, and {path} was trained on weights of {bits} bits: leave it out")
    if asked < bits:
        pack_frozen_(run.model, asked)
    fields = {field.name for field in dataclasses.fields(TrainSpec)} - {"fit", "photos"}
    fit_fields = {field.name for field in dataclasses.fields(FitOptions)}
    before = recorded.get("fit")
    own_fit: dict[str, Any] = before if isinstance(before, dict) else {}
    fit = {name: value for name, value in {**own_fit, **given}.items() if name in fit_fields}
    fit["seed"] = extra.get("base_seed", 0)  # the base's random parts were drawn from it
    if "seed" in given and given["seed"] != fit["seed"]:
        raise InputError(f"seed is {given['seed']}, and the base of {path} was drawn from {fit['seed']}: leave it out")
    values = {name: value for name, value in {**recorded, **given}.items() if name in fields}
    values |= {
        "method": delta.method.name if delta.method.name in METHODS else TrainSpec.method,
        "last_blocks": 0,
        "backbone": delta.backbone,
        "norm": delta.norm,
        "pretrained": extra.get("pretrained", True),
        "codebook": extra.get("codebook", False),
        "frozen_bits": asked,
        "resolution": run.preprocessing.resolution,
        "memory_budget": given.get("memory_budget"),
    }
    spec = TrainSpec(photos=NO_PHOTOS, **values, fit=FitOptions(**fit))
    program = compile_model(
        run.model, run.adaptation, run.preprocessing, spec=spec, classes=run.classes, threads=threads
    )
    return Compiled(program)


def class_names(text: str) -> tuple[str, ...]:
    """`--classes`: a number of classes, named by their numbers; or their names with commas between.

    Raises:
        InputError: neither, or a name twice.
    """
    digits = text.strip()
    if digits.isdecimal():
        # Python reads no number of thousands of digits, and nobody a line that repeats them
        if len(digits) > len(str(MOST_CLASSES)):
            raise InputError(f"classes is a number of {len(digits):,} digits, expected 1 to {MOST_CLASSES:,}")
        if not 1 <= (count := int(digits)) <= MOST_CLASSES:
            raise InputError(f"classes is {digits}, expected 1 to {MOST_CLASSES:,}, or names such as cat,dog")
        width = len(str(count - 1))
        return tuple(f"{number:0{width}d}" for number in range(count))
    names = tuple(name.strip() for name in text.split(","))
    if len(names) < 2 or not all(names) or len(set(names)) != len(names):
        raise InputError(f"classes is {text!r}, expected a number of classes, or their names such as cat,dog")
    return tuple(sorted(names))


def is_run(path: str) -> bool:
    """Whether a path is a run's folder or a delta, and not photographs or a configuration."""
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, name)) for name in ("delta.safetensors", "run.json"))
    return path.endswith(".safetensors")


def _training(spec: TrainSpec, preprocessing: Preprocessing, adaptation: Adaptation) -> dict[str, Any]:
    """META's `train`: the specification without what names this machine's photographs."""
    values = dataclasses.asdict(spec)
    fit = values.pop("fit")
    del values["photos"], values["memory_budget"]
    del values["last_blocks"]  # the method's name tells
    return {**values, **fit, "method": adaptation.method.name, "resolution": preprocessing.resolution}


def _recorded(delta: Path) -> dict[str, Any]:
    """What a run beside a delta was asked for; nothing where the delta lies alone."""
    try:
        with open(delta.parent / "run.json", "rb") as file:
            found = json.loads(file.read(MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
