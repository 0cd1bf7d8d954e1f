"""Whether a model knows when it is right: calibration and selective answering of label questions.

The confidence of an answer is the share of its likelihood among the choices (`choice_logprobs`,
`eval.label_scoring: likelihood`). Sources: Guo et al. 2017 for the reliability curve and the
expected calibration error with ten bins of equal width; Geifman and El-Yaniv 2017 for risk and
coverage; Clopper and Pearson 1934 for the bound of a threshold.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

from fintune.evals.stats import LEVEL, Floats

Json = dict[str, Any]
BINS = 10
MOST_WRONG = 0.02
"""Share of wrong answers that the threshold of confidence keeps to."""
POINTS = 40
"""Points of the risk-coverage curve that are kept."""


def calibration(answers: Iterable[tuple[list[float], bool]]) -> Json | None:
    """Reliability, calibration error, risk by coverage and the threshold of few wrong answers.

    Args:
        answers: log-probabilities of the choices (nats), and whether the likeliest is right.

    Returns:
        None without an answer. `threshold` is the least confidence above which at most MOST_WRONG
        of these answers are wrong, with the upper end of the 95 % interval of that share as
        `at_most`; None where no confidence is enough.
    """
    known = [(_confidence(logprobs), right) for logprobs, right in answers]
    if not known:
        return None
    confidence = np.array([one for one, _ in known])
    right = np.array([float(right) for _, right in known])
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    curve = [
        {
            "confidence": round(float(confidence[bins == at].mean()), 6),
            "right": round(float(right[bins == at].mean()), 6),
            "n": int((bins == at).sum()),
        }
        for at in sorted({*bins.tolist()})
    ]
    error = sum(one["n"] * abs(one["confidence"] - one["right"]) for one in curve) / len(known)
    return {
        "n": len(known),
        "accuracy": round(float(right.mean()), 6),
        "confidence": round(float(confidence.mean()), 6),
        "expected_calibration_error": round(error, 6),
        "reliability": curve,
        **_selective(confidence, right),
    }


def _confidence(logprobs: list[float]) -> float:
    """The likeliest choice's share of the likelihood of all."""
    each = np.exp(np.array(logprobs) - max(logprobs))
    return float(each.max() / each.sum())


def _selective(confidence: Floats, right: Floats) -> Json:
    """Share of wrong answers among the most confident ones, by how many are answered."""
    order = np.argsort(-confidence, kind="stable")
    sure, wrong = confidence[order], np.cumsum(1 - right[order])
    count = np.arange(1, len(order) + 1)
    # Answers of one confidence are given or held back together.
    last = np.append(sure[1:] < sure[:-1], True)
    sure, wrong, count = sure[last], wrong[last], count[last]
    kept = np.flatnonzero(wrong <= MOST_WRONG * count)
    threshold = None
    if len(kept):
        at = int(kept[-1])
        n, bad = int(count[at]), int(wrong[at])
        bound = 1.0 if bad == n else stats.beta.ppf(1 - LEVEL / 2, bad + 1, n - bad)
        threshold = {
            "confidence": round(float(sure[at]), 6),
            "coverage": round(n / len(order), 6),
            "wrong": round(bad / n, 6),
            "at_most": round(float(bound), 6),
        }
    shown = np.unique(np.linspace(0, len(count) - 1, POINTS).astype(int))
    risk = [[round(count[i] / len(order), 4), round(wrong[i] / count[i], 4)] for i in shown]
    return {"risk_coverage": risk, "threshold": threshold}
