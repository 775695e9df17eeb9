"""`adapt_(model, method)`: change a network in place so that it trains as the method says, and tell what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tinytl.errors import InputError
from tinytl.nn.frozen_norm import FrozenStatsBatchNorm2d
from tinytl.nn.kept import kept, meta_copy
from tinytl.nn.lite_residual import LiteBlock, insert_lite_blocks_

from ._checks import check_flow, check_ready, has_module
from ._lowering import NORMS, Lowering
from .identity import base_hash
from .method import Bias, Full, LastBlocks, LiteResidual, Method, Norm, Part


@dataclass(frozen=True)
class Adaptation:
    """What `adapt_` did.

    Attributes:
        method: as given.
        base_hash: of the network before (see `tinytl.methods.base_hash`).
        trained, frozen: names of the parameters that train, and of those that do not.
        folded: paths of the normalizations that became part of a convolution.
        inserted: paths of the lite residual modules that were put in.
        delta_keys: names in the state dict of all that is learned: the trained parameters, and every tensor of
            what was inserted. Together with the base and the method they are the trained network.
        origins: name after adapting -> name before, where the two differ.
        kept_bytes_per_image: bytes kept for backward for one image of `resolution`; None for stock PyTorch, which
            states no rules.
        resolution: pixels a side at which that was counted.
        trained_elements, frozen_elements: numbers of values.
    """

    method: Method
    base_hash: str
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    folded: tuple[str, ...]
    inserted: tuple[str, ...]
    delta_keys: tuple[str, ...]
    origins: dict[str, str]
    kept_bytes_per_image: int | None
    resolution: int
    trained_elements: int
    frozen_elements: int

    def rows(self) -> list[tuple[str, str]]:
        """What was done, as (name, value) lines for a table."""
        kept_line = "not stated by stock PyTorch"
        if self.kept_bytes_per_image is not None:
            kept_line = f"{self.kept_bytes_per_image / 1e6:.2f} MB an image of {self.resolution} px"
        return [
            ("method", self.method.name),
            ("trained", f"{self.trained_elements:,} values in {len(self.trained)} tensors"),
            ("frozen", f"{self.frozen_elements:,} values in {len(self.frozen)} tensors"),
            ("folded", f"{len(self.folded)} normalizations into their convolutions"),
            ("inserted", f"{len(self.inserted)} lite residual modules"),
            ("kept for backward", kept_line),
        ]

    def __str__(self) -> str:
        """The table as plain text."""
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())


def adapt_(
    model: nn.Module,
    method: Method | Part,
    *,
    blocks: Sequence[str] | None = None,
    classifier: str = "classifier",
    resolution: int = 224,
    lean: bool = True,
    seed: int = 0,
) -> Adaptation:
    """Change `model` in place: insert what the method inserts, say what trains, and make its layers lean.

    The output right after equals the output before in evaluation mode. The model stays an ordinary nn.Module.

    Args:
        model: a network whose layers are supported ones; batch norm must have running statistics.
        method: what trains; a single part is a method too.
        blocks: paths of its blocks in forward order, the first of which gets no lite module; by default what the
            network says of itself (`model.block_paths`).
        classifier: path of the classifier, which trains in every method.
        resolution: of the images, to count what is kept.
        lean: False leaves the layers as they are: stock PyTorch training the same parameters, for comparison.
        seed: of the lite modules' random weights.

    Raises:
        InputError: no such classifier or block; more last blocks than there are; a model that is adapted already, or
            that does not run on images of `resolution`.
        UnsupportedLayerError: a layer that cannot be made lean stands where a gradient flows (it is named), or one
            whose statistics cannot be frozen, or one with hooks that would be lost.

    Whatever is raised, the model is as it was.
    """
    method = method if isinstance(method, Method) else Method((method,))
    paths = _block_paths(model, blocks, method)
    check_ready(model, classifier)
    identity = base_hash(model, exclude=(f"{classifier}.",))
    # First on a copy without memory: what is refused is refused there, and leaves the network as it was.
    ghost = meta_copy(model)
    _prepare_(ghost, method, paths, classifier, seed)
    check_flow(ghost, resolution)
    kept_bytes = None
    if lean:
        _lower_(ghost)
        kept_bytes = kept(ghost, (1, 3, resolution, resolution)).total_bytes
    inserted = _prepare_(model, method, paths, classifier, seed)
    lowering = _lower_(model) if lean else Lowering()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    delta = [
        key for key in model.state_dict() if key in trained or key.startswith(tuple(f"{path}." for path in inserted))
    ]
    return Adaptation(
        method=method,
        base_hash=identity,
        trained=tuple(trained),
        frozen=tuple(frozen),
        folded=tuple(lowering.folded),
        inserted=tuple(inserted),
        delta_keys=tuple(delta),
        origins=lowering.origins,
        kept_bytes_per_image=kept_bytes,
        resolution=resolution,
        trained_elements=sum(p.numel() for p in trained.values()),
        frozen_elements=sum(p.numel() for p in frozen.values()),
    )


def _prepare_(model: nn.Module, method: Method, paths: list[str], classifier: str, seed: int) -> list[str]:
    """Insert lite residual modules, freeze statistics, say what trains; the paths of what was inserted."""
    existing = {name for name, module in model.named_modules() if type(module) is LiteBlock}
    inserted: list[str] = []
    lite: LiteResidual | None = method.part(LiteResidual)
    new = [path for path in paths[1:] if path not in existing]
    if lite is not None and new:
        norm = "gn" if any(type(m) is nn.GroupNorm for m in model.modules()) else "bn"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would set the CUDA generators as well
            inserted = insert_lite_blocks_(model, new, norm=norm, groups=lite.groups, kernel_size=lite.kernel_size)
    _freeze_statistics_(model)
    _set_trained_(model, method, paths, classifier)
    return inserted


def _lower_(model: nn.Module) -> Lowering:
    lowering = Lowering()
    if lowering.run(model) is not model:
        raise InputError(
            f"the network is a bare {type(model).__name__}: expected one inside a module of its own, "
            "so that it can be changed in place"
        )
    return lowering


def _block_paths(model: nn.Module, blocks: Sequence[str] | None, method: Method) -> list[str]:
    paths = list(blocks if blocks is not None else getattr(model, "block_paths", ()))
    last = method.part(LastBlocks)
    if not paths and (method.part(LiteResidual) is not None or (last is not None and last.count)):
        raise InputError(
            f"method {method.name!r} needs to know the network's blocks: give their paths in forward order "
            "with blocks=[...]"
        )
    for path in paths:
        if not has_module(model, path):
            raise InputError(f"no block at {path!r} in {type(model).__name__}: give paths of its modules")
    if last is not None and last.count > len(paths):
        raise InputError(f"last blocks {last.count}: the network has {len(paths)}")
    return paths


def _freeze_statistics_(model: nn.Module) -> None:
    frozen: dict[int, FrozenStatsBatchNorm2d] = {}  # a batch norm used in two places stays one module
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.BatchNorm2d) and type(child) is nn.BatchNorm2d:
                if id(child) not in frozen:
                    frozen[id(child)] = FrozenStatsBatchNorm2d.of(child)
                setattr(module, name, frozen[id(child)])


def _set_trained_(model: nn.Module, method: Method, paths: list[str], classifier: str) -> None:
    """Set requires_grad of every parameter."""
    full = method.part(Full) is not None
    for parameter in model.parameters():
        parameter.requires_grad_(full)
    for parameter in model.get_submodule(classifier).parameters():
        parameter.requires_grad_()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            norm = method.part(Norm) is not None and type(module) in NORMS
            bias = method.part(Bias) is not None and name == "bias"
            if norm or bias:
                parameter.requires_grad_()
    lite = [module for module in model.modules() if type(module) is LiteBlock]
    if method.part(LiteResidual) is not None:
        for both in lite:
            both.lite.requires_grad_()
    last = method.part(LastBlocks)
    if last is not None and last.count:
        _train_from_(model, paths[-last.count])
    if method.part(LiteResidual) is not None and method.part(Bias) is not None and not full:
        for both in lite:
            # The main branch's bias does its work (PAPER.md, "Lite residual module").
            both.lite.get_submodule("norm2").bias.requires_grad_(False)  # pyright: ignore


def _train_from_(model: nn.Module, path: str) -> None:
    """Train every parameter from the block at `path` on, in the order in which the network lists them."""
    reached = False
    for name, parameter in model.named_parameters():
        reached = reached or name.startswith(f"{path}.")
        if reached:
            parameter.requires_grad_()
