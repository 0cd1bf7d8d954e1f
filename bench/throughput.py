"""The engine: tokens a second against what a user would pick instead, and what the plan costs.

    python bench/throughput.py [race] [--base small|smollm2] [--rank R] [--rounds N] [--rows N]
                               [--sides "NAME;..."] [--busy N]
    python bench/throughput.py curve [--seeds 5] [--steps 60]
    python bench/throughput.py deal

race   Contestants (sides.py) live in processes of their own and take turns, an epoch each, so that
       the machine's moods meet all of them; a ratio is the median over rounds. Their rows are the
       same: real conversations of shared/data in the Llama 3 format, ids folded into the model's
       vocabulary. With --busy N, N spinning processes of the same priority run beside: ours and
       group_by_length, each alone, one epoch of 32 rows after one that warms up.
curve  Final held-out loss at equal updates, the tests' tiny base on the sample rows: `stratified`
       against `random` and `bucketed`, and one dropout mask for projections that share an input
       against one each. Relative differences, paired by seed, with a 95 % t interval; what is above
       zero is worse for the product's default.
deal   The batch plan's own cost for 500,000 rows (real lengths, drawn again), and how equal the
       shares of processes are: an update's imbalance is its busiest process over the mean, less
       one, for the updates of an epoch but the ragged last.

Results go to bench/results/throughput.json (of SmolLM2's shape throughput-smollm2.json),
curve.json, deal.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import LengthGroupedSampler

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench"), str(ROOT / "tests")]

import tiny_made  # noqa: E402
from prepare import DATE, conversations  # noqa: E402
from sides import _forget_peak, _in_use, _peak, matrix_rate  # noqa: E402

from fintune.batches import Ints, Steps, plan_epoch  # noqa: E402
from fintune.chat import ChatFormat  # noqa: E402
from fintune.config import ChatConfig, Config, load_config  # noqa: E402
from fintune.data.prepare import prepare  # noqa: E402
from fintune.files import read_json, read_jsonl, write_json  # noqa: E402
from fintune.model import DTYPES, Base, load_tokenizer, precision  # noqa: E402
from fintune.training.memory import trim_heap  # noqa: E402
from fintune.training.metrics import processor  # noqa: E402
from fintune.training.train import train  # noqa: E402

RESULTS = ROOT / "bench" / "results"
SHAPE = {
    "vocab_size": 16_384,
    "hidden_size": 512,
    "intermediate_size": 1_408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2_048,
}
SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": True,
}
"""The shape of SmolLM2-135M."""
LONGEST = 2_048
MICRO, ACCUMULATION = 16, 4
"""The seed's step, for the facts of plans."""
AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))
SETTING = {
    "micro": 4,
    "accumulation": 16,
    "rank": 8,
    "cpu": True,
    "dtype": precision("auto", torch.device("cpu")),
}
"""The race deals the same 64 rows into micro-batches of 4: with 16 rows of 2,048 tokens a padded
contestant takes more than 12 GB."""
PADDED = "transformers group_by_length"
PEERS = (
    PADDED,
    f"{PADDED}, checkpointing",
    "trl padded, grouped",
    "trl packed (bfd)",
    "trl padding-free",
)
BASES: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "small": (SHAPE, 8, LONGEST, "throughput.json"),
    "smollm2": (SMOLLM2, 16, 1_024, "throughput-smollm2.json"),
}
"""Shape, rank, longest row, file of results."""
BUSY_ROWS, SPIN = 32, "while True: pass"
SIDES = ("ours", "floor", "floor, our norms and rotation", *PEERS)
SEEDS = 100
"""Plans whose neighbour correlation is averaged: of one epoch of 187 steps it is hardly known."""
VARIANTS = {
    "stratified": {},
    "random": {"train.train_sampling_strategy": "random"},
    "bucketed": {"train.train_sampling_strategy": "bucketed"},
}
"""Settings whose final loss is compared with `stratified`."""
MANY = 500_000
WORLDS = (2, 4, 8)
AGREES = 1e-3
"""Relative difference from one row at a time beyond which a setting trains something else."""


class Side:
    """A contestant's process.

    Args:
        threads: of torch; None: as many as the contestant chooses. Where several start at once ours
            would find the cores busy and take fewer than the others.
    """

    def __init__(
        self, name: str, folder: Path, epochs: int, threads: int | None = os.cpu_count()
    ) -> None:
        command = [sys.executable, str(ROOT / "bench" / "sides.py"), name, str(folder), str(epochs)]
        self.name = name
        self._errors = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        )

    def ask(self, order: str) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@"):
                answer: dict[str, Any] = json.loads(line[1:])
                return answer
        self._errors.seek(0)
        raise SystemExit(f"{self.name} ended:\n{self._errors.read()[-3000:]}")

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def encoded(vocabulary: int = SHAPE["vocab_size"], longest: int = LONGEST) -> pa.Table:
    """Real rows of at most `longest` tokens; ids folded into a smaller vocabulary."""
    tokenizer = load_tokenizer(Base("llama", "", SHARED / "tokenizers" / "llama3"))
    rows = conversations()
    chat = ChatFormat(tokenizer, ChatConfig(date_string=DATE))
    kept = []
    for at in range(0, len(rows), 512):
        for number, made in enumerate(chat.encode_many(rows[at : at + 512])):
            row = made[-1]
            assert not isinstance(row, str)
            if len(row.input_ids) <= longest:
                ids = np.array(row.input_ids, np.int32) % vocabulary
                labels = np.array(row.labels, np.int32)
                kept.append((f"{at + number:05}", ids, np.where(labels < 0, labels, ids)))
    return pa.table(
        {
            "example_id": [name for name, _, _ in kept],
            "input_ids": pa.array([ids for _, ids, _ in kept], pa.list_(pa.int32())),
            "labels": pa.array([labels for _, _, labels in kept], pa.list_(pa.int32())),
            "length": pa.array([len(ids) for _, ids, _ in kept], pa.int32()),
        }
    )


def make(
    folder: Path,
    table: pa.Table,
    rows: int,
    shape: dict[str, Any] = SHAPE,
    setting: dict[str, Any] = SETTING,
) -> pa.Table:
    """The random base, the setting of sides.py, and the first rows by chance; returns those."""
    (folder / "data").mkdir(parents=True)
    write_json(folder / "setting.json", setting)
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[setting["dtype"]])
    with torch.device("cpu" if setting["cpu"] else "cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model")
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # this process holds on to nothing that contestants need
    tokenizer = load_tokenizer(Base("llama", "", SHARED / "tokenizers" / "llama3"))
    if shape["vocab_size"] < len(tokenizer):
        tokenizer.pad_token = "!"  # Llama 3's own lies beyond the small vocabulary
    tokenizer.save_pretrained(folder / "model")
    chosen = table.take(np.random.default_rng(0).permutation(len(table))[:rows])
    pq.write_table(chosen, folder / "data" / "train.parquet")
    for part in ("validation", "test"):
        pq.write_table(chosen.slice(0, 4), folder / "data" / f"{part}.parquet")
    return chosen


def plans(lengths: Ints) -> dict[str, Any]:
    """Facts of an epoch over all real lengths: ours, and transformers' group_by_length."""
    ours = [plan_epoch(of_step(seed=seed), lengths) for seed in range(SEEDS)]
    torch.manual_seed(0)
    order = np.array(list(LengthGroupedSampler(MICRO, lengths=lengths.tolist())))
    micro = np.split(order, range(MICRO, len(order), MICRO))
    grouped = [micro[at : at + ACCUMULATION] for at in range(0, len(micro), ACCUMULATION)]
    every = [neighbour_correlation(lengths, plan) for plan in ours]
    return {
        "ours": _facts(lengths, ours[0], False),
        "neighbour_correlation_of_seeds": {
            "mean": round(float(np.mean(every)), 4),
            "deviation": round(float(np.std(every)), 4),
        },
        PADDED: _facts(lengths, grouped, True),
    }


def of_step(seed: int = 0, world: int = 1) -> Config:
    """A config of the seed's step: 64 rows for each process."""
    step = (f"train.per_device_train_batch_size={MICRO}", f"seed={seed}")
    return load_config("demo", [*step, f"train.gradient_accumulation_steps={ACCUMULATION * world}"])


def _facts(lengths: Ints, plan: Steps, padded: bool) -> dict[str, float]:
    """Steps; tokens of the largest micro-batch; share of padding; spread of tokens a step."""
    micro = [lengths[batch] for step in plan for batch in step]
    taken = [int(batch.max()) * len(batch) if padded else int(batch.sum()) for batch in micro]
    steps = [np.concatenate(step) for step in plan]
    tokens = np.array([lengths[step].sum() for step in steps if step.size == steps[0].size])
    found = {
        "steps": len(steps),
        "largest_micro_batch": max(taken),
        "padding": 1 - sum(int(batch.sum()) for batch in micro) / sum(taken),
        "step_token_cv": float(tokens.std() / tokens.mean()),
        "neighbour_correlation": neighbour_correlation(lengths, plan),
    }
    return {name: round(value, 4) for name, value in found.items()}


def neighbour_correlation(lengths: Ints, plan: Steps) -> float:
    """Pearson correlation of the mean lengths of successive steps, the short last one apart."""
    means = [lengths[np.concatenate(step)].mean() for step in plan[:-1]]
    return float(np.corrcoef(means[:-1], means[1:])[0, 1])


def check(folder: Path, names: list[str]) -> dict[str, Any]:
    """Each contestant's loss on the rows of a made folder against one row at a time."""
    found = {}
    for name in names:
        side = Side(name, folder, 1)
        answer = side.ask("check")
        side.end()
        answer["difference"] = abs(answer["loss"] / answer["one_at_a_time"] - 1)
        found[name] = {key: round(value, 6) for key, value in answer.items()}
        _say(f"{name:45} loss on 64 rows differs by {answer['difference']:.1e}")
    return found


def heats(folder: Path, names: list[str], tokens: int) -> dict[str, int]:
    """Useful tokens a second of each setting of TRL alone, in the second epoch of its process: the
    first compiles products, and is slower."""
    found = {}
    for name in names:
        side = Side(name, folder, 3)
        side.ask("epoch")
        found[name] = round(tokens / side.ask("epoch")["seconds"])
        side.end()
        _say(f"heat     {name:45} {found[name]:8,} useful tokens/s")
    return found


def race(folder: Path, names: list[str], rounds: int, tokens: int) -> dict[str, list[Any]]:
    """Rounds of an epoch each, after one that warms up."""
    # One epoch more than is run: at its end a Trainer evaluates, saves and tidies up.
    sides = {name: Side(name, folder, rounds + 2) for name in names}
    answers: dict[str, list[Any]] = {name: [] for name in names}
    try:
        for number in range(rounds + 1):
            for name in sides if number % 2 else reversed(list(sides)):
                answers[name].append(sides[name].ask("epoch"))
                rate = tokens / answers[name][-1]["seconds"]
                _say(f"round {number}  {name:45} {rate:8,.0f} useful tokens/s")
    finally:
        for side in sides.values():
            side.end()
    return {name: every[1:] for name, every in answers.items()}


def summary(answers: dict[str, list[Any]], tokens: int) -> dict[str, Any]:
    """Medians, and the ratio of our rate to each contestant's as the median over rounds."""
    found = {}
    for name, own in answers.items():
        pairs = zip(own, answers["ours"], strict=True)
        ratios = [other["seconds"] / ours["seconds"] for other, ours in pairs]
        found[name] = {
            "rounds": len(own),
            "useful_tokens_per_second": round(median(tokens / a["seconds"] for a in own)),
            "ours_is_times_faster": round(median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "peak_above_model_mb": round(max(a["peak"] for a in own) / 2**20),
        }
    return found


def whole_race(options: argparse.Namespace) -> None:
    """Check, race, write; or, with --busy, add to what was written."""
    names = options.sides.split(";")
    if unknown := set(names) - set(SIDES):
        raise SystemExit(f"no such contestant: {', '.join(sorted(unknown))}; known: {SIDES}")
    shape, rank, longest, file = BASES[options.base]
    setting = SETTING | {"rank": options.rank or rank}
    table, out = encoded(shape["vocab_size"], longest), options.out or RESULTS / file
    with tempfile.TemporaryDirectory() as scratch:
        if options.busy:
            results = {"machine": machine()} | (read_json(out) if out.is_file() else {})
            made = make(Path(scratch) / "race", table, BUSY_ROWS, shape, setting)
            results["busy_dtype"] = setting["dtype"]
            results.setdefault("busy", {})[str(options.busy)] = busy(
                Path(scratch) / "race",
                [name for name in ("ours", PADDED) if name in names],
                options.busy,
                int(np.sum(made["length"].to_numpy())),
            )
        else:
            known = read_json(out) if out.is_file() else {}
            kept = {key: known[key] for key in ("busy", "busy_dtype") if key in known}
            results = quiet(Path(scratch), table, names, options, setting) | kept
    write_json(out, results)
    _say(json.dumps({key: results.get(key) for key in ("sides", "busy")}, indent=1))


def quiet(
    scratch: Path,
    table: pa.Table,
    names: list[str],
    options: argparse.Namespace,
    setting: dict[str, Any],
) -> dict[str, Any]:
    """The race on a machine that does nothing else."""
    shape, plan = BASES[options.base][0], plans(table["length"].to_numpy().astype(np.int64))
    _say(json.dumps(plan, indent=1))
    make(scratch / "check", table, 64, shape, setting)
    losses = check(scratch / "check", [n for n in names if not n.startswith("floor")])
    right = [name for name in names if losses.get(name, {}).get("difference", 0) <= AGREES]
    folder, left_out = scratch / "race", sorted(set(names) - set(right))
    tokens = int(np.sum(make(folder, table, options.rows, shape, setting)["length"].to_numpy()))
    _say(f"{options.rows} rows, {tokens:,} tokens an epoch")
    trl = heats(folder, [name for name in right if name.startswith("trl")], tokens)
    slower = sorted(trl, key=trl.__getitem__)[:-1]
    names = [name for name in right if name not in slower]
    width, up = shape["hidden_size"], shape["intermediate_size"]
    kv = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    found = summary(race(folder, names, options.rounds, tokens), tokens)
    layer = 2 * width * (width + kv) + 3 * width * up
    return {
        "format": 2,
        "machine": machine(),
        "base": options.base,
        **{key: setting[key] for key in ("rank", "dtype")},
        "rows": options.rows,
        "tokens": tokens,
        "rounds": options.rounds,
        "plans": plan,
        "loss_on_64_rows": losses,
        "left_out": left_out,
        "heats": trl,
        "sides": found,
        "matrix_rate_share": round(share(found, layer * shape["num_hidden_layers"]), 3),
    }


def machine() -> dict[str, Any]:
    """What a rate depends on."""
    facts = {"processor": processor(), "cores": os.cpu_count(), "amx": AMX}
    return facts | {"torch": torch.__version__}


def busy(folder: Path, names: list[str], spinning: int, tokens: int) -> dict[str, int]:
    """Useful tokens a second of contestants, each alone beside spinning processes and on the quiet
    machine."""
    found = {}
    for name in names:
        for beside in (0, spinning):
            loops = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(beside)]
            try:
                side = Side(name, folder, 3, threads=None)
                side.ask("epoch")
                label = f"{name}, {'busy' if beside else 'quiet'}"
                found[label] = round(tokens / side.ask("epoch")["seconds"])
                side.end()
            finally:
                for process in loops:
                    process.kill()
            _say(f"{label:45} {found[label]:8,} useful tokens/s")
    return found


def share(found: dict[str, Any], layers: int) -> float:
    """Our share of the machine's bf16 matrix rate, at 4 x parameters of the layers a token."""
    return float(found["ours"]["useful_tokens_per_second"] * 4 * layers / matrix_rate())


def final_loss(out: Path, data: Path, seed: int, steps: int, changes: dict[str, Any]) -> float:
    """Held-out loss after the last update."""
    values = {
        "out": out,
        "data.out": data,
        "model.path": tiny_made.base(),
        "seed": seed,
        "train.max_steps": steps,
        "train.eval_steps": steps,
        "train.save_steps": steps,
        "train.lora.lora_dropout": 0.1,
        **changes,
    }
    config = load_config("demo", [f"{key}={value}" for key, value in values.items()])
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


def curve(options: argparse.Namespace) -> None:
    """Train every variant with every seed."""
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepare(load_config("demo", [f"out={root}", f"model.path={tiny_made.base()}"]))
        for seed in range(options.seeds):
            for name, changes in VARIANTS.items():
                out = root / f"{name}-{seed}".replace(" ", "-")
                loss = final_loss(out, root / "data", seed, options.steps, changes)
                losses[name].append(round(loss, 6))
                _say(f"seed {seed}  {name:18} held-out loss {loss:.4f}")
    ours = losses["stratified"]
    against = {name: compare(ours, other) for name, other in losses.items() if name != "stratified"}
    results = {
        "format": 1,
        "machine": f"{os.cpu_count()} CPU cores",
        "steps": options.steps,
        "held_out_loss": losses,
        "stratified_against": against,
    }
    write_json(RESULTS / "curve.json", results)
    _say(f"{against}")


def cost(lengths: Ints) -> dict[str, float]:
    """Seconds, and resident MB more at the peak."""
    trim_heap()  # what reading the rows left free would be used again
    before, seconds = _in_use(), []
    _forget_peak()
    for epoch in range(5):
        start = time.perf_counter()
        plan_epoch(of_step(), lengths, epoch)
        seconds.append(time.perf_counter() - start)
    return {"seconds": round(median(seconds), 2), "peak_mb": round((_peak() - before) / 1e6)}


def imbalance(lengths: Ints, world: int) -> dict[str, float]:
    """Mean and worst update of an epoch of the seed's step: 64 rows for each process."""
    plan = plan_epoch(of_step(world=world), lengths, world_size=world)
    shares = np.array(
        [
            [
                sum(int(lengths[batch].sum()) for batch in step)
                for step in (s[rank::world] for s in plan)
            ]
            for rank in range(world)
        ]
    )[:, :-1]
    over = shares.max(0) / shares.mean(0) - 1
    return {"mean": round(float(over.mean()), 5), "worst": round(float(over.max()), 5)}


def deal(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    lengths = encoded()["length"].to_numpy().astype(np.int64)
    result = {
        "rows": MANY,
        "cost": cost(np.random.default_rng(0).choice(lengths, MANY)),
        "real_rows": len(lengths),
        "imbalance": {str(world): imbalance(lengths, world) for world in WORLDS},
    }
    write_json(RESULTS / "deal.json", result)
    _say(json.dumps(result, indent=1))


def main() -> None:
    """One of the three; the race where none is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {"race": whole_race, "curve": curve, "deal": deal}
    parser.add_argument("kind", nargs="?", choices=kinds, default="race")
    parser.add_argument("--rounds", type=int, default=3, help="of the race")
    parser.add_argument("--rows", type=int, default=128, help="of the race")
    parser.add_argument("--sides", default=";".join(SIDES), help="of the race, separated by ;")
    parser.add_argument("--base", choices=BASES, default="small", help="of the race")
    parser.add_argument("--rank", type=int, help="of the race; absent: 8, or 16 of smollm2")
    parser.add_argument("--busy", type=int, default=0, help="spinning processes beside the race")
    parser.add_argument("--out", type=Path, help="of the race")
    parser.add_argument("--seeds", type=int, default=5, help="of the curve")
    parser.add_argument("--steps", type=int, default=60, help="of the curve")
    options = parser.parse_args()
    kinds[options.kind](options)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
