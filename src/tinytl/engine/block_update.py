"""The update of one parameter whose optimizer state is held at 8 bits, in pieces of bounded size.

Each is one operator of PyTorch's (``tinytl::adam_8bit_``, ``tinytl::sgd_8bit_``), so that a step that is described
without being run is not thousands of operations long; what it allocates inside is stated by `scratch_bytes`. All
tensors are walked in the order given: the optimizer (`tinytl.engine.eight_bit`) hands them over flat, in memory order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_code import BLOCK, blocks, code, decode, encode

PIECE = 64 * BLOCK
"""Values that are expanded at a time."""


def scratch_bytes(values: int, averages: int) -> int:
    """Return the bytes that the update of one large parameter allocates and frees; Adam has 2 averages, SGD 1.

    A piece of each average, of the gradient and of indices, 4 bytes a value; 5 bytes a block, and 4, for scales.
    The tables of a code (`block_code.CODE_BYTES`, one code an average) are made once and stay.
    """
    held = min(blocks(values), PIECE // BLOCK)
    return (averages + 2) * 4 * held * BLOCK + 5 * held + 4


@torch.library.custom_op(
    "tinytl::adam_8bit_", mutates_args=("parameter", "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
)
def adam_8bit_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Take Adam's step number ``step`` on n values: (n,) parameter, gradient and codes, (blocks(n),) scales."""
    signed, unsigned = code(True, parameter.device), code(False, parameter.device)
    g, m, v, index = _scratch(parameter, 3)
    count = step.item()
    bias1, bias2 = 1.0 - beta1**count, 1.0 - beta2**count
    for piece, part in _pieces(len(parameter)):
        n = piece.stop - piece.start
        size = blocks(n) * BLOCK
        decode(exp_avg[piece], exp_avg_absmax[part], signed, m[:size], index[:size])
        decode(exp_avg_sq[piece], exp_avg_sq_absmax[part], unsigned, v[:size], index[:size])
        g[:n].copy_(gradient[piece])
        if weight_decay:
            g[:n].add_(parameter[piece], alpha=weight_decay)
        m[:n].mul_(beta1).add_(g[:n], alpha=1.0 - beta1)
        v[:n].mul_(beta2).addcmul_(g[:n], g[:n], value=1.0 - beta2)
        torch.sqrt(v[:n], out=g[:n]).mul_(bias2**-0.5).add_(eps)
        parameter[piece].add_(torch.div(m[:n], g[:n], out=g[:n]), alpha=-lr / bias1)
        encode(m[:size], exp_avg[piece], exp_avg_absmax[part], signed, g[:size], index[:size])
        encode(v[:size], exp_avg_sq[piece], exp_avg_sq_absmax[part], unsigned, g[:size], index[:size])


@torch.library.custom_op("tinytl::sgd_8bit_", mutates_args=("parameter", "momentum_buffer", "momentum_buffer_absmax"))
def sgd_8bit_(
    parameter: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    momentum_buffer_absmax: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Take a step of SGD on n values: (n,) parameter, gradient and codes, (blocks(n),) scales."""
    signed = code(True, parameter.device)
    g, m, index = _scratch(parameter, 2)
    for piece, part in _pieces(len(parameter)):
        n = piece.stop - piece.start
        size = blocks(n) * BLOCK
        decode(momentum_buffer[piece], momentum_buffer_absmax[part], signed, m[:size], index[:size])
        g[:n].copy_(gradient[piece])
        if weight_decay:
            g[:n].add_(parameter[piece], alpha=weight_decay)
        m[:n].mul_(momentum).add_(g[:n])
        parameter[piece].add_(m[:n], alpha=-lr)
        encode(m[:size], momentum_buffer[piece], momentum_buffer_absmax[part], signed, g[:size], index[:size])


@adam_8bit_.register_fake
@sgd_8bit_.register_fake
def _changes_no_shape(*_: object) -> None:
    return None


def _scratch(parameter: Tensor, floats: int) -> list[Tensor]:
    size = min(blocks(len(parameter)) * BLOCK, PIECE)
    made = [torch.empty(size, dtype=torch.float32, device=parameter.device) for _ in range(floats)]
    return [*made, torch.empty(size, dtype=torch.int32, device=parameter.device)]


def _pieces(count: int) -> list[tuple[slice, slice]]:
    """Which values, and which blocks, are expanded together."""
    starts = range(0, count, PIECE)
    ends = [min(start + PIECE, count) for start in starts]
    return [(slice(a, b), slice(a // BLOCK, blocks(b))) for a, b in zip(starts, ends, strict=True)]
