"""Image folders and named data sets -> batches. Pillow and numpy; torch is imported when the first batch is
made. Names are imported when they are first used: those who list, split and decode photographs need no numpy.

::

    train, validation = resolve_split("photos/")
    loader = Loader(train, TrainTransform(224, mean, std), batch_size=8, shuffle=True, seed=0)
    for batch in loader.epoch(0):
        for images, labels in batch.pieces(4): ...  # float32, four at a time
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinytl.data.cache import PhotoCache
    from tinytl.data.check import checked
    from tinytl.data.crops import INTERPOLATIONS
    from tinytl.data.decode import Photo, open_photo, read_rgb
    from tinytl.data.folder import SUFFIXES, PhotoSet, find_photos, has_splits, listed, scan, scan_splits, split
    from tinytl.data.loader import Batch, Loader
    from tinytl.data.named import DATASETS, refuse_among, resolve, resolve_split
    from tinytl.data.normalize import Normalize
    from tinytl.data.transforms import EvalTransform, PixelTransform, TrainTransform, Transform, sample_rng

_HOME = {
    "cache": ("PhotoCache",),
    "check": ("checked",),
    "crops": ("INTERPOLATIONS",),
    "decode": ("Photo", "open_photo", "read_rgb"),
    "folder": ("SUFFIXES", "PhotoSet", "find_photos", "has_splits", "listed", "scan", "scan_splits", "split"),
    "loader": ("Batch", "Loader"),
    "named": ("DATASETS", "refuse_among", "resolve", "resolve_split"),
    "normalize": ("Normalize",),
    "transforms": ("EvalTransform", "PixelTransform", "TrainTransform", "Transform", "sample_rng"),
}
_ORIGIN = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DATASETS",
    "INTERPOLATIONS",
    "SUFFIXES",
    "Batch",
    "EvalTransform",
    "Loader",
    "Normalize",
    "Photo",
    "PhotoCache",
    "PhotoSet",
    "PixelTransform",
    "TrainTransform",
    "Transform",
    "checked",
    "find_photos",
    "has_splits",
    "listed",
    "open_photo",
    "read_rgb",
    "refuse_among",
    "resolve",
    "resolve_split",
    "sample_rng",
    "scan",
    "scan_splits",
    "split",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _ORIGIN:
        raise AttributeError(f"module 'tinytl.data' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"tinytl.data.{_ORIGIN[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
