"""What this process may use of the machine: processor, cores, memory, disk. Read, never changed.

A container's limits count, not the machine's size: a process is killed by what its group may hold. Linux tells all of
it (``/proc``, ``/sys/fs/cgroup``); elsewhere what is not known is None.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "neon", "sve")  # as Linux names them


def processor() -> tuple[str, tuple[str, ...]]:
    """The processor's name and those of `INSTRUCTIONS` that it has."""
    fields: dict[str, str] = {}
    for line in _lines(PROC / "cpuinfo"):
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return name, tuple(flag for flag in INSTRUCTIONS if flag in flags)


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, and its group's quota rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, math.ceil(_quota() or affinity)))


def memory() -> tuple[int | None, int | None, int | None]:
    """Bytes of memory: the machine's, what is available to this process, and its group's limit (None: none)."""
    fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in _lines(PROC / "meminfo")}
    total = int(fields["MemTotal"][0]) * 1024 if "MemTotal" in fields else _pages("SC_PHYS_PAGES")
    available = int(fields["MemAvailable"][0]) * 1024 if "MemAvailable" in fields else _pages("SC_AVPHYS_PAGES")
    limit, used = _group_memory()
    if limit is None or (total is not None and limit >= total):  # an absurdly high limit is how version 1 says none
        return total, available, None
    left = max(0, limit - (used or 0))
    return total, left if available is None else min(available, left), limit


def folder(path: Path) -> tuple[int | None, bool]:
    """Bytes free where a folder is or would be made, and whether it can be written or made."""
    there = path.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        free = None
    return free, there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _quota() -> float | None:
    """The cores' worth of time that the process's group gets; None: no quota."""
    words = _first(_group_files("cpu", "cpu.max"))
    if len(words) == 2:  # version 2: "max 100000", or microseconds in a period of microseconds
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota, period = (_first(_group_files("cpu", f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _group_memory() -> tuple[int | None, int | None]:
    """The group's limit and what it holds of it."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = (_first(_group_files("memory", name)) for name in (limit_name, used_name))
        if limit:
            return (None if limit[0] == "max" else int(limit[0])), int(used[0]) if used else None
    return None, None


def _group_files(controller: str, name: str) -> list[Path]:
    """Where a control file of this process's group may be, in versions 2 and 1, inside a container or out of it."""
    files = []
    for line in _lines(PROC / "self" / "cgroup"):
        if line.count(":") < 2:
            continue
        _, controllers, group = line.split(":", 2)
        if not controllers:
            files.append(CGROUPS / group.strip("/") / name)
        elif controller in controllers.split(","):
            files.append(CGROUPS / controller / group.strip("/") / name)
    return [*files, CGROUPS / name, CGROUPS / controller / name]


def _first(files: list[Path]) -> list[str]:
    """The words of the first file that is there and holds some."""
    return next((words for file in files if (words := " ".join(_lines(file)).split())), [])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
