"""The optimizer, its learning rate, and the random draws of a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinytl._schedule import learning_rate, step_seed
from tinytl.spec import FitOptions

from .eight_bit import Adam8bit, SGD8bit

__all__ = ["learning_rate", "make_optimizer", "match_strides", "seed_generators"]


def make_optimizer(parameters: list[nn.Parameter], options: FitOptions) -> torch.optim.Optimizer:
    """Return the optimizer, its state at ``options.optimizer_bits`` bits a value.

    At 32 bits one fused pass where torch has one (float32 and float64 on CPU and CUDA); at 8 those of
    `tinytl.engine.eight_bit`, which are approximate.
    """
    lr, decay = options.lr, options.weight_decay
    if options.optimizer_bits == 8:
        if options.optimizer == "adam":
            return Adam8bit(parameters, lr=lr, weight_decay=decay)
        return SGD8bit(parameters, lr=lr, momentum=options.momentum, weight_decay=decay)
    dtypes, devices = (torch.float32, torch.float64), ("cpu", "cuda")
    fused = all(p.dtype in dtypes and p.device.type in devices for p in parameters)
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(parameters, lr=lr, momentum=options.momentum, weight_decay=decay, fused=fused)


def seed_generators(seed: int, step: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of ``device`` from (seed, step): equal pairs, equal draws."""
    value = step_seed(seed, step)
    torch.default_generator.manual_seed(value)  # torch.manual_seed would also format a stack trace for CUDA
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)


def match_strides(parameter: Tensor) -> None:
    """Give a parameter's gradient the parameter's own strides.

    The fused CPU optimizers of torch 2.13 walk raw memory: a gradient or slot of other strides than its parameter
    gives wrong numbers in silence. Autograd keeps them alike, but a hook may not.
    """
    grad = parameter.grad
    if grad is not None and grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(grad)
