"""Permuted labels: how often they are found, and how often right ones are called permuted.

    python bench/labels.py [found|alarms|shuffled|cost|likelihood ...] [--runs 1000]

found       by words: TFNS with the exchange that it was published with, the five other orders of
            FPB and FiQA-SA, Yes and No exchanged in Headline; the same of the training rows; and
            TFNS exchanged where all rows of the sample are one source
alarms      by words: resamples (bootstrap) of every set as it is, BANKING77, NER and all rows of
            the sample as one source included
shuffled    by words: labels dealt at random, which have nothing to do with the texts
cost        seconds of 500,000 rows, the sample's again and again
likelihood  found and alarms by the likelihoods of the demo's base (SmolLM2-135M-Instruct)

Reads the real rows of ../shared, which are no part of the project. Prints every figure and keeps it
in bench/results/labels.json with the machine described. One process; about 20 minutes.
"""

import argparse
import csv
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "bench" / "results" / "labels.json"
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "bench", "tests")]

from prepare import machine  # noqa: E402

from fintune import cpu, labels  # noqa: E402
from fintune.config import DatasetConfig  # noqa: E402
from fintune.console import result  # noqa: E402
from fintune.evals.grading import Item, as_example  # noqa: E402
from fintune.evals.tasks import find_questions, task_items  # noqa: E402
from fintune.example import Example, Message  # noqa: E402
from fintune.files import read_json, read_jsonl, sha256_json, write_json  # noqa: E402

FILES = {
    "tfns": "tfns_test",
    "fpb": "fpb_test",
    "fiqa_sa": "fiqa_sa_test",
    "headline": "headline_valid",
    "nwgi": "nwgi_test",
    "banking77": "banking77_test",
    "ner": "ner_test",
}
SOURCES = ("tfns", "fpb", "fiqasa", "nwgi", "headline", "banking77", "ner")
TONES = ("negative", "neutral", "positive")
OTHERS = [dict(zip(TONES, order, strict=True)) for order in [*permutations(TONES)][1:]]
EXCHANGE = {"neutral": "positive", "positive": "neutral", "negative": "negative"}
CASES = [
    ("tfns", EXCHANGE),
    *(("fpb", order) for order in OTHERS),
    *(("fiqa_sa", order) for order in OTHERS),
    ("headline", {"yes": "no", "no": "yes"}),
]


def items(task: str) -> list[Item]:
    """The questions of a benchmark, as an evaluation reads them."""
    wanted = {task: DatasetConfig(path=str(DATA / "benchmarks" / f"{FILES[task]}.jsonl"))}
    return task_items(task, find_questions(wanted, {})[task], 10**6)


def training(*sources: str) -> list[Example]:
    """Rows of the sample, each with its own source, or all as one."""
    with (DATA / "finance_instruct_sample.provenance.csv").open(encoding="utf-8") as file:
        names = [row["source"] for row in csv.DictReader(file)]
    found = []
    for line, row in enumerate(read_jsonl(DATA / "finance_instruct_sample.jsonl"), start=1):
        name, texts = names[line - 1], [row.get(k) for k in ("system", "user", "assistant")]
        if all(texts[1:]) and (not sources or name in sources):
            roles = ("system", "user", "assistant")
            turns = zip(roles, texts, strict=True)
            messages = [Message(role, text) for role, text in turns if (text or "").strip()]
            source = name if sources else "sample"
            found.append(Example(source, line, sha256_json(row), tuple(messages)))
    return found


def sets() -> dict[str, list[Example]]:
    """Every set as it is: of the benchmarks and of the training rows."""
    found = {f"{task}, test": [*map(as_example, items(task))] for task in FILES}
    return found | {f"{source}, training rows": training(source) for source in SOURCES}


def relabelled(rows: list[Example], order: dict[str, str]) -> list[Example]:
    def turned(row: Example) -> Example:
        last = row.messages[-1]
        label = order.get(last.content.casefold(), last.content)
        return replace(row, messages=(*row.messages[:-1], replace(last, content=label)))

    return [turned(row) for row in rows]


def judged(found: list[Any], order: dict[str, str]) -> dict[str, Any]:
    """Whether there is a warning, and whether each names the order that puts the labels right."""
    back = {to: label for label, to in order.items() if to != label}
    odds = [[one["log_odds"], one["limit"]] for one in found]
    named = bool(found) and all(one["assignment"] == back for one in found)
    return {"found": bool(found), "named": named, "log_odds_and_limit": odds}


def counted(cells: dict[str, Any]) -> dict[str, Any]:
    sums = {key: sum(cell[key] for cell in cells.values()) for key in ("found", "named")}
    return {"of": len(cells), **sums, "cells": cells}


def said(order: dict[str, str]) -> str:
    return ", ".join(f"{label} as {to}" for label, to in order.items() if label != to)


def found(runs: int) -> dict[str, Any]:
    """`runs` is not used."""
    rows = {task: [*map(as_example, items(task))] for task in FILES}
    cells = {
        f"{task}: {said(order)}": judged(labels.by_words(relabelled(rows[task], order)), order)
        for task, order in CASES
    }
    trained = {}
    for source in ("tfns", "fpb", "fiqasa"):
        for order in OTHERS:
            given = relabelled(training(source), order)
            trained[f"{source}: {said(order)}"] = judged(labels.by_words(given), order)
    order = CASES[-1][1]
    given = relabelled(training("headline"), order)
    trained[f"headline: {said(order)}"] = judged(labels.by_words(given), order)
    tweets, sample = {row.line for row in training("tfns")}, training()
    permuted = relabelled([row for row in sample if row.line in tweets], EXCHANGE)
    mixed = [row for row in sample if row.line not in tweets] + permuted
    whole = judged(labels.by_words(mixed), EXCHANGE)
    return {**counted(cells), "training_rows": counted(trained), "tfns_in_the_whole_sample": whole}


def signs(examples: list[Example]) -> list[list[labels.Row]]:
    """Labels and signs of a set, as `by_words` reads them: of tone, and of Yes and No, apart."""
    read: dict[bool, list[Example]] = {False: [], True: []}
    for row in examples:
        if labels._score(label := labels._label(row.messages[-1].content)) is not None:
            read[label in ("yes", "no")].append(row)
    return [[*labels._rows(rows, yes_no)] for yes_no, rows in read.items() if rows]


def alarms(runs: int) -> dict[str, Any]:
    rng, cells = np.random.default_rng(1), {}

    def drawn(rows: list[labels.Row]) -> list[labels.Row]:
        chosen = rng.integers(0, len(rows), len(rows)).tolist()
        return [rows[at]._replace(id=str(number)) for number, at in enumerate(chosen)]

    for name, examples in (sets() | {"the whole sample": training()}).items():
        share = alarmed(name, signs(examples), runs, drawn)
        cells[name] = {"as_it_is": len(labels.by_words(examples)), "alarms": share}
        result(f"{name}: {cells[name]}")
    return {"most": max(cell["alarms"] for cell in cells.values()), "cells": cells}


def shuffled(runs: int) -> dict[str, Any]:
    rng = np.random.default_rng(2)

    def dealt(rows: list[labels.Row]) -> list[labels.Row]:
        order = rng.permutation(len(rows)).tolist()
        return [row._replace(label=rows[at].label) for row, at in zip(rows, order, strict=True)]

    cells = {name: alarmed(name, signs(each), runs, dealt) for name, each in sets().items()}
    return {"most": max(cells.values()), "cells": cells}


def alarmed(
    name: str,
    read: list[list[labels.Row]],
    runs: int,
    draw: Callable[[list[labels.Row]], list[labels.Row]],
) -> float:
    """Share of draws of a set's rows in which another assignment is called better."""
    found = (any(labels._findings(name, "words", draw(r)) for r in read) for _ in range(runs))
    return sum(found) / runs


def cost(runs: int) -> dict[str, Any]:
    """`runs` is not used."""
    sample = training()
    rows = [
        replace(row, line=at * len(sample) + row.line, row_sha256=sha256_json([at, row.row_sha256]))
        for at in range(500_000 // len(sample) + 1)
        for row in sample
    ][:500_000]
    start, used = time.perf_counter(), time.process_time()
    labels.by_words(rows)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {"rows": len(rows), "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def likelihood(runs: int) -> dict[str, Any]:
    """Of the questions as they are asked, with the base's own template; fp32."""
    import torch

    from fintune import model
    from fintune.config import load_config
    from fintune.evals.likelihood import log_likelihoods, with_choices
    from fintune.sample import local_base

    config = load_config("demo", local_base())
    base = model.find_base(config.model)
    chat = model.load_chat(base, config.chat)
    loaded = model.load_base(base, "none", "fp32")
    cpu.set_threads(cpu.free_threads())
    asked, rng = {}, np.random.default_rng(3)
    for task in FILES:
        if task == "banking77":  # more labels than are compared
            continue
        chosen = {item.id: item for item in items(task)}
        prompts = [(item, chat.prompt_ids(item.messages)) for item in chosen.values()]
        by_choices = defaultdict(list)
        with torch.inference_mode():
            for part in log_likelihoods(loaded, with_choices(chat, prompts).values()):
                for question, likely in part:
                    item = chosen[question.id]
                    by_choices[question.choices].append((item.id, item.reference, likely))
        ((choices, lines),) = by_choices.items()
        asked[task] = choices, sorted(lines)
        result(f"{task}: {len(lines)} questions")

    def tested(task: str, order: dict[str, str]) -> dict[str, Any]:
        choices, lines = asked[task]
        given = [(key, order.get(label.casefold(), label), each) for key, label, each in lines]
        return judged(labels.by_likelihood(task, choices, given), order)

    rates = {}
    for task, (choices, lines) in asked.items():
        drawn = (rng.integers(0, len(lines), len(lines)).tolist() for _ in range(runs))
        given = ([lines[at] for at in each] for each in drawn)
        rates[task] = sum(bool(labels.by_likelihood(task, choices, each)) for each in given) / runs
    cells = {f"{task}: {said(order)}": tested(task, order) for task, order in CASES}
    return {**counted(cells), "alarms": rates}


MEASURED: dict[str, Callable[[int], dict[str, Any]]] = {
    each.__name__: each for each in (found, alarms, shuffled, cost, likelihood)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("figures", nargs="*", choices=[*MEASURED, []], help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    for name in arguments.figures or MEASURED:
        figures = {**MEASURED[name](arguments.runs), "runs": arguments.runs}
        result(f"{name}: {json.dumps(figures, indent=1)}")
        kept = read_json(RESULTS) if RESULTS.is_file() else {}
        kept.pop("format", None)
        write_json(RESULTS, {**kept, name: figures, "machine": machine()})


if __name__ == "__main__":
    main()
