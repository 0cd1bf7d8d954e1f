"""`report.html`: the verdict first, then what it rests on, then every item with both answers."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fintune import seal
from fintune.errors import GateRefused
from fintune.evals import judged
from fintune.evals.grading import PHRASES
from fintune.evals.items import VARIANTS, Pair, load_pairs
from fintune.evals.results import CHECKED, results, words
from fintune.files import FORMAT, json_text, read_json, read_jsonl, write_json
from fintune.page import percent, save_page

COMMAND = "fintune eval"
RESULTS, REPORT = "test_results.json", "report.html"
NAMES: dict[str, str] = PHRASES["names"]
LEAST_REACH = 0.02
"""Least half-width of the axis of differences, so that small ones do not look large."""


def read_evaluation(folder: Path, *, unread: tuple[str, ...] = ()) -> dict[str, Any]:
    """The seal of a finished evaluation with its raw files; see `seal.read_seal`."""
    needed = ("run.json", "predictions.jsonl", "heldout.jsonl", judged.NAME)
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
    """Write test_results.json and report.html from the raw files; the former's content."""
    pairs = load_pairs(folder)
    found = results(folder, pairs)
    write_json(folder / RESULTS, found)
    write(folder, found, pairs)
    return {"format": FORMAT, **found}


def write(folder: Path, found: dict[str, Any], pairs: list[Pair]) -> None:
    """Write report.html from the results and the raw files of an evaluation.

    The page is a function of the raw files, so it carries no date.
    """
    differences = _differences(found)
    ends = [abs(end) for _, difference, _ in differences for end in difference["ci95"]]
    verdicts: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(folder / judged.NAME):
        if row.get("key") and not row["canary"]:
            verdicts.setdefault(row["id"], []).append(row)
    misses = found["misses"]
    kinds = list(dict.fromkeys(kind for variant in VARIANTS for kind in misses[variant]))
    save_page(
        folder / REPORT,
        "eval_report",
        found=found,
        sentences=words(found),
        differences=differences,
        reach=1.05 * max([LEAST_REACH, *ends]),
        measures=[_measure(name, measure) for name, measure in found["measures"].items()],
        outcomes=PHRASES["outcomes"],
        tasks=[_task(name, task) for name, task in found["tasks"].items()],
        misses=kinds,
        by_variant={name: [misses[name].get(kind, 0) for kind in kinds] for name in VARIANTS},
        losses=_losses(found["loss"]),
        win_rates=_win_rates(found["judge"], pairs) if found["judge"] else {},
        groups=_groups(pairs),
        verdicts=verdicts,
        provenance=_flat(found["provenance"]),
    )


def _differences(found: dict[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """Rows of the interval chart: name, difference, whether it decides."""
    primary, measures = found["primary"], found["measures"]
    decides = "judge_win_rate" if primary["measure"] == "win_rate" else ""
    name = NAMES[decides] if decides else "accuracy"
    others = [
        (NAMES.get(key, key), measure["difference"], False)
        for key, measure in measures.items()
        if key != decides
    ]
    return [(f"{name} (decides)", primary, True), *others]


def _measure(name: str, measure: dict[str, Any]) -> list[object]:
    return [
        NAMES.get(name, name),
        percent(measure.get("base", {}).get("value")),
        percent(measure.get("adapter", measure).get("value")),
        f"{100 * measure['difference']['value']:+.1f}",
        f"{100 * measure['difference']['mde80']:.1f}",
        *("< 0.0001" if p < 0.0001 else f"{p:.4f}" for p in (measure["p"], measure["p_holm"])),
    ]


def _task(name: str, task: dict[str, Any]) -> list[object]:
    scores = [
        task[variant][score]
        for score in ("correct_less_wrong", "correct_less_3_wrong")
        for variant in VARIANTS
    ]
    return [name, task["n"], *scores]


def _losses(loss: dict[str, Any]) -> list[list[object]]:
    lengths = {f"{name} tokens": part for name, part in loss["by_length"].items()}
    return [
        [
            name,
            part["rows"],
            part["tokens"],
            part["base"],
            part["adapter"],
            percent(part["change"], "+"),
            part["perplexity"]["base"],
            part["perplexity"]["adapter"],
        ]
        for name, part in [("all", loss), *loss["by_source"].items(), *lengths.items()]
    ]


def _win_rates(judge: dict[str, Any], pairs: list[Pair]) -> dict[str, float]:
    """Win rate in percent by the length of the adapter's answer beside the base's."""
    bins: dict[str, list[float]] = {"shorter": [], "alike (± 20 %)": [], "longer": []}
    for pair in pairs:
        if pair.item.id in judge["items"]:
            base, adapter = (len(pair.text(variant)) + 1 for variant in VARIANTS)
            ratio = adapter / base
            name = "shorter" if ratio < 0.8 else "longer" if ratio > 1.25 else "alike (± 20 %)"
            bins[name].append(judged.SCORE[judge["items"][pair.item.id]])
    return {
        f"{name} ({len(wins)})": round(100 * sum(wins) / len(wins), 1)
        for name, wins in bins.items()
        if wins
    }


def _groups(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Pairs by which answers are right, in the order of the page."""
    names = ("Only the adapter is right", "Only the base is right", "Neither is right",
             "Both are right", "Not decided by arithmetic")  # fmt: skip
    groups: dict[str, list[Pair]] = {name: [] for name in names}
    for pair in pairs:
        base, adapter = (pair.holds(variant, lambda graded: graded.correct) for variant in VARIANTS)
        at = (2 + base if base == adapter else int(base)) if pair.item.kind in CHECKED else 4
        groups[names[at]].append(pair)
    return groups


def _flat(value: dict[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, entry in value.items():
        if isinstance(entry, dict):
            lines += _flat(entry, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {entry}")
    return lines
