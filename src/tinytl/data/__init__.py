"""Image folders and named data sets -> batches. Pillow and numpy; torch is imported when the first batch is
made.

::

    train, validation = resolve_split("photos/")
    loader = Loader(train, TrainTransform(224, mean, std), batch_size=8, shuffle=True, seed=0)
    for batch in loader.epoch(0): ...
"""

from tinytl.data.decode import Photo, open_photo, read_rgb
from tinytl.data.folder import SUFFIXES, PhotoSet, has_splits, scan, scan_splits, split
from tinytl.data.loader import Batch, Loader
from tinytl.data.named import DATASETS, resolve, resolve_split
from tinytl.data.transforms import INTERPOLATIONS, EvalTransform, TrainTransform, Transform, sample_rng

__all__ = [
    "DATASETS",
    "INTERPOLATIONS",
    "SUFFIXES",
    "Batch",
    "EvalTransform",
    "Loader",
    "Photo",
    "PhotoSet",
    "TrainTransform",
    "Transform",
    "has_splits",
    "open_photo",
    "read_rgb",
    "resolve",
    "resolve_split",
    "sample_rng",
    "scan",
    "scan_splits",
    "split",
]
