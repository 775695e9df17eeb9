"""A run as one HTML page that needs nothing else: no network, no library, no other file.

What it shows stands in the page itself, drawn already; the script only answers to pointing and to keys. Names of
classes and files are text wherever they stand (`tinytl.report.html`), and the page's policy lets it load nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytl import __version__
from tinytl._atomic import write_bytes
from tinytl.memory.description import StepDescription

from .examine import Answers
from .html import document, text
from .page_answers import answers_section
from .page_memory import memory_section
from .page_training import training_section

FILE = "report.html"


@dataclass(frozen=True)
class Setting:
    """An option of the run as it is shown; `chosen`: it is not the default."""

    name: str
    value: str
    chosen: bool


@dataclass(frozen=True, eq=False)
class Page:
    """What a page shows.

    Attributes:
        title: what was trained on what.
        figures: headline figures: (name, value, what to know of it).
        settings: the options, by heading.
        facts: (name, value) of what was done to the network (`Adaptation.rows`).
        notes: what one should know, a line each.
        step: one training step, planned.
        blocks: paths of the network's blocks.
        trained: numbers of values by the names of the parameters that train.
        metrics: the lines of metrics.jsonl.
        classes: names, in the order of the logits.
        answers: to the held-out photographs.
    """

    title: str
    figures: Sequence[tuple[str, str, str]]
    settings: Mapping[str, Sequence[Setting]]
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    step: StepDescription
    blocks: Sequence[str]
    trained: Mapping[str, int]
    metrics: Sequence[Mapping[str, Any]]
    classes: Sequence[str]
    answers: Answers


def page_html(page: Page) -> str:
    """The page's text."""
    confusion = page.answers.evaluation.confusion.tolist()
    return document(
        page.title,
        [
            "<header>",
            f"<h1><bdi>{text(page.title)}</bdi></h1>",
            '<dl class="figures">',
            *(
                f'<div><dt>{text(name)}</dt><dd>{text(value)}</dd><dd class="quiet">{text(note)}</dd></div>'
                for name, value, note in page.figures
            ),
            "</dl>",
            *(f'<p class="note">{text(note)}</p>' for note in page.notes),
            "</header>",
            "<main>",
            *memory_section(page.step, page.blocks, page.trained),
            *training_section(page.metrics),
            *answers_section(confusion, page.classes, page.answers.mistakes, page.answers.evaluation.images),
            '<section id="options">',
            "<h2>The run</h2>",
            *_details("What was done to the network", [Setting(*fact, False) for fact in page.facts]),
            *(line for heading, settings in page.settings.items() for line in _details(heading, settings)),
            "</section>",
            "</main>",
            f"<footer>Written by tinytl {text(__version__)}. MB are 10<sup>6</sup> bytes.</footer>",
        ],
    )


def write_page(path: Path, page: Page) -> int:
    """Write the page into a file, whole or not at all; return its bytes. Raises RunError when it cannot be written."""
    content = page_html(page).encode()
    write_bytes(Path(path), content)
    return len(content)


def _details(heading: str, settings: Sequence[Setting]) -> list[str]:
    lines = [f"<details><summary>{text(heading)}</summary>", '<dl class="settings">']
    for setting in settings:
        kind = ' class="chosen"' if setting.chosen else ""
        lines.append(f"<div{kind}><dt>{text(setting.name)}</dt><dd><bdi>{text(setting.value)}</bdi></dd></div>")
    return [*lines, "</dl></details>"]
