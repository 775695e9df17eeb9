"""A once-for-all super-network in plain PyTorch: one set of weights, run as any sub-network of its space.

    net = ElasticNet(space_of("ofa_tiny_d234_e346_k357"), num_classes=10, seed=0)
    net.choose(smallest(net.space))
    logits = net(images)

Its state dict has the published keys, so published super-networks are read as they are and what is trained here can be
read by others. In evaluation mode a choice gives the bits of the static network that
`tinytl.backbones.ofa_layouts.cut_state` cuts for it (on the CPU, for equal images in equal memory formats).

Source: Cai et al., "Once-for-All: Train One Network and Specialize it for Efficient Deployment" (ICLR 2020, arXiv
1908.09791).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinytl.backbones.ofa_layouts import published_state
from tinytl.backbones.once_for_all import (
    OfaArchitecture,
    OfaSpace,
    active_blocks,
    architecture_text,
    largest,
    middle_channels,
)
from tinytl.backbones.weights import need_file, read_state
from tinytl.errors import InputError, WeightsError

from .elastic_layers import ElasticBlock, FixedBlock, FixedUnit


class ElasticNet(nn.Module):
    """The super-network of a space; shapes (N, 3, H, W) -> (N, num_classes).

    Parameters that the choice leaves out get no gradient (None), so an optimizer passes them by.

    Args:
        space: of its sub-networks.
        num_classes: of the classifier, at least 1.
        seed: of the weights: normal, of variance 2 / (kernel area x filters a group), for convolutions; what torch.nn
            draws, for the classifier. No generator of the caller's is used.

    Attributes:
        space, num_classes: as given.
        architecture: the sub-network that is run; at first the largest.
        beside: told a block's number, input and output, gives what goes on in the output's place; None: nothing does.

    Raises:
        InputError: fewer than one class.
    """

    def __init__(self, space: OfaSpace, num_classes: int = 1000, seed: int = 0) -> None:
        super().__init__()
        if num_classes < 1:
            raise InputError(f"num_classes is {num_classes}: expected at least 1")
        self.space, self.num_classes = space, num_classes
        with torch.random.fork_rng(devices=()):  # layers draw when they are made, and are then drawn anew
            self._build_()
        self._initialize_(seed)
        self.beside: Callable[[int, Tensor, Tensor], Tensor] | None = None
        self.choose(largest(space))

    def choose(self, architecture: OfaArchitecture) -> None:
        """Run this sub-network from now on.

        Raises:
            InputError: it is none of the space.
        """
        space = self.space
        active = active_blocks(space, architecture)
        # (block number, whether it has a shortcut, kernel, middle channels), in forward order
        self._path = tuple(
            (block.number, block.has_shortcut, kernel, middle_channels(space, block.number, expand))
            for block, kernel, expand in zip(active, architecture.kernels, architecture.expands, strict=True)
        )
        self.architecture = architecture

    def forward(self, input: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        x = self.first_conv(input)  # (N, stem, H / 2, W / 2)
        first = self.blocks[0].get_submodule("conv")(x)
        x = x + first if self.space.first_has_shortcut else first
        for number, has_shortcut, kernel, middle in self._path:
            y = self.elastic_block(number)(x, kernel, middle)
            y = x + y if has_shortcut else y
            x = y if self.beside is None else self.beside(number, x, y)
        if not self.space.hidden:
            features = self.feature_mix_layer(x).mean((2, 3))  # (N, head)
        else:
            features = self.final_expand_layer(x).mean((2, 3))
            weight = self.feature_mix_layer.get_parameter("conv.weight")
            features = F.hardswish(F.linear(features, weight.flatten(1)))  # (N, hidden)
        return self.classifier.get_submodule("linear")(features)

    def elastic_block(self, number: int) -> ElasticBlock:
        """A block by its number in the super-network, from 1 on."""
        found = self.blocks[number].get_submodule("conv")
        assert isinstance(found, ElasticBlock)
        return found

    def load_published(self, path: Path, *, classifier: bool = True) -> None:
        """Read a super-network's weights, in the published keys or their older spelling.

        Args:
            path: a ``.safetensors`` or torch file.
            classifier: take the file's classifier too; else this network keeps its own, of any number of classes.

        Raises:
            WeightsError: unreadable, or keys that are missing, unknown or of a wrong shape, which are listed. Nothing
                has changed then.
        """
        origin = repr(str(path))
        self.load_super_state(read_state(need_file(Path(path))), origin, classifier=classifier)

    def load_super_state(
        self, state: Mapping[str, Tensor], origin: str = "weights", *, classifier: bool = True
    ) -> None:
        """As `load_published`, of a state dict; ``origin`` is what an error calls it."""
        known = published_state(self.space, state, origin)
        classes = known["classifier.linear.weight"].shape[0]
        if classifier and classes != self.num_classes:
            raise WeightsError(
                f"{origin} has {classes} classes, expected {self.num_classes}: build the network with {classes}, or "
                "leave the file's classifier out (classifier=False)"
            )
        own = self.state_dict()
        with torch.no_grad():
            for name, value in known.items():
                if classifier or not name.startswith("classifier."):
                    own[name].copy_(value)

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{self.space.name}@{architecture_text(self.space, self.architecture)}"

    def _build_(self) -> None:
        space = self.space
        swish = nn.Hardswish if space.hidden else nn.ReLU6
        self.first_conv = FixedUnit(3, space.stem, 3, 2, 1, swish, space.eps)
        first = FixedBlock(space.stem, space.first, nn.ReLU if space.hidden else nn.ReLU6, space.eps)
        others = (_block(space, block.number) for block in space.blocks)
        self.blocks = nn.ModuleList(_Held(conv=block) for block in (first, *others))
        head = FixedUnit(space.stages[-1].width, space.head, 1, 1, 1, swish, space.eps)
        if space.hidden:
            self.final_expand_layer = head
            self.feature_mix_layer = _Held(conv=nn.Conv2d(space.head, space.hidden, 1, bias=False))
        else:
            self.feature_mix_layer = head
        self.classifier = _Held(linear=nn.Linear(space.hidden or space.head, self.num_classes))

    def _initialize_(self, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                area = module.kernel_size[0] * module.kernel_size[1]
                std = (2.0 / (area * module.out_channels / module.groups)) ** 0.5
                nn.init.normal_(module.weight, std=std, generator=draws)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=draws)
                nn.init.uniform_(module.bias, -bound, bound, generator=draws)


class _Held(nn.Module):
    """A module under a name that the published keys have: ``blocks.N.conv``, ``classifier.linear``."""

    def __init__(self, **named: nn.Module) -> None:
        super().__init__()
        for name, module in named.items():
            self.add_module(name, module)


def _block(space: OfaSpace, number: int) -> ElasticBlock:
    block = space.blocks[number - 1]
    stage = space.stages[block.stage]
    act = nn.ReLU6 if not space.hidden else nn.Hardswish if stage.hard_swish else nn.ReLU
    middle = middle_channels(space, number, space.expands[-1])
    return ElasticBlock(
        block.in_channels, middle, block.out_channels, space.kernels, block.stride, act, stage.excites, space.eps
    )
