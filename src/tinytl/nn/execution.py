"""How a part of a network is run: all its images at once or some at a time, its rows in strips, kept or run again.

None of this changes what is computed, but for the order of floating-point sums; it trades time for memory.

    policies = {"features.stem:features.block1": Execution(strips=4), "features.block2": Execution(images=1)}
    set_execution_(model, policies)

A policy stands, as an object, in the place of the `forward` of its module, and changes nothing else of the network: not
its layers, names, tensors or hooks. Policies nest. What an outer one says of images and of running again holds for all
that is in it; into how many strips a chain is cut says the innermost policy around it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from tinytl.errors import InputError
from tinytl.ops._eager import eager
from tinytl.ops.by_images import by_images
from tinytl.ops.chain import Stage, chain
from tinytl.ops.region import region
from tinytl.ops.strips import in_strips

from .frozen_norm import FrozenStatsBatchNorm2d
from .lean import (
    LeanForward,
    LeanLiteBlock,
    LeanModule,
    LeanResidual,
    LeanSequential,
    LeanShortcutBlock,
    NormStatistics,
)


@dataclass(frozen=True)
class Execution:
    """How one part of a network (a block, the stem, a run of blocks) is run.

    Attributes:
        images: how many images at a time; None: all of the micro-batch. Input and output are those of all images, and
            what is kept for backward is what all would keep; what lives only while the part runs is that of so many.
            Random numbers are drawn part by part: as without, where one dropout is in it, as micro-batches do.
        strips: into how many strips of rows each chain of convolutions in it is cut; 1: none. A chain with any other
            operation (a group norm, pooling) is run whole, and one whose output has fewer rows is cut into so many.
        recompute: keep only the part's input, and run it again in backward. In a part of more than one chain, a chain
            that runs again by itself (one with a group norm) does so too, a third time: so only one at a time is whole.

    Raises:
        InputError: images or strips below 1.
    """

    images: int | None = None
    strips: int = 1
    recompute: bool = False

    def __post_init__(self) -> None:
        for name, value in (("images", 1 if self.images is None else self.images), ("strips", self.strips)):
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is {value!r}: expected a whole number of 1 or more")


def set_execution_(model: nn.Module, policies: Mapping[str, Execution]) -> None:
    """Run each named part of `model` (adapted) by its policy, and all other parts as ever.

    Args:
        model: changed in place; the policies that it had before are gone.
        policies: path of a module -> its policy. `'FIRST:LAST'` names neighbours in one container, from one to the
            other, as one part: `'features.stem:features.block1'`. `Execution()` is no policy.

    Raises:
        InputError: no module of that path, or one that cannot be run by its policy; nothing is changed then.
    """
    modules: dict[str, tuple[nn.Module, Execution]] = {}
    ranges: dict[str, list[Range]] = {}
    for key, policy in policies.items():
        if policy == Execution():
            continue
        if ":" in key:
            parent, found = _range(model, key, policy)
            ranges.setdefault(parent, []).append(found)
        else:
            modules[key] = _module(model, key), policy
    for path, entries in ranges.items():
        entries.sort(key=lambda entry: entry.begin)
        for first, second in itertools.pairwise(entries):
            if second.begin < first.end:
                raise InputError(
                    f"{first.name!r} and {second.name!r} overlap in {path!r}: name each module in one part"
                )
    for module in model.modules():
        own = vars(module).get("forward")
        while isinstance(own, (ByPolicy, WithRanges)):
            own = own.inner
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
    for path, entries in ranges.items():
        container = model.get_submodule(path)
        vars(container)["forward"] = WithRanges(container, tuple(entries), vars(container).get("forward"))
    for path, (module, policy) in modules.items():
        vars(module)["forward"] = ByPolicy(module, path, policy, vars(module).get("forward"))


def execution_of(model: nn.Module) -> dict[str, Execution]:
    """The policies that `model` runs by, as `set_execution_` takes them."""
    found: dict[str, Execution] = {}
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, ByPolicy):
            found[own.name] = own.policy
            own = own.inner
        if isinstance(own, WithRanges):
            found.update((entry.name, entry.policy) for entry in own.ranges)
    return found


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise InputError(f"no module {path!r} in the network: expected a path of model.named_modules()") from None
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, NormStatistics)):
        raise InputError(
            f"{path!r} ({type(module).__name__}) has no forward to run by a policy: name those in it, or around it"
        )
    _refuse_batch_statistics(module, path)
    return module


def _refuse_batch_statistics(module: nn.Module, path: str) -> None:
    for name, norm in module.named_modules():
        frozen = isinstance(norm, FrozenStatsBatchNorm2d) or "train" in vars(norm)
        if isinstance(norm, _BatchNorm) and not frozen:
            inner = ".".join(part for part in (path, name) if part)
            raise InputError(
                f"{inner!r} ({type(norm).__name__}) normalizes by the batch that it sees, which a policy would change: "
                "adapt the network with adapt_ first"
            )


def _range(model: nn.Module, key: str, policy: Execution) -> tuple[str, Range]:
    first, _, last = key.partition(":")
    (parent, _, begin), (other, _, end) = first.rpartition("."), last.rpartition(".")
    for path in (first, last):
        _module(model, path)
    container = model.get_submodule(parent)
    if parent != other or type(container) is not LeanSequential:
        raise InputError(
            f"{key!r}: expected two neighbours in one lean container (a Sequential before adapt_), such as "
            "'features.block1:features.block3'; name each block by itself"
        )
    names = list(container._modules)
    at = names.index(begin), names.index(end) + 1
    if at[0] >= at[1]:
        raise InputError(f"{key!r}: the first part comes behind the last: turn them round")
    return parent, Range(*at, key, policy)


@dataclass(frozen=True)
class Range:
    """Children of a container, from number `begin` up to and without `end`, that are run as one part."""

    begin: int
    end: int
    name: str
    policy: Execution


class ByPolicy(LeanForward):
    """In the place of a module's own forward: that, by a policy. A copy of the module gets one that runs the copy."""

    def __init__(self, module: nn.Module, name: str, policy: Execution, inner: Any) -> None:
        self.module, self.name, self.policy, self.inner = module, name, policy, inner

    def stages(self) -> list[Stage] | None:
        """None: it is no part of a greater chain."""
        return None

    def own_tensors(self) -> list[Tensor]:
        """Those of the forward that it runs."""
        return self.inner.own_tensors() if isinstance(self.inner, LeanForward) else []

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward; one tensor in and one out, where images are split or the part runs again."""
        own = self.inner
        if own is None:
            kind: Any = type(self.module)
            own = kind.forward.__get__(self.module)
        policy = self.policy
        if policy.images is None and not policy.recompute:
            with in_strips(policy.strips):
                return own(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise InputError(
                f"{self.name} ({type(self.module).__name__}): is not called with one tensor, and images and recompute "
                "are for parts that are; set them for the modules in it, or around it"
            )
        stages = self.inner.stages() if isinstance(self.inner, LeanForward) else None
        if self.inner is None and isinstance(self.module, (LeanModule, LeanSequential)):
            stages = self.module.stages()
        return run_by(policy, self.name, self.module, own, stages, args[0])


class WithRanges(LeanForward):
    """In the place of a LeanSequential's own forward: some of its children are run by policies, together."""

    def __init__(self, module: nn.Module, ranges: tuple[Range, ...], inner: Any) -> None:
        self.module, self.ranges, self.inner = module, ranges, inner

    def stages(self) -> list[Stage] | None:
        """None: it is no part of a greater chain."""
        return None

    def own_tensors(self) -> list[Tensor]:
        """Those of the forward that it runs."""
        return self.inner.own_tensors() if isinstance(self.inner, LeanForward) else []

    @eager
    def __call__(self, input: Tensor) -> Tensor:
        """As the Sequential's."""
        at, children = 0, list(self.module._modules.items())
        for entry in (*self.ranges, None):
            for run in _sequential(children[at : len(children) if entry is None else entry.begin])._runs():
                input = chain(input, run) if isinstance(run, list) else run(input)
            if entry is None:
                break
            part, policy, at = _sequential(children[entry.begin : entry.end]), entry.policy, entry.end
            if policy.images is not None or policy.recompute:
                input = run_by(policy, entry.name, part, part.forward, part.stages(), input)
                continue
            with in_strips(policy.strips):
                for run in part._runs():  # here, so that nobody holds on to what went into the part
                    input = chain(input, run) if isinstance(run, list) else run(input)
        return input


def _sequential(children: Sequence[tuple[str, Any]]) -> LeanSequential:
    return LeanSequential(OrderedDict(children))


def run_by(
    policy: Execution,
    name: str,
    module: nn.Module,
    own: Callable[[Tensor], Any],
    stages: list[Stage] | None,
    x: Tensor,
) -> Tensor:
    """`own(x)`, what `module` does, by the policy; `stages`: as one chain, if it is one."""
    recompute = policy.recompute
    if stages is not None:  # a chain knows better what to keep, and runs again no more than it has to
        line, again = stages, True if recompute else None
        own, recompute = (lambda x: chain(x, line, recompute=again)), False

    def run(x: Tensor) -> Tensor:
        with in_strips(policy.strips):
            y = own(x)
        if not isinstance(y, Tensor):
            raise InputError(
                f"{name} ({type(module).__name__}): makes a {type(y).__name__}, and images and recompute are for parts "
                "that make one tensor; set them for the modules in it, or around it"
            )
        return y

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    random = recompute and _may_draw(module)
    if policy.images is not None and policy.images < len(x):
        return by_images(run, x, trained, policy.images, recompute=recompute, random=random, name=name)
    if not recompute or not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *trained)):
        return run(x)
    return region(lambda inputs: (run(inputs[0]),), [x], trained, random=random, name=name, at_once=False)[0]


_DRAWS_NOTHING = (
    *(LeanModule, LeanSequential, LeanResidual, LeanShortcutBlock, LeanLiteBlock),
    *(NormStatistics, nn.Identity, nn.Flatten, nn.Conv2d, nn.Linear),
)


def _may_draw(module: nn.Module) -> bool:
    """Whether it may draw random numbers: dropout does while it trains, a forward of another make might."""
    for inner in module.modules():
        own = vars(inner).get("forward")
        while isinstance(own, (ByPolicy, WithRanges)):
            own = own.inner
        if isinstance(inner, _DropoutNd):
            if inner.training and inner.p > 0.0:
                return True
        elif own is not None or not isinstance(inner, _DRAWS_NOTHING):
            return True
    return False
