"""A normalization's scale beside the weight: where it is put there, where it is not, and that it changes no result."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tinytl.compiler.again import stretches
from tinytl.compiler.arena import lay_out
from tinytl.compiler.differentiate import training_program
from tinytl.compiler.fuse_scaled import Scales
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.program import Instruction, Program, Tensor, instruction
from tinytl.compiler.step_builder import StepBuilder
from tinytl.methods import METHODS

from .test_interpreter_steps import OPTIONS, Pair, small

POINT = {"kh": 1, "kw": 1, "sh": 1, "sw": 1, "top": 0, "left": 0, "bottom": 0, "right": 0, "dh": 1, "dw": 1}
CONV = {**POINT, "groups": 1, "depthwise": 0, "lo": float("-inf"), "hi": float("inf"), "slope": 0.0}
BACK = {**POINT, "groups": 1, "depthwise": 0, "slope": 0.0}
SCALED = {"depthwise": 0}


@pytest.fixture(scope="module", params=["tinytl-l+b", "ft-full"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return small("bn", METHODS[request.param])


def steps(pair: Pair, **options: Any) -> tuple[Program, Program]:
    """The step without the pass, and with it."""
    chosen = dataclasses.replace(OPTIONS, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scales, "fuse", lambda _, stream: list(stream))
        plain = training_program(pair.captured, chosen)
    return plain, training_program(pair.captured, chosen)


def scaled_weights(program: Program, stream: str) -> list[str]:
    """Names of what is made by multiplication and is more than one vector."""
    made = [program.tensors[n] for one in program.streams[stream] if one.op == "scale_weight" for n in one.makes()]
    return [tensor.name for tensor in made if tensor.shape[:2] != (1, 1) or len(tensor.shape) != 3]


def test_no_stream_of_a_step_makes_a_scaled_weight(pair: Pair) -> None:
    plain, fused = steps(pair)
    for stream in ("micro", "evaluate"):
        assert scaled_weights(plain, stream)
        assert not scaled_weights(fused, stream)
        trained = [
            one
            for one in fused.streams[stream]
            if one.op in ("conv", "conv_dx") and fused.tensors[one.operand("w") or 0].role == "trained"
        ]
        # behind the classifier stands no normalization
        bare = {fused.tensors[one.operand("w") or 0].name for one in trained if one.operand("table") is None}
        assert bare == {"classifier.weight"}
        depthwise = any(fused.tensors[n].name.endswith("depthwise.conv.weight") for n in fused.trained)
        assert {one.attributes["depthwise"] for one in trained} == ({0, 1} if depthwise else {0})
    # what the sum becomes, once a step, is as before
    assert [one.op for one in plain.streams["finish"]] == [one.op for one in fused.streams["finish"]]


def test_the_arena_holds_no_more(pair: Pair) -> None:
    for again in (frozenset(), frozenset(stretches(pair.captured))):
        plain, fused = map(lay_out, steps(pair, recompute=again))
        assert plain.arena_bytes is not None
        assert fused.arena_bytes is not None
        assert fused.arena_bytes <= plain.arena_bytes


def test_no_result_changes(pair: Pair) -> None:
    images, labels = pair.batch(3)
    found: list[dict[str, Any]] = []
    for program in steps(pair, updates="backward", micro_batch=OPTIONS.batch):
        ours = Interpreter(program)
        logits = ours.evaluate(images)
        loss, _ = ours.step(images, labels, 1e-2)
        found.append({**ours.learned(), "loss": torch.tensor(loss), "logits": logits})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-8, atol=1e-11, msg=name)


# ---------------------------------------------------------------- by hand


class Hand:
    """Instructions over tensors of 8 channels, by name."""

    def __init__(self) -> None:
        vectors = {name: Tensor(name, "constant", "f32", (8,)) for name in ("rstd", "other rstd", "table")}
        weights = [Tensor(name, "derived", "f32", (8, 1, 1, 8)) for name in ("standard", "scaled", "twice")]
        self.builder = StepBuilder(
            [
                *vectors.values(),
                *weights,
                Tensor("gamma", "trained", "f32", (8,)),
                Tensor("w", "trained", "f32", (8, 1, 1, 8)),
                Tensor("codes", "constant", "i8", (8, 1, 1, 8)),
                *(Tensor(name, "activation", "f32", (4, 4, 8), "micro") for name in ("x", "y", "z", "g", "dx")),
            ]
        )
        self.at = {tensor.name: number for number, tensor in enumerate(self.builder.tensors)}

    def run(self, op: str, attributes: dict[str, Any], **by: str) -> Instruction:
        given: dict[str, Any] = {operand: self.at[name] for operand, name in by.items()}
        return instruction(op, attributes, **given)

    def operands(self, one: Instruction) -> dict[str, str]:
        """Names of an instruction's tensors."""
        tensors = self.builder.tensors
        named = zip(one.kind.operands, one.operands, strict=True)
        return {name: tensors[number].name for (name, _, _), number in named if number is not None}


def test_a_frozen_scale_needs_no_instruction() -> None:
    hand = Hand()
    scales = Scales(hand.builder)
    (found,) = scales.fuse(
        [
            hand.run("scale_weight", SCALED, w="w", rstd="rstd", y="scaled"),
            hand.run("conv", CONV, x="x", w="scaled", y="y"),
        ]
    )
    assert hand.operands(found) == {"x": "x", "w": "w", "table": "rstd", "y": "y"}
    assert scales.values == {}


def test_a_scale_that_trains_is_made_of_ones_and_serves_all_that_read_the_weight() -> None:
    hand = Hand()
    scales = Scales(hand.builder)
    standardize = hand.run("standardize", {"eps": 1e-5, "depthwise": 0}, w="w", y="standard")
    scale, conv, back = scales.fuse(
        [
            standardize,
            hand.run("scale_weight", SCALED, w="standard", gamma="gamma", rstd="rstd", y="scaled"),
            hand.run("conv", CONV, x="x", w="scaled", y="y"),
            hand.run("conv_dx", BACK, grad="g", w="scaled", y="dx"),
        ]
    )[1:]
    made = hand.operands(scale)["y"]
    assert hand.operands(scale) == {"w": "ones 8", "gamma": "gamma", "rstd": "rstd", "y": made}
    assert scale.attributes == {"depthwise": 1}
    for one in (conv, back):
        assert (hand.operands(one)["w"], hand.operands(one)["table"]) == ("standard", made)
    ((number, ones),) = scales.values.items()
    assert hand.builder.tensors[number] == Tensor("ones 8", "constant", "f32", (1, 1, 8))
    assert torch.equal(ones, torch.ones(1, 1, 8))
    # another layer's, of as many channels: the same ones
    scales.fuse([hand.run("scale_weight", SCALED, w="w", gamma="gamma", rstd="other rstd", y="scaled")])
    assert list(scales.values) == [number]


def test_what_others_read_and_what_has_a_table_is_left() -> None:
    hand = Hand()
    conv = hand.run("conv", CONV, x="x", w="scaled", y="y")
    scale = hand.run("scale_weight", SCALED, w="w", rstd="rstd", y="scaled")
    coded = hand.run("scale_weight", SCALED, w="codes", table="table", rstd="rstd", y="scaled")
    once_more = hand.run("scale_weight", SCALED, w="scaled", rstd="other rstd", y="twice")
    tabled = conv.with_operands(table=hand.at["table"])
    as_image = hand.run("conv", CONV, x="scaled", w="scaled", y="y")
    as_residual = hand.run("conv", CONV, x="x", w="w", residual="scaled", y="z")
    for stream in ([coded, conv], [scale, tabled], [scale, as_image], [scale, conv, as_residual]):
        assert Scales(hand.builder).fuse(stream) == stream
    # a product of a product: the second scale is beside the first product, which stays
    found = Scales(hand.builder).fuse([scale, once_more, hand.run("conv", CONV, x="x", w="twice", y="z"), conv])
    assert found[0] == scale
    assert hand.operands(found[1]) == {"x": "x", "w": "scaled", "table": "other rstd", "y": "z"}
    assert found[2:] == [conv]
