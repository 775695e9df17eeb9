"""Every error that tinytl raises on purpose.

::

    TinyTLError
    |-- InputError                  what the user gave cannot be used: the command line exits with status 2
    |   |-- UnknownNameError        no such backbone, method, data set, ...; near misses are named
    |   |-- DataError               a folder of photographs or an image in it
    |   |-- WeightsError            weights that are missing, of a wrong hash or of a wrong shape
    |   |-- DeltaError              a delta that is damaged or belongs to another base
    |   `-- RunError                a run folder that cannot be written, resumed or read
    `-- UnsupportedLayerError       a network holds a layer that cannot be adapted exactly

A message is one line. It names the value, what was expected, and the mend. Anything else that escapes is a bug
and is shown with its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TinyTLError(Exception):
    """Base of all errors that tinytl raises on purpose."""


class InputError(TinyTLError):
    """What the user gave cannot be used; the message says how to mend it."""


class UnknownNameError(InputError):
    """A name that is in no list; the message gives near misses and the whole list."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")


class DataError(InputError):
    """A folder of photographs, or an image in it, cannot be used."""


class WeightsError(InputError):
    """Weights are missing, do not have the expected hash, or do not fit the network."""


class DeltaError(InputError):
    """A delta is damaged or belongs to another base network."""


class RunError(InputError):
    """A run folder cannot be written, resumed or read."""


class UnsupportedLayerError(TinyTLError):
    """A network holds a layer that cannot be adapted exactly; the message names its path and type."""
