"""The search as a whole, on a network of three blocks: resumed anywhere, refused in one line, used by others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinytl._found import resolved
from tinytl._threads import threads
from tinytl.backbones import BACKBONES
from tinytl.backbones._registry import _once_for_all
from tinytl.backbones.once_for_all import SPACES
from tinytl.config import settings
from tinytl.data import resolve_split, scan
from tinytl.errors import BudgetError, InputError, RunError
from tinytl.search.lines import Lines
from tinytl.search.planned import Conditions
from tinytl.search.run import SearchCallbacks, SearchResult, search
from tinytl.search.session import make_shared
from tinytl.search.shown import draw, record
from tinytl.search.space import make_space
from tinytl.search.spec import SearchOptions, SearchSpec
from tinytl.search.target import make_target
from tinytl.search.tuning import TuneInfo, Tuning
from tinytl.search.workers import Crew, Work

from . import small_run
from .command_line import tinytl
from .photographs import make_photographs
from .small_spaces import PROXYLESS

ONE = SearchOptions(threads=1, workers=0)


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, small_run.NAME, small_run.entry())


def spec_of(photos: Path, **options: Any) -> SearchSpec:
    given = {
        "pretrained": False,
        "resolutions": "32,40",
        "memory_budget": "1MB",
        "batch_size": 4,
        "tune_epochs": 1,
        "tune_batch": 8,
        "pairs": 20,
        "population": 4,
        "generations": 2,
        "finalists": 2,
        "finalist_epochs": 1,
        "epochs": 1,
        "lr": 3e-3,
        **options,
    }
    return SearchSpec(str(photos), small_run.NAME, **given)


class Cut(Exception):
    """Stands for a kill."""


def left(out: Path) -> dict[str, Any]:
    """What a search found, less the times."""
    lines = {name: Lines(out / name).entries for name in ("pairs.jsonl", "finalists.jsonl")}
    for entry in lines["finalists.jsonl"]:
        del entry["step_seconds"]
    return {
        "winner": json.loads((out / "winner.json").read_text()),
        "front": json.loads((out / "evolution.json").read_text()),
        "shared": (out / "shared.safetensors").read_bytes(),
        **lines,
        "learned": (out / "winner" / "delta.safetensors").read_bytes(),
    }


@pytest.mark.slow
def test_a_search_goes_on_from_wherever_it_was_cut(tmp_path: Path) -> None:
    """Cut in fine-tuning, in measuring, in evolution and among the finalists, it ends in the same bits."""
    photos = make_photographs(tmp_path / "photos", each=12)
    spec, undisturbed, out = spec_of(photos), tmp_path / "undisturbed", tmp_path / "cut"
    result = search(spec, undisturbed, options=ONE)
    _check_result(result, photos)

    def cut_at(stage: str, when: int) -> SearchCallbacks:
        def progress(name: str, done: int, total: int) -> None:
            if name == stage and done == when:
                raise Cut

        def tune(info: TuneInfo) -> None:
            if stage == "tuning" and info.step == when:
                raise Cut

        return SearchCallbacks(on_progress=progress, on_tune=tune)

    often = dataclasses.replace(ONE, checkpoint_seconds=1e-9)
    cuts = (("tuning", 2), ("measuring sub-networks", 7), ("evolving", 1), ("measuring finalists", 1))
    for at, (stage, when) in enumerate(cuts):
        with pytest.raises(Cut):
            search(spec, out, options=often, resume=at > 0, callbacks=cut_at(stage, when))
    search(spec, out, options=ONE, resume=True)
    assert left(out) == left(undisturbed)
    with pytest.raises(RunError, match=r"lr is 0\.001, was 0\.003"):
        search(dataclasses.replace(spec, lr=1e-3), out, options=ONE, resume=True)
    with pytest.raises(RunError, match="holds a search already"):
        search(spec, out, options=ONE)
    _check_uses(out, photos, tmp_path)


def _check_result(result: SearchResult, photos: Path) -> None:
    assert result.cost.memory_bytes <= 1_000_000
    assert all(f.cost.memory_bytes <= 1_000_000 for f in result.finalists)
    assert [f.rank for f in result.finalists] == sorted(f.rank for f in result.finalists)
    assert any(f.default for f in result.finalists), "the default network is always measured beside the found ones"
    memory = [candidate.planned.memory_bytes for candidate in result.front]
    assert memory == sorted(memory)
    assert result.run is not None
    assert result.run.prepared.spec.memory_budget == "1MB", "the run keeps to the budget that the search was given"
    test = resolve_split(str(photos), 0.2, 0)[1]
    assert result.run.evaluation.images == len(test)
    assert [path.stat().st_size > 1000 for path in draw(result, 1_000_000)] == [True] * 3
    found = record(result)
    assert json.loads(json.dumps(found)) == found
    assert found["winner"]["backbone"] == result.choice.backbone
    assert abs(sum(result.profile.seconds.values())) > 0


def _check_uses(out: Path, photos: Path, tmp_path: Path) -> None:
    """`tinytl train --backbone RUN` and `tinytl compile` take what was found."""
    found = json.loads((out / "winner.json").read_text())
    common = ["--backbone", out, "--threads", 1, "--epochs", 1, "--quiet"]
    again = tinytl("train", photos, *common, "--out", tmp_path / "again", "--json")
    assert again.json["train_images"] == 30
    settings_of_run = json.loads((tmp_path / "again" / "run.json").read_text())
    assert {name: settings_of_run[name] for name in found} == found
    compiled = tinytl("compile", out / "winner", "-o", tmp_path / "p.ttl", "--json")
    assert compiled.json["program"] == str(tmp_path / "p.ttl")


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path: Path) -> None:
    """Costs and accuracies of two processes are those of one; each is told with the index of its genome."""
    photos = make_photographs(tmp_path / "photos", each=10)
    # processes import the backbone by its name, so it has to be one that they know too
    spec = dataclasses.replace(spec_of(photos, tune_batch=4), space="mbv2_w035", resolutions="48")
    space = make_space(spec.space, spec.resolution_list)
    target = make_target(spec, scan(photos))
    tuning = Tuning(make_shared(target, space), target, tmp_path / "shared.safetensors", 60.0)
    tuning.begin()
    tuning.step = tuning.steps  # as it was drawn: what it has learned does not matter here
    tuning.save()
    work = Work(target, space, Conditions(3), tmp_path / "shared.safetensors", 1)
    rng = np.random.default_rng(0)
    genomes = [space.sample(rng) for _ in range(4)]
    found = []
    for processes in (1, 2):
        with Crew(work, processes) as crew, threads(1):
            found.append([crew.all(what, genomes) for what in ("cost", "accuracy")])
    assert found[0] == found[1]
    assert len({cost.memory_bytes for cost in found[0][0]}) > 1


@pytest.mark.slow
def test_a_once_for_all_space_is_searched_and_its_winner_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner's main branch, cut and recalibrated, travels with the search's folder."""
    monkeypatch.setitem(SPACES, PROXYLESS.name, PROXYLESS)
    monkeypatch.setitem(BACKBONES, PROXYLESS.name, _once_for_all(PROXYLESS))
    photos = make_photographs(tmp_path / "photos", each=10)
    spec = dataclasses.replace(
        spec_of(photos, generations=1, resolutions="32", finalist_epochs=0),
        space=PROXYLESS.name,
        memory_budget="60MB",
        finalists=1,
    )
    result = search(spec, tmp_path / "out", options=ONE)
    assert result.choice.backbone.startswith(f"{PROXYLESS.name}@d")
    found = json.loads((tmp_path / "out" / "winner.json").read_text())
    assert (tmp_path / "out" / found["weights"]).is_file()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    spec_again = settings({"photos": str(photos), "backbone": str(moved)})[0]
    assert spec_again.weights is not None
    assert spec_again.weights.startswith(str(moved))
    opened = tinytl("evaluate", moved / "winner", photos, "--weights", spec_again.weights, "--json")
    assert opened.json["images"] == 30


@pytest.mark.slow
def test_bounds_on_work_and_time_are_kept(tmp_path: Path) -> None:
    photos = make_photographs(tmp_path / "photos", each=10)
    spec = spec_of(photos, epochs=0, finalist_epochs=0, max_multiply_adds=2.5e5, max_step_seconds=30.0, generations=1)
    result = search(spec, tmp_path / "out", options=ONE)
    assert all((c.planned.multiply_adds or 1e9) <= 2.5e5 for c in result.front)
    assert all(f.step_seconds is not None and f.step_seconds <= 30 for f in result.finalists)
    with pytest.raises(InputError, match=r"max_step_seconds|step_seconds"):
        search(dataclasses.replace(spec, max_step_seconds=1e-7), tmp_path / "never", options=ONE)


def test_a_budget_below_the_smallest_names_the_least(tmp_path: Path) -> None:
    photos = make_photographs(tmp_path / "photos", each=10)
    with pytest.raises(BudgetError, match="smallest sub-network") as refused:
        search(spec_of(photos, memory_budget="10KB"), tmp_path / "out", options=ONE)
    assert refused.value.least_bytes > 10_000
    assert f"{refused.value.least_bytes:,}" in str(refused.value)
    assert not (tmp_path / "out").exists(), "nothing is left of what was refused"


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    photos = make_photographs(tmp_path / "photos", each=10)
    few = make_photographs(tmp_path / "few", each=4)
    out = tmp_path / "out"
    cases = {
        "no photographs": ["search"],
        "resolutions is '16,x'": ["search", photos, "--resolutions", "16,x"],
        "names one sub-network": ["search", photos, "--space", "mcunet_5fps@0-5.7-13"],
        "has 3 photograph": ["search", few, "--space", small_run.NAME, "--no-pretrained", "--out", out],
        "holds no search to resume": ["search", photos, "--resume", "--out", out],
        "pairs is 3": ["search", photos, "--pairs", "3"],
        "memory_budget is 'much'": ["search", photos, "--memory-budget", "much"],
        "no option '--memory'": ["search", photos, "--memory", "1MB"],
        "it does with resolution=": [
            "search", photos, "--space", "mbv2_w035", "--no-pretrained", "--resolutions", "32", "--out", out
        ],
        "train one with `tinytl supernet`": [
            "search", photos, "--space", "ofa_tiny_d234_e346_k357", "--resolutions", "32", "--out", out
        ],
    }  # fmt: skip
    for expected, words in cases.items():
        assert expected in tinytl(*words).line, words
    assert not out.exists()


def test_a_folder_that_is_no_finished_search(tmp_path: Path) -> None:
    given = {"photos": "p", "backbone": str(tmp_path)}
    with pytest.raises(RunError, match="is a folder and no backbone"):
        settings(given)
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(RunError, match="unfinished search"):
        settings(given)
    (tmp_path / "winner.json").write_text('{"backbone": 3}')
    with pytest.raises(RunError, match="not what a search writes"):
        settings(given)


def test_what_is_given_beside_a_search_wins(tmp_path: Path) -> None:
    winner = {
        "backbone": "mcunet_5fps@0-5.7-13",
        "method": "bias(3)",
        "resolution": 96,
        "weights": None,
        "norm": "bn",
        "pretrained": True,
    }
    (tmp_path / "winner.json").write_text(json.dumps(winner))
    found = resolved({"backbone": str(tmp_path), "resolution": 64, "lr": 1e-3})
    assert found == {**winner, "resolution": 64, "lr": 1e-3}
    profiled = tinytl("profile", "--backbone", tmp_path, "--repeats", 0, "--no-rss", "--json").json
    assert (profiled["backbone"], profiled["method"], profiled["resolution"]) == (winner["backbone"], "bias(3)", 96)
    (tmp_path / "winner.json").write_text(json.dumps({**winner, "weights": "weights/x.safetensors"}))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "x.safetensors").touch()
    moved = resolved({"backbone": str(tmp_path)})
    assert moved["weights"] == str(tmp_path / "weights" / "x.safetensors")


def test_a_line_that_is_cut_short_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    Lines(path).append({"at": 0})
    with open(path, "ab") as file:
        file.write(b'{"at": 1, "to')
    again = Lines(path)
    assert again.entries == [{"at": 0}]
    again.append({"at": 1})
    assert Lines(path).entries == [{"at": 0}, {"at": 1}]
    path.write_bytes(b"no JSON\n")
    with pytest.raises(RunError, match="damaged"):
        Lines(path)


def test_the_default_genome_is_among_what_is_measured() -> None:
    """So the predictor has seen the network that it is compared with."""
    space = make_space(small_run.NAME, (32, 40))
    assert len(space.genes) == len(space.cardinalities) == len(space.default(0))
    assert not np.array_equal(space.default(0), space.default(1))
