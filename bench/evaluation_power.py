"""Error rates of the verdict's interval: 1,000 simulated evaluations of 200 questions each.

A planted gain of 20 points must be found; a planted gain of nothing must not be called better.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from fintune.evals import stats

ITEMS, DISCORDANT = 200, 0.3


def power(runs: int = 1000) -> dict[str, Any]:
    """The share of better and worse verdicts for both plants."""
    rng = np.random.default_rng(20260101)
    found: dict[str, Any] = {
        "runs": runs,
        "questions": ITEMS,
        "share_differing": DISCORDANT,
        "gain_found_4_times_in_5": {
            str(count): round(stats.POWER_FACTOR * (DISCORDANT / count) ** 0.5, 4)
            for count in (50, 100, 200, 400)
        },
    }
    for gain in (0.2, 0.0):
        shares = [(DISCORDANT + gain) / 2, 1 - DISCORDANT, (DISCORDANT - gain) / 2]
        seen = [
            stats.paired(rng.choice([1, 0, -1], size=ITEMS, p=shares), seed=42) for _ in range(runs)
        ]
        better = sum(one.low > 0 for one in seen) / runs
        worse = sum(one.high < 0 for one in seen) / runs
        found[f"planted_{gain:.0%}"] = {"better": better, "worse": worse}
    return found
