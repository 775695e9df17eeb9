"""The super-network for a data set: a main network that stays frozen, and every choice of what trains beside it.

One set of weights serves all sub-networks of a space: lite residual modules are cut out of one another
(`tinytl.search.elastic_lite`), a block's trained biases stand beside its frozen ones, the classifier is shared. A
sub-network built by itself, with the weights that it has here, computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tinytl.nn.layers import Norm

from .architecture import Genes
from .elastic_lite import Module, calibrate_lite_, shared_lite
from .space import Space


class Main(Protocol):
    """The main network of a space, which can be made any of its architectures."""

    @property
    def model(self) -> nn.Module:
        """The network; its parameters never change."""
        ...

    @property
    def classifier(self) -> str:
        """Path of the linear classifier."""
        ...

    def attach(self, beside: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        """Have the output of every block that may have a lite module go through ``beside(slot, input, output)``."""
        ...

    def choose(self, genes: Genes) -> None:
        """Be that architecture from now on."""
        ...

    def biases(self) -> Mapping[str, int]:
        """Names of the biases but the classifier's, and the slot that each belongs to; behind the last block: -1."""
        ...

    def train_mode(self, training: bool) -> None:
        """Set dropout and statistics for training, or for evaluation."""
        ...

    def recalibrate(self, images: Iterable[Tensor], forward: Callable[[Tensor], Tensor] | None = None) -> None:
        """Measure the statistics of the architecture that is chosen, where they depend on it."""
        ...


class SharedNet(nn.Module):
    """The super-network.

    Args:
        space: what can be chosen.
        main: its main network.
        norm: of the lite modules.
        classes: of the classifier, which is fresh.
    """

    def __init__(self, space: Space, main: Main, norm: Norm) -> None:
        super().__init__()
        self.space, self.norm = space, norm
        self._main = [main]  # in a list: its tensors are frozen and no part of what is learned here
        main.model.requires_grad_(False)
        head = main.model.get_submodule(main.classifier)
        assert isinstance(head, nn.Linear)
        self.classifier = nn.Linear(head.in_features, head.out_features)
        self.classifier.load_state_dict(head.state_dict())
        self.lite = shared_lite(space, norm)
        frozen = dict(main.model.named_parameters())
        self._bias_slots = dict(main.biases())
        self._keys = {name: name.replace(".", "/") for name in self._bias_slots}  # no dots in a ParameterDict
        self.biases = nn.ParameterDict({self._keys[name]: frozen[name].detach().clone() for name in self._bias_slots})
        self.genome = space.smallest()
        self._modules_at: dict[int, Module] = {}
        self._overrides: dict[str, Tensor] = {}
        self._inputs: dict[int, list[Tensor]] | None = None  # of the blocks, while they are asked for
        main.attach(self._beside)
        self.choose(space.default(len(space.resolutions) - 1))

    @property
    def main(self) -> Main:
        """The main network."""
        return self._main[0]

    def choose(self, genome: Genes) -> None:
        """Be the sub-network of that genome from now on."""
        self.genome = self.space.canonical(genome)
        self.main.choose(self.space.split(self.genome)[1])
        self._modules_at = self.space.lite(self.genome)
        active = self.space.active(self.genome)
        on = set(self.space.biases(self.genome))
        if active[-1] in on:
            on.add(-1)  # what stands behind the last block goes with it
        self._overrides = {name: self.biases[self._keys[name]] for name, slot in self._bias_slots.items() if slot in on}
        self._still = {slot for slot in self._modules_at if slot in on}

    def train(self, mode: bool = True) -> SharedNet:
        """Set the mode; the main network's statistics stay as its space has them."""
        super().train(mode)
        self.main.train_mode(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, R, R)."""
        head = {f"{self.main.classifier}.{name}": value for name, value in self.classifier.named_parameters()}
        return functional_call(self.main.model, {**self._overrides, **head}, (images,))

    @property
    def trained_biases(self) -> dict[str, Tensor]:
        """The main network's biases, by name, that are replaced by trained ones in what is chosen."""
        return dict(self._overrides)

    def recalibrate_(self, images: Iterable[Tensor]) -> None:
        """Measure the main network's statistics for what is chosen, where they depend on it (in evaluation mode)."""
        self.main.recalibrate(images, self)

    def _beside(self, slot: int, input: Tensor, out: Tensor) -> Tensor:
        """A block's output with its lite module's added, as `LiteBlock` does."""
        if self._inputs is not None and slot:
            self._inputs.setdefault(slot, []).append(input)
        module = self._modules_at.get(slot)
        if module is None:
            return out
        lite = self.lite_at(slot)(input, module)
        if lite.shape[-2:] != out.shape[-2:]:
            lite = F.interpolate(lite, size=out.shape[-2:], mode="bilinear", align_corners=False)
        return out + lite

    def lite_at(self, slot: int) -> Any:
        """The `SharedLite` of a slot."""
        return self.lite[str(slot)]

    def calibrate_(self, images: Callable[[], Iterable[Tensor]]) -> None:
        """Measure the statistics of every lite module, beside the full network without any of them.

        ``images`` gives batches (N, 3, R, R), each time the same. Group norm has none, and nothing is done.
        """
        if self.norm == "gn":
            return
        before = self.genome
        bare = self.space.split(self.space.default(0))
        self.choose(self.space.joined(0, bare[1], bare[2] * 0, bare[3] * 0))
        modes = self.training
        self.eval()
        self.main.recalibrate(images())
        self._inputs = {}
        with torch.no_grad():
            for batch in images():
                self(batch)
        inputs, self._inputs = self._inputs, None
        for layer in ("norm1", "norm2"):
            for slot, seen in inputs.items():
                calibrate_lite_(self.lite_at(slot), layer, seen)
        self.train(modes)
        self.choose(before)

    @contextmanager
    def only_used(self) -> Iterator[list[nn.Parameter]]:
        """Parameters of the sub-network that is chosen, which alone require gradients in the block."""
        used = [*self.classifier.parameters(), *(p for p in self._overrides.values() if isinstance(p, nn.Parameter))]
        for slot in self._modules_at:
            full = self.lite_at(slot).full
            used += [p for name, p in full.named_parameters() if not (name == "norm2.bias" and slot in self._still)]
        self.requires_grad_(False)
        for parameter in used:
            parameter.requires_grad_()
        try:
            yield used
        finally:
            self.requires_grad_(True)
