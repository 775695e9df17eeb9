"""Who is compared. Each contender is one small function from the setting and a memory layout to a step that is ready.

What is not installed raises `Missing`, which says how to get it; it is reported, and the others are measured.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests._torchvision import register_schemas
from tinytl.engine.eight_bit import Adam8bit
from tinytl.errors import InputError
from tinytl.memory import adam
from tinytl.memory.planner import plan_step
from tinytl.nn.execution import set_execution_

from .step import LEARNING_RATE, Ready, Setting, leave_zero_, network, parameters, ready_to_train

RANK = 8  # of LoRA: PEFT's own choice

Build = Callable[[Setting, torch.memory_format], Ready]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Missing(Exception):
    """A contender cannot run here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Contender:
    """One way to take the step.

    Attributes:
        label: in the tables.
        side: 'stock', 'other' or 'ours', by which the picture is coloured.
        trains: what trains.
        build: makes it ready.
        reference: makes stock PyTorch ready for the same parametrization; its gradients in float64 are compared with.
        layouts: memory layouts it is tried in; reported are the lowest bytes and the fastest.
        approximate: what of it is not exact; '': nothing but float32 rounding.
        compiles: its first step takes minutes.
    """

    label: str
    side: Literal["stock", "other", "ours"]
    trains: str
    build: Build
    reference: Build
    layouts: tuple[str, ...] = ("contiguous", "channels-last")
    approximate: str = ""
    compiles: bool = False


def _plain_adam(trained: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return adam(trained, lr=LEARNING_RATE)


def _eight_bit_adam(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Adam8bit(trained, lr=LEARNING_RATE)


def _bitsandbytes_adam(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import Adam8bit as Adam  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Missing("bitsandbytes is not installed: pip install bitsandbytes") from None
    return Adam(trained, lr=LEARNING_RATE)


def _ready(
    setting: Setting,
    memory_format: torch.memory_format,
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    micro_batch: int | None = None,
    optimizer: MakeOptimizer = _plain_adam,
) -> Ready:
    images, labels = setting.batch(memory_format)
    return Ready(model, trained, optimizer(list(trained.values())), images, labels, micro_batch)


def stock(method: str, micro_batch: int | None = None, optimizer: MakeOptimizer = _plain_adam) -> Build:
    """Plain PyTorch: stock layers, autograd, the statistics of batch norm frozen."""

    def build(setting: Setting, memory_format: torch.memory_format) -> Ready:
        model = network(setting, method, lean=False)[0].to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
        return _ready(setting, memory_format, model, parameters(model), micro_batch, optimizer)

    return build


def checkpointed(method: str, micro_batch: int | None = None) -> Build:
    """Stock with torch.utils.checkpoint around the stem, each block and the head."""

    def build(setting: Setting, memory_format: torch.memory_format) -> Ready:
        ready = stock(method, micro_batch)(setting, memory_format)
        for part in ready.model.get_submodule("features").children():
            # On the instance, so that the parameters keep their names.
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
        return ready

    return build


def compiled(method: str, budget: float) -> Build:
    """Stock through torch.compile, which may keep that share of the activations that it would keep by itself."""

    def build(setting: Setting, memory_format: torch.memory_format) -> Ready:
        if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            raise Missing("torch.compile needs a C++ compiler: install g++ or clang++")
        ready = stock(method)(setting, memory_format)

        # A backend of its own: models of one class share compiled code among equal backends, whatever the budget.
        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            from torch._functorch import config
            from torch._inductor.compile_fx import compile_fx

            with config.patch(activation_memory_budget=budget):
                return compile_fx(graph, inputs)

        model: Any = torch.compile(ready.model, backend=backend, fullgraph=True, dynamic=False)
        return _ready(setting, memory_format, model, ready.trained)

    return build


def lora(setting: Setting, memory_format: torch.memory_format) -> Ready:
    """PEFT's LoRA on every 1x1 convolution (most of the weights), and the classifier in full."""
    register_schemas()  # PEFT imports transformers, and that torchvision where there is one
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        if error.name != "peft":
            raise Missing(f"PEFT does not import here: {' '.join(str(error).split())}") from error
        raise Missing("PEFT is not installed: pip install 'tinytl[peers]'") from None
    model = network(setting, "ft-last", lean=False)[0]
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, modules_to_save=["classifier"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped: Any = peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    leave_zero_(wrapped)
    wrapped = ready_to_train(wrapped).to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    return _ready(setting, memory_format, wrapped, parameters(wrapped))


def lean(method: str, micro_batch: int | None = None, optimizer: MakeOptimizer = _plain_adam) -> Build:
    """tinytl: the same method, its layers made lean."""

    def build(setting: Setting, memory_format: torch.memory_format) -> Ready:
        model, adaptation = network(setting, method, lean=True)
        trained = {adaptation.origins.get(name, name): p for name, p in parameters(model).items()}
        return _ready(setting, memory_format, model, trained, micro_batch, optimizer)

    return build


def planned(method: str, budget: int, optimizer: MakeOptimizer = _plain_adam) -> Build:
    """tinytl within a memory budget in bytes: the plan that the planner picks for it."""

    def build(setting: Setting, memory_format: torch.memory_format) -> Ready:
        model, adaptation = network(setting, method, lean=True)
        shape = (setting.batch_size, 3, setting.resolution, setting.resolution)
        try:
            plan = plan_step(model, shape, blocks=adaptation.blocks, budget_bytes=budget, optimizer=optimizer).plan
        except InputError as error:
            raise Missing(str(error)) from error
        set_execution_(model, plan.policies)
        trained = {adaptation.origins.get(name, name): p for name, p in parameters(model).items()}
        ready = _ready(setting, memory_format, model, trained, plan.micro_batch, optimizer)
        return replace(ready, update=plan.update)

    return build


LB, FULL = "tinytl-l+b", "ft-full"
_OF_LB: dict[str, Any] = {"trains": "TinyTL-L+B", "reference": stock(LB)}
_OF_FULL: dict[str, Any] = {"trains": "every weight", "reference": stock(FULL)}
_OURS: dict[str, Any] = {"side": "ours", "layouts": ("channels-last",)}
_COMPILED: dict[str, Any] = {"side": "other", "layouts": ("channels-last",), "compiles": True}
_ROUNDED = "optimizer state, rounded to 8 bits"

BASELINE = "stock"
CONTENDERS: dict[str, Contender] = {
    BASELINE: Contender("stock PyTorch", "stock", build=stock(LB), **_OF_LB),
    "stock-micro-1": Contender("stock PyTorch, one image at a time", "stock", build=stock(LB, 1), **_OF_LB),
    "stock-full": Contender("stock PyTorch, FT-Full", "stock", build=stock(FULL), **_OF_FULL),
    "checkpoint": Contender("torch.utils.checkpoint, each block", "other", build=checkpointed(LB), **_OF_LB),
    "checkpoint-micro-1": Contender(
        "torch.utils.checkpoint, one image at a time", "other", build=checkpointed(LB, 1), **_OF_LB
    ),
    "compile": Contender("torch.compile", build=compiled(LB, 1.0), **_OF_LB, **_COMPILED),
    "compile-0.5": Contender("torch.compile, memory budget 0.5", build=compiled(LB, 0.5), **_OF_LB, **_COMPILED),
    "compile-0.1": Contender("torch.compile, memory budget 0.1", build=compiled(LB, 0.1), **_OF_LB, **_COMPILED),
    "lora": Contender(
        f"PEFT LoRA, rank {RANK}", "other", f"LoRA on 1x1 convolutions, rank {RANK}, and the classifier", lora, lora
    ),
    "stock-8-bit": Contender(
        "stock PyTorch, 8-bit Adam (ours)",
        "other",
        build=stock(LB, optimizer=_eight_bit_adam),
        approximate=_ROUNDED,
        **_OF_LB,
    ),
    "bitsandbytes": Contender(
        "stock PyTorch, 8-bit Adam of bitsandbytes",
        "other",
        build=stock(LB, optimizer=_bitsandbytes_adam),
        approximate=_ROUNDED,
        **_OF_LB,
    ),
    "lean": Contender("tinytl", build=lean(LB), **_OF_LB, **_OURS),
    "lean-micro-1": Contender("tinytl, one image at a time", build=lean(LB, 1), **_OF_LB, **_OURS),
    "lean-micro-1-8-bit": Contender(
        "tinytl, one image at a time, 8-bit Adam",
        build=lean(LB, 1, _eight_bit_adam),
        approximate=_ROUNDED,
        **_OF_LB,
        **_OURS,
    ),
    "planned-60MB": Contender("tinytl, budget 60 MB", build=planned(LB, 60_000_000), **_OF_LB, **_OURS),
    "planned-48MB": Contender("tinytl, budget 48 MB", build=planned(LB, 48_000_000), **_OF_LB, **_OURS),
    "planned-36MB-8-bit": Contender(
        "tinytl, budget 36 MB, 8-bit Adam",
        build=planned(LB, 36_000_000, _eight_bit_adam),
        approximate=_ROUNDED,
        **_OF_LB,
        **_OURS,
    ),
    "lean-full": Contender("tinytl, FT-Full", build=lean(FULL), **_OF_FULL, **_OURS),
}
