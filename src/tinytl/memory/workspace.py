"""What PyTorch's operators allocate inside and free before they return.

Only convolutions and fused optimizers do so in amounts that matter. On the CPU convolutions run in oneDNN, which lays a
weight out in blocks of as many channels as a vector register holds (16 with AVX-512, 8 with AVX2) before it computes,
adds a small scratch pad, and for the gradient of a weight holds the blocked result beside the plain one. A fused
optimizer copies what is not contiguous, one tensor after the other. Where that is much, the lean convolutions compute
in matrix products and passes of their own (`tinytl.ops`), which allocate nothing inside. These rules were read off the
allocator (torch 2.13, images in channels-last order, float32); `tests/test_memory_planned.py` holds whole steps
against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinytl.engine.block_update import scratch_bytes  # registers the operators of 8-bit optimizers

_SCRATCH = 8216  # bytes of oneDNN's scratch pad
_SCRATCH_TRANSPOSED = 8344
_SCRATCH_SHARED = 12336  # of a 1x1 convolution's, for two threads or more
_DEPTHWISE_PARTS = 256  # partial sums of a depthwise weight's gradient, for kernels wider than oneDNN's own (stock's)


def workspace_bytes(func: Any, args: Sequence[Any]) -> int:
    """Bytes that the operator `func` allocates and frees for `args`; 0 for most."""
    rule = _RULES.get(func)
    return 0 if rule is None else rule(args)


def has_workspace(func: Any) -> bool:
    """Whether that operator may allocate anything inside."""
    return func in _RULES


def _block() -> int:
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def _padded(channels: int) -> int:
    """Channels filled up to whole blocks; few of them are left as they are."""
    block = _block()
    return channels if channels < block // 4 else math.ceil(channels / block) * block


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _convolution(args: Sequence[Any]) -> int:
    _, weight, _, stride, padding, _, transposed, _, groups = args
    kernel = weight.shape[2:]
    taps = math.prod(kernel) * weight.element_size()
    if weight.shape[1] == 1 and groups > 1:
        return _padded(groups) * taps
    if tuple(kernel) == (1, 1) and all(s == 1 for s in stride) and not any(padding):
        return _pointwise(args[0], weight) if groups == 1 else 0
    out = weight.shape[0] // groups
    blocked = groups * _padded(out) * weight.shape[1] * taps
    return blocked + (_SCRATCH_TRANSPOSED if transposed else _SCRATCH)


def _pointwise(x: Tensor, weight: Tensor) -> int:
    """Several threads share a weight that was laid out again, in blocks of 48 or 64 filters; one thread does not.

    The blocks depend on more than is known here: this is the least that any of them takes. It is never much, as large
    weights go another way (`tinytl.ops._pointwise`).
    """
    if torch.get_num_threads() == 1:
        return 0
    out, into = weight.shape[:2]
    blocks = [size * _block() for size in (1, 2, 3, 4)]
    filters = min(math.ceil(out / block) * block for block in blocks)
    return _SCRATCH_SHARED + filters * into * weight.element_size()


def _convolution_backward(args: Sequence[Any]) -> int:
    weight, groups = args[2], args[9]
    kernel = weight.shape[2:]
    taps = math.prod(kernel) * weight.element_size()
    if weight.shape[1] == 1 and groups > 1:
        parts = _DEPTHWISE_PARTS if max(kernel) > 3 else 1
        return _bytes(weight) + parts * _padded(groups) * taps
    if tuple(kernel) == (1, 1) and all(s == 1 for s in args[4]):
        return 0
    per_group = weight.shape[0] // groups
    return _bytes(weight) + groups * _padded(per_group) * _padded(weight.shape[1]) * taps


def _fused_optimizer(args: Sequence[Any]) -> int:
    return max((_bytes(tensor) for tensor in args[0] if not tensor.is_contiguous()), default=0)


_RULES = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
    torch.ops.aten._fused_adam_.default: _fused_optimizer,
    torch.ops.aten._fused_sgd_.default: _fused_optimizer,
    torch.ops.tinytl.adam_8bit_.default: lambda args: scratch_bytes(len(args[0]), 2),
    torch.ops.tinytl.sgd_8bit_.default: lambda args: scratch_bytes(len(args[0]), 1),
}
