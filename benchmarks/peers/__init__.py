"""Ours against the others, one run, one machine: `python -m benchmarks.peers`.

Every contender takes the same training step: the same network with the same weights, the same random batch, the same
Adam rate. Of each is measured, in turns where it is time: the peak of live tensor bytes, what the step adds to a fresh
process, seconds, and how far its gradients are from stock autograd's in float64. Writes benchmarks/results/peers.json,
docs/benchmarks/peers.md and docs/benchmarks/peers.png.
"""

from .page import PAGE, PICTURE, RESULTS, page

__all__ = ["PAGE", "PICTURE", "RESULTS", "page"]
