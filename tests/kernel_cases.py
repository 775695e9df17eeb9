"""Random instructions of every op, small and awkward: odd channels, padding on one side only, windows over the edge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tinytl.compiler.op_table import SMOOTH
from tinytl.engine.block_code import blocks

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]

CHANNELS = st.sampled_from([1, 3, 4, 5, 8, 12, 16, 17, 24, 33, 40])
SIDES = st.integers(1, 9)
ACTS = st.sampled_from(
    [
        {"lo": -math.inf, "hi": math.inf, "slope": 0.0},
        {"lo": 0.0, "hi": math.inf, "slope": 0.0},
        {"lo": 0.0, "hi": 1.5, "slope": 0.0},
        {"lo": -0.25, "hi": 0.5, "slope": 0.25},
    ]
)


@dataclass(frozen=True)
class Case:
    """One instruction with its operands.

    Attributes:
        attributes: of the op.
        operands: name -> value, with an axis of images where there is one; of one that is only written, its shape
            without that axis and its type.
        images: how many.
        scalars: of the step, as `Interpreter.run` takes them.
        tolerance: of float32 against float64, relative to the largest value.
        terms: name -> size of the terms an output is a difference of, where that can be far above the output's own.
    """

    attributes: dict[str, Any]
    operands: dict[str, Any]
    images: int = 1
    scalars: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5
    terms: dict[str, float] = field(default_factory=dict)


class Maker:
    """What hypothesis draws, and random values of the drawn seed."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
        self.images: int = draw(st.integers(1, 3))

    def of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def coin(self) -> bool:
        return self.draw(st.booleans())

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def each(self, *shape: int) -> Tensor:
        """A value for each image."""
        return self.random(self.images, *shape)

    def maybe(self, *shape: int) -> Tensor | None:
        return self.random(*shape) if self.coin() else None

    def image(self) -> Shape:
        return self.draw(SIDES), self.draw(SIDES), self.draw(CHANNELS)

    def bits(self, *shape: int) -> Tensor:
        """A mask: bytes, its unused bits at random, too."""
        *pixels, channels = shape
        size = (self.images, *pixels, -(-channels // 8))
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=self.generator)

    def window(self, kernels: tuple[int, ...], image: tuple[int, int] | None = None) -> tuple[dict[str, int], Shape]:
        """A window, and the image (H, W) that it fits on."""
        draw, found, sides = self.draw, {}, []
        same = self.coin()
        first: tuple[int, int, int] = (draw(st.sampled_from(kernels)), draw(st.integers(1, 3)), self.of(1, 1, 1, 2))
        for letter, before, after, axis in (("h", "top", "bottom", 0), ("w", "left", "right", 1)):
            kernel, stride, dilation = first
            if letter == "w" and not same:
                kernel, stride = draw(st.sampled_from(kernels)), draw(st.integers(1, 3))
            pads = draw(st.integers(0, kernel // 2)), draw(st.integers(0, kernel // 2))
            least = max(1, dilation * (kernel - 1) + 1 - sum(pads))
            sides.append(image[axis] if image else draw(st.integers(least, least + draw(st.sampled_from([3, 17])))))
            found |= {f"k{letter}": kernel, f"s{letter}": stride, f"d{letter}": dilation}
            found |= {before: pads[0], after: pads[1]}
        return found, tuple(sides)

    def pooled(self, image: Shape, window: dict[str, int]) -> tuple[int, int]:
        """Rows and columns of what a pooling makes, which may be rounded up."""
        return self.outputs(image, window, up=self.coin())

    def outputs(self, image: Shape, window: dict[str, int], up: bool = False) -> tuple[int, int]:
        """Rows and columns of what the window makes; `up`: a last window may begin in the image and reach beyond."""
        found = []
        for size, letter, pads in ((image[0], "h", ("top", "bottom")), (image[1], "w", ("left", "right"))):
            wide = size + window[pads[0]] + window[pads[1]] - window[f"d{letter}"] * (window[f"k{letter}"] - 1) - 1
            stride = window[f"s{letter}"]
            count = (-(-wide // stride) if up else wide // stride) + 1
            found.append(count - 1 if up and (count - 1) * stride >= size + window[pads[0]] else count)
        return found[0], found[1]

    def weight(self, shape: Shape, outs: int) -> dict[str, Any]:
        """A weight of any type, with its table; that of an f32 weight may be absent."""
        kind = self.of("f32", "f32", "i8", "u8", "f16")
        if kind == "f32":
            return present(w=self.random(*shape), table=self.maybe(outs))
        if kind == "f16":
            return {"w": self.random(*shape).half(), "table": torch.tensor([0.7])}
        codes = torch.randint(-127, 128, shape, generator=self.generator)
        if kind == "i8":
            return {"w": codes.to(torch.int8), "table": self.random(outs) / 64}
        return {"w": (codes + 127).to(torch.uint8), "table": self.random(256)}


def written(shape: Shape, dtype: str = "f32") -> tuple[Shape, str]:
    """An operand that is only written."""
    return tuple(shape), dtype


def present(**operands: Any) -> dict[str, Any]:
    return {name: value for name, value in operands.items() if value is not None}


# ---- pixel by pixel


def normalize(m: Maker) -> Case:
    h, w, c = m.draw(SIDES), m.draw(SIDES), m.of(3, 3, 5)
    x = torch.randint(0, 256, (m.images, h, w, c), dtype=torch.uint8, generator=m.generator)
    return Case({}, {"x": x, "scale": m.random(c), "shift": m.random(c), "y": written((h, w, c))}, m.images)


def affine(m: Maker) -> Case:
    h, w, c = m.image()
    operands = present(x=m.each(h, w, c), scale=m.random(c), shift=m.maybe(c), y=written((h, w, c)))
    return masked(m, Case(m.draw(ACTS), operands, m.images), (h, w, c))


def masked(m: Maker, case: Case, shape: Shape) -> Case:
    if m.coin():
        case.operands["mask"] = written(shape, "bits")
    return case


def activation(m: Maker) -> Case:
    shape = m.image()
    return masked(m, Case(m.draw(ACTS), {"x": m.each(*shape), "y": written(shape)}, m.images), shape)


def add(m: Maker) -> Case:
    shape = m.image()
    operands = {"a": m.each(*shape), "b": m.each(*shape), "y": written(shape)}
    return masked(m, Case(m.draw(ACTS), operands, m.images), shape)


def smooth(m: Maker) -> Case:
    shape, kind = m.image(), m.of(*range(len(SMOOTH)))
    x = m.each(*shape) * m.of(0.1, 1.0, 3.0, 30.0)
    return Case({"kind": kind, "alpha": m.of(1.0, 0.5)}, {"x": x, "y": written(shape)}, m.images)


def smooth_grad(m: Maker) -> Case:
    case = smooth(m)
    case.operands["grad"] = m.random(*case.operands["x"].shape)
    return case


def gate(m: Maker) -> Case:
    h, w, c = m.image()
    return Case({}, {"x": m.each(h, w, c), "s": m.each(1, 1, c), "y": written((h, w, c))}, m.images)


def gate_grad(m: Maker) -> Case:
    case = gate(m)
    x = case.operands["x"]
    return Case({}, {**case.operands, "grad": m.random(*x.shape), "s_grad": written((1, 1, x.shape[-1]))}, m.images)


def copy(m: Maker) -> Case:
    shape = m.image()
    return Case({}, {"x": m.each(*shape), "y": written(shape)}, m.images)


def dropout(m: Maker) -> Case:
    shape, attributes = m.image(), {"p": m.of(0.0, 0.2, 0.5, 1.0), "number": m.of(0, 3, 41)}
    scalars = {"seed": m.of(0, 7, -1), "step": m.of(1, 2, 1000)}
    return masked(m, Case(attributes, {"x": m.each(*shape), "y": written(shape)}, m.images, scalars), shape)


def dropout_grad(m: Maker) -> Case:
    shape = m.image()
    operands = {"grad": m.each(*shape), "mask": m.bits(*shape), "y": written(shape)}
    return Case({"p": m.of(0.0, 0.2, 0.5)}, operands, m.images)


def softmax_loss(m: Maker) -> Case:
    classes = m.of(1, 2, 7, 102)
    labels = torch.randint(0, classes, (m.images,), dtype=torch.int32, generator=m.generator)
    logits = m.each(1, 1, classes) * m.of(1.0, 20.0)
    metrics = torch.tensor([3.5, 2.0], dtype=torch.float64)
    operands = {"logits": logits, "labels": labels, "grad": written((1, 1, classes)), "metrics": metrics}
    count = m.of(1, 8)
    # A gradient is a probability less a target: where they nearly meet it is small, and its error is theirs.
    return Case({"smoothing": m.of(0.0, 0.1)}, operands, m.images, {"count": count}, terms={"grad": 1 / count})


def act_grad(m: Maker) -> Case:
    h, w, c = m.image()
    operands = {"grad": m.each(h, w, c), "mask": m.bits(h, w, c), "y": written((h, w, c)), "bias": m.maybe(c)}
    return Case({"slope": m.of(0.0, 0.1)}, present(**operands), m.images)


def bias_grad(m: Maker) -> Case:
    h, w, c = m.image()
    return Case({}, {"grad": m.each(h, w, c), "bias": m.random(c)}, m.images)


def channel_dot(m: Maker) -> Case:
    h, w, c = m.image()
    return Case({}, {"grad": m.each(h, w, c), "x": m.each(h, w, c), "y": m.random(c)}, m.images)


def affine_grad(m: Maker) -> Case:
    h, w, c = m.image()
    return Case({}, {"grad": m.each(h, w, c), "scale": m.random(c), "y": written((h, w, c))}, m.images)


# ---- group norm


def group_norm(m: Maker) -> Case:
    h, w, c = m.image()
    groups = m.of(*(g for g in (1, 2, 3, 4, 8, c) if c % g == 0))
    x = m.each(h, w, c) * m.of(1.0, 10.0) + m.of(0.0, 5.0)
    operands = present(x=x, gamma=m.maybe(c), beta=m.maybe(c), y=written((h, w, c)))
    if m.coin():
        operands["stats"] = written((groups, 2))
    # of one value a group the variance is 0: what is left are rounding errors times rstd
    return masked(m, Case({"groups": groups, "eps": 1e-2, **m.draw(ACTS)}, operands, m.images), (h, w, c))


def group_norm_grad(m: Maker) -> Case:
    h, w, c = m.image()
    groups = m.of(*(g for g in (1, 2, 3, 4, 8, c) if c % g == 0))
    stats = torch.stack([m.each(groups), m.each(groups).abs() + 0.5], -1)
    operands = present(
        grad=m.each(h, w, c),
        x=m.each(h, w, c) * 2 + 1,
        stats=stats,
        gamma=m.maybe(c),
        y=written((h, w, c)),
        gamma_grad=m.maybe(c),
        beta_grad=m.maybe(c),
    )
    return Case({"groups": groups}, operands, m.images)


# ---- windows


def _convolution(m: Maker) -> tuple[dict[str, Any], Shape, Shape, Shape, int]:
    """Attributes without an activation; shapes of x, y and the weight; output channels."""
    layout = m.of("dense", "grouped", "depthwise", "depthwise", "point")
    window, sides = m.window((1,) if layout == "point" else (1, 2, 3, 3, 4, 5, 5, 7, 7))
    if layout == "depthwise":
        c = outs = groups = m.draw(CHANNELS)
    else:
        groups = m.of(2, 3) if layout == "grouped" else 1
        c, outs = groups * m.of(1, 3, 8, 20), groups * m.of(1, 5, 16, 19)
    window |= {"groups": groups, "depthwise": int(layout == "depthwise")}
    kernel = window["kh"], window["kw"]
    shape = (*kernel, c) if layout == "depthwise" else (outs, *kernel, c // groups)
    return window, (*sides, c), (*m.outputs(sides, window), outs), shape, outs


def conv(m: Maker) -> Case:
    attributes, x, y, weight, outs = _convolution(m)
    operands = {"x": m.each(*x), **m.weight(weight, outs), "bias": m.maybe(outs), "y": written(y)}
    operands["residual"] = m.each(*y) if m.coin() else None
    return masked(m, Case({**attributes, **m.draw(ACTS)}, present(**operands), m.images), y)


def conv_dx(m: Maker) -> Case:
    attributes, x, y, weight, outs = _convolution(m)
    operands = {"grad": m.each(*y), **m.weight(weight, outs), "y": written(x), "bias": m.maybe(x[-1])}
    operands["other"] = m.each(*x) if m.coin() else None
    operands["mask"] = m.bits(*x) if m.coin() else None
    return Case({**attributes, "slope": m.of(0.0, 0.2)}, present(**operands), m.images)


def conv_dw(m: Maker) -> Case:
    attributes, x, y, weight, _ = _convolution(m)
    return Case(attributes, {"x": m.each(*x), "grad": m.each(*y), "w": m.random(*weight)}, m.images)


def avg_pool(m: Maker) -> Case:
    window, sides = m.window((1, 2, 3, 5))
    c = m.draw(CHANNELS)
    attributes = {**window, "include_pad": m.of(0, 1), "divisor": m.of(0, 0, 3)}
    return Case(attributes, {"x": m.each(*sides, c), "y": written((*m.pooled(sides, window), c))}, m.images)


def _back(m: Maker, case: Case) -> Case:
    """The gradient of a pooling: its output's becomes the operand `grad`, its input's `y`."""
    x, (pooled, _) = case.operands["x"], case.operands["y"]
    operands = {"grad": m.each(*pooled), "y": written(tuple(x.shape[1:]))}
    if m.coin():
        operands["other"] = m.random(*x.shape)
    return Case(case.attributes, operands, m.images)


def avg_pool_grad(m: Maker) -> Case:
    return _back(m, avg_pool(m))


def adaptive_pool(m: Maker) -> Case:
    h, w, c = m.image()
    return Case({}, {"x": m.each(h, w, c), "y": written((m.of(1, 2, h, 5), m.of(1, 3, w, 12), c))}, m.images)


def adaptive_pool_grad(m: Maker) -> Case:
    return _back(m, adaptive_pool(m))


def max_pool(m: Maker) -> Case:
    window, sides = m.window((1, 2, 3, 5))
    c = m.draw(CHANNELS)
    pooled = (*m.pooled(sides, window), c)
    x = m.each(*sides, c)
    if m.coin():
        x = x.round()  # equal pixels: the first wins
    if m.coin():
        x[0, 0, 0, 0], x[-1, -1, -1, -1] = math.nan, -math.inf
    operands: dict[str, Any] = {"x": x, "y": written(pooled)}
    if m.coin():
        operands["which"] = written(pooled, "u8")
    return Case(window, operands, m.images)


def max_pool_grad(m: Maker) -> Case:
    window, sides = m.window((1, 2, 3, 5))
    c = m.draw(CHANNELS)
    pooled = (*m.pooled(sides, window), c)
    taps = window["kh"] * window["kw"]
    which = torch.randint(0, taps, (m.images, *pooled), dtype=torch.uint8, generator=m.generator)
    return Case(window, {"grad": m.each(*pooled), "which": which, "y": written((*sides, c))}, m.images)


def _sizes(m: Maker) -> tuple[Shape, Shape]:
    h, w, c = m.image()
    return (h, w, c), (m.of(h, 2 * h, 3 * h + 1, 5), m.of(w, 2 * w, w + 3, 4), c)


def upsample(m: Maker) -> Case:
    x, y = _sizes(m)
    operands = {"x": m.each(*x), "residual": m.each(*y) if m.coin() else None, "y": written(y)}
    return Case({}, present(**operands), m.images)


def upsample_grad(m: Maker) -> Case:
    x, y = _sizes(m)
    return Case({}, {"grad": m.each(*y), "y": written(x)}, m.images)


# ---- weights


def _filters(m: Maker) -> tuple[Shape, int, int]:
    """Shape of a weight, its output channels, and whether it is depthwise."""
    k = m.of(2, 3, 5)
    if m.coin():
        c = m.draw(CHANNELS)
        return (k, k, c), c, 1
    outs = m.of(1, 5, 16)
    return (outs, k, k, m.of(1, 4, 17)), outs, 0


def standardize(m: Maker) -> Case:
    shape, _, depthwise = _filters(m)
    operands = {"w": m.random(*shape) + m.of(0.0, 2.0), "y": written(shape)}
    return Case({"eps": 1e-5, "depthwise": depthwise}, operands)


def standardize_grad(m: Maker) -> Case:
    shape, _, depthwise = _filters(m)
    w = m.random(*shape)
    if m.coin():
        w = torch.full_like(w, 0.5)  # a deviation of 0
    return Case({"eps": 1e-5, "depthwise": depthwise}, {"w": w, "grad": m.random(*shape)})


def scale_weight(m: Maker) -> Case:
    shape, outs, depthwise = _filters(m)
    weight = m.weight(shape, outs)
    operands = {**weight, "gamma": m.maybe(outs), "rstd": m.random(outs), "y": written(shape)}
    return Case({"depthwise": depthwise}, present(**operands))


def scale_weight_grad(m: Maker) -> Case:
    shape, outs, depthwise = _filters(m)
    operands = {**m.weight(shape, outs), "gamma": m.maybe(outs), "rstd": m.random(outs)}
    operands |= {"grad": m.random(*shape), "gamma_grad": m.maybe(outs)}
    return Case({"depthwise": depthwise}, present(**operands))


def shift_bias(m: Maker) -> Case:
    c = m.draw(CHANNELS)
    operands = {"bias": m.maybe(c), "gamma": m.maybe(c), "beta": m.maybe(c), "y": written((c,))}
    return Case({}, present(mean=m.random(c), rstd=m.random(c), **operands))


def shift_bias_grad(m: Maker) -> Case:
    c = m.draw(CHANNELS)
    names = ("bias", "gamma", "bias_grad", "gamma_grad", "beta_grad")
    return Case({}, present(grad=m.random(c), mean=m.random(c), rstd=m.random(c), **{n: m.maybe(c) for n in names}))


# ---- updates


def zero(m: Maker) -> Case:
    return Case({}, {"x": written((m.of(1, 7, 300), m.draw(CHANNELS)))})


def _parameter(m: Maker) -> tuple[int, dict[str, Any], dict[str, Any]]:
    n = m.of(1, 17, 256, 300, 5000)
    scalars = {"lr": m.of(0.0, 1e-3, 0.5), "step": m.of(1, 2, 500)}
    return n, {"p": m.random(n), "grad": m.random(n) * m.of(1e-4, 1.0)}, scalars


def sgd(m: Maker) -> Case:
    n, operands, scalars = _parameter(m)
    attributes = {"weight_decay": m.of(0.0, 0.01), "momentum": m.of(0.0, 0.9)}
    return Case(attributes, present(**operands, momentum=m.maybe(n)), 1, scalars)


def adam(m: Maker) -> Case:
    n, operands, scalars = _parameter(m)
    attributes = {"weight_decay": m.of(0.0, 0.01), "beta1": m.of(0.0, 0.9), "beta2": 0.99, "eps": 1e-6}
    return Case(attributes, {**operands, "m": m.random(n), "v": m.random(n).square()}, 1, scalars)


def _codes(m: Maker, n: int, name: str) -> dict[str, Tensor]:
    codes = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=m.generator)
    return {name: codes, f"{name}_scale": m.random(blocks(n)).abs() + 0.1}


def sgd8(m: Maker) -> Case:
    n, operands, scalars = _parameter(m)
    attributes = {"weight_decay": m.of(0.0, 0.01), "momentum": m.of(0.0, 0.9)}
    return Case(attributes, {**operands, **_codes(m, n, "momentum")}, 1, scalars)


def adam8(m: Maker) -> Case:
    n, operands, scalars = _parameter(m)
    attributes = {"weight_decay": m.of(0.0, 0.01), "beta1": 0.9, "beta2": 0.99, "eps": 1e-6}
    return Case(attributes, {**operands, **_codes(m, n, "m"), **_codes(m, n, "v")}, 1, scalars)


CASES: dict[str, Callable[[Maker], Case]] = {
    function.__name__: function
    for function in (
        *(normalize, conv, group_norm, affine, activation, add, smooth, gate, avg_pool, adaptive_pool, max_pool),
        *(upsample, dropout, softmax_loss, copy, standardize, scale_weight, shift_bias, act_grad, bias_grad, conv_dx),
        *(conv_dw, group_norm_grad, affine_grad, channel_dot, smooth_grad, gate_grad, avg_pool_grad),
        *(adaptive_pool_grad, max_pool_grad, upsample_grad, dropout_grad, standardize_grad, scale_weight_grad),
        *(shift_bias_grad, zero, sgd, adam, sgd8, adam8),
    )
}
"""Op -> a random instruction of it."""


@st.composite
def cases(draw: Draw, op: str) -> Case:
    """Random instructions of that op."""
    return CASES[op](Maker(draw))
