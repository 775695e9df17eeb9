"""`tinytl doctor`: it tells what is there, names the mend of what is not, and works where things are broken."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tinytl as package
from tinytl import _machine, doctor
from tinytl.ops import _native
from tinytl.runtime import _library

from .command_line import tinytl
from .test_cli import promised, promised_parts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parent.parent


def examined(**environment: str) -> doctor.Report:
    return doctor.examine(try_extras=False)


def advice(report: doctor.Report) -> str:
    return "\n".join(finding.text for finding in report.findings if finding.level == "advice")


def broken(report: doctor.Report) -> str:
    return "\n".join(finding.text for finding in report.findings if finding.level == "broken")


def test_the_tables_are_those_of_the_project() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    needed = {text for text in (*project["dependencies"], *extras["lab"]) if "python_version" not in text}
    assert needed == set(doctor.REQUIRED)
    extras = {name: texts for name, texts in extras.items() if name not in ("dev", "lab")}
    assert set(extras) == set(doctor.EXTRAS) == set(doctor.PURPOSE)
    for name, texts in extras.items():
        assert {text for text in texts if not text.startswith("tinytl[")} == set(doctor.EXTRAS[name])


def test_json() -> None:
    found = tinytl("doctor", "--json").json
    assert set(found) == promised("doctor")
    assert found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["tinytl"] == package.__version__
    assert set(found["cpu"]) == promised_parts("doctor", "cpu")
    assert 1 <= found["cpu"]["usable_cores"] <= found["cpu"]["cores"]
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert set(found["memory"]) == promised_parts("doctor", "memory")
    assert set(found["folders"]) == {"runs", "cache"}
    assert all(set(entry) == {"path", "free_bytes", "writable"} for entry in found["folders"].values())
    assert found["compiled_passes"]["present"] == (_native.KERNELS is not None)
    assert found["executor"]["present"] == (_library.HERE / "libtinytl.so").exists()
    assert found["executor"]["isa"] in (
        ("avx512", "avx2", "neon", "plain") if found["executor"]["present"] else (None,)
    )
    assert set(found["executor"]) == {"present", "isa"}
    assert set(found["extras"]) == set(doctor.EXTRAS)
    assert all(set(entry) == promised_parts("doctor", "extras") for entry in found["extras"].values())
    assert all(set(entry) == {"level", "text"} for entry in found["findings"])
    if sys.platform.startswith("linux"):
        assert found["memory"]["total_bytes"] > found["memory"]["available_bytes"] > 0


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TRIED", {})
    done = tinytl("doctor")
    assert (done.status, done.err) == (0, "")
    assert f"torch           {torch.__version__}\n" in done.out
    assert "compiled passes " in done.out
    assert "\nexecutor        " in done.out
    assert "\n[timm] " in done.out


def test_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.REQUIRED, "no-such-package>=3", "no_such_module")
    monkeypatch.setattr(doctor, "TRIED", {})
    done = tinytl("doctor")
    assert done.status == 2
    assert "broken: no-such-package is missing: pip install 'no-such-package>=3'\n" in done.out
    assert "no-such-package missing\n" in done.out


def test_something_needed_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(doctor.REQUIRED, "numpy>=1.26,<3")
    monkeypatch.setitem(doctor.REQUIRED, "numpy>=99,<100", "numpy")
    report = examined()
    assert not report.ok
    assert "pip install 'numpy>=99,<100'" in broken(report)


def test_pytorch_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"lib{name}.so:\nno such file")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    report = examined()
    assert broken(report) == ("torch is installed and cannot be imported (libtorch.so: no such file): install it again")
    assert report.threads["torch"] is None
    assert report.to_json()["ok"] is False


def test_an_extra_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "timm", {"numpy>=1": "numpy"})
    monkeypatch.setattr(doctor, "TRIED", {"timm": "import warnings\nraise RuntimeError('operator is missing')"})
    report = doctor.examine()
    assert report.ok
    assert report.extras["timm"]["present"] is False
    assert report.extras["timm"]["fault"] == "RuntimeError: operator is missing"
    assert "networks from timm: timm is installed and cannot be imported (RuntimeError" in advice(report)


def test_an_extra_that_is_missing_and_one_of_a_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "tensorboard", {"no-such-board>=1": "no_such_board"})
    monkeypatch.setitem(doctor.EXTRAS, "timm", {"numpy>=99": "numpy"})
    report = examined()
    assert report.ok
    assert "--tensorboard: no-such-board is missing: pip install 'tinytl[tensorboard]'" in advice(report)
    assert "pip install 'numpy>=99'" in advice(report)


def test_the_compiled_passes_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "KERNELS", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    report = examined()
    assert report.ok
    assert report.compiled_passes == {"present": False, "compiler": None}
    assert "install a C++17 compiler, then install tinytl again" in advice(report)


def test_the_executor_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "HERE", tmp_path)
    _library.library.cache_clear()
    report = examined()
    assert report.ok
    assert report.executor == {"present": False, "isa": None}
    assert "--engine device: the executor of compiled programs was not built" in advice(report)
    (tmp_path / "libtinytl.so").write_text("of another machine")
    assert "libtinytl.so cannot be loaded" in advice(examined())


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"OMP_NUM_THREADS": "lots"}, "OMP_NUM_THREADS is 'lots', no number of threads"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is '0'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "threads spin"),
        ({"GOMP_SPINCOUNT": "infinite"}, "threads spin"),
    ],
)
def test_openmp_settings_that_hurt(environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_", "KMP_"))]:
        monkeypatch.delenv(name)
    assert "threads" not in advice(examined())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    report = examined()
    assert says in advice(report)
    assert report.threads["environment"] == environment


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(_machine, "usable_cores", lambda: 2)
    assert "OMP_NUM_THREADS is 64 where 2 cores are usable: they wait on each other; give --threads 2" in advice(
        examined()
    )


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_machine, "memory", lambda: (2**30, 3 * 10**8, 2**29))
    monkeypatch.setattr(_machine, "folder", lambda path: (5 * 10**6, True))
    text = advice(examined())
    assert "300 MB of memory are available: train with --micro-batch 1" in text
    assert "5 MB are free on the disk for runs" in text


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TINYTL_CACHE", str(tmp_path / "file" / "cache"))
    report = examined()
    assert report.folders["cache"]["writable"] is False
    assert "cannot be written: set TINYTL_CACHE" in advice(report)


@pytest.mark.parametrize(
    ("version", "requirement", "meets"),
    [
        ("2.13.0+cpu", "torch>=2.6,<3", True),
        ("2.5.1", "torch>=2.6,<3", False),
        ("3.0", "torch>=2.6,<3", False),
        ("3.0.0", "torch>=2.6,<3", False),
        ("2.6", "torch>=2.6.0", True),
        ("0.1.0.post1", "x>=0.1,<1", True),
        ("1.0rc1", "x<1", False),
    ],
)
def test_versions(version: str, requirement: str, meets: bool) -> None:
    assert doctor._meets(version, requirement) is meets


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(_machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(_machine, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  6000 kB\n")
    return tmp_path


def put(machine: Path, **files: str) -> None:
    for name, text in files.items():
        path = machine / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_memory_without_a_group(machine: Path) -> None:
    assert _machine.memory() == (8_192_000, 6_144_000, None)


def test_memory_in_a_group_of_version_2(machine: Path) -> None:
    put(machine, proc__self__cgroup="0::/a/b\n")
    put(machine, cgroup__a__b__memory_dot_max="4096000\n", cgroup__a__b__memory_dot_current="1000000\n")
    assert _machine.memory() == (8_192_000, 3_096_000, 4_096_000)
    put(machine, cgroup__a__b__memory_dot_max="max\n")
    assert _machine.memory() == (8_192_000, 6_144_000, None)


def test_memory_in_a_group_of_version_1(machine: Path) -> None:
    put(machine, proc__self__cgroup="4:memory:/a\n0::/\n")
    put(
        machine,
        cgroup__memory__a__memory_dot_limit_in_bytes="4096000",
        cgroup__memory__a__memory_dot_usage_in_bytes="96000",
    )
    assert _machine.memory() == (8_192_000, 4_000_000, 4_096_000)
    put(machine, cgroup__memory__a__memory_dot_limit_in_bytes="9223372036854771712")
    assert _machine.memory() == (8_192_000, 6_144_000, None)


def test_cores_of_a_group(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert _machine.usable_cores() == 8
    put(machine, cgroup__cpu_dot_max="150000 100000")
    assert _machine.usable_cores() == 2
    put(machine, cgroup__cpu_dot_max="max 100000")
    assert _machine.usable_cores() == 8
    (machine / "cgroup" / "cpu.max").unlink()
    put(machine, cgroup__cpu__cpu_dot_cfs_quota_us="300000", cgroup__cpu__cpu_dot_cfs_period_us="100000")
    assert _machine.usable_cores() == 3
    put(machine, cgroup__cpu__cpu_dot_cfs_quota_us="-1")
    assert _machine.usable_cores() == 8


def test_processors(machine: Path) -> None:
    put(machine, proc__cpuinfo="processor : 0\nmodel name : Fast (TM)\nflags : sse avx2 fma\n\nmodel name : Other\n")
    assert _machine.processor() == ("Fast (TM)", ("avx2", "fma"))
    put(machine, proc__cpuinfo="processor : 0\nFeatures : fp asimd\n")
    assert _machine.processor()[1] == ("asimd",)
    (machine / "proc" / "cpuinfo").unlink()
    name, instructions = _machine.processor()
    assert name
    assert instructions == ()


def test_folders(tmp_path: Path) -> None:
    free, writable = _machine.folder(tmp_path / "to" / "be" / "made")
    assert writable
    assert free is not None
    assert free > 0
    (tmp_path / "file").write_text("")
    assert _machine.folder(tmp_path / "file" / "below")[1] is False
    assert not (tmp_path / "to").exists()
