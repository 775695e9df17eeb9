"""The updates: SGD and Adam as in `torch.optim`, their 8-bit forms as in `tinytl.engine.block_update`.

Momentum begins as 0, which gives `torch.optim.SGD`'s first step too: its buffer is then the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl.engine.block_update import adam_8bit_, sgd_8bit_

from .interpret_call import Call, OpFunction

Results = dict[str, Tensor]


def _zero(call: Call) -> Results:
    number = call.instruction.operand("x")
    assert number is not None
    tensor = call.program.tensors[number]
    shape = tensor.shape if tensor.scope == "fixed" else (call.images, *tensor.shape)
    return {"x": torch.zeros(shape, dtype=call.dtype)}


def _decayed(call: Call) -> Tensor:
    return call["grad"] + call.real("weight_decay") * call["p"]


def _sgd(call: Call) -> Results:
    step, momentum = _decayed(call), call.get("momentum")
    results: Results = {}
    if momentum is not None:
        results["momentum"] = step = call.real("momentum") * momentum + step
    results["p"] = call["p"] - call.step.lr * step
    return results


def _adam(call: Call) -> Results:
    grad, beta1, beta2 = _decayed(call), call.real("beta1"), call.real("beta2")
    m = beta1 * call["m"] + (1.0 - beta1) * grad
    v = beta2 * call["v"] + (1.0 - beta2) * grad.square()
    bias1, bias2 = 1.0 - beta1**call.step.step, 1.0 - beta2**call.step.step
    p = call["p"] - call.step.lr / bias1 * m / (v.sqrt() * bias2**-0.5 + call.real("eps"))
    return {"p": p, "m": m, "v": v}


def _sgd8(call: Call) -> Results:
    p, momentum, scale = (call[name].clone().contiguous() for name in ("p", "momentum", "momentum_scale"))
    sgd_8bit_(
        p.view(-1),
        call["grad"].reshape(-1),
        momentum.view(-1),
        scale.view(-1),
        call.step.lr,
        call.real("momentum"),
        call.real("weight_decay"),
    )
    return {"p": p, "momentum": momentum, "momentum_scale": scale}


def _adam8(call: Call) -> Results:
    names = ("p", "m", "m_scale", "v", "v_scale")
    p, m, m_scale, v, v_scale = (call[name].clone().contiguous() for name in names)
    adam_8bit_(
        p.view(-1),
        call["grad"].reshape(-1),
        m.view(-1),
        m_scale.view(-1),
        v.view(-1),
        v_scale.view(-1),
        torch.tensor(float(call.step.step)),
        call.step.lr,
        call.real("beta1"),
        call.real("beta2"),
        call.real("eps"),
        call.real("weight_decay"),
    )
    return {"p": p, "m": m, "m_scale": m_scale, "v": v, "v_scale": v_scale}


UPDATE_OPS: dict[str, OpFunction] = {"zero": _zero, "sgd": _sgd, "adam": _adam, "sgd8": _sgd8, "adam8": _adam8}
