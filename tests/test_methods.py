"""Methods: names, composition, what is refused, and the JSON form that runs and deltas store."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytl.errors import InputError, UnknownNameError
from tinytl.methods import (
    DESCRIPTIONS,
    FT_FULL,
    FT_LAST,
    METHODS,
    TINYTL_B,
    TINYTL_L,
    TINYTL_LB,
    Bias,
    Full,
    LastBlocks,
    LiteResidual,
    Method,
    Norm,
    Part,
    method,
)

PARTS = st.one_of(
    st.just(Bias()),
    st.just(Norm()),
    st.just(Full()),
    st.builds(LiteResidual, kernel_size=st.sampled_from([1, 3, 5, 7]), groups=st.integers(1, 8)),
    st.builds(LastBlocks, count=st.integers(0, 30)),
)
METHODS_OF_ANY_PARTS = st.lists(PARTS, unique_by=type).map(lambda parts: Method(tuple(parts)))


def test_the_six_of_the_paper() -> None:
    assert list(METHODS) == ["ft-last", "ft-norm+last", "ft-full", "tinytl-b", "tinytl-l", "tinytl-l+b"]
    assert set(DESCRIPTIONS) == set(METHODS)
    assert len(set(METHODS.values())) == 6
    for name, one in METHODS.items():
        assert one.name == name
        assert method(name) == one
        assert method(name, last_blocks=0) == one


def test_composition() -> None:
    assert Bias() + LiteResidual() == LiteResidual() + Bias() == TINYTL_LB == TINYTL_B + TINYTL_L
    assert hash(Bias() + LiteResidual()) == hash(LiteResidual() + Bias())
    assert Bias() + FT_LAST == TINYTL_B == FT_LAST + Bias() == Bias() + Bias()
    assert TINYTL_LB != TINYTL_B
    assert Bias() != TINYTL_B
    assert LiteResidual(3) + Bias() != TINYTL_LB
    assert TINYTL_LB.part(LiteResidual) == LiteResidual()
    assert TINYTL_B.part(LiteResidual) is None


def test_names_tell_the_last_blocks() -> None:
    assert method("tinytl-l+b", last_blocks=2).name == "tinytl-l+b+last-blocks(2)"
    assert method("ft-last", last_blocks=2).name == "last-blocks(2)"
    assert (LiteResidual() + Norm() + LastBlocks(1)).name == "norm+lite-residual+last-blocks(1)"
    assert (TINYTL_B + LastBlocks(0)).name == "tinytl-b"


@pytest.mark.parametrize(
    "make",
    [
        lambda: LiteResidual(kernel_size=4),
        lambda: LiteResidual(kernel_size=0),
        lambda: LiteResidual(kernel_size=-3),
        lambda: LiteResidual(groups=0),
        lambda: LastBlocks(-1),
        lambda: method("tinytl-b", last_blocks=-2),
        lambda: LastBlocks(1) + LastBlocks(2),
        lambda: TINYTL_LB + LiteResidual(3),
        lambda: Method((Bias(), Bias())),
        lambda: Method((Part(),)),
        lambda: Method(("bias",)),  # type: ignore[arg-type]
    ],
)
def test_bad_values_are_refused(make: Any) -> None:
    with pytest.raises(InputError, match="expected"):
        make()


@pytest.mark.parametrize(("name", "near"), [("tinytl-lb", "tinytl-l"), ("ft_last", "ft-last"), ("ful", "full")])
def test_an_unknown_name_gives_a_near_miss_and_all_names(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean '{near}") as caught:
        method(name)
    assert all(known in str(caught.value) for known in METHODS)
    with pytest.raises(UnknownNameError) as caught:
        method("zzz")
    assert "did you mean" not in str(caught.value)


@given(METHODS_OF_ANY_PARTS)
def test_json_round_trip(one: Method) -> None:
    assert Method.from_json(json.loads(json.dumps(one.to_json()))) == one


@given(METHODS_OF_ANY_PARTS, METHODS_OF_ANY_PARTS)
def test_equal_means_equal_parts(a: Method, b: Method) -> None:
    assert (a == b) == (set(a.parts) == set(b.parts))
    if a == b:
        assert hash(a) == hash(b)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["bias", "part"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["part", "count", "x"]), inner),
    max_leaves=6,
)


@given(JSON)
def test_hostile_json_is_refused_as_input(data: Any) -> None:
    try:
        found = Method.from_json(data)
    except InputError:
        return
    assert Method.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        "bias",
        ["bias"],
        [{}],
        [{"part": []}],
        [{"part": {}}],
        [{"part": None}],
        [{"part": "biass"}],
        [{"part": "bias", "x": 1}],
        [{"part": "bias"}, {"part": "bias"}],
        [{"part": "last-blocks", "count": True}],
        [{"part": "last-blocks", "count": 1.0}],
        [{"part": "last-blocks", "count": -1}],
        [{"part": "last-blocks", "count": "2"}],
        [{"part": "lite-residual", "kernel_size": 2}],
    ],
)
def test_json_of_another_form(data: Any) -> None:
    with pytest.raises(InputError):
        Method.from_json(data)


def test_missing_knobs_take_their_defaults() -> None:
    assert Method.from_json([{"part": "lite-residual"}]) == TINYTL_L
    assert Method.from_json([]) == FT_LAST
    assert Method.from_json([{"part": "full"}]) == FT_FULL
