"""Error rates of the verdict's interval: 1,000 simulated evaluations of 200 questions each.

    python bench/evaluation_power.py [runs]

A planted gain of 20 points must be found; a planted gain of nothing must not be called better.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from fintune.console import result
from fintune.evals import stats

ITEMS, DISCORDANT = 200, 0.3


def main(runs: int) -> None:
    """Print the share of better and worse verdicts for both plants."""
    rng = np.random.default_rng(20260101)
    for count in (50, 100, 200, 400):
        smallest = stats.POWER_FACTOR * (DISCORDANT / count) ** 0.5
        result(f"{count} questions: a gain of {100 * smallest:.1f} points is found 4 times in 5")
    for gain in (0.2, 0.0):
        shares = [(DISCORDANT + gain) / 2, 1 - DISCORDANT, (DISCORDANT - gain) / 2]
        found = [
            stats.paired(rng.choice([1, 0, -1], size=ITEMS, p=shares), seed=42) for _ in range(runs)
        ]
        better = sum(one.low > 0 for one in found) / runs
        worse = sum(one.high < 0 for one in found) / runs
        result(
            f"planted {100 * gain:+.0f} points, {runs} runs of {ITEMS}, {DISCORDANT:.0%} differing:"
            f" better {better:.1%}, worse {worse:.1%}, either {better + worse:.1%}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
