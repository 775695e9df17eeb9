"""The ops that work pixel by pixel, their gradients, dropout and the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl.ops.smooth_activation import SmoothActivation

from . import random
from .interpret_call import Call, OpFunction, over_channels, pack, unpack
from .op_table import SMOOTH

Results = dict[str, Tensor]


def _normalize(call: Call) -> Results:
    return {"y": call["x"].to(call.dtype) * call["scale"] + call["shift"]}


def _affine(call: Call) -> Results:
    z = call["x"] * call["scale"].flatten()
    shift = call.get("shift")
    return call.act(z if shift is None else z + shift.flatten(), {})


def _affine_grad(call: Call) -> Results:
    return {"y": call["grad"] * call["scale"].flatten()}


def _activation(call: Call) -> Results:
    return call.act(call["x"], {})


def _act_grad(call: Call) -> Results:
    y = call.unmasked(call["grad"])
    return {"y": y, "bias": over_channels(y)}


def _bias_grad(call: Call) -> Results:
    return {"bias": over_channels(call["grad"])}


def _add(call: Call) -> Results:
    return call.act(call["a"] + call["b"], {})


def _smooth_kind(call: Call) -> SmoothActivation:
    return SmoothActivation(SMOOTH[call.number("kind")], call.real("alpha"))  # type: ignore[arg-type]


def _smooth(call: Call) -> Results:
    return {"y": _smooth_kind(call).apply(call["x"])}


def _smooth_grad(call: Call) -> Results:
    return {"y": _smooth_kind(call).pull_back(call["grad"], call["x"])}


def _gate(call: Call) -> Results:
    return {"y": call["x"] * call["s"]}


def _gate_grad(call: Call) -> Results:
    return {"y": call["grad"] * call["s"], "s_grad": (call["grad"] * call["x"]).sum((1, 2), keepdim=True)}


def _copy(call: Call) -> Results:
    """The same values in memory order, in a shape that may be another."""
    return {"y": call["x"].reshape(call.images, *call.shape("y"))}


def _channel_dot(call: Call) -> Results:
    return {"y": over_channels(call["grad"] * call["x"])}


def _dropout(call: Call) -> Results:
    x, p = call["x"], call.real("p")
    if not call.step.train:
        return {"y": x.clone(), "mask": pack(torch.ones_like(x, dtype=torch.bool))}
    stays = random.kept(call.step.seed, call.number("number"), call.step.step, call.first, tuple(x.shape), p)
    return {"y": _thinned(x, stays, p), "mask": pack(stays)}


def _dropout_grad(call: Call) -> Results:
    grad = call["grad"]
    return {"y": _thinned(grad, unpack(call["mask"], grad.shape[-1]), call.real("p"))}


def _thinned(x: Tensor, stays: Tensor, p: float) -> Tensor:
    return torch.where(stays, x / (1.0 - p), 0.0) if p < 1.0 else torch.zeros_like(x)


def _softmax_loss(call: Call) -> Results:
    """Of one micro-batch: the metrics are sums over its images, the gradient is that of the mean over the batch."""
    logits = call["logits"].flatten(1)  # (images, classes)
    labels = call["labels"].reshape(-1).long()
    smoothing, classes = call.real("smoothing"), logits.shape[1]
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    right = (logits.argmax(1) == labels).sum()
    target = F.one_hot(labels, classes).to(logits.dtype) * (1.0 - smoothing) + smoothing / classes
    grad = (logits.softmax(1) - target) / call.step.count
    return {"grad": grad.view(call["logits"].shape), "metrics": torch.stack([loss.double(), right.double()])}


IMAGE_OPS: dict[str, OpFunction] = {
    "normalize": _normalize,
    "affine": _affine,
    "affine_grad": _affine_grad,
    "activation": _activation,
    "act_grad": _act_grad,
    "bias_grad": _bias_grad,
    "add": _add,
    "smooth": _smooth,
    "smooth_grad": _smooth_grad,
    "gate": _gate,
    "gate_grad": _gate_grad,
    "copy": _copy,
    "channel_dot": _channel_dot,
    "dropout": _dropout,
    "dropout_grad": _dropout_grad,
    "softmax_loss": _softmax_loss,
}
