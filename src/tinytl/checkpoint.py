"""Where a run stands, and the one file that keeps it.

A checkpoint is a sealed safetensors file (see `tinytl._atomic`): what was learned so far, the optimizer's
slots, a `Progress`, the base's hash and the run's settings. There is no pickle in it and no generator state:
the engine seeds from (seed, step). The frozen network is not in it either; it is made again from its own
weights.

``checkpoint.safetensors`` is the newest and ``checkpoint.safetensors.prev`` the one before, used, and said,
when the newest turns out torn or bit-flipped.

    saver = Checkpointer(folder / "checkpoint.safetensors", model, adaptation, settings)
    resume = saver.load()       # restores the model; None: no checkpoint yet
    fit(..., on_boundary=saver.save, resume=resume)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tinytl._atomic import DamagedFileError, read_sealed, write_sealed
from tinytl._differences import differences
from tinytl.errors import InputError, RunError

KIND = "tinytl-checkpoint/1"
_SLOTS = {torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}


class Learned(Protocol):
    """What an adaptation tells: `tinytl.methods.Adaptation`, or anything of this shape."""

    @property
    def base_hash(self) -> str:
        """Return `tinytl.methods.base_hash` of the network before it was adapted."""
        ...

    @property
    def delta_keys(self) -> tuple[str, ...]:
        """Return the ``state_dict`` keys that make up what is learned."""
        ...


@runtime_checkable
class SelfDescribed(Protocol):
    """An optimizer that says what state it keeps, such as `tinytl.engine.Adam8bit`."""

    def blank_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where a run stands at a step boundary: all that a resumed run needs besides tensors.

    Attributes:
        epoch: epochs finished, validation included.
        batch: batches done of the epoch after those.
        step: optimizer steps done since the start.
        loss_sum, correct, images: sums over the images of the unfinished epoch so far.
        best_top1, best_epoch: best validation accuracy and after how many epochs; -1 and 0 before the first.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0


@dataclass(frozen=True)
class Resume:
    """A point to go on from. Whoever made this has restored the model's tensors (see `tinytl.checkpoint`)."""

    progress: Progress
    optimizer: Mapping[str, Tensor]


@dataclass(eq=False)
class Boundary:
    """What ``on_boundary`` is given: a consistent state of the run, valid until the next step.

    ``past`` says that the next step has begun to change parameters, so that this state is nowhere any more.
    """

    progress: Progress
    epoch_end: bool
    optimizer: torch.optim.Optimizer
    names: tuple[str, ...] = field(repr=False)
    past: bool = False

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's slots as ``{"<parameter name>/<slot>": tensor}``, not copied."""
        state = self.optimizer.state_dict()["state"]
        return {
            f"{name}/{slot}": value
            for index, name in enumerate(self.names)
            for slot, value in state.get(index, {}).items()
            if value is not None
        }


class Checkpointer:
    """Saves a run's checkpoints to one path and restores the newest good one.

    ``settings`` are JSON values, nested mappings allowed: everything that the run's bits depend on. A run is
    resumed with the settings that it was begun with, or not at all. After `load`, ``notice`` tells that the
    newest file was damaged and the one before was taken; it is None otherwise. ``saved_step`` is the step that
    the newest good file holds, None where none is known.
    """

    def __init__(self, path: Path, model: nn.Module, adaptation: Learned, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.previous = self.path.with_name(self.path.name + ".prev")
        self.notice: str | None = None
        self.saved_step: int | None = None
        self._model = model
        self._adaptation = adaptation
        self._settings = {"base": adaptation.base_hash, **json.loads(json.dumps(settings))}
        self._newest_is_good = True

    def save(self, boundary: Boundary) -> None:
        """Write the state at ``boundary``, atomically; the file that was newest is kept as ``previous``.

        Raises RunError when it cannot be written, when a tensor holds NaN or infinity, or when ``boundary`` is
        past: the files on the disk are then as before.
        """
        if boundary.past:
            raise RunError(
                f"the state after step {boundary.progress.step} cannot be saved any more: the next step has begun to "
                "change it; the checkpoint before stands"
            )
        learned = learned_tensors(self._model, self._adaptation)
        tensors = {f"model/{key}": value for key, value in learned.items()}
        tensors |= {f"optimizer/{key}": value for key, value in boundary.optimizer_tensors().items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                step = boundary.progress.step
                raise RunError(
                    f"{name} holds NaN or infinity after step {step}: not saved, the one before stands; "
                    "lower the learning rate (--lr)"
                )
        metadata = {"progress": dataclasses.asdict(boundary.progress), "settings": self._settings}
        try:
            # a damaged newest file must not push the good previous one off the disk
            write_sealed(self.path, KIND, tensors, metadata, self.previous if self._newest_is_good else None)
        except RunError as error:
            kept = "" if self.saved_step is None else f", and --resume goes on from step {self.saved_step}"
            raise RunError(f"{error}; mend that{kept}") from error
        self._newest_is_good, self.saved_step = True, boundary.progress.step

    def load(self) -> Resume | None:
        """Put the newest good checkpoint into the model; return where to go on, None without a file.

        Raises RunError when no file is good, when the settings differ (each difference is named), or when the
        tensors do not fit. The model is unchanged then.
        """
        self.notice = None
        paths = [path for path in (self.path, self.previous) if path.exists()]
        faults: list[str] = []
        for path in paths:
            try:
                tensors, progress, settings = _read(path)
            except DamagedFileError as error:
                faults.append(f"{path} {error}")
                continue
            self._newest_is_good = path == self.path
            if faults:
                self.notice = f"{faults[0]}; going on from the checkpoint before it, at step {progress.step}"
            self._refuse_other(settings)
            learned = {key[6:]: value for key, value in tensors.items() if key.startswith("model/")}
            optimizer = {key[10:]: value for key, value in tensors.items() if key.startswith("optimizer/")}
            put_tensors(self._model, learned, self._adaptation, f"{path} does not fit", RunError)
            self.saved_step = progress.step
            return Resume(progress, optimizer)
        if faults:
            raise RunError(f"no checkpoint can be used: {'; '.join(faults)}; start again in another folder (--out)")
        return None

    def _refuse_other(self, saved: Mapping[str, Any]) -> None:
        different = differences(self._settings, saved)
        if different:
            raise RunError(
                f"cannot resume {self.path}: it was made with other settings: {'; '.join(different)}; "
                "use the same ones, or another folder"
            )


def learned_tensors(model: nn.Module, adaptation: Learned) -> dict[str, Tensor]:
    """Return the tensors of ``model`` that make up what is learned, by ``state_dict`` key, not copied.

    Raises ValueError when the model has changed since it was adapted: a key is gone, or another parameter
    trains.
    """
    state = model.state_dict()
    missing = [key for key in adaptation.delta_keys if key not in state]
    keys = set(adaptation.delta_keys)
    extra = [name for name, p in model.named_parameters() if p.requires_grad and name not in keys]
    if missing or extra:
        fault = f"{missing[0]!r} is not in the model" if missing else f"{extra[0]!r} trains but would not be kept"
        raise ValueError(f"the model is not as adapt_ left it: {fault}")
    return {key: state[key] for key in adaptation.delta_keys}


def put_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    adaptation: Learned,
    prefix: str,
    error: type[InputError],
) -> None:
    """Copy ``tensors`` into ``model``, bit for bit, when keys, shapes and dtypes fit; else change nothing.

    Raises ``error``, its message beginning with ``prefix``, when they do not.
    """
    state = learned_tensors(model, adaptation)
    missing, unknown = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    if missing or unknown:
        parts = [
            f"{what} {len(names)} tensors ({names[0][:80]!r}, ...)"
            for what, names in (("it lacks", missing), ("it has besides", unknown))
            if names
        ]
        raise error(f"{prefix}: {' and '.join(parts)}; was it made with another method or backbone?")
    for key, value in sorted(tensors.items()):  # the reader's order is random; the message is not
        ours = state[key]
        if value.shape != ours.shape or value.dtype != ours.dtype:
            raise error(
                f"{prefix}: {key!r} is {_describe(value)}, expected {_describe(ours)}; "
                "was it made with other classes or another backbone?"
            )
    with torch.no_grad():
        for key, value in tensors.items():
            state[key].copy_(value)


def load_optimizer(optimizer: torch.optim.Optimizer, names: tuple[str, ...], resume: Resume) -> None:
    """Give a new optimizer over the parameters ``names`` its slots back. Raises RunError if they misfit."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in resume.optimizer.items():
        name, _, slot = key.rpartition("/")
        if name not in index:
            raise RunError(f"cannot resume: the checkpoint has optimizer state of {name[:80]!r}, frozen here")
        restored = _restored(optimizer, parameters[index[name]], slot, value)
        if restored is None:
            raise RunError(f"cannot resume: optimizer state {key[:80]!r} is {_describe(value)}")
        state.setdefault(index[name], {})[slot] = restored
    # plain SGD has no slots; any other optimizer has some for every parameter once a step is done
    stateless = optimizer.defaults.get("momentum") == 0
    if resume.progress.step and not stateless and len(state) != len(names):
        missing = next(name for name in names if index[name] not in state)
        raise RunError(f"cannot resume: the checkpoint has no optimizer state of {missing!r}")
    for number, found in state.items():
        expected = _slots(optimizer, parameters[number])
        if expected is not None and found.keys() != expected:
            raise RunError(
                f"cannot resume: the checkpoint has the optimizer state {', '.join(sorted(found))[:80]!r} of "
                f"{names[number]!r}, expected {', '.join(sorted(expected))}"
            )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _restored(optimizer: torch.optim.Optimizer, parameter: Tensor, slot: str, value: Tensor) -> Tensor | None:
    """The slot as the optimizer holds it, with the value that was saved; None: the value is no such slot."""
    if isinstance(optimizer, SelfDescribed):
        blank = optimizer.blank_state(parameter).get(slot)
        if blank is None:
            return value  # its name is refused with the whole list
        return blank.copy_(value) if (blank.shape, blank.dtype) == (value.shape, value.dtype) else None
    if value.dim() == 0 and value.is_floating_point():  # a count of steps, or the slot of a scalar
        return value.clone()
    if value.shape == parameter.shape and value.dtype == parameter.dtype:
        # With the parameter's strides: torch 2.13's fused CPU optimizers walk raw memory side by side.
        return torch.empty_like(parameter, requires_grad=False, dtype=value.dtype).copy_(value)
    return None


def _slots(optimizer: torch.optim.Optimizer, parameter: Tensor) -> set[str] | None:
    """Names of the slots that a parameter has once a step is done; None: not known."""
    if isinstance(optimizer, SelfDescribed):
        return set(optimizer.blank_state(parameter))
    return _SLOTS.get(type(optimizer))


def _read(path: Path) -> tuple[dict[str, Tensor], Progress, dict[str, Any]]:
    tensors, metadata, _ = read_sealed(path, KIND)
    progress, settings = metadata.get("progress"), metadata.get("settings")
    # the seal tells accidents, not intent: types and ranges are judged all the same
    if not isinstance(progress, dict) or not isinstance(settings, dict):
        raise DamagedFileError("holds no progress and settings of a run")
    types = {entry.name: type(entry.default) for entry in dataclasses.fields(Progress)}
    if progress.keys() != types.keys() or any(type(progress[name]) is not types[name] for name in types):
        raise DamagedFileError("holds a progress of other fields")
    if not all((-1 if name == "best_top1" else 0) <= value < 1e18 for name, value in progress.items()):
        raise DamagedFileError("holds a progress that no run can have made")
    return tensors, Progress(**progress), settings


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
