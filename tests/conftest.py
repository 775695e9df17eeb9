"""Shared fixtures. One thread: the tensors here are tiny, and a busy machine makes thread teams wait on each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The same examples each time, so that a change is judged by what it changed. To look for new ones:
# `pytest --hypothesis-profile=explore`.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
