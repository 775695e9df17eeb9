"""Every error that tinytl raises on purpose.

::

    TinyTLError
    |-- InputError                  what the user gave cannot be used: the command line exits with status 2
    |   |-- UnknownNameError        no such backbone, method, data set, ...; near misses are named
    |   |-- DataError               a folder of photographs or an image in it
    |   |   `-- PhotoError          one image file; its ``reason`` says why in a word or two
    |   |-- WeightsError            weights that are missing, of a wrong hash or of a wrong shape
    |   |-- DeltaError              a delta that is damaged or belongs to another base
    |   |-- ProgramError            a compiled step that is damaged, or of another version
    |   |-- BudgetError             a memory budget that nothing fits; its ``least_bytes`` would do
    |   `-- RunError                a run that cannot be written, resumed, read or gone on with
    |       `-- NotFiniteError      a loss or a gradient is NaN or infinite
    |-- UnsupportedLayerError       a network holds a layer that cannot be adapted exactly
    `-- Interrupted                 SIGINT or SIGTERM came: exit status 130 or 143

A message is one line. It names the value, what was expected, and the mend. Anything else that escapes is a bug
and is shown with its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


def one_line(text: str) -> str:
    """Return ``text`` with everything escaped that is not printable: line breaks, a terminal's commands, surrogates."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class TinyTLError(Exception):
    """Base of all errors that tinytl raises on purpose.

    What would break the line or reach the terminal as a command (names of files may hold anything) is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(TinyTLError):
    """What the user gave cannot be used; the message says how to mend it."""


class UnknownNameError(InputError):
    """A name that is in no list; the message gives near misses and the whole list."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        import difflib  # needed by whom it concerns alone

        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")


class DataError(InputError):
    """A folder of photographs, or an image in it, cannot be used."""


class PhotoError(DataError):
    """An image file cannot be used; ``reason`` says why in a word or two, such as 'truncated'."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class WeightsError(InputError):
    """Weights are missing, do not have the expected hash, or do not fit the network."""


class DeltaError(InputError):
    """A delta is damaged or belongs to another base network."""


class BudgetError(InputError):
    """Nothing fits a memory budget; ``least_bytes`` is the smallest that would do."""

    def __init__(self, message: str, least_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class ProgramError(InputError):
    """A compiled program is missing, damaged, or of a version that this one cannot read."""


class RunError(InputError):
    """A run folder cannot be written, resumed or read, or training cannot go on."""


class NotFiniteError(RunError):
    """A loss or a gradient is NaN or infinite; the message names the step and where it was seen first."""


class Interrupted(TinyTLError):
    """A signal asked the run to stop, and it stopped where nothing is lost.

    ``exit_status`` is what a shell expects of a program that a signal ended: 128 and its number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class UnsupportedLayerError(TinyTLError):
    """A network holds a layer that cannot be adapted exactly; the message names its path and type."""
