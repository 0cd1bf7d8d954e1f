"""Whether a verdict will be possible, told from prepared rows before anything is trained."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from fintune import console, seal
from fintune.config import Config
from fintune.documents import document_keys
from fintune.errors import FintuneError
from fintune.evals import stats
from fintune.evals.grading import HeldOutItems, Item, Pair, as_example
from fintune.evals.results import CHECKED, deciding_pairs
from fintune.evals.tasks import find_questions, task_items
from fintune.evals.verdict import FEWEST_CHECKABLE, FEWEST_DOCUMENTS, FEWEST_ITEMS
from fintune.files import read_json, sha256_bytes
from fintune.sources import recorded_commits

LOST = 0.15
"""Assumed share of the questions that the adapter loses; as many and the gain are won."""
ICC = 0.2
"""Assumed correlation of questions of one document, as in bench/verdict.py."""
MOST_SHARE = 0.45
"""Largest share of the rows that is proposed for the test part."""


def gain_found(documents: Sequence[int]) -> float:
    """The smallest gain that is found four times in five, under the two assumptions above.

    Args:
        documents: how many questions each of them has.
    """
    count, squares = sum(documents), sum(size**2 for size in documents)
    effect = 1 + (squares / count - 1) * ICC
    return stats.detectable(LOST, count / effect, count**2 / squares + 1)


def outlook(config: Config) -> dict[str, Any]:
    """What the test rows and tasks of prepared data can decide.

    Returns:
        `questions` that would decide, their `documents` and the effective number of those,
        `test_rows`, `gain` (the smallest that could be found; None without questions), `judged`
        (a judge's opinion of them decides), and `impossible`: why there can be no verdict, or "".
    """
    folder, settings = config.data_dir, config.eval
    items = sorted(_held_out(config), key=lambda item: sha256_bytes(item.id.encode()))
    checked = [item for item in items if item.kind in CHECKED][: settings.max_items]
    checked += [item for item in _of_tasks(config) if item.kind in CHECKED]
    chosen, judged = _deciding(checked), False
    if len(chosen) < FEWEST_CHECKABLE or settings.primary == "win_rate":
        judged = settings.judge.model is not None
        chosen = items[: settings.judged_items] if judged else chosen
    keys = document_keys([as_example(item) for item in chosen], [item.group for item in chosen])
    sizes = [*Counter(keys).values()]
    count, fewest = len(chosen), FEWEST_ITEMS if judged else FEWEST_CHECKABLE
    effective = count**2 / max(1, sum(size**2 for size in sizes))
    facts: dict[str, Any] = {
        "questions": count,
        "documents": len(sizes),
        "effective": round(effective, 1),
    }
    lacks = min(count / fewest, effective / FEWEST_DOCUMENTS)
    gain = gain_found(sizes) if sizes and not judged else None
    facts |= {"test_rows": len(items), "gain": gain, "judged": judged}
    impossible = ""
    if lacks < 1:
        needed = f"{fewest} questions and {FEWEST_DOCUMENTS} effective documents are needed"
        share = read_json(folder / "manifest.json")["test_share"]
        impossible = f"no verdict is possible, {needed}: {_remedy(share, lacks, judged)}"
    elif settings.primary == "win_rate" and not judged:
        impossible = "no verdict is possible: eval.primary is win_rate, set eval.judge.model"
    return {**facts, "impossible": impossible}


def _held_out(config: Config) -> list[Item]:
    """The items of the test rows."""
    seal.read_data(config.data_dir)
    train, test = (
        pq.read_table(config.data_dir / f"{part}.parquet", columns=columns).to_pylist()
        for part, columns in (("train", ["messages"]), ("test", None))
    )
    reader = HeldOutItems(train)
    whole = [row for row in test if row["messages"] and not row["messages"][-1].get("tool_calls")]
    return [reader.item(row) for row in whole]


def _of_tasks(config: Config) -> list[Item]:
    """The items of `eval.tasks`, none where they cannot be read here."""
    tasks, known = config.eval.tasks, seal.recorded_inputs(config.data_dir).get("benchmarks", {})
    try:
        found = find_questions(tasks, recorded_commits(known)).items()
        return [i for name, each in found for i in task_items(name, each, config.eval.max_items)]
    except FintuneError as error:
        console.warn(f"the questions of eval.tasks are not counted: {error.what}")
        return []


def _deciding(checked: list[Item]) -> list[Item]:
    """Of every document the questions that decide."""
    keys = document_keys([as_example(item) for item in checked], [item.group for item in checked])
    keyed = [replace(item, group=key) for item, key in zip(checked, keys, strict=True)]
    return [pair.item for pair in deciding_pairs([Pair(item, {}, {}) for item in keyed])]


def _remedy(share: float, lacks: float, judged: bool) -> str:
    """What makes a verdict possible, of test rows that give the share `lacks` of what it takes."""
    raised = math.ceil(100 * share / lacks) / 100 if lacks else 1.0
    ways = [f"raise data.test_share to {raised:g}"] * (raised <= MOST_SHARE) + ["bring eval.tasks"]
    ways += ["set a judge (eval.judge.model)"] * (not judged)
    ways += [f"prepare {1 / lacks:.1f} times as many rows"] * (lacks > 0)
    return ", ".join(ways[:-1]) + f", or {ways[-1]}"


def tell(facts: dict[str, Any]) -> None:
    """Say an outlook in a sentence."""
    asked = "{questions} checkable questions of {documents} documents".format(**facts)
    if facts["judged"]:
        asked = "{questions} questions of {documents} documents for the judge".format(**facts)
    found = ""
    if facts["gain"] is not None:
        found = f"; a gain below {100 * facts['gain']:.0f} points would usually be missed"
    if facts["impossible"]:
        console.warn(f"{asked}: {facts['impossible']}{found}")
    else:
        console.say(f"{asked}{found}")
