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

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tinytl._atomic import DamagedFileError, read_sealed, write_sealed
from tinytl.checkpoint import Learned, learned_tensors, put_tensors
from tinytl.errors import DeltaError, InputError
from tinytl.methods import Method

KIND = "tinytl-delta/1"
MAX_CLASSES = 100_000  # ImageNet-21k has 21,841
MAX_TEXT = 1_000  # characters of a name
MAX_KNOB = 1_000_000  # of a method: more than any network has blocks or channels
MAX_METHOD_TEXT = 4_000  # characters of its name, which tells all blocks that it names
FIELDS = ("method", "backbone", "norm", "classes", "preprocessing", "base_hash", "extra")


class LearnedBy(Learned, Protocol):
    """An adaptation that also tells its method: `tinytl.methods.Adaptation`, or anything of this shape."""

    @property
    def method(self) -> Method:
        """Return what was trained."""
        ...


@dataclass(frozen=True, eq=False)
class Delta:
    """A delta, read and judged.

    Attributes:
        tensors: by ``state_dict`` key of the adapted model.
        method: what to adapt the base with.
        backbone, norm: names of the base, such as 'efficientnet_lite0' and 'bn'.
        classes: names of the classes, in the order of the logits; no two alike.
        preprocessing: the fields of a `tinytl.backbones.Preprocessing`, judged.
        base_hash: `tinytl.methods.base_hash` of the base.
        extra: whatever else was given to `save_delta`.
        content_hash: SHA-256 over all the above: the delta's name for other programs.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    method: Method
    backbone: str
    norm: str
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    base_hash: str
    extra: Mapping[str, Any]
    content_hash: str


def save_delta(
    path: Path,
    model: nn.Module,
    adaptation: LearnedBy,
    *,
    backbone: str,
    norm: str,
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write what ``model`` learned, atomically, and return the delta's content hash.

    ``preprocessing`` holds the fields of a `tinytl.backbones.Preprocessing` (``dataclasses.asdict``). Nothing
    that changes from run to run (times, paths) belongs into ``extra``: equal training, equal file.

    Raises RunError when the file cannot be written, DeltaError for values that `load_delta` would refuse,
    ValueError when the model is not as ``adapt_`` left it.
    """
    metadata = {
        "method": {"name": adaptation.method.name, "parts": adaptation.method.to_json()},
        "backbone": backbone,
        "norm": norm,
        "classes": list(classes),
        "preprocessing": dict(preprocessing),
        "base_hash": adaptation.base_hash,
        "extra": dict(extra or {}),
    }
    metadata = json.loads(json.dumps(metadata))  # tuples become lists, as a reader will find them
    tensors = learned_tensors(model, adaptation)
    try:
        _judge(metadata)
        _judge_tensors(tensors)
    except DamagedFileError as error:
        raise DeltaError(f"cannot write {path}: it {error}") from error
    return write_sealed(Path(path), KIND, tensors, metadata)


def check_names(classes: Sequence[str], preprocessing: Mapping[str, Any]) -> None:
    """Refuse, before training, what `save_delta` would refuse after it. Raises DeltaError."""
    for name in classes:
        if not _is_name(name):
            raise DeltaError(
                f"the class {name[:80]!r} could not be saved: expected 1 to {MAX_TEXT} characters of Unicode without "
                "control characters; rename its folder"
            )
    metadata = {
        "backbone": "-",
        "norm": "-",
        "base_hash": "0" * 64,
        "extra": {},
        "method": {"parts": []},
        "classes": list(classes),
        "preprocessing": json.loads(json.dumps(dict(preprocessing))),
    }
    try:
        _judge(metadata)
    except DamagedFileError as error:
        raise DeltaError(f"what would be learned could not be saved: it {error}") from error


def load_delta(path: Path) -> Delta:
    """Read a delta. Raises DeltaError when it is missing, damaged or foreign, or holds what no delta can."""
    try:
        tensors, metadata, digest = read_sealed(Path(path), KIND)
        method = _judge(metadata)
        _judge_tensors(tensors)
    except DamagedFileError as error:
        raise DeltaError(f"delta {path} {error}") from error
    preprocessing = metadata["preprocessing"]
    return Delta(
        tensors=tensors,
        method=method,
        backbone=metadata["backbone"],
        norm=metadata["norm"],
        classes=tuple(metadata["classes"]),
        preprocessing=preprocessing | {name: tuple(preprocessing[name]) for name in ("mean", "std")},
        base_hash=metadata["base_hash"],
        extra=metadata["extra"],
        content_hash=digest,
    )


def apply_delta(model: nn.Module, delta: Delta, adaptation: LearnedBy) -> None:
    """Copy a delta into ``model``, which was adapted with the delta's method (``adaptation``).

    Raises DeltaError when base, method, keys, shapes or dtypes differ; nothing is changed then.
    """
    if delta.base_hash != adaptation.base_hash:
        raise DeltaError(
            f"the delta belongs to another base: to {delta.backbone} ({delta.norm}) with the SHA-256 "
            f"{delta.base_hash[:12]}..., this one has {adaptation.base_hash[:12]}...; "
            "load the weights it was trained on"
        )
    if delta.method != adaptation.method:
        raise DeltaError(
            f"the delta was trained with {delta.method.name}, the model is adapted "
            f"with {adaptation.method.name}: adapt it with the delta's method"
        )
    put_tensors(model, delta.tensors, adaptation, "the delta does not fit the model", DeltaError)


def _judge(metadata: Mapping[str, Any]) -> Method:
    """Return the method. Raises DamagedFileError, for the caller to complete, unless every field is right."""
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
    try:
        method = Method.from_json(metadata["method"]["parts"])
        if any(abs(knob) > MAX_KNOB for part in method.parts for knob in _numbers(asdict(part))):
            raise InputError("a number beyond any network")
        if len(method.name) > MAX_METHOD_TEXT:
            raise InputError("more blocks than any network")
        return method
    except (InputError, TypeError, KeyError, AttributeError) as error:  # whatever shape of JSON it is
        raise DamagedFileError("has a method that this version does not know") from error


def _numbers(knobs: Any) -> Iterator[int]:
    """The numbers of a part, as deep as they stand."""
    if isinstance(knobs, int):
        yield knobs
    else:
        for knob in knobs.values() if isinstance(knobs, dict) else knobs:
            yield from _numbers(knob)


def _judge_tensors(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DamagedFileError(f"holds NaN or infinity in {name[:80]!r}")


def _judge_preprocessing(values: Mapping[str, Any]) -> None:
    if sorted(values) != ["crop_fraction", "interpolation", "mean", "resolution", "std"]:
        raise DamagedFileError("has preprocessing of other fields than those of a Preprocessing")
    resolution = values["resolution"]
    if type(resolution) is not int or not 1 <= resolution <= 4096:
        raise DamagedFileError("has a resolution that is not 1 to 4096 pixels")
    for name in ("mean", "std"):
        value = values[name]
        if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
            raise DamagedFileError(f"has a {name} that is not three numbers")
    if not all(value > 0 for value in values["std"]):
        raise DamagedFileError("has a std that is not above 0")
    if not _is_name(values["interpolation"]):
        raise DamagedFileError("has an interpolation that is no name")
    fraction = values["crop_fraction"]
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise DamagedFileError("has a crop_fraction that is not above 0 and at most 1")


def _is_name(value: object) -> bool:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TEXT:
        return False
    # control characters would reach a terminal; lone surrogates cannot be written as UTF-8
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e6 < value < 1e6
