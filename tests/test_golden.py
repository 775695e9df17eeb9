"""Our network against the authors' figures (``tests/golden.py``), and the check against spoilt figures."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import golden as golden_figures
from tinytl.backbones.proxylessnas import published_names

DATA = Path(__file__).parent / "data"
FILES = ("golden_bn_eval.json", "golden_gn_ws.json")
METHODS = ("Last", "TinyTL-B", "TinyTL-L", "TinyTL-L+B", "Norm+Last", "Full")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two busy cores than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FILES)
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    return golden_figures.read(DATA / request.param)


@pytest.mark.slow
@pytest.mark.parametrize("route", sorted(golden_figures.ROUTES))
@pytest.mark.parametrize("method", METHODS)
def test_every_figure_agrees(golden: dict[str, Any], method: str, route: str) -> None:
    error, figure = golden_figures.worst(golden, method, golden_figures.ROUTES[route])
    assert error <= golden_figures.TOLERANCE, figure


def test_each_method_trains_exactly_the_listed_parameters(golden: dict[str, Any]) -> None:
    names = [name for name in golden["state"] if "running_" not in name and "num_batches" not in name]
    assert set(golden["methods"]) == set(METHODS)
    for method, figures in golden["methods"].items():
        assert {name for name in names if golden_figures.is_trained(method, name)} == set(figures), method


def test_names_map_onto_the_published_ones_and_back(golden: dict[str, Any]) -> None:
    state = golden_figures.network(golden).state_dict()
    published = published_names(state)
    shapes = {published[name]: list(value.shape) for name, value in state.items()}
    assert shapes == golden["state"]
    assert len(set(published.values())) == len(published)


@pytest.fixture(scope="module")
def last() -> tuple[dict[str, Any], golden_figures.Outcome]:
    """A file cut down to its cheapest method, and what stock autograd finds for it."""
    whole = golden_figures.read(DATA / FILES[0])
    whole["methods"] = {"Last": whole["methods"]["Last"]}
    images, labels = golden_figures.batch(whole)
    return whole, golden_figures.stock(golden_figures.network(whole), "Last", images, labels)


@pytest.mark.parametrize("spoil", ["nothing", "norm", "projection", "logit", "loss", "absent", "extra", "nan"])
def test_a_spoilt_figure_is_seen(spoil: str, last: tuple[dict[str, Any], golden_figures.Outcome]) -> None:
    """The check can fail: each kind of figure off by 1e-6 is caught, and a wrong set of parameters."""
    golden, outcome = copy.deepcopy(last)
    figures, weight = golden["methods"]["Last"], "classifier.linear.weight"
    if spoil == "norm":
        figures[weight][0] *= 1 + 1e-6
    elif spoil == "projection":
        figures[weight][1] *= 1 + 1e-6
    elif spoil == "logit":
        golden["logits"][1][50] *= 1 + 1e-6
    elif spoil == "loss":
        golden["loss"] *= 1 + 1e-6
    elif spoil == "absent":
        del figures[weight]
    elif spoil == "extra":
        figures["first_conv.conv.weight"] = [1.0, 1.0]
    elif spoil == "nan":
        outcome.gradients[weight].fill_(math.nan)
    largest = max(golden_figures.errors(golden, "Last", outcome).values())
    assert largest <= golden_figures.TOLERANCE if spoil == "nothing" else largest > 9e-7


@pytest.mark.slow
def test_the_command_takes_other_sizes_and_says_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with another seed, batch, head and resolution: figures made here, one then spoilt."""
    held_out = golden_figures.read(DATA / FILES[1])
    held_out.update(seed=5, batch=1, classes=7, resolution=64, labels=[4])
    held_out["state"] |= {"classifier.linear.weight": [7, 1280], "classifier.linear.bias": [7]}
    images, labels = golden_figures.batch(held_out)
    outcome = golden_figures.stock(golden_figures.network(held_out), "TinyTL-L+B", images, labels)
    figures = {}
    for name, gradient in outcome.gradients.items():
        direction = torch.cos(0.7 * torch.arange(gradient.numel(), dtype=torch.float64) + 0.3)
        figures[name] = [gradient.norm().item(), gradient.flatten().dot(direction).item()]
    held_out.update(logits=outcome.logits.tolist(), loss=outcome.loss, methods={"TinyTL-L+B": figures})
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps(held_out))
    assert golden_figures.main([str(file)]) == 0
    assert "largest relative error" in capsys.readouterr().out
    figures["first_conv.bn.bias"][0] *= 1 + 1e-7
    file.write_text(json.dumps(held_out))
    assert golden_figures.main([str(file)]) == 1
