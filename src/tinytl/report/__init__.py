"""What a run tells: metrics as JSON lines, TensorBoard on request, learning curves, tables, a page.

Percent and MB (10^6 bytes) appear where something is printed, and nowhere else.
"""

from .blocks import print_blocks
from .curves import plot_curves
from .examine import Answers, Mistake, examine
from .metrics import MetricsLog, evaluation_record, read_metrics, record
from .page import Page, Setting, page_html, write_page
from .tables import Column, Unit, markdown, table
from .tensorboard import TensorBoardLog, require_tensorboard

__all__ = [
    "Answers",
    "Column",
    "MetricsLog",
    "Mistake",
    "Page",
    "Setting",
    "TensorBoardLog",
    "Unit",
    "evaluation_record",
    "examine",
    "markdown",
    "page_html",
    "plot_curves",
    "print_blocks",
    "read_metrics",
    "record",
    "require_tensorboard",
    "table",
    "write_page",
]
