"""Make torchvision importable where its compiled part does not fit the installed torch.

On import torchvision attaches shape functions to two of its compiled operators. Where its shared library cannot be
loaded (a CUDA build beside a CPU torch), those operators do not exist and the import fails, and timm's with it. Stating
their schemas first is enough: the models in torchvision and timm call neither.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""The operators that ``torchvision/_meta_registrations.py`` names through ``torch.library.register_fake``."""

_libraries: list[torch.library.Library] = []  # a schema lives as long as its library object


def register_schemas() -> None:
    """State the schemas of the operators that torchvision looks for on import; call it before importing timm.

    Does nothing where torchvision is absent, its own library loads, or it was called before.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _libraries:
        return
    for folder in spec.submodule_search_locations or ():
        for file in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(file))
            except OSError:
                continue
            return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)


def need(package: str) -> None:
    """Skip the test where ``package`` ('timm', 'torchvision') cannot be imported, and say why."""
    register_schemas()
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{package} does not import here: {' '.join(str(error).split())}", allow_module_level=True)
