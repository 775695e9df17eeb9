"""The step that the compiler makes: gradients as autograd has them, and nothing in it that nobody needs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinytl.backbones import BACKBONES, Preprocessing
from tinytl.backbones._inverted_residual import InvertedResidualNet
from tinytl.compiler.again import stretches
from tinytl.compiler.capture import capture
from tinytl.compiler.differentiate import training_program
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.program import Instruction, Program, instruction
from tinytl.compiler.program import Tensor as ProgramTensor
from tinytl.compiler.step_options import StepOptions
from tinytl.engine import run_step
from tinytl.methods import METHODS, LastBlocks, adapt_

from .pairs import NAMES
from .test_adapt import SPECS, VARIANTS, small_network
from .test_compiler_capture import LB, backbone, opened_, photographs

PREPROCESSING = Preprocessing(33, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)
LABELS = torch.tensor([1, 3, 4])
PLAIN_SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0}


def still_(model: nn.Module) -> nn.Module:
    """In training mode without dropout, in float64, its lite modules alive."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return opened_(model.double()).train()


@functools.cache
def adapted(variant: str, name: str, last: int = 0) -> tuple[nn.Module, Program]:
    """A small network and its captured program."""
    model = small_network(*VARIANTS[variant])
    adaptation = adapt_(model, METHODS[name] + LastBlocks(last), resolution=33)
    return still_(model), capture(model, adaptation, PREPROCESSING)


@functools.cache
def wide(name: str) -> Program:
    """The captured program of a small network with tensors large enough for 8 bits; its values are float32."""
    torch.manual_seed(0)
    model = InvertedResidualNet(SPECS, head_channels=512, num_classes=10)
    adaptation = adapt_(model, METHODS[name], resolution=33)
    return capture(model, adaptation, PREPROCESSING)


def planned(captured: Program, **options: Any) -> Program:
    chosen = {"batch": 3, "micro_batch": 3, "evaluate_images": 2}
    return training_program(captured, StepOptions(**{**chosen, **options}))


def seen(photos: Tensor, preprocessing: Preprocessing = PREPROCESSING) -> Tensor:
    """What the network is given."""
    mean, std = (torch.tensor(three, dtype=torch.float64) for three in (preprocessing.mean, preprocessing.std))
    return ((photos.double() / 255.0 - mean) / std).permute(0, 3, 1, 2)


def autograd(model: nn.Module, x: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Mean loss, and the gradient of each parameter that trains."""
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), LABELS, label_smoothing=0.1)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return loss.item(), found


def stepped(program: Program, photos: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Mean loss, and how far each parameter goes in a step of plain SGD at rate 1: its gradient."""
    interpreter = Interpreter(program, torch.float64)
    before = interpreter.learned()
    loss, _ = interpreter.step(photos, LABELS, 1.0)
    after = interpreter.learned()
    return loss / len(LABELS), {name: before[name] - after[name] for name in before}


def assert_agrees(program: Program, photos: Tensor, loss: float, expected: dict[str, Tensor]) -> None:
    found_loss, found = stepped(program, photos)
    assert found_loss == pytest.approx(loss, rel=1e-11)
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        scale = grad.abs().max().clamp(min=1e-6 * largest)
        torch.testing.assert_close(found[name] / scale, grad.reshape(found[name].shape) / scale, rtol=0, atol=1e-10)


def ways(captured: Program) -> list[dict[str, Any]]:
    """Ways to take one and the same step."""
    every = frozenset(stretches(captured))
    some = frozenset(number for number in every if number % 3)
    return [
        {"fuse": False, "micro_batch": 1},
        {"recompute": every, "joined": every & {1, 2}, "updates": "backward"},
        {"recompute": some, "micro_batch": 2},
    ]


# ---------------------------------------------------------------- what is computed


QUICK = [("bn", name, 0) for name in METHODS] + [("gn", "tinytl-l+b", 1), ("gn", "ft-full", 0), ("same", "tinytl-b", 0)]
EVERY = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in dict.fromkeys(
        [
            *itertools.product(sorted(VARIANTS), sorted(METHODS), (0,)),
            *itertools.product(sorted(VARIANTS), ("ft-last", "tinytl-b"), (1,)),
            *QUICK,
        ]
    )
]


@pytest.mark.parametrize(("variant", "name", "last"), EVERY)
def test_gradients_of_every_method(variant: str, name: str, last: int) -> None:
    model, captured = adapted(variant, name, last)
    photos = photographs(3, 33)
    loss, expected = autograd(model, seen(photos))
    for way in ways(captured):
        program = planned(captured, **PLAIN_SGD, **way)
        assert_sound(program)
        assert_agrees(program, photos, loss, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name in NAMES for norm in BACKBONES[name].norms])
def test_gradients_of_every_backbone(name: str, norm: str) -> None:
    """At 48 pixels: batch norm with all of it run again, group norm with some of it and in pieces."""
    model = backbone(name, norm)
    adaptation = adapt_(model, METHODS[LB], resolution=48)
    preprocessing = dataclasses.replace(PREPROCESSING, resolution=48)
    captured = capture(still_(model), adaptation, preprocessing)
    photos = photographs(3, 48)
    loss, expected = autograd(model, seen(photos, preprocessing))
    program = planned(captured, **PLAIN_SGD, **ways(captured)[2 if norm == "gn" else 1])
    assert_sound(program)
    assert_agrees(program, photos, loss, expected)


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_steps_are_those_of_the_lab(optimizer: str, steps: int) -> None:
    """In pieces, in backward, and with momentum or Adam's averages: the parameters after each are the lab's."""
    model, captured = adapted("gn", LB)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    made: Any = {
        "adam": lambda: torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.01),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.01),
    }
    theirs = made[optimizer]()
    options = {"optimizer": optimizer, "weight_decay": 0.01}
    every = frozenset(stretches(captured))
    programs = [
        planned(captured, **options, micro_batch=2),
        planned(captured, **options, recompute=every, updates="backward"),
    ]
    interpreters = [Interpreter(program, torch.float64) for program in programs]
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(steps):
            photos = torch.randint(0, 256, (3, 33, 33, 3), dtype=torch.uint8, generator=generator)
            loss, _ = run_step(model, theirs, [(seen(photos), LABELS)], 3, label_smoothing=0.1)
            for interpreter in interpreters:
                assert interpreter.step(photos, LABELS, 1e-2)[0] / 3 == pytest.approx(loss.item(), rel=1e-8)
        expected = dict(model.named_parameters())
        for interpreter in interpreters:
            for name, value in interpreter.learned().items():
                torch.testing.assert_close(value, expected[name].detach().reshape(value.shape), rtol=1e-7, atol=1e-9)
    finally:
        model.load_state_dict(start)


def test_where_updates_stand_changes_no_bit_of_an_8_bit_state() -> None:
    captured = wide("ft-full")
    options = {"optimizer_bits": 8, "weight_decay": 0.01}
    end, backward = (planned(captured, **options, updates=where) for where in ("end", "backward"))
    assert {"adam", "adam8"} <= {one.op for one in end.streams["finish"]}
    assert not backward.streams["finish"]
    a, b = (Interpreter(program, torch.float32) for program in (end, backward))
    for number in range(3):
        assert a.step(photographs(3, 33), LABELS, 1e-2) == b.step(photographs(3, 33), LABELS, 1e-2), number
    for name, value in a.learned().items():
        assert torch.equal(value, b.learned()[name]), name


# ---------------------------------------------------------------- tensors that are used twice


class Twice(nn.Module):
    """A convolution that is called twice, and an image that three others read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.again(x) + self.side(x) + x)
        y = F.hardswish(self.again(F.max_pool2d(y, 2)))
        return self.classifier(y.mean((2, 3)))


def test_a_layer_that_is_called_twice_adds_up() -> None:
    torch.manual_seed(0)
    model = Twice()
    adaptation = adapt_(model, METHODS["ft-full"], resolution=33, classifier="classifier")
    captured = capture(still_(model), adaptation, PREPROCESSING)
    photos = photographs(3, 33)
    loss, expected = autograd(model, seen(photos))
    for way in ways(captured):
        program = planned(captured, **PLAIN_SGD, **way)
        assert_sound(program)
        assert len(set(program.gradients.values())) == len(expected)
        assert_agrees(program, photos, loss, expected)


POINT = dict(
    zip(
        ("kh", "kw", "sh", "sw", "top", "left", "bottom", "right", "dh", "dw"),
        (1, 1, 1, 1, 0, 0, 0, 0, 1, 1),
        strict=True,
    )
) | {"groups": 1, "depthwise": 0, "lo": float("-inf"), "hi": float("inf"), "slope": 0.0}


def test_one_weight_used_as_it_is_and_standardized_and_scaled() -> None:
    """Three ways to one weight: three sums, which are completed and added before its one update."""
    generator = torch.Generator().manual_seed(1)
    w, gamma, rstd, scale = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 1, 1, 3), (3,), (3,), (3,))
    )
    tensors = [
        ProgramTensor("images", "input", "u8", (2, 2, 3), "batch"),
        ProgramTensor("norm.scale", "constant", "f32", (3,)),
        ProgramTensor("norm.shift", "constant", "f32", (3,)),
        ProgramTensor("w", "trained", "f32", (3, 1, 1, 3)),
        ProgramTensor("gamma", "trained", "f32", (3,)),
        ProgramTensor("rstd", "constant", "f32", (3,)),
        *(ProgramTensor(f"w:{kind}", "derived", "f32", (3, 1, 1, 3)) for kind in ("standard", "both", "scaled")),
        *(ProgramTensor(f"x{n}", "activation", "f32", (2, 2, 3), "micro") for n in range(5)),
        ProgramTensor("logits", "activation", "f32", (1, 1, 3), "batch"),
    ]
    at = {tensor.name: number for number, tensor in enumerate(tensors)}

    def run(op: str, attributes: dict[str, Any] | None = None, **by: str) -> Instruction:
        operands: dict[str, Any] = {operand: at[name] for operand, name in by.items()}
        return instruction(op, attributes, layer="here", block=0, **operands)

    standard, scaled = {"eps": 1e-5, "depthwise": 0}, {"depthwise": 0}
    stream = (
        run("normalize", x="images", scale="norm.scale", shift="norm.shift", y="x0"),
        run("conv", POINT, x="x0", w="w", y="x1"),
        run("standardize", standard, w="w", y="w:standard"),
        run("conv", POINT, x="x1", w="w:standard", y="x2"),
        run("scale_weight", scaled, w="w:standard", gamma="gamma", rstd="rstd", y="w:both"),
        run("conv", POINT, x="x2", w="w:both", y="x3"),
        run("scale_weight", scaled, w="w", gamma="gamma", rstd="rstd", y="w:scaled"),
        run("conv", POINT, x="x3", w="w:scaled", y="x4"),
        run("adaptive_pool", {}, x="x4", y="logits"),
    )
    values = {"norm.scale": scale, "norm.shift": scale, "w": w, "gamma": gamma, "rstd": rstd}
    learned = [
        {"key": "w", "tensor": at["w"], "shape": [3, 3, 1, 1], "layout": "OHWI"},
        {"key": "gamma", "tensor": at["gamma"], "shape": [3], "layout": "as-is"},
    ]
    captured = Program(
        tuple(tensors),
        {"evaluate": stream},
        images=at["images"],
        logits=at["logits"],
        values={at[name]: value for name, value in values.items()},
        meta={"learned": learned},
    )
    photos, labels = photographs(2, 2), torch.tensor([0, 2])
    w, gamma = w.clone().requires_grad_(), gamma.clone().requires_grad_()
    rows = w.view(3, 3)
    deviation = rows.std(1, keepdim=True) + 1e-5
    hat = (rows - rows.mean(1, keepdim=True)) / deviation
    x = photos.double() * scale + scale
    for matrix in (rows, hat, hat * (gamma * rstd)[:, None], rows * (gamma * rstd)[:, None]):
        x = x @ matrix.t()
    F.cross_entropy(x.mean((1, 2)), labels).backward()
    assert w.grad is not None
    assert gamma.grad is not None
    for way in ({}, {"micro_batch": 1}, {"updates": "backward", "recompute": frozenset({0})}):
        chosen: dict[str, Any] = {"batch": 2, "micro_batch": 2, "evaluate_images": 1, "label_smoothing": 0.0, **way}
        program = training_program(captured, StepOptions(**chosen, **PLAIN_SGD))
        assert_sound(program)
        interpreter = Interpreter(program, torch.float64)
        interpreter.step(photos, labels, 1.0)
        found = interpreter.learned()
        torch.testing.assert_close(
            w.detach().view(3, 3) - found["w"].view(3, 3), w.grad.view(3, 3), rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(gamma.detach() - found["gamma"], gamma.grad, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- what is not computed


def assert_sound(program: Program) -> None:
    """Each instruction reads what is there; each value is made once and read; the frozen stay as they are."""
    roles = [tensor.role for tensor in program.tensors]
    assert len({tensor.name for tensor in program.tensors}) == len(program.tensors)
    results = {program.logits, program.metrics, *program.trained}
    there = {n for n, role in enumerate(roles) if role in ("constant", "trained", "state", "input")}
    gradients: set[int] = set()
    for name in ("begin", "micro", "finish", "evaluate"):
        known = there | gradients
        stream = program.streams[name]
        for at, one in enumerate(stream):
            assert known.issuperset(one.reads()), f"{name} {at}: {one}"
            assert all(roles[number] not in ("constant", "input") for number in one.writes())
            assert all(roles[number] != "trained" or one.phase == "update" for number in one.writes())
            assert known.isdisjoint(
                n for n in one.makes() if one.op != "add" and roles[n] not in ("gradient", "metric")
            )
            known.update(one.makes())
            later = {number for more in stream[at + 1 :] for number in more.reads()}
            kept = results | {n for n, role in enumerate(roles) if role in ("gradient", "state")}
            assert not (later | kept).isdisjoint(one.writes()), f"{name} {at}: nobody reads what {one} makes"
            assert (name == "evaluate") <= (one.phase == "forward")
        gradients |= {n for n in known if roles[n] in ("gradient", "metric")}
    for number, grad in program.gradients.items():
        assert roles[number] == "trained"
        assert program.tensors[number].shape == program.tensors[grad].shape


def ops(program: Program, stream: str = "micro", phase: str | None = None) -> list[str]:
    return [one.op for one in program.streams[stream] if phase in (None, one.phase)]


def test_the_classifier_alone_needs_no_backward_but_its_own() -> None:
    program = planned(adapted("bn", "ft-last")[1])
    assert sorted(ops(program, phase="backward")) == ["bias_grad", "conv_dw"]
    assert all(one.operand("mask") is None for one in program.streams["micro"] if one.op == "conv")


@pytest.mark.parametrize("fuse", [False, True])
def test_biases_keep_no_image_and_stop_at_the_first(fuse: bool) -> None:
    program = planned(adapted("bn", "tinytl-b")[1], fuse=fuse)
    stream = program.streams["micro"]
    convolutions = ops(program, phase="forward").count("conv")
    assert ops(program).count("conv_dx") == convolutions - 1  # none for the image
    made = {n for one in stream if one.phase == "forward" for n in one.makes()}
    read = {n for one in stream if one.phase == "backward" for n in one.reads()}
    images = {n for n in made & read if program.tensors[n].dtype == "f32"}
    (classify,) = [one for one in stream if one.op == "conv_dw"]
    (loss,) = [one for one in stream if one.op == "softmax_loss"]
    assert images == {classify.operand("x"), loss.operand("grad")}


def test_what_runs_again_is_not_kept() -> None:
    _, captured = adapted("gn", "tinytl-l+b")
    every = stretches(captured)
    chosen = every[len(every) // 2]
    inside = [one for one, number in zip(captured.streams["evaluate"], every, strict=True) if number == chosen]
    for recompute in (frozenset(), frozenset({chosen})):
        program = planned(captured, recompute=recompute)
        stream = program.streams["micro"]
        names = {program.tensors[n].name for one in stream if one.phase in ("backward", "again") for n in one.reads()}
        kept = {captured.tensors[n].name for one in inside[:-1] for n in one.makes()} & names
        assert bool(kept) == (not recompute)
        masks = {t.name for t in program.tensors if t.role == "mask" and t.name in names and "/again" not in t.name}
        assert bool(masks & {f"{captured.tensors[n].name}/mask" for one in inside for n in one.makes()}) <= (
            not recompute
        )
        layers = {one.layer for one in stream if one.phase == "again" and one.op in ("conv", "group_norm")}
        assert layers <= {one.layer for one in inside}
        assert bool(layers) == bool(recompute)


def test_joined_stretches_keep_nothing_between_them() -> None:
    _, captured = adapted("gn", "tinytl-l+b")
    every = stretches(captured)
    (between,) = {
        n
        for one, number in zip(captured.streams["evaluate"], every, strict=True)
        if number == 1
        for n in one.reads()
        for other, before in zip(captured.streams["evaluate"], every, strict=True)
        if before == 0 and n in other.makes()
    }
    for joined in (frozenset(), frozenset({1})):
        program = planned(captured, recompute=frozenset({0, 1}), joined=joined)
        later = {n for one in program.streams["micro"] if one.phase in ("again", "backward") for n in one.reads()}
        assert (captured.tensors[between].name in {program.tensors[n].name for n in later}) == (not joined)


def test_stretches_are_blocks_and_what_lies_between() -> None:
    _, captured = adapted("bn", LB)
    of_each = stretches(captured)
    blocks = [one.block for one in captured.streams["evaluate"]]
    assert of_each[0] == 0
    assert set(of_each) == set(range(len(set(blocks)) + 1))  # -1 is both the stem and the head
    assert all((a == b) == (x == y) for a, b, x, y in zip(of_each, of_each[1:], blocks, blocks[1:], strict=False))


@pytest.mark.parametrize("name", ["ft-full", LB])
def test_derived_weights_live_for_one_instruction(name: str) -> None:
    program = planned(adapted("gn", name)[1])
    for stream in program.streams.values():
        for at, one in enumerate(stream):
            for number in one.makes():
                if program.tensors[number].role == "derived":
                    readers = [place for place, other in enumerate(stream) if number in other.reads()]
                    between = stream[at + 1 : readers[0]]
                    assert len(readers) == 1
                    assert all(program.tensors[n].role == "derived" for other in between for n in other.makes())


def test_the_lite_branch_comes_first_and_its_gradient_last() -> None:
    program = planned(adapted("bn", LB)[1])
    for phase, lite_first in (("forward", True), ("backward", False)):
        rows: dict[int, list[str]] = {}
        for one in program.streams["micro"]:
            if one.phase == phase and one.op in ("conv", "conv_dx") and one.block > 0:
                rows.setdefault(one.block, []).append("lite" if ".lite." in one.layer else "block")
        assert rows
        for row in rows.values():
            assert row == sorted(row, reverse=lite_first), (phase, row)


# ---------------------------------------------------------------- where things stand


def test_sums_become_0_in_begin_where_micro_batches_share_them() -> None:
    program = planned(adapted("bn", "tinytl-b")[1], micro_batch=1)
    assert ops(program).count("zero") == 0
    zeroed = {n for one in program.streams["begin"] for n in one.makes()}
    assert zeroed == {program.metrics, *program.gradients.values()}


@pytest.mark.parametrize("variant", ["bn", "gn"])
def test_updates_in_backward_stand_behind_the_last_use(variant: str) -> None:
    program = planned(adapted(variant, "ft-full")[1], updates="backward")
    stream = program.streams["micro"]
    assert not program.streams["finish"]
    assert len(program.streams["begin"]) == 1  # the metrics
    updates = {one.operand("p"): at for at, one in enumerate(stream) if one.op == "adam"}
    assert set(updates) == set(program.trained)
    last_dx = max(at for at, one in enumerate(stream) if one.op == "conv_dx")
    assert min(updates.values()) < last_dx / 2 + len(stream) / 2
    for parameter, place in updates.items():
        assert all(parameter not in one.operands for one in stream[place + 1 :])
        grad = stream[place].operand("grad")
        assert grad is not None
        zero = next(at for at, one in enumerate(stream) if one.op == "zero" and one.operand("x") == grad)
        assert grad in stream[zero + 1].writes() or stream[zero + 1].op == "zero"
        assert all(grad not in one.operands for one in (*stream[:zero], *stream[place + 1 :]))


def test_each_update_follows_what_completes_its_gradient() -> None:
    program = planned(adapted("gn", "ft-full")[1])
    finish = program.streams["finish"]
    completed = [at for at, one in enumerate(finish) if one.op == "standardize_grad"]
    assert completed
    for at in completed:
        assert finish[at + 1].op == "adam"
        assert finish[at + 1].operand("grad") == finish[at].operand("grad")
        assert finish[at + 1].operand("p") == finish[at].operand("w")


def test_8_bit_state_of_large_tensors_alone() -> None:
    for optimizer, averages in (("adam", ("exp_avg", "exp_avg_sq")), ("sgd", ("momentum_buffer",))):
        program = planned(wide("ft-full"), optimizer=optimizer, optimizer_bits=8)
        state = {tensor.name: tensor for tensor in program.tensors if tensor.role == "state"}
        assert state.pop("step_count").dtype == "i64"
        sizes = [program.tensors[number].elements for number in program.trained]
        assert min(sizes) < 4096 <= max(sizes)
        for number in program.trained:
            tensor = program.tensors[number]
            for average in averages:
                held = state.pop(f"{tensor.name}/{average}")
                assert held.shape == tensor.shape
                assert held.dtype == ("u8" if tensor.elements >= 4096 else "f32")
                if tensor.elements >= 4096:
                    scales = state.pop(f"{tensor.name}/{average}_absmax")
                    assert (scales.dtype, scales.shape) == ("f32", (-(-tensor.elements // 256),))
        assert not state
    assert not [
        t for t in planned(adapted("bn", "ft-full")[1], **PLAIN_SGD).tensors if t.name.endswith("momentum_buffer")
    ]


def test_evaluation_has_neither_dropout_nor_masks() -> None:
    model = small_network()
    adaptation = adapt_(model, METHODS[LB], resolution=33)
    captured = capture(model.train(), adaptation, PREPROCESSING)
    program = planned(captured)
    assert {"dropout", "dropout_grad"} <= set(ops(program))
    assert "dropout" not in ops(program, "evaluate")
    assert all(program.tensors[n].role != "mask" for one in program.streams["evaluate"] for n in one.writes())
    assert program.logits is not None
    assert program.tensors[program.logits].scope == "batch"
    photos = photographs(3, 33)
    found = Interpreter(program, torch.float64).evaluate(photos)
    torch.testing.assert_close(found, Interpreter(captured, torch.float64).evaluate(photos), rtol=1e-11, atol=1e-11)


def test_refused() -> None:
    _, captured = adapted("bn", LB)
    for options, message in (
        ({"recompute": frozenset({99})}, "recompute"),
        ({"joined": frozenset({-1})}, "joined"),
        ({"updates": "backward", "micro_batch": 1}, "micro_batch 1"),
        ({"updates": "late"}, "'late'"),
        ({"optimizer_bits": 16}, "optimizer_bits is 16"),
        ({"micro_batch": 4}, "micro_batch"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(captured, **options)
