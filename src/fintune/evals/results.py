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
from fintune.evals.grading import PHRASES, VARIANTS, Graded, Pair, load_pairs
from fintune.files import FORMAT, json_text, read_json, read_jsonl, write_json
from fintune.page import save_page

Json = dict[str, Any]
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
GROUPS = ("Only the adapter is right", "Only the base is right", "Neither is right",
          "Both are right", "Not decided by arithmetic")  # fmt: skip
"""Pairs by which answers are right, in the order of the page."""


def results(folder: Path, pairs: list[Pair]) -> Json:
    """Everything of test_results.json but its format number; `pairs` as `load_pairs` gives them."""
    run = read_json(folder / "run.json")
    checked = [pair for pair in pairs if pair.item.kind in CHECKED]
    loss = loss_summary(list(read_jsonl(folder / "heldout.jsonl")))
    judged = judge_summary(
        list(read_jsonl(folder / judge.NAME)),
        {pair.item.id: pair.better for pair in pairs},
        {pair.item.id: pair.item.group for pair in pairs},
        run["seed"],
    )
    accuracy, measures = _accuracy(checked, run["seed"]), _measures(pairs, run["seed"])
    if judged:
        measures["judge_win_rate"] = judged["win_rate"]
    adjusted = stats.holm({name: measure["p"] for name, measure in measures.items()})
    for name, measure in measures.items():
        measure["p_holm"] = adjusted[name]
    return {
        **_verdict(run, len(checked), loss, accuracy, judged),
        "loss": loss,
        "accuracy": accuracy,
        "tasks": _tasks(checked),
        "misses": {variant: _misses(checked, variant) for variant in VARIANTS},
        "measures": measures,
        "judge": judged,
        "n": {
            "items": len(pairs),
            "checkable": len(checked),
            "clusters": len({pair.item.group for pair in pairs}),
            "contaminated": len(run["contaminated"]),
        },
        "provenance": run["provenance"],
    }


def loss_summary(cells: list[Json]) -> Json:
    """Loss (nats a label token), overall and by source, from the sums of the cells."""

    def over(chosen: list[Json]) -> Json:
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


def judge_summary(
    rows: Sequence[Json], decided: dict[str, str | None], groups: dict[str, str], seed: int
) -> Json | None:
    """What the judge's calls add up to; None where no judge was asked.

    Args:
        rows: of the raw file, one a call.
        decided: for every item whose completion arithmetic or label prefers, or None.
        groups: the document of every item, the unit of resampling.
    """
    asked = [row for row in rows if row.get("key")]
    if not asked:
        return None
    pairs = [row for row in asked if row["control"] is None]
    controls = [row for row in asked if row["control"] is not None]
    failed = sorted({row["control"] for row in controls if row["outcome"] != row["expect"]})
    labelled = [(row["outcome"], row["human"]) for row in pairs if row["human"] and row["outcome"]]
    human = None
    if labelled:
        alike = sum(one == other for one, other in labelled)
        agreement = stats.rate(alike, len(labelled))
        human = {"kappa": round(stats.kappa(labelled), 6), "agreement": agreement}
    ok = sum(row["outcome"] == row["expect"] for row in controls)
    return {
        "model": asked[0]["model"],
        "calls": len(asked),
        "unscored": stats.rate(sum(row["outcome"] is None for row in asked), len(asked)),
        "control_items": {"ok": ok, "of": len(controls), "failed": failed},
        "usd": round(sum(row["usage"]["usd"] for row in asked), 6),
        "human": human,
        **_pairwise(pairs, decided, groups, seed),
    }


def _pairwise(
    rows: list[Json], decided: dict[str, str | None], groups: dict[str, str], seed: int
) -> Json:
    """Win rate and reliability. Orders that disagree are a tie; arithmetic outranks both."""
    orders: dict[str, list[str | None]] = {}
    for row in rows:
        orders.setdefault(row["id"], []).append(row["outcome"])
    wins: dict[str, str] = {}
    consistent = against = 0
    for key, (one, other) in orders.items():
        opinion = None if not (one and other) else one if one == other else "tie"
        consistent += opinion is not None and one == other
        exact = decided.get(key)
        against += exact is not None and opinion not in (None, "tie", exact)
        if exact or opinion:
            wins[key] = exact or opinion or ""
    scores = [judge.SCORE[winner] for winner in wins.values()]
    difference = stats.paired([s - 0.5 for s in scores], [groups[key] for key in wins], seed=seed)
    chosen = [row for row in rows if row["outcome"] in VARIANTS]
    first = sum(row["outcome"] == row["positions"][0] for row in chosen)
    won, tied, lost = (scores.count(score) for score in (1.0, 0.5, 0.0))
    value = round(sum(scores) / len(scores), 6) if scores else None
    p = round(stats.mcnemar_midp(won, lost), 6)
    shares = {"value": value, "difference": difference, "won": won, "tied": tied, "lost": lost}
    return {
        "win_rate": {**shares, "p": p},
        "position_consistency": stats.rate(consistent, len(orders)),
        "first_position": stats.rate(first, len(chosen)),
        "against_arithmetic": against,
        "items": wins,
    }


def _compare(pairs: list[Pair], test: Callable[[Graded], bool], seed: int) -> Json:
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


def _accuracy(checked: list[Pair], seed: int) -> Json:
    found = _compare(checked, lambda graded: graded.correct, seed)
    known = [pair.item for pair in checked if pair.item.majority is not None]
    majority = sum(bool((g := item.grade(item.majority or "")) and g.correct) for item in known)
    return {
        **found,
        **{name: found[name]["value"] for name in VARIANTS},
        "ci95": {name: found[name]["ci95"] for name in VARIANTS},
        "majority_class": stats.rate(majority, len(known)),
    }


def _measures(pairs: list[Pair], seed: int) -> Json:
    found = {}
    for name, (kinds, test) in MEASURES.items():
        if chosen := [pair for pair in pairs if pair.item.kind in kinds]:
            found[name] = _compare(chosen, test, seed)
    return found


def _tasks(checked: list[Pair]) -> Json:
    """Counts of the four outcomes by task and model, and what wrong answers cost."""
    table: Json = {}
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
    run: Json, checkable: int, loss: Json, accuracy: Json, judged: Json | None
) -> Json:
    """better | worse | no_detectable_difference | invalid, and every reason."""
    primary, invalid = run["primary"], []
    wins = judged["win_rate"]["difference"] if judged else None
    if primary == "accuracy" and checkable < FEWEST_CHECKABLE:
        if wins is None:
            few = f"{checkable} checkable items (fewer than {FEWEST_CHECKABLE})"
            invalid.append(f"{few} and no judge")
        else:
            primary = "win_rate"
    if primary == "win_rate" and wins is None:
        invalid.append("the win rate should decide, and no judge was asked")
    difference = wins if primary == "win_rate" and wins else accuracy["difference"]
    if difference["n"] < FEWEST_ITEMS:
        invalid.append(f"{difference['n']} items; fewer than {FEWEST_ITEMS} decide nothing")
    if judged and (failed := judged["control_items"]["failed"]):
        invalid.append(f"control items failed: {', '.join(failed)}")
    if judged and (unscored := judged["unscored"]["value"] or 0) > MOST_UNSCORED:
        invalid.append(f"{unscored:.1%} of the judge's calls unscored")
    if run["contaminated"]:
        invalid.append(f"{len(run['contaminated'])} decision rows also occur in training")
    guards = {"held_out_loss": loss["adapter"] <= loss["base"]}
    low, high = difference["ci95"]
    if invalid:
        verdict = "invalid"
    elif low > 0 and all(guards.values()):
        verdict = "better"
    else:
        verdict = "worse" if high < 0 else "no_detectable_difference"
    decided = {"measure": primary, **difference}
    return {"verdict": verdict, "primary": decided, "guards": guards, "invalid_reasons": invalid}


def words(found: Json) -> Sequence[str]:
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


def read_evaluation(folder: Path, *, unread: tuple[str, ...] = ()) -> Json:
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


def rescore(folder: Path) -> Json:
    """Make test_results.json and report.html of an evaluation again, from its raw files alone.

    Raises:
        OutputError: the evaluation is unfinished, or a raw file is not the one that was sealed.
    """
    done = read_evaluation(folder, unread=(RESULTS, REPORT))
    found = write_results(folder)
    seal.seal(folder, done["inputs"])
    return found


def write_results(folder: Path) -> Json:
    """Write test_results.json and report.html from the raw files; the former's content.

    The page is a function of the raw files, so it carries no date.
    """
    pairs = load_pairs(folder)
    found = results(folder, pairs)
    write_json(folder / RESULTS, found)
    verdicts: dict[str, list[Json]] = {}
    for row in read_jsonl(folder / judge.NAME):
        if row.get("key") and not row["control"]:
            verdicts.setdefault(row["id"], []).append(row)
    groups: dict[str, list[Pair]] = {name: [] for name in GROUPS}
    for pair in pairs:
        both = pair.holds("base", lambda graded: graded.correct)
        name = f"Only the {pair.better} is right" if pair.better else GROUPS[2 + both]
        groups[name if pair.item.kind in CHECKED else GROUPS[-1]].append(pair)
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
