"""Metrics files through kills and resumes, curves, tables."""

from __future__ import annotations

import builtins
import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.test_engine import FakeLoader, one_thread, small_model
from tinytl.checkpoint import Progress
from tinytl.engine import EpochInfo, Evaluation, FitOptions, StepInfo, fit
from tinytl.errors import InputError, RunError
from tinytl.report import (
    Column,
    MetricsLog,
    TensorBoardLog,
    evaluation_record,
    markdown,
    plot_curves,
    read_metrics,
    table,
)

__all__ = ["one_thread"]  # a fixture for this module too


def evaluation(top1: float = 0.75) -> Evaluation:
    confusion = torch.tensor([[3, 1], [0, 0]])
    return Evaluation(top1=top1, balanced_accuracy=0.5, images=4, loss=0.9, confusion=confusion, majority_share=0.6)


def epoch_info(epoch: int, validation: Evaluation | None) -> EpochInfo:
    return EpochInfo(
        epoch=epoch,
        epochs=9,
        step=3 * epoch,
        loss=2.0 / epoch,
        accuracy=1 - 0.5 / epoch,
        lr=0.1,
        validation=validation,
        best_top1=0.75,
        best_epoch=1,
        trained_images=12,
        seconds=1.5,
        wait_seconds=0.5,
        validation_seconds=0.25,
        peak_bytes=5_000_000,
    )


def step_info(step: int) -> StepInfo:
    return StepInfo(
        epoch=1 + (step - 1) // 3,
        batch=1 + (step - 1) % 3,
        batches=3,
        step=step,
        steps=27,
        loss=1.0,
        accuracy=0.5,
        lr=0.1,
        images=4,
        seconds=0.5,
        wait_seconds=0.0,
        peak_bytes=5_000_000,
    )


def write_epochs(path: Path, epochs: int, resume: Progress | None = None) -> None:
    with MetricsLog(path, resume) as log:
        first = resume.epoch if resume else 0
        for epoch in range(first + 1, epochs + 1):
            for step in range(3 * epoch - 2, 3 * epoch + 1):
                if resume is None or step > resume.step:
                    log.write(step_info(step))
            log.write(epoch_info(epoch, evaluation()))


def test_one_line_each_with_plain_units(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_epochs(path, 1)
    lines = read_metrics(path)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("epoch", 3),
    ]
    assert lines[0]["images_per_second"] == 8.0
    epoch = lines[3]
    assert (epoch["seconds"], epoch["wait_seconds"], epoch["images_per_second"]) == (1.5, 0.5, 6.0)
    assert epoch["peak_bytes"] == 5_000_000
    expected = {"top1": 0.75, "balanced_accuracy": 0.5, "images": 4, "loss": 0.9, "majority_share": 0.6}
    assert epoch["validation"] == expected
    assert evaluation_record(evaluation(), confusion=True)["confusion"] == [[3, 1], [0, 0]]
    json.dumps(evaluation_record(evaluation(), confusion=True), allow_nan=False)


@pytest.mark.parametrize(
    ("progress", "steps", "epochs"),
    [
        (Progress(epoch=2, batch=0, step=6), 6, 2),
        (Progress(epoch=1, batch=2, step=5), 5, 1),
        (Progress(epoch=1, batch=3, step=6), 6, 1),  # the last step is done, the validation is not
        (Progress(), 0, 0),
    ],
)
def test_resuming_drops_what_is_done_again(tmp_path: Path, progress: Progress, steps: int, epochs: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write_epochs(path, 3)
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"kind": "step", "epo')  # killed while writing
    MetricsLog(path, progress).close()
    kept = read_metrics(path)
    assert [line["step"] for line in kept if line["kind"] == "step"] == list(range(1, steps + 1))
    assert [line["epoch"] for line in kept if line["kind"] == "epoch"] == list(range(1, epochs + 1))
    write_epochs(path, 3, progress)
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_new_run_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_epochs(path, 2)
    write_epochs(path, 1)
    assert len(read_metrics(path)) == 4
    MetricsLog(tmp_path / "other.jsonl", Progress(epoch=1, step=3)).close()  # the file was lost: not the run
    assert read_metrics(tmp_path / "other.jsonl") == []


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"kind": "x"}', '{"kind": "step", "epoch": 1}', "", "\0" * 9])
def test_a_damaged_line_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_epochs(path, 1)
    path.write_text(path.read_text() + text + "\n" + path.read_text())
    with pytest.raises(RunError, match="line 5 is damaged"):
        read_metrics(path)


def test_unreadable_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read .*No such file"):
        read_metrics(tmp_path / "none")
    with pytest.raises(RunError, match="cannot write"):
        MetricsLog(tmp_path / "none" / "metrics.jsonl")


def test_a_full_disk_leaves_one_torn_line_at_most(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            return 0

    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(step_info(1))
    log._file.close()
    log._file = Full()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RunError, match=r"cannot write .*No space"):
        log.write(step_info(2))
    log.close()
    assert len(read_metrics(path)) == 1


def test_no_line_is_lost_or_doubled_wherever_a_run_is_cut(tmp_path: Path) -> None:
    """Cut right after a checkpoint or right before the next: the lines up to the checkpoint stand once."""
    path = tmp_path / "metrics.jsonl"
    seen: list[tuple[Progress, bytes]] = []
    with MetricsLog(path) as log:
        fit(
            small_model(),
            FakeLoader(),
            FakeLoader(),
            FitOptions(epochs=2),
            on_step=log.write,
            on_epoch=log.write,
            on_boundary=lambda at: seen.append((at.progress, path.read_bytes())),
        )
    whole = [(line["kind"], line["step"]) for line in read_metrics(path)]
    kinds = ["step"] * 3 + ["epoch"]
    assert whole == list(zip(kinds * 2, [1, 2, 3, 3, 4, 5, 6, 6], strict=True))
    for number, (progress, here) in enumerate(seen):
        later = seen[min(number + 1, len(seen) - 1)][1]
        for content in (here, later):
            path.write_bytes(content)
            MetricsLog(path, progress).close()
            assert [(line["kind"], line["step"]) for line in read_metrics(path)] == whole[: number + 1]


@pytest.mark.parametrize("epochs", [1, 2, 40])
@pytest.mark.parametrize("validated", [True, False])
def test_curves(tmp_path: Path, epochs: int, validated: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for epoch in range(1, epochs + 1):
            log.write(epoch_info(epoch, evaluation(1 - 0.6 / epoch) if validated else None))
    plot_curves(path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 200
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24) or []}
    assert (0x00, 0x72, 0xB2) in colors
    assert ((0xD5, 0x5E, 0x00) in colors) == validated


def test_no_epoch_no_curve(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").close()
    with pytest.raises(RunError, match="no finished epoch"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, tinytl.report; sys.exit(any(name.startswith('matplotlib') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensorboard_missing_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'tinytl\[tensorboard\]'"):
        TensorBoardLog(tmp_path)


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            calls.append((tag, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = TensorBoardLog(tmp_path, Progress(epoch=1, step=3))
    log.write(step_info(4))
    log.write(epoch_info(2, evaluation()))
    log.close()
    assert calls[0] == (str(tmp_path), 4)
    assert ("step/loss", 1.0, 4) in calls
    assert ("epoch/peak_MB", 5.0, 6) in calls
    assert ("validation/balanced_accuracy", 0.5, 6) in calls
    assert calls[-1] == ("close",)


COLUMNS = [
    Column("method", "method"),
    Column("parameters", "trained"),
    Column("peak_bytes", "peak", "MB"),
    Column("top1", "top-1", "%"),
    Column("step_seconds", "step", "ms", 0),
    Column("seconds", "time", "s"),
    Column("ratio", "to stock", "x", 2),
]
ROWS = [
    dict(zip([c.key for c in COLUMNS], ["L|B [b]", 1962310, 37_140_000, 0.955, 0.2641, 12.34, 0.5], strict=True)),
    dict(zip([c.key for c in COLUMNS], ["ft-last", 4, 1_234_567_890, None, 2.0, 0.05, None], strict=True)),
]


def test_markdown() -> None:
    assert markdown(ROWS, COLUMNS) == (
        "| method | trained | peak | top-1 | step | time | to stock |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| L\\|B [b] | 1,962,310 | 37.1 MB | 95.5 % | 264 ms | 12.3 s | 0.50x |\n"
        "| ft-last | 4 | 1,234.6 MB | – | 2,000 ms | 0.1 s | – |\n"
    )


def test_terminal_table_shows_the_same_cells() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(ROWS, COLUMNS, "memory [MB]"))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for cell in (
        "memory [MB]",
        "L|B [b]",
        "1,962,310",
        "37.1 MB",
        "95.5 %",
        "264 ms",
        "12.3 s",
        "0.50x",
        "–",
    ):
        assert cell in text


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(KeyError):
        markdown([{"method": "x"}], COLUMNS)
    assert markdown([], COLUMNS[:1]) == "| method |\n| --- |\n"
