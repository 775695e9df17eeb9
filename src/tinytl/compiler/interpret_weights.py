"""The ops that make a weight or bias of trained ones, and their gradients: standardization, folded normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from .interpret_call import Call, OpFunction, by_output

Results = dict[str, Tensor]


def _by_filter(weight: Tensor, depthwise: int) -> Tensor:
    """A weight as (O, values of a filter)."""
    return weight.flatten(0, 1).T if depthwise else weight.flatten(1)


def _as_weight(rows: Tensor, like: Tensor, depthwise: int) -> Tensor:
    return rows.T.reshape(like.shape) if depthwise else rows.reshape(like.shape)


def _standardize(call: Call) -> Results:
    weight, depthwise = call["w"], call.number("depthwise")
    rows = _by_filter(weight, depthwise)
    centred = rows - rows.mean(1, keepdim=True)
    return {"y": _as_weight(centred / (_deviation(centred) + call.real("eps")), weight, depthwise)}


def _standardize_grad(call: Call) -> Results:
    """As the docstring of `tinytl.ops.weight_standardization` has it; sigma = 0 leaves the second term out."""
    weight, depthwise = call["w"], call.number("depthwise")
    rows, grad = _by_filter(weight, depthwise), _by_filter(call["grad"], depthwise)
    centred = rows - rows.mean(1, keepdim=True)
    sigma = _deviation(centred)
    spread = sigma + call.real("eps")
    along = (grad * centred).sum(1, keepdim=True) / (spread.square() * sigma * (rows.shape[1] - 1))
    along = along.masked_fill(sigma == 0, 0.0)
    back = (grad - grad.mean(1, keepdim=True)) / spread - centred * along
    return {"grad": _as_weight(back, weight, depthwise)}


def _deviation(centred: Tensor) -> Tensor:
    """(O, 1): the unbiased standard deviation."""
    return (centred.square().sum(1, keepdim=True) / (centred.shape[1] - 1)).sqrt()


def _factor(call: Call) -> Tensor:
    """gamma rstd, (O,)."""
    gamma = call.get("gamma")
    return call["rstd"] if gamma is None else call["rstd"] * gamma


def _scale_weight(call: Call) -> Results:
    return {"y": call.weight() * by_output(_factor(call), bool(call.number("depthwise")))}


def _scale_weight_grad(call: Call) -> Results:
    grad, depthwise = call["grad"], call.number("depthwise")
    inner = _by_filter(call.weight() * grad, depthwise).sum(1)
    return {"grad": grad * by_output(_factor(call), bool(depthwise)), "gamma_grad": call["rstd"] * inner}


def _from_mean(call: Call) -> Tensor:
    """bias - mean, (O,)."""
    bias = call.get("bias")
    return -call["mean"] if bias is None else bias - call["mean"]


def _shift_bias(call: Call) -> Results:
    y = _from_mean(call) * _factor(call)
    beta = call.get("beta")
    return {"y": y if beta is None else y + beta}


def _shift_bias_grad(call: Call) -> Results:
    grad = call["grad"]
    return {
        "bias_grad": grad * _factor(call),
        "gamma_grad": grad * _from_mean(call) * call["rstd"],
        "beta_grad": torch.clone(grad),
    }


WEIGHT_OPS: dict[str, OpFunction] = {
    "standardize": _standardize,
    "standardize_grad": _standardize_grad,
    "scale_weight": _scale_weight,
    "scale_weight_grad": _scale_weight_grad,
    "shift_bias": _shift_bias,
    "shift_bias_grad": _shift_bias_grad,
}
