"""The page on a run: what stands in it, that nothing in it gets out of its text, and how it behaves in a browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch import nn

from tests import browser as browsers
from tests.small_run import NAME, entry, make_spec
from tinytl._run_page import report_run
from tinytl.backbones import BACKBONES
from tinytl.config import FILE as CONFIG
from tinytl.config import write_config
from tinytl.data import EvalTransform, Loader, scan
from tinytl.engine import Evaluation
from tinytl.errors import DataError, InputError, RunError
from tinytl.memory import StepSpec, adam, capture_step
from tinytl.memory.by_block import by_part, owners_at
from tinytl.memory.by_role import STACK
from tinytl.memory.step import build_network
from tinytl.report import Answers, Mistake, Page, Setting, examine, page_html, write_page
from tinytl.report.examine import THUMBNAIL_PIXELS, WORST, thumbnail
from tinytl.report.html import data, text
from tinytl.report.page_training import POINTS, Curve, _thinned
from tinytl.report.scale import ticks
from tinytl.run import RunResult, train
from tinytl.spec import RunOptions

from .command_line import tinytl
from .photographs import make_photographs

EVIL = (
    "</script><script>owned=1</script>",
    "<img src=x onerror=owned=1>",
    "\"' onmouseover=owned=1 x='",
    "&lt;b&gt; \u202eabc \u2028 \udcff 猫",
)
ELEMENTS = {
    *("html", "head", "meta", "link", "title", "style", "body", "header", "main", "section", "footer", "script"),
    *("h1", "h2", "h3", "p", "b", "br", "sup", "small", "bdi", "code", "i", "span", "label", "input", "svg", "path"),
    *("dl", "div", "dt", "dd", "ul", "ol", "li", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("figure", "figcaption", "img", "details", "summary"),
}


class Reader(HTMLParser):
    """What a browser makes of a page: elements, their attributes, their text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._in = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


@pytest.fixture(autouse=True)
def _small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, NAME, entry())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run with a page, of a class whose name is a tag."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, NAME, entry())
        spec = make_spec(folder / "photos")
        (folder / "photos" / "red").rename(folder / "photos" / EVIL[1])
        return train(spec, folder / "run", options=RunOptions(workers=0, threads=1, report=True))


@pytest.fixture(scope="module")
def evil_page() -> Page:
    """A page of many classes with bad names, and mistakes on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, NAME, entry())
        spec = StepSpec(NAME, "tinytl-l+b", norm="gn", resolution=32, batch_size=4, micro_batch=2, classes=40)
        model, adaptation = build_network(spec)
        step = capture_step(model, spec.shape(4), micro_batch=2, optimizer=adam)
    classes = [f"{EVIL[i % len(EVIL)]} {i}" for i in range(40)]
    confusion = torch.arange(1600).reshape(40, 40) % 7
    photo = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(photo, "JPEG")
    mistakes = [
        Mistake(f"{name}/1.jpg", name, classes[i - 1], 0.9, 0.01, photo.getvalue())
        for i, name in enumerate(classes[:9])
    ]
    metrics: list[dict[str, Any]] = []
    for epoch in range(1, 4):
        metrics += [
            {"kind": "step", "epoch": epoch, "step": 5 * epoch + i - 4, "loss": 2 / epoch, "accuracy": 0.5}
            for i in range(5)
        ]
        found = {"loss": 1.5 / epoch, "top1": epoch / 4, "majority_share": 0.1, "balanced_accuracy": 0.2}
        metrics.append(
            {
                "kind": "epoch",
                "epoch": epoch,
                "step": 5 * epoch,
                "loss": 1 / epoch,
                "accuracy": 0.4,
                "validation": found,
            }
        )
    return Page(
        title=EVIL[0],
        figures=[("Top-1", "50 %", EVIL[2])],
        settings={"Options": [Setting("photos", EVIL[0], True), Setting("epochs", "3", False)]},
        facts=adaptation.rows(),
        notes=[EVIL[1]],
        step=step,
        blocks=adaptation.blocks,
        trained={name: p.numel() for name, p in model.named_parameters() if p.requires_grad},
        metrics=metrics,
        classes=classes,
        answers=Answers(Evaluation(0.5, 0.5, int(confusion.sum()), 1.0, confusion, 0.1), tuple(mistakes)),
    )


def test_names_stay_text(evil_page: Page) -> None:
    page = Reader(page_html(evil_page))
    assert {name for name, _ in page.elements} <= ELEMENTS
    assert [found for _, found in page.elements if any(key.startswith("on") for key in found)] == []
    assert len(page.scripts) == 2
    assert all(EVIL[0] not in script for script in page.scripts)
    words = "".join(page.texts)
    for index, name in enumerate(EVIL[:3]):
        assert f"{name} {index}" in words
    assert "\u202e" not in words, "an override would turn round what stands behind it"
    assert "\\u202eabc" in words
    assert "\\udcff 猫" in words


def test_the_page_loads_nothing(evil_page: Page) -> None:
    written = page_html(evil_page)
    page = Reader(written)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy["content"] == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    addresses = [found[key] or "" for _, found in page.elements for key in ("src", "href") if key in found]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    style = written.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_the_data_of_the_timeline(evil_page: Page) -> None:
    step, found = evil_page.step, json.loads(Reader(page_html(evil_page)).scripts[0])
    assert found["count"] == len(step.operations)
    assert found["roles"] == list(STACK)
    at, phase, layer, name, parts, owners = found["rows"][found["peak"]]
    assert at == int(step.live_bytes.argmax())
    assert sum(parts) == step.peak_bytes
    op, names = step.operations[at], found["names"]
    assert (names[phase], names[layer], names[name]) == (op.phase, op.layer, op.name)
    expected = [(owner.layer or "(no layer)", owner.role, owner.bytes) for owner in owners_at(step, at)[:6]]
    assert [(names[owner], found["roles"][role], count) for owner, role, count in owners] == expected
    assert all(sum(row[4]) == step.live_bytes[row[0]] for row in found["rows"])
    assert len(found["rows"]) <= 600


@given(st.text())
def test_any_text_is_text(value: str) -> None:
    page = Reader(f'<p title="{text(value)}">{text(value)}</p><script>{data({value: [value, 1.5, None]})}</script>')
    assert [name for name, _ in page.elements] == ["p", "script"]
    assert json.loads(page.scripts[0]) == {value: [value, 1.5, None]}


@pytest.mark.parametrize(("count", "size"), [(10, "few"), (40, "some"), (100, "many"), (130, "many")])
def test_the_matrix_has_room_for_a_hundred_classes(count: int, size: str, evil_page: Page) -> None:
    confusion = torch.eye(count, dtype=torch.int64) * 5
    confusion[3, 7] = 2
    confusion[count - 1, 0] = 4
    names = [f"class {i}" for i in range(count)]
    evaluation = Evaluation(0.9, 0.9, int(confusion.sum()), 0.1, confusion, 0.1)
    written = page_html(dataclasses.replace(evil_page, classes=names, answers=Answers(evaluation, ())))
    page = Reader(written)
    assert page.all("table", id="confusion", **{"class": size})
    assert len(page.all("th", scope="row")) == len(page.all("th", scope="col")) == min(count, 100)
    assert f"class {count - 1}" in page.texts, "where there is no room, those with mistakes stay"
    pairs = written.split('<ol class="pairs">')[1].split("</ol>")[0]
    assert pairs.index(f">class {count - 1}<") < pairs.index(">class 3<")
    assert f"all {int(confusion.sum())} held-out photographs are answered right" in written
    assert len(written) < 1_000_000


def test_a_page_before_the_first_epoch_has_no_curves(evil_page: Page) -> None:
    assert 'id="training"' not in page_html(dataclasses.replace(evil_page, metrics=[]))


def test_ticks_are_round() -> None:
    assert ticks(100.0) == [0, 20, 40, 60, 80, 100]
    assert ticks(84.2) == [0, 20, 40, 60, 80]
    assert ticks(84.2, 39.4) == [40, 50, 60, 70, 80]
    assert ticks(0.7) == [0, 0.2, 0.4, 0.6]
    assert ticks(0.0) == [0.0]


@given(st.floats(1e-9, 1e12), st.floats(0, 1))
def test_ticks_are_few_and_inside(highest: float, share: float) -> None:
    lowest = highest * share * 0.99
    found = ticks(highest, lowest)
    assert 2 <= len(found) <= 6
    assert all(lowest * 0.999 - 1e-12 <= tick <= highest * 1.001 for tick in found)


def test_many_steps_become_few_points() -> None:
    curve = Curve("loss", "faint", _thinned([(float(i), 3.0) for i in range(10_000)]))
    assert len(curve.points) == POINTS
    assert {y for _, y in curve.points} == {3.0}
    assert curve.points[0][0] < 20 < 9980 < curve.points[-1][0]


class Stubborn(nn.Module):
    """Always answers class 0, the surer the redder the photograph is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red = images[:, 0].mean((1, 2)) * self.scale
        return torch.stack([4 + red, torch.zeros_like(red), torch.zeros_like(red)], 1)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_worst_mistakes_come_first(tmp_path: Path, micro_batch: int | None) -> None:
    photos = scan(make_photographs(tmp_path / "photos", each=15))
    loader = Loader(photos, EvalTransform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), 4, shuffle=False, workers=0)
    found = examine(Stubborn(), loader, photos, micro_batch=micro_batch)
    assert found.evaluation.top1 == pytest.approx(1 / 3)
    assert found.evaluation.images == 45
    assert len(found.mistakes) == WORST
    assert {(m.label, m.answer) for m in found.mistakes[:15]} == {("red", "blue")}, "the reddest are the worst"
    of_label = [m.label_probability for m in found.mistakes]
    assert of_label == sorted(of_label)
    for mistake in found.mistakes:
        assert mistake.probability == pytest.approx(1 - 2 * mistake.label_probability)
        assert (tmp_path / "photos" / mistake.name).exists()


def test_a_thumbnail_is_small_and_upright(tmp_path: Path) -> None:
    lying = Image.new("RGB", (800, 400), "white")
    lying.paste("red", (0, 0, 400, 400))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # its left side is up
    lying.save(tmp_path / "lying.jpg", exif=exif)
    found = Image.open(io.BytesIO(thumbnail(tmp_path / "lying.jpg")))
    assert found.size == (THUMBNAIL_PIXELS // 2, THUMBNAIL_PIXELS)
    top, bottom = found.getpixel((40, 10)), found.getpixel((40, 180))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert top[1] < 50 < 200 < bottom[1]
    assert not found.getexif()


def test_train_leaves_a_page(run: RunResult) -> None:
    written = (run.out / "report.html").read_text()
    page, evaluation = Reader(written), run.evaluation
    assert len(written) < 400_000
    assert f"{evaluation.top1:.1%}" in page.texts
    assert f"of {evaluation.images} held-out photographs" in page.texts
    wrong = evaluation.images - int(evaluation.confusion.diagonal().sum())
    assert len(page.all("img")) == min(wrong, WORST)
    assert EVIL[1] in page.texts
    assert page.all("table", id="epochs")
    assert "Process" in page.texts


def test_a_finished_run_gets_the_same_page_later(run: RunResult, tmp_path: Path) -> None:
    first = (run.out / "report.html").read_bytes()
    done = report_run(run.out, tmp_path / "again.html", workers=0)
    assert (tmp_path / "again.html").read_bytes() == first
    assert done.page_bytes == len(first)
    assert done.evaluation.top1 == run.evaluation.top1
    assert torch.equal(done.evaluation.confusion, run.evaluation.confusion)


def test_the_command(run: RunResult, tmp_path: Path) -> None:
    done = tinytl("report", run.out, "--out", tmp_path / "page.html", "--threads", "1")
    assert done.status == 0, done.err
    assert "page.html" in done.out
    found = tinytl("report", run.out, "--out", tmp_path / "page.html", "--threads", "1", "--json").json
    assert found["page"] == str(tmp_path / "page.html")
    assert found["page_bytes"] == (tmp_path / "page.html").stat().st_size
    assert found["top1"] == run.evaluation.top1
    assert set(found) == {
        *("page", "page_bytes", "top1", "balanced_accuracy", "images", "loss", "majority_share", "notes")
    }


def test_photographs_that_changed_are_noted(run: RunResult, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    for path in sorted(Path(run.prepared.spec.photos).rglob("*.jpg")):
        copy = moved / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    done = report_run(run.out, tmp_path / "page.html", photos=str(moved), workers=0)
    assert not any("added or removed" in note for note in done.notes)
    gone = run.prepared.validation.name(0)
    (moved / gone).unlink()
    done = report_run(run.out, tmp_path / "page.html", photos=str(moved), workers=0)
    assert any("added or removed" in note for note in done.notes)


def test_the_devices_budget_is_not_the_labs(run: RunResult, tmp_path: Path) -> None:
    folder, spec = tmp_path / "run", run.prepared.spec
    shutil.copytree(run.out, folder)
    (folder / CONFIG).unlink()
    lab = dataclasses.replace(spec, memory_budget=100_000)  # less than any plan of the lab takes
    write_config(folder / CONFIG, lab, RunOptions())
    with pytest.raises(InputError, match="memory_budget is"):
        report_run(folder, workers=0)
    (folder / CONFIG).unlink()
    write_config(folder / CONFIG, dataclasses.replace(lab, engine="device"), RunOptions())
    done = report_run(folder, workers=0)
    assert done.evaluation.top1 == run.evaluation.top1
    assert "100000" in Reader(done.path.read_text()).texts  # the setting is shown as it was


def test_what_cannot_be_reported_on(run: RunResult, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished run"):
        report_run(tmp_path)
    with pytest.raises(DataError, match="--photos"):
        report_run(run.out, photos=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="other classes"):
        report_run(run.out, photos=str(make_photographs(tmp_path / "others", each=4)))
    with pytest.raises(InputError, match="cannot write"):
        report_run(run.out, tmp_path / "nowhere" / "page.html", workers=0)
    assert "no finished run" in tinytl("report", tmp_path).line


needs_browser = pytest.mark.skipif(
    browsers.CHROMIUM is None or browsers.DRIVER is None,
    reason="no browser: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    with browsers.browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def opened(window: browsers.Browser, evil_page: Page, tmp_path: Path) -> browsers.Browser:
    """The evil page, in a window of an ordinary size."""
    write_page(tmp_path / "page.html", evil_page)
    window.resize(1280, 900)
    window.complaints()
    window.requests()
    window.open(tmp_path / "page.html")
    assert window.requests() == [(tmp_path / "page.html").as_uri()]
    return window


def shown(window: browsers.Browser, id: str) -> str:
    return window.run("return document.getElementById(arguments[0]).innerText", id)


def owners_shown(window: browsers.Browser) -> list[list[str]]:
    rows = "return [...document.querySelectorAll('#owners tbody tr')].filter(r => !r.hidden)"
    return window.run(rows + ".map(r => [...r.cells].map(c => c.innerText))")


def place(window: browsers.Browser, share: float) -> tuple[float, float]:
    """A point of the picture, so far from its left, in view."""
    script = "const p = document.querySelector('#timeline .plot'); p.scrollIntoView({block: 'center'});"
    box = window.run(script + "const b = p.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]")
    return box[0] + share * box[2], box[1] + box[3] / 2


@needs_browser
def test_the_watching_sees_what_it_should(window: browsers.Browser, tmp_path: Path) -> None:
    """Complaints and requests of a page that does what ours must not."""
    page = "<script>throw new Error('on purpose')</script><img src='http://127.0.0.1:9/picture.png'>"
    (tmp_path / "bad.html").write_text(page)
    window.open(tmp_path / "bad.html")
    assert any("on purpose" in line for line in window.complaints())
    assert "http://127.0.0.1:9/picture.png" in window.requests()


@needs_browser
def test_a_browser_shows_it_without_a_complaint(opened: browsers.Browser, evil_page: Page) -> None:
    assert opened.complaints() == []
    assert opened.run("return window.owned === undefined")
    assert opened.run("return document.title") == EVIL[0]
    assert opened.run("return document.querySelectorAll('#timeline svg path').length") >= 5
    assert opened.run("return document.querySelector('#timeline svg').getBoundingClientRect().height") > 100
    rows = "return document.querySelectorAll(arguments[0]).length"
    assert opened.run(rows, "#parts tbody tr") == len(by_part(evil_page.step, evil_page.blocks))
    assert opened.run(rows, "#confusion tbody tr") == len(evil_page.classes)
    assert opened.run(rows, "#epochs tbody tr") == 3
    opened.run("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    widths = "return Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    assert opened.run(widths) == [64] * len(evil_page.answers.mistakes)
    assert opened.requests() == []


@needs_browser
@pytest.mark.parametrize("touch", [False, True])
def test_pointing_shows_who_owns_the_moment(opened: browsers.Browser, evil_page: Page, touch: bool) -> None:
    step = evil_page.step
    rows = json.loads(Reader(page_html(evil_page)).scripts[0])["rows"]
    for share in (0.1, 0.62):
        opened.point(*place(opened, share), touch=touch)
        at = int(opened.run("return document.getElementById('timeline').getAttribute('aria-valuenow')")) - 1
        assert at == pytest.approx(share * len(rows), abs=2)
        operation = rows[at][0]
        op = step.operations[operation]
        assert shown(opened, "place").startswith(f"operation {operation + 1:,} of {len(step.operations):,}, {op.phase}")
        assert shown(opened, "layer") == (op.layer or "(no layer)")
        assert shown(opened, "name") == op.name
        expected = [[owner.layer or "(no layer)", owner.role] for owner in owners_at(step, operation)[:6]]
        assert [row[:2] for row in owners_shown(opened)] == expected
        assert re.fullmatch(r"[\d,.]+ [kM]B", owners_shown(opened)[0][2])
    assert opened.complaints() == []


@needs_browser
def test_keys_move_through_the_step(opened: browsers.Browser, evil_page: Page) -> None:
    left, right, home, end, page_up = "\ue012", "\ue014", "\ue011", "\ue010", "\ue00e"
    rows = json.loads(Reader(page_html(evil_page)).scripts[0])["rows"]
    now = "return Number(document.getElementById('timeline').getAttribute('aria-valuenow')) - 1"
    assert shown(opened, "place").endswith("the peak"), "the peak is shown until somebody points elsewhere"
    first = owners_shown(opened)
    opened.run("document.getElementById('timeline').focus()")
    for keys, expected in (
        (home, 0),
        (left, 0),
        (right * 3, 3),
        (page_up, 23),
        (left, 22),
        (end, len(rows) - 1),
        (right, len(rows) - 1),
    ):
        opened.keys(keys)
        assert opened.run(now) == expected
        operation = rows[expected][0]
        assert shown(opened, "layer") == (evil_page.step.operations[operation].layer or "(no layer)")
    opened.keys("p")
    assert shown(opened, "place").endswith("the peak")
    assert owners_shown(opened) == first


@needs_browser
def test_what_is_resident_can_be_left_out(opened: browsers.Browser) -> None:
    """The peak's mark stays where it is, and so does what it stands on."""
    marks = "return [...document.querySelectorAll('#timeline .ticks span')].filter(s => s.getClientRects().length)"
    marks += ".map(s => s.innerText)"
    whole = opened.run(marks)
    opened.run("document.getElementById('zoom').click()")
    assert opened.run(marks) != whole
    assert opened.run("return document.querySelector('#timeline svg').viewBox.baseVal.height") < 4000
    opened.run("document.getElementById('zoom').click()")
    assert opened.run(marks) == whole


@needs_browser
def test_a_cell_of_the_matrix_says_what_it_is(opened: browsers.Browser, evil_page: Page) -> None:
    row, column = 2, 5
    opened.run(
        "document.querySelectorAll('#confusion tbody tr')[arguments[0]].cells[arguments[1] + 1].click()", row, column
    )
    confusion = evil_page.answers.evaluation.confusion
    said = shown(opened, "cell")
    assert f"{evil_page.classes[row]}" in said
    assert f"{evil_page.classes[column]}" in said
    assert said.endswith(f": {int(confusion[row, column])} of {int(confusion[row].sum())}")


@needs_browser
@pytest.mark.parametrize("width", [360, 390, 768, 1440])
def test_nothing_stands_out_of_a_narrow_screen(opened: browsers.Browser, width: int) -> None:
    opened.resize(width, 800)
    assert opened.run("return document.documentElement.scrollWidth") <= width
    sizes = (
        "return [...document.querySelectorAll('p, dd, td, th, li')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(opened.run(sizes)) >= 10


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_have_contrast(opened: browsers.Browser, scheme: str) -> None:
    opened.devtools("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    colours = "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.color, s.backgroundColor]"
    ink, _ = opened.run(colours, "section p")
    quiet, _ = opened.run(colours, ".hint")
    _, ground = opened.run(colours, "section")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    assert contrast(ink, ground) > 7
    assert contrast(quiet, ground) > 4.5


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_the_page_of_a_run_in_a_browser(window: browsers.Browser, run: RunResult) -> None:
    window.resize(1280, 900)
    window.complaints()
    window.requests()
    window.open(run.out / "report.html")
    assert window.complaints() == []
    assert window.requests() == [(run.out / "report.html").as_uri()]
    assert shown(window, "place").endswith("the peak")
    assert window.run("return document.querySelectorAll('#confusion tbody tr').length") == 3
    decoded = "return Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode() }))"
    window.run(decoded)
    assert all(window.run("return [...document.images].map(i => i.naturalWidth > 0)"))
    assert run.evaluation.top1 < 1, "a run without a mistake would show no photograph"
