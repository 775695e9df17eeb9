"""Numbers as a text of ranges: how a backbone's kept blocks and a method's positions are spelled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable


def spell_ranges(numbers: Iterable[int]) -> str:
    """Numbers ascending, runs as ranges; equal sets have equal texts.

    >>> spell_ranges([0, 1, 2, 5, 6, 9])
    '0-2.5-6.9'
    """
    words = []
    for _, run in itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        words.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else f"{members[0]}")
    return ".".join(words)
