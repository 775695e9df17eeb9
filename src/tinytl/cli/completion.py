"""The names that a shell completes. They stand here as literals, since looking them up would import PyTorch.

`tests/test_cli.py` holds them against the library's own tables.
"""

from __future__ import annotations

from collections.abc import Callable

from tinytl.spec import NORMS, OPTIMIZERS

BACKBONES = (
    *("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "mbv2_w035", "mcunet_5fps", "mobilenet_v2"),
    *("mobilenet_v2_140", "mobilenet_v3_large", "proxyless_w03", "proxylessnas_mobile", "resnet50"),
    *("ofa_mbv3_d234_e346_k357_w1.0", "ofa_mbv3_d234_e346_k357_w1.2", "ofa_proxyless_d234_e346_k357_w1.3"),
    "ofa_tiny_d234_e346_k357",
)
METHODS = ("ft-full", "ft-last", "ft-norm+last", "tinytl-b", "tinytl-l", "tinytl-l+b")
DATASETS = ("elpv",)
NAMES = {"backbone": BACKBONES, "method": METHODS, "norm": NORMS, "optimizer": OPTIMIZERS}


def names(*known: str) -> Callable[[str], list[str]]:
    """Complete one of the names; a shell offers files too where it offers nothing else."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete
