"""Spaces of sub-networks: a vector of small whole numbers (a *genome*) and the network that it names.

A genome says, in this order: the resolution; the main network (`tinytl.search.architecture`); of every slot but the
first its lite residual module, as kernel (0: none), groups and width; of every slot whether its biases train. Genes
that mean nothing, such as those of a block that is not there, are 0 in a *canonical* genome, so that equal networks
have equal genomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tinytl.backbones import PREFIX, block_paths, droppable, find
from tinytl.backbones.once_for_all import SPACES
from tinytl.errors import InputError
from tinytl.methods import BlockBias, LiteModules, Method
from tinytl.nn.lite_residual import block_shape, lite_geometry

from .architecture import Architecture, Gene, Genes, KeptBlocks, OnceForAll

KERNELS, GROUPS, WIDTHS = (3, 5), (2, 4), (50, 100)
"""Of lite residual modules: kernels and groups are the paper's (PAPER.md, FA); a width is a share of its own."""
SCALES = (0.75, 0.875, 1.0, 1.125, 1.25)
"""Resolutions of a space where none are asked for, as shares of the backbone's own."""


@dataclass(frozen=True)
class Choice:
    """One sub-network and how it is adapted: what a run, a delta or a program is told.

    Attributes:
        backbone: a name for `tinytl.backbones.load`, such as ``mcunet_5fps@0-4.6-13``.
        method: a text for `tinytl.methods.method`, such as ``bias(3-12)+lite(1:k5g2)``.
        resolution: pixels a side.
    """

    backbone: str
    method: str
    resolution: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Site:
    """Where a lite residual module may stand: what it takes and gives, and its largest kernel.

    Attributes:
        in_channels, out_channels, stride: of the block.
        kernels: that it may have; the last is the largest.
        pools_globally: whether it pools the whole image.
    """

    in_channels: int
    out_channels: int
    stride: int
    kernels: tuple[int, ...]
    pools_globally: bool


@dataclass(frozen=True)
class Space:
    """What can be chosen.

    Attributes:
        architecture: of the main network.
        first: (in channels, out channels, stride) of the first block, which gets no lite module.
        sites: of the slots 1, 2, ...: what a lite module there looks like.
        resolutions: pixels a side, ascending.
        groups, widths: of lite modules.
    """

    architecture: Architecture
    first: tuple[int, int, int]
    sites: tuple[Site, ...]
    resolutions: tuple[int, ...]
    groups: tuple[int, ...] = GROUPS
    widths: tuple[int, ...] = WIDTHS

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """All genes, in order."""
        lite = []
        for slot, site in enumerate(self.sites, 1):
            lite += [
                Gene(f"lite {slot} kernel", (0, *site.kernels)),
                Gene(f"lite {slot} groups", self.groups),
                Gene(f"lite {slot} width", self.widths),
            ]
        biases = [Gene(f"bias {slot}", (0, 1)) for slot in range(self.architecture.slots)]
        return (Gene("resolution", self.resolutions), *self.architecture.genes, *lite, *biases)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """How many values each gene has."""
        return tuple(len(gene.values) for gene in self.genes)

    @property
    def log10_size(self) -> float:
        """Decimal digits of the number of genomes, canonical or not."""
        return float(sum(np.log10(len(gene.values)) for gene in self.genes))

    def split(self, genome: Genes) -> tuple[int, Genes, Genes, Genes]:
        """A genome's parts: resolution's index, architecture, lite modules (slots - 1, 3), biases (slots,)."""
        first, slots = 1 + len(self.architecture.genes), self.architecture.slots
        lite = genome[first : first + 3 * (slots - 1)].reshape(slots - 1, 3)
        return int(genome[0]), genome[1:first], lite, genome[first + 3 * (slots - 1) :]

    def joined(self, resolution: int, architecture: Genes, lite: Genes, biases: Genes) -> Genes:
        """The canonical genome of such parts."""
        return self.canonical(np.concatenate([[resolution], architecture, lite.reshape(-1), biases]).astype(np.int64))

    def canonical(self, genome: Genes) -> Genes:
        """The same network with every gene that means nothing at 0."""
        found = np.array(genome, np.int64)
        _, architecture, lite, biases = self.split(found)
        found[1 : 1 + len(architecture)] = architecture = self.architecture.canonical(architecture)
        active = self.architecture.active(architecture)
        empty = [slot for slot in range(self.architecture.slots) if slot not in active]
        lite[[slot - 1 for slot in empty if slot]] = 0  # a view: it is the genome that changes
        lite[lite[:, 0] == 0] = 0
        biases[empty] = 0
        return found

    def resolution(self, genome: Genes) -> int:
        """Pixels a side."""
        return self.resolutions[int(genome[0])]

    def active(self, genome: Genes) -> tuple[int, ...]:
        """The slots that hold a block, in order."""
        return self.architecture.active(self.split(genome)[1])

    def lite(self, genome: Genes) -> dict[int, tuple[int, int, int]]:
        """Slot -> (kernel, groups, width in percent) of its lite module, where it has one."""
        rows = self.split(genome)[2]
        return {
            slot: (site.kernels[int(kernel) - 1], self.groups[int(groups)], self.widths[int(width)])
            for slot, (site, (kernel, groups, width)) in enumerate(zip(self.sites, rows, strict=True), 1)
            if kernel
        }

    def biases(self, genome: Genes) -> tuple[int, ...]:
        """The slots whose biases train."""
        return tuple(int(slot) for slot in np.flatnonzero(self.split(genome)[3]))

    def method(self, genome: Genes) -> Method:
        """What trains, by the positions of the blocks that are there."""
        genome = self.canonical(genome)
        position = {slot: at for at, slot in enumerate(self.active(genome))}
        lite = tuple((position[slot], *module) for slot, module in self.lite(genome).items())
        biases = tuple(position[slot] for slot in self.biases(genome))
        parts = (*((BlockBias(biases),) if biases else ()), *((LiteModules(lite),) if lite else ()))
        return Method(parts)

    def choice(self, genome: Genes) -> Choice:
        """What a genome names."""
        name = self.architecture.name(self.split(genome)[1])
        return Choice(name, self.method(genome).name, self.resolution(genome))

    def sample(self, rng: np.random.Generator) -> Genes:
        """A random network: how much of it trains is drawn first, so that small and large ones are as likely."""
        slots = self.architecture.slots
        share, resolution = rng.uniform(), int(rng.integers(len(self.resolutions)))
        lite = np.array([[rng.integers(len(gene.values)) for gene in row] for row in self._rows()], np.int64)
        lite[:, 0] = [rng.integers(1, len(site.kernels) + 1) for site in self.sites]
        lite[rng.uniform(size=slots - 1) > share, 0] = 0
        # biases train from some block on: what stands before it keeps nothing for backward
        biases = (np.arange(slots) >= rng.integers(slots + 1)) & (rng.uniform(size=slots) < 0.9)
        return self.joined(resolution, self.architecture.sample(rng), lite, biases.astype(np.int64))

    def default(self, resolution: int, *, lite_modules: bool = True) -> Genes:
        """TinyTL-L+B of the full network at the resolution of that index: every module at its largest.

        Without lite modules it is TinyTL-B.
        """
        largest = np.array([[len(site.kernels), 0, len(self.widths) - 1] for site in self.sites], np.int64)
        lite = largest if lite_modules else np.zeros_like(largest)
        biases = np.ones(self.architecture.slots, np.int64)
        return self.joined(resolution, self.architecture.largest(), lite, biases)

    def smallest(self) -> Genes:
        """The classifier alone on the smallest network at the smallest resolution."""
        slots = self.architecture.slots
        none = np.zeros((slots - 1, 3), np.int64)
        return self.joined(0, self.architecture.smallest(), none, np.zeros(slots, np.int64))

    def _rows(self) -> list[tuple[Gene, Gene, Gene]]:
        lite = [gene for gene in self.genes if gene.name.startswith("lite ")]
        return [(lite[at], lite[at + 1], lite[at + 2]) for at in range(0, len(lite), 3)]


def make_space(base: str, resolutions: Sequence[int] | None = None) -> Space:
    """The space of a backbone, or of a once-for-all super-network, by name.

    Args:
        base: a name for `tinytl.backbones.find`, without an architecture of its own.
        resolutions: pixels a side; None: `SCALES` of the backbone's own, in multiples of 16.

    Raises:
        UnknownNameError: no such backbone. InputError: the name has an architecture, or resolutions cannot be.
    """
    if "@" in base and not base.startswith(PREFIX):
        raise InputError(f"space {base!r} names one sub-network: give the full network, {base.partition('@')[0]!r}")
    entry = find(base)
    own = entry.preprocessing.resolution
    chosen = tuple(sorted({*(resolutions or (max(32, round(own * scale / 16) * 16) for scale in SCALES))}))
    if chosen[0] < 32:
        raise InputError(f"resolution {chosen[0]}: expected 32 pixels a side or more")
    with torch.device("meta"):
        model = entry.build(num_classes=2)
    blocks = [model.get_submodule(path) for path in block_paths(model)]
    try:
        shapes = [block_shape(block) for block in blocks]
    except InputError as error:
        raise InputError(f"space {base!r}: a block's shape cannot be read off: {error}") from error
    geometry = lite_geometry([stride for *_, stride in shapes[1:]])
    sites = tuple(
        Site(*shape, _kernels(largest), pools) for shape, (largest, pools) in zip(shapes[1:], geometry, strict=True)
    )
    if base in SPACES:
        return Space(OnceForAll(SPACES[base]), shapes[0], sites, chosen)
    may_go = tuple(block for block in droppable(model) if block)  # the first has no lite module beside it
    return Space(KeptBlocks(base, len(blocks), may_go), shapes[0], sites, chosen)


def _kernels(largest: int) -> tuple[int, ...]:
    return (*(kernel for kernel in KERNELS if kernel < largest), largest)
