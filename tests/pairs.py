"""Which backbone meets which norm and method, where all of them with all others would take too long."""

from __future__ import annotations

from tinytl.backbones import BACKBONES


def pairs(*methods: str) -> list[tuple[str, str, str]]:
    """(backbone, norm, method): each backbone with each norm that it can have and with each of these methods.

    Not each norm with each method: which norm meets which method takes turns from backbone to backbone.
    """
    found = []
    for turn, name in enumerate(sorted(BACKBONES)):
        norms = BACKBONES[name].norms
        for at in range(max(len(norms), len(methods))):
            found.append((name, norms[at % len(norms)], methods[(turn + at) % len(methods)]))
    return found
