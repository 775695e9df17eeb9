"""This process's memory: its peak, and that what is not needed any more goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_LARGE = 64 * 1024
_DONT_NEED = 4  # of madvise


def hold_little() -> None:
    """Have the C library give a decoded photograph's memory back when it is freed.

    glibc would keep it for the next one, in each thread anew. Other C libraries have no such call: nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for parameter, value in ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _LARGE), (_ARENA_MAX, 1)):
        mallopt(parameter, value)


def give_back() -> None:
    """Give back what only the start needed: freed memory, and pages of program files that were read once.

    To import modules runs through most of the interpreter's code, of which training needs little. Those pages are the
    files' own, unchanged: what is touched again is mapped again from the system's cache. On Linux; elsewhere nothing is
    done.
    """
    try:
        library = ctypes.CDLL(None)
        madvise = library.madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        library.malloc_trim(ctypes.c_size_t(0))
        for begin, size in list(_unchanged()):
            madvise(begin, size, _DONT_NEED)
    except (OSError, AttributeError, TypeError, ValueError):
        return


def _unchanged() -> Iterator[tuple[int, int]]:
    """(address, bytes) of each mapping of a file that cannot be written to and holds no page of its own."""
    span: tuple[int, int] | None = None
    with open("/proc/self/smaps", "rb") as file:
        for line in file:
            words = line.split()
            if not words[0].endswith(b":"):
                begin, end = (int(edge, 16) for edge in words[0].split(b"-"))
                file_backed = len(words) > 5 and words[5].startswith(b"/")
                span = (begin, end - begin) if words[1] in (b"r-xp", b"r--p") and file_backed else None
            elif span is not None and words[0] == b"Anonymous:":
                if words[1] == b"0":
                    yield span
                span = None


def peak_bytes() -> int:
    """The most memory that was resident so far.

    Of this program alone where Linux tells it: getrusage would count what the process was before it (`exec`).
    """
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
