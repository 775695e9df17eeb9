"""From the tensors a convolution stores to the weight and bias it computes with.

A normalization with fixed statistics behind a convolution, and weight standardization in front of it, are functions of
weight-sized tensors only. So they are applied to the weight, and their gradients follow from that of the weight:

    s      = gamma / sqrt(var + eps)
    weight' = s * standardize(weight)        bias' = beta + (bias - mean) * s

No activation is needed for gamma beyond the convolution's input, which a trainable weight keeps anyway. Nothing
weight-sized is kept either: backward makes it again from the stored tensors, which live in the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._op import Gradients, Tensors
from .weight_standardization import standardize


@dataclass(frozen=True)
class WeightRecipe:
    """How weight and bias are made. Tensors: weight, bias and, if `norm_eps` is set, gamma, beta, mean, var.

    All but `weight` may be None: an absent bias is 0, an absent gamma 1, an absent beta 0.
    """

    standardize: bool = False
    norm_eps: float | None = None

    @property
    def tensor_count(self) -> int:
        """Number of tensors the recipe takes."""
        return 2 if self.norm_eps is None else 6

    @property
    def is_plain(self) -> bool:
        """Whether weight and bias are used as they are stored."""
        return not self.standardize and self.norm_eps is None

    def moves_weight(self, needs: tuple[bool, ...]) -> bool:
        """Whether a wanted gradient goes through the weight: of the weight itself, or of gamma."""
        return needs[0] or (self.norm_eps is not None and needs[2])

    def moves_bias(self, needs: tuple[bool, ...]) -> bool:
        """Whether a wanted gradient goes through the bias: of the bias, or of gamma or beta."""
        return needs[1] or (self.norm_eps is not None and (needs[2] or needs[3]))

    def make(self, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in/groups, kh, kw) and bias (out,) or None to compute with."""
        weight, bias = tensors[0], tensors[1]
        assert weight is not None
        if self.standardize:
            weight = standardize(weight)
        if self.norm_eps is None:
            return weight, bias
        gamma, beta, mean, var = tensors[2:6]
        assert mean is not None
        assert var is not None
        scale = torch.rsqrt(var + self.norm_eps)
        if gamma is not None:
            scale = scale * gamma
        shift = (-mean if bias is None else bias - mean) * scale
        return weight * scale.view(-1, 1, 1, 1), shift if beta is None else beta + shift

    def gradients(
        self, tensors: Tensors, needs: tuple[bool, ...], grad_weight: Tensor | None, grad_bias: Tensor | None
    ) -> Gradients:
        """Gradients of the stored tensors from those of the made ones (None where no wanted one goes through)."""
        if self.is_plain:
            return grad_weight if needs[0] else None, grad_bias if needs[1] else None
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(need) if t is not None else None
                for t, need in zip(tensors, needs, strict=True)
            ]
            weight, bias = self.make(leaves)
            pairs = [
                (made, grad)
                for made, grad in ((weight, grad_weight), (bias, grad_bias))
                if made is not None and grad is not None and made.requires_grad
            ]
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if leaf is not None and need]
            found = iter(torch.autograd.grad([m for m, _ in pairs], wanted, [g for _, g in pairs]))
        return tuple(
            next(found) if leaf is not None and need else None for leaf, need in zip(leaves, needs, strict=True)
        )
