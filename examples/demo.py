"""The main job, end to end, on real weights and real photographs: `make demo`.

Fine-tunes EfficientNet-Lite0 (ImageNet weights) to tell functional from defective solar cells (elpv: 2,624
electroluminescence photographs), once with FT-Last and once with TinyTL-L+B, and prints what each reached and what
each took. Leaves in runs/demo the TinyTL-L+B run (delta, metrics, curves), the FT-Last run beside it, a picture of live
bytes over one training step, and results.json.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tinytl.cli.display import TrainingDisplay
from tinytl.engine import FitOptions
from tinytl.memory import Profile, StepSpec, draw_timelines, profile_step
from tinytl.report import Column, table
from tinytl.run import RunResult, train
from tinytl.spec import TrainSpec

OUT = Path("runs/demo")
BACKBONE = "efficientnet_lite0"
RESOLUTION = 128
EPOCHS = 5
LEARNING_RATE = 3e-3
METHODS = ("ft-last", "tinytl-l+b")

COLUMNS = [
    Column("method", "method"),
    Column("top1", "top-1", "%"),
    Column("balanced_accuracy", "balanced", "%"),
    Column("majority_share", "largest class alone", "%"),
    Column("counted_bytes", "counted", "MB"),
    Column("kept_bytes", "kept", "MB"),
    Column("measured_bytes", "measured", "MB"),
    Column("stock_measured_bytes", "stock measured", "MB"),
    Column("seconds", "training", "s", 0),
    Column("delta_bytes", "learned", "MB", 2),
]


def run_method(name: str, console: Console) -> tuple[RunResult, float]:
    """Train with one method; TinyTL-L+B's run is the demo's own folder."""
    out = OUT if name == METHODS[-1] else OUT / name
    options = FitOptions(epochs=EPOCHS, lr=LEARNING_RATE, seed=0)
    spec = TrainSpec("elpv", BACKBONE, name, resolution=RESOLUTION, min_scale=0.5, fit=options)
    start = time.perf_counter()
    with TrainingDisplay(console) as display:
        result = train(spec, out, callbacks=display.callbacks())
    return result, time.perf_counter() - start


def row(name: str, result: RunResult, seconds: float, profile: Profile) -> dict[str, Any]:
    """One line of the table."""
    assert profile.stock is not None
    return {
        "method": name,
        "top1": result.evaluation.top1,
        "balanced_accuracy": result.evaluation.balanced_accuracy,
        "majority_share": result.evaluation.majority_share,
        "counted_bytes": profile.counted.total_bytes,
        "kept_bytes": profile.kept.total_bytes,
        "measured_bytes": profile.lean.measured.peak_bytes,
        "stock_measured_bytes": profile.stock.measured.peak_bytes,
        "seconds": seconds,
        "delta_bytes": result.delta_bytes,
    }


def main() -> None:
    """Run both methods, measure both, print and draw."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # into a file or a pipe: one line a row
    shutil.rmtree(OUT, ignore_errors=True)
    rows, profiles = [], {}
    for name in METHODS:
        console.rule(name)
        result, seconds = run_method(name, console)
        step = StepSpec(BACKBONE, name, resolution=RESOLUTION, classes=2)
        profiles[name] = profile_step(step, compare_stock=True, repeats=0, rss=False)
        rows.append(row(name, result, seconds, profiles[name]))
    console.rule("results")
    console.print(
        table(rows, COLUMNS, f"{BACKBONE} on elpv, {RESOLUTION} px, batch 8, {EPOCHS} epochs"), soft_wrap=True
    )
    console.print(
        "counted: the paper's rule. kept: for backward, by the operations' rules. measured: all live tensor bytes at\n"
        "the peak of a training step (weights, gradients, optimizer state, input included). See docs/measuring.md.",
        highlight=False,
    )
    last = profiles[METHODS[-1]]
    assert last.stock is not None
    draw_timelines(
        {"stock PyTorch": last.stock.measured, "lean": last.lean.measured},
        OUT / "live_bytes.png",
        title=f"Live bytes over one training step: {BACKBONE}, {METHODS[-1]}, {RESOLUTION} px, batch 8",
    )
    (OUT / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    console.print(f"\nIn {OUT}: delta.safetensors, metrics.jsonl, curves.png, live_bytes.png, results.json, ft-last/")


if __name__ == "__main__":
    main()
