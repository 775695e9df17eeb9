"""The page on what searches find."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tinytl.report import Column, markdown

from .machine import sentence

PAGE, PICTURES = Path("docs/benchmarks/search.md"), Path("docs/benchmarks")


def cells_of(results: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(data set, budget) -> its seeds."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        found.setdefault((cell["data"], cell["budget_bytes"]), []).append(cell)
    return found


def top1(cell: dict[str, Any], kind: str) -> float:
    """Top-1 of a kind of network after full training; of several the median."""
    return statistics.median(run["top1"] for run in cell["trained"] if run["kind"] == kind)


def random_of(results: dict[str, Any]) -> str:
    """What the random networks are, in words."""
    return f"of the winner's planned memory, within {results['cells'][0]['random_near'] * 100:g} %"


def rows_of(results: dict[str, Any]) -> list[dict[str, object]]:
    """A row a data set, budget and kind: mean, lowest and highest over the seeds."""
    rows: list[dict[str, object]] = []
    random = f"median of random ones {random_of(results)}"
    for (data, budget), cells in cells_of(results).items():
        for kind in ("winner", "default", "random"):
            found = [top1(cell, kind) for cell in cells]
            planned = [
                statistics.median(run["planned_bytes"] for run in cell["trained"] if run["kind"] == kind)
                for cell in cells
            ]
            rows.append(
                {
                    "data": data,
                    "budget": budget,
                    "kind": random if kind == "random" else kind,
                    "mean": statistics.mean(found),
                    "low": min(found),
                    "high": max(found),
                    "planned": statistics.mean(planned),
                }
            )
    return rows


def page(results: dict[str, Any]) -> str:
    """The documentation page of the committed results."""
    columns = [
        Column("data", "photographs"),
        Column("budget", "budget", "MB", 1),
        Column("kind", "network"),
        Column("mean", "top-1", "%"),
        Column("low", "lowest", "%"),
        Column("high", "highest", "%"),
        Column("planned", "planned", "MB", 2),
    ]
    cells = results["cells"]
    each = [
        {
            "data": cell["data"],
            "budget": cell["budget_bytes"],
            "seed": cell["seed"],
            "finalists": f"{cell['finalists']} x {cell['finalist_epochs']}",
            "tau": f"{cell['search']['tau']:.2f}",
            "planned": cell["search"]["cost"]["memory_bytes"],
            "measured": cell["measured_bytes"],
            "share": cell["search"]["evaluation_share"],
            "seconds": sum(cell["search"]["profile"].values()),
            "winner": f"{cell['search']['winner']['resolution']} px, `{cell['search']['winner']['backbone']}`, "
            f"`{cell['search']['winner']['method']}`",
        }
        for cell in cells
    ]
    each_columns = [
        Column("data", "photographs"),
        Column("budget", "budget", "MB", 1),
        Column("seed", "seed"),
        Column("finalists", "finalists x epochs"),
        Column("tau", "Kendall tau"),
        Column("planned", "winner planned", "MB", 3),
        Column("measured", "its step measured", "MB", 3),
        Column("share", "in evaluation", "%"),
        Column("seconds", "search", "s"),
        Column("winner", "winner"),
    ]
    paper = [
        {"resolution": row["resolution"], "published": row["published_bytes"]}
        | {f"{kind}_{at}": row[kind][at] for kind in ("counted", "planned") for at in range(3)}
        for row in results["paper"]
    ]
    paper_columns = [Column("resolution", "px"), Column("published", "published, counted", "MB", 0)]
    for kind in ("counted", "planned"):
        for at, name in enumerate(("smallest", "median", "largest")):
            paper_columns.append(Column(f"{kind}_{at}", f"{kind}, {name}", "MB", 1))
    data = list(dict.fromkeys(cell["data"] for cell in cells))
    pictures = "\n".join(
        f"![Accuracy over planned memory, {name}](search_{name}_front.png)\n"
        f"![Predicted against measured, {name}](search_{name}_predicted.png)\n"
        f"![The winner, {name}](search_{name}_winner.png)\n"
        for name in data
    )
    count = results["paper"][0]["networks"]
    return (
        "# What searches find\n\n"
        "Made by `python -m benchmarks.search` (see its help for the folders it takes); do not edit. Space: "
        f"{cells[0]['space']} with its real int8 ImageNet weights; the budget is planned memory of a training step of "
        f"8 images; {results['epochs']} epochs of full training; {sentence(results['machine'])}. Every network is "
        "measured on photographs that no choice saw. Default: TinyTL-L+B of the full network, or TinyTL-B where that "
        "fits at no resolution, at the highest resolution that fits the same budget. Random: the median of three "
        f"random networks {random_of(results)}, drawn anew for each seed as the search draws them. Mean, lowest and "
        f"highest over {len({cell['seed'] for cell in cells})} seeds.\n\n"
        + markdown(rows_of(results), columns)
        + "\n## Each search\n\nKendall tau: predicted against measured accuracy of sub-networks that the predictor was "
        "not fitted to (five folds). In evaluation: the share of the search's time that went to fine-tuning and "
        "measuring; the rest is planning, predicting and evolution. The plan of a run counts a batch that is read "
        "ahead (24 bytes a pixel of a side squared, and 5 KB); the measured step stands without it.\n\n"
        + markdown(each, each_columns)
        + "\n## The paper's setting\n\nThe ProxylessNAS space of width 1.3 at batch 8 with the Flowers head (102 "
        "classes), every lite module and bias training. The paper does not say which networks it chose; counted by "
        f"its rule here: the smallest, the median of {count} random ones, and the largest of the space; planned with "
        "frozen weights at 8 bits, gradients, Adam's state and input included.\n\n"
        + markdown(paper, paper_columns)
        + f"\n## Pictures\n\nOf the first seed within {cells[0]['budget_bytes'] / 1e6:g} MB.\n\n"
        + pictures
    )
