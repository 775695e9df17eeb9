"""Image folders and named data sets -> batches. Pillow and numpy; torch is imported when the first batch is
made.

::

    train, validation = resolve_split("photos/")
    loader = Loader(train, TrainTransform(224, mean, std), batch_size=8, shuffle=True, seed=0)
    for batch in loader.epoch(0):
        for images, labels in batch.pieces(4): ...  # float32, four at a time
"""

from tinytl.data.cache import PhotoCache
from tinytl.data.check import checked
from tinytl.data.decode import Photo, open_photo, read_rgb
from tinytl.data.folder import SUFFIXES, PhotoSet, find_photos, has_splits, listed, scan, scan_splits, split
from tinytl.data.loader import Batch, Loader
from tinytl.data.named import DATASETS, refuse_among, resolve, resolve_split
from tinytl.data.normalize import Normalize
from tinytl.data.transforms import (
    INTERPOLATIONS,
    EvalTransform,
    PixelTransform,
    TrainTransform,
    Transform,
    sample_rng,
)

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
