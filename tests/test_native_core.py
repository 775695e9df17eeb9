"""The executor's reader, arena, streams, state and threads, by a hand-made step; its kernels are tested elsewhere."""

from __future__ import annotations

import math
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinytl.compiler.arena import lay_out
from tinytl.compiler.file import read_program
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.program import SCRATCH_PER_THREAD, Program
from tinytl.errors import InputError, NotFiniteError, ProgramError
from tinytl.runtime import Executor, _library

from .native import needs_compiler, needs_executor, photographs, rehashed, section, small_file, value, written
from .small_program import small_program, small_tiled

pytestmark = needs_executor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return small_file(tmp_path)


@pytest.fixture
def executor(path: Path) -> Iterator[Executor]:
    with Executor(path) as opened:
        yield opened


# ---------------------------------------------------------------- what is opened


def test_an_open_program_says_what_it_is(path: Path, executor: Executor) -> None:
    program = read_program(path)
    assert (executor.batch, executor.micro_batch, executor.evaluate_images) == (4, 2, 2)
    assert (executor.classes, executor.height, executor.width, executor.threads) == (3, 6, 6, 2)
    assert (executor.arena_bytes, executor.state_bytes) == (program.arena_bytes, program.state_bytes)
    assert executor.tensors == len(program.tensors)
    assert executor.meta["tensors"] == [tensor.name for tensor in program.tensors]
    assert executor.instructions("micro") == [one.op for one in program.streams["micro"]]
    assert (len(executor.images), len(executor.labels), len(executor.state)) == (4 * 6 * 6 * 3, 4, program.state_bytes)
    assert executor.isa in ("avx512", "avx2", "neon", "plain")
    assert executor.steps == 0


def test_tensors_begin_with_what_the_file_holds_and_otherwise_as_zero(path: Path, executor: Executor) -> None:
    program = read_program(path)
    for number, tensor in enumerate(program.tensors):
        found = value(executor, program, number, 1)
        expected = program.values[number] if number in program.values else torch.zeros_like(found)
        assert torch.equal(found, torch.as_tensor(expected).reshape(found.shape)), tensor.name
        assert executor.tensor(number).readonly == (tensor.role == "constant")


def test_what_is_closed_is_gone(path: Path) -> None:
    executor = Executor(path)
    executor.close()
    executor.close()
    with pytest.raises(ValueError, match="closed"):
        executor.step(1, 0.1)
    with pytest.raises(ValueError, match="released"):
        executor.images[0] = 1


def test_its_memory_may_be_shared_while_it_is_closed(path: Path) -> None:
    executor = Executor(path)
    shared = torch.frombuffer(executor.state, dtype=torch.uint8)
    executor.close()
    del shared


# ---------------------------------------------------------------- bad files


def head(offset: int, form: str, number: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:offset] + struct.pack(form, number) + content[offset + struct.calcsize(form) :]


BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "is not a tinytl program"),
    "another kind of file": (lambda content: b"\x89PNG" + content, "is not a tinytl program"),
    "only a beginning": (lambda content: content[:100], "is truncated: 100 bytes"),
    "newer": (head(8, "<I", 2), "has version 2, this tinytl reads 1: upgrade"),
    "older": (head(8, "<I", 0), "has version 0, this tinytl reads 1: compile it again"),
    "other order of bytes": (head(12, "<I", 0x04030201), "another order of bytes"),
    "truncated": (lambda content: content[:-1], "truncated"),
    "appended to": (lambda content: content + b"\0", "appended to"),
    "one bit of a weight": (lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], "SHA-256"),
    "another hash": (head(24, "<Q", 0), "SHA-256"),
    "a section outside of the file": (lambda content: rehashed(head(64 + 2 * 24 + 16, "<Q", 1 << 40)(content)), "DATA"),
    "a section of negative size": (lambda content: rehashed(head(64 + 24 + 16, "<q", -8)(content)), "CODE"),
    "sections that overlap": (lambda content: rehashed(head(64 + 24 + 8, "<Q", 136)(content)), "CODE"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_line(kind: str, path: Path) -> None:
    change, expected = BAD_FILES[kind]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ProgramError, match=expected) as caught:
        Executor(path)
    line = str(caught.value)
    assert str(path) in line
    assert ":" in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["missing.ttl", "", "no\0name"])
def test_a_program_that_is_not_there_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"cannot be opened|zero byte|is not a file"):
        Executor(f"{tmp_path}/{name}")


def test_the_hash_can_be_left_unchecked(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    Executor(path, check=False).close()


def test_the_hash_is_right_at_every_length(tmp_path: Path) -> None:
    """The last block of SHA-256 has several shapes, by the length of what is hashed."""
    content = small_file(tmp_path).read_bytes()
    for more in (*range(1, 66), 119, 120, 128, 40000):
        path = tmp_path / "longer.ttl"
        longer = content + bytes(range(256)) * (more // 256) + bytes(range(more % 256))
        path.write_bytes(rehashed(head(16, "<Q", len(longer))(longer)))
        Executor(path).close()


def test_more_threads_than_planned_are_refused(path: Path) -> None:
    for threads in (3, -1):
        with pytest.raises(InputError, match=rf"cannot run on {threads} threads.*at most 2"):
            Executor(path, threads=threads)


def test_an_instruction_set_that_is_not_there_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYTL_ISA", "z80")
    with pytest.raises(InputError, match=r"TINYTL_ISA asks for kernels that do not run here: .* one of: .*plain|neon"):
        Executor(path)


@pytest.mark.parametrize("make", [small_program, small_tiled])
def test_words_of_code_that_are_changed_are_refused_or_harmless(make: Callable[[], Program], tmp_path: Path) -> None:
    """In a process of its own: a kernel that left its memory would end it."""
    path = written(make(), tmp_path / "small.ttl")
    content = path.read_bytes()
    offset, size = section(content, b"CODE")
    generator = random.Random(0)
    changed = []
    for at in range(offset, offset + size, 8):
        (old,) = struct.unpack_from("<q", content, at)
        for new in {old + 1, old - 1, generator.choice((0, -1, 2, 7, 64, 1 << 20, 1 << 40, -(1 << 62)))} - {old}:
            changed.append((at, new))
    chosen = generator.sample(changed, min(len(changed), 1500))
    script = tmp_path / "open_them.py"
    script.write_text(OPEN_CHANGED)
    lines = "".join(f"{at} {new}\n" for at, new in chosen)
    done = subprocess.run(
        [sys.executable, str(script), str(path)], input=lines, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    refused, opened = map(int, done.stdout.split())
    assert refused + opened == len(chosen)
    assert refused > opened > 0


OPEN_CHANGED = """
import contextlib, hashlib, struct, sys
from tinytl.errors import InputError
from tinytl.runtime import Executor
content = open(sys.argv[1], "rb").read()
refused = opened = 0
for line in sys.stdin:
    at, new = map(int, line.split())
    body = content[64:at] + struct.pack("<q", new) + content[at + 8:]
    path = sys.argv[1] + ".changed"
    with open(path, "wb") as file:
        file.write(content[:24] + hashlib.sha256(body).digest() + content[56:64] + body)
    try:
        executor = Executor(path)
    except InputError as error:
        assert str(error).count("\\n") == 0
        refused += 1
        continue
    opened += 1
    with executor, contextlib.suppress(InputError):
        if executor.arena_bytes < 1 << 24:
            executor.step(executor.batch, 0.01)
            executor.evaluate(executor.batch)
print(refused, opened)
"""


# ---------------------------------------------------------------- steps


def test_steps_are_those_of_the_interpreter(path: Path, executor: Executor) -> None:
    interpreter = Interpreter(read_program(path))
    for step, count in enumerate((4, 3, 1, 4)):
        images, labels = photographs(executor, count, step)
        loss, correct = executor.step(count, 0.1, seed=1)
        expected, right = interpreter.step(images, labels.long(), 0.1, 1)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert correct == right
        assert executor.steps == step + 1
    images, _ = photographs(executor, 3, 9)
    found = torch.tensor(executor.evaluate(3)).reshape(3, 3)
    torch.testing.assert_close(found.double(), interpreter.evaluate(images).reshape(3, 3), rtol=1e-4, atol=1e-5)


def test_state_that_is_put_back_gives_the_same_bits(executor: Executor) -> None:
    photographs(executor, 4)
    executor.step(4, 0.1)
    kept = bytes(executor.state)
    first = (executor.step(4, 0.1), bytes(executor.state))
    assert first[1] != kept
    executor.state[:] = kept
    assert executor.steps == 1
    assert (executor.step(4, 0.1), bytes(executor.state)) == first


def test_the_number_of_threads_changes_no_bit(path: Path) -> None:
    found = []
    for threads in (1, 2):
        with Executor(path, threads=threads) as executor:
            assert executor.threads == threads
            for step in range(3):
                photographs(executor, 4, step)
                executor.step(4, 0.1)
            found.append((bytes(executor.state), executor.evaluate(4)))
    assert found[0] == found[1]


def test_many_threads_that_come_and_go(tmp_path: Path) -> None:
    """More threads than cores, with pauses in which they fall asleep, and without."""
    path = written(lay_out(small_program(), threads=7), tmp_path / "seven.ttl")
    with Executor(path) as executor:
        assert executor.threads == 7
        photographs(executor, 4)
        losses = [executor.step(4, 0.0)[0] for _ in range(200)]
        for _ in range(20):
            threading_pause()
            losses.append(executor.step(4, 0.0)[0])
    assert len(set(losses)) == 1
    for _ in range(20):
        Executor(path).close()


def threading_pause() -> None:
    """Longer than a waiting thread spins."""
    import time

    time.sleep(0.002)


def test_the_arena_is_used_to_the_byte(path: Path) -> None:
    program = read_program(path)
    assert program.arena_bytes is not None
    scratch = 2 * SCRATCH_PER_THREAD
    with Executor(path) as executor:
        assert executor.arena_used < executor.arena_bytes - scratch
        photographs(executor, 4)
        executor.step(4, 0.1)
        assert executor.arena_used == executor.arena_bytes == program.arena_bytes
    with Executor(path, threads=1) as executor:  # the second thread's scratch memory stays untouched
        executor.step(4, 0.1)
        assert executor.arena_used == executor.arena_bytes - SCRATCH_PER_THREAD


# ---------------------------------------------------------------- bad input


def test_arguments_out_of_range_are_one_line(executor: Executor) -> None:
    for count in (0, -1, 5):
        with pytest.raises(InputError, match=f"{count} images: the program takes 1 to 4"):
            executor.step(count, 0.1)
        with pytest.raises(InputError, match=f"{count} images: the program takes 1 to 4"):
            executor.evaluate(count)
    with pytest.raises(InputError, match="learning rate of nan"):
        executor.step(4, math.nan)
    for label in (3, -1):
        executor.labels[2] = label
        with pytest.raises(InputError, match=f"label {label} of image 2: the program has the classes 0 to 2"):
            executor.step(4, 0.1)
        executor.step(2, 0.1)  # it is not among these
    executor.labels[2] = 0
    with pytest.raises(InputError, match="tensor 1000"):
        executor.tensor(1000)
    with pytest.raises(InputError, match="stream 'train': expected one of begin"):
        executor.seconds("train")
    with pytest.raises(InputError, match="this stream has 4"):
        executor.run("evaluate", 0, 5)
    with pytest.raises(InputError, match="this stream takes 2 at most"):
        executor.run("micro", 0, 1, images=3, count=3)
    assert executor.steps == 2


def trained(path: Path, name: str) -> int:
    return next(n for n, tensor in enumerate(read_program(path).tensors) if tensor.name == name)


def test_a_loss_that_is_not_finite_changes_nothing(path: Path, executor: Executor) -> None:
    photographs(executor, 4)
    executor.step(4, 0.1)
    executor.tensor(trained(path, "fc.bias")).cast("f")[0] = math.nan
    before = bytes(executor.state)
    with pytest.raises(NotFiniteError, match="the loss is not finite"):
        executor.step(4, 0.1)
    assert bytes(executor.state) == before
    assert executor.steps == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named(bad: float, path: Path, executor: Executor) -> None:
    photographs(executor, 4)
    number = trained(path, "fc.weight.grad")
    executor.tensor(number).cast("f")[7] = bad
    before = bytes(executor.tensor(trained(path, "fc.weight")))
    with pytest.raises(NotFiniteError, match=f"tensor {number} is not finite"):
        executor.run("finish", 0, 3, lr=0.1)
    assert bytes(executor.tensor(trained(path, "fc.weight"))) == before


def test_a_step_count_and_a_batch_of_one_piece(tmp_path: Path) -> None:
    path = written(small_program(batch=2, micro_batch=2), tmp_path / "whole.ttl")
    with Executor(path) as executor:
        photographs(executor, 2)
        assert executor.step(2, 0.1)[0] > executor.step(2, 0.1)[0]
        assert executor.steps == 2


def test_an_evaluation_may_take_more_images_than_a_micro_batch(tmp_path: Path) -> None:
    path = written(replace(small_program(), evaluate_images=4), tmp_path / "wide.ttl")
    with Executor(path) as executor:
        images, _ = photographs(executor, 4)
        found = torch.tensor(executor.evaluate(4)).reshape(4, 3).double()
        torch.testing.assert_close(found, Interpreter(read_program(path)).evaluate(images), rtol=1e-4, atol=1e-5)


def test_time_is_told_by_instruction(executor: Executor) -> None:
    photographs(executor, 4)
    executor.step(4, 0.1)
    assert sum(executor.seconds("micro")) == 0
    executor.timing(True)
    executor.step(4, 0.1)
    assert len(executor.seconds("begin")) == 3
    assert min(executor.seconds("micro")) > 0
    assert sum(executor.seconds("micro")) == 0
    assert executor.gemm_peak() > 0


# ---------------------------------------------------------------- memory and imports

COUNT_ALLOCATIONS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/mman.h>
static _Atomic long counted;
static void* (*real_malloc)(size_t);
static void* (*real_calloc)(size_t, size_t);
static void* (*real_realloc)(void*, size_t);
static int (*real_posix_memalign)(void**, size_t, size_t);
static void* (*real_mmap)(void*, size_t, int, int, int, long);
static char early[65536];
static size_t taken;
#define REAL(name) (real_##name ? real_##name : (real_##name = dlsym(RTLD_NEXT, #name)))
void* malloc(size_t n) { ++counted; return REAL(malloc)(n); }
void* calloc(size_t n, size_t m) {
    static int looking;
    ++counted;
    if (!real_calloc && looking) { void* p = early + taken; taken += (n * m + 63) / 64 * 64; return p; }
    looking = 1;
    return REAL(calloc)(n, m);
}
void* realloc(void* p, size_t n) { ++counted; return REAL(realloc)(p, n); }
int posix_memalign(void** p, size_t a, size_t n) { ++counted; return REAL(posix_memalign)(p, a, n); }
void* aligned_alloc(size_t a, size_t n) { void* p = NULL; return posix_memalign(&p, a, n) ? NULL : p; }
void* mmap(void* p, size_t n, int a, int b, int c, long d) { ++counted; return REAL(mmap)(p, n, a, b, c, d); }
typedef int (*step_function)(void*, long, double, long, double*, long*);
typedef int (*evaluate_function)(void*, long, float*);
long count_steps(step_function step, evaluate_function evaluate, void* program, long batch, float* logits) {
    double loss;
    long correct, before = counted;
    for (int i = 0; i < 3; ++i)
        if (step(program, batch, 0.1, 0, &loss, &correct) || evaluate(program, batch, logits)) return -1;
    return counted - before;
}
long count_one(void) { long before = counted; void* volatile p = malloc(10); (void)p; return counted - before; }
"""
RUN_COUNTED = """
import ctypes, sys
from tinytl.runtime import Executor
counter = ctypes.CDLL(sys.argv[2])
counter.count_steps.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long, ctypes.c_void_p]
counter.count_steps.restype = counter.count_one.restype = ctypes.c_long
with Executor(sys.argv[1]) as executor:
    logits = (ctypes.c_float * (executor.batch * executor.classes))()
    functions = executor._library.tinytl_step, executor._library.tinytl_evaluate
    step, evaluate = (ctypes.cast(function, ctypes.c_void_p) for function in functions)
    print(counter.count_one(), counter.count_steps(step, evaluate, executor._handle, executor.batch, logits))
"""


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts by LD_PRELOAD")
def test_nothing_is_allocated_after_opening(path: Path, tmp_path: Path) -> None:
    source, library = tmp_path / "count.c", tmp_path / "count.so"
    source.write_text(COUNT_ALLOCATIONS)
    compiler = ["cc", "-shared", "-fPIC", "-O1", "-fno-builtin-malloc", str(source), "-o", str(library), "-ldl"]
    subprocess.run(compiler, check=True)
    done = subprocess.run(
        [sys.executable, "-c", RUN_COUNTED, str(path), str(library)],
        env={"LD_PRELOAD": str(library), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "0"]  # what is counted once is seen once; three steps and evaluations: never


def test_the_device_half_imports_neither_torch_nor_numpy(path: Path) -> None:
    script = (
        "import sys; from tinytl.runtime import Executor; e = Executor(sys.argv[1]); e.step(4, 0.1); e.close(); "
        "print([name for name in ('torch', 'numpy', 'PIL', 'typer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_missing_library_is_one_line(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "HERE", tmp_path)
    _library.library.cache_clear()
    try:
        with pytest.raises(InputError, match=r"was not built.*install a C\+\+17 compiler"):
            Executor(path)
        with pytest.raises(InputError, match="was not built"):
            _library.stand_alone()
        (tmp_path / "libtinytl.so").write_bytes(b"of another machine")
        with pytest.raises(InputError, match="cannot be loaded"):
            Executor(path)
    finally:
        _library.library.cache_clear()
