"""The accuracy predictor on functions that are known, and how ranks are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tinytl.errors import InputError, RunError
from tinytl.search.encoding import one_hot
from tinytl.search.predictor import Predictor, cross_validated_tau
from tinytl.search.ranking import kendall_tau
from tinytl.search.ridge import STRENGTHS, ridge

CARDINALITIES = [5, 2, 2, 2, 2, 2, 2, *[3, 2] * 6, 4, 4]


def measured(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Genomes, and the accuracies of a function with an effect a gene and some of pairs of genes, saturating."""
    truth, rng = np.random.default_rng(100 + seed), np.random.default_rng(seed)
    effects = [truth.normal(size=cardinality) for cardinality in CARDINALITIES]
    pairs = [(*truth.integers(0, len(CARDINALITIES), 2), truth.normal()) for _ in range(15)]
    genomes = rng.integers(0, CARDINALITIES, (count, len(CARDINALITIES)))
    total = np.sum([effect[genomes[:, at]] for at, effect in enumerate(effects)], axis=0)
    total += np.sum([weight * (genomes[:, a] > 0) * (genomes[:, b] > 0) for a, b, weight in pairs], axis=0)
    return genomes, 0.9 - 0.4 / (1 + np.exp(0.3 * total))


@pytest.mark.parametrize(("seed", "hidden"), [(0, 400), (1, 64), (2, 64)])
def test_it_ranks_what_it_has_not_seen(seed: int, hidden: int) -> None:
    genomes, accuracies = measured(400, seed)
    fitted = Predictor.fit(genomes[:100], accuracies[:100], CARDINALITIES, hidden=hidden)
    predicted = fitted.predict(genomes[100:])
    assert kendall_tau(predicted, accuracies[100:]) >= 0.7
    assert np.sqrt(np.mean((predicted - accuracies[100:]) ** 2)) < 0.6 * accuracies.std()


def test_the_perceptrons_find_what_no_sum_can() -> None:
    """An exclusive or of two genes: the ridge regression alone ranks it by chance."""
    rng = np.random.default_rng(0)
    genomes = rng.integers(0, 2, (500, 6))
    accuracies = 0.5 + 0.3 * (genomes[:, 0] ^ genomes[:, 1]) + 0.02 * genomes[:, 2]
    fitted = Predictor.fit(genomes[:300], accuracies[:300], [2] * 6, hidden=64)
    assert fitted.share > 0.8
    assert kendall_tau(fitted.predict(genomes[300:]), accuracies[300:]) > 0.8


def test_noise_is_not_learned() -> None:
    """Of accuracies that nothing explains, hardly anything but their mean is predicted."""
    rng = np.random.default_rng(0)
    genomes, accuracies = measured(60)[0], 0.7 + 0.05 * rng.normal(size=60)
    fitted = Predictor.fit(genomes, accuracies, CARDINALITIES, hidden=64)
    assert fitted.predict(measured(200, 1)[0]).std() < 0.5 * accuracies.std()
    unseen = cross_validated_tau(genomes, accuracies, CARDINALITIES, hidden=32)
    assert abs(unseen.tau) < 0.3


def test_cross_validation_predicts_the_unseen_alone() -> None:
    genomes, accuracies = measured(80)
    found = cross_validated_tau(genomes, accuracies, CARDINALITIES, hidden=32, folds=4)
    assert found.tau == kendall_tau(accuracies, found.predictions)
    assert 0.4 < found.tau < 0.95
    changed = accuracies.copy()
    changed[3] += 0.5  # a pair's own accuracy has no part in what is said of it
    assert cross_validated_tau(genomes, changed, CARDINALITIES, hidden=32, folds=4).predictions[3] == pytest.approx(
        found.predictions[3], abs=1e-12
    )


def test_equal_seeds_are_equal_predictors_and_leave_the_global_state_alone() -> None:
    genomes, accuracies = measured(60)
    before = torch.get_rng_state()
    one, same, other = (Predictor.fit(genomes, accuracies, CARDINALITIES, seed=s, hidden=32) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(one.predict(genomes), same.predict(genomes))
    assert not np.array_equal(one.predict(genomes), other.predict(genomes))


@pytest.mark.parametrize("constant", [False, True])
def test_what_is_saved_predicts_the_same_bits(tmp_path: Path, constant: bool) -> None:
    genomes, accuracies = measured(40)
    extra = np.random.default_rng(0).normal(size=(40, 2))
    fitted = Predictor.fit(
        genomes, np.full(40, 0.5) if constant else accuracies, CARDINALITIES, hidden=16, layers=2, extra=extra
    )
    digest = fitted.save(tmp_path / "predictor.safetensors")
    assert fitted.save(tmp_path / "again.safetensors") == digest
    read = Predictor.load(tmp_path / "predictor.safetensors")
    assert np.array_equal(read.predict(genomes, extra), fitted.predict(genomes, extra))
    data = bytearray((tmp_path / "again.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "again.safetensors").write_bytes(data)
    with pytest.raises(RunError, match="is damaged"):
        Predictor.load(tmp_path / "again.safetensors")


def test_constant_accuracies_are_predicted_and_rank_as_nothing() -> None:
    genomes = measured(30)[0]
    fitted = Predictor.fit(genomes, np.full(30, 0.25), CARDINALITIES)
    assert np.array_equal(fitted.predict(measured(5, 3)[0]), np.full(5, 0.25))
    assert cross_validated_tau(genomes, np.full(30, 0.25), CARDINALITIES, hidden=8).tau == 0.0


def test_further_numbers_are_used() -> None:
    rng = np.random.default_rng(0)
    genomes, extra = rng.integers(0, 2, (200, 5)), 1e6 * rng.normal(size=(200, 1))
    accuracies = 0.5 + 1e-7 * extra[:, 0]
    fitted = Predictor.fit(genomes[:100], accuracies[:100], [2] * 5, hidden=16, extra=extra[:100])
    assert kendall_tau(fitted.predict(genomes[100:], extra[100:]), accuracies[100:]) > 0.95
    with pytest.raises(ValueError, match="extra must be as it was"):
        fitted.predict(genomes)


def test_a_value_that_was_never_measured_changes_nothing_by_itself() -> None:
    rng = np.random.default_rng(0)
    genomes = rng.integers(0, 2, (60, 6))
    genomes[:, 3] = 0
    accuracies = (genomes[:, 0] ^ genomes[:, 1]) + 0.1 * genomes.sum(1)
    fitted = Predictor.fit(genomes, accuracies, [2] * 6, hidden=64)
    assert fitted.share > 0.1  # it is the perceptrons that start with weights of every value
    other = genomes.copy()
    other[:, 3] = 1
    assert np.array_equal(fitted.predict(genomes), fitted.predict(other))


def test_wrong_forms() -> None:
    genomes, accuracies = measured(20)
    with pytest.raises(InputError, match=r"^9 measured sub-networks: expected 10 or more"):
        Predictor.fit(genomes[:9], accuracies[:9], CARDINALITIES)
    with pytest.raises(ValueError, match="finite"):
        Predictor.fit(genomes, np.where(np.arange(20) == 3, np.nan, accuracies), CARDINALITIES)
    with pytest.raises(ValueError, match="out of range"):
        Predictor.fit(genomes + 3, accuracies, CARDINALITIES)
    with pytest.raises(ValueError, match="expected 2 or more"):
        cross_validated_tau(genomes, accuracies, CARDINALITIES, folds=1)


def test_one_hot_by_hand() -> None:
    assert one_hot(np.array([[2, 0], [0, 1]]), [3, 2]).tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match=r"expected \(n, 2\)"):
        one_hot(np.array([[1, 1, 1]]), [3, 2])


def test_leave_one_out_is_what_leaving_one_out_gives() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(25, 8)), rng.normal(size=25)
    x -= x.mean(0)

    def fit(strength: float, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        centre, mean = x[kept].mean(0), y[kept].mean()
        rows = x[kept] - centre
        return np.linalg.solve(rows.T @ rows + strength * np.eye(8), rows.T @ (y[kept] - mean)), centre, mean

    every = np.arange(25)
    unseen = {}
    for strength in STRENGTHS:
        # the centre stays that of all pairs: that is what the closed form leaves out, up to the mean
        rows = []
        for out in every:
            kept = every != out
            weights, centre, mean = fit(strength, kept)
            rows.append((x[out] - centre) @ weights + mean)
        unseen[strength] = np.array(rows)
    best = min(STRENGTHS, key=lambda strength: float(np.square(y - unseen[strength]).sum()))
    weights, predicted = ridge(x, y)
    assert weights == pytest.approx(fit(best, every >= 0)[0])
    assert predicted == pytest.approx(unseen[best])


def test_kendalls_tau() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    # of six pairs one is tied in the first row: four concordant, one discordant
    assert kendall_tau([1, 1, 2, 3], [1, 2, 4, 3]) == pytest.approx((4 - 1) / np.sqrt(5 * 6))
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0.0
    assert kendall_tau([], []) == 0.0
    with pytest.raises(ValueError, match="one length"):
        kendall_tau([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="not finite"):
        kendall_tau([1, float("nan")], [1, 2])


def test_kendalls_tau_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats", reason="pip install -e '.[search]'")
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 30), rng.integers(0, 9, 30)
        assert kendall_tau(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
