"""Tables in the README and in docs are the committed results, and names in them exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import accuracy, readme, steps

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_readme_holds_the_committed_results() -> None:
    text = readme.README.read_text()
    assert readme.filled(text) == text


@pytest.mark.parametrize("benchmark", [steps, accuracy])
def test_the_pages_are_made_from_the_committed_results(benchmark) -> None:
    assert benchmark.page(json.loads(benchmark.RESULTS.read_text())) == benchmark.PAGE.read_text()


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_quickstart_in_the_readme_is_the_example() -> None:
    example = (ROOT / "examples" / "quickstart.py").read_text().split('"""', 2)[2].strip()
    assert example in (ROOT / "README.md").read_text()


def test_the_changelog_and_the_package_agree_on_the_version() -> None:
    import tinytl

    assert f'version = "{tinytl.__version__}"' in (ROOT / "pyproject.toml").read_text()
