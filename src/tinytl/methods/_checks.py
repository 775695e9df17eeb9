"""What is checked before a network is changed: all that adapting could fail on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tinytl.errors import InputError, UnsupportedLayerError
from tinytl.nn.frozen_norm import FrozenStatsBatchNorm2d
from tinytl.nn.lean import ImageDropout, LeanLiteBlock, LeanModule, LeanResidual, LeanSequential

from ._lowering import BATCH_NORMS, SUPPORTED_LEAVES


def has_module(model: nn.Module, path: str) -> bool:
    """Whether there is a module at `path`."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def check_ready(model: nn.Module, classifier: str) -> None:
    """Refuse what can be seen without running the network."""
    if not classifier or not has_module(model, classifier):
        raise InputError(f"no classifier at {classifier!r}: give its path in the network with classifier=")
    if not any(True for _ in model.get_submodule(classifier).parameters()):
        raise InputError(f"the classifier at {classifier!r} has no parameters: give the path of one that has")
    for path, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _ADAPTED):
            raise InputError(f"the network is adapted already ({path} is a {kind}): adapt a fresh copy of its base")
        if not isinstance(module, _NormBase):
            continue
        if type(module) in BATCH_NORMS and module.running_mean is None:
            raise UnsupportedLayerError(
                f"{path} ({kind}): has no running statistics and normalizes by the batch that it sees; "
                "train the network with track_running_stats=True"
            )
        if type(module) not in BATCH_NORMS and module.running_mean is not None:
            raise UnsupportedLayerError(
                f"{path} ({kind}): its statistics would change in training, only those of a plain BatchNorm2d can "
                "be frozen; replace it by one"
            )


def check_flow(ghost: nn.Module, resolution: int) -> None:
    """Refuse a layer that is not a supported one where a gradient flows, seen by running the meta copy."""

    def refuse(path: str, module: nn.Module) -> None:
        known = ", ".join(sorted(kind.__name__ for kind in SUPPORTED_LEAVES))
        raise UnsupportedLayerError(
            f"{path} ({type(module).__name__}): cannot be adapted exactly; supported layers: {known}"
        )

    handles = []
    for path, module in ghost.named_modules():
        own = list(module.parameters(recurse=False))
        leaf = not any(True for _ in module.children())
        if type(module) in SUPPORTED_LEAVES or type(module) is nn.Sequential or not (leaf or own):
            continue
        if any(p.requires_grad for p in own):
            refuse(path, module)

        def watch(module: nn.Module, args: object, output: object, path: str = path) -> None:
            found = output.values() if isinstance(output, dict) else output
            tensors = found if isinstance(found, Iterable) and not isinstance(found, torch.Tensor) else (found,)
            if any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors):
                refuse(path, module)

        handles.append(module.register_forward_hook(watch))
    try:
        with torch.enable_grad():
            ghost.train()(torch.empty((1, 3, resolution, resolution), dtype=_kind(ghost), device="meta"))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"the network does not run on an image (1, 3, {resolution}, {resolution}): {type(error).__name__}: "
            f"{first}; give the side that it takes with resolution="
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _kind(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)


_ADAPTED = (LeanModule, LeanSequential, LeanResidual, LeanLiteBlock, ImageDropout, FrozenStatsBatchNorm2d)
