"""What is fused, what must not be, and that it changes no result."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinytl.compiler.again import Placed, stretches
from tinytl.compiler.capture import capture
from tinytl.compiler.fuse_backward import fuse_backward, sink_derived
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.order import order_branches
from tinytl.compiler.program import Instruction, Program, instruction
from tinytl.compiler.program import Tensor as ProgramTensor
from tinytl.compiler.row import Row
from tinytl.compiler.step_builder import StepBuilder
from tinytl.methods import METHODS, adapt_

from .test_compiler_capture import LB, photographs
from .test_compiler_differentiate import LABELS, PREPROCESSING, adapted, ops, planned, still_

POINT = {"kh": 1, "kw": 1, "sh": 1, "sw": 1, "top": 0, "left": 0, "bottom": 0, "right": 0, "dh": 1, "dw": 1}
BACK = {**POINT, "groups": 1, "depthwise": 0, "slope": 0.0}
LINEAR = {"lo": float("-inf"), "hi": float("inf"), "slope": 0.0}


class Residual(nn.Module):
    """Two blocks as of ResNet, the second with a convolution on its shortcut; `tap` reads what lies before a sum."""

    def __init__(self, tap: bool = False) -> None:
        super().__init__()
        self.tap = tap
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.three, self.four = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.short = nn.Conv2d(8, 8, 1, stride=2)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.two(F.relu(self.one(x)))
        x = F.relu(y + x)
        x = F.relu(self.four(F.relu(self.three(x))) + self.short(x))
        x = x.mean((2, 3)) + y.mean((2, 3)) if self.tap else x.mean((2, 3))
        return self.classifier(x)


def residual(tap: bool, name: str = "ft-full") -> Program:
    torch.manual_seed(0)
    model = Residual(tap)
    adaptation = adapt_(model, METHODS[name], resolution=33, classifier="classifier")
    return capture(still_(model), adaptation, PREPROCESSING)


@pytest.mark.parametrize("tap", [False, True])
def test_sums_and_activations_become_part_of_convolutions(tap: bool) -> None:
    captured = residual(tap)
    plain, fused = (planned(captured, fuse=fuse) for fuse in (False, True))
    assert Counter(ops(plain, "evaluate"))["add"] == 2 + tap
    found = Counter(ops(fused, "evaluate"))
    # what somebody else reads, too, stays a tensor, and so does the sum behind it
    assert (found["add"], found["activation"]) == ((1 + 1, 0) if tap else (0, 0))
    on_top = [one for one in fused.streams["evaluate"] if one.op == "conv" and one.operand("residual") is not None]
    assert [one.layer.rpartition(".")[2] for one in on_top] == (["four"] if tap else ["two", "four"])
    assert all(one.attributes["lo"] == 0.0 for one in on_top)


@pytest.mark.parametrize("name", ["tinytl-b", "ft-full"])
@pytest.mark.parametrize("tap", [False, True])
def test_fusion_changes_no_result(tap: bool, name: str) -> None:
    captured = residual(tap, name)
    photos = photographs(3, 33)
    found = []
    for fuse in (False, True):
        interpreter = Interpreter(planned(captured, fuse=fuse), torch.float64)
        logits = interpreter.evaluate(photos)
        loss, _ = interpreter.step(photos, LABELS, 1e-2)
        found.append({"logits": logits, "loss": torch.tensor(loss), **interpreter.learned()})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-11)


def test_backward_of_biases_is_a_chain_of_convolutions() -> None:
    plain, fused = (planned(adapted("bn", "tinytl-b")[1], fuse=fuse) for fuse in (False, True))
    before, after = (Counter(ops(program, phase="backward")) for program in (plain, fused))
    assert before["conv_dx"] == after["conv_dx"]
    assert before["act_grad"] > 1
    assert before["bias_grad"] > 1
    # the last activation stands behind a pooling; the classifier's gradient comes from the loss
    assert (after["act_grad"], after["bias_grad"], after["add"]) == (1, 1, 0)
    masked = [one for one in fused.streams["micro"] if one.op == "conv_dx" and one.operand("mask") is not None]
    assert len(masked) == before["act_grad"] - 1


def test_gradients_of_a_lite_block_meet_on_top_of_each_other() -> None:
    fused = planned(adapted("bn", LB)[1])
    assert "add" not in ops(fused)
    assert any(one.operand("other") is not None for one in fused.streams["micro"] if one.op == "avg_pool_grad")
    assert all(one.operand("residual") is not None for one in fused.streams["micro"] if one.op == "upsample")


def test_masks_that_are_made_again_are_fused_as_well() -> None:
    _, captured = adapted("bn", "tinytl-b")
    every = frozenset(stretches(captured))
    kept, again = (planned(captured, recompute=chosen) for chosen in (frozenset(), every))
    assert Counter(ops(kept, phase="backward")) == Counter(ops(again, phase="backward"))
    assert "conv" in ops(again, phase="again")


# ---------------------------------------------------------------- by hand


class Hand:
    """Images of given channels, and instructions over them by name."""

    def __init__(self, **channels: int) -> None:
        self.builder = StepBuilder(
            [ProgramTensor(name, "activation", "f32", (4, 4, c), "micro") for name, c in channels.items()]
            + [ProgramTensor("mask", "mask", "bits", (4, 4, 8), "micro")]
            + [ProgramTensor(name, "gradient", "f32", (8,)) for name in ("bias", "bias2")]
            + [ProgramTensor(name, "constant", "f32", (8, 1, 1, 8)) for name in ("w", "v")]
            + [ProgramTensor(name, "derived", "f32", (8, 1, 1, 8)) for name in ("s", "t")]
        )
        self.at = {tensor.name: number for number, tensor in enumerate(self.builder.tensors)}

    def run(self, op: str, attributes: dict[str, Any] | None = None, phase: str = "backward", **by: str) -> Instruction:
        return instruction(op, attributes, phase=phase, **self.numbers(by))

    def numbers(self, by: dict[str, str]) -> dict[str, Any]:
        return {operand: self.at[name] for operand, name in by.items()}

    def names(self, row: list[Instruction]) -> list[str]:
        tensors = self.builder.tensors
        return [f"{one.op} {'+'.join(tensors[n].name for n in one.makes())}" for one in row]


def waiting(grad: int) -> tuple[Hand, list[Instruction]]:
    """A gradient of so many channels through a convolution; its mask is made again behind that."""
    hand = Hand(g=grad, x=8, y=8, dy=8, dz=8, other=8, sum=8)
    row = [
        hand.run("conv_dx", BACK, grad="g", w="w", y="dy"),
        hand.run("conv", {**POINT, "groups": 1, "depthwise": 0, **LINEAR}, "again", x="x", w="w", y="y", mask="mask"),
        hand.run("act_grad", {"slope": 0.25}, grad="dy", mask="mask", y="dz", bias="bias"),
    ]
    return hand, row


def test_a_convolution_waits_for_its_mask_where_its_input_is_no_larger() -> None:
    hand, row = waiting(8)
    found = fuse_backward(hand.builder, row)
    assert hand.names(found) == ["conv y+mask", "conv_dx dz"]
    assert found[1].attributes["slope"] == 0.25
    assert found[1].operand("bias") == hand.at["bias"]
    assert found[1].operand("mask") == hand.at["mask"]
    hand, row = waiting(9)
    assert hand.names(fuse_backward(hand.builder, row)) == hand.names(row)


def test_what_is_read_twice_is_not_fused() -> None:
    hand, row = waiting(8)
    row.append(hand.run("bias_grad", grad="dy", bias="bias2"))
    found = fuse_backward(hand.builder, row)
    assert hand.names(found) == ["conv_dx dy", "conv y+mask", "act_grad dz"]
    assert found[0].operand("bias") == hand.at["bias2"]  # a sum of what it makes, whoever else reads that


def test_a_sum_needs_the_other_part_before() -> None:
    hand, row = waiting(8)
    add = hand.run("add", LINEAR, a="dz", b="other", y="sum")
    late = hand.run("max_pool_grad", POINT, grad="g", which="mask", y="other")
    # `other` is made behind the convolution, which has a mask by then: nothing takes the sum
    assert hand.names(fuse_backward(hand.builder, [*row, late, add]))[-1] == "add sum"
    hand, _ = waiting(8)
    first = hand.run("max_pool_grad", POINT, grad="g", which="mask", y="other")
    second = hand.run("conv_dx", BACK, grad="g", w="w", y="dy")
    add = hand.run("add", LINEAR, a="other", b="dy", y="sum")
    (_, found) = fuse_backward(hand.builder, [first, second, add])
    assert (found.operand("other"), found.operand("y")) == (hand.at["other"], hand.at["sum"])
    found = fuse_backward(hand.builder, [second, first, add])
    assert hand.names(found) == ["conv_dx dy", "max_pool_grad other", "add sum"]


def test_derived_weights_sink_to_their_use_one_behind_the_other() -> None:
    hand = Hand(g=8, y=8, z=8)
    row = [
        hand.run("standardize", {"eps": 1e-5, "depthwise": 0}, w="w", y="s"),
        hand.run("scale_weight", {"depthwise": 0}, w="s", rstd="bias", y="t"),
        hand.run("conv_dx", BACK, grad="g", w="w", y="y"),
        hand.run("conv_dx", BACK, grad="y", w="t", y="z"),
    ]
    assert hand.names(sink_derived(hand.builder, row)) == ["conv_dx y", "standardize s", "scale_weight t", "conv_dx z"]


def test_branches_of_one_size_are_ordered_by_what_is_alive() -> None:
    """The wide branch first: what both begin with is smaller than the other result that would wait."""
    conv = {**POINT, "groups": 1, "depthwise": 0, **LINEAR}
    hand = Hand(x=4, a=8, wide=64, b=8, y=8)
    narrow = [hand.run("conv", conv, "forward", x="x", w="w", y="a")]
    wide = [
        hand.run("conv", conv, "forward", x="x", w="w", y="wide"),
        hand.run("conv", conv, "forward", x="wide", w="w", y="b"),
    ]
    meet = hand.run("add", LINEAR, "forward", a="a", b="b", y="y")
    for order in ([*narrow, *wide, meet], [*wide, *narrow, meet]):
        found = order_branches(hand.builder, [Placed(one, 0) for one in order], hand.at["y"])
        assert hand.names([one for one, _ in found]) == ["conv wide", "conv b", "conv a", "add y"]


def test_a_row_knows_makers_and_readers() -> None:
    hand, instructions = waiting(8)
    row = Row(instructions)
    assert row.maker(hand.at["dy"]) == 0
    assert row.maker(hand.at["g"]) is None
    assert row.read_once(hand.at["dy"])
    row.put(2, None)
    assert row.maker(hand.at["dz"]) is None
    assert not row.read_once(hand.at["dy"])
    row.put(0, instructions[2])
    assert row.maker(hand.at["dz"]) == 0
    assert (len(row), row[2]) == (3, None)
