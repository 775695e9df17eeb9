"""Installing as users do: a wheel into an environment of its own, with a compiler and without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from .native import needs_compiler, small_file, widest_isa

ROOT = Path(__file__).parents[1]
STEP = """
import sys
from tinytl.runtime import Executor
with Executor(sys.argv[1]) as executor:
    print(executor.step(executor.batch, 0.1)[0] > 0, sorted({"torch", "numpy"} & set(sys.modules)))
"""


def metadata() -> str:
    return (ROOT / "pyproject.toml").read_text()


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | more
    return subprocess.run(
        [str(word) for word in command], env=env, capture_output=True, text=True, check=False, cwd=ROOT
    )


def built(folder: Path, *options: str, **more: str) -> Path:
    """The wheel of this tree."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--wheel-dir", folder)
    done = run(*pip, ROOT, *options, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("tinytl-*.whl")
    return wheel


def installed(wheel: Path, folder: Path) -> Path:
    """The programs of an environment that holds that wheel and what it depends on."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    done = run(programs / "python", "-m", "pip", "--disable-pip-version-check", "install", wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    return programs


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


def test_the_device_half_depends_on_pillow_alone() -> None:
    found = re.search(r"^dependencies = \[(.*?)\]", metadata(), re.M | re.S)
    assert found is not None
    assert re.findall(r'"(\w+)', found.group(1)) == ["pillow"]


def test_the_command_without_the_lab_is_one_line() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['typer'] = None; from tinytl.__main__ import main; main()"
    )
    done = run(sys.executable, "-c", script)
    assert done.returncode == 2
    line = only_line(done.stderr)
    assert line.startswith("tinytl: torch, typer not found")
    assert "pip install 'tinytl[lab]'" in line


@needs_compiler
@pytest.mark.slow
def test_a_wheel_trains_without_torch_and_numpy(tmp_path: Path) -> None:
    # the kernels of one instruction set: all of them are what `make setup` built
    wheel = built(tmp_path / "wheel", f"--config-settings=cmake.define.TINYTL_ISAS={widest_isa()}")
    assert re.fullmatch(r"tinytl-[\d.]+-py3-none-(?!any).*\.whl", wheel.name), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("runtime/libtinytl.so", "runtime/tinytl-step", "ops/_lab_kernels.so", "py.typed", "report/page.css"):
        assert f"tinytl/{name}" in names
    assert not [name for name in names if not name.startswith("tinytl")]
    assert sum(name.endswith(".so") for name in names) == 2  # none that lay around in the sources

    program, programs = small_file(tmp_path), installed(wheel, tmp_path / "venv")
    done = run(programs / "python", "-c", STEP, program)
    assert (done.stdout.strip(), done.stderr) == ("True []", "")
    (library,) = (tmp_path / "venv").rglob("runtime/tinytl-step")
    done = run(library, program, "--steps", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 2: loss" in done.stdout
    done = run(programs / "tinytl", "--help")
    assert done.returncode == 2
    assert "pip install 'tinytl[lab]'" in only_line(done.stderr)


@pytest.mark.slow
def test_a_wheel_without_a_compiler_says_what_is_missing(tmp_path: Path) -> None:
    wheel = built(tmp_path / "wheel", CXX=str(tmp_path / "no-compiler"))
    assert re.fullmatch(r"tinytl-[\d.]+-py3-none-any\.whl", wheel.name), wheel.name
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", "tinytl-step"))]
    program, programs = small_file(tmp_path), installed(wheel, tmp_path / "venv")
    script = (
        "import sys; from tinytl.errors import InputError\n"
        "from tinytl.runtime import Executor\n"
        "try: Executor(sys.argv[1])\nexcept InputError as error: print(error)"
    )
    done = run(programs / "python", "-c", script, program)
    assert done.stderr == ""
    assert "install a C++17 compiler" in only_line(done.stdout)
