"""Statistics of a paired comparison: intervals, tests, minimum detectable effect.

The unit is the item, or the document where several items share one; never the judge's call.
Sources: Wilson 1927 for rates; Fagerland, Lydersen and Laake 2013 (BMC Med Res Methodol 13:91)
for the mid-p McNemar test; Efron and Tibshirani 1993 for the bootstrap; Holm 1979.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 9_999
POWER_FACTOR = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
"""Standard errors of a difference that is detected with 80 % power at two-sided 5 % (2.80)."""


def rate(count: int, n: int) -> dict[str, Any]:
    """A rate with its 95 % Wilson interval, as in test_results.json.

    Without observations (n = 0) the rate is None and the interval 0 to 1.
    """
    low, high = 0.0, 1.0
    if n:
        low, high = stats.binomtest(count, n).proportion_ci(method="wilson")
    interval = [round(float(low), 6), round(float(high), 6)]
    return {"value": round(count / n, 6) if n else None, "k": count, "n": n, "ci95": interval}


def mcnemar_midp(gained: int, lost: int) -> float:
    """Two-sided mid-p of McNemar's test.

    Args:
        gained: items that only the adapter has right.
        lost: items that only the base has right.
    """
    discordant = gained + lost
    null = stats.binom(discordant, 0.5)
    smaller = min(gained, lost)
    return float(min(1.0, 2 * null.cdf(smaller) - null.pmf(smaller)))


def paired(
    differences: Sequence[float], clusters: Sequence[str] | None = None, *, seed: int
) -> dict[str, Any]:
    """Mean paired difference with its 95 % interval, percentile bootstrap over clusters of items.

    Args:
        differences: adapter minus base of every item.
        clusters: the document of every item; None: each item is a cluster.
        seed: of the resampling, so that the same answers give the same interval.

    Returns:
        As in test_results.json: `value`, `ci95`, `n`, `clusters` (their number) and `mde80`, the
        smallest difference that a comparison of this size and spread detects with 80 % power.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n == 0:
        return {"value": 0.0, "ci95": [-1.0, 1.0], "n": 0, "clusters": 0, "mde80": 1.0}
    names = clusters if clusters is not None else [str(at) for at in range(n)]
    number = {name: at for at, name in enumerate(dict.fromkeys(names))}
    cluster = [number[name] for name in names]
    sums, sizes = np.bincount(cluster, weights=values), np.bincount(cluster).astype(float)
    mean = float(values.mean())
    # Equal differences do not prove a spread of 0: 3 of n items may still differ (rule of three).
    low, high, error = mean - 3 / n, mean + 3 / n, math.sqrt(3) / n
    if np.ptp(sums / sizes) > 0:
        resampled = stats.bootstrap(
            (sums, sizes),
            lambda total, size, axis: total.sum(axis=axis) / size.sum(axis=axis),
            paired=True,
            n_resamples=RESAMPLES,
            method="percentile",
            batch=500,
            rng=np.random.default_rng(seed),
        )
        low, high = resampled.confidence_interval
        error = max(error, float(resampled.standard_error))
    return {
        "value": round(mean, 6),
        "ci95": [round(float(low), 6), round(float(high), 6)],
        "n": n,
        "clusters": len(number),
        "mde80": round(POWER_FACTOR * error, 6),
    }


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p values of all reported measures by name -> the same adjusted by Holm's step-down method."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, p_values[name] * (len(ordered) - rank)))
        adjusted[name] = round(highest, 6)
    return {name: adjusted[name] for name in p_values}


def agreement(pairs: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """Share of equal verdicts of two graders and Cohen's kappa; None without any.

    Kappa is 1.0 where each says one and the same word throughout.
    """
    if not pairs:
        return None
    n, equal = len(pairs), sum(first == second for first, second in pairs)
    first, second = (Counter(pair[at] for pair in pairs) for at in (0, 1))
    expected = sum(first[word] * second[word] for word in first) / n**2
    kappa = 1.0 if expected == 1 else (equal / n - expected) / (1 - expected)
    return {"kappa": round(kappa, 6), "agreement": rate(equal, n)}
