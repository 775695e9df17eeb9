"""A hand-made training step, small enough to think through: one convolution, a ReLU, a mean and a linear classifier."""

from __future__ import annotations

from typing import Any

import torch

from tinytl.compiler.program import Instruction, Program, Tensor, instruction
from tinytl.compiler.tiles import tiled

WINDOW = {"kh": 3, "kw": 3, "sh": 1, "sw": 1, "top": 1, "left": 1, "bottom": 1, "right": 1, "dh": 1, "dw": 1}
POINT = {**WINDOW, "kh": 1, "kw": 1, "top": 0, "left": 0, "bottom": 0, "right": 0}
LINEAR = {"lo": float("-inf"), "hi": float("inf"), "slope": 0.0}
RELU = {"lo": 0.0, "hi": float("inf"), "slope": 0.0}


class Maker:
    """Tensors and instructions by name."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.values: dict[int, Any] = {}
        self.numbers: dict[str, int] = {}

    def tensor(self, name: str, role: str, dtype: str, *shape: int, scope: str = "fixed", value: Any = None) -> int:
        self.numbers[name] = number = len(self.tensors)
        self.tensors.append(Tensor(name, role, dtype, shape, scope))
        if value is not None:
            self.values[number] = value
        return number

    def run(self, op: str, attributes: dict[str, Any] | None = None, phase: str = "forward", **by: str) -> Instruction:
        return instruction(op, attributes, phase=phase, layer=op, **{a: self.numbers[b] for a, b in by.items()})


def small_program(batch: int = 4, micro_batch: int = 2, side: int = 6, channels: int = 5, classes: int = 3) -> Program:
    """Not laid out; SGD; the classifier and the convolution's bias train."""
    make, generator = Maker(), torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    make.tensor("scale", "constant", "f32", 3, value=torch.full((3,), 1 / 127.5))
    make.tensor("shift", "constant", "f32", 3, value=torch.full((3,), -1.0))
    make.tensor("conv.weight", "constant", "f32", channels, 3, 3, 3, value=random(channels, 3, 3, 3))
    make.tensor("conv.bias", "trained", "f32", channels, value=random(channels))
    make.tensor("fc.weight", "trained", "f32", classes, 1, 1, channels, value=random(classes, 1, 1, channels))
    make.tensor("fc.bias", "trained", "f32", classes, value=random(classes))
    make.tensor("step", "state", "i64")
    make.tensor("images", "input", "u8", side, side, 3, scope="batch")
    make.tensor("labels", "input", "i32", scope="batch")
    make.tensor("metrics", "metric", "f64", 2)
    make.tensor("answers", "activation", "f32", 1, 1, classes, scope="batch")
    for name in ("conv.bias", "fc.weight", "fc.bias"):
        make.tensor(f"{name}.grad", "gradient", "f32", *make.tensors[make.numbers[name]].shape)
    for prefix in ("", "evaluate."):
        make.tensor(f"{prefix}x", "activation", "f32", side, side, 3, scope="micro")
        make.tensor(f"{prefix}y", "activation", "f32", side, side, channels, scope="micro")
        make.tensor(f"{prefix}mean", "activation", "f32", 1, 1, channels, scope="micro")
    make.tensor("mask", "mask", "bits", side, side, channels, scope="micro")
    make.tensor("logits", "activation", "f32", 1, 1, classes, scope="micro")
    make.tensor("dlogits", "activation", "f32", 1, 1, classes, scope="micro")
    make.tensor("dmean", "activation", "f32", 1, 1, channels, scope="micro")
    make.tensor("dy", "activation", "f32", side, side, channels, scope="micro")
    make.tensor("dz", "activation", "f32", side, side, channels, scope="micro")

    convolution = {**WINDOW, "groups": 1, "depthwise": 0, **RELU}
    classify = {**POINT, "groups": 1, "depthwise": 0, **LINEAR}
    back = {key: value for key, value in classify.items() if key not in ("lo", "hi")}
    by_weight = {key: value for key, value in back.items() if key != "slope"}
    sgd = {"weight_decay": 0.0, "momentum": 0.0}

    def forward(prefix: str, logits: str, **masks: str) -> tuple[Instruction, ...]:
        x, y, mean = f"{prefix}x", f"{prefix}y", f"{prefix}mean"
        return (
            make.run("normalize", x="images", scale="scale", shift="shift", y=x),
            make.run("conv", convolution, x=x, w="conv.weight", bias="conv.bias", y=y, **masks),
            make.run("adaptive_pool", x=y, y=mean),
            make.run("conv", classify, x=mean, w="fc.weight", bias="fc.bias", y=logits),
        )

    names = ("conv.bias", "fc.weight", "fc.bias")
    micro = (
        *forward("", "logits", mask="mask"),
        make.run(
            "softmax_loss", {"smoothing": 0.1}, logits="logits", labels="labels", grad="dlogits", metrics="metrics"
        ),
        make.run("bias_grad", phase="backward", grad="dlogits", bias="fc.bias.grad"),
        make.run("conv_dw", by_weight, phase="backward", x="mean", grad="dlogits", w="fc.weight.grad"),
        make.run("conv_dx", back, phase="backward", grad="dlogits", w="fc.weight", y="dmean"),
        make.run("adaptive_pool_grad", phase="backward", grad="dmean", y="dy"),
        make.run("act_grad", {"slope": 0.0}, phase="backward", grad="dy", mask="mask", y="dz", bias="conv.bias.grad"),
    )
    named: dict[str, Any] = {
        field: make.numbers[name]
        for field, name in (
            ("images", "images"),
            ("labels", "labels"),
            ("logits", "answers"),
            ("metrics", "metrics"),
            ("step_count", "step"),
        )
    }
    return Program(
        tensors=tuple(make.tensors),
        streams={
            "begin": tuple(make.run("zero", phase="backward", x=f"{name}.grad") for name in names),
            "micro": micro,
            "finish": tuple(make.run("sgd", sgd, phase="update", p=name, grad=f"{name}.grad") for name in names),
            "evaluate": forward("evaluate.", "answers"),
        },
        batch=batch,
        micro_batch=micro_batch,
        evaluate_images=micro_batch,
        **named,
        gradients={make.numbers[name]: make.numbers[f"{name}.grad"] for name in names},
        values=make.values,
        meta={
            "learned": [
                {"key": "conv.bias", "tensor": make.numbers["conv.bias"], "shape": [channels], "layout": "as-is"},
                {
                    "key": "fc.weight",
                    "tensor": make.numbers["fc.weight"],
                    "shape": [classes, channels],
                    "layout": "as-is",
                },
                {"key": "fc.bias", "tensor": make.numbers["fc.bias"], "shape": [classes], "layout": "as-is"},
            ],
            "carried": [
                {"key": "lite.mean", "shape": [2], "dtype": "F32", "values": torch.tensor([0.5, 1.5])},
                {"key": "lite.batches", "shape": [], "dtype": "I64", "values": torch.tensor(7)},
            ],
            "delta": {"backbone": "hand-made"},
            "train": {"lr": 0.1},
        },
    )


def small_tiled() -> Program:
    """The same with the convolution and what leads back to it an image of a micro-batch of two at a time."""
    return tiled(small_program(), [(0, 3), (8, 10)], 1)
