"""Does the batch plan cost anything in the end? Final held-out loss at equal updates.

    python bench/curve.py [--seeds 5] [--steps 60]

The nano base on its sample rows: `stratified` against `random` and `bucketed`, and one dropout
mask for projections that share an input against one each (`train.lora.shared_dropout: false`).
Results go to bench/results/curve.json: relative differences, paired by seed, with a 95 % t
interval; what is above zero is worse for the product's default.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from fintune.config import load_config  # noqa: E402
from fintune.data.prepare import prepare  # noqa: E402
from fintune.files import read_jsonl, write_json  # noqa: E402
from fintune.train.run import train  # noqa: E402

VARIANTS = {
    "stratified": {},
    "random": {"train.plan": "random"},
    "bucketed": {"train.plan": "bucketed"},
    "independent masks": {"train.lora.shared_dropout": "false"},
}


def final_loss(out: Path, data: Path, seed: int, steps: int, changes: dict[str, Any]) -> float:
    """Held-out loss after the last update."""
    values = {
        "out": out,
        "data.out": data,
        "seed": seed,
        "train.max_steps": steps,
        "train.eval_steps": steps,
        "train.save_steps": steps,
        "train.lora.dropout": 0.1,
        **changes,
    }
    config = load_config("nano", [f"{key}={value}" for key, value in values.items()])
    train(config)
    rows = list(read_jsonl(config.run_dir / "metrics.jsonl"))
    return float([row["eval_loss"] for row in rows if "eval_loss" in row][-1])


def compare(ours: list[float], other: list[float]) -> dict[str, Any]:
    """Relative difference of ours to the other, paired; mean and 95 % t interval."""
    difference = np.array(ours) / np.array(other) - 1
    half = stats.sem(difference) * stats.t.ppf(0.975, len(difference) - 1)
    mean = difference.mean()
    return {
        "mean": round(float(mean), 5),
        "interval": [round(float(mean - half), 5), round(float(mean + half), 5)],
    }


def main() -> None:
    """Train every variant with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepare(load_config("nano", [f"out={root}"]))
        for seed in range(options.seeds):
            for name, changes in VARIANTS.items():
                out = root / f"{name}-{seed}".replace(" ", "-")
                loss = final_loss(out, root / "data", seed, options.steps, changes)
                losses[name].append(round(loss, 6))
                sys.stdout.write(f"seed {seed}  {name:18} held-out loss {loss:.4f}\n")
                sys.stdout.flush()
    ours = losses["stratified"]
    against = {name: compare(ours, other) for name, other in losses.items() if name != "stratified"}
    results = {
        "format": 1,
        "machine": f"{os.cpu_count()} CPU cores",
        "steps": options.steps,
        "held_out_loss": losses,
        "stratified_against": against,
    }
    write_json(ROOT / "bench" / "results" / "curve.json", results)
    sys.stdout.write(f"{against}\n")


if __name__ == "__main__":
    main()
