"""Dense and grouped convolutions of the executor against plain loops, by native/tests/check_conv.cpp.

That program is compiled here with the kernels of every instruction set that the compiler knows; it runs those that the
processor has. What it checks, and to which tolerance, is in its own first lines.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .native import needs_compiler

NATIVE = Path(__file__).parents[1] / "native"
KERNELS = ("conv", "conv_dx", "conv_dw", "depthwise", "depthwise_dx", "depthwise_dw", "gemm_peak")
FLAGS = ("-std=gnu++17", "-O1", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-pthread")
ISAS: dict[str, tuple[str, ...]] = (
    {
        "plain": (),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    }
    if platform.machine().lower() in ("x86_64", "amd64")
    else {"neon" if platform.machine().lower() in ("aarch64", "arm64") else "plain": ()}
)


def compiled(*arguments: str | Path) -> None:
    compiler = next(found for name in ("c++", "g++", "clang++") if (found := shutil.which(name)))
    subprocess.run([compiler, *FLAGS, *arguments], check=True, cwd=NATIVE)


@pytest.fixture(scope="module")
def check_conv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled."""
    folder = tmp_path_factory.mktemp("check_conv")

    def kernel(isa: str, name: str) -> Path:
        made = folder / f"{isa}.{name}.o"
        compiled(*ISAS[isa], f"-DTINYTL_ISA={isa}", "-c", f"kernels/{name}.cpp", "-o", made)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda pair: kernel(*pair), [(isa, name) for isa in ISAS for name in KERNELS]))
    have = [f"-DTINYTL_HAVE_{isa.upper()}=1" for isa in ISAS]
    compiled(*have, "tests/check_conv.cpp", "runtime/threads.cpp", *objects, "-o", folder / "check_conv")
    return folder / "check_conv"


@pytest.mark.slow
@needs_compiler
def test_they_agree_with_plain_loops_and_give_the_same_bits_on_any_number_of_threads(check_conv: Path) -> None:
    found = subprocess.run([check_conv, "check", "1", "150"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    cases, ran = found.stdout.split(" cases agree on ")
    assert int(cases) >= 3 * 150 * len(ran.split())
    assert set(ran.split()) & {"plain", "neon"}
