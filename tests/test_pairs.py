"""The choice of pairs leaves no backbone, norm or method out."""

from __future__ import annotations

import itertools

import pytest

from tinytl.backbones import BACKBONES
from tinytl.methods import METHODS

from .pairs import pairs

NORMS = {(name, norm) for name, entry in BACKBONES.items() for norm in entry.norms}


@pytest.mark.parametrize("methods", [("tinytl-l+b", "ft-full"), ("tinytl-l+b",), tuple(METHODS)])
def test_nothing_is_left_out(methods: tuple[str, ...]) -> None:
    found = pairs(*methods)
    assert {(name, norm) for name, norm, _ in found} == NORMS
    assert {(name, method) for name, _, method in found} == set(itertools.product(BACKBONES, methods))
    assert {(norm, method) for _, norm, method in found} == set(itertools.product(("bn", "gn"), methods))
    assert len(set(found)) == len(found)
