"""Intervals and tests against published values and other implementations."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fintune.evals import stats

SIZES = [1, 2, 3, 5, 7, 7, 2, 1, 4, 9, 3, 6]


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        (25, 50, 0.366, 0.634),
        (45, 50, 0.786, 0.957),
        (50, 50, 0.929, 1.0),
        (100, 200, 0.431, 0.569),
    ],
)
def test_wilson_table(count, n, low, high):
    passed = [at < count for at in range(n)]
    assert stats.rate(passed)["ci95"] == pytest.approx([low, high], abs=6e-4)
    together = stats.rate(passed, [str(at // 5) for at in range(n)])["ci95"]
    assert together[0] <= low + 6e-4 and together[1] >= high - 6e-4


def test_cr2_is_the_sandwich_of_adjusted_residuals():
    """Error and degrees of freedom by their definition, with matrices (Pustejovsky and Tipton)."""
    rng, n = np.random.default_rng(0), sum(SIZES)
    cluster = np.repeat(np.arange(len(SIZES)), SIZES)
    y = rng.normal(size=n) + rng.normal(size=len(SIZES))[cluster]
    hat, residual = np.full((n, n), 1 / n), y - y.mean()
    variance, columns = 0.0, []
    for at in range(len(SIZES)):
        inside = cluster == at
        values, vectors = np.linalg.eigh(np.eye(inside.sum()) - hat[np.ix_(inside, inside)])
        weights = vectors @ np.diag(values**-0.5) @ vectors.T @ np.ones(inside.sum()) / n
        variance += (weights @ residual[inside]) ** 2
        columns.append((np.eye(n) - hat)[:, inside] @ weights)
    spectrum = np.linalg.eigvalsh(np.array(columns) @ np.array(columns).T)
    sums = np.bincount(cluster, weights=y)
    mean, error, df = stats.cr2(sums, np.array(SIZES, float))
    assert float(mean) == pytest.approx(y.mean())
    assert float(error) == pytest.approx(variance**0.5)
    assert float(df) == pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum())


def test_sign_flip_is_mcnemar_alone_and_scipys_permutation_over_documents():
    # Fagerland et al. 2013: the two-sided exact p less the probability of what was observed.
    assert stats.sign_flip([1] * 7 + [-1]) == pytest.approx(2 * (9 / 256) - 8 / 256)
    assert stats.sign_flip([]) == stats.sign_flip([0, 0]) == stats.sign_flip([1, -1, 1, -1]) == 1.0
    sums = np.array([3, 2, -1, 4, 0, 2, -2, 5, 1, 1, -1, 3], float)

    def total(values, axis):
        return np.abs(values.sum(axis=axis))

    drawn = scipy_stats.permutation_test(
        (sums,), total, permutation_type="samples", n_resamples=2**12, alternative="greater"
    ).null_distribution
    seen = abs(sums.sum())
    wanted = (drawn > seen).mean() + (drawn == seen).mean() / 2
    assert stats.sign_flip(sums) == stats.sign_flip(sums / 2) == pytest.approx(wanted)
    assert stats.sign_flip(sums / 3) == pytest.approx(wanted, abs=0.01)  # on a grid


def test_paired_alone_and_in_documents():
    rng = np.random.default_rng(1)
    gains = rng.choice([1, 0, -1], size=400, p=[0.25, 0.65, 0.1]).tolist()
    found = stats.paired(gains)
    assert found == stats.paired(gains)
    low, high = found["ci95"]
    assert high - low == pytest.approx(2 * 1.966 * np.std(gains, ddof=1) / 20, rel=0.02)
    values = [1.0] * 40 + [0.0] * 40
    together = stats.paired(values, [str(at // 20) for at in range(80)])
    assert (together["clusters"], together["effective"]) == (4, 4.0)
    low, high = together["ci95"]
    assert low < 0 and high == 1.0 and together["p"] > 0.05
    # Equal differences do not prove a spread of 0.
    low, high = stats.paired([0.0] * 100)["ci95"]
    assert -high == low < -0.02
    assert stats.paired([])["n"] == 0
    assert stats.paired([0.5] * 60, unit=0.5)["ci95"][1] == 0.5
    wide = stats.corrected(found, 10)
    assert wide[0] < found["ci95"][0] and found["ci95"][1] < wide[1]


def test_one_document_decides_nothing_however_many_questions_it_has():
    found = stats.paired([1.0] * 150 + [0.0] * 50, ["one"] * 200)
    assert found["effective"] == 1.0 and found["ci95"][0] < 0 and found["p"] == 0.5


def test_holm_and_kappa_by_hand():
    adjusted = stats.holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert adjusted == {"a": 0.06, "b": 0.03, "c": 0.06}
    yes_no = ["y"] * 25 + ["n"] * 25
    other = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    found = stats.agreement([*zip(yes_no, other, strict=True)])
    assert found["kappa"] == pytest.approx(0.4)
    # Cohen 1960: sqrt(po (1 - po) / n) / (1 - pe) is 0.13.
    assert found["ci95"] == pytest.approx([0.4 - 1.96 * 0.13, 0.4 + 1.96 * 0.13], abs=0.03)
    assert stats.agreement([("a", "a")] * 9)["kappa"] is None, "one constant word"
    assert stats.agreement([("a", "a"), ("a", "b")] * 9)["kappa"] is None
    assert stats.agreement([]) is None


@pytest.mark.parametrize(("gain", "least", "most"), [(0.2, 0.9, 1.0), (0.0, 0.0, 0.08)])
def test_planted_gain_is_found_and_none_is_not(gain, least, most):
    # 100 runs here; `bench/verdict.py` makes 5,000 of each design.
    rng, better = np.random.default_rng(7), 0
    for _ in range(100):
        change = rng.choice([1, 0, -1], size=200, p=[(0.3 + gain) / 2, 0.7, (0.3 - gain) / 2])
        mean = stats.cluster_mean(change.tolist(), None, (1.0, -1.0))
        better += mean.interval(1.0)[0] > 0 and stats.sign_flip(mean.sums) < stats.LEVEL
    assert least <= better / 100 <= most


@pytest.mark.parametrize(("lost", "n"), [(0.05, 100), (0.15, 200), (0.0, 60)])
def test_a_gain_of_the_minimum_detectable_effect_is_found_four_times_in_five(lost, n):
    gain, rng = stats.detectable(lost, n, n + 1), np.random.default_rng(11)
    better = 0
    for _ in range(400):
        change = rng.choice([1, 0, -1], size=n, p=[lost + gain, 1 - 2 * lost - gain, lost])
        mean = stats.cluster_mean(change.tolist(), None, (1.0, -1.0))
        better += mean.interval(1.0)[0] > 0 and stats.sign_flip(mean.sums) < stats.LEVEL
    assert 0.73 <= better / 400 <= 0.9
