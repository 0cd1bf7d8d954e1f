"""Does the demo's adapter read its questions? The same run, with answers shuffled within each task.

    python tools/control.py [--demo runs/demo] [--out runs/control]

Takes the finished demo, shuffles the training answers among rows of the same task (so the control
sees the same answers, as often, to the wrong questions), trains and evaluates it the same way, and
prints base, control, adapter and always-the-commonest-answer on the same test questions, with
paired 95 % intervals. Then checks that no training row holds the entity of such a question together
with one of its numbers. About four minutes on two cores.
"""

import argparse
import random
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fintune import console, seal
from fintune.config import Config, load_config
from fintune.evals.evaluate import evaluate
from fintune.evals.grading import Pair, load_pairs
from fintune.evals.stats import paired, rate
from fintune.example import Message
from fintune.files import read_json, write_json
from fintune.model import find_base, load_chat
from fintune.sample import local_base
from fintune.training.train import train
from sample_rows.rows import sample_rows

# Made-up company names are two capitalised words ("Tarnwick Steel"); a number has two digits.
ENTITY = re.compile(r"\b[A-Z][a-z]{3,} [A-Z][a-z]{3,}\b")
NUMBER = re.compile(r"\d[\d,.]*\d")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/control"))
    arguments = parser.parse_args()
    demo = load_config("demo", [f"out={arguments.demo}", *local_base()])
    control = load_config("demo", [f"out={arguments.out}", *local_base()])
    shared = entity_and_number_in_training(demo)
    if not (control.data_dir / seal.DONE).is_file():
        shuffle_answers(demo, control)
    train(control)
    verdict = evaluate(control)["verdict"]
    found = compare(load_pairs(demo.eval_dir), load_pairs(control.eval_dir), demo)
    found["control"]["verdict"] = verdict
    found["trained_on"] = find_base(demo.model).about
    found["questions_whose_entity_and_number_share_a_training_row"] = shared
    write_json(Path(__file__).parents[1] / "bench" / "results" / "control.json", found)


def shuffle_answers(demo: Config, control: Config) -> None:
    """Write the demo's prepared data again, training answers shuffled within each task."""
    asked = [pair for row in sample_rows() for pair in zip(row.turns, row.tasks, strict=True)]
    tasks = {key(question): task for (question, _), task in asked}
    rows = pq.read_table(demo.data_dir / "train.parquet").to_pylist()
    answers: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for question, answer in pairwise(row["messages"]):
            if answer["role"] == "assistant":
                task = tasks.get(key(question["content"]), "repaired")
                answers.setdefault(task, []).append(answer)
    rng = random.Random(demo.seed)
    for members in answers.values():
        mixed = rng.sample([answer["content"] for answer in members], len(members))
        for answer, content in zip(members, mixed, strict=True):
            answer["content"] = content
    chat = load_chat(find_base(demo.model), demo.chat, demo.data_dir)
    encoded = [chat.encode([Message.of(m) for m in row["messages"]]) for row in rows]
    for row, own in zip(rows, encoded, strict=True):
        row |= {"input_ids": own.input_ids, "labels": own.labels, "length": len(own.input_ids)}
    shutil.rmtree(control.data_dir, ignore_errors=True)
    shutil.copytree(demo.data_dir, control.data_dir, ignore=shutil.ignore_patterns(seal.DONE))
    schema = pq.read_schema(demo.data_dir / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema), control.data_dir / "train.parquet")
    seal.seal(
        control.data_dir,
        {**read_json(demo.data_dir / seal.DONE)["inputs"], "shuffled_within_task": True},
    )


def key(text: str | None) -> str:
    """A question without what text repair may change."""
    return re.sub(r"[^a-z0-9]", "", (text or "").lower())


def entity_and_number_in_training(demo: Config) -> int:
    """Count test questions of which some training row holds an entity and a number together."""
    train_rows = pq.read_table(demo.data_dir / "train.parquet", columns=["messages"]).to_pylist()
    numbers_of: dict[str, set[str]] = {}
    for row in train_rows:
        text = " ".join(m["content"] for m in row["messages"])
        for entity in set(ENTITY.findall(text)):
            numbers_of.setdefault(entity, set()).update(NUMBER.findall(text))
    return (
        sum(
            any(
                numbers_of.get(entity, set()) & set(NUMBER.findall(text))
                for entity in set(ENTITY.findall(text))
            )
            for pair in load_pairs(demo.eval_dir)
            for text in [" ".join(m.content for m in pair.item.messages)]
        )
        if demo.eval_dir.exists()
        else 0
    )


def compare(adapter: list[Pair], control: list[Pair], demo: Config) -> dict[str, Any]:
    """Accuracy of all four on the same questions, and the adapter's gain over the other three."""
    other = {pair.item.id: pair for pair in control}
    assert set(other) == {pair.item.id for pair in adapter}, "both must answer the same questions"

    def right(pair: Pair, who: str) -> float:
        graded = pair.graded[who]
        return float(graded is not None and graded.correct)

    scores = {
        "base": [right(pair, "base") for pair in adapter],
        "control": [right(other[pair.item.id], "adapter") for pair in adapter],
        "adapter": [right(pair, "adapter") for pair in adapter],
        "always the commonest": [
            float(bool((own := pair.item.grade(pair.item.majority or "")) and own.correct))
            for pair in adapter
        ],
    }
    groups = [pair.item.group for pair in adapter]
    found: dict[str, Any] = {"questions": len(adapter)}
    lines = []
    for who, own in scores.items():
        share = sum(own) / len(own)
        gain = paired([a - b for a, b in zip(scores["adapter"], own, strict=True)], groups)
        low, high = gain["ci95"]
        found[who] = {
            "accuracy": round(share, 4),
            "ci95": rate(list(map(bool, own)), groups)["ci95"],
        }
        if who != "adapter":
            found[who] |= {"adapter_gain_ci95": [round(low, 4), round(high, 4)]}
        interval = "" if who == "adapter" else f"{gain['value']:+.1%} ({low:+.1%} to {high:+.1%})"
        lines.append((who, f"{share:.1%}", interval))
    console.table(f"{len(adapter)} questions", ["", "right", "adapter's gain, 95 %"], lines)
    return found


if __name__ == "__main__":
    main()
