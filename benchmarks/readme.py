"""Put the committed results into the README, between its markers: `python -m benchmarks.readme`."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from tinytl.report import Column, markdown

from .search_page import rows_of

README = Path("README.md")
STEPS, ACCURACY = Path("benchmarks/results/steps.json"), Path("benchmarks/results/accuracy.json")
BUDGETS = Path("benchmarks/results/memory_table.json")
DEVICE = Path("benchmarks/results/device.json")
SEARCH = Path("benchmarks/results/search.json")
LABELS = {
    ("ft-last", "bn", 8): "FT-Last",
    ("tinytl-b", "bn", 8): "TinyTL-B",
    ("tinytl-l+b", "bn", 8): "TinyTL-L+B",
    ("tinytl-l+b", "bn", 1): "TinyTL-L+B, one image at a time",
    ("tinytl-l+b", "gn", 8): "TinyTL-L+B, exact group norm",
    ("ft-full", "bn", 8): "FT-Full",
}


def steps_table(results: dict[str, Any]) -> str:
    """Bytes of one step, lean beside stock, and time where it was taken."""
    times = {row["method"]: row["stock_ratio"] for row in results["time"]}
    rows = []
    for row in results["memory"]:
        label = LABELS.get((row["method"], row["norm"], row["micro_batch"]))
        if label is None:
            continue
        plain = row["norm"] == "bn" and row["micro_batch"] == 8
        rows.append({**row, "label": label, "time": times.get(row["method"]) if plain else None})
    columns = [
        Column("label", "method"),
        Column("kept", "kept for backward", "MB"),
        Column("step_peak", "step adds", "MB"),
        Column("stock_step_peak", "stock PyTorch adds", "MB"),
        Column("peak", "all live", "MB"),
        Column("stock_peak", "stock, all live", "MB"),
        Column("time", "time / stock's", "x", 2),
    ]
    return markdown(rows, columns)


def budgets_table(results: dict[str, Any]) -> str:
    """The steps that were taken within a budget."""
    norms = {"bn": "frozen batch norm", "gn": "exact group norm"}
    methods = {"tinytl-l+b": "TinyTL-L+B", "tinytl-b": "TinyTL-B"}
    rows = [
        {
            **row,
            "label": f"{methods[row.get('method', 'tinytl-l+b')]}, {norms[row['norm']]}",
            "bits": f"{row.get('frozen_bits', 32)} / {row.get('optimizer_bits', 32)}",
            "budget": row["memory_budget"].replace("MB", " MB"),
        }
        for row in results["group_norm"]
        if "memory_budget" in row
    ]
    columns = [
        Column("label", "method"),
        Column("bits", "bits: frozen weights / Adam"),
        Column("budget", "budget"),
        Column("planned", "planned", "MB", 2),
        Column("measured", "measured", "MB", 2),
    ]
    return markdown(rows, columns)


def device_table(results: dict[str, Any]) -> str:
    """The compiled step: the whole process, and its time beside stock's."""
    norms = {"bn": "frozen batch norm", "gn": "exact group norm"}
    methods = {"tinytl-b": "TinyTL-B", "tinytl-l+b": "TinyTL-L+B"}
    rows = [
        {
            **row,
            "label": f"{methods[row['method']]}, {norms[row['norm']]}",
            "bits": f"{row['frozen_bits']} / {row['optimizer_bits']}",
        }
        for row in results["rows"]
    ]
    columns = [
        Column("label", "method"),
        Column("bits", "bits: frozen weights / Adam"),
        Column("peak_rss_bytes", "process", "MB"),
        Column("python_peak_rss_bytes", "from Python", "MB"),
        Column("stock_peak_rss_bytes", "stock PyTorch's process", "MB", 0),
        Column("step_seconds", "step", "ms", 0),
        Column("ratio", "time / stock's", "x", 2),
        Column("full_ratio", "time / stock FT-Full's", "x", 2),
    ]
    return markdown(rows, columns)


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean, least and most over the seeds, for each method."""
    rows = []
    for method, lr in results["learning_rates"].items():
        mine = [run for run in results["runs"] if run["method"] == method]
        row: dict[str, Any] = {"method": method, "seeds": len(mine), "lr": lr}
        for key in ("top1", "balanced_accuracy"):
            values = [run[key] for run in mine]
            row |= {key: statistics.mean(values), f"{key}_low": min(values), f"{key}_high": max(values)}
        row["delta_bytes"] = mine[0]["delta_bytes"]
        rows.append(row)
    return rows


def accuracy_table(results: dict[str, Any]) -> str:
    """Mean accuracy over the seeds."""
    rows = [
        {**row, "top1_range": _range(row, "top1"), "balanced_range": _range(row, "balanced_accuracy")}
        for row in summary(results)
    ]
    columns = [
        Column("method", "method"),
        Column("seeds", "seeds"),
        Column("top1_range", "top-1, mean (lowest to highest)"),
        Column("balanced_range", "balanced accuracy"),
        Column("delta_bytes", "learned", "MB", 2),
    ]
    return markdown(rows, columns)


def search_table(results: dict[str, Any]) -> str:
    """What searches found, after full training, beside the default network and random ones."""
    names = {"signs": "hand signs", "cifar10": "CIFAR-10, 2,000 images"}
    rows = [
        {
            **row,
            "data": names.get(str(row["data"]), row["data"]),
            "range": f"{row['mean']:.1%} ({row['low']:.1%} to {row['high']:.1%})",
        }
        for row in rows_of(results)
    ]
    columns = [
        Column("data", "photographs"),
        Column("budget", "budget", "MB", 1),
        Column("kind", "network"),
        Column("range", "top-1, mean (lowest to highest)"),
        Column("planned", "planned", "MB", 2),
    ]
    return markdown(rows, columns)


def _range(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.1%} ({row[f'{key}_low']:.1%} to {row[f'{key}_high']:.1%})"


def filled(text: str) -> str:
    """The README with its tables made from the committed JSON."""
    for name, path, make in (
        ("steps", STEPS, steps_table),
        ("budgets", BUDGETS, budgets_table),
        ("device", DEVICE, device_table),
        ("accuracy", ACCURACY, accuracy_table),
        ("search", SEARCH, search_table),
    ):
        if path.exists():
            table = make(json.loads(path.read_text()))
            pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
            text = re.sub(pattern, lambda found, table=table: found[1] + table + found[2], text, flags=re.S)
    return text


def refresh() -> None:
    """Write the README anew."""
    README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    refresh()
