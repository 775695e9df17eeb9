"""Adam and SGD with momentum whose state takes 8 bits a value (Dettmers et al. 2022, arXiv 2110.02861).

The averages are held in blocks of 256 values, each with one float32 scale (`tinytl.engine.block_code`). A step expands
16,384 values of them at a time, takes the update in float32 as ever, and rounds the averages back: they are never in
memory as float32, and what is (`scratch_bytes`, at most 263 KB) does not grow with the parameter. The update is that of
the exact optimizer on the averages that were held; what is approximate is only that they are rounded after each step.
(The update itself is in `tinytl.engine.block_update`.)

State of a parameter of n values:

    n >= 4096:  n + 4 ceil(n / 256) bytes an average (Adam has two, SGD one), 4 for Adam's count of steps
    n <  4096:  as in torch.optim, 32 bits; biases and scales weigh nothing, and their rounding would matter most

Nothing is drawn at random, and a state_dict is all there is: a run that goes on from one ends in the same bits. Blocks
follow the order in memory, so a state belongs to parameters of the same memory format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from tinytl.errors import InputError

from .block_code import blocks, code
from .block_update import adam_8bit_, sgd_8bit_

SMALLEST = 4096
"""Parameters of fewer values keep 32 bits."""


class BlockWise(torch.optim.Optimizer):
    """What both optimizers share: which state a parameter has, and how a state_dict is read."""

    _averages: tuple[str, ...] = ()
    _counts_steps = False

    codes: ClassVar[tuple[bool, ...]] = ()
    """Whether the code of each of its averages is signed."""

    def tables(self) -> list[Tensor]:
        """The tables of its codes, alive as long as the process; other optimizers on the device share them."""
        found = [code(signed, self.param_groups[0]["params"][0].device) for signed in self.codes]
        return [table for entry in found for table in (entry.values, entry.upper, entry.first)]

    def blank_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step: all 0.

        An average of a large parameter is two tensors: ``NAME`` uint8 in the parameter's shape and strides, and
        ``NAME_absmax`` float32, a value a block.
        """
        large = parameter.numel() >= SMALLEST
        state: dict[str, Tensor] = {}
        if self._counts_steps:  # torch's fused kernels want it beside the parameter, the host asks for the others
            state["step"] = torch.zeros((), device="cpu" if large or not _can_fuse(parameter) else parameter.device)
        for name in self._averages:
            dtype = torch.uint8 if large else parameter.dtype
            state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if large:
                state[f"{name}_absmax"] = torch.zeros(blocks(parameter.numel()), device=parameter.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, as in `torch.optim.Optimizer`, which would make floats of the 8-bit values.

        Raises InputError when a parameter's state is of another optimizer, shape or type.
        """
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        restored: dict[Tensor, dict[str, Tensor]] = {}
        for number, parameter in zip(numbers, parameters, strict=False):  # torch refuses other numbers of them below
            given = state_dict["state"].get(number)
            if given is None:
                continue
            blank = self.blank_state(parameter)
            if given.keys() != blank.keys() or any(_kind(given[name]) != _kind(blank[name]) for name in blank):
                raise InputError(
                    f"the state of a parameter {tuple(parameter.shape)} is {_told(given)}, expected {_told(blank)}"
                )
            restored[parameter] = {name: blank[name].copy_(given[name]) for name in blank}
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(restored)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Raises InputError for one whose memory has gaps or overlaps."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            small: list[Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter].update(self.blank_state(parameter))
                if parameter.numel() >= SMALLEST:
                    self._update_large(parameter, group)
                else:
                    small.append(parameter)
            for fused in (True, False):
                chosen = [parameter for parameter in small if _can_fuse(parameter) == fused]
                if chosen:
                    self._update_small(chosen, group, fused)
        return loss

    def _update_large(self, parameter: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update_small(self, parameters: list[Tensor], group: dict[str, Any], fused: bool) -> None:
        raise NotImplementedError

    def _held(self, parameter: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views in memory order of the parameter and its gradient, and of its averages' codes and scales."""
        state, order = self.state[parameter], _memory_order(parameter)
        grad = parameter.grad
        assert grad is not None
        # a gradient laid out otherwise is copied: a hook may leave such a one
        walked = [_flat(parameter.detach(), order), grad.permute(order).reshape(-1)]
        held: list[Tensor] = []
        for name in self._averages:
            held += [_flat(state[name], order), state[f"{name}_absmax"]]
        return walked, held


class Adam8bit(BlockWise):
    """Adam (arXiv 1412.6980) with 8 bits of state a value: the first average signed, the second unsigned.

    Arguments as in `torch.optim.Adam`. Approximate, see the module's docstring.
    """

    _averages = ("exp_avg", "exp_avg_sq")
    codes = (True, False)
    _counts_steps = True

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _refuse(lr=(lr, lr >= 0), betas=(betas, all(0 <= b < 1 for b in betas)), eps=(eps, eps > 0))
        _refuse(weight_decay=(weight_decay, weight_decay >= 0))
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update_large(self, parameter: Tensor, group: dict[str, Any]) -> None:
        walked, held = self._held(parameter)
        step = self.state[parameter]["step"]
        step += 1
        options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        adam_8bit_(*walked, *held, step, *options)

    def _update_small(self, parameters: list[Tensor], group: dict[str, Any], fused: bool) -> None:
        adam(
            parameters,
            _gradients(parameters),
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            foreach=False,
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class SGD8bit(BlockWise):
    """SGD with momentum, its buffer at 8 bits a value (signed).

    Arguments as in `torch.optim.SGD`. Approximate, see the module's docstring. Without momentum there is no state, and
    `torch.optim.SGD` is to be taken.
    """

    _averages = ("momentum_buffer",)
    codes = (True,)

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        _refuse(lr=(lr, lr >= 0), momentum=(momentum, 0 < momentum < 1), weight_decay=(weight_decay, weight_decay >= 0))
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update_large(self, parameter: Tensor, group: dict[str, Any]) -> None:
        walked, held = self._held(parameter)
        sgd_8bit_(*walked, *held, group["lr"], group["momentum"], group["weight_decay"])

    def _update_small(self, parameters: list[Tensor], group: dict[str, Any], fused: bool) -> None:
        sgd(
            parameters,
            _gradients(parameters),
            [self.state[parameter]["momentum_buffer"] for parameter in parameters],
            foreach=False,
            fused=fused,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _flat(tensor: Tensor, order: list[int]) -> Tensor:
    """A view (n,) of a tensor whose dimensions lie in memory in that order."""
    ordered = tensor.permute(order)
    if not ordered.is_contiguous():
        raise InputError(
            f"a tensor {tuple(tensor.shape)} of strides {tensor.stride()} cannot be walked in memory order: expected "
            "no gaps or overlaps, and a state of the parameter's memory format; make the optimizer after changing that"
        )
    return ordered.view(-1)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    """The gradients, laid out as their parameters: torch's fused kernels walk raw memory (see `match_strides`)."""
    found: list[Tensor] = []
    for parameter in parameters:
        assert parameter.grad is not None
        same = parameter.grad.stride() == parameter.stride()
        found.append(parameter.grad if same else torch.empty_like(parameter).copy_(parameter.grad))
    return found


def _can_fuse(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float32, torch.float64) and parameter.device.type in ("cpu", "cuda")


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _told(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in state.items())


def _refuse(**values: tuple[object, bool]) -> None:
    for name, (value, fits) in values.items():
        if not fits:
            raise InputError(f"{name} is {value}: out of range for this optimizer")
