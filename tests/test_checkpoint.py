"""Checkpoints: the same bits after any cut, and no damage that goes unseen."""

from __future__ import annotations

import errno
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.test_engine import FakeLoader, bits, one_thread, small_model
from tinytl import _atomic
from tinytl.checkpoint import Boundary, Checkpointer, Progress, Resume
from tinytl.engine import FitOptions, FitResult, fit
from tinytl.errors import RunError

__all__ = ["one_thread"]  # a fixture for this module too


@dataclass(frozen=True)
class FakeAdaptation:
    base_hash: str = "ab" * 32
    delta_keys: tuple[str, ...] = ("2.weight", "2.bias", "7.weight", "7.bias")


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of the run is used afterwards but its files."""


SETTINGS = {"resolution": 8, "fit": {"epochs": 4, "lr": 0.01}, "classes": ["a", "b", "c"]}


def saver_of(folder: Path, model: nn.Module, settings: dict[str, object] | None = None) -> Checkpointer:
    return Checkpointer(folder / "checkpoint.safetensors", model, FakeAdaptation(), settings or SETTINGS)


def run(
    folder: Path, optimizer: str = "adam", every_step: bool = False, kill_at: int = -1
) -> tuple[nn.Module, FitResult]:
    """Start or go on, as a process would: everything but the files is new. Dies at boundary ``kill_at``."""
    model = small_model(dropout=0.4)
    saver = saver_of(folder, model)
    options = FitOptions(epochs=4, lr=0.01, seed=5, optimizer=optimizer, micro_batch=4)
    count = 0

    def on_boundary(at: Boundary) -> None:
        nonlocal count
        if at.epoch_end or every_step:
            saver.save(at)
        count += 1
        if count == kill_at:
            raise Killed

    resume = saver.load()
    result = fit(model, FakeLoader(), FakeLoader(seed=1), options, on_boundary=on_boundary, resume=resume)
    return model, result


def files(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoint.safetensors")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("kill_at", [1, 3, 4, 6, 8, 11, 15])
def test_resumed_run_ends_in_the_same_bits(tmp_path: Path, optimizer: str, every_step: bool, kill_at: int) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "cut").mkdir()
    straight, whole = run(tmp_path / "straight", optimizer, every_step)
    with pytest.raises(Killed):
        run(tmp_path / "cut", optimizer, every_step, kill_at)
    resumed, rest = run(tmp_path / "cut", optimizer, every_step)
    assert bits(straight) == bits(resumed)
    assert (tmp_path / "straight/checkpoint.safetensors").read_bytes() == (
        tmp_path / "cut/checkpoint.safetensors"
    ).read_bytes()  # model, optimizer, progress, best score
    for ours, theirs in zip(rest.epochs, whole.epochs[-len(rest.epochs) :], strict=True):
        assert (ours.loss, ours.accuracy, ours.lr) == (theirs.loss, theirs.accuracy, theirs.lr)
        assert ours.validation is not None
        assert theirs.validation is not None
        assert ours.validation.loss == theirs.validation.loss
    assert (rest.best_top1, rest.best_epoch, rest.steps) == (whole.best_top1, whole.best_epoch, 12)


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    first, whole = run(tmp_path)
    again, result = run(tmp_path)
    assert bits(first) == bits(again)
    assert (result.epochs, result.validation, result.steps, result.step_share) == ((), None, 12, None)
    assert result.best_top1 == whole.best_top1


def test_the_file_holds_what_was_learned_and_no_more(tmp_path: Path) -> None:
    model, _ = run(tmp_path)
    tensors = files(tmp_path)
    names = FakeAdaptation().delta_keys
    slots = {f"optimizer/{name}/{slot}" for name in names for slot in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors.keys() == {f"model/{name}" for name in names} | slots
    for name, parameter in model.named_parameters():
        if name in names:
            assert torch.equal(tensors[f"model/{name}"], parameter)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.safetensors", "checkpoint.safetensors.prev"]


def test_restored_slots_keep_the_parameter_s_strides(tmp_path: Path) -> None:
    """Else the fused optimizer would walk them in the wrong order (see `tinytl.engine`)."""
    with pytest.raises(Killed):
        run(tmp_path, kill_at=4)
    model, seen = small_model(), []
    resume = saver_of(tmp_path, model).load()
    options = FitOptions(epochs=4, lr=0.01)
    fit(model, FakeLoader(), None, options, resume=resume, on_boundary=lambda at: seen.append(at.optimizer))
    weight = model.get_parameter("2.weight")
    assert weight.stride() != weight.contiguous().stride()
    assert seen[0].state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "foreign", "gone"])
def test_a_damaged_newest_file_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    (tmp_path / "straight").mkdir()
    straight, _ = run(tmp_path / "straight")
    cut = tmp_path / "cut"
    cut.mkdir()
    with pytest.raises(Killed):
        run(cut, kill_at=8)
    newest = cut / "checkpoint.safetensors"
    data = bytearray(newest.read_bytes())
    newest.unlink()  # not overwritten: .prev may be another name of the same file
    data[len(data) // 2] ^= 4
    content = {"torn": data[:-5], "empty": b"", "flipped": data, "foreign": b"PK\x03\x04" * 100}
    if damage != "gone":
        newest.write_bytes(content[damage])

    model = small_model()
    saver = saver_of(cut, model)
    resume = saver.load()
    assert resume is not None
    assert resume.progress.epoch == 1  # boundary 8 ended epoch 2
    if damage == "gone":
        assert saver.notice is None
    else:
        assert saver.notice is not None
        assert "going on from the checkpoint before it, at step 3" in saver.notice
        assert "\n" not in saver.notice
    # the next save must not push the good file out for the damaged one
    good = (cut / "checkpoint.safetensors.prev").read_bytes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver.save(Boundary(resume.progress, True, optimizer, ()))
    assert (cut / "checkpoint.safetensors.prev").read_bytes() == good
    newest.unlink()
    resumed, _ = run(cut)
    assert bits(resumed) == bits(straight)


def test_two_damaged_files_are_an_error(tmp_path: Path) -> None:
    run(tmp_path)
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:-1])
    with pytest.raises(RunError, match=r"no checkpoint can be used: .*; .*start again in another folder"):
        saver_of(tmp_path, small_model()).load()


def test_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    assert saver_of(tmp_path, small_model()).load() is None


def test_other_settings_are_listed(tmp_path: Path) -> None:
    run(tmp_path)
    model = small_model()
    before = bits(model)
    other = {"resolution": 16, "fit": {"epochs": 5, "lr": 0.01}, "classes": ["a", "b", "c"], "crop": 0.2}
    with pytest.raises(RunError) as caught:
        saver_of(tmp_path, model, other).load()
    message = str(caught.value)
    assert "crop is 0.2, was not set; fit.epochs is 5, was 4; resolution is 16, was 8; use" in message
    assert bits(model) == before
    saver = Checkpointer(tmp_path / "checkpoint.safetensors", model, FakeAdaptation("cd" * 32), SETTINGS)
    with pytest.raises(RunError, match="base is"):
        saver.load()


def test_another_model_is_refused_unchanged(tmp_path: Path) -> None:
    run(tmp_path)
    model = small_model(classes=4)
    before = bits(model)
    with pytest.raises(RunError, match=r"'7\.bias' is float32 \(3,\), expected float32 \(4,\)"):
        saver_of(tmp_path, model).load()
    with pytest.raises(RunError, match="float64"):
        saver_of(tmp_path, small_model(torch.float64)).load()
    assert bits(model) == before


def test_another_number_of_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, kill_at=4)
    model = small_model()
    resume = saver_of(tmp_path, model).load()
    with pytest.raises(RunError, match="were photographs added or removed"):
        fit(model, FakeLoader(batches=4), None, FitOptions(epochs=4), resume=resume)
    with pytest.raises(RunError, match="were photographs added or removed"):
        fit(
            model,
            FakeLoader(batches=3),
            None,
            FitOptions(epochs=1),
            resume=_moved(resume, epoch=2, step=6),
        )


def _moved(resume, **changes: int):

    return replace(resume, progress=replace(resume.progress, **changes))


def test_nan_is_never_saved(tmp_path: Path) -> None:
    model, _ = run(tmp_path)
    before = files(tmp_path)
    with torch.no_grad():
        model.get_parameter("2.bias")[1] = float("nan")
    boundary = Boundary(Progress(4, 0, 12), True, torch.optim.SGD(model.parameters(), lr=0.1), ())
    with pytest.raises(RunError, match=r"model/2\.bias holds NaN or infinity after step 12"):
        saver_of(tmp_path, model).save(boundary)
    assert all(torch.equal(value, before[key]) for key, value in files(tmp_path).items())


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    boundary = Boundary(Progress(4, 0, 12), True, torch.optim.SGD(model.parameters(), lr=0.1), ())
    with pytest.raises(RunError, match="No space left on device"):
        saver_of(tmp_path, model).save(boundary)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_hard_links_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links on FAT")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.safetensors", "checkpoint.safetensors.prev"]


@pytest.mark.parametrize("fault", ["replace", "link"])
def test_killed_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """At any of the file system calls of a save there is a whole checkpoint, and the next run uses it."""
    (tmp_path / "straight").mkdir()
    straight, _ = run(tmp_path / "straight")
    original = getattr(os, fault)
    for deadly in range(1, 8):
        folder = tmp_path / str(deadly)
        folder.mkdir()
        calls = 0

        def dying(*arguments: object, deadly: int = deadly) -> None:
            nonlocal calls
            calls += 1
            if calls >= deadly:
                raise KeyboardInterrupt
            original(*arguments)

        monkeypatch.setattr(os, fault, dying)
        if fault == "replace" or deadly <= 3:  # four epochs make three links
            with pytest.raises(KeyboardInterrupt):
                run(folder)
        monkeypatch.setattr(os, fault, original)
        resumed, _ = run(folder)
        assert bits(resumed) == bits(straight)


@pytest.mark.parametrize(
    "progress",
    [
        None,
        [],
        {},
        {"epoch": 1},
        {"step": 1.5},
        {"epoch": -1},
        {"best_top1": 1},
        {"images": True},
        {"step": 10**30},
    ],
)
def test_hostile_progress_is_refused(tmp_path: Path, progress: object) -> None:
    if isinstance(progress, dict) and progress and progress != {"epoch": 1}:
        progress = asdict(Progress()) | progress
    path = tmp_path / "checkpoint.safetensors"
    metadata = {"progress": progress, "settings": {}}
    _atomic.write_sealed(path, "tinytl-checkpoint/1", {"model/x": torch.zeros(2)}, metadata)
    with pytest.raises(RunError, match="no checkpoint can be used"):
        saver_of(tmp_path, small_model()).load()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({}, "has no optimizer state of '2.weight'"),
        ({"0.weight/exp_avg": torch.zeros(1)}, "optimizer state of '0.weight', frozen here"),
        ({"2.bias/exp_avg": torch.zeros(4)}, "'2.bias/exp_avg' is float32 \\(4,\\)"),
    ],
)
def test_misfitting_optimizer_state_is_refused(optimizer: dict[str, Tensor], message: str) -> None:
    resume = Resume(Progress(1, 0, 3), optimizer)
    with pytest.raises(RunError, match=message):
        fit(small_model(), FakeLoader(), None, FitOptions(), resume=resume)


def test_a_model_changed_after_adapting_is_a_bug(tmp_path: Path) -> None:
    model = small_model()
    model.get_parameter("0.bias").requires_grad_(True)
    boundary = Boundary(Progress(), True, torch.optim.SGD(model.parameters(), lr=0.1), ())
    with pytest.raises(ValueError, match=r"'0\.bias' trains but would not be kept"):
        saver_of(tmp_path, model).save(boundary)


def test_the_file_gets_the_umask_s_permissions(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        _atomic.write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_unwritable_targets_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none" / "x", tmp_path / "folder", tmp_path / "file" / "x"):
        with pytest.raises(RunError, match="cannot write") as caught:
            _atomic.write_bytes(path, b"data")
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


DTYPES = st.sampled_from(list(_atomic.DTYPES))
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@settings(max_examples=60, deadline=None)
@given(entries=st.dictionaries(st.text("abz./é", min_size=1, max_size=8), st.tuples(DTYPES, SHAPES), max_size=5))
def test_sealed_files_round_trip(tmp_path_factory: pytest.TempPathFactory, entries: dict) -> None:
    path = tmp_path_factory.mktemp("sealed") / "file"
    tensors = {name: (torch.randn(shape) * 50).to(dtype) for name, (dtype, shape) in entries.items()}
    metadata = {"text": "é\n\u2603", "list": [1, 2.5, None], "dict": {"b": 1, "a": 2}}
    digest = _atomic.write_sealed(path, "test/1", tensors, metadata)
    data = path.read_bytes()
    back, read, again = _atomic.read_sealed(path, "test/1")
    assert (read, again) == (metadata, digest)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(_atomic.raw_bytes(back[name])) == bytes(_atomic.raw_bytes(tensor))
    _atomic.write_sealed(path, "test/1", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert path.read_bytes() == data  # equal content, equal bytes


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_flip_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flip") / "file"
    tensors = {"w": torch.arange(12.0).reshape(3, 4), "n": torch.tensor(3)}
    _atomic.write_sealed(path, "test/1", tensors, {"a": [1, "two"]})
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        back, metadata, _ = _atomic.read_sealed(path, "test/1")
    except _atomic.DamagedFileError:
        return
    # only white space or a spelling of the header can have changed: nothing that is read
    assert metadata == {"a": [1, "two"]}
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
