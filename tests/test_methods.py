"""Methods: names, composition, what is refused, and the JSON form that runs and deltas store."""

from __future__ import annotations

import json
from typing import Any

import numpy
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
    BlockBias,
    Full,
    LastBlocks,
    LiteModules,
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
    st.sets(st.integers(0, 40)).map(lambda blocks: BlockBias(tuple(blocks))),
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([1, 3, 5, 7]), st.integers(1, 8), st.integers(1, 100)),
        unique_by=lambda module: module[0],
    ).map(lambda modules: LiteModules(tuple(modules))),
)
SINGLY = {BlockBias: Bias, LiteModules: LiteResidual}
METHODS_OF_ANY_PARTS = st.lists(PARTS, unique_by=lambda part: SINGLY.get(type(part), type(part))).map(
    lambda parts: Method(tuple(parts))
)


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
        lambda: Bias() + BlockBias((1,)),
        lambda: TINYTL_L + LiteModules(((1, 3, 2, 100),)),
        lambda: BlockBias((-1,)),
        lambda: BlockBias((1, 1)),
        lambda: BlockBias((10_000,)),
        lambda: BlockBias((0.5,)),  # type: ignore[arg-type]
        lambda: LiteModules(((0, 3, 2, 100),)),
        lambda: LiteModules(((1, 3, 2, 100), (1, 5, 2, 100))),
        lambda: LiteModules(((1, 4, 2, 100),)),
        lambda: LiteModules(((1, 3, 0, 100),)),
        lambda: LiteModules(((1, 3, 2, 0),)),
        lambda: LiteModules(((1, 3, 2, 101),)),
        lambda: LiteModules(((1, 3, 2),)),  # type: ignore[arg-type]
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
def test_a_name_says_all_that_a_method_is(one: Method) -> None:
    assert method(one.name) == one
    assert Method(tuple(reversed(one.parts))).name == one.name
    assert method(one.name).name == one.name


def test_parts_are_kept_in_order() -> None:
    assert BlockBias((7, 0, 2, 1)).blocks == (0, 1, 2, 7)
    assert BlockBias((7, 0, 2, 1)) == BlockBias((0, 1, 2, 7))
    assert LiteModules(((2, 3, 4, 50), (1, 5, 2, 100))).modules == ((1, 5, 2, 100), (2, 3, 4, 50))
    indices = BlockBias(tuple(numpy.arange(2))).blocks  # type: ignore[arg-type]
    assert [type(index) for index in indices] == [int, int]
    assert Method((BlockBias(()), LiteModules(()), LastBlocks(0))).parts == ()


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("bias(0-3.7)", Method((BlockBias((0, 1, 2, 3, 7)),))),
        ("bias(7.0-3)", Method((BlockBias((0, 1, 2, 3, 7)),))),
        ("lite(1:k5g2.2:k3g4w50)", Method((LiteModules(((1, 5, 2, 100), (2, 3, 4, 50))),))),
        ("lite(4-5:k3g4w50)", Method((LiteModules(((4, 3, 4, 50), (5, 3, 4, 50))),))),
        ("lite(1:k5g2w100)", Method((LiteModules(((1, 5, 2, 100),)),))),
        ("bias(0-3.7)+lite(1:k5g2)", BlockBias((0, 1, 2, 3, 7)) + LiteModules(((1, 5, 2, 100),))),
        ("tinytl-b+last-blocks(2)", Bias() + LastBlocks(2)),
        ("ft-norm+last+bias", Norm() + Bias()),
        ("tinytl-l+bias(1)", LiteResidual() + BlockBias((1,))),
        ("lite-residual+bias", TINYTL_LB),
        ("lite-residual(k3g4)", Method((LiteResidual(3, 4),))),
        ("tinytl-b+tinytl-l", TINYTL_LB),
        ("full", FT_FULL),
        ("last-blocks(0)", FT_LAST),
    ],
)
def test_a_method_by_its_text(text: str, one: Method) -> None:
    assert method(text) == one
    if one.part(LastBlocks) is None:
        assert method(text, last_blocks=3) == one + LastBlocks(3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bias(3-1)", r"'bias\(3-1\)' cannot be read: expected .*bias\(0-3\.7\)"),
        ("bias()", "cannot be read"),
        ("bias(1,2)", "cannot be read"),
        ("bias(1..2)", "cannot be read"),
        ("bias(-1)", "cannot be read"),
        ("bias(٣)", "cannot be read"),
        ("bias(1", "cannot be read"),
        ("bias(1))", "cannot be read"),
        ("bias(0-99999999)", "cannot be read"),
        ("bias(" + "9" * 5000 + ")", "cannot be read"),
        ("bias(1.1)", "block 1 named twice"),
        ("norm(1)", "cannot be read"),
        ("lite", r"cannot be read: expected lite\(1:k5g2"),
        ("lite(1)", "cannot be read"),
        ("lite(1:k5)", "cannot be read"),
        ("lite(1:g2k5)", "cannot be read"),
        ("lite(0:k5g2)", "first block, 0, gets none"),
        ("lite(1:k4g2)", "kernel size 4: expected an odd number"),
        ("lite(1:k5g0)", "groups 0: expected 1 or more"),
        ("lite(1:k5g2w0)", "width 0 %: expected 1 to 100"),
        ("lite(1:k5g2w101)", "width 101 %: expected 1 to 100"),
        ("last-blocks", "cannot be read"),
        ("last-blocks(2.3)", "cannot be read"),
        ("lite-residual(5)", "cannot be read"),
        ("bias+biass", "unknown method part 'biass': did you mean 'bias'"),
        ("tinytl-l+", "unknown method part ''"),
        ("bias +norm", "unknown method part 'bias '"),
        ("", "unknown method ''"),
        ("bias+bias(1)", r"method has bias and bias\(1\): expected one of the two"),
        ("tinytl-l+lite(1:k3g2)", r"method has lite-residual and lite\(1:k3g2\): expected one"),
        ("bias(1)+bias(2)", "two parts of kind BlockBias"),
    ],
)
def test_a_text_that_cannot_be_read(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        method(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.text(st.sampled_from("0123bias()-.:kgwlte+"), max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = method(text)
    except InputError:
        return
    assert method(found.name) == found


@given(METHODS_OF_ANY_PARTS)
def test_json_round_trip(one: Method) -> None:
    assert Method.from_json(json.loads(json.dumps(one.to_json()))) == one


@given(METHODS_OF_ANY_PARTS, METHODS_OF_ANY_PARTS)
def test_equal_means_equal_parts(a: Method, b: Method) -> None:
    assert (a == b) == (set(a.parts) == set(b.parts))
    if a == b:
        assert hash(a) == hash(b)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["bias", "part", "block-bias"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["part", "count", "blocks", "x"]), inner)
    ),
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
        [{"part": "lite-residual", "kernel_size": [3]}],
        [{"part": "block-bias"}],
        [{"part": "block-bias", "blocks": 3}],
        [{"part": "block-bias", "blocks": [True]}],
        [{"part": "block-bias", "blocks": [1.0]}],
        [{"part": "block-bias", "blocks": [[1]]}],
        [{"part": "block-bias", "blocks": [1, 1]}],
        [{"part": "block-bias", "blocks": "1"}],
        [{"part": "lite-modules", "modules": [1, 5, 2, 100]}],
        [{"part": "lite-modules", "modules": [[1, 5, 2]]}],
        [{"part": "lite-modules", "modules": [[1, 5, 2, None]]}],
        [{"part": "lite-modules", "modules": [[0, 5, 2, 100]]}],
        [{"part": "lite-modules", "modules": [[10**9, 5, 2, 100]]}],
        [{"part": "bias"}, {"part": "block-bias", "blocks": [1]}],
    ],
)
def test_json_of_another_form(data: Any) -> None:
    with pytest.raises(InputError):
        Method.from_json(data)


def test_missing_knobs_take_their_defaults() -> None:
    assert Method.from_json([{"part": "lite-residual"}]) == TINYTL_L
    assert Method.from_json([]) == FT_LAST
    assert Method.from_json([{"part": "full"}]) == FT_FULL
