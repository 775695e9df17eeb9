"""The parts of a method: each says one thing about what trains.

Two parts name blocks. A block's *position* is its number in the network that is adapted, from 0, in forward order
(`Adaptation.blocks`); the first block gets no lite module, as in the paper.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinytl.errors import InputError

if TYPE_CHECKING:
    from .method import Method

MAX_BLOCKS = 10_000
"""A position is below it: more blocks than any network has, few enough to write a range of them out."""


@dataclass(frozen=True)
class Part:
    """One thing that trains. Add parts to get a `Method`."""

    def __add__(self, other: Part | Method) -> Method:
        from .method import Method

        return Method((self,)) + other

    @property
    def is_empty(self) -> bool:
        """Whether it says that nothing trains: a method leaves such a part out."""
        return False


@dataclass(frozen=True)
class Bias(Part):
    """Every bias of the main network: the shift of each normalization, or of a layer that has its own."""


@dataclass(frozen=True)
class BlockBias(Part):
    """The biases of some blocks alone. No activation is kept before the first of them.

    What stands before the first block counts as part of it, and what stands behind the last as part of that; layers
    between two blocks belong to the earlier one.

    Attributes:
        blocks: positions, 0 or more; kept in rising order.

    Raises:
        InputError: a position below 0, beyond any network, or named twice.
    """

    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        found = sorted(_whole("block bias", self.blocks))
        _check_positions("block bias", found, 0)
        object.__setattr__(self, "blocks", tuple(found))

    @property
    def is_empty(self) -> bool:
        """Whether no block is named."""
        return not self.blocks

    @property
    def last_position(self) -> int:
        """The last block named; -1 without one."""
        return self.blocks[-1] if self.blocks else -1


@dataclass(frozen=True)
class Norm(Part):
    """Scale and shift of every normalization (statistics stay frozen)."""


@dataclass(frozen=True)
class Full(Part):
    """Every parameter of the network (statistics stay frozen)."""


@dataclass(frozen=True)
class LiteResidual(Part):
    """A lite residual module beside every block but the first (PAPER.md, "Lite residual module").

    Attributes:
        kernel_size: of the group convolution, odd; smaller where the pooled image is smaller.
        groups: of the group convolution.

    Raises:
        InputError: an even or non-positive kernel, no groups.
    """

    kernel_size: int = 5
    groups: int = 2

    def __post_init__(self) -> None:
        _check_convolution("lite residual", self.kernel_size, self.groups)


@dataclass(frozen=True)
class LiteModules(Part):
    """Lite residual modules beside some blocks, each with a kernel, groups and width of its own.

    Attributes:
        modules: (position of the block, kernel size, groups, width in percent), one for each module; kept in rising
            order of position. Kernel and groups are as in `LiteResidual`; the width is the middle's, of the paper's
            (`tinytl.nn.lite_residual.lite_middle`).

    Raises:
        InputError: a position below 1, beyond any network, or named twice; an even or non-positive kernel, no groups,
            a width that is not 1 to 100.
    """

    modules: tuple[tuple[int, int, int, int], ...]

    def __post_init__(self) -> None:
        found: list[tuple[int, int, int, int]] = []
        for module in self.modules:
            values = _whole("lite module", module)
            if len(values) != 4:
                raise InputError(f"lite module {module!r}: expected (block, kernel size, groups, width in percent)")
            position, kernel_size, groups, width = values
            _check_convolution(f"lite module of block {position}:", kernel_size, groups)
            if not 1 <= width <= 100:
                raise InputError(f"lite module of block {position}: width {width} %: expected 1 to 100")
            found.append((position, kernel_size, groups, width))
        found.sort()
        _check_positions("lite module", [position for position, *_ in found], 1)
        object.__setattr__(self, "modules", tuple(found))

    @property
    def is_empty(self) -> bool:
        """Whether there is no module."""
        return not self.modules

    @property
    def last_position(self) -> int:
        """The last block named; -1 without one."""
        return self.modules[-1][0] if self.modules else -1


@dataclass(frozen=True)
class LastBlocks(Part):
    """Every parameter of the last `count` blocks and of all that stands behind them (the paper's dagger: 2).

    Raises:
        InputError: a negative count.
    """

    count: int = 2

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InputError(f"last blocks {self.count}: expected 0 or more")

    @property
    def is_empty(self) -> bool:
        """Whether it is about no block."""
        return self.count == 0


def _whole(what: str, values: Iterable[int]) -> list[int]:
    """The values as plain integers: a search may hold those of numpy, which JSON does not know."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise InputError(f"{what} {values!r}: expected whole numbers") from None


def _check_positions(what: str, positions: list[int], least: int) -> None:
    for at, position in enumerate(positions):
        if not least <= position < MAX_BLOCKS:
            why = " (the first block, 0, gets none)" if least == 1 else ""
            raise InputError(f"{what} of block {position}: expected a block from {least} to {MAX_BLOCKS - 1}{why}")
        if at and positions[at - 1] == position:
            raise InputError(f"{what} of block {position} named twice: expected every block once")


def _check_convolution(what: str, kernel_size: int, groups: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"{what} kernel size {kernel_size}: expected an odd number, 1 or more")
    if groups < 1:
        raise InputError(f"{what} groups {groups}: expected 1 or more")
