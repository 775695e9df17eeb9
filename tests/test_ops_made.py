"""What an operator makes without memory, the second time, is what PyTorch made the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinytl.ops import _made
from tinytl.ops._made import made

_aten = torch.ops.aten


def described(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.shape, out.stride(), out.dtype, out.device, out.storage_offset(), out.untyped_storage().nbytes()
    return type(out), [described(value) for value in out] if isinstance(out, (tuple, list)) else out


def images(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    if form == "last":
        return x.contiguous(memory_format=torch.channels_last)
    if form == "holes":
        return torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dtype, device="meta")[..., ::2]
    return x.transpose(0, 1) if form == "turned" else x


CALLS: dict[str, tuple[Any, Callable[[Tensor], tuple[list[Any], dict[str, Any]]]]] = {
    "zeros_like": (_aten.zeros_like.default, lambda x: ([x], {})),
    "empty_like": (_aten.empty_like.default, lambda x: ([x], {"memory_format": torch.preserve_format})),
    "contiguous": (_aten.clone.default, lambda x: ([x], {"memory_format": torch.contiguous_format})),
    "add": (_aten.add.Tensor, lambda x: ([x, x[:1]], {})),
    "times a whole number": (_aten.mul.Scalar, lambda x: ([x, 2], {})),
    "times a number": (_aten.mul.Scalar, lambda x: ([x, 2.0], {})),
    "to double": (_aten._to_copy.default, lambda x: ([x], {"dtype": torch.float64})),
    "mean": (_aten.sum.dim_IntList, lambda x: ([x, [2, 3]], {})),
    "mean, kept": (_aten.sum.dim_IntList, lambda x: ([x, [2, 3], True], {})),
    "largest": (_aten.max.dim, lambda x: ([x, 1], {})),
    "joined": (_aten.cat.default, lambda x: ([[x, x], 1], {})),
    "view": (_aten.view.default, lambda x: ([torch.empty_like(x).contiguous(), [x.shape[0], -1]], {})),
    "cut": (_aten.slice.Tensor, lambda x: ([x, 2, 1], {})),
    "split": (_aten.split.Tensor, lambda x: ([x, 1, 1], {})),
    "in place": (_aten.zero_.default, lambda x: ([x], {})),
}


@pytest.mark.parametrize("name", CALLS)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 5), st.integers(2, 5)),
    form=st.sampled_from(["plain", "last", "holes", "turned"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]),
)
@settings(max_examples=40, deadline=None)
def test_the_second_call_is_as_the_first(name: str, shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    func, arguments = CALLS[name]
    args, kwargs = arguments(images(shape, form, dtype))
    expected = described(func(*args, **kwargs))
    for _ in range(2):
        args, kwargs = arguments(images(shape, form, dtype))
        assert described(made(func, args, kwargs)) == expected


def test_equal_numbers_of_other_types_are_other_arguments() -> None:
    x = torch.empty((2, 3), dtype=torch.int64, device="meta")
    found = [made(_aten.add.Scalar, [x, value], {}).dtype for value in (1, 1.0, True, 1, 1.0)]
    assert found == [torch.int64, torch.float32, torch.int64, torch.int64, torch.float32]


def test_a_view_stays_one_and_what_is_made_is_new() -> None:
    x = torch.empty((2, 3, 4), device="meta")
    for _ in range(2):
        assert made(_aten.t.default, [x[0]], {}).untyped_storage()._cdata == x.untyped_storage()._cdata
        assert made(_aten.zero_.default, [x], {}) is x
    one, other = (made(_aten.neg.default, [x], {}) for _ in range(2))
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


def test_the_default_type_is_no_secret() -> None:
    def zeros() -> torch.dtype:
        return made(_aten.zeros.default, [[2]], {"device": torch.device("meta")}).dtype

    assert zeros() == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert zeros() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_refusal_is_not_remembered_as_a_result() -> None:
    one, other = torch.empty((2, 3), device="meta"), torch.empty((4, 5), device="meta")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            made(_aten.mm.default, [one, other], {})


def test_what_values_decide_is_asked_again() -> None:
    for values in ([0, 1], [1, 1]):
        assert made(_aten.nonzero.default, [torch.tensor(values)], {}).shape == (sum(values), 1)
        assert made(_aten._local_scalar_dense.default, [torch.tensor(sum(values))], {}) == sum(values)


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_made, "_known", {})
    monkeypatch.setattr(_made, "_MOST", 8)
    for side in range(1, 30):
        x = torch.empty((side, 3), device="meta")
        assert made(_aten.neg.default, [x], {}).shape == (side, 3)
        assert len(_made._known) <= 8
