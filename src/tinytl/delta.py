"""What was learned, and nothing else: one small safetensors file.

A delta holds the trained tensors and the buffers of inserted modules, and in its metadata what is needed to
use them: the method, the backbone, the class names, the preprocessing and the hash of the base it belongs to.
Applied to that base, adapted by that method, it gives the trained model bit for bit. It is sealed (see
`tinytl._atomic`): a torn or changed file is refused, and so is everything in it that has not the expected
type, since a delta may come from anywhere. Equal content makes equal files.

    adaptation = adapt_(model, method)
    fit(model, ...)
    save_delta(path, model, adaptation, backbone=..., norm=..., classes=..., preprocessing=...)

    delta = load_delta(path)                 # then: base from delta.backbone, adapt_ with delta.method
    apply_delta(model, delta, adaptation)
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tinytl._atomic import DamagedFileError, content_hash, read_sealed, write_sealed
from tinytl.checkpoint import Learned, learned_tensors, put_tensors
from tinytl.errors import DeltaError

KIND = "tinytl-delta/1"
MAX_CLASSES = 100_000  # ImageNet-21k has 21,841
MAX_TEXT = 1_000  # characters of a name
FIELDS = ("method", "backbone", "norm", "classes", "preprocessing", "base_hash", "extra")


@dataclass(frozen=True, eq=False)
class Delta:
    """A delta, read and judged.

    Attributes:
        tensors: by ``state_dict`` key of the adapted model.
        method: JSON; what `save_delta` made of the adaptation's method.
        backbone, norm: names of the base, such as 'efficientnet_lite0' and 'bn'.
        classes: names of the classes, in the order of the logits; no two alike.
        preprocessing: `tinytl.backbones.Preprocessing` by field name; lists for tuples.
        base_hash: `base_hash` of the base.
        extra: whatever else was given to `save_delta`.
        content_hash: SHA-256 over all the above: the delta's name for other programs.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    method: Any
    backbone: str
    norm: str
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    base_hash: str
    extra: Mapping[str, Any]
    content_hash: str


def base_hash(model: nn.Module, exclude: Sequence[str] = ("classifier.",)) -> str:
    """Return the SHA-256 (hex) of a network's weights: names, dtypes, shapes and bytes of its ``state_dict``.

    Left out are keys that begin with one of ``exclude`` (the classifier is replaced for every task) and batch
    norm's ``num_batches_tracked``, which computes nothing. Device and memory format make no difference.
    """
    return content_hash(
        (key, tensor)
        for key, tensor in model.state_dict().items()
        if not key.startswith(tuple(exclude)) and not key.endswith("num_batches_tracked")
    )


def save_delta(
    path: Path,
    model: nn.Module,
    adaptation: Learned,
    *,
    backbone: str,
    norm: str,
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    method: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write what ``model`` learned, atomically, and return the delta's content hash.

    ``method`` defaults to ``adaptation.method``; dataclasses become ``{"name": type name, field: value,
    ...}``. Nothing that changes from run to run (times, paths) belongs into ``extra``: equal training, equal
    file.

    Raises RunError when the file cannot be written, DeltaError for values that `load_delta` would refuse,
    ValueError when the model is not as ``adapt_`` left it.
    """
    metadata = {
        "method": to_json(getattr(adaptation, "method", None) if method is None else method),
        "backbone": backbone,
        "norm": norm,
        "classes": list(classes),
        "preprocessing": to_json(preprocessing),
        "base_hash": adaptation.base_hash,
        "extra": to_json(extra or {}),
    }
    try:
        _judge(metadata)
    except DamagedFileError as error:
        raise DeltaError(f"cannot write {path}: it {error}") from error
    return write_sealed(Path(path), KIND, learned_tensors(model, adaptation), metadata)


def load_delta(path: Path) -> Delta:
    """Read a delta. Raises DeltaError when it is missing, damaged or foreign, or holds what no delta can."""
    try:
        tensors, metadata, digest = read_sealed(Path(path), KIND)
        _judge(metadata)
    except DamagedFileError as error:
        raise DeltaError(f"delta {path} {error}") from error
    metadata["classes"] = tuple(metadata["classes"])
    return Delta(tensors=tensors, content_hash=digest, **metadata)


def apply_delta(model: nn.Module, delta: Delta, adaptation: Learned) -> None:
    """Copy a delta into ``model``, which was adapted with the delta's method (``adaptation``).

    Raises DeltaError when it belongs to another base, or keys, shapes or dtypes differ; nothing is changed
    then.
    """
    if delta.base_hash != adaptation.base_hash:
        raise DeltaError(
            f"the delta belongs to another base: to {delta.backbone} ({delta.norm}) with the SHA-256 "
            f"{delta.base_hash[:12]}..., this one has {adaptation.base_hash[:12]}...; "
            "load the weights it was trained on"
        )
    put_tensors(model, delta.tensors, adaptation, "the delta does not fit the model", DeltaError)


def to_json(value: Any) -> Any:
    """Return dataclasses, mappings and sequences as plain JSON values. Raises TypeError for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: to_json(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        return {"name": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON cannot hold")


def _judge(metadata: Mapping[str, Any]) -> None:
    """Raise DamagedFileError, for the reader to complete, unless every field is what `Delta` says."""
    if sorted(metadata) != sorted(FIELDS):
        raise DamagedFileError(f"has the wrong fields, expected {', '.join(FIELDS)}")
    for name in ("backbone", "norm"):
        if not _is_name(metadata[name]):
            raise DamagedFileError(f"has a {name} that is no name")
    digest = metadata["base_hash"]
    if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
        raise DamagedFileError("has a base_hash that is no SHA-256")
    classes = metadata["classes"]
    if not (isinstance(classes, list) and 1 <= len(classes) <= MAX_CLASSES and all(map(_is_name, classes))):
        raise DamagedFileError(f"has classes that are not 1 to {MAX_CLASSES} names")
    if len(set(classes)) != len(classes):
        raise DamagedFileError("has two classes of one name")
    for name in ("preprocessing", "extra"):
        if not isinstance(metadata[name], dict):
            raise DamagedFileError(f"has {name} that are no mapping")
    _judge_preprocessing(metadata["preprocessing"])


def _judge_preprocessing(values: Mapping[str, Any]) -> None:
    resolution = values.get("resolution")
    if type(resolution) is not int or not 1 <= resolution <= 4096:
        raise DamagedFileError("has a resolution that is not 1 to 4096 pixels")
    for name in ("mean", "std"):
        value = values.get(name)
        if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
            raise DamagedFileError(f"has a {name} that is not three numbers")
    if not all(value > 0 for value in values["std"]):
        raise DamagedFileError("has a std that is not above 0")
    if not _is_name(values.get("interpolation")):
        raise DamagedFileError("has an interpolation that is no name")
    fraction = values.get("crop_fraction")
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise DamagedFileError("has a crop_fraction that is not above 0 and at most 1")


def _is_name(value: object) -> bool:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TEXT:
        return False
    # control characters would reach a terminal; lone surrogates cannot be written as UTF-8
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e6 < value < 1e6
