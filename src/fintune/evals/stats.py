"""Statistics of a paired comparison: intervals, tests, what could have been seen, agreement.

The unit is the item, or the document where several items share one; never the call. Sources:
Wilson 1927 for rates; Fagerland, Lydersen and Laake 2013 (BMC Med Res Methodol 13:91) for the
mid-p McNemar test; Efron and Tibshirani 1993 for the bootstrap; Holm 1979; Cohen 1960 for kappa.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 9_999
POWER_FACTOR = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
"""Standard errors that a difference needs to be found with 80 % power at two-sided 5 % (2.80)."""


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate; (0, 1) when nothing was observed."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(count, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def rate(count: int, n: int) -> dict[str, Any]:
    """A rate with its interval, for test_results.json."""
    interval = [round(end, 6) for end in wilson(count, n)]
    return {"value": round(count / n, 6) if n else None, "k": count, "n": n, "ci95": interval}


def mcnemar_midp(gained: int, lost: int) -> float:
    """Two-sided mid-p of McNemar's test from the items on which the two differ."""
    discordant = gained + lost
    if discordant == 0:
        return 1.0
    null = stats.binom(discordant, 0.5)
    smaller = min(gained, lost)
    return float(min(1.0, 2 * null.cdf(smaller) - null.pmf(smaller)))


def paired(
    differences: Sequence[float], clusters: Sequence[str] | None = None, *, seed: int
) -> dict[str, Any]:
    """Mean paired difference with its 95 % interval, percentile bootstrap over clusters of items.

    Args:
        differences: one number an item, adapter less base.
        clusters: the document of each item; absent: every item stands alone.
        seed: of the resampling, so that the same answers give the same interval.

    Returns:
        For test_results.json: `value`, `ci95`, `n`, `clusters` and `mde80`, the smallest difference
        that a comparison of this size and spread finds four times in five; a smaller true
        difference is usually missed.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n == 0:
        return _difference(0.0, (-1.0, 1.0), 0, 0, 1.0)
    names = clusters if clusters is not None else [str(at) for at in range(n)]
    place = {name: at for at, name in enumerate(dict.fromkeys(names))}
    at = [place[name] for name in names]
    sums, sizes = np.bincount(at, weights=values), np.bincount(at).astype(float)
    mean = float(values.mean())
    # No spread seen is not no spread: 3 of n items could still differ (the rule of three).
    unseen = math.sqrt(3) / n
    if np.ptp(sums / sizes) == 0:
        interval = mean - 3 / n, mean + 3 / n
        return _difference(mean, interval, n, len(place), POWER_FACTOR * unseen)
    found = stats.bootstrap(
        (sums, sizes),
        lambda total, size, axis: total.sum(axis=axis) / size.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(seed),
    )
    mde = POWER_FACTOR * max(float(found.standard_error), unseen)
    return _difference(mean, found.confidence_interval, n, len(place), mde)


def _difference(
    value: float, interval: Sequence[float], n: int, clusters: int, mde80: float
) -> dict[str, Any]:
    ci95 = [round(float(end), 6) for end in interval]
    facts = {"value": round(value, 6), "ci95": ci95, "n": n, "clusters": clusters}
    return {**facts, "mde80": round(mde80, 6)}


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: each p as it stands among all the measures reported."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, p_values[name] * (len(ordered) - rank)))
        adjusted[name] = round(highest, 6)
    return {name: adjusted[name] for name in p_values}


def kappa(pairs: Sequence[tuple[str, str]]) -> float:
    """Cohen's kappa of two graders; 1.0 where both say one and the same word throughout."""
    n = len(pairs)
    observed = sum(first == second for first, second in pairs) / n
    left, right = (Counter(pair[at] for pair in pairs) for at in (0, 1))
    expected = sum(left[word] * right[word] for word in left) / n**2
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)
