"""Which evaluations were made of the same questions: `evaluations.jsonl` in the data folder.

Ten adapters without any effect give a `better` in one of six series, so the number of looks stands
in the verdict's sentence. The file is no part of the prepared data and of no seal.
"""

import json
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fintune.console import warn
from fintune.errors import GateRefused
from fintune.files import sha256_json
from fintune.seal import EVALUATIONS, evaluations

Json = dict[str, Any]


def looks(data: Path, inputs: Json, judging: Json | None = None) -> int:
    """How many looks these questions have had with this one: evaluations with other inputs of the
    same test rows or a task in common, and each further judging of one.

    Args:
        judging: the inputs of the judging that this one is of.
    """
    asked, made = _questions(inputs), defaultdict[str, set[str]](set)
    made[sha256_json(inputs)] |= {_name(judging)}
    for row in evaluations(data):
        if asked & row["questions"]:
            made[row["inputs"]].add(row["judging"])
    return sum(max(1, len(judgings - {""})) for judgings in made.values())


def note(
    data: Path, inputs: Json, verdict: str | None, judging: Json | None = None, **more: str
) -> None:
    """Append an evaluation, or a judging of it."""
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "inputs": sha256_json(inputs),
        "adapter": inputs["adapter"],
        "questions": sorted(_questions(inputs)),
        "verdict": verdict,
        "judge": judging and judging["judge"]["model"],
        "judging": _name(judging),
        **more,
    }
    try:
        with (data / EVALUATIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError:
        warn(f"{data / EVALUATIONS} cannot be written: later evaluations will not count this one")


def open_final(data: Path, inputs: Json, again: str) -> None:
    """Note that the part kept back is opened.

    Raises:
        GateRefused: it was opened for another evaluation, and `again` gives no reason.
    """
    rows = [row for row in evaluations(data) if inputs["test"] in row["questions"]]
    if any(row["inputs"] != sha256_json(inputs) for row in rows) and not again.strip():
        raise GateRefused(
            f"the final part was opened already, on {rows[0]['date']}",
            why="what is looked at twice is one more test part, and no last proof",
            fix='the reason is kept in evaluations.jsonl: fintune eval --final --again "..."',
        )
    note(data, inputs, None, opened=again or "first")


def _name(judging: Json | None) -> str:
    return sha256_json(judging) if judging else ""


def _questions(inputs: Json) -> set[str]:
    """What names the test rows, and the questions of every task."""
    tasks = (f"{name} {sha256_json(told)}" for name, told in inputs["tasks"].items())
    return {inputs["test"], *tasks} - {None}
