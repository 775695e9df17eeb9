"""Which main networks a space holds: the blocks kept of any backbone, or the sub-networks of a once-for-all network.

Either tells its genes, what a vector of their values means, and the name by which `tinytl.backbones.load` makes it. A
*slot* is a place where a block may stand, numbered through the full network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinytl.backbones.architecture import kept_text
from tinytl.backbones.once_for_all import OfaArchitecture, OfaSpace, architecture_text

Genes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Gene:
    """One thing to choose: its name, and the values it may take; a genome holds the index of one of them."""

    name: str
    values: tuple[int, ...]


class Architecture(Protocol):
    """The main branch's part of a space."""

    @property
    def base(self) -> str:
        """Name of the full network."""
        ...

    @property
    def slots(self) -> int:
        """Places where a block may stand."""
        ...

    @property
    def genes(self) -> tuple[Gene, ...]:
        """What can be chosen, in order."""
        ...

    def active(self, genes: Genes) -> tuple[int, ...]:
        """The slots that hold a block, in order."""
        ...

    def canonical(self, genes: Genes) -> Genes:
        """The same architecture with every gene that means nothing in it at 0."""
        ...

    def name(self, genes: Genes) -> str:
        """The backbone's name, as `tinytl.backbones.load` reads it."""
        ...

    def sample(self, rng: np.random.Generator) -> Genes:
        """A random architecture."""
        ...

    def largest(self) -> Genes:
        """The full network."""
        ...

    def smallest(self) -> Genes:
        """The one with the fewest blocks, and the narrowest."""
        ...


@dataclass(frozen=True)
class KeptBlocks:
    """Any backbone as a space: which of its blocks with an identity shortcut stay.

    Attributes:
        base: the backbone.
        slots: blocks of the full network.
        droppable: numbers of those that may go.
        most_dropped: so many go at random at most: a pretrained network loses its features with its blocks, since
            what is left of the main branch stays frozen. Evolution is not bound to it.
    """

    base: str
    slots: int
    droppable: tuple[int, ...]
    most_dropped: int = 3

    @property
    def genes(self) -> tuple[Gene, ...]:
        """One a droppable block: 1 keeps it."""
        return tuple(Gene(f"keep {block}", (0, 1)) for block in self.droppable)

    def active(self, genes: Genes) -> tuple[int, ...]:
        """The slots that hold a block, in order."""
        gone = {block for block, keep in zip(self.droppable, genes, strict=True) if not keep}
        return tuple(slot for slot in range(self.slots) if slot not in gone)

    def canonical(self, genes: Genes) -> Genes:
        """Itself: every gene means something."""
        return genes.copy()

    def name(self, genes: Genes) -> str:
        """``BASE@0-3.5-9``; the base's own name where all are kept."""
        active = self.active(genes)
        return self.base if len(active) == self.slots else f"{self.base}@{kept_text(active)}"

    def sample(self, rng: np.random.Generator) -> Genes:
        """Up to `most_dropped` blocks left out, each number as likely."""
        genes = self.largest()
        count = int(rng.integers(min(self.most_dropped, len(genes)) + 1))
        genes[rng.permutation(len(genes))[:count]] = 0
        return genes

    def largest(self) -> Genes:
        """All kept."""
        return np.ones(len(self.droppable), np.int64)

    def smallest(self) -> Genes:
        """All that may go left out."""
        return np.zeros(len(self.droppable), np.int64)


@dataclass(frozen=True)
class OnceForAll:
    """The sub-networks of a once-for-all network: depth a stage, kernel and expand ratio a block."""

    space: OfaSpace

    @property
    def base(self) -> str:
        """The super-network's name."""
        return self.space.name

    @property
    def slots(self) -> int:
        """The super-network's blocks, its fixed first one included."""
        return 1 + len(self.space.blocks)

    @property
    def genes(self) -> tuple[Gene, ...]:
        """Depths of the stages that have a choice, then kernels, then expand ratios of all slots but the first."""
        space = self.space
        return (
            *(Gene(f"depth {stage}", space.stages[stage].depths) for stage in space.elastic_stages),
            *(Gene(f"kernel {block.number}", space.kernels) for block in space.blocks),
            *(Gene(f"expand {block.number}", space.expands) for block in space.blocks),
        )

    def _parts(self, genes: Genes) -> tuple[Genes, Genes, Genes]:
        """Indices of depths, kernels and expand ratios: views."""
        stages, blocks = len(self.space.elastic_stages), len(self.space.blocks)
        return genes[:stages], genes[stages : stages + blocks], genes[stages + blocks :]

    def active(self, genes: Genes) -> tuple[int, ...]:
        """The slots that hold a block, in order."""
        depths = {stage: max(self.space.stages[stage].depths) for stage in range(len(self.space.stages))}
        for stage, index in zip(self.space.elastic_stages, self._parts(genes)[0], strict=True):
            depths[stage] = self.space.stages[stage].depths[int(index)]
        return (0, *(block.number for block in self.space.blocks if block.place < depths[block.stage]))

    def canonical(self, genes: Genes) -> Genes:
        """Kernels and expand ratios of empty slots at 0."""
        found, active = genes.copy(), self.active(genes)
        empty = [slot - 1 for slot in range(1, self.slots) if slot not in active]
        for part in self._parts(found)[1:]:
            part[empty] = 0
        return found

    def architecture(self, genes: Genes) -> OfaArchitecture:
        """What `tinytl.backbones.once_for_all` makes."""
        depths, kernels, expands = self._parts(genes)
        stages, active = self.space.elastic_stages, [slot - 1 for slot in self.active(genes)[1:]]
        return OfaArchitecture(
            tuple(self.space.stages[stage].depths[int(at)] for stage, at in zip(stages, depths, strict=True)),
            tuple(self.space.kernels[int(kernels[slot])] for slot in active),
            tuple(self.space.expands[int(expands[slot])] for slot in active),
        )

    def name(self, genes: Genes) -> str:
        """``BASE@d...-k...-e...``."""
        return f"{self.base}@{architecture_text(self.space, self.architecture(genes))}"

    def sample(self, rng: np.random.Generator) -> Genes:
        """Each gene by itself, all values as likely."""
        return self.canonical(np.array([rng.integers(len(gene.values)) for gene in self.genes], np.int64))

    def largest(self) -> Genes:
        """The deepest and widest, with the largest kernels."""
        return np.array([len(gene.values) - 1 for gene in self.genes], np.int64)

    def smallest(self) -> Genes:
        """The shallowest and narrowest, with the smallest kernels."""
        return np.zeros(len(self.genes), np.int64)
