"""`report.html`: the verdict first, then what it rests on, then every item with both answers."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fintune import seal
from fintune.errors import GateRefused
from fintune.evals import judge
from fintune.evals.grading import PHRASES
from fintune.evals.items import VARIANTS, Pair, load_pairs
from fintune.evals.results import CHECKED, results, words
from fintune.files import FORMAT, json_text, read_json, read_jsonl, write_json
from fintune.page import save_page

COMMAND = "fintune eval"
RESULTS, REPORT = "test_results.json", "report.html"
GROUPS = ("Only the adapter is right", "Only the base is right", "Neither is right",
          "Both are right", "Not decided by arithmetic")  # fmt: skip
"""Pairs by which answers are right, in the order of the page."""


def read_evaluation(folder: Path, *, unread: tuple[str, ...] = ()) -> dict[str, Any]:
    """The seal of a finished evaluation with its raw files; see `seal.read_seal`."""
    needed = ("run.json", "predictions.jsonl", "heldout.jsonl", judge.NAME)
    return seal.read_seal(
        folder, stage="evaluation", make=COMMAND, needed=needed, unread=(*seal.UNREAD, *unread)
    )


def check_results(folder: Path) -> None:
    """Hold test_results.json of a finished evaluation against what its raw files give.

    Raises:
        GateRefused: it says something else.
        OutputError: the evaluation is unfinished, or a file of it was changed.
    """
    read_evaluation(folder)
    path, differing = folder / RESULTS, ["they cannot be read"]
    broken = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
    with contextlib.suppress(*broken):
        text = json_text(results(folder, load_pairs(folder)))
        if path.read_text(encoding="utf-8") == text:
            return
        differing = seal.differences(read_json(path), json.loads(text)) or ["its spelling"]
    raise GateRefused(
        f"{path} is not what its raw files give: {'; '.join(differing[:5])}",
        why="a verdict is a function of the answers beside it, and of nothing else",
        fix=f"make it again: fintune eval --rescore {folder}",
    )


def rescore(folder: Path) -> dict[str, Any]:
    """Make test_results.json and report.html of an evaluation again, from its raw files alone.

    Nothing that this module imports loads torch: the command takes the time of the grading.

    Raises:
        OutputError: the evaluation is unfinished, or a raw file is not the one that was sealed.
    """
    done = read_evaluation(folder, unread=(RESULTS, REPORT))
    found = write_results(folder)
    seal.seal(folder, done["inputs"])
    return found


def write_results(folder: Path) -> dict[str, Any]:
    """Write test_results.json and report.html from the raw files; the former's content.

    The page is a function of the raw files, so it carries no date.
    """
    pairs = load_pairs(folder)
    found = results(folder, pairs)
    write_json(folder / RESULTS, found)
    verdicts: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(folder / judge.NAME):
        if row.get("key") and not row["control"]:
            verdicts.setdefault(row["id"], []).append(row)
    groups: dict[str, list[Pair]] = {name: [] for name in GROUPS}
    for pair in pairs:
        base, adapter = (pair.holds(variant, lambda graded: graded.correct) for variant in VARIANTS)
        at = (2 + base if base == adapter else int(base)) if pair.item.kind in CHECKED else 4
        groups[GROUPS[at]].append(pair)
    save_page(
        folder / REPORT,
        "eval_report",
        found=found,
        sentences=words(found),
        names=PHRASES["names"],
        outcomes=PHRASES["outcomes"],
        groups=groups,
        verdicts=verdicts,
    )
    return {"format": FORMAT, **found}
