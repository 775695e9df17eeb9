"""The page's part on answers: which classes are taken for which, and the worst mistakes with their photographs."""

from __future__ import annotations

from collections.abc import Sequence

from .examine import Mistake
from .html import picture, text

CLASSES = 100  # of the matrix, at most: a screen has no room for more
CONFUSIONS = 10  # that are listed by name


def answers_section(
    confusion: Sequence[Sequence[int]], classes: Sequence[str], mistakes: Sequence[Mistake], images: int
) -> list[str]:
    """Lines of HTML.

    Args:
        confusion: images by true class (rows) and answer (columns).
        classes: their names.
        mistakes: the worst first.
        images: how many there were.
    """
    return [
        '<section id="answers">',
        "<h2>Answers</h2>",
        *_matrix(confusion, classes),
        *_pairs(confusion, classes),
        "</section>",
        '<section id="mistakes">',
        "<h2>Worst mistakes</h2>",
        *_gallery(mistakes, images),
        "</section>",
    ]


def _matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> list[str]:
    shown = list(range(len(classes)))
    lines = []
    if len(classes) > CLASSES:
        wrong = [sum(row) + sum(r[i] for r in confusion) - 2 * row[i] for i, row in enumerate(confusion)]
        shown = sorted(sorted(shown, key=lambda i: -wrong[i])[:CLASSES])
        lines.append(f"<p>The {CLASSES} of {len(classes)} classes with the most mistakes, on either side.</p>")
    size = "few" if len(shown) <= 12 else "some" if len(shown) <= 40 else "many"
    lines += [
        '<p class="hint">A row is what a photograph shows, a column what was answered. Blue: right; orange: wrong; the '
        "stronger, the larger the share of its row.</p>",
        f'<div class="wide" tabindex="0"><table id="confusion" class="{size}"><thead><tr><td></td>',
        *(f'<th scope="col"><span title="{text(classes[i])}"><bdi>{text(classes[i])}</bdi></span></th>' for i in shown),
        '<td class="sum">right</td></tr></thead><tbody>',
    ]
    for i in shown:
        total = sum(confusion[i])
        cells = "".join(_cell(confusion[i][j], total, i == j) for j in shown)
        right = f"{confusion[i][i] / total:.0%}" if total else "–"
        name = text(classes[i])
        lines.append(
            f'<tr><th scope="row"><span title="{name}"><bdi>{name}</bdi></span></th>{cells}'
            f'<td class="sum">{right} of {total:,}</td></tr>'
        )
    return [*lines, "</tbody></table></div>", '<p id="cell" aria-live="polite">Point at a cell.</p>']


def _cell(count: int, total: int, right: bool) -> str:
    if not count:
        return "<td></td>"
    share = round(100 * count / total)
    kinds = " ".join((["r"] if right else []) + (["d"] if share > 50 else []))  # right; dark, so that text is light
    return f'<td class="{kinds}" style="--s:{max(share, 15)}%">{count:,}</td>'


def _pairs(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> list[str]:
    found = [(count, i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) if count and i != j]
    found = sorted(found, key=lambda entry: (-entry[0], entry[1], entry[2]))[:CONFUSIONS]
    if not found:
        return []
    lines = ["<h3>Taken for another most often</h3>", '<ol class="pairs">']
    for count, i, j in found:
        lines.append(
            f"<li><bdi>{text(classes[i])}</bdi> taken for <bdi>{text(classes[j])}</bdi>: <b>{count:,}</b> of "
            f"{sum(confusion[i]):,}</li>"
        )
    return [*lines, "</ol>"]


def _gallery(mistakes: Sequence[Mistake], images: int) -> list[str]:
    if not mistakes:
        return [f"<p>None: all {images:,} held-out photographs are answered right.</p>"]
    lines = [
        "<p>Held-out photographs that are answered wrong, the highest loss first.</p>",
        '<div class="gallery">',
    ]
    for mistake in mistakes:
        lines.append(
            f'<figure><img src="{picture(mistake.thumbnail)}" alt="{text(mistake.name)}" loading="lazy"><figcaption>'
            f"<b><bdi>{text(mistake.label)}</bdi></b> ({mistake.label_probability:.1%})<br>"
            f'answered <b class="wrong"><bdi>{text(mistake.answer)}</bdi></b> ({mistake.probability:.1%})<br>'
            f"<small><bdi>{text(mistake.name)}</bdi></small></figcaption></figure>"
        )
    return [*lines, "</div>"]
