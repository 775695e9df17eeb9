"""The compiled passes and their plain PyTorch form give the same values, bits and sums."""

from __future__ import annotations

import math

import pytest
import torch

from tinytl.ops import _masks

CASES = [(0.0, math.inf, 0.0), (0.0, 6.0, 0.0), (0.0, math.inf, 0.25)]
SHAPES = [(2, 8, 5, 3), (1, 3, 7, 5), (4, 12, 1, 1), (2, 48, 40, 40), (5, 16), (1, 1)]

needs_kernels = pytest.mark.skipif(_masks.KERNELS is None, reason="built without a C++ compiler")


def dense(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, dtype=dtype) * 4
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("lo", "hi", "slope"), CASES)
def test_compiled_equals_plain(
    lo: float, hi: float, slope: float, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, upstream = dense(*shape, dtype=dtype), dense(*shape, dtype=dtype)
    y[0, 0] = float("nan")
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(_masks, "KERNELS", None)
            monkeypatch.setattr(_masks, "_SLICE", 64)  # several slices even for small tensors
        out, grad = y.clone(), upstream.clone()
        mask = _masks.activate_(out, lo, hi, slope, keep_mask=True)
        assert mask is not None
        assert mask.numel() == _masks.mask_bytes(y.numel())
        fresh, sums = _masks.masked_grad(grad, mask, slope, want_sum=True, in_place=False)
        assert torch.equal(grad, upstream)
        same, none = _masks.masked_grad(grad, mask, slope, want_sum=False, in_place=True)
        assert same is grad
        assert none is None
        assert torch.equal(same, fresh)
        results.append((out, mask, fresh, sums))
    (out_a, mask_a, grad_a, sums_a), (out_b, mask_b, grad_b, sums_b) = results
    torch.testing.assert_close(out_a, out_b, equal_nan=True)
    assert torch.equal(mask_a, mask_b)
    torch.testing.assert_close(grad_a, grad_b)
    torch.testing.assert_close(sums_a, sums_b, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    grad, results = dense(4, 24, 60, 60, dtype=torch.float32), []
    mask = torch.randint(0, 256, (_masks.mask_bytes(grad.numel()),), dtype=torch.uint8)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_masks.masked_grad(grad, mask, 0.0, want_sum=True, in_place=False))
    for out, sums in results[1:]:
        assert torch.equal(out, results[0][0])
        assert sums is not None
        assert torch.equal(sums, results[0][1])


def test_bits_lie_where_the_documentation_says() -> None:
    y = torch.tensor([[1.0, -1.0, 2.0, 7.0, 0.0, 3.0, -2.0, 5.0, 1.0, -1.0]])
    mask = _masks.activate_(y, 0.0, 6.0, 0.0, keep_mask=True)
    assert mask is not None
    assert mask.tolist() == [0b10100101, 0b01]
    assert y.tolist() == [[1.0, 0.0, 2.0, 6.0, 0.0, 3.0, 0.0, 5.0, 1.0, 0.0]]
