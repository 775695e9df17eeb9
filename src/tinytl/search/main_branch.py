"""The main networks of spaces: any backbone, whose blocks with a shortcut may stand aside; a once-for-all network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tinytl.backbones import block_paths
from tinytl.backbones.ofa_layouts import cut_state
from tinytl.supernet.elastic import ElasticNet
from tinytl.supernet.recalibration import recalibrate_

from .architecture import Genes, KeptBlocks, OnceForAll

Forward = Callable[[Tensor], Tensor]
Beside = Callable[[int, Tensor, Tensor], Tensor]
"""A block's slot, input and output -> what goes on in the output's place."""


class KeptMain:
    """A backbone whose droppable blocks can be taken out and put back.

    Args:
        architecture: which they are.
        model: the full backbone, in evaluation mode.
    """

    classifier = "classifier"

    def __init__(self, architecture: KeptBlocks, model: nn.Module) -> None:
        self.model, self._architecture = model, architecture
        self.paths = block_paths(model)
        self._blocks = tuple(model.get_submodule(path) for path in self.paths)
        self._aside = nn.Identity()

    def attach(self, beside: Beside) -> None:
        """Have every block's output go through `beside`."""
        for slot, block in enumerate(self._blocks):
            block.register_forward_hook(_hook(beside, slot))

    def choose(self, genes: Genes) -> None:
        """Be that architecture from now on."""
        active = set(self._architecture.active(genes))
        for slot in self._architecture.droppable:
            parent, _, name = self.paths[slot].rpartition(".")
            setattr(self.model.get_submodule(parent), name, self._blocks[slot] if slot in active else self._aside)

    def biases(self) -> Mapping[str, int]:
        """Names of the biases but the classifier's, and the slot that each belongs to; behind the last block: -1."""
        return slots_of_biases(self.model, self.paths, self.classifier)

    def train_mode(self, training: bool) -> None:
        """Dropout as in training; statistics are frozen, those of a block that stands aside too."""
        for module in (self.model, *self._blocks):
            module.train(training)
            for norm in module.modules():
                if isinstance(norm, _NormBase):
                    norm.eval()

    def recalibrate(self, images: Iterable[Tensor], forward: Forward | None = None) -> None:
        """Nothing: the statistics are the pretrained network's own, whatever is left out."""


def _hook(beside: Beside, slot: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _, args, out: beside(slot, args[0], out)


class ElasticMain:
    """A once-for-all super-network. Its statistics are those of no sub-network, so they are measured for each.

    Args:
        architecture: the genes of its sub-networks.
        model: the super-network.
    """

    classifier = "classifier.linear"

    def __init__(self, architecture: OnceForAll, model: ElasticNet) -> None:
        self.model, self._architecture = model, architecture
        self.paths = tuple(f"blocks.{slot}" for slot in range(architecture.slots))

    def attach(self, beside: Beside) -> None:
        """Have the output of every block but the first go through `beside`."""
        self.model.beside = beside

    def choose(self, genes: Genes) -> None:
        """Be that architecture from now on."""
        self.model.choose(self._architecture.architecture(genes))

    def biases(self) -> Mapping[str, int]:
        """Names of the biases but the classifier's, and the slot that each belongs to; behind the last block: -1."""
        return slots_of_biases(self.model, self.paths, self.classifier)

    def train_mode(self, training: bool) -> None:
        """In training every norm goes by its batch, and remembers nothing."""
        self.model.train(training)
        for norm in self.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.track_running_stats = not training

    def recalibrate(self, images: Iterable[Tensor], forward: Forward | None = None) -> None:
        """Measure the statistics of the architecture that is chosen; by way of `forward`, where that is given."""
        recalibrate_(self.model if forward is None else _Through(self.model, forward), images)

    def cut(self) -> dict[str, Tensor]:
        """The state of the static network of the architecture that is chosen, in our names."""
        return cut_state(self._architecture.space, self.model.state_dict(), self.model.architecture)


class _Through(nn.Module):
    """A network whose passes go through something that stands around it."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self._around = model, forward

    def forward(self, images: Tensor) -> Tensor:
        return self._around(images)


def slots_of_biases(model: nn.Module, paths: tuple[str, ...], classifier: str) -> dict[str, int]:
    """The slot that each bias belongs to: before the first block 0, behind the last -1."""
    found: dict[str, int] = {}
    behind = False
    for name, _ in model.named_parameters():
        slot = next((at for at, path in enumerate(paths) if name.startswith(f"{path}.")), None)
        behind = behind or slot is not None
        if name.endswith(".bias") and not name.startswith(f"{classifier}."):
            found[name] = slot if slot is not None else (-1 if behind else 0)
    return found
