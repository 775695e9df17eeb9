"""A module imports only what stands above it, and importing the package does nothing else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "tinytl"

LAYERS = (
    ("errors",),
    ("_differences", "_digest", "_files", "_ranges"),
    ("_file_hash", "_interrupt", "_lock", "_machine", "_metrics_log", "_options", "_schedule", "_sealed", "_threads"),
    ("_atomic", "_found", "_keeper", "_run_folder"),
    ("ops",),
    ("nn",),
    ("graph",),
    ("backbones", "data"),  # two sides: neither knows the other
    ("runtime",),  # the device's half: of what stands above it, only what needs neither PyTorch nor numpy
    ("methods",),
    ("spec",),  # names are looked up in methods and backbones when one is made: nothing here imports PyTorch
    ("checkpoint",),
    ("engine",),
    ("memory",),  # describes and measures the engine's own step
    ("delta",),
    ("report",),
    ("trained",),
    ("config",),
    ("_prepared",),
    ("compiler",),  # from a run, or from what a run is asked for, to a program
    ("_device_bench", "_device_run", "_run_page"),
    ("run",),
    ("supernet",),
    ("search",),  # chooses what a run then trains
    ("doctor",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
KNOWN_EXCEPTIONS: set[tuple[str, str]] = set()
EXTRAS = (
    "matplotlib",
    "timm",
    "tensorboard",
    "torchvision",
    "huggingface_hub",
    "peft",
    "sklearn",
    "optuna",
    "onnx",
    "pymoo",
)


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def unit(path: Path) -> str:
    """The layer's name: the package or the module right under tinytl."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of what a module imports from tinytl, inside functions too."""
    package = ["tinytl", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tinytl")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "tinytl":
                yield from (f"tinytl.{alias.name}" for alias in node.names if alias.name != "__version__")
            elif name.startswith("tinytl."):
                yield name


def test_every_module_has_a_layer() -> None:
    unknown = {unit(path) for path in modules()} - set(RANK)
    assert not unknown, f"say in tests/test_layering.py where these stand: {sorted(unknown)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    mine = unit(path)
    for name in imports(path):
        other = name.split(".")[1]
        assert other in RANK, f"{name}: not a module of the package"
        allowed = other == mine or RANK[other] < RANK[mine] or (mine, other) in KNOWN_EXCEPTIONS
        assert allowed, f"{path.relative_to(ROOT)} imports {name}, which stands below or beside it"


def test_imports_are_found_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of this test can fail: it sees relative, nested and aliased imports."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "ops").mkdir()
    file = tmp_path / "ops" / "x.py"
    file.write_text(
        "import torch, tinytl.nn as n\nfrom . import y\nfrom ..run import a\ndef f():\n  from tinytl import cli\n"
    )
    assert sorted(imports(file)) == ["tinytl.cli", "tinytl.nn", "tinytl.ops", "tinytl.run"]


PROBE = """
import json, os, sys, threading
import numpy, torch
{before}
def threads():
    kernel = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else []
    return [threading.active_count(), len(kernel)]
had, opened = threads(), []
sys.addaudithook(lambda event, args: opened.append(event) if event.startswith(("socket.", "subprocess.")) else None)
import importlib
for name in {names!r}:
    importlib.import_module(name)
print(json.dumps([had, threads(), sorted(m.split(".")[0] for m in sys.modules), opened, torch.cuda.is_initialized()]))
"""


def probe(names: list[str], before: str = "") -> tuple[list[int], list[int], set[str], list[str], bool]:
    code = PROBE.format(names=names, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    had, has, loaded, events, cuda = json.loads(done.stdout)
    return had, has, set(loaded), events, cuda


def test_importing_the_package_loads_no_extras() -> None:
    loaded = probe(["tinytl"])[2]
    assert not loaded & {*EXTRAS, "rich", "typer"}


def test_importing_everything_starts_nothing() -> None:
    """No threads, no network, no processes, no device; and no extra that only one command needs."""
    names = [".".join(("tinytl", *path.relative_to(ROOT).with_suffix("").parts)) for path in modules()]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    had, has, loaded, events, cuda = probe(names)
    assert has == had
    assert not events
    assert not cuda
    assert not loaded & set(EXTRAS)
