"""The choice of pairs leaves no backbone, norm or method out."""

from __future__ import annotations

import itertools

import pytest

from tinytl.backbones import BACKBONES
from tinytl.backbones.once_for_all import SPACES
from tinytl.methods import METHODS

from .pairs import NAMES, pairs

NORMS = {(name, norm) for name in NAMES for norm in BACKBONES[name].norms}


def test_only_spaces_whose_kinds_are_there_are_passed_over() -> None:
    assert {name for name in BACKBONES if name not in NAMES} == {name for name in SPACES if "_w" in name}


@pytest.mark.parametrize("methods", [("tinytl-l+b", "ft-full"), ("tinytl-l+b",), tuple(METHODS)])
def test_nothing_is_left_out(methods: tuple[str, ...]) -> None:
    found = pairs(*methods)
    assert {(name, norm) for name, norm, _ in found} == NORMS
    assert {(name, method) for name, _, method in found} == set(itertools.product(NAMES, methods))
    assert {(norm, method) for _, norm, method in found} == set(itertools.product(("bn", "gn"), methods))
    assert len(set(found)) == len(found)
