"""The batch plan itself: its cost for 500,000 rows, and how equal the shares of processes are.

    python bench/deal.py

Lengths are those of the real rows of shared/data in Llama 3 tokens, drawn again up to 500,000 for
the first figure. An update's imbalance is its busiest process over the mean, less one; the updates
of an epoch but the ragged last. Results go to bench/results/deal.json.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from sides import _forget_peak, _in_use, _peak  # noqa: E402
from throughput import ACCUMULATION, MICRO, encoded  # noqa: E402

from fintune.batches import Ints, plan_epoch  # noqa: E402
from fintune.files import write_json  # noqa: E402
from fintune.train.memory import give_back  # noqa: E402

RESULT = ROOT / "bench" / "results" / "deal.json"
MANY = 500_000
WORLDS = (2, 4, 8)


def cost(lengths: Ints) -> dict[str, float]:
    """Seconds, and resident MB more at the peak."""
    give_back()  # what reading the rows left free would be used again
    before, seconds = _in_use(), []
    _forget_peak()
    for epoch in range(5):
        start = time.perf_counter()
        plan_epoch(lengths, micro_batch_size=MICRO, accumulation=ACCUMULATION, seed=0, epoch=epoch)
        seconds.append(time.perf_counter() - start)
    return {"seconds": round(median(seconds), 2), "peak_mb": round((_peak() - before) / 1e6)}


def imbalance(lengths: Ints, world: int) -> dict[str, float]:
    """Mean and worst update of an epoch of the seed's step: 64 rows for each process."""
    plan = plan_epoch(
        lengths,
        micro_batch_size=MICRO,
        accumulation=ACCUMULATION,
        seed=0,
        epoch=0,
        world_size=world,
    )
    shares = np.array(
        [
            [sum(int(lengths[batch].sum()) for batch in step) for step in plan.rank(rank, world)]
            for rank in range(world)
        ]
    )[:, :-1]
    over = shares.max(0) / shares.mean(0) - 1
    return {"mean": round(float(over.mean()), 5), "worst": round(float(over.max()), 5)}


def main() -> None:
    """Measure, print, write."""
    lengths = encoded()["length"].to_numpy().astype(np.int64)
    result = {
        "rows": MANY,
        "cost": cost(np.random.default_rng(0).choice(lengths, MANY)),
        "real_rows": len(lengths),
        "imbalance": {str(world): imbalance(lengths, world) for world in WORLDS},
    }
    write_json(RESULT, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
