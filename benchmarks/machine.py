"""Which machine a figure was measured on, and when."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import torch

from tinytl._machine import processor


def describe() -> dict[str, Any]:
    """Processor, cores, threads, versions and the day."""
    return {
        "processor": processor()[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def sentence(machine: dict[str, Any]) -> str:
    """A page's words for what `describe` found: processor, cores, threads, PyTorch, day."""
    return f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {versions(machine)}"


def versions(machine: dict[str, Any]) -> str:
    """PyTorch's version and the day, for figures that do not depend on the processor."""
    return f"torch {machine['torch']}, {machine['date']}"
