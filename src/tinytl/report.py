"""What a run tells: metrics as JSON lines, TensorBoard on request, learning curves, tables.

``metrics.jsonl`` holds one object a line, of two kinds:

    {"kind": "step", "epoch": 1, "step": 17, "loss": ..., "accuracy": ..., "lr": ..., ...}
    {"kind": "epoch", "epoch": 1, "step": 40, "loss": ..., "accuracy": ..., "validation": {"top1": ..., ...}, ...}

Fractions are in [0, 1], times in seconds, memory in bytes; percent and MB (10^6 bytes) appear where something
is printed, and nowhere else. A resumed run first drops the lines of what it does again, so every step and
every epoch stands there once.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from tinytl._atomic import write_bytes
from tinytl.checkpoint import Progress
from tinytl.engine import EpochInfo, Evaluation, StepInfo
from tinytl.errors import InputError, RunError

Unit = Literal["", "MB", "%", "s", "ms", "x"]

# what a line of metrics.jsonl must hold as numbers: of steps and epochs, and of an epoch's validation
_MEANS, _RESULTS = ("loss", "accuracy"), ("loss", "top1", "majority_share")

# Okabe and Ito's colours: told apart by every kind of colour vision, and in grey
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"


def evaluation_record(evaluation: Evaluation, *, confusion: bool = False) -> dict[str, Any]:
    """Return an evaluation as JSON values by field name; ``confusion`` (C lists of C) on request."""
    record = {
        "top1": evaluation.top1,
        "balanced_accuracy": evaluation.balanced_accuracy,
        "images": evaluation.images,
        "loss": evaluation.loss,
        "majority_share": evaluation.majority_share,
    }
    return record | ({"confusion": evaluation.confusion.tolist()} if confusion else {})


def record(info: StepInfo | EpochInfo) -> dict[str, Any]:
    """Return the JSON values of one line of ``metrics.jsonl``."""
    values = {entry.name: getattr(info, entry.name) for entry in dataclasses.fields(info)}
    if isinstance(info, EpochInfo):
        values["validation"] = evaluation_record(info.validation) if info.validation else None
    kind = "epoch" if isinstance(info, EpochInfo) else "step"
    return {"kind": kind, **values, "images_per_second": info.images_per_second}


class MetricsLog:
    """Appends lines to ``metrics.jsonl``; its `write` is made to be an ``on_step`` or ``on_epoch`` of `fit`.

    A new run begins an empty file; a run that goes on (``resume``) keeps the lines up to there. Both are
    atomic. A line reaches the operating system at once, and the disk with `sync`, which every checkpoint calls.

    Raises RunError when the file cannot be written or, on resuming, read.
    """

    def __init__(self, path: Path, resume: Progress | None = None) -> None:
        self.path = Path(path)
        kept = read_metrics(self.path) if resume and self.path.exists() else []
        kept = [line for line in kept if resume and _is_done(line, resume)]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        try:
            # unbuffered: what could not be written must not come back at close()
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from error

    def write(self, info: StepInfo | EpochInfo) -> None:
        """Append one line. Raises RunError when it cannot be written."""
        try:
            data = json.dumps(record(info), allow_nan=False).encode() + b"\n"
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Force the lines to the disk, which is due before a checkpoint counts their steps as done."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``. A last line without its end, which a killed process may leave, is left out.

    Raises RunError when the file cannot be read or another line is damaged.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(data.split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or not _is_metric(line):
            raise RunError(f"{path}, line {number} is damaged: delete that line, or start the run again")
        lines.append(line)
    return lines


def require_tensorboard() -> Any:
    """TensorBoard's SummaryWriter class. Raises InputError when the extra is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "TensorBoard is not installed: pip install 'tinytl[tensorboard]', or leave --tensorboard out"
        ) from error
    return SummaryWriter


class TensorBoardLog:
    """Writes the same numbers for TensorBoard (an extra: ``pip install 'tinytl[tensorboard]'``).

    On resuming, TensorBoard is told to hide what lies after the point the run goes on from. Raises InputError
    when the extra is not installed.
    """

    def __init__(self, folder: Path, resume: Progress | None = None) -> None:
        self._writer = require_tensorboard()(str(folder), purge_step=resume.step + 1 if resume else None)

    def write(self, info: StepInfo | EpochInfo) -> None:
        """Add the scalars of one step or epoch, at the global step."""
        part = "epoch" if isinstance(info, EpochInfo) else "step"
        scalars = {f"{part}/loss": info.loss, f"{part}/accuracy": info.accuracy, f"{part}/lr": info.lr}
        scalars[f"{part}/images_per_second"] = info.images_per_second
        scalars[f"{part}/peak_MB"] = info.peak_bytes / 1e6
        if isinstance(info, EpochInfo) and info.validation:
            scalars["validation/loss"] = info.validation.loss
            scalars["validation/top1"] = info.validation.top1
            scalars["validation/balanced_accuracy"] = info.validation.balanced_accuracy
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, info.step)

    def sync(self) -> None:
        """Hand everything to the operating system: the writer's queue would die with the process."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def plot_curves(metrics_path: Path, out_png: Path) -> None:
    """Draw loss and accuracy over the epochs of a ``metrics.jsonl`` (train, validation, majority) into a PNG.

    Needs no display. Raises RunError when there is no epoch in the file, or a file cannot be read or written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [line for line in read_metrics(metrics_path) if line["kind"] == "epoch"]
    if not epochs:
        raise RunError(f"{metrics_path} holds no finished epoch: there is nothing to draw yet")
    validated = [line for line in epochs if line["validation"]]
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)

    def draw(axes: Any, lines: list[dict[str, Any]], values: list[float], color: str, label: str) -> None:
        marker = "o" if len(lines) <= 30 else None  # one epoch alone would be no line at all
        x = [line["epoch"] for line in lines]
        style = "-" if color == BLUE else "--"  # not by colour alone
        axes.plot(x, values, style, color=color, marker=marker, markersize=3.5, linewidth=1.6, label=label)

    draw(loss, epochs, [line["loss"] for line in epochs], BLUE, "training (as minimized)")
    draw(accuracy, epochs, [line["accuracy"] for line in epochs], BLUE, "training")
    if validated:
        results = [line["validation"] for line in validated]
        draw(loss, validated, [result["loss"] for result in results], ORANGE, "validation")
        draw(accuracy, validated, [result["top1"] for result in results], ORANGE, "validation")
        share = results[-1]["majority_share"]
        accuracy.axhline(share, color=GREY, linewidth=1.2, linestyle=":", label="always the largest class")
    loss.set(title="Loss", xlabel="epoch", ylabel="cross entropy [nats]", ylim=(0, None))
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="top-1")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_bytes(Path(out_png), picture.getvalue())


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the rows. A row without it raises KeyError; None is printed as a dash.
        heading: printed above it.
        unit: how a number is printed. 'MB': bytes, in 10^6; '%': a fraction; 's', 'ms': seconds; 'x': a
        ratio;
            '': as it is, with thousands set apart.
        digits: after the decimal point, of everything but whole numbers without a unit.
    """

    key: str
    heading: str
    unit: Unit = ""
    digits: int = 1

    def format(self, value: object) -> str:
        """Return one cell's text."""
        if value is None:
            return "–"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        if self.unit == "":
            return f"{value:,}" if isinstance(value, int) else f"{value:,.{self.digits}f}"
        scale = {"MB": 1e-6, "%": 100.0, "s": 1.0, "ms": 1e3, "x": 1.0}[self.unit]
        return f"{value * scale:,.{self.digits}f}{'' if self.unit == 'x' else ' '}{self.unit}"


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column], title: str = "") -> Table:
    """Return a table for the terminal: texts left, numbers right. Values are never read as markup."""
    rows = list(rows)
    result = Table(title=Text(title) if title else None, title_justify="left")
    for index, column in enumerate(columns):
        # the first column names the row: a narrow terminal may break the others, and cuts nothing off
        justify = "right" if _is_numeric(rows, column) else "left"
        width = max([len(column.format(row[column.key])) for row in rows], default=0) if index == 0 else None
        result.add_column(Text(column.heading), justify=justify, overflow="fold", min_width=width)
    for row in rows:
        result.add_row(*(Text(column.format(row[column.key])) for column in columns))
    return result


def markdown(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Return the same table in Markdown, ending with a newline."""
    rows = list(rows)
    marks = ["---:" if _is_numeric(rows, column) else "---" for column in columns]
    lines = [[column.heading for column in columns], marks]
    lines += [[column.format(row[column.key]) for column in columns] for row in rows]
    return "".join("| " + " | ".join(_escape(cell) for cell in line) + " |\n" for line in lines)


def _is_metric(line: Mapping[str, Any]) -> bool:
    counts = [line.get("epoch"), line.get("step")]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts) or not _are_numbers(line, *_MEANS):
        return False
    validation = line.get("validation")
    if line.get("kind") == "step" or validation is None:
        return line.get("kind") in ("step", "epoch")
    return line.get("kind") == "epoch" and isinstance(validation, dict) and _are_numbers(validation, *_RESULTS)


def _are_numbers(values: Mapping[str, Any], *names: str) -> bool:
    found = [values.get(name) for name in names]
    # NaN and what is too large to draw fail the comparison
    return all(type(value) in (int, float) and abs(value) < 1e300 for value in found)  # type: ignore[arg-type]


def _is_done(line: Mapping[str, Any], resume: Progress) -> bool:
    # an epoch's line comes after its last step's: at that step the epoch is not yet done
    return line["epoch"] <= resume.epoch if line["kind"] == "epoch" else line["step"] <= resume.step


def _is_numeric(rows: list[Mapping[str, Any]], column: Column) -> bool:
    values = [row[column.key] for row in rows if row[column.key] is not None]
    return column.unit != "" or (bool(values) and all(isinstance(value, int | float) for value in values))


def _escape(cell: str) -> str:
    return " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").split())
