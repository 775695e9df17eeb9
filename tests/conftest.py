"""Shared fixtures. One thread: the tensors here are tiny, and a busy machine makes thread teams wait on each other."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# In CI the same examples each time, so that a change is judged by what it changed; elsewhere new ones with every run.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
