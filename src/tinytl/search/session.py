"""The super-network of a search, as it is before anything is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tinytl._atomic import atomic_file
from tinytl.backbones import load
from tinytl.errors import WeightsError
from tinytl.supernet.elastic import ElasticNet

from .architecture import Genes, KeptBlocks, OnceForAll
from .main_branch import ElasticMain, KeptMain
from .shared import Main, SharedNet
from .space import Space
from .target import Target

RECALIBRATION_PHOTOS = 256


def make_shared(target: Target, space: Space) -> SharedNet:
    """The super-network with fresh lite modules and a fresh classifier, drawn from the search's seed.

    Raises:
        WeightsError: no weights, or they do not fit the space: the keys are listed.
    """
    spec = target.spec
    norm: Any = spec.norm
    weights = None if spec.weights is None else Path(spec.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        main: Main
        if isinstance(space.architecture, OnceForAll):
            net = ElasticNet(space.architecture.space, len(target.classes), seed=spec.seed)
            if spec.pretrained:
                net.load_published(_needed(weights, spec.space), classifier=False)
            main = ElasticMain(space.architecture, net)
        else:
            assert isinstance(space.architecture, KeptBlocks)
            backbone = load(
                spec.space, pretrained=spec.pretrained, norm=norm, weights=weights, num_classes=len(target.classes)
            )
            main = KeptMain(space.architecture, backbone.model)
        return SharedNet(space, main, norm)


def _needed(weights: Path | None, name: str) -> Path:
    if weights is None:
        raise WeightsError(
            f"{name}: no published weights can be fetched: give the super-network's checkpoint with --weights FILE, or "
            "train one with `tinytl supernet`"
        )
    return weights


def own_weights(space: Space, target: Target, genome: Genes, folder: Path) -> Path | None:
    """The file of a sub-network's main branch, written if it is not there; None where it is the space's own weights.

    Of a once-for-all network: what is cut out of it, its batch norms measured on the target's images.
    """
    if not isinstance(space.architecture, OnceForAll):
        return None
    choice = space.choice(genome)
    path = folder / "weights" / f"{choice.backbone.partition('@')[2]}-{choice.resolution}.safetensors"
    if not path.exists():
        shared = make_shared(target, space)
        shared.choose(genome)
        images = target.calibration_images(choice.resolution, RECALIBRATION_PHOTOS)
        main = shared.main
        assert isinstance(main, ElasticMain)
        main.recalibrate(images)
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write(save({name: value.contiguous() for name, value in main.cut().items()}))
    return path
