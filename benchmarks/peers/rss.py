"""What a contender's step adds to the resident set of a fresh process: its first step, and a later one.

The first step is as in `tinytl.memory.rss`: optimizer state, thread pool, compiled kernels, and all of a compiler where
there is one. Then free heap is given back to the system, and a second step is taken under a peak that begins anew: what
a step adds for as long as training goes on. Linux only (``/proc``).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch

from tinytl.errors import TinyTLError
from tinytl.memory.profile import LAYOUTS
from tinytl.memory.rss import _reset_peak, _status_bytes

from .contenders import CONTENDERS
from .step import Setting


def growth(key: str, setting: Setting, layout: str) -> dict[str, int] | None:
    """`first_bytes` and `later_bytes`, in bytes; None where there is no ``/proc`` to read.

    Raises TinyTLError when the process fails; the end of its stderr is given.
    """
    if not sys.platform.startswith("linux"):
        return None
    asked = {"key": key, "setting": asdict(setting), "layout": layout, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "benchmarks.peers.rss", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = " | ".join(done.stderr.strip().splitlines()[-4:])
        raise TinyTLError(f"the resident-set worker of {key} ended with status {done.returncode}: {tail}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Be the worker: read what is asked from the command line, print what was found as JSON."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    ready = CONTENDERS[asked["key"]].build(Setting(**asked["setting"]), LAYOUTS[asked["layout"]])
    step = ready.step()
    first = _grown(step)
    ready.optimizer.zero_grad(set_to_none=True)
    print(json.dumps({"first_bytes": first, "later_bytes": _grown(step)}))


def _grown(step: Callable[[], None]) -> int:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to trim
        ctypes.CDLL(None).malloc_trim(0)
    before = _status_bytes("VmRSS" if _reset_peak() else "VmHWM")
    step()
    return _status_bytes("VmHWM") - before


if __name__ == "__main__":
    main()
