"""Whether a program's META says what a run needs: the executor judges its code, and of META the hash alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinytl._sealed import ITEM_BYTES
from tinytl.errors import InputError, ProgramError

from .machine import Machine

MEND = "compile it again from a run or a folder"


def judged(meta: Mapping[str, Any], machine: Machine) -> tuple[str, ...]:
    """Names of the program's classes, of a META that can be believed (docs/program.md).

    Raises ProgramError where something that a run needs is absent, of another type, or does not fit the program.
    """
    for name, kind in (("tensors", list), ("learned", list), ("carried", list), ("delta", dict)):
        if name not in meta:
            raise ProgramError(f"the program was compiled without its {name}: {MEND}")
        _need(isinstance(meta[name], kind), f"{name} is no {'object' if kind is dict else 'list'}")
    _need(isinstance(meta.get("train", {}), dict), "train is no object")
    named = len(meta["tensors"]) == machine.tensors and all(isinstance(name, str) for name in meta["tensors"])
    _need(named, f"tensors are not {machine.tensors} names")
    keys = [_learned(entry, machine) for entry in meta["learned"]] + [_carried(entry) for entry in meta["carried"]]
    _need(len(set(keys)) == len(keys), "learned and carried name a tensor twice")
    return _delta(meta["delta"], machine)


def _need(fits: bool, what: str) -> None:
    if not fits:
        raise ProgramError(f"the program's {what}: {MEND}")


def _learned(entry: Any, machine: Machine) -> str:
    """The key of an entry of `learned`."""
    key, elements = _key_and_elements(entry, "learned")
    number, shape, layout = entry.get("tensor"), entry["shape"], entry.get("layout")
    _need(type(number) is int and 0 <= number < machine.tensors, f"learned {key!r} is in no tensor of the program")
    turned = len(shape) == 4 and (layout == "OHWI" or (layout == "HWC" and shape[1] == 1))
    _need(layout == "as-is" or turned, f"learned {key!r} has no layout that its shape can have")
    try:
        place = machine.tensor(number)
    except InputError as error:
        raise ProgramError(f"the program's learned {key!r} lies nowhere: {MEND}") from error
    _need(place.nbytes == 4 * elements and not place.readonly, f"learned {key!r} is not what its tensor holds")
    return key


def _carried(entry: Any) -> str:
    """The key of an entry of `carried`; that its bytes are in the file is seen when they are read."""
    key, elements = _key_and_elements(entry, "carried")
    dtype, offset, size = (entry.get(name) for name in ("dtype", "offset", "bytes"))
    known = isinstance(dtype, str) and dtype in ITEM_BYTES and type(offset) is int and offset >= 0
    _need(known and type(size) is int and size == elements * ITEM_BYTES[dtype], f"carried {key!r} has no place")
    return key


def _key_and_elements(entry: Any, what: str) -> tuple[str, int]:
    _need(isinstance(entry, dict) and isinstance(entry.get("key"), str), f"{what} holds an entry without a key")
    shape: Any = entry.get("shape")
    whole = isinstance(shape, list) and all(type(extent) is int and extent >= 0 for extent in shape)
    _need(whole, f"{what} {entry['key']!r} has no shape")
    return entry["key"], math.prod(shape)


def _delta(about: Any, machine: Machine) -> tuple[str, ...]:
    """The classes of what a delta says of itself."""
    texts = all(isinstance(about.get(name), str) for name in ("backbone", "norm", "base_hash"))
    _need(texts, "delta does not name its backbone, norm and base_hash")
    method = about.get("method")
    _need(isinstance(method, dict) and isinstance(method.get("name"), str), "delta does not name its method")
    _need(isinstance(about.get("extra"), dict), "delta has an extra that is no object")
    classes, looks = about.get("classes"), about.get("preprocessing")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    _need(
        named and len(classes) == len(set(classes)) == machine.classes,
        f"delta does not name its {machine.classes} classes",
    )
    _need(isinstance(looks, dict), "delta has no preprocessing")
    for name in ("mean", "std"):
        three = looks.get(name)
        _need(isinstance(three, list) and len(three) == 3 and all(map(_is_number, three)), f"{name} is not 3 numbers")
    fraction, resolution = looks.get("crop_fraction"), looks.get("resolution")
    _need(_is_number(fraction) and 0 < fraction <= 1, "crop_fraction is not above 0 and at most 1")
    _need(isinstance(looks.get("interpolation"), str), "interpolation is no name")
    size = (machine.height, machine.width)
    _need(
        type(resolution) is int and (resolution, resolution) == size,
        f"resolution is not that of the {size[0]} x {size[1]} pixels which it takes",
    )
    return tuple(classes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
