"""Statistics of a paired comparison: intervals, tests, minimum detectable effect.

The unit is the document; a question that shares none is one by itself. Sources: Pustejovsky and
Tipton 2018 (JBES 36:672) for CR2 and its degrees of freedom, after Bell and McCaffrey 2002; Bonett
and Price 2012 (Stat Methods Med Res 21:479) for the two added questions; Dean and Pagano 2015
(JSSAM 3:484) for rates over documents; Holm 1979; Cohen 1960 for kappa.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.05
"""Two-sided error of every interval and test."""
POWER, SIMULATED = 0.8, 4_000
"""Power at the minimum detectable effect; the simulated comparisons that it is found by."""
FINEST = 4_000
"""Most steps on which a sign flip test places the sums of documents."""
_Z = float(stats.norm.ppf(1 - LEVEL / 2))
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class ClusterMean:
    """A mean over documents with its cluster-robust error (CR2).

    Attributes:
        value: the mean of all values.
        centre, error, df: of the interval, from the values and one added question either way.
        design_effect: variance over that of as many independent questions; 1 or more.
        sums, sizes: sum and number of the values of each document.
    """

    value: float
    centre: float
    error: float
    df: float
    design_effect: float
    sums: Floats
    sizes: Floats

    def interval(self, most: float) -> list[float]:
        """95 % interval of the mean, within `most` either way."""
        reach = stats.t.ppf(1 - LEVEL / 2, self.df) * self.error
        ends = (max(-most, self.centre - reach), min(most, self.centre + reach))
        return [round(float(end), 6) for end in ends]

    def below(self, bound: float) -> float:
        """One-sided p value of "the mean is at least `bound`"."""
        return float(stats.t.cdf((self.centre - bound) / self.error, self.df))


def cluster_mean(
    values: Sequence[float], documents: Sequence[str] | None, added: tuple[float, float]
) -> ClusterMean:
    """The mean of values that come in documents.

    Args:
        documents: the document of every value; None: each value is one.
        added: values of two more questions, each a document by itself. They keep the error above 0
            where all values are equal, and small samples covered.
    """
    names = documents if documents is not None else [str(at) for at in range(len(values))]
    number = {name: at for at, name in enumerate(dict.fromkeys(names))}
    at = [number[name] for name in names]
    sums = np.bincount(at, weights=np.asarray(values, dtype=float)).astype(float)
    sizes = np.bincount(at).astype(float)
    total, size = np.append(sums, added), np.append(sizes, (1.0, 1.0))
    centre, error, df = cr2(total, size)
    n = size.sum()
    spread = float(((np.append(values, added) - centre) ** 2).mean()) / (n - 1)
    effect = max(1.0, float(error) ** 2 / spread)
    value = float(np.mean(values))
    return ClusterMean(value, float(centre), float(error), float(df), effect, sums, sizes)


def cr2(sums: Floats, sizes: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, CR2 standard error and Satterthwaite's degrees of freedom, with independence as the
    working model.

    Args:
        sums, sizes: sum and number of the values of each document, shape (..., documents).
    """
    n = sizes.sum(axis=-1)
    share = sizes / n[..., None]
    mean = sums.sum(axis=-1) / n
    factor = 1 / (1 - share)
    variance = (factor * (sums - mean[..., None] * sizes) ** 2).sum(axis=-1) / n**2
    own = (factor**2 * sizes**2 * (1 - 2 * share)).sum(axis=-1)
    across = ((factor * sizes**2).sum(axis=-1) / n) ** 2
    return mean, np.sqrt(variance), n**2 / (own + across)


def effective(sizes: Floats) -> float:
    """The number of documents of equal size that tell as much: n² / Σ nᵢ²."""
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if len(sizes) else 0.0


def rate(passed: Sequence[bool], documents: Sequence[str] | None = None) -> dict[str, Any]:
    """A rate with its 95 % interval (Wilson's, of the effective number), as in test_results.json.

    Without observations the rate is None and the interval 0 to 1.
    """
    n, count = len(passed), sum(passed)
    if not n:
        return {"value": None, "k": 0, "n": 0, "ci95": [0.0, 1.0]}
    mean = cluster_mean([float(each) for each in passed], documents, (0.0, 1.0))
    independent = len(mean.sizes) == n
    z = _Z if independent else stats.t.ppf(1 - LEVEL / 2, mean.df)
    p, size = count / n, n / (1 if independent else mean.design_effect)
    middle = (p + z**2 / (2 * size)) / (1 + z**2 / size)
    reach = z * np.sqrt(p * (1 - p) / size + (z / (2 * size)) ** 2) / (1 + z**2 / size)
    ends = (max(0.0, float(middle - reach)), min(1.0, float(middle + reach)))
    return {"value": round(p, 6), "k": count, "n": n, "ci95": [round(end, 6) for end in ends]}


def paired(
    differences: Sequence[float], documents: Sequence[str] | None = None, *, unit: float = 1.0
) -> dict[str, Any]:
    """Mean paired difference, its interval and test, over documents.

    Args:
        differences: adapter minus base of every item.
        documents: the document of every item; None: each item is one.
        unit: the difference of an item that is gained.

    Returns:
        As in test_results.json: `value`, `ci95`, `p` (sign flip), `n`, `clusters` (documents),
        `effective` (see `effective`), `df` of the interval, and `mde80`, the smallest gain that a
        comparison of this size finds with a power of 80 %, with as many losses as here (one added).
    """
    if not len(differences):
        nothing = {"value": 0.0, "ci95": [-unit, unit], "p": 1.0}
        return nothing | {"n": 0, "clusters": 0, "effective": 0.0, "df": 1.0, "mde80": unit}
    mean = cluster_mean(differences, documents, (unit, -unit))
    lost = (sum(each < 0 for each in differences) + 1) / (len(differences) + 2)
    return {
        "value": round(mean.value, 6),
        "ci95": mean.interval(unit),
        "p": round(sign_flip(mean.sums), 6),
        "n": len(differences),
        "clusters": len(mean.sums),
        "effective": round(effective(mean.sizes), 1),
        "df": round(mean.df, 3),
        "mde80": round(unit * detectable(lost, len(differences) / mean.design_effect, mean.df), 6),
    }


def corrected(difference: dict[str, Any], looks: int) -> list[float]:
    """The interval of a paired difference that was looked at several times (Bonferroni)."""
    low, high = difference["ci95"]
    usual, wide = (stats.t.ppf(1 - LEVEL / 2 / k, difference["df"]) for k in (1, looks))
    middle, reach = (low + high) / 2, (high - low) / 2 * wide / usual
    return [round(float(middle + sign * reach), 6) for sign in (-1, 1)]


def sign_flip(sums: Sequence[float] | Floats) -> float:
    """Two-sided mid-p value of the sign flip test of whole documents.

    Where base and adapter are alike they could change places in any document, which flips the sign
    of its sum. All flips are counted, by convolution; sums that are no multiples of 1/2 are placed
    on a grid of `FINEST` steps. With one question a document it is McNemar's mid-p test.
    """
    exact = np.asarray(sums, dtype=float)
    halves = np.allclose(2 * exact, np.round(2 * exact))
    scaled = exact * (2 if halves else FINEST / max(np.abs(exact).sum(), 1e-12))
    steps = np.abs(np.round(scaled)).astype(int)
    steps //= max(1, np.gcd.reduce(steps))
    chance = np.ones(1)  # of every sum of those that are not flipped
    for step in steps[steps > 0].tolist():
        chance = np.convolve(chance, np.bincount([0, step]) / 2)
    reached = np.abs(2 * np.arange(len(chance)) - len(chance) + 1)
    seen = abs(int((np.sign(exact) * steps).sum()))
    beyond = chance[reached > seen].sum() + chance[reached == seen].sum() / 2
    return float(beyond) if seen else 1.0


def detectable(lost: float, n: float, df: float) -> float:
    """The smallest gain that is found with a power of 80 %, as a share of the questions.

    Simulated: of `n` independent questions the share `lost` is lost, and as many and the gain on
    top are gained.

    Args:
        n: the effective number of questions.
        df: degrees of freedom of the interval.
    """
    low, high, count = 0.0, 1.0, max(1, round(n))
    reach = stats.t.ppf(1 - LEVEL / 2, df)
    for _ in range(12):
        gain = (low + high) / 2
        gained = min(lost + gain, 1 - lost)
        shares = [gained, lost, max(0.0, 1 - lost - gained)]
        rng = np.random.default_rng(0)  # the same draws at every gain
        wins, losses, _same = rng.multinomial(count, shares, SIMULATED).T
        mean = (wins - losses) / (count + 2)
        error = np.sqrt(((wins + losses + 2) / (count + 2) - mean**2) / (count + 1))
        null = stats.binom(wins + losses, 0.5)
        tail = null.cdf(losses) - null.pmf(losses) / 2
        found = np.mean((mean > reach * error) & (2 * tail < LEVEL)) >= POWER
        low, high = (low, gain) if found else (gain, high)
    return float(high)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p values of all reported measures by name -> the same adjusted by Holm's step-down method."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, p_values[name] * (len(ordered) - rank)))
        adjusted[name] = round(highest, 6)
    return {name: adjusted[name] for name in p_values}


def weighted_f1(gold: Sequence[str], said: Sequence[str | None]) -> float:
    """F1 of each class, weighted by how often it is the right one; None is no class."""
    hits = Counter(a for a, b in zip(gold, said, strict=True) if a == b)
    claimed, support = Counter(said), Counter(gold)
    total = sum(n * 2 * hits[name] / (n + claimed[name]) for name, n in support.items())
    return round(total / len(gold), 6)


def agreement(pairs: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """Share of equal verdicts of two graders, and Cohen's kappa with its 95 % interval.

    None without any. Kappa is None where a grader says one and the same word throughout.
    """
    if not pairs:
        return None
    n, equal = len(pairs), [first == second for first, second in pairs]
    first, second = (Counter(words) for words in zip(*pairs, strict=True))
    found = {"kappa": None, "ci95": None, "n": n, "agreement": rate(equal)}
    if n in (*first.values(), *second.values()):
        return found
    share, chance = sum(equal) / n, sum(first[word] * second[word] for word in first) / n**2
    kappa, reach = (share - chance, _Z * (share * (1 - share) / n) ** 0.5)
    ends = (kappa - reach, kappa, min(1 - chance, kappa + reach))
    low, value, high = (round(end / (1 - chance), 6) for end in ends)
    return {**found, "kappa": value, "ci95": [low, high]}
