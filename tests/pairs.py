"""Which backbone meets which norm and method, where all of them with all others would take too long."""

from __future__ import annotations

from tinytl.backbones import BACKBONES
from tinytl.backbones.once_for_all import SPACES

NAMES = tuple(sorted(name for name in BACKBONES if name not in SPACES or SPACES[name].preprocessing.resolution < 224))
"""The published once-for-all spaces are left out: their networks are the classes of `proxylessnas_mobile` and
`mobilenet_v3_large`, twice as large, and a small space of each kind is held in `tests/test_once_for_all.py`."""


def pairs(*methods: str) -> list[tuple[str, str, str]]:
    """(backbone, norm, method): each backbone with each norm that it can have and with each of these methods.

    Not each norm with each method: which norm meets which method takes turns from backbone to backbone.
    """
    found = []
    for turn, name in enumerate(NAMES):
        norms = BACKBONES[name].norms
        for at in range(max(len(norms), len(methods))):
            found.append((name, norms[at % len(norms)], methods[(turn + at) % len(methods)]))
    return found
