"""The network made ready in stock PyTorch: lite residual modules in, statistics frozen, requires_grad set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tinytl.nn.frozen_norm import FrozenStatsBatchNorm2d, StaysInEvaluation
from tinytl.nn.layers import Norm as Norms
from tinytl.nn.lite_residual import LiteBlock, insert_lite_blocks_

from ._checks import blocks_of_lite
from .method import Method
from .parts import Bias, BlockBias, Full, LastBlocks, LiteModules, LiteResidual, Norm


@dataclass(frozen=True)
class Plan:
    """What will be done to a network.

    Attributes:
        method: what trains.
        blocks: paths of the blocks in forward order.
        classifier: path of the classifier.
        shapes: (in channels, out channels, stride) of the blocks of `blocks_of_lite`; None: read off their layers.
        order: names of the parameters (and buffers) in the order in which the network uses them.
        seed: of the lite modules' random weights.
    """

    method: Method
    blocks: Sequence[str]
    classifier: str
    shapes: Sequence[tuple[int, int, int]] | None
    order: Sequence[str]
    seed: int


def prepare_(model: nn.Module, plan: Plan) -> list[str]:
    """Insert lite residual modules, freeze statistics, say what trains; the paths of what was inserted."""
    inserted: list[str] = []
    every: LiteResidual | None = plan.method.part(LiteResidual)
    some: LiteModules | None = plan.method.part(LiteModules)
    if every is not None or some is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(plan.seed)  # torch.manual_seed would set the CUDA generators as well
            inserted = _insert_everywhere_(model, plan, every) if every is not None else _insert_some_(model, plan)
    _freeze_statistics_(model)
    _set_trained_(model, plan)
    return inserted


def _insert_everywhere_(model: nn.Module, plan: Plan, lite: LiteResidual) -> list[str]:
    """A lite module beside every block but the first, and but those that have one."""
    existing = {name for name, module in model.named_modules() if type(module) is LiteBlock}
    new = [(at, path) for at, path in enumerate(plan.blocks[1:]) if path not in existing]
    if not new:
        return []
    return insert_lite_blocks_(
        model,
        [path for _, path in new],
        norm=_norm_of(model),
        groups=lite.groups,
        kernel_size=lite.kernel_size,
        shapes=None if plan.shapes is None else [plan.shapes[at] for at, _ in new],
    )


def _insert_some_(model: nn.Module, plan: Plan) -> list[str]:
    """The lite modules that the method names."""
    modules = {plan.blocks[at]: (kernel, groups, width) for at, kernel, groups, width in _modules(plan)}
    paths = blocks_of_lite(plan.method, plan.blocks)
    return insert_lite_blocks_(model, paths, norm=_norm_of(model), shapes=plan.shapes, modules=modules)


def _modules(plan: Plan) -> Sequence[tuple[int, int, int, int]]:
    some: LiteModules | None = plan.method.part(LiteModules)
    return some.modules if some is not None else ()


def _norm_of(model: nn.Module) -> Norms:
    return "gn" if any(type(m) is nn.GroupNorm for m in model.modules()) else "bn"


def _freeze_statistics_(model: nn.Module) -> None:
    frozen: dict[int, nn.Module] = {}  # a batch norm used in two places stays one module
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, _NormBase) and child.running_mean is not None:
                if id(child) not in frozen:
                    frozen[id(child)] = _frozen(child)
                setattr(module, name, frozen[id(child)])


def _frozen(norm: _NormBase) -> nn.Module:
    """A plain batch norm becomes one with frozen statistics; any other stays what it is, in evaluation mode."""
    if isinstance(norm, nn.BatchNorm2d) and type(norm) in (nn.BatchNorm2d, FrozenStatsBatchNorm2d):
        return FrozenStatsBatchNorm2d.of(norm)
    vars(norm)["train"] = StaysInEvaluation(norm)
    return norm.train(norm.training)


def _set_trained_(model: nn.Module, plan: Plan) -> None:
    """Set requires_grad of every parameter."""
    method = plan.method
    full = method.part(Full) is not None
    for parameter in model.parameters():
        parameter.requires_grad_(full)
    for parameter in model.get_submodule(plan.classifier).parameters():
        parameter.requires_grad_()
    if method.part(Norm) is not None:
        for module in model.modules():
            if isinstance(module, _NORMS):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_()
    trains_bias = _trains_bias(plan)
    for path, module in model.named_modules():
        bias = module._parameters.get("bias")
        if bias is not None and trains_bias(f"{path}.bias" if path else "bias"):
            bias.requires_grad_()
    lite = {path: module for path, module in model.named_modules() if type(module) is LiteBlock}
    named = {plan.blocks[at] for at, *_ in _modules(plan)}
    trained = [path for path in lite if method.part(LiteResidual) is not None or path in named]
    for path in trained:
        lite[path].lite.requires_grad_()
    last: LastBlocks | None = method.part(LastBlocks)
    if last is not None:
        _train_last_(model, plan, plan.blocks[-last.count :])
    for path in trained:
        if not full and trains_bias(f"{path}.bias"):
            # The main branch's bias does its work (PAPER.md, "Lite residual module").
            lite[path].lite.get_submodule("norm2").bias.requires_grad_(False)  # pyright: ignore


def _trains_bias(plan: Plan) -> Callable[[str], bool]:
    """Whether the bias of that name trains, by the method's parts for biases alone."""
    if plan.method.part(Bias) is not None:
        return lambda name: True
    some: BlockBias | None = plan.method.part(BlockBias)
    if some is None:
        return lambda name: False
    positions = _positions(plan)
    return lambda name: _position(name, plan.blocks, positions) in some.blocks


def _positions(plan: Plan) -> dict[str, int]:
    """Name of a parameter that the network uses -> position of the block that it belongs to, or stands behind.

    What stands before the first block belongs to it.
    """
    found: dict[str, int] = {}
    current = 0
    for name in plan.order:
        within = _block_of(name, plan.blocks)
        current = current if within is None else max(current, within)
        found[name] = current
    return found


def _position(name: str, blocks: Sequence[str], positions: Mapping[str, int]) -> int | None:
    """The position of a parameter, of an inserted module's too; None for one that the network does not use."""
    within = _block_of(name, blocks)
    return positions.get(name) if within is None else within


def _block_of(name: str, blocks: Sequence[str]) -> int | None:
    """The position of the block that the parameter of that name is in; the innermost where one holds another."""
    found = [at for at, path in enumerate(blocks) if name.startswith(f"{path}.")]
    return max(found, key=lambda at: len(blocks[at]), default=None)


def _train_last_(model: nn.Module, plan: Plan, blocks: Sequence[str]) -> None:
    """Train every parameter of the last blocks, and of all that the network uses after the first of them begins."""
    starts = [at for at, name in enumerate(plan.order) if name.startswith(f"{blocks[0]}.")]
    behind = set(plan.order[starts[0] :]) if starts else set()
    within = tuple(f"{path}." for path in blocks)
    lite = {path for path, module in model.named_modules() if type(module) is LiteBlock}
    for name, parameter in model.named_parameters():
        before = name  # what it was called before a lite module was put beside its block
        for path in lite:
            before = before.replace(f"{path}.block.", f"{path}.", 1) if name.startswith(f"{path}.block.") else before
        if name in behind or before in behind or name.startswith(within):
            parameter.requires_grad_()


_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
