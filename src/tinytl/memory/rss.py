"""How much one training step adds to a process's resident set, each case in a fresh process.

The sharp figure is :mod:`tinytl.memory.measured`; this is the blunt one that leaves nothing out. The worker
imports PyTorch, builds backbone, method, input and optimizer, gives free heap pages back (else the step would
hide in what building the network left behind), resets the kernel's peak, reads ``VmRSS``, takes one step, and
reads ``VmHWM``.

It is the process's first step, so the increase holds besides activations, gradients and temporaries: the
optimizer's state, PyTorch's thread pool, oneDNN's compiled kernels and private buffers, code pages touched
for the first time, and heap that is free but not returned. A warm-up step would pay for these in advance and
leave its own heap for the measured one to run in. Pages are counted as the kernel counts them: expect some MB
of spread between runs.

Linux only (``/proc``). By hand, any field of :class:`tinytl.memory.step.StepSpec`::

    python -m tinytl.memory.rss '{"backbone": "proxylessnas_mobile", "method": "tinytl-l+b"}'
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tinytl.errors import TinyTLError

from .plan import StepPlan
from .step import StepSpec

_STDERR_LINES = 8


def rss_delta(
    spec: StepSpec, plan: StepPlan | None = None, *, timeout_seconds: float = 600.0
) -> dict[str, int | bool] | None:
    """Take the step of ``spec``, as ``plan`` says, in a fresh process; return what it added to the resident set.

    Keys, in bytes: ``rss_before_bytes``, ``rss_peak_bytes``, ``rss_delta_bytes`` (their difference), and
    ``peak_was_reset``. When the kernel did not let the worker reset its peak that is False,
    ``rss_before_bytes`` is
    the peak before the step, and the difference is a lower bound: building the network may have peaked
    higher.

    Returns None where there is no ``/proc`` to read (not Linux).

    Raises: TinyTLError: the worker failed or took longer than ``timeout_seconds``; the end of its stderr is
    given.
    """
    if not sys.platform.startswith("linux"):
        return None
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Not -m: the package may have imported this module by then, and runpy warns of that.
    command = [sys.executable, "-c", "from tinytl.memory.rss import main; main()", json.dumps(asdict(spec))]
    command += [] if plan is None else [json.dumps(plan.to_json())]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TinyTLError(f"the resident-set worker took longer than {timeout_seconds:g} s: {spec}") from error
    if done.returncode:
        tail = " | ".join(done.stderr.strip().splitlines()[-_STDERR_LINES:]) or "it wrote nothing to stderr"
        raise TinyTLError(f"the resident-set worker ended with status {done.returncode} for {spec}: {tail}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Be the worker: read a step, and a plan if there is one, as JSON from the command line; print JSON."""
    plan = StepPlan.from_json(json.loads(sys.argv[2])) if len(sys.argv) > 2 else None
    step = _build(StepSpec(**json.loads(sys.argv[1])), plan)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Not glibc: nothing to trim, nothing to say.
        ctypes.CDLL(None).malloc_trim(0)
    was_reset = _reset_peak()
    before = _status_bytes("VmRSS" if was_reset else "VmHWM")
    step()
    peak = _status_bytes("VmHWM")
    result = {
        "rss_before_bytes": before,
        "rss_peak_bytes": peak,
        "rss_delta_bytes": peak - before,
        "peak_was_reset": was_reset,
    }
    print(json.dumps(result))


def _build(spec: StepSpec, plan: StepPlan | None) -> Callable[[], None]:
    # Here and not above: the parent may have imported none of it.
    import torch

    from tinytl.nn.execution import set_execution_

    from .measured import training_step
    from .step import build_batch, build_network, build_optimizer

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    model, _ = build_network(spec)
    images, labels = build_batch(spec, torch.contiguous_format)
    size, update = spec.micro_batch, spec.update
    if plan is not None:
        set_execution_(model, plan.policies)
        size, update = plan.micro_batch, plan.update
    optimizer = build_optimizer(spec, model.parameters())
    return training_step(model, images, labels, optimizer, size, update=update)


def _reset_peak() -> bool:
    """Let ``VmHWM`` begin anew at the present ``VmRSS`` (proc(5), clear_refs); False when not permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024  # The file says kB and means KiB.
    raise TinyTLError(f"/proc/self/status has no {key}: this kernel does not account for it")


if __name__ == "__main__":
    main()
