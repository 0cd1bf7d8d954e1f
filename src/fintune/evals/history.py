"""Which evaluations were made of the same questions: `evaluations.jsonl` in the data folder.

Ten adapters without any effect give a `better` in one of six series, so the number of looks stands
in the verdict's sentence. The file is no part of the prepared data and of no seal.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fintune.console import warn
from fintune.files import sha256_json
from fintune.seal import EVALUATIONS, evaluations


def looks(data: Path, inputs: dict[str, Any]) -> int:
    """How many evaluations these questions have had with this one: other inputs, the same test rows
    or a task in common."""
    own, asked = _key(inputs), _questions(inputs)
    others = {row["inputs"] for row in evaluations(data) if asked & row["questions"]}
    return len(others - {own}) + 1


def note(data: Path, inputs: dict[str, Any], results: dict[str, Any]) -> None:
    """Append a finished evaluation."""
    judged = results["judge"]
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "inputs": _key(inputs),
        "adapter": inputs["adapter"],
        "questions": sorted(_questions(inputs)),
        "verdict": results["verdict"],
        "judge": judged["model"] if judged else None,
    }
    try:
        with (data / EVALUATIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError:
        warn(f"{data / EVALUATIONS} cannot be written: later evaluations will not count this one")


def _key(inputs: dict[str, Any]) -> str:
    return sha256_json(inputs)


def _questions(inputs: dict[str, Any]) -> set[str]:
    """What names the test rows, and the questions of every task."""
    tasks = (f"{name} {sha256_json(told)}" for name, told in inputs["tasks"].items())
    return {inputs["test"], *tasks}
