"""Replies that know nothing, graded on every benchmark file, and graders beside human labels."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prepare import BENCHMARKS

from fintune.config import DatasetConfig
from fintune.evals.amounts import scan
from fintune.evals.grading import Item, grade
from fintune.evals.numbers import is_number_answer
from fintune.evals.tasks import TASKS, find_questions, task_items
from fintune.files import read_jsonl

SHOTS = 18
"""Amounts that a reply could hold of which one had to be right, once."""
DRAWN = 12
"""Amounts of a passage that are drawn to measure chance."""
LABELS = ("positive", "negative", "neutral", "loan", "yes", "no", "organization", "person")
WORDS = (*LABELS, "revenue", "margin", "is", "was", "a", "the", "of", "increase", "in", "and")
"""Of these words a babble is made: labels, and words that stand before them."""


def items(path: Path) -> list[Item]:
    """The questions of a benchmark file, by the task whose name its own begins with."""
    name = max((task for task in TASKS if path.stem.startswith(task)), key=len)
    sources = find_questions({name: DatasetConfig(path=str(path))}, {})
    return task_items(name, sources[name], 10_000)


def replies(item: Item, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Each control's replies, in several forms."""
    question, context = item.parts()
    text = f"{context}\n{question}"
    found = [text[one.start : one.end] for one in scan(text)[1] if not one.role][-SHOTS:]
    sixes = [" and ".join(found[at : at + 6]) for at in range(0, len(found), 6)]
    for parts in ((", ", found), (" ", found), ("\n", found)):
        yield "shotgun", parts[0].join(parts[1])
    yield "shotgun", "".join(f"It was {part}. " for part in sixes)
    yield "shotgun", "".join(f"It was {part}. " for part in found)
    yield "shotgun", f"The answer is {', '.join(found)}."
    words = text.split()
    at = rng.randrange(max(1, len(words) - 60))
    for babble in (words, words[-60:], words[at : at + 60], words[at : at + 15]):
        yield "babble", " ".join(babble)
    yield "babble", text
    yield "babble", " ".join(rng.sample(words, min(60, len(words))))
    yield "babble", " ".join(rng.choices(WORDS, k=40))
    labels = item.choices
    if labels:
        for joint in (", ", " or ", ". ", "\n", "/"):
            yield "all_labels", joint.join(labels)
        yield "all_labels", f"The answer is {', '.join(labels)}."
        yield "all_labels", "".join(f"It is {label}. " for label in labels)


def chance(item: Item, rng: random.Random) -> float:
    """1/k of k labels; of figures one amount of the passage drawn at random; else none."""
    if item.kind == "label":
        return 1 / len(item.choices)
    text = "\n".join(item.parts()[::-1])
    found = [text[one.start : one.end] for one in scan(text)[1] if not one.role]
    if item.kind != "number" or not found:
        return 0.0
    drawn = rng.sample(found, min(DRAWN, len(found)))
    return sum(right(item, one) for one in drawn) / len(drawn)


def right(item: Item, reply: str) -> bool:
    """Whether a reply is graded as correct."""
    graded = item.grade(reply)
    return graded is not None and graded.correct


def controls() -> dict[str, Any]:
    """By file: the share that chance gets right, and each control's best form."""
    files: dict[str, Any] = {}
    for path in sorted(BENCHMARKS.glob("*.jsonl")):
        asked, rng = items(path), random.Random(7)
        if asked[0].kind == "text":  # only a judge grades these
            continue
        counts: dict[tuple[str, int], int] = {}
        for item in asked:
            for at, (name, reply) in enumerate(replies(item, rng)):
                counts[name, at] = counts.get((name, at), 0) + right(item, reply)
        best = {name: 0 for name, _ in counts}
        for (name, _), count in counts.items():
            best[name] = max(best[name], count)
        expected = sum(chance(item, rng) for item in asked) / len(asked)
        shares = {name: round(count / len(asked), 4) for name, count in best.items()}
        files[path.stem] = {"n": len(asked), "chance": round(expected, 4), **shares}
    names = ("babble", "shotgun", "all_labels")
    over = {
        name: max(round(one[name] - one["chance"], 4) for one in files.values() if name in one)
        for name in names
    }
    return {"files": files, "most_above_chance": over}


def human(folder: Path) -> dict[str, Any]:
    """Agreement with the labels of FinanceBench's answers whose reference is a number.

    Args:
        folder: a checkout of patronus-ai/financebench; nothing of it is kept.
    """
    known = read_jsonl(folder / "data" / "financebench_open_source.jsonl")
    golds = {row["financebench_id"]: row["answer"] for row in known}
    table = {(said, graded): 0 for said in (True, False) for graded in (True, False)}
    refused = {"n": 0, "abstained_or_no_answer": 0}
    for path in sorted((folder / "results").glob("*.jsonl")):
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            gold = golds[row["financebench_id"]]
            if not isinstance(row["gold_answer"], int | float) or not is_number_answer(gold):
                continue
            graded = grade("number", gold, str(row["model_answer"]), question=row["question"])
            assert graded is not None
            table[row["label"] == "Correct Answer", graded.correct] += 1
            if row["label"] == "Refusal":
                refused["n"] += 1
                refused["abstained_or_no_answer"] += graded.outcome in ("abstained", "unparsed")
    n, both, neither = sum(table.values()), table[True, True], table[False, False]
    yes = (both + table[True, False]) * (both + table[False, True])
    no = (neither + table[True, False]) * (neither + table[False, True])
    agree, by_chance = (both + neither) / n, (yes + no) / n**2
    return {
        "n": n,
        "agreement": round(agree, 4),
        "kappa": round((agree - by_chance) / (1 - by_chance), 3),
        "wrongly_accepted": table[False, True],
        "wrongly_rejected": table[True, False],
        "refusals": refused,
    }
