"""The verdict and its report: pure functions of the raw files of an evaluation.

`results` reads `run.json`, `predictions.jsonl`, `heldout.jsonl` and, where a judge was
asked, `eval_50_gpt_judged_raw.jsonl`, grades every answer again and returns what is written to
`test_results.json`. One measure, named before the run, decides; everything else is reported.
`report.html` has the verdict first, then what it rests on, then every item with both answers.
Nothing that is imported here loads torch: rescoring takes the time of the grading.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fintune import seal
from fintune.errors import GateRefused
from fintune.evals import judge, stats
from fintune.evals.grading import PHRASES, Graded
from fintune.evals.items import VARIANTS, Pair, load_pairs
from fintune.files import FORMAT, json_text, read_json, read_jsonl, write_json
from fintune.page import save_page

COMMAND = "fintune eval"
RESULTS, REPORT = "test_results.json", "report.html"
FEWEST_CHECKABLE = 100
"""With fewer checkable items than this, accuracy cannot decide and the judge's win rate does."""
FEWEST_ITEMS = 50
"""Fewer items than this decide nothing: they find differences of 18 points and more."""
MOST_UNSCORED = 0.02
"""Share of judge calls without a readable verdict above which the run is invalid."""
CHECKED = ("number", "label", "span", "tags")
"""Kinds of item whose correctness is accuracy; the others have measures of their own."""
SLIPS = ("scale", "percent", "sign")
"""Misses that put a figure wrong by orders of magnitude or turn a profit into a loss."""
MEASURES: dict[str, tuple[tuple[str, ...], Callable[[Graded], bool]]] = {
    "accuracy_lenient": (CHECKED, lambda g: g.lenient),
    "wrong": (CHECKED, lambda g: g.outcome == "wrong"),
    "abstained": (CHECKED, lambda g: g.outcome == "abstained"),
    "unparsed": (CHECKED, lambda g: g.outcome == "unparsed"),
    "scale_percent_or_sign_slip": (("number",), lambda g: g.miss in SLIPS),
    "ungrounded_number": (("number",), lambda g: bool(g.ungrounded)),
    "unanswerable_abstained": (("unanswerable",), lambda g: g.correct),
    "unsafe_advice_refused": (("refuse",), lambda g: g.correct),
    "harmless_refused": (("comply",), lambda g: not g.correct),
}
"""Secondary measures, which never decide: shares of answers to some kinds of item."""
MARGIN, MEAN_MARGIN = 0.03, 0.015
"""Non-inferiority in general ability, since learning finance costs a little of everything else
(Biderman et al. 2024, arXiv 2405.09673): a task of lm-eval passes while its lower 95 % bound is not
under -3 points; the mean of all, -1.5 points."""
GROUPS = ("Only the adapter is right", "Only the base is right", "Neither is right",
          "Both are right", "Not decided by arithmetic")  # fmt: skip
"""Pairs by which answers are right, in the order of the page."""


def results(folder: Path, pairs: list[Pair]) -> dict[str, Any]:
    """Everything of test_results.json but its format number; `pairs` as `load_pairs` gives them."""
    run = read_json(folder / "run.json")
    general = None
    if (folder / "regression.json").is_file():
        scores = read_json(folder / "regression.json")
        general = regression_summary(scores["base"], scores["adapter"], run["seed"])
    checked = [pair for pair in pairs if pair.item.kind in CHECKED]
    loss = loss_summary(list(read_jsonl(folder / "heldout.jsonl")))
    judged = judge.summary(
        list(read_jsonl(folder / judge.NAME)),
        {pair.item.id: _preferred(pair) for pair in pairs},
        {pair.item.id: pair.item.group for pair in pairs},
        run["seed"],
    )
    accuracy, measures = _accuracy(checked, run["seed"]), _measures(pairs, run["seed"])
    if judged:
        measures["judge_win_rate"] = judged["win_rate"]
    adjusted = stats.holm({name: measure["p"] for name, measure in measures.items()})
    for name, measure in measures.items():
        measure["p_holm"] = adjusted[name]
    verdict = _verdict(run, checked, loss, accuracy, judged, general)
    return {
        **verdict,
        "loss": loss,
        "accuracy": accuracy,
        "tasks": _tasks(checked),
        "misses": {variant: _misses(checked, variant) for variant in VARIANTS},
        "measures": measures,
        "judge": judged,
        "regression": general,
        "n": {
            "items": len(pairs),
            "checkable": len(checked),
            "clusters": len({pair.item.group for pair in pairs}),
            "contaminated": len(run["contaminated"]),
        },
        "provenance": run["provenance"],
    }


def loss_summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss (nats a label token), overall and by source, from the sums of the cells."""

    def over(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = sum(cell["tokens"] for cell in chosen)
        base, adapter = (sum(cell[name] for cell in chosen) / max(tokens, 1) for name in VARIANTS)
        return {
            "base": round(base, 6),
            "adapter": round(adapter, 6),
            "change": round(adapter / base - 1, 6) if base else 0.0,
            "rows": sum(cell["rows"] for cell in chosen),
            "tokens": tokens,
        }

    sources = dict.fromkeys(cell["source"] for cell in cells)
    by_source = {name: over([cell for cell in cells if cell["source"] == name]) for name in sources}
    return {**over(cells), "by_source": by_source}


def regression_summary(
    base: dict[str, dict[str, float]], adapter: dict[str, dict[str, float]], seed: int
) -> dict[str, Any]:
    """Differences by task with their lower bounds, and whether all keep within the margins."""
    tasks: dict[str, Any] = {}
    every: list[float] = []
    names: list[str] = []
    for task, scored in base.items():
        change = [adapter[task][question] - score for question, score in scored.items()]
        every += change
        names += [f"{task}/{question}" for question in scored]
        found = stats.paired(change, seed=seed)
        tasks[task] = {
            "base": round(sum(scored.values()) / len(scored), 6),
            "adapter": round(sum(adapter[task].values()) / len(scored), 6),
            "difference": found,
            "pass": found["ci95"][0] >= -MARGIN,
        }
    mean = stats.paired(every, names, seed=seed)
    kept = mean["ci95"][0] >= -MEAN_MARGIN
    return {
        "tasks": tasks,
        "mean": {"difference": mean, "pass": kept},
        "pass": kept and all(task["pass"] for task in tasks.values()),
    }


def _preferred(pair: Pair) -> str | None:
    """Whose answer arithmetic or label prefers; None where it finds both right or both wrong."""
    base, adapter = pair.graded["base"], pair.graded["adapter"]
    if base is None or adapter is None or base.correct == adapter.correct:
        return None
    return "adapter" if adapter.correct else "base"


def _compare(pairs: list[Pair], test: Callable[[Graded], bool], seed: int) -> dict[str, Any]:
    """Shares of both models' answers that pass a test, and their paired difference."""
    flags = {name: [pair.holds(name, test) for pair in pairs] for name in VARIANTS}
    change = [a - b for b, a in zip(flags["base"], flags["adapter"], strict=True)]
    gained, lost = change.count(1), change.count(-1)
    groups = [pair.item.group for pair in pairs]
    return {
        **{name: stats.rate(sum(flags[name]), len(pairs)) for name in VARIANTS},
        "difference": stats.paired(change, groups, seed=seed),
        "p": round(stats.mcnemar_midp(gained, lost), 6),
        "gained": gained,
        "lost": lost,
    }


def _accuracy(checked: list[Pair], seed: int) -> dict[str, Any]:
    found = _compare(checked, lambda graded: graded.correct, seed)
    known = [pair.item for pair in checked if pair.item.majority is not None]
    majority = sum(bool((g := item.grade(item.majority or "")) and g.correct) for item in known)
    return {
        **found,
        **{name: found[name]["value"] for name in VARIANTS},
        "ci95": {name: found[name]["ci95"] for name in VARIANTS},
        "majority_class": stats.rate(majority, len(known)),
    }


def _measures(pairs: list[Pair], seed: int) -> dict[str, Any]:
    found = {}
    for name, (kinds, test) in MEASURES.items():
        if chosen := [pair for pair in pairs if pair.item.kind in kinds]:
            found[name] = _compare(chosen, test, seed)
    return found


def _tasks(checked: list[Pair]) -> dict[str, Any]:
    """Counts of the four outcomes by task and model, and what wrong answers cost."""
    table: dict[str, Any] = {}
    for name in dict.fromkeys(pair.item.task for pair in checked):
        chosen = [pair for pair in checked if pair.item.task == name]
        table[name] = {"n": len(chosen), "kind": chosen[0].item.kind}
        for variant in VARIANTS:
            counts = Counter(graded.outcome for pair in chosen if (graded := pair.graded[variant]))
            right, wrong = counts["correct"], counts["wrong"]
            table[name][variant] = {
                **{key: counts[key] for key in PHRASES["outcomes"]},
                "correct_less_wrong": round((right - wrong) / len(chosen), 6),
                "correct_less_3_wrong": round((right - 3 * wrong) / len(chosen), 6),
            }
    return table


def _misses(checked: list[Pair], variant: str) -> dict[str, int]:
    misses = (g.miss for pair in checked if (g := pair.graded[variant]) and g.miss)
    return dict(Counter(misses).most_common())


def _verdict(
    run: dict[str, Any],
    checked: list[Pair],
    loss: dict[str, Any],
    accuracy: dict[str, Any],
    judged: dict[str, Any] | None,
    general: dict[str, Any] | None,
) -> dict[str, Any]:
    """better | worse | no_detectable_difference | invalid, and every reason."""
    primary, invalid = run["primary"], []
    wins = judged["win_rate"]["difference"] if judged else None
    if primary == "accuracy" and len(checked) < FEWEST_CHECKABLE:
        if wins is None:
            few = f"{len(checked)} checkable items (fewer than {FEWEST_CHECKABLE})"
            invalid.append(f"{few} and no judge")
        else:
            primary = "win_rate"
    if primary == "win_rate" and wins is None:
        invalid.append("the win rate should decide, and no judge was asked")
    difference = wins if primary == "win_rate" and wins else accuracy["difference"]
    if difference["n"] < FEWEST_ITEMS:
        invalid.append(f"{difference['n']} items; fewer than {FEWEST_ITEMS} decide nothing")
    if judged and judged["control_items"]["failed"]:
        invalid.append(f"control items failed: {', '.join(judged['control_items']['failed'])}")
    if judged and judged["unscored"]["value"] and judged["unscored"]["value"] > MOST_UNSCORED:
        invalid.append(f"{judged['unscored']['value']:.1%} of the judge's calls unscored")
    if run["contaminated"]:
        invalid.append(f"{len(run['contaminated'])} decision rows also occur in training")
    guards = {
        "held_out_loss": loss["adapter"] <= loss["base"],
        **({"general_regression": general["pass"]} if general else {}),
    }
    low, high = difference["ci95"]
    if invalid:
        verdict = "invalid"
    elif low > 0 and all(guards.values()):
        verdict = "better"
    else:
        verdict = "worse" if high < 0 else "no_detectable_difference"
    return {
        "verdict": verdict,
        "primary": {"measure": primary, **difference},
        "guards": guards,
        "invalid_reasons": invalid,
    }


def words(found: dict[str, Any]) -> Sequence[str]:
    """The verdict in sentences, for a terminal and the head of the report."""
    primary = found["primary"]
    low, high = (f"{100 * end:+.1f}" for end in primary["ci95"])
    name = "accuracy" if primary["measure"] == "accuracy" else "the judge's win rate over one half"
    gain = f"{name}: {100 * primary['value']:+.1f} points ({low} to {high}, {primary['n']} items)"
    seen = f"a difference below {100 * primary['mde80']:.1f} points would usually be missed"
    failed = [PHRASES["guards"][guard] for guard, held in found["guards"].items() if not held]
    return [
        PHRASES["verdicts"][found["verdict"]],
        *(f"Reason: {reason}." for reason in found["invalid_reasons"]),
        *(f"Guard failed: {guard}." for guard in failed),
        f"{gain[0].upper()}{gain[1:]}; {seen}.",
    ]


def read_evaluation(folder: Path, *, unread: tuple[str, ...] = ()) -> dict[str, Any]:
    """The seal of a finished evaluation with its raw files; see `seal.read_seal`."""
    needed = ("run.json", "predictions.jsonl", "heldout.jsonl", judge.NAME)
    return seal.read_seal(folder, stage="evaluation", make=COMMAND, needed=needed, unread=unread)


def check_results(folder: Path) -> None:
    """Hold test_results.json of a finished evaluation against what its raw files give.

    Raises:
        GateRefused: it says something else.
        OutputError: the evaluation is unfinished, or a file of it was changed.
    """
    read_evaluation(folder)
    path, differing = folder / RESULTS, ["they cannot be read"]
    with contextlib.suppress(Exception):  # whatever forged raw files raise
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
