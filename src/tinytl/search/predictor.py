"""The accuracy of a sub-network, predicted from its genome.

The paper's predictor is a perceptron with three hidden layers of 400, fitted to some 450 measured pairs. Measuring is
the whole cost of a search, so this one is made for fewer and noisy ones:

- five perceptrons, each fitted to four fifths of the pairs; all stop at the step at which the fifths that they have not
  seen are predicted best (early stopping), and their mean predicts;
- beside them a ridge regression, which at 60 pairs ranks better than any perceptron does; `tinytl.search.ridge`;
- the two are mixed by the share that predicts pairs best which neither has seen.

What goes in is the one-hot genome, each gene's value as a number in 0..1 as well (values of a gene are in ascending
order), and numbers that the caller may add.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinytl._atomic import DamagedFileError, read_sealed, write_sealed
from tinytl.errors import InputError, RunError

from .encoding import one_hot
from .ranking import kendall_tau
from .ridge import ridge

KIND = "tinytl-predictor/1"
FOLDS = 5
LEAST_PAIRS = 10
STEPS, PATIENCE = 300, 30
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1


@dataclass(frozen=True, eq=False)
class Predictor:
    """A fitted predictor; make one with `Predictor.fit`.

    Attributes:
        cardinalities: values that each gene takes.
        centre, scale: (F,) of the features: what is subtracted, and by what the rest is multiplied; a feature that had
            one value only is multiplied by 0, as nothing was learned of it.
        mean, spread: of the accuracies that it was fitted to.
        linear: (F,) weights of the ridge regression, in spreads.
        network: weights (FOLDS, in, out) and biases (FOLDS, 1, out) of the perceptrons, layer by layer.
        share: of the perceptrons in the mix.
    """

    cardinalities: tuple[int, ...]
    centre: np.ndarray
    scale: np.ndarray
    mean: float
    spread: float
    linear: np.ndarray
    network: tuple[Tensor, ...]
    share: float

    @staticmethod
    def fit(
        genomes: np.ndarray,
        accuracies: np.ndarray,
        cardinalities: Sequence[int],
        *,
        seed: int = 0,
        hidden: int = 400,
        layers: int = 3,
        extra: np.ndarray | None = None,
    ) -> Predictor:
        """Fit to (n, G) genomes and n accuracies; the same arguments give the same predictor.

        Args:
            seed: of the perceptrons' first weights, and of the folds.
            hidden, layers: width and number of the perceptrons' hidden layers.
            extra: (n, E) further numbers of each, such as the logarithm of its multiply-adds. `predict` takes as many.

        Raises:
            InputError: fewer than 10 pairs. ValueError: shapes that do not fit, genes out of range, numbers that are
                not finite.
        """
        y = np.asarray(accuracies, np.float64)
        if len(y) < LEAST_PAIRS:
            raise InputError(f"{len(y)} measured sub-networks: expected {LEAST_PAIRS} or more to predict others from")
        x = _features(genomes, cardinalities, extra)
        if y.shape != (len(x),) or not np.isfinite(y).all():
            raise ValueError(f"accuracies of shape {y.shape}: expected ({len(x)},), finite")
        centre, deviation = x.mean(0), x.std(0)
        plain = x.shape[1] - (0 if extra is None else np.asarray(extra).shape[1])
        # 0/1 features as -1..1, whatever their frequency: a rare one must not outweigh the others. Further numbers by
        # their deviation, as their unit is anyone's
        scale = np.where(np.arange(x.shape[1]) < plain, 2.0, 1 / np.maximum(deviation, 1e-12))
        scale = np.where(deviation > 1e-12, scale, 0.0)
        x = (x - centre) * scale
        mean, spread = float(y.mean()), float(y.std())
        if spread < 1e-12:  # all alike: nothing to learn
            return Predictor(tuple(map(int, cardinalities)), centre, scale, mean, 0.0, np.zeros(x.shape[1]), (), 0.0)
        target = (y - mean) / spread
        linear, linear_unseen = ridge(x, target)
        network, network_unseen = _fit_networks(x, target, seed, hidden, layers)
        apart = network_unseen - linear_unseen
        share = float(np.clip(apart @ (target - linear_unseen) / max(float(apart @ apart), 1e-12), 0.0, 1.0))
        return Predictor(tuple(map(int, cardinalities)), centre, scale, mean, spread, linear, network, share)

    def predict(self, genomes: np.ndarray, extra: np.ndarray | None = None) -> np.ndarray:
        """The accuracies of (n, G) genomes, (n,) float64. Raises ValueError for shapes or genes that do not fit."""
        x = _features(genomes, self.cardinalities, extra)
        if x.shape[1] != self.centre.size:
            raise ValueError(f"{x.shape[1]} features: expected {self.centre.size}: extra must be as it was when fitted")
        x = (x - self.centre) * self.scale
        found = (1 - self.share) * (x @ self.linear)
        if self.share:
            with torch.no_grad():
                found = found + self.share * _run(self.network, torch.from_numpy(x).float()).mean(0).double().numpy()
        return self.mean + self.spread * found

    def save(self, path: Path) -> str:
        """Write it as a sealed file; return its content hash. Raises RunError when it cannot be written."""
        rows = {name: torch.from_numpy(getattr(self, name)) for name in ("centre", "scale", "linear")}
        networks = {f"network.{at}": tensor for at, tensor in enumerate(self.network)}
        metadata = {name: getattr(self, name) for name in ("mean", "spread", "share")}
        return write_sealed(
            Path(path), KIND, {**rows, **networks}, {**metadata, "cardinalities": list(self.cardinalities)}
        )

    @staticmethod
    def load(path: Path) -> Predictor:
        """Read what `save` wrote: it predicts the same bits. Raises RunError when the file is not as it was written."""
        try:
            tensors, metadata, _ = read_sealed(Path(path), KIND)
        except DamagedFileError as error:
            raise RunError(f"predictor {path} {error}: fit another one") from error
        count = sum(name.startswith("network.") for name in tensors)
        return Predictor(
            tuple(metadata["cardinalities"]),
            tensors["centre"].numpy(),
            tensors["scale"].numpy(),
            metadata["mean"],
            metadata["spread"],
            tensors["linear"].numpy(),
            tuple(tensors[f"network.{at}"] for at in range(count)),
            metadata["share"],
        )


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """What predictors say of pairs that they have not seen.

    Attributes:
        predictions: (n,) float64, each by a predictor that was fitted without its fold.
        tau: Kendall's, of these and what was measured; 0.0 if either are all alike.
    """

    predictions: np.ndarray
    tau: float


def cross_validated_tau(
    genomes: np.ndarray,
    accuracies: np.ndarray,
    cardinalities: Sequence[int],
    *,
    folds: int = 5,
    seed: int = 0,
    hidden: int = 400,
    layers: int = 3,
    extra: np.ndarray | None = None,
) -> CrossValidated:
    """Fit to all folds but one, predict that one, and so for each; other arguments as of `Predictor.fit`.

    Raises:
        InputError: too few pairs: fewer than 10 without a fold. ValueError: fewer than two folds.
    """
    if folds < 2:
        raise ValueError(f"{folds} folds: expected 2 or more")
    y = np.asarray(accuracies, np.float64)
    fold = np.random.default_rng(seed).permutation(len(y)) % folds
    found = np.empty(len(y))
    for out in (fold == at for at in range(min(folds, max(len(y), 1)))):
        more = (None, None) if extra is None else (np.asarray(extra)[~out], np.asarray(extra)[out])
        fitted = Predictor.fit(
            genomes[~out], y[~out], cardinalities, seed=seed, hidden=hidden, layers=layers, extra=more[0]
        )
        found[out] = fitted.predict(genomes[out], more[1])
    return CrossValidated(found, kendall_tau(y, found))


def _features(genomes: np.ndarray, cardinalities: Sequence[int], extra: np.ndarray | None) -> np.ndarray:
    """(n, G) genomes as (n, sum of cardinalities + G + E) numbers."""
    ordinal = np.asarray(genomes, np.float64) / np.maximum(np.asarray(cardinalities, np.float64) - 1, 1)
    parts = [one_hot(genomes, cardinalities), ordinal]
    if extra is not None:
        more = np.asarray(extra, np.float64)
        if more.ndim != 2 or len(more) != len(ordinal) or not np.isfinite(more).all():
            raise ValueError(f"extra numbers of shape {more.shape}: expected ({len(ordinal)}, E), finite")
        parts.append(more)
    return np.concatenate(parts, axis=1)


def _run(network: Sequence[Tensor], x: Tensor) -> Tensor:
    """(n, F) -> (FOLDS, n): every perceptron on every row."""
    layers = list(zip(network[::2], network[1::2], strict=True))
    out = x.expand(layers[0][0].shape[0], *x.shape)
    for at, (weight, bias) in enumerate(layers):
        out = torch.baddbmm(bias, out, weight)  # (FOLDS, n, in) x (FOLDS, in, out)
        if at < len(layers) - 1:
            out = out.relu()
    return out[..., 0]


def _fit_networks(
    x: np.ndarray, y: np.ndarray, seed: int, hidden: int, layers: int
) -> tuple[tuple[Tensor, ...], np.ndarray]:
    """Fit all perceptrons side by side, and give what each pair is predicted to be by the one that has not seen it."""
    generator = torch.Generator().manual_seed(seed)
    widths = [x.shape[1], *[hidden] * layers, 1]
    network: list[Tensor] = []
    for before, after in itertools.pairwise(widths):
        reach = before**-0.5
        for shape in ((FOLDS, before, after), (FOLDS, 1, after)):
            network.append((torch.rand(shape, generator=generator) * 2 - 1).mul_(reach).requires_grad_())
    rows, target = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    fold = torch.randperm(len(y), generator=generator) % FOLDS
    unseen = fold == torch.arange(FOLDS)[:, None]  # (FOLDS, n)
    seen = (~unseen).float() / (~unseen).sum(1, keepdim=True)
    optimizer = torch.optim.AdamW(network, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, best_at = float("inf"), 0
    kept: tuple[Tensor, ...] = ()
    predicted = target
    for step in range(STEPS):
        found = _run(network, rows)
        now = found.detach().T[unseen.T]  # one of each row's, in the order of the pairs
        error = float((now - target).square().mean())
        if error < best:
            best, best_at, predicted = error, step, now.clone()
            kept = tuple(tensor.detach().clone() for tensor in network)
        elif step - best_at >= PATIENCE:
            break
        optimizer.zero_grad()
        ((found - target).square() * seen).sum().backward()
        optimizer.step()
    return kept, predicted.double().numpy()
