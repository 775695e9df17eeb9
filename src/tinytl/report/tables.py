"""Rows as a table: in the terminal, and in Markdown, the same cells in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

Unit = Literal["", "MB", "%", "s", "ms", "x"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the rows. A row without it raises KeyError; None is printed as a dash.
        heading: printed above it.
        unit: how a number is printed. 'MB': bytes, in 10^6; '%': a fraction; 's', 'ms': seconds; 'x': a ratio;
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


def _is_numeric(rows: list[Mapping[str, Any]], column: Column) -> bool:
    values = [row[column.key] for row in rows if row[column.key] is not None]
    return column.unit != "" or (bool(values) and all(isinstance(value, int | float) for value in values))


def _escape(cell: str) -> str:
    return " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").split())
