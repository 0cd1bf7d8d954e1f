"""Whether a verdict will be possible, told from prepared rows before anything is trained."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from fintune import console, seal
from fintune.config import Config
from fintune.errors import FintuneError
from fintune.evals import stats
from fintune.evals.grading import HeldOutItems, Item, Pair, by_document
from fintune.evals.results import CHECKED, deciding_pairs
from fintune.evals.tasks import find_questions, suite_tasks, task_items
from fintune.evals.verdict import FEWEST_CHECKABLE, FEWEST_DOCUMENTS, FEWEST_ITEMS
from fintune.files import read_json, sha256_bytes
from fintune.sources import recorded_commits

LOST, ICC = 0.15, 0.2
"""Assumed share of the questions that the adapter loses (as many and the gain are won), and
correlation of questions of one document, as in bench/verdict.py."""
MOST_SHARE = 0.45
"""Largest share of the rows that is proposed for the test part."""


def gain_found(sizes: Sequence[int]) -> float:
    """The smallest gain that is found four times in five, of documents with so many questions."""
    count, squares = sum(sizes), sum(size**2 for size in sizes)
    effect = 1 + (squares / count - 1) * ICC
    return stats.detectable(LOST, count / effect, count**2 / squares + 1)


def outlook(config: Config) -> dict[str, Any]:
    """What the test rows and tasks of prepared data can decide.

    Returns:
        `questions` that would decide and their `documents`; `judged`: a judge decides; `gain`, the
        smallest that could be found by arithmetic; `impossible`: why there can be no verdict.
    """
    items, settings = _test_items(config), config.eval
    checked = [item for item in items if item.kind in CHECKED][: settings.max_items]
    checked += [item for item in _of_tasks(config) if item.kind in CHECKED]
    chosen = [pair.item for pair in deciding_pairs([Pair(i, {}, {}) for i in by_document(checked)])]
    wanted = len(chosen) < FEWEST_CHECKABLE or settings.primary == "win_rate"
    judged, fewest = wanted and settings.judge.model is not None, FEWEST_CHECKABLE
    if judged:
        chosen, fewest = by_document(items[: settings.judged_items]), FEWEST_ITEMS
    sizes = [*Counter(item.group for item in chosen).values()]
    effective = len(chosen) ** 2 / max(1, sum(size**2 for size in sizes))
    impossible, lacks = "", min(len(chosen) / fewest, effective / FEWEST_DOCUMENTS)
    if lacks < 1:
        needed = f"{fewest} questions and {FEWEST_DOCUMENTS} effective documents are needed"
        share = read_json(config.data_dir / "manifest.json")["test_share"]
        impossible = f"no verdict is possible, {needed}: {_remedy(share, lacks, judged)}"
    elif settings.primary == "win_rate" and not judged:
        impossible = "no verdict is possible: eval.primary is win_rate, set eval.judge.model"
    gain = gain_found(sizes) if sizes and not judged else None
    counts = {"questions": len(chosen), "documents": len(sizes)}
    return {**counts, "judged": judged, "gain": gain, "impossible": impossible}


def _test_items(config: Config) -> list[Item]:
    """The items of the test rows, by hash, as they are asked."""
    seal.read_data(config.data_dir)
    train, test = (pq.read_table(config.data_dir / f"{p}.parquet") for p in ("train", "test"))
    reader = HeldOutItems(train.select(["messages"]).to_pylist())
    rows = [row for row in test.to_pylist() if row["messages"]]
    items = [reader.item(row) for row in rows if not row["messages"][-1].get("tool_calls")]
    return sorted(items, key=lambda item: sha256_bytes(item.id.encode()))


def _of_tasks(config: Config) -> list[Item]:
    """The items of `eval.tasks`; none, and a note, where they cannot be read here."""
    known, most = seal.recorded_inputs(config.data_dir).get("benchmarks", {}), config.eval.max_items
    try:
        found = find_questions(suite_tasks(config.eval), recorded_commits(known)).items()
        return [item for name, sources in found for item in task_items(name, sources, most)]
    except FintuneError as error:
        console.warn(f"the questions of eval.tasks are not counted: {error.what}")
        return []


def _remedy(share: float, lacks: float, judged: bool) -> str:
    """What makes a verdict possible, of test rows that give the share `lacks` of what it takes."""
    raised = math.ceil(100 * share / lacks) / 100 if lacks else 1.0
    ways = [f"raise data.test_share to {raised:g}"] * (raised <= MOST_SHARE) + ["bring eval.tasks"]
    ways += ["set a judge (eval.judge.model)"] * (not judged)
    if lacks:
        ways.append(f"prepare {1 / lacks:.1f} times as many rows")
    return ", ".join(ways[:-1]) + f", or {ways[-1]}"


def tell(facts: dict[str, Any]) -> None:
    """Say an outlook in a sentence."""
    kind = "judged" if facts["judged"] else "checkable"
    asked, gain = f"{facts['questions']} {kind} questions of {facts['documents']} documents", ""
    if facts["gain"] is not None:
        gain = f"; a gain below {100 * facts['gain']:.0f} points would usually be missed"
    if facts["impossible"]:
        console.warn(f"{asked}: {facts['impossible']}{gain}")
    else:
        console.say(f"{asked}{gain}")
