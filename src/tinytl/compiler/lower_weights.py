"""From the tensors that a layer stores to the operands that an instruction computes with (see `tinytl.ops._weights`).

What is frozen is resolved here, once, in float64: standardization and the scale of a frozen norm are multiplied into
the constant. What trains, or is made of something that trains, is made by instructions right before its use:

    weight trains, standardized         standardize
    weight or gamma trains, norm        scale_weight: gamma rstd by output channel
    bias, gamma or beta trains, norm    shift_bias: beta + (bias - mean) gamma rstd

A gamma that is frozen is part of `rstd`. A packed weight stays codes and table; a frozen norm behind an int8 one scales
its table, since both count output channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinytl.ops._op import Shape, Tensors
from tinytl.ops._weights import WeightRecipe
from tinytl.ops.packing import Packing
from tinytl.ops.weight_standardization import standardize

from .lower_builder import Builder

STANDARDIZE_EPS = 1e-5
"""The default of `tinytl.ops.weight_standardization.standardize`, with which the lab computes."""

_CODES = {"int8": "i8", "codebook": "u8", "float16": "f16"}


@dataclass(frozen=True)
class Filters:
    """Operands of a convolution.

    Attributes:
        w, table, bias: numbers of tensors.
        depthwise: whether `w` lies as (kh, kw, C).
    """

    w: int
    table: int | None
    bias: int | None
    depthwise: bool


def filters_of(
    b: Builder, recipe: WeightRecipe, tensors: Tensors, depthwise: bool, view: Shape | None = None
) -> Filters:
    """The operands that `recipe` makes of `tensors`, in the program's layout; instructions for them where needed.

    Args:
        b: the program so far.
        recipe: how weight and bias are made.
        tensors: those of the recipe.
        depthwise: one filter a channel.
        view: (O, I / groups, kh, kw) of a weight that is stored in another shape.
    """
    weight = tensors[0]
    assert weight is not None
    norm = None if recipe.norm_eps is None else _Norm(b, tensors[-4:], recipe.norm_eps)
    arrange = _Arrangement(tuple(weight.shape) if view is None else view, depthwise)
    w, table, scaled = _weight(b, recipe, tensors, norm, arrange)
    if norm is not None and not scaled:
        rstd, gamma = norm.rstd(), norm.gamma()
        y = b.derived(f"{b.name_of(weight)}:scaled", b.shape(w))
        b.emit("scale_weight", {"depthwise": int(depthwise)}, w=w, table=table, gamma=gamma, rstd=rstd, y=y)
        w, table = y, None
    return Filters(w, table, b.vector(tensors[1]) if norm is None else norm.shift(tensors[1]), depthwise)


def _weight(
    b: Builder,
    recipe: WeightRecipe,
    tensors: Tensors,
    norm: _Norm | None,
    arrange: _Arrangement,
) -> tuple[int, int | None, bool]:
    """Number of the weight, or of its codes and their table; whether the norm's scale is in it."""
    weight = tensors[0]
    assert weight is not None
    if b.trains(weight):
        number = b.parameter(weight, arrange.layout, arrange)
        if recipe.standardize:
            y = b.derived(f"{b.name_of(weight)}:standardized", b.shape(number))
            b.emit("standardize", {"eps": STANDARDIZE_EPS, "depthwise": int(arrange.depthwise)}, w=number, y=y)
            number = y
        return number, None, False
    folds = norm is not None and not norm.gamma_trains
    if recipe.packing is not None:
        return _packed(b, recipe.packing, tensors, norm if folds else None, arrange)

    def make() -> Tensor:
        value = weight.detach().double()
        value = standardize(value, STANDARDIZE_EPS) if recipe.standardize else value
        if folds:
            assert norm is not None
            value = value * norm.scale().view(-1, *(1,) * (value.dim() - 1))
        return arrange(value).to(weight.dtype)

    kind = "standardized" if recipe.standardize else ""
    sources = (weight,)
    if folds:
        assert norm is not None
        kind, sources = f"{kind} folded".strip(), (weight, *norm.tensors)
    return b.constant(kind, sources, make, variant=arrange), None, folds


def _packed(
    b: Builder, packing: Packing, tensors: Tensors, norm: _Norm | None, arrange: _Arrangement
) -> tuple[int, int, bool]:
    codes, table = tensors[0], tensors[2]
    assert codes is not None
    assert table is not None
    w = b.constant("", [codes], lambda: _halves(arrange(codes)), _CODES[packing.kind], variant=arrange)
    if norm is None or packing.kind != "int8":
        return w, b.constant("", [table], lambda: table), False
    scale = norm.scale
    kept = b.constant("folded", [table, *norm.tensors], lambda: (table.double() * scale()).to(table.dtype))
    return w, kept, True


def _halves(codes: Tensor) -> Tensor:
    """The bits of half precision as such; the lab holds them as int16."""
    return codes.view(torch.float16) if codes.dtype == torch.int16 else codes


@dataclass(frozen=True)
class _Arrangement:
    """How a weight, seen as `shape` (O, I / groups, kh, kw), is laid out in the program."""

    shape: Shape
    depthwise: bool

    @property
    def layout(self) -> str:
        """Its name; of a kernel of one pixel nothing moves."""
        if self.shape[2:] == (1, 1):
            return "as-is"
        return "HWC" if self.depthwise else "OHWI"

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as it lies in the program, a view where it can be."""
        weight = weight.reshape(self.shape)
        return weight[:, 0].permute(1, 2, 0) if self.depthwise else weight.permute(0, 2, 3, 1)


def scale_and_shift(b: Builder, norm: Tensors, eps: float) -> tuple[int, int]:
    """Operands (scale, shift) of a frozen batch norm (gamma, beta, mean, var) that no convolution has folded.

    A scale that trains is one made by `scale_weight` of a vector of ones, (1, 1, C), as of a depthwise weight: its
    gradient is then gamma's by the rule of any other scale, and no other instruction is needed.
    """
    made = _Norm(b, norm, eps)
    if not made.gamma_trains:
        return made.rstd(), made.shift(None)
    mean = norm[2]
    assert mean is not None
    ones = b.constant("ones", [mean], lambda: torch.ones_like(mean).view(1, 1, -1))
    scale = b.derived(f"{b.layer}:scale", b.shape(ones))
    b.emit("scale_weight", {"depthwise": 1}, w=ones, gamma=made.gamma(), rstd=made.rstd(), y=scale)
    return scale, made.shift(None)


class _Norm:
    """A frozen batch norm: (gamma, beta, mean, var)."""

    def __init__(self, b: Builder, tensors: Tensors, eps: float) -> None:
        self.tensors, self.gamma_trains = tuple(tensors), b.trains(tensors[0])
        self._b, self._eps = b, eps
        for tensor in tensors[2:]:
            if b.trains(tensor):
                raise b.refusal("BatchNorm2d", "has statistics that train")

    def scale(self) -> Tensor:
        """(C,) float64: rstd, times gamma where that is frozen."""
        gamma, _, _, var = self.tensors
        assert var is not None
        rstd = torch.rsqrt(var.detach().double() + self._eps)
        return rstd if gamma is None or self.gamma_trains else rstd * gamma.detach().double()

    def rstd(self) -> int:
        """The constant of `scale`."""
        gamma, _, _, var = self.tensors
        assert var is not None
        kind = f"rstd {self._eps:g}"
        if gamma is None or self.gamma_trains:
            return self._b.constant(kind, [var], lambda: self.scale().to(var.dtype))
        return self._b.constant(f"gamma {kind}", [gamma, var], lambda: self.scale().to(var.dtype))

    def gamma(self) -> int | None:
        """The trained gamma."""
        return self._b.vector(self.tensors[0]) if self.gamma_trains else None

    def shift(self, bias: Tensor | None) -> int:
        """beta + (bias - mean) gamma rstd: a constant, or derived where one of them trains."""
        b, (gamma, beta, mean, var) = self._b, self.tensors
        assert mean is not None
        if self.gamma_trains or b.trains(bias) or b.trains(beta):
            y = b.derived(f"{b.layer}:shift", mean.shape)
            added, centre = (b.vector(bias), b.vector(beta)), b.vector(mean)
            rstd, gamma = self.rstd(), self.gamma()
            b.emit("shift_bias", bias=added[0], gamma=gamma, beta=added[1], mean=centre, rstd=rstd, y=y)
            return y

        def make() -> Tensor:
            start = -mean.double() if bias is None else bias.double() - mean.double()
            shift = start * self.scale()
            return (shift if beta is None else shift + beta.double()).to(mean.dtype)

        return b.constant(f"shift {self._eps:g}", [mean, bias, gamma, beta, var], make)
