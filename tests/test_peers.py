"""The comparison with other packages: each contender that is installed takes the step, and with the right gradients."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.peers import contenders, page
from benchmarks.peers.contenders import BASELINE, CONTENDERS, Missing
from benchmarks.peers.measure import compare, exact_gradients, gradient_errors
from benchmarks.peers.page import draw, table
from benchmarks.peers.rss import growth
from benchmarks.peers.step import Ready, Setting
from tinytl.memory import measure_step, resident_tensors
from tinytl.memory.profile import LAYOUTS

SMALL = Setting("proxyless_w03", resolution=64, batch_size=2)
CHEAP = [key for key, contender in CONTENDERS.items() if not contender.compiles]
KEYS = {
    *("key", "label", "side", "trains", "approximate", "peak_bytes", "step_peak_bytes", "resident_bytes"),
    *("bytes_layout", "rss_first_bytes", "rss_bytes", "trained_elements", "first_seconds", "seconds", "layout"),
    *("ratio", "ratio_low", "ratio_high", "gradient_error", "whole_gradient_error"),
}


def built(key: str, setting: Setting) -> Ready:
    contender = CONTENDERS[key]
    try:
        return contender.build(setting, LAYOUTS[contender.layouts[0]])
    except Missing as reason:
        pytest.skip(str(reason))


_exact: dict[object, dict[str, torch.Tensor]] = {}


def exact(key: str) -> dict[str, torch.Tensor]:
    """One pass serves all that are compared with it."""
    contender = CONTENDERS[key]
    if contender.reference not in _exact:
        _exact[contender.reference] = exact_gradients(contender, SMALL)
    return _exact[contender.reference]


@pytest.mark.parametrize("key", CHEAP)
def test_gradients_are_stocks(key: str) -> None:
    """In float64, where no ReLU turns by rounding, nothing but the order of sums may differ."""
    ready = built(key, replace(SMALL, double=True))
    worst, whole = gradient_errors(ready.gradients(), exact(key))
    assert worst < 1e-9
    assert whole < 1e-9
    assert all(reference.any() for reference in exact(key).values())  # else there would be nothing to compare


@pytest.mark.parametrize("key", CHEAP)
def test_a_step_trains_what_it_says_and_nothing_else(key: str) -> None:
    ready = built(key, SMALL)
    before = {name: p.detach().clone() for name, p in ready.model.named_parameters()}
    names = {id(p): name for name, p in ready.model.named_parameters()}
    trained = {names[id(p)] for p in ready.trained.values()}
    ready.step()()
    changed = {name for name, p in ready.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained


def test_a_row_a_contender_and_those_that_are_missing_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(setting: Setting, memory_format: torch.memory_format) -> Ready:
        raise Missing("no such package: pip install it")

    monkeypatch.setitem(CONTENDERS, "absent", contenders.Contender("absent", "other", "nothing", absent, absent))
    said: list[str] = []
    rows = compare(SMALL, [BASELINE, "absent", "lean"], turns=3, rss=False, say=said.append)
    stock, missing, lean = rows
    assert set(stock) == set(lean) == KEYS
    assert missing["missing"] == "no such package: pip install it"
    assert "absent: no such package: pip install it" in said
    assert (stock["ratio"], stock["ratio_low"], stock["ratio_high"]) == (1.0, 1.0, 1.0)
    assert lean["step_peak_bytes"] < stock["step_peak_bytes"]
    assert lean["peak_bytes"] == lean["resident_bytes"] + lean["step_peak_bytes"]
    assert lean["trained_elements"] == stock["trained_elements"]
    assert "- absent: not run. no such package: pip install it.\n" in table(rows)


def test_without_turns_there_are_no_times() -> None:
    (row,) = compare(SMALL, [BASELINE], turns=0, rss=False)
    assert row["seconds"] is row["ratio"] is row["layout"] is None


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.shutil, "which", lambda name: None)
    with pytest.raises(Missing, match=r"needs a C\+\+ compiler: install"):
        CONTENDERS["compile-0.5"].build(SMALL, torch.channels_last)


def test_a_budget_below_the_smallest_is_told_with_the_smallest() -> None:
    with pytest.raises(Missing, match="the least that a step takes here is"):
        contenders.planned("tinytl-l+b", 1_000_000)(SMALL, torch.channels_last)


def test_a_budget_is_kept() -> None:
    free = measure_peak(contenders.lean("tinytl-l+b"))
    budget = free - free // 20
    assert measure_peak(contenders.planned("tinytl-l+b", budget)) <= budget


def measure_peak(build: contenders.Build) -> int:
    ready = build(SMALL, torch.channels_last)
    step = ready.step()
    step()
    resident = resident_tensors(ready.model, ready.optimizer, ready.images, ready.labels)
    return measure_step(step, resident).peak_bytes


def test_gradient_errors_are_relative_and_see_the_worst_tensor() -> None:
    true = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.tensor([0.0, 1e-3]).double()}
    found = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 2e-3])}
    worst, whole = gradient_errors(found, true)
    assert worst == pytest.approx(1.0)
    assert whole == pytest.approx(1e-3 / 5.0, rel=1e-3)
    nothing = {"a": torch.zeros(2).double()}
    assert gradient_errors({"a": torch.zeros(2)}, nothing) == (0.0, 0.0)
    assert gradient_errors({"a": torch.ones(2)}, nothing) == (float("inf"), float("inf"))
    with pytest.raises(ValueError, match="gradients of other tensors"):
        gradient_errors(true, {"a": true["a"]})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_a_fresh_process_tells_what_a_step_adds() -> None:
    grown = growth("lean", SMALL, "channels-last")
    assert grown is not None
    assert 0 < grown["later_bytes"] < 100_000_000
    assert grown["first_bytes"] > 0


def test_the_page_and_the_picture_are_made_from_the_results(tmp_path: Path) -> None:
    row = dict.fromkeys(KEYS, 1.0) | {"side": "ours", "label": "one | two", "approximate": "", "trains": "all"}
    other = {**row, "side": "stock", "label": "stock", "peak_bytes": 3e8, "ratio_low": 0.5, "ratio_high": 2.0}
    row["peak_bytes"] = 4e7
    gone = {"key": "x", "label": "x", "side": "other", "trains": "", "approximate": "", "missing": "not here"}
    setting = asdict(SMALL)
    machine = {"processor": "P", "cores": 2, "threads": 1, "torch": "2", "date": "today"}
    results = {"machine": machine, "packages": {"peft": "1.0"}, "turns": 3, "networks": []}
    results["networks"] = [{"setting": setting, "rows": [other, row, gone]}]
    text = page(results)
    assert "on P, 2 cores, 1 threads, torch 2, today, peft 1.0" in text
    assert "40.0 MB" in text
    assert "- x: not run. not here.\n" in text
    draw(results, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
