"""Accuracy on real photographs over seeds, method beside method: `python -m benchmarks.accuracy`.

EfficientNet-Lite0 (ImageNet weights) on elpv, the demo's recipe for longer. A seed draws the new classifier, the lite
modules, the order of the photographs and their augmentation; all seeds and methods are measured on the same held-out
photographs.
Each finished run is kept in runs/accuracy and not made again, so the benchmark can be cut and goes on. Writes
benchmarks/results/accuracy.json and docs/benchmarks/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from examples.demo import BACKBONE, LEARNING_RATE, RESOLUTION
from tinytl._threads import threads
from tinytl.engine import FitOptions
from tinytl.report import Column, markdown
from tinytl.run import train
from tinytl.spec import TrainSpec

from . import readme
from .machine import describe, versions

RESULTS, PAGE = Path("benchmarks/results/accuracy.json"), Path("docs/benchmarks/accuracy.md")
RUNS = Path("runs/accuracy")
SEEDS = (0, 1, 2)
EPOCHS = 9
# With Adam at 1e-3 the full network falls back to the larger class and stays there.
LEARNING_RATES = {"ft-last": LEARNING_RATE, "tinytl-l+b": LEARNING_RATE, "ft-full": 2e-4}


def folder(method: str, seed: int) -> Path:
    """Where a run is kept."""
    return RUNS / f"{method}-{seed}"


def one(method: str, seed: int) -> dict[str, Any]:
    """Train once, or read what an earlier call found."""
    out = folder(method, seed)
    done = out / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    options = FitOptions(epochs=EPOCHS, lr=LEARNING_RATES[method], seed=seed)
    spec = TrainSpec("elpv", BACKBONE, method, resolution=RESOLUTION, min_scale=0.5, fit=options)
    result = train(spec, out, resume=(out / "run.json").exists())
    e = result.evaluation
    found = {
        "method": method,
        "seed": seed,
        "top1": e.top1,
        "balanced_accuracy": e.balanced_accuracy,
        "majority_share": e.majority_share,
        "images": e.images,
        "delta_bytes": result.delta_bytes,
    }
    done.write_text(json.dumps(found))
    return found


def page(results: dict[str, Any]) -> str:
    """The documentation page of the committed results."""
    columns = [Column("method", "method"), Column("seeds", "seeds"), Column("lr", "peak rate", digits=4)]
    for key, heading in (("top1", "top-1"), ("balanced_accuracy", "balanced")):
        columns += [
            Column(key, heading, "%"),
            Column(f"{key}_low", "lowest", "%"),
            Column(f"{key}_high", "highest", "%"),
        ]
    columns.append(Column("delta_bytes", "learned", "MB", 2))
    runs = results["runs"]
    return (
        "# Accuracy on photographs\n\n"
        f"Made by `python -m benchmarks.accuracy`; do not edit. {BACKBONE} (ImageNet weights) on elpv (functional or "
        f"defective solar cells), {RESOLUTION} px, batch 8, {EPOCHS} epochs, seeds from {list(SEEDS)}; validation on "
        f"{runs[0]['images']} held-out photographs, of which the larger class alone would get "
        f"{runs[0]['majority_share']:.1%}. {versions(results['machine'])}. "
        "Mean, lowest and highest over the seeds.\n\n" + markdown(readme.summary(results), columns)
    )


def main() -> None:
    """Train what is missing, write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--as-is", action="store_true", help="report the runs that are finished, train nothing")
    parser.add_argument("--page-only", action="store_true", help="write the page from the committed JSON")
    options = parser.parse_args()
    if options.page_only:
        results = json.loads(RESULTS.read_text())
    else:
        wanted = [(method, seed) for seed in SEEDS for method in LEARNING_RATES]
        if options.as_is:
            wanted = [(method, seed) for method, seed in wanted if (folder(method, seed) / "result.json").exists()]
        with threads(options.threads):
            runs = [one(method, seed) for method, seed in wanted]
        results = {"machine": describe(), "learning_rates": LEARNING_RATES, "runs": runs}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(results))
    readme.refresh()
    print(page(results))


if __name__ == "__main__":
    main()
