"""Intervals and tests against published values, and the error rates that they promise."""

import numpy as np
import pytest

from fintune.evals import stats


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
    assert stats.rate(count, n)["ci95"] == pytest.approx([low, high], abs=6e-4)


def width_of(difference):
    low, high = difference["ci95"]
    return high - low


def test_paired_is_repeatable_and_its_width_is_right():
    rng = np.random.default_rng(1)
    gains = rng.choice([1, 0, -1], size=400, p=[0.25, 0.65, 0.1])
    first, again = (stats.paired(gains, seed=5) for _ in range(2))
    assert first == again
    width = 2 * 1.96 * gains.std(ddof=1) / 20
    assert width_of(first) == pytest.approx(width, rel=0.06)
    assert first["mde80"] == pytest.approx(2.8016 * gains.std(ddof=1) / 20, rel=0.05)


def test_clusters_widen_an_interval_and_no_spread_seen_is_not_no_spread():
    values = [1.0] * 40 + [0.0] * 40
    apart = stats.paired(values, seed=1)
    together = stats.paired(values, [str(at // 20) for at in range(80)], seed=1)
    assert width_of(together) > 2 * width_of(apart)
    found = stats.paired([0.0] * 100, seed=1)
    assert found["ci95"] == [-0.03, 0.03] and found["mde80"] > 0.04
    assert stats.paired([], seed=1)["n"] == 0


def test_mcnemar_holm_and_kappa_by_hand():
    # Fagerland et al. 2013: the two-sided exact p less the probability of what was observed.
    assert stats.mcnemar_midp(1, 7) == pytest.approx(2 * (9 / 256) - 8 / 256)
    assert stats.mcnemar_midp(0, 0) == stats.mcnemar_midp(4, 4) == 1.0
    assert stats.mcnemar_midp(9, 1) < 0.05 < stats.mcnemar_midp(8, 2)
    adjusted = stats.holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert adjusted == {"a": 0.06, "b": 0.03, "c": 0.06}
    yes_no = ["y"] * 25 + ["n"] * 25
    other = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert stats.agreement([*zip(yes_no, other, strict=True)])["kappa"] == pytest.approx(0.4)
    assert stats.agreement([]) is None


@pytest.mark.parametrize(("gain", "least", "most"), [(0.2, 0.95, 1.0), (0.0, 0.0, 0.06)])
def test_planted_gain_is_found_and_none_is_not(gain, least, most):
    # 30 runs here; `bench/evaluation.py power` makes the 1,000 of each.
    rng = np.random.default_rng(7)
    better = 0
    for _ in range(30):
        change = rng.choice([1, 0, -1], size=200, p=[(0.3 + gain) / 2, 0.7, (0.3 - gain) / 2])
        better += stats.paired(change, seed=1)["ci95"][0] > 0
    assert least <= better / 30 <= most
