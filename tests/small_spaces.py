"""Once-for-all spaces of a few thousand weights, one of each family, with every kind of choice."""

from __future__ import annotations

from tinytl.backbones.once_for_all import OfaSpace, OfaStage, Preprocessing

INPUT = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.875)
PROXYLESS = OfaSpace(
    "ofa_small_proxyless",
    "proxyless",
    8,
    8,
    (OfaStage(8, 2, (1, 2)), OfaStage(16, 2, (1, 2, 3)), OfaStage(24, 1, (1,))),
    16,
    0,
    1e-3,
    INPUT,
    expands=(2, 3, 4),
)
MBV3 = OfaSpace(
    "ofa_small_mbv3",
    "mbv3",
    8,
    8,
    (OfaStage(8, 2, (1, 2)), OfaStage(16, 2, (1, 2), excites=True, hard_swish=True)),
    24,
    16,
    1e-5,
    INPUT,
    kernels=(3, 5, 7),
    expands=(3, 6),
)
SMALL = (PROXYLESS, MBV3)
