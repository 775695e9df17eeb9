"""The settings that a run was begun with against those that it would be gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return one text for each of ours that is not as theirs, by name; nested mappings are looked into."""
    flat, other = _flat(ours), _flat(theirs)
    return [
        f"{name} is {flat.get(name, 'not set')}, was {other.get(name, 'not set')}"
        for name in sorted({*flat, *other})
        if flat.get(name) != other.get(name)
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, sort_keys=True)
            flat[f"{prefix}{name}"] = text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
    return flat
