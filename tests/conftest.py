"""Shared fixtures. One thread: the tensors here are tiny, and a busy machine makes thread teams wait on each other."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings

# The same examples each time, so that a change is judged by what it changed. To look for new ones:
# `pytest --hypothesis-profile=explore`.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("same")

# What a shell runs in the background is begun with SIGINT ignored, and so would all that the tests begin.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, longest first. Processes are handed whole files, in this order (`--dist loadfile`: what a
# file builds for all its tests is built once): one that is begun last keeps the others waiting for its end.
LONGEST = (
    "test_native_step",
    "test_execution",
    "test_native_programs",
    "test_planner",
    "test_compiler_differentiate",
    "test_interpreter_steps",
    "test_install",
    "test_table",
    "test_docs",
    "test_run",
    "test_timm",
    "test_compiler_capture",
    "test_golden",
    "test_device_bench",
    "test_memory_counted",
    "test_kill",
    "test_peers",
    "test_backbone_methods",
    "test_runtime_lab",
    "test_wide_blocks",
    "test_compiler_plan",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
