"""The identity of a base network: what a delta must be applied to, and to nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn


def base_hash(model: nn.Module, exclude: Sequence[str] = ("classifier.",)) -> str:
    """sha256 over the sorted state dict: name, type, shape and bytes of each tensor.

    Left out: names that start with one of `exclude` (the classifier is replaced for each task), and batch norm's
    counter of batches, which no computation uses.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(tuple(exclude)) or name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
