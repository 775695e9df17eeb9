"""Key layouts: under which names the same network's tensors are published.

Several publishers name the tensors of one network differently. Which of the known layouts a file has is read off its
keys: the layout that shares most of them. What it does not share is then reported by the strict loading, in that
layout's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tinytl.backbones._inverted_residual import BlockSpec
from tinytl.errors import WeightsError

Names = Callable[[list[str]], Mapping[str, str]]
"""Our names, as a state dict lists them -> our name to the file's name."""


@dataclass(frozen=True)
class Layout:
    """One publisher's names.

    Attributes:
        publisher: who names the tensors so, for messages and docs.
        names: our names -> our name to the file's.
        lite_marker: part of a key that only a lite residual module has; None: the layout knows no such modules.
        norm_eps: that its publisher's norms have, where it is not the network's own; loading sets it.
        as_linear: its 1x1 convolutions (out, in, 1, 1) that are linear layers (out, in) here.
    """

    publisher: str
    names: Names
    lite_marker: str | None = None
    norm_eps: float | None = None
    as_linear: frozenset[str] = frozenset()

    def holds_lite(self, state: Iterable[str]) -> bool:
        """Whether keys in this layout hold lite residual modules."""
        return self.lite_marker is not None and any(self.lite_marker in name for name in state)

    def prepared_(self, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` with the shapes of ``model``, whose norms get the publisher's eps."""
        if self.norm_eps is not None:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                    module.eps = self.norm_eps
        flat = {name: state[name].flatten(1) for name in self.as_linear if name in state and state[name].ndim == 4}
        return {**state, **flat}


OWN = Layout("tinytl", lambda keys: {key: key for key in keys}, ".lite.")
"""``model.state_dict()`` as it is."""


def recognize(state: Iterable[str], keys: Sequence[str], layouts: Iterable[Layout], origin: str) -> Layout:
    """The layout that shares most names with ``state``; ours comes first among equals.

    Args:
        state: the file's keys.
        keys: of the plain network's state dict.
        layouts: the publishers' layouts of this network.
        origin: what to call the file in an error.

    Raises:
        WeightsError: no layout shares a name.
    """
    known, theirs = (OWN, *layouts), set(state)
    shared = [len(theirs & set(layout.names(list(keys)).values())) for layout in known]
    if not max(shared):
        raise WeightsError(
            f"{origin} does not fit the network: it has none of its tensors under any known name"
            f" ({len(theirs)} there, the first is {min(theirs, default='none')!r});"
            f" layouts that are read: {', '.join(layout.publisher for layout in known)}"
        )
    return known[shared.index(max(shared))]


def renamed(keys: Iterable[str], layers: Mapping[str, str]) -> dict[str, str]:
    """Our key -> the file's, given our layer's path -> the file's; the tensor's own name stays."""
    names = {}
    for key in keys:
        layer, _, tensor = key.rpartition(".")
        names[key] = f"{layers[layer]}.{tensor}"
    return names


def unit_path(index: int, spec: BlockSpec) -> str:
    """Path of what holds ``expand``, ``depthwise`` and ``project`` of block ``index``."""
    return f"features.block{index}" + (".body" if spec.has_shortcut else "")
