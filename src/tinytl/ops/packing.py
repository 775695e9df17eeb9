"""Frozen weights in 8 or 16 bits, made into numbers again where an operator needs them.

    int8       w ~ scale_o code             code -127 ... 127, one scale for each output channel o
    codebook   w ~ table[code]              code 0 ... 255, one table of 256 values for the whole tensor
    float16    w ~ scale half(code)         one scale, a power of two, for the whole tensor

This rounds: a packed network is another network than the one it was packed from, close to it. What is computed with
the rounded weights, gradients included, is exact. How far they are off:

- int8: a step is m / 127 with m the channel's largest magnitude, which is met, and |w - w'| is at most half a step, but
  in a filter of several taps at most a step: there taps are rounded so that their sum, which is what the filter makes
  of an even image, is off by at most half a step: behind a ReLU images are never negative, and what is off would add
  up. A channel whose values lie on a grid of at most 127 steps either side, as those of a published int8 network do, is
  found to do so and comes back as it was, but for a unit in the last place of a few values.
- codebook: exact where a tensor has no more than 256 distinct values, as those of a published codebook have. Else the
  table is found by k-means, as in Deep Compression (Han et al., arXiv 1510.00149), from 256 values that are no worse
  than evenly spaced ones; since Lloyd's steps only lower the mean square, its root is at most (max w - min w) / 510.
- float16: |w - w'| <= |w| / 2048 for all but values 2^-29 of the largest and below. Half precision has more digits
  than bfloat16; the power of two, which costs no digit, gives it bfloat16's range. The bits are held as int16, so that
  `module.to(dtype)` leaves them as they are.

Packing depends on the values alone, not on threads or draws: equal weights, equal codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._layout import dense, rows

Kind = Literal["int8", "codebook", "float16"]

ENTRIES = 256
STEPS = 127  # of an int8 code either side of 0
_CODES = {"int8": torch.int8, "codebook": torch.uint8, "float16": torch.int16}
_SLICE = 1 << 15  # codes whose numbers in a table are held as int32 at a time
_LLOYD_STEPS = 64  # most; what is left to gain then is nothing
_HALF_EXPONENT = 15  # the largest magnitude is brought into [2^14, 2^15): half precision ends at 65504
_LEAST_EXPONENT = -126  # of a float32 with all its digits


@dataclass(frozen=True)
class Packing:
    """How a weight is held: as codes in the weight's shape, and as a table beside them that says what they mean."""

    kind: Kind

    @staticmethod
    def of(bits: int, codebook: bool = False) -> Packing:
        """For 8 or 16 bits a value.

        Raises:
            ValueError: any other number of bits, or a codebook of other than 8.
        """
        if bits not in (8, 16) or (codebook and bits != 8):
            raise ValueError(f"{bits} bits{' with a codebook' if codebook else ''}: expected 8 or 16, a codebook has 8")
        return Packing("codebook" if codebook else "int8" if bits == 8 else "float16")

    def table_size(self, weight: Tensor) -> int:
        """How many values the table beside the codes of `weight` has."""
        return {"int8": weight.shape[0], "codebook": ENTRIES, "float16": 1}[self.kind]

    def packed_bytes(self, weight: Tensor) -> int:
        """Bytes of the codes and the table that `weight` becomes; its shape and type say it."""
        return weight.numel() * _CODES[self.kind].itemsize + self.table_size(weight) * weight.element_size()

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, table) of `weight` (out, ...): codes in its shape, layout and device, the table in its type.

        Of a weight without values (on the meta device), codes and table without values.
        """
        codes = torch.empty_like(weight, dtype=_CODES[self.kind], requires_grad=False)
        if weight.is_meta:
            return codes, weight.new_empty(self.table_size(weight), requires_grad=False)
        # in one order and on one device, so that equal weights have equal codes
        values = weight.detach().to("cpu", torch.float64).flatten(1).contiguous()
        make = {"int8": _int8, "codebook": _codebook, "float16": _float16}[self.kind]
        found, table = make(values, weight.dtype, math.prod(weight.shape[2:]))
        return codes.copy_(found.view(weight.shape)), table.to(weight.device)

    def expand(self, codes: Tensor, table: Tensor) -> Tensor:
        """The weight that the codes stand for: a new tensor in their shape and the table's type."""
        if self.kind == "codebook":
            return _looked_up(codes, table)
        if self.kind == "float16":
            codes = codes.view(torch.float16)
        return codes.to(table.dtype, copy=True).mul_(table.view(-1, *(1,) * (codes.dim() - 1)))

    def expand_part(self, codes: Tensor, table: Tensor, filters: slice) -> Tensor:
        """`expand` for some of the filters alone: a new tensor."""
        return self.expand(codes[filters], table[filters] if self.kind == "int8" else table)


def expanded(weight: Tensor | None, table: Tensor | None, packing: Packing | None) -> Tensor:
    """The weight as it is stored or, where it is packed, a new tensor of what it stands for."""
    assert weight is not None
    if packing is None:
        return weight
    assert table is not None
    return packing.expand(weight, table)


def _int8(values: Tensor, dtype: torch.dtype, taps: int) -> tuple[Tensor, Tensor]:
    peak = values.abs().amax(1)
    scale = (peak / STEPS).to(dtype)
    near = _near_a_grid(values.abs(), peak)
    if near.numel():
        scale[near] = _grid_scale(values[near], peak[near], dtype)
    codes = _nearest_steps(values, scale.double())
    if taps > 1:
        codes = _keeping_sums(values / scale.double().where(scale > 0, 1.0)[:, None], codes, taps)
    return codes.to(torch.int8), scale


def _nearest_steps(values: Tensor, scale: Tensor) -> Tensor:
    """The codes nearest to `values` (out, n) for scales (out,); 0 where a scale is."""
    return (values / scale.where(scale > 0, 1.0)[:, None]).round_().clamp_(-STEPS, STEPS)


def _keeping_sums(steps: Tensor, codes: Tensor, taps: int) -> Tensor:
    """`codes` of `steps` (out, in * taps), some rounded the other way, so that each filter's sum is the nearest too."""
    steps, codes = steps.view(-1, taps), codes.view(-1, taps)
    rest = steps - codes
    missing = rest.sum(1, keepdim=True).round()
    # those go first that were rounded the furthest in the direction that is missing
    order = (rest * missing.sign()).argsort(dim=1, descending=True, stable=True)
    moved = (torch.arange(taps) < missing.abs()).to(codes.dtype).expand_as(codes)
    codes = codes.scatter_add(1, order, moved * missing.sign())
    return codes.clamp_(-STEPS, STEPS).view(steps.shape[0], taps)


def _near_a_grid(magnitudes: Tensor, peak: Tensor) -> Tensor:
    """Numbers of the channels whose values may be whole multiples of peak / n for an n up to 127.

    Judged by the smallest magnitude that is not 0: that of a channel which is on no grid rarely passes.
    """
    least = magnitudes.where(magnitudes > 0, math.inf).amin(1)
    ratio = torch.arange(1, STEPS + 1, dtype=torch.float64) * (least / peak)[:, None]  # (out, 127)
    near = ((ratio - ratio.round()).abs() <= 1e-6 * ratio.clamp(min=1.0)) & (ratio > 0.5)
    return near.any(1).nonzero().flatten()


def _grid_scale(values: Tensor, peak: Tensor, dtype: torch.dtype) -> Tensor:
    """For each row of `values`, the scale peak / n, or a neighbour of it in `dtype`, that is off by least."""
    least = torch.full_like(peak, math.inf)
    found = torch.zeros_like(peak, dtype=dtype)
    for steps in range(STEPS, 0, -1):
        rows_left = least.nonzero().flatten()  # the others are met exactly
        if not rows_left.numel():
            break
        row_values, middle = values[rows_left], (peak[rows_left] / steps).to(dtype)
        beside = [torch.nextafter(middle, middle.new_full((), end)) for end in (0.0, math.inf)]
        for scale in (middle, *beside):
            made = _nearest_steps(row_values, scale.double()).to(dtype) * scale[:, None]
            off = (row_values - made.double()).abs().amax(1)
            better = off < least[rows_left]
            least[rows_left] = off.where(better, least[rows_left])
            found[rows_left] = scale.where(better, found[rows_left])
    return found


def _codebook(values: Tensor, dtype: torch.dtype, taps: int) -> tuple[Tensor, Tensor]:
    ordered = values.flatten().sort()[0]
    table = ordered.unique_consecutive()
    if table.numel() > ENTRIES:
        table = _lloyd(ordered)
    table = torch.cat((table, table[-1:].expand(ENTRIES - table.numel()))).to(dtype)
    return torch.searchsorted(_middles(table.double()), values).to(torch.uint8), table


def _lloyd(ordered: Tensor) -> Tensor:
    """256 values for `ordered` ones by k-means; in one dimension a cluster is a stretch of the order."""
    even = torch.linspace(float(ordered[0]), float(ordered[-1]), ENTRIES, dtype=torch.float64)
    table = min((even, _by_density(ordered)), key=lambda start: _square(ordered, start))
    sums = torch.cat((ordered.new_zeros(1), ordered.cumsum(0)))
    ends = torch.tensor([0, *[-1] * (ENTRIES - 1), ordered.numel()])
    for _ in range(_LLOYD_STEPS):
        before = ends.clone()
        ends[1:-1] = torch.searchsorted(ordered, _middles(table))
        if torch.equal(ends, before):
            break
        counts = ends.diff()
        table = ((sums[ends[1:]] - sums[ends[:-1]]) / counts.clamp(min=1)).where(counts > 0, table)
    return table


def _by_density(ordered: Tensor) -> Tensor:
    """256 values as dense as the cube root of the density of `ordered` ones, which is best for many values.

    Source: Panter and Dite, "Quantization distortion in pulse-count modulation" (1951).
    """
    count = ordered.numel()
    reach, at = max(1, count // 1024), torch.arange(count)
    width = ordered[(at + reach).clamp(max=count - 1)] - ordered[(at - reach).clamp(min=0)]  # 1 / density
    mass = (width ** (2 / 3)).cumsum(0)
    wanted = (torch.arange(ENTRIES, dtype=torch.float64) + 0.5) / ENTRIES * mass[-1]
    return ordered[torch.searchsorted(mass, wanted).clamp(max=count - 1)]


def _middles(table: Tensor) -> Tensor:
    return (table[1:] + table[:-1]) / 2


def _square(values: Tensor, table: Tensor) -> float:
    """The mean square of what `values` are off from the nearest of the table's."""
    return float((table[torch.searchsorted(_middles(table), values)] - values).square().mean())


def _float16(values: Tensor, dtype: torch.dtype, taps: int) -> tuple[Tensor, Tensor]:
    peak = float(values.abs().max())
    scale = 2.0 ** max(math.frexp(peak)[1] - _HALF_EXPONENT, _LEAST_EXPONENT) if peak else 1.0
    return (values / scale).to(torch.float16).view(torch.int16), torch.tensor([scale], dtype=dtype)


def _looked_up(codes: Tensor, table: Tensor) -> Tensor:
    """`table[codes]`, the indices (four times as wide as a code) made a slice at a time."""
    codes = dense(codes)
    made = torch.empty_like(codes, dtype=table.dtype)
    source, target = rows(codes).view(-1), rows(made).view(-1)
    for start in range(0, source.numel(), _SLICE):
        part = slice(start, start + _SLICE)
        torch.index_select(table, 0, source[part].to(torch.int32), out=target[part])
    return made
