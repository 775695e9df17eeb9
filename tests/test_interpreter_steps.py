"""The interpreted training step against autograd on the adapted network, in float64, step after step.

What is held together: the compiler's capture, its own differentiation, its fusions and its updates on the one side;
PyTorch on the other. Relative errors are of a tensor's largest gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.backbones import BACKBONES, Preprocessing, load
from tinytl.backbones._inverted_residual import BlockSpec, InvertedResidualNet
from tinytl.compiler import random
from tinytl.compiler.again import stretches
from tinytl.compiler.arena import lay_out, verify
from tinytl.compiler.capture import capture
from tinytl.compiler.differentiate import training_program
from tinytl.compiler.interpreter import Interpreter
from tinytl.compiler.program import ALIGN, SCRATCH_PER_THREAD, Program, instruction
from tinytl.compiler.step_options import StepOptions
from tinytl.engine.eight_bit import Adam8bit, SGD8bit
from tinytl.methods import FT_LAST, METHODS, TINYTL_LB, Method, adapt_
from tinytl.nn.lean import take_dropout
from tinytl.nn.packing import pack_frozen_

from .pairs import pairs
from .small_program import small_program
from .test_adapt import enliven_

SIDE, CLASSES, BATCH, STEPS = 32, 5, 3, 20
BLOCKS = (BlockSpec(8, 8, 3, 1, 1), BlockSpec(8, 16, 3, 2, 3), BlockSpec(16, 16, 3, 1, 3))
GRADIENT, PARAMETER = 1e-10, 1e-9
OPTIONS = StepOptions(batch=BATCH, micro_batch=2, evaluate_images=2)


@dataclasses.dataclass
class Pair:
    """A captured program and the network that it was captured from."""

    model: nn.Module
    captured: Program
    preprocessing: Preprocessing
    side: int

    def batch(self, seed: int, count: int = BATCH) -> tuple[Tensor, Tensor]:
        """Bytes (n, H, W, 3) and labels (n,)."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (count, self.side, self.side, 3), dtype=torch.uint8, generator=generator)
        return images, torch.randint(0, CLASSES, (count,), generator=generator)

    def input(self, images: Tensor) -> Tensor:
        """What the network is given for these bytes."""
        three = (self.preprocessing.mean, self.preprocessing.std)
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in three)
        return (images.permute(0, 3, 1, 2).double() / 255.0 - mean) / std

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def small(norm: str, method: Method, head: int = 32, pack: tuple[int, bool] | None = None, drop: float = 0.0) -> Pair:
    torch.manual_seed(0)
    model = InvertedResidualNet(BLOCKS, head_channels=head, num_classes=CLASSES, norm=norm).double()  # type: ignore[arg-type]
    enliven_(model)
    return adapted(model, method, BACKBONES["proxylessnas_mobile"].preprocessing, SIDE, pack, drop)


def adapted(
    model: nn.Module,
    method: Method,
    preprocessing: Preprocessing,
    side: int,
    pack: tuple[int, bool] | None = None,
    drop: float = 0.0,
) -> Pair:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = drop
    adaptation = adapt_(model, method, resolution=side)
    for name, parameter in model.named_parameters():  # a fresh lite module's last scale is 0: it changes nothing
        if ".lite." in name and name.endswith("weight") and not parameter.detach().any():
            parameter.data.uniform_(0.5, 1.5)
    if pack is not None:
        pack_frozen_(model, *pack)
    return Pair(model.train(), capture(model, adaptation, preprocessing, resolution=side), preprocessing, side)


def torch_step(
    pair: Pair, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, smoothing: float
) -> tuple[float, int, dict[str, Tensor]]:
    """The lab's step; the sum of the losses, how many were right, and the gradients before the update."""
    optimizer.zero_grad()
    logits = pair.model(pair.input(images))
    F.cross_entropy(logits, labels, label_smoothing=smoothing).backward()
    gradients = {}
    for name, parameter in pair.trained().items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.clone()
    optimizer.step()
    loss = F.cross_entropy(logits.detach(), labels, label_smoothing=smoothing, reduction="sum")
    return loss.item(), int((logits.argmax(1) == labels).sum()), gradients


def hold_together(
    pair: Pair,
    program: Program,
    optimizer: torch.optim.Optimizer,
    steps: int = STEPS,
    options: StepOptions = OPTIONS,
    rate: Callable[[int], float] = lambda step: 1e-2 / step,
    within: Callable[[int], contextlib.AbstractContextManager[Any]] = lambda step: contextlib.nullcontext(),
    parameter_tolerance: float = PARAMETER,
    seed: int = 0,
) -> None:
    """Both take the same steps; losses, gradients and parameters stay equal."""
    ours = Interpreter(program)
    trained = pair.trained()
    assert set(ours.learned()) == set(trained)
    seen: set[str] = set()
    for step in range(1, steps + 1):
        images, labels = pair.batch(
            step, options.batch if step % 4 else options.batch - 2
        )  # the last batch of an epoch is smaller
        lr = optimizer.param_groups[0]["lr"] = rate(step)
        with within(step):
            loss, right, gradients = torch_step(pair, optimizer, images, labels, options.label_smoothing)
        found = ours.step(images, labels, lr, seed)
        assert found == (pytest.approx(loss, rel=1e-10), right)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in ours.gradients().items():
            # a gradient that is 0 but for rounding (a bias before a norm) is held to the others' scale
            scale = max(float(gradients[name].abs().max()), 1e-6 * largest)
            error = float((gradient - gradients[name]).abs().max())
            assert error <= GRADIENT * scale, f"step {step}, {name}: {error / scale}"
            seen.add(name)
        for name, value in ours.learned().items():
            torch.testing.assert_close(value, trained[name].detach(), rtol=0, atol=parameter_tolerance, msg=name)
    if program.arena_bytes is None:
        assert seen == set(trained)


def adam(pair: Pair) -> torch.optim.Optimizer:
    return torch.optim.Adam(pair.trained().values())


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("name", METHODS)
def test_twenty_steps_of_every_method(name: str, norm: str) -> None:
    pair = small(norm, METHODS[name])
    hold_together(pair, training_program(pair.captured, OPTIONS), adam(pair))


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_evaluation(norm: str) -> None:
    """In passes of two and batches of three, of the captured program and of the one that trains."""
    pair = small(norm, TINYTL_LB, drop=0.2)
    images, labels = pair.batch(0, 10)
    with torch.no_grad():
        expected = pair.model.eval()(pair.input(images))
    torch.testing.assert_close(Interpreter(pair.captured).evaluate(images), expected, rtol=1e-12, atol=1e-12)
    ours = Interpreter(training_program(pair.captured, OPTIONS))
    for _ in range(2):
        torch.testing.assert_close(ours.evaluate(images), expected, rtol=1e-12, atol=1e-12)
        ours.step(images[:BATCH], labels[:BATCH], lr=0.0)  # what it leaves behind does not matter


VARIANTS: dict[str, dict[str, Any]] = {
    "one piece": {"micro_batch": BATCH},
    "one by one": {"micro_batch": 1},
    "nothing fused": {"fuse": False},
    "updates in backward": {"micro_batch": BATCH, "updates": "backward"},
    "decay": {"weight_decay": 0.05, "betas": (0.8, 0.99), "eps": 1e-6},
    "sgd": {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.01},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "label_smoothing": 0.0},
}


@pytest.mark.parametrize(("laid_out", "again"), [(False, False), (True, True)], ids=["kept", "laid out, again"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_step(variant: str, laid_out: bool, again: bool) -> None:
    """However it is carried out, it is the same step; in an arena, nothing reads what was written over."""
    pair = small("gn" if variant in ("one by one", "decay", "momentum") else "bn", TINYTL_LB)
    recompute = frozenset(stretches(pair.captured)) if again else frozenset()
    options = dataclasses.replace(OPTIONS, recompute=recompute, **VARIANTS[variant])
    program = training_program(pair.captured, options)
    if laid_out:
        program = lay_out(program)
    decay = options.weight_decay
    if options.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            pair.trained().values(), momentum=options.momentum, weight_decay=decay
        )
    else:
        optimizer = torch.optim.Adam(pair.trained().values(), betas=options.betas, eps=options.eps, weight_decay=decay)
    hold_together(pair, program, optimizer, steps=3, options=options)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_steps_with_a_state_of_8_bits(name: str) -> None:
    """The classifier's weight of 5 x 1024 values has 8 bits a value, its bias 32; both as in the lab's optimizer."""
    pair = small("bn", FT_LAST, head=1024)
    options = dataclasses.replace(OPTIONS, optimizer=name, optimizer_bits=8)
    program = training_program(pair.captured, options)
    assert {"adam": "adam8", "sgd": "sgd8"}[name] in {one.op for one in program.streams["finish"]}
    kind = {"adam": Adam8bit, "sgd": lambda given: SGD8bit(given, momentum=0.9)}[name]
    # a difference in the last bit of a float32 may round to the next code
    hold_together(pair, program, kind(pair.trained().values()), options=options, parameter_tolerance=1e-6)


@pytest.mark.parametrize("pack", [(8, False), (8, True), (16, False)], ids=["int8", "codebook", "half"])
def test_steps_over_packed_weights(pack: tuple[int, bool]) -> None:
    pair = small("bn", TINYTL_LB, pack=pack)
    codes = {"int8": "i8", "codebook": "u8", "half": "f16"}
    held = {tensor.dtype for tensor in pair.captured.tensors if tensor.role == "constant"}
    assert codes["half" if pack[0] == 16 else "codebook" if pack[1] else "int8"] in held
    hold_together(pair, training_program(pair.captured, OPTIONS), adam(pair), steps=3)


@pytest.mark.parametrize("micro_batch", [2, BATCH])
def test_steps_with_dropout(micro_batch: int) -> None:
    """The network is given the program's draws, which do not depend on the micro-batch."""
    pair = small("bn", TINYTL_LB, drop=0.3)
    options = dataclasses.replace(OPTIONS, micro_batch=micro_batch)
    program = training_program(pair.captured, options)
    numbers = [one.attributes["number"] for one in program.streams["micro"] if one.op == "dropout"]
    assert len(numbers) == 1

    @contextlib.contextmanager
    def draws(step: int) -> Iterator[None]:
        def taken(x: Tensor, p: float) -> Tensor:
            assert p == 0.3
            return x * random.kept(9, numbers[0], step, 0, tuple(x.shape), p) / (1 - p)

        with take_dropout(taken):
            yield

    hold_together(pair, program, adam(pair), steps=4, options=options, within=draws, seed=9)


def test_a_program_that_was_captured_in_float32_runs_in_both() -> None:
    torch.manual_seed(0)
    model = enliven_(InvertedResidualNet(BLOCKS, head_channels=32, num_classes=CLASSES))
    pair = adapted(model, TINYTL_LB, BACKBONES["proxylessnas_mobile"].preprocessing, SIDE)
    program = training_program(pair.captured, OPTIONS)
    one, other = Interpreter(program), Interpreter(program, torch.float32)
    assert other.learned()["classifier.weight"].dtype == torch.float32
    for step in range(1, 4):
        batch = pair.batch(step)
        assert other.step(*batch, lr=1e-2)[0] == pytest.approx(one.step(*batch, lr=1e-2)[0], rel=1e-4)
        for name, gradient in one.gradients().items():
            largest = gradient.abs().max()
            assert (other.gradients()[name] - gradient).abs().max() <= 1e-3 * largest


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm", "method"), pairs("tinytl-l+b", "ft-full"))
def test_every_backbone(name: str, norm: str, method: str) -> None:
    """At 48 pixels; with batch norm laid out in an arena."""
    torch.manual_seed(1)
    backbone = load(name, pretrained=False, norm=norm, num_classes=CLASSES)  # type: ignore[arg-type]
    pair = adapted(enliven_(backbone.model).double(), METHODS[method], backbone.preprocessing, 48)
    program = training_program(pair.captured, OPTIONS)
    program = lay_out(program) if norm == "bn" else program
    steps = 2 if method == "tinytl-l+b" else 1
    hold_together(pair, program, adam(pair), steps, rate=lambda _: 1e-4)


# ---- what is refused


def hand_made() -> tuple[Interpreter, Tensor, Tensor]:
    torch.manual_seed(0)
    program = small_program()
    side = program.tensors[program.images or 0].shape[0]
    return Interpreter(program), torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8), torch.arange(4) % 3


def changed(program: Program, stream: str, instructions: Any) -> Interpreter:
    return Interpreter(dataclasses.replace(program, streams={**program.streams, stream: tuple(instructions)}))


def test_instruction_by_instruction_is_the_same_step() -> None:
    whole, images, labels = hand_made()
    parts = Interpreter(whole.program)
    loss, right = whole.step(images, labels, lr=0.1)
    parts.load(images, labels)
    for stream, first in (("begin", 0), ("micro", 0), ("micro", 2), ("finish", 0)):
        for at in range(len(whole.program.streams[stream])):
            parts.run(stream, at, at + 1, first=first, count=4, lr=0.1)
    assert parts.tensor(whole.program.metrics or 0).tolist() == [pytest.approx(loss, rel=0, abs=0), right]
    for name, value in whole.learned().items():
        assert torch.equal(value, parts.learned()[name])


def test_what_was_not_written_is_not_read() -> None:
    ours, images, labels = hand_made()
    program = ours.program
    for stream, op, at in (("begin", "zero", 0), ("micro", "conv", 1), ("micro", "softmax_loss", 4)):
        left = [one for place, one in enumerate(program.streams[stream]) if place != at]
        assert program.streams[stream][at].op == op
        with pytest.raises(RuntimeError, match="it has not been written"):
            changed(program, stream, left).step(images, labels, lr=0.1)


def test_what_a_micro_batch_made_is_gone_after_it() -> None:
    ours, images, labels = hand_made()
    program = ours.program
    numbers = {tensor.name: n for n, tensor in enumerate(program.tensors)}
    late = instruction("bias_grad", grad=numbers["dlogits"], bias=numbers["fc.bias.grad"])
    with pytest.raises(RuntimeError, match=r"finish 0 \(bias_grad\) reads tensor \d+ \(dlogits\): it has not been"):
        changed(program, "finish", (late, *program.streams["finish"])).step(images, labels, lr=0.1)
    ours.step(images, labels, lr=0.1)
    with pytest.raises(RuntimeError, match="dlogits"):
        ours.tensor(numbers["dlogits"])
    ours.evaluate(images)
    with pytest.raises(RuntimeError, match=r"fc\.bias\.grad"):
        ours.tensor(numbers["fc.bias.grad"])


def refusal(program: Program, images: Tensor, labels: Tensor) -> str:
    """Why a program cannot be interpreted; empty where it can."""
    try:
        ours = Interpreter(program)
        ours.step(images, labels, lr=0.1)
        ours.evaluate(images)
    except RuntimeError as error:
        return str(error)
    return ""


def apart(program: Program) -> Program:
    """Laid out with every tensor in bytes of its own."""
    found = lay_out(program)
    assert found.state_bytes is not None
    tensors, end = list(found.tensors), found.state_bytes
    for number, tensor in enumerate(tensors):
        if tensor.role not in ("constant", "trained", "state"):
            tensors[number] = dataclasses.replace(tensor, offset=end)
            end += -(-tensor.bytes(found) // ALIGN) * ALIGN
    return dataclasses.replace(found, tensors=tuple(tensors), arena_bytes=end + found.threads * SCRATCH_PER_THREAD)


def test_what_was_written_over_is_not_read() -> None:
    """Tensors of the arena moved onto others: the layout's own check refuses all that is refused here."""
    ours, images, labels = hand_made()
    program = apart(ours.program)
    verify(program)
    assert not refusal(program, images, labels)
    assert not refusal(lay_out(ours.program), images, labels)
    numbers = {tensor.name: n for n, tensor in enumerate(program.tensors)}

    def moved(name: str, onto: str) -> Program:
        tensors = list(program.tensors)
        at = tensors[numbers[onto]].offset
        tensors[numbers[name]] = dataclasses.replace(tensors[numbers[name]], offset=at)
        return dataclasses.replace(program, tensors=tuple(tensors))

    reason = "(fc.bias.grad): micro 7 (conv_dx for conv_dx) has written dmean over it"
    assert f"reads tensor {numbers['fc.bias.grad']} {reason}" in refusal(moved("dmean", "fc.bias.grad"), images, labels)
    assert "writes y (y) over its own x" in refusal(moved("y", "x"), images, labels)
    assert not refusal(moved("dz", "dy"), images, labels)  # act_grad may work in place
    inside = [tensor.name for tensor in program.tensors if tensor.role not in ("constant", "trained", "state")]
    refused = 0
    for name, onto in itertools.permutations(inside, 2):
        if refusal(moved(name, onto), images, labels):
            refused += 1
            with pytest.raises(ValueError, match=r"overlap|the arena has|the state is"):
                verify(moved(name, onto))
    assert refused > 100


def test_constants_stay_and_shapes_are_held() -> None:
    ours, images, labels = hand_made()
    program = ours.program
    numbers = {tensor.name: n for n, tensor in enumerate(program.tensors)}
    spoilt = instruction("zero", x=numbers["conv.weight"])
    with pytest.raises(RuntimeError, match="writes the constant"):
        changed(program, "begin", (spoilt,)).step(images, labels, lr=0.1)
    tensors = list(program.tensors)
    tensors[numbers["mean"]] = dataclasses.replace(tensors[numbers["mean"]], shape=(1, 2, 5))
    with pytest.raises(RuntimeError, match="expected"):
        Interpreter(dataclasses.replace(program, tensors=tuple(tensors))).step(images, labels, lr=0.1)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        ours.step(images.repeat(2, 1, 1, 1), labels.repeat(2), lr=0.1)
    with pytest.raises(ValueError, match="images: a value"):
        ours.step(images[:, 1:], labels, lr=0.1)
    with pytest.raises(ValueError, match="the program has no tensor for this"):
        Interpreter(dataclasses.replace(program, labels=None)).step(images, labels, lr=0.1)
