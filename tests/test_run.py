"""A run end to end: photographs to a folder, resumed to the same bits, opened again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tinytl.backbones import load
from tinytl.backbones.proxylessnas import published_names
from tinytl.checkpoint import Checkpointer
from tinytl.delta import load_delta
from tinytl.engine import EpochInfo, FitOptions
from tinytl.errors import DeltaError, InputError, RunError, UnknownNameError, WeightsError
from tinytl.run import Callbacks, RunResult, prepare, train
from tinytl.spec import RunOptions, TrainSpec
from tinytl.trained import open_run, photos_for

from .photographs import make_photographs


def spec_for(photos: Path, **changes: object) -> TrainSpec:
    fit = FitOptions(epochs=2, lr=3e-3, seed=1, micro_batch=2)
    base = TrainSpec(
        str(photos), "proxylessnas_mobile", pretrained=False, resolution=64, batch_size=4, val_fraction=0.34, fit=fit
    )
    return dataclasses.replace(base, **changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    torch.set_num_threads(1)
    return train(spec_for(photos), tmp_path_factory.mktemp("run") / "run", options=RunOptions(workers=1))


def test_a_run_leaves_what_it_should(finished: RunResult) -> None:
    names = {path.name for path in finished.out.iterdir()}
    assert {"run.json", "metrics.jsonl", "delta.safetensors", "curves.png", "checkpoint.safetensors"} <= names
    lines = [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == (["step"] * 3 + ["epoch"]) * 2
    assert finished.evaluation.images == 6
    assert finished.delta_bytes == (finished.out / "delta.safetensors").stat().st_size
    recorded = json.loads((finished.out / "run.json").read_text())
    assert recorded["method"] == "tinytl-l+b"
    assert recorded["fit"]["epochs"] == 2


def test_the_delta_on_the_base_is_the_trained_model_bit_for_bit(finished: RunResult) -> None:
    opened = open_run(finished.out)
    ours, theirs = opened.model.state_dict(), finished.prepared.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_frozen_stays_frozen(finished: RunResult, photos: Path) -> None:
    fresh = prepare(spec_for(photos))
    before, after = fresh.model.state_dict(), finished.prepared.model.state_dict()
    learned = set(fresh.adaptation.delta_keys)
    frozen = [name for name in before if name not in learned]
    assert len(frozen) == 61  # every convolution of the main branch
    for name in frozen:
        assert torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in fresh.adaptation.trained)


def test_evaluating_the_opened_run_gives_the_same_figures(finished: RunResult, photos: Path) -> None:
    opened = open_run(finished.out / "delta.safetensors")
    found = opened.evaluate(finished.prepared.validation, workers=0)
    assert found.top1 == finished.evaluation.top1
    assert found.balanced_accuracy == finished.evaluation.balanced_accuracy
    everything = opened.evaluate(photos_for(opened, str(photos)), workers=0)
    assert everything.images == 18


def test_predictions_are_probabilities(finished: RunResult, photos: Path) -> None:
    opened = open_run(finished.out)
    labels = opened.predict(photos / "red" / "0.jpg", top=5)
    assert len(labels) == 3
    assert sum(label["probability"] for label in labels) == pytest.approx(1.0, abs=1e-5)
    assert labels[0]["probability"] >= labels[-1]["probability"]
    assert {label["label"] for label in labels} == {"blue", "green", "red"}


def test_a_run_cut_after_an_epoch_ends_in_the_same_bits(finished: RunResult, photos: Path, tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(info: EpochInfo) -> None:
        if info.epoch == 2:
            raise Cut

    out = tmp_path / "run"
    with pytest.raises(Cut):
        train(spec_for(photos), out, options=RunOptions(workers=1), callbacks=Callbacks(on_epoch=cut))
    assert not (out / "delta.safetensors").exists()
    with pytest.raises(RunError, match="unfinished"):
        open_run(out)
    resumed = train(spec_for(photos), out, resume=True, options=RunOptions(workers=2))
    assert (out / "delta.safetensors").read_bytes() == (finished.out / "delta.safetensors").read_bytes()
    assert resumed.evaluation.top1 == finished.evaluation.top1
    again = train(spec_for(photos), out, resume=True)  # finished: nothing is left to do
    assert again.fit.epochs == ()
    assert again.evaluation.top1 == finished.evaluation.top1


def test_micro_batches_take_the_same_steps(photos: Path, tmp_path: Path) -> None:
    """With SGD: Adam divides a gradient that is nothing but rounding by itself."""
    found = []
    for size in (None, 1):
        fit = FitOptions(epochs=2, lr=0.05, optimizer="sgd", micro_batch=size)
        result = train(spec_for(photos, fit=fit), tmp_path / str(size), options=RunOptions(workers=0))
        found.append((result.prepared.model.state_dict(), result.prepared.adaptation.trained))
    (whole, trained), (pieces, _) = found
    for name in trained:
        torch.testing.assert_close(whole[name], pieces[name], rtol=1e-4, atol=1e-5, msg=name)


def test_calibration_is_skipped_on_request_and_matters(photos: Path, tmp_path: Path) -> None:
    fit = FitOptions(epochs=1, lr=1e-9)
    runs = [
        train(
            spec_for(photos, calibrate=on, fit=fit), tmp_path / str(on), options=RunOptions(workers=0)
        ).prepared.model.state_dict()
        for on in (True, False)
    ]
    key = "features.block1.lite.conv1.norm.running_var"
    assert torch.equal(runs[1][key], torch.ones_like(runs[1][key]))
    assert not torch.equal(runs[0][key], runs[1][key])


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_a_published_checkpoint_with_lite_modules_trains_and_opens(norm: str, photos: Path, tmp_path: Path) -> None:
    model = load("proxylessnas_mobile", pretrained=False, norm=norm, lite=True).model  # type: ignore[arg-type]
    state = model.state_dict()
    torch.save({published: state[ours] for ours, published in published_names(state).items()}, tmp_path / "w.pth")
    fit = FitOptions(epochs=1, micro_batch=2)
    spec = spec_for(photos, pretrained=True, norm=norm, weights=str(tmp_path / "w.pth"), fit=fit)
    result = train(spec, tmp_path / "run", options=RunOptions(workers=0))
    assert result.prepared.adaptation.inserted == ()
    assert sum(".lite." in name for name in result.prepared.adaptation.trained) == 19 * 5
    opened = open_run(tmp_path / "run")
    assert opened.evaluate(result.prepared.validation, workers=0).top1 == result.evaluation.top1
    (tmp_path / "w.pth").unlink()
    with pytest.raises(WeightsError, match="--weights"):
        open_run(tmp_path / "run")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit = FitOptions(epochs=1)

    def stop(info: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec_for(photos, fit=fit), out, options=RunOptions(workers=0), callbacks=Callbacks(on_step=stop))
    other = spec_for(photos, fit=fit, method="ft-last")
    result = train(other, out, resume=True, options=RunOptions(workers=0))
    assert json.loads((out / "run.json").read_text())["method"] == "ft-last"
    assert open_run(out).adaptation.method == result.prepared.adaptation.method


def test_evaluating_where_it_trained_is_said(finished: RunResult, photos: Path) -> None:
    opened = open_run(finished.out)
    assert "trained on" in opened.notes_on(str(photos))[0]
    assert opened.notes_on("elsewhere") == ()


def test_of_a_folder_with_splits_what_was_held_out_is_evaluated(finished: RunResult, tmp_path: Path) -> None:
    make_photographs(tmp_path / "train", each=3)
    make_photographs(tmp_path / "test", each=2, seed=1)
    opened = open_run(finished.out)
    assert len(photos_for(opened, str(tmp_path))) == 6


def test_resuming_with_other_settings_is_refused(finished: RunResult, photos: Path) -> None:
    other = dataclasses.replace(spec_for(photos), batch_size=5)
    with pytest.raises(RunError, match="batch_size is 5, was 4"):
        train(other, finished.out, resume=True)


def test_a_folder_in_use_and_a_missing_run_are_refused(finished: RunResult, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--resume"):
        train(spec_for(photos), finished.out)
    with pytest.raises(RunError, match="no run to resume"):
        train(spec_for(photos), tmp_path / "none", resume=True)


def test_a_delta_on_another_base_is_refused(finished: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = load_delta(finished.out / "delta.safetensors")
    assert delta.base_hash == prepare(finished.prepared.spec).adaptation.base_hash
    monkeypatch.setattr(
        "tinytl.trained.load_delta", lambda path: dataclasses.replace(delta, extra={"pretrained": False})
    )
    with pytest.raises(DeltaError, match="another base"):
        open_run(finished.out)  # base_seed 0 instead of 1: other random weights


@pytest.mark.parametrize("extra", [{"pretrained": "no"}, {"base_seed": []}, {"base_seed": -1}, {"base_seed": 2**70}])
def test_hostile_extra_values_are_refused(
    finished: RunResult, extra: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = load_delta(finished.out / "delta.safetensors")
    monkeypatch.setattr("tinytl.trained.load_delta", lambda path: dataclasses.replace(delta, extra=extra))
    with pytest.raises(DeltaError, match="its base is described by"):
        open_run(finished.out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 16}, "resolution is 16"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"min_scale": 0.0}, "min_scale is 0.0"),
        ({"last_blocks": -1}, "last_blocks is -1"),
    ],
)
def test_bad_numbers_are_refused(photos: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec_for(photos, **changes)


def test_unknown_names_are_refused(photos: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'efficientnet_lite[012]'"):
        spec_for(photos, backbone="efficientnet_lite")
    with pytest.raises(UnknownNameError, match="unknown method"):
        spec_for(photos, method="tinytl")


def test_checkpoints_are_of_the_run(finished: RunResult) -> None:
    fresh = prepare(finished.prepared.spec)
    with pytest.raises(RunError, match="other settings"):
        Checkpointer(finished.out / "checkpoint.safetensors", fresh.model, fresh.adaptation, {}).load()
