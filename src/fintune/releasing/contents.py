"""What a release holds of the data's rows, and what it says of its verdict."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from fintune import files, seal
from fintune.config import Config
from fintune.console import warn
from fintune.untrusted.checks import CONFIG, JUDGED, PROVENANCE, RESULTS, Check, read_object

Json = dict[str, Any]
ACCEPTED = ".accepted.json"
"""In the folder of the results, hidden from its seal: who accepted its verdict, when and why."""
PUBLISHED = 50
"""Items of the judged file, as its name says; more may be judged."""
NOT_STATED = "not stated"
_KEPT = (
    *("format", "id", "task", "key", "status", "unscored_reason", "outcome", "model", "positions"),
    *("served_model", "control", "human", "usage", "rubric_sha256", "deterministic"),
)
"""Keys of the judged file that repeat no text of a row, an answer or a reply."""


def _today() -> date:
    return datetime.now(UTC).date()


@dataclass(frozen=True)
class Acceptance:
    """Why a verdict other than `better` was accepted, by whom and when; recorded once, so that a
    release built again has the same bytes.

    Attributes:
        folder: of the results.
        reason: None where nothing was accepted.
        facts: what the release states of it.
    """

    folder: Path
    reason: str | None
    facts: Json

    @classmethod
    def of(cls, folder: Path, reason: str | None, results_sha256: str) -> "Acceptance":
        """The recorded acceptance where it is of this reason and these results, else a new one."""
        facts: Json = {"accepted": reason}
        if reason is None:
            return cls(folder, reason, facts)
        facts["accepted_on"] = _today().isoformat()
        facts["accepted_by"] = os.environ.get("USER") or NOT_STATED
        path = folder / ACCEPTED
        old = files.read_json(path) if path.is_file() else {}
        if (old.get("accepted"), old.get("test_results_sha256")) == (reason, results_sha256):
            facts |= {key: old[key] for key in facts}
        return cls(folder, reason, facts | {"test_results_sha256": results_sha256})

    def record(self) -> None:
        """Keep it beside the results that it is of."""
        if self.reason is None:
            return
        try:
            files.write_json(self.folder / ACCEPTED, self.facts)
        except OSError:
            warn(f"{self.folder} cannot be written: a later build will state another date")


def first_evaluated(data: Path, inputs_sha256: str) -> str | None:
    """The day on which these answers were first evaluated, of `evaluations.jsonl` of the data."""
    rows = seal.evaluations(data)
    return min((row["date"] for row in rows if row["inputs"] == inputs_sha256), default=None)


def read_forms(evaluation: Path, answers: str) -> Json:
    """What was found of each form that the adapter was also asked in, by name.

    Args:
        answers: sha256 of the evaluation's answers; forms compared with others are left out.

    Raises:
        OutputError: one was changed since.
    """
    found = {}
    for done in sorted(evaluation.glob(f"{seal.FORMS}/*/{seal.DONE}")):
        sealed = seal.read_seal(done.parent, stage="form", make="fintune eval --form")
        if sealed["inputs"]["answers"] == answers:
            found[done.parent.name] = files.read_json(done.with_name(RESULTS))
    return found


def shipped_rows(folder: Path, config: Config, *, judged: bool) -> tuple[str | None, Json]:
    """The judged file as a release holds it, of the first items that were judged, and what the
    release holds of the data's rows.

    Args:
        folder: of the results: the evaluation's, or a judging's.
        judged: whether a judge was asked; if not, no line looks as if one had been.
    """
    samples, rows = config.release.samples, list(files.read_jsonl(folder / JUDGED))
    first = [*dict.fromkeys(row.get("id") for row in rows)][:PUBLISHED]
    rows = [row for row in rows if row.get("id") in first]
    if not judged:
        rows = [row | {"status": "not_judged", "unscored_reason": "no_judge"} for row in rows]
    held: Json = {"samples": samples, "word_for_word": 0}
    if samples == "none":
        return None, held
    if samples == "ids":
        rows = [{key: row[key] for key in _KEPT if key in row} for row in rows]
        for row in rows:
            graded = row.pop("deterministic", None) or {}
            row["graded"] = {name: one and one["outcome"] for name, one in graded.items()}
        return _lines(rows), held
    answered = files.read_jsonl(config.eval_dir / "predictions.jsonl")
    tasks = seal.recorded_inputs(config.eval_dir).get("tasks", {})
    items = (row["item"] for row in answered if row["item"]["task"] not in tasks)
    questions = {row["question"] for row in rows if row.get("question")}
    held["word_for_word"] = max(len({item["id"] for item in items}), len(questions))
    return _lines(rows), held


def _lines(rows: list[Json]) -> str:
    return "".join(map(files.json_line, rows))


def announced(config: Json) -> str:
    """How many rows of the data a release contains, in a sentence.

    Args:
        config: its training_config.json.
    """
    held = config.get("rows_of_the_data")
    if not isinstance(held, dict):
        return "not stated: how many rows of the data this release contains"
    if (samples := held.get("samples")) != "text":
        return f"contains 0 rows of your data (release.samples: {samples})"
    count = held.get("word_for_word")
    return f"contains {count} rows of your data: questions and answers, word for word"


def standing(folder: Path, require: str | None) -> Iterator[Check]:
    """Checks that say what was found of a release's adapter, who accepted it, and how old that is.

    Args:
        require: the verdict without which the last check fails.
    """
    stated = read_object(folder, CONFIG, absent=True).get(PROVENANCE, {})
    verdict = read_object(folder, RESULTS, absent=True).get("verdict", NOT_STATED)
    reason = stated.get("accepted")
    if reason is None:
        yield Check("accepted", "ok", "no exception was made")
    else:
        who, when = (stated.get(f"accepted_{key}", NOT_STATED) for key in ("by", "on"))
        by = f"by {who}" if who != NOT_STATED else "account not stated"
        yield Check("accepted", "note", f"although {verdict}, {by}, {when}: {reason}")
    days = None
    with suppress(ValueError):
        days = (_today() - date.fromisoformat(str(stated.get("evaluated_on")))).days
    passed = "1 day" if days == 1 else f"{days} days"
    told = f"{passed} since its evaluation ({stated.get('evaluated_on')})"
    yield Check("age", "note", "not stated") if days is None else Check("age", "ok", told)
    if require is not None and verdict != require:
        yield Check("verdict", "failed", f"its verdict is {verdict}, not {require}")
    else:
        yield Check("verdict", "ok" if verdict == "better" else "note", str(verdict))
