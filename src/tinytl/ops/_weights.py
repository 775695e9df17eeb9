"""From the tensors a convolution stores to the weight and bias it computes with.

A normalization with fixed statistics behind a convolution, and weight standardization in front of it, are functions of
weight-sized tensors only. So they are applied to the weight, and their gradients follow from that of the weight:

    s      = gamma / sqrt(var + eps)
    weight' = s * standardize(weight)        bias' = beta + (bias - mean) * s

No activation is needed for gamma beyond the convolution's input, which a trainable weight keeps anyway. Nothing
weight-sized is kept either: backward makes it again from the stored tensors, which live in the model.

A frozen weight may be stored packed (`tinytl.ops.packing`), as codes and a table. It is expanded for the one operator
that computes with it, in forward and again in backward, and is gone behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._filters import filter_products
from ._op import Gradients, Tensors
from .packing import Packing, expanded
from .weight_standardization import standardize, standardize_gradient_


@dataclass(frozen=True)
class WeightRecipe:
    """How weight and bias are made.

    Tensors, in this order: weight, bias; if `packing` is set, the table of the weight, which then is codes; if
    `norm_eps` is set, gamma, beta, mean, var, which therefore are the last four. All but the weight, its table, mean
    and var may be None: an absent bias is 0, an absent gamma 1, an absent beta 0. A packed weight is frozen, and was
    standardized, if that was asked for, before it was packed.
    """

    standardize: bool = False
    norm_eps: float | None = None
    packing: Packing | None = None

    def __post_init__(self) -> None:
        if self.standardize and self.packing is not None:
            raise ValueError("a packed weight cannot be standardized: standardize it, then pack it")

    @property
    def tensor_count(self) -> int:
        """Number of tensors the recipe takes."""
        return 2 + (self.packing is not None) + 4 * (self.norm_eps is not None)

    @property
    def is_plain(self) -> bool:
        """Whether weight and bias are used as they are stored."""
        return not self.standardize and self.norm_eps is None and self.packing is None

    def dtype(self, tensors: Tensors) -> torch.dtype:
        """The type of the weight, or of what it expands to."""
        stored = tensors[0] if self.packing is None else tensors[2]
        assert stored is not None
        return stored.dtype

    def moves_weight(self, needs: tuple[bool, ...]) -> bool:
        """Whether a wanted gradient goes through the weight: of the weight itself, or of gamma."""
        return needs[0] or (self.norm_eps is not None and needs[-4])

    def moves_bias(self, needs: tuple[bool, ...]) -> bool:
        """Whether a wanted gradient goes through the bias: of the bias, or of gamma or beta."""
        return needs[1] or (self.norm_eps is not None and (needs[-4] or needs[-3]))

    def make(self, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in/groups, kh, kw) and bias (out,) or None to compute with."""
        if self.norm_eps is None:
            return self.unscaled(tensors), tensors[1]
        weight, bias, scale = self.make_unscaled(tensors)
        own = self.packing is not None or self.standardize  # made for us alone
        return weight.mul_(scale.view(-1, 1, 1, 1)) if own else weight * scale.view(-1, 1, 1, 1), bias

    def make_unscaled(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """The same in three parts, where there is a normalization: y = scale (weight * x) + bias."""
        bias, beta, mean = tensors[1], tensors[-3], tensors[-2]
        assert mean is not None
        scale = self.scale(tensors)[1]
        shift = (-mean if bias is None else bias - mean) * scale
        return self.unscaled(tensors), shift if beta is None else beta + shift, scale

    def unscaled(self, tensors: Tensors) -> Tensor:
        """The weight before the normalization's scale; a new tensor where it is packed."""
        weight = expanded(tensors[0], None if self.packing is None else tensors[2], self.packing)
        return standardize(weight) if self.standardize else weight

    def scale(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """1 / sqrt(var + eps) and that times gamma, each (out,); only where there is a normalization."""
        gamma, var = tensors[-4], tensors[-1]
        assert self.norm_eps is not None
        assert var is not None
        rstd = torch.rsqrt(var + self.norm_eps)
        return rstd, rstd if gamma is None else rstd * gamma

    def gradients(
        self,
        tensors: Tensors,
        needs: tuple[bool, ...],
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        scales: tuple[Tensor, Tensor] | None,
    ) -> Gradients:
        """Gradients of the stored tensors from those of the made ones (None where no wanted one goes through).

        With W the (standardized) weight, s = gamma rstd, and G, g the gradients of s W and of the made bias:

            dL/dW = s G      dL/dgamma = rstd (<W, G> + (bias - mean) g)      dL/dbeta = g      dL/dbias = s g

        `scales` are those of `scale`; `grad_weight` may be overwritten.
        """
        rest: Gradients = ()
        table: Gradients = () if self.packing is None else (None,)
        grad_bias = grad_bias if self.moves_bias(needs) else None
        made = grad_bias
        if scales is not None:
            rstd, scale = scales
            grad_gamma = None
            if needs[-4]:
                assert grad_weight is not None
                assert grad_bias is not None
                grad_gamma = self._gamma(tensors, rstd, grad_weight, grad_bias)
            rest = (grad_gamma, grad_bias if needs[-3] else None, None, None)
            grad_weight = grad_weight.mul_(scale.view(-1, 1, 1, 1)) if needs[0] and grad_weight is not None else None
            made = grad_bias * scale if needs[1] and grad_bias is not None else None
        if self.standardize and needs[0] and grad_weight is not None:
            grad_weight = _through_standardization(tensors[0], grad_weight)
        return (grad_weight if needs[0] else None, made if needs[1] else None, *table, *rest)

    def _gamma(self, tensors: Tensors, rstd: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> Tensor:
        bias, mean = tensors[1], tensors[-2]
        assert mean is not None
        inner = filter_products(self.unscaled(tensors), grad_weight)
        return rstd * (inner + (-mean if bias is None else bias - mean) * grad_bias)


def _through_standardization(weight: Tensor | None, grad: Tensor) -> Tensor:
    """The gradient of a weight from that of its standardized form, in its place."""
    assert weight is not None
    return standardize_gradient_(weight.detach(), grad)
