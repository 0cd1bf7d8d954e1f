"""The race of throughput.py on one CUDA device, at the exact shape of Llama-3.1-8B, random weights.

    python bench/gpu.py [--rounds N] [--rows N] [--sides NAME;...] [--tiny]

Contestants: ours (activation checkpointing decides by itself), the seed's recipe on transformers,
TRL with Liger padding-free (with flash-attn where installed; recomputing, and in micro-batches of
four without), Unsloth packed. Before the race each one's loss on 64 rows is held against one row at
a time. Whose package is absent, who trains something else or does not fit is left out by name.
They do not fit the device together, so each comes alone: it is loaded, warms up for an epoch and
is timed for one, in turn, `--rounds` times. Also printed: our share of the device's measured bf16
matrix rate, counting 4 x layer parameters a token and the adapter's 6 (nothing recomputed).
Results go to bench/results/gpu.json. `--tiny` is for trying the script where there is no GPU.
"""

import argparse
import importlib.util
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from sides import matrix_rate  # noqa: E402
from throughput import (  # noqa: E402
    AGREES,
    SETTING,
    SHAPE,
    Side,
    _say,
    check,
    encoded,
    make,
    plans,
    summary,
)

from fintune.files import write_json  # noqa: E402

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
SEED = {"micro": 16, "accumulation": 4, "rank": 64, "cpu": False, "dtype": "bf16"}
SIDES = {
    "ours": None,
    "floor": None,
    "transformers group_by_length, checkpointing": None,
    "trl padding-free, liger, checkpointing": "liger_kernel",
    "trl padding-free, liger, in fours": "liger_kernel",
    "unsloth packed": "unsloth",
}
"""Contestants and the package that each needs beyond ours and trl."""


def operations(shape: dict[str, int], rank: int) -> int:
    """Floating-point operations a token: 4 x layer parameters, 6 x adapter parameters."""
    h, up, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv = h // heads * shape["num_key_value_heads"]
    sides = [(h, h), (h, kv), (h, kv), (h, h), (h, up), (h, up), (up, h)]
    layer = sum(a * b for a, b in sides)
    adapter = rank * sum(a + b for a, b in sides)
    return shape["num_hidden_layers"] * (4 * layer + 6 * adapter)


def timed(name: str, folder: Path) -> dict[str, Any]:
    """One epoch of a contestant that comes alone, after one to warm up."""
    # One epoch more than is run: at its end a Trainer evaluates, saves and tidies up.
    side = Side(name, folder, 3)
    side.ask("epoch")
    answer = side.ask("epoch")
    side.end()
    return answer


def right(folder: Path, names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Losses on the rows of a made folder; and who is left out, why."""
    losses: dict[str, Any] = {}
    out: dict[str, str] = {}
    for name in names:
        if name == "floor":  # has no loss
            continue
        try:
            losses |= check(folder, [name])
        except SystemExit as ended:
            out[name] = str(ended).strip().splitlines()[-1]
        else:
            if (difference := losses[name]["difference"]) > AGREES:
                out[name] = f"its loss differs by {difference:.1e} from one row at a time"
    return losses, out


def race(
    folder: Path, names: list[str], rounds: int, tokens: int, out: dict[str, str]
) -> dict[str, list[Any]]:
    """Answers of those that finish every round; why the others did not is added to `out`."""
    answers: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds):
        for name in list(answers) if number % 2 else list(answers)[::-1]:
            try:
                answers[name].append(timed(name, folder))
            except SystemExit as ended:
                out[name] = str(ended).strip().splitlines()[-1]
                del answers[name]
                continue
            rate = tokens / answers[name][-1]["seconds"]
            _say(f"round {number}  {name:45} {rate:9,.0f} useful tokens/s")
    return answers


def main() -> None:
    """Race in turns, count, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--sides", default=";".join(SIDES), help="names, separated by ;")
    parser.add_argument("--tiny", action="store_true", help="throughput.py's shape, on the CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing was measured (--tiny tries the script on a CPU)")
    shape, setting = (SHAPE, SETTING) if options.tiny else (LLAMA_8B, SEED)
    absent = {
        name: f"{needs} is not installed"
        for name, needs in SIDES.items()
        if needs is not None and importlib.util.find_spec(needs) is None
    }
    names = [name for name in options.sides.split(";") if name not in absent]
    table = encoded(shape["vocab_size"])
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch) / "check", table, 64, shape, setting)
        losses, wrong = right(Path(scratch) / "check", names)
        shutil.rmtree(Path(scratch) / "check")  # 16 GB
        absent |= wrong
        if "ours" not in names or "ours" in wrong:
            raise SystemExit(f"ours does not race: {wrong.get('ours', 'it was not named')}")
        names = [name for name in names if name not in absent]
        folder = Path(scratch) / "race"
        tokens = int(np.sum(make(folder, table, options.rows, shape, setting)["length"].to_numpy()))
        answers = race(folder, names, options.rounds, tokens, absent)
    if "ours" not in answers:
        raise SystemExit(f"ours did not finish: {absent['ours']}")
    found = summary(answers, tokens)
    rate = matrix_rate(8192 if torch.cuda.is_available() else 4096)
    done = found["ours"]["useful_tokens_per_second"] * operations(shape, int(setting["rank"]))
    results = {
        "format": 1,
        "device": platform.machine() if options.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": options.rows,
        "tokens": tokens,
        "plans": plans(table["length"].to_numpy().astype(np.int64)),
        "left_out": absent,
        "loss_on_64_rows": losses,
        "sides": found,
        "matrix_rate_tflops": round(rate / 1e12, 1),
        "matrix_rate_share": round(done / rate, 3),
    }
    if not options.tiny:
        write_json(ROOT / "bench" / "results" / "gpu.json", results)
    _say(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
