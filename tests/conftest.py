"""Shared fixtures. One thread: the tensors here are tiny, and a busy machine makes thread teams wait on each other."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
