"""The verdict and its report: pure functions of the raw files of an evaluation.

`compute_results` reads `run.json`, `predictions.jsonl`, `heldout.jsonl` and the judge's
`eval_50_gpt_judged_raw.jsonl`, grades every answer again and returns the content of
`test_results.json`. One measure, named before the run (`eval.primary`), decides the verdict; all
others are secondary. `report.html` shows the verdict, the measures, then every item with the two
answers. Nothing imported here loads torch, so that rescoring takes as long as the grading.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mode
from typing import Any

from fintune import labels, seal
from fintune.console import say, warn
from fintune.errors import GateRefused, OutputError
from fintune.evals import judge, label_tasks, stats
from fintune.evals.grading import PHRASES, VARIANTS, Graded, Item, Pair, as_example, load_pairs
from fintune.evals.verdict import decide, summary
from fintune.files import json_text, reaching, read_json, read_jsonl, sha256_bytes, write_json
from fintune.page import save_page

Json = dict[str, Any]
Known = dict[str, tuple[str | None, str]]
"""By item the variant that is correct where only one is (`Pair.better`), and its document or group
of related rows, the unit of resampling."""
COMMAND = "fintune eval"
RUN, RESULTS, REPORT = "run.json", "test_results.json", "report.html"
ANSWERS = "predictions.jsonl"
MOST_A_DOCUMENT = 10
"""Questions of one document that decide, drawn by hash: more tell little, and one large document
would decide alone."""
SMALL_TASK = 0.1
"""A task whose minimum detectable effect is larger, and in which a loss may have gone unseen, is
too small to guard."""
CHECKED = ("number", "label", "span", "tags")
"""Kinds of item that count for accuracy; the others have secondary measures."""
MEASURES: dict[str, tuple[tuple[str, ...], Callable[[Graded], bool]]] = {
    "accuracy_lenient": (CHECKED, lambda g: g.lenient),
    "wrong": (CHECKED, lambda g: g.outcome == "wrong"),
    "abstained": (CHECKED, lambda g: g.outcome == "abstained"),
    "unparsed": (CHECKED, lambda g: g.outcome == "unparsed"),
    "scale_percent_or_sign_slip": (("number",), lambda g: g.miss not in (None, "other")),
    "ungrounded_number": (("number",), lambda g: bool(g.ungrounded)),
    "unanswerable_abstained": (("unanswerable",), lambda g: g.correct),
    "unsafe_advice_refused": (("refuse",), lambda g: g.correct),
    "harmless_refused": (("comply",), lambda g: not g.correct),
}
"""Secondary measures: name -> kinds of item, and the test whose share of passes is measured."""


def compute_results(folder: Path, pairs: list[Pair]) -> Json:
    """The content of test_results.json without its format number.

    Args:
        folder: of an evaluation or a judging.
        pairs: its items with answers and grades (`load_pairs`).
    """
    answered = evaluation_of(folder)
    run = read_json(answered / RUN) | read_json(folder / RUN)
    checked = [pair for pair in pairs if pair.item.kind in CHECKED]
    deciding = deciding_pairs(checked)
    answers = list(read_jsonl(answered / ANSWERS))
    cut = Counter(row["model"] for row in answers if row.get("in_thought"))
    missing = run.get("loss_missing")
    loss = loss_summary(list(read_jsonl(answered / "heldout.jsonl")))
    known = {pair.item.id: (pair.better, pair.item.group) for pair in pairs}
    judged = judge_summary(list(read_jsonl(folder / judge.NAME)), known)
    tasks = by_task(checked, deciding, run["max_task_drop"])
    accuracy, measures = overall(deciding, len(tasks)), _measures(pairs)
    if judged:
        measures["judge_win_rate"] = judged["win_rate"]
    adjusted = stats.holm({name: one["difference"]["p"] for name, one in measures.items()})
    for name, measure in measures.items():
        measure["p_holm"] = adjusted[name]
    return {
        **decide(run, loss, accuracy, tasks, judged),
        "loss": loss,
        **({"loss_missing": missing} if missing else {}),
        "accuracy": accuracy,
        "tasks": tasks,
        "misses": {variant: _misses(checked, variant) for variant in VARIANTS},
        "measures": measures,
        "calibration": label_tasks.calibrations(answers, pairs),
        "judge": judged,
        "labels": label_tasks.findings(checked, answers),
        "n": {
            "items": len(pairs),
            "checkable": len(checked),
            "deciding": len(deciding),
            "clusters": len({pair.item.group for pair in pairs}),
            "contaminated": len(run["contaminated"]),
            "thoughts_cut": {name: cut[name] for name in VARIANTS},
        },
        "provenance": run["provenance"],
    }


def loss_summary(cells: list[Json]) -> Json:
    """Loss (nats per label token), overall and by source; None where none was measured.

    Args:
        cells: rows of heldout.jsonl, the sums of one source each.
    """

    def mean(chosen: list[Json]) -> Json:
        tokens = sum(cell["tokens"] for cell in chosen)
        base, adapter = (sum(cell[name] for cell in chosen) / max(tokens, 1) for name in VARIANTS)
        return {
            "base": round(base, 6) if cells else None,
            "adapter": round(adapter, 6) if cells else None,
            "change": round(adapter / base - 1, 6) if base else 0.0,
            "rows": sum(cell["rows"] for cell in chosen),
            "tokens": tokens,
        }

    sources = dict.fromkeys(cell["source"] for cell in cells)
    by_source = {name: mean([cell for cell in cells if cell["source"] == name]) for name in sources}
    return {**mean(cells), "by_source": by_source}


def judge_summary(rows: list[Json], known: Known) -> Json | None:
    """Win rate, reliability and cost of the judge; None where no judge was asked.

    Args:
        rows: of the raw file, one per call.
        known: by item what arithmetic says of it, and its group.
    """
    calls = [row for row in rows if row.get("key")]
    if not calls:
        return None
    pairs = [row for row in calls if row["control"] is None]
    controls = [row for row in calls if row["control"] is not None]
    failed = [row["control"] for row in controls if row["outcome"] != row["expect"]]
    return {
        "model": calls[0]["model"],
        "calls": len(calls),
        "unscored": stats.rate([row["outcome"] is None for row in calls]),
        "control_items": {"ok": len(controls) - len(failed), "of": len(controls), "failed": failed},
        "usd": round(sum(row["usage"]["usd"] for row in calls), 6),
        **_pairwise(pairs, known),
    }


def _pairwise(rows: list[Json], known: Known) -> Json:
    """Win rate and position bias, from two calls an item, one in each order of the candidates.

    Two orders with different outcomes are a tie; where `known` names a variant, it wins.
    """
    orders: dict[str, list[str | None]] = {}
    for row in rows:
        orders.setdefault(row["id"], []).append(row["outcome"])
    human = {row["id"]: row["human"] for row in rows if row["human"]}
    said = {key: a if a == b else "tie" for key, (a, b) in orders.items() if a and b}
    exact = {key: known[key][0] or "" for key in orders if known[key][0]}
    wins = {key: win for key in orders if (win := exact.get(key) or said.get(key))}
    scores = [judge.SCORE[winner] for winner in wins.values()]
    groups = [known[key][1] for key in wins]
    chosen = [row for row in rows if row["outcome"] in VARIANTS]
    chose_first = [row["outcome"] == row["positions"][0] for row in chosen]
    won, tied, lost = (scores.count(score) for score in (1.0, 0.5, 0.0))
    return {
        "win_rate": {
            "value": round(sum(scores) / len(scores), 6) if scores else None,
            "difference": stats.paired([s - 0.5 for s in scores], groups, unit=0.5),
            "won": won,
            "tied": tied,
            "lost": lost,
        },
        "position_consistency": stats.rate([a is not None and a == b for a, b in orders.values()]),
        "first_position": stats.rate(chose_first, [row["id"] for row in chosen]),
        "against_arithmetic": sum(said.get(k, "tie") not in ("tie", exact[k]) for k in exact),
        "human": stats.agreement([(said[key], human[key]) for key in said if key in human]),
        "items": wins,
    }


def deciding_pairs(checked: list[Pair]) -> list[Pair]:
    """Of every document at most MOST_A_DOCUMENT pairs, by hash, in their order."""
    taken: Counter[str] = Counter()
    chosen = set[str]()
    for pair in sorted(checked, key=lambda pair: sha256_bytes(f"decides:{pair.item.id}".encode())):
        taken[pair.item.group] += 1
        if taken[pair.item.group] <= MOST_A_DOCUMENT:
            chosen.add(pair.item.id)
    return [pair for pair in checked if pair.item.id in chosen]


def _correct(graded: Graded) -> bool:
    return graded.correct


def _change(pairs: list[Pair], test: Callable[[Graded], bool] = _correct) -> list[int]:
    """Of every pair 1 where the adapter alone passes a test, -1 where the base alone does."""
    return [pair.passes("adapter", test) - pair.passes("base", test) for pair in pairs]


def _groups(pairs: list[Pair]) -> list[str]:
    return [pair.item.group for pair in pairs]


def _compare(pairs: list[Pair], test: Callable[[Graded], bool]) -> Json:
    """Share of answers that pass a test, of base and adapter, and the paired difference."""
    groups, change = _groups(pairs), _change(pairs, test)
    return {
        **{name: stats.rate([p.passes(name, test) for p in pairs], groups) for name in VARIANTS},
        "difference": stats.paired(change, groups),
        "gained": change.count(1),
        "lost": change.count(-1),
    }


def _majority_flags(pairs: list[Pair]) -> list[bool]:
    """For every pair whether the commonest answer is right: of its kind in the training rows, of a
    task without any the one that most of these questions have."""
    items = [pair.item for pair in pairs]
    labels: dict[str, list[str]] = {item.task: [] for item in items}
    for item in items:
        labels[item.task] += [item.reference] * (item.kind == "label")
    common = {task: mode(said) for task, said in labels.items() if said}
    answers = [item.majority or common.get(item.task, "") for item in items]
    graded = [item.grade(answer) for item, answer in zip(items, answers, strict=True)]
    return [one is not None and one.correct for one in graded]


def _over_majority(pairs: list[Pair]) -> Json:
    """The majority-class baseline over the same questions, and the adapter's gain over it."""
    groups, constant = _groups(pairs), _majority_flags(pairs)
    gain = [pair.passes("adapter", _correct) - c for pair, c in zip(pairs, constant, strict=True)]
    majority, over = stats.rate(constant, groups), stats.paired(gain, groups)
    return {"majority_class": majority, "over_majority": over}


def overall(deciding: list[Pair], tasks: int) -> Json:
    """Accuracy over the deciding questions, and as the mean of the tasks' accuracies (`macro`)."""
    accuracy = _compare(deciding, _correct)
    size = Counter(pair.item.task for pair in deciding)
    weights = [len(deciding) / (tasks * size[pair.item.task]) for pair in deciding]
    weighted = [w * each for w, each in zip(weights, _change(deciding), strict=True)]
    return {
        **accuracy,
        **{name: accuracy[name]["value"] for name in VARIANTS},
        "ci95": {name: accuracy[name]["ci95"] for name in VARIANTS},
        "macro": stats.paired(weighted, _groups(deciding)),
        **_over_majority(deciding),
    }


def _measures(pairs: list[Pair]) -> Json:
    return {
        name: _compare(chosen, test)
        for name, (kinds, test) in MEASURES.items()
        if (chosen := [pair for pair in pairs if pair.item.kind in kinds])
    }


def by_task(checked: list[Pair], deciding: list[Pair], drop: float) -> Json:
    """By task: the paired difference of its deciding questions, whether the task is lost or too
    small to tell, the majority class, and of all questions the outcomes and what wrong ones cost.

    Args:
        drop: a task is lost where the Holm-corrected interval lies below minus this.
    """
    table: Json = {}
    p_values: dict[str, float] = {}
    for name in dict.fromkeys(pair.item.task for pair in checked):
        chosen = [pair for pair in checked if pair.item.task == name]
        decide = [pair for pair in deciding if pair.item.task == name]
        change, groups = _change(decide), _groups(decide)
        p_values[name] = 2 * stats.cluster_mean(change, groups, (1.0, -1.0)).below(-drop)
        table[name] = {"n": len(chosen), "kind": chosen[0].item.kind}
        table[name] |= {"difference": stats.paired(change, groups), **_over_majority(decide)}
        table[name] |= {variant: _outcomes(chosen, variant) for variant in VARIANTS}
        if {pair.item.kind for pair in chosen} == {"label"}:
            table[name]["weighted_f1"] = {
                each: label_tasks.weighted_f1(chosen, each) for each in VARIANTS
            }
    for name, p in stats.holm(p_values).items():
        task = table[name]
        task["p_lost"], task["lost"] = p, p < stats.LEVEL
        unseen = task["difference"]["ci95"][0] < -drop and task["difference"]["mde80"] > SMALL_TASK
        task["small"] = unseen and not task["lost"]
    return table


def _outcomes(pairs: list[Pair], variant: str) -> Json:
    """Counts of a variant's four outcomes, and scores that penalise wrong answers."""
    counts = Counter(graded.outcome for pair in pairs if (graded := pair.graded[variant]))
    right, wrong = counts["correct"], counts["wrong"]
    return {
        **{key: counts[key] for key in PHRASES["outcomes"]},
        "correct_less_wrong": round((right - wrong) / len(pairs), 6),
        "correct_less_3_wrong": round((right - 3 * wrong) / len(pairs), 6),
    }


def _misses(checked: list[Pair], variant: str) -> dict[str, int]:
    misses = (g.miss for pair in checked if (g := pair.graded[variant]) and g.miss)
    return dict(Counter(misses).most_common())


def evaluation_of(folder: Path) -> Path:
    """The evaluation that a judging is of; of an evaluation itself."""
    return folder.parent.parent if folder.parent.name == seal.JUDGINGS else folder


def latest(folder: Path) -> Path:
    """The last finished judging of an evaluation; without any the evaluation itself."""
    made = [path.parent for path in folder.glob(f"{seal.JUDGINGS}/*/{seal.DONE}")]
    return max(made, key=lambda path: int(read_json(path / RUN)["looks"]), default=folder)


def read_evaluation(folder: Path, *, unread: tuple[str, ...] = ()) -> Json:
    """The seal of a finished evaluation, or of a judging, with its raw files (`seal.read_seal`).

    Raises:
        OutputError: it is unfinished or changed, or the judging is of other answers.
    """
    tested, raw = evaluation_of(folder), (RUN, ANSWERS, "heldout.jsonl", judge.NAME)
    done = seal.read_seal(tested, stage="evaluation", make=COMMAND, needed=raw, unread=unread)
    if tested == folder:
        return done
    made, make = (RUN, judge.NAME), "fintune judge"
    judged = seal.read_seal(folder, stage="judging", make=make, needed=made, unread=unread)
    if judged["inputs"].get("answers") != done["files"][ANSWERS]["sha256"]:
        what = f"{folder} is the judging of other answers than {tested} holds"
        raise OutputError(what, fix=f"make both again: {COMMAND} --fresh")
    return judged


def check_results(folder: Path) -> None:
    """Compute the results of a finished evaluation again and compare with test_results.json.

    Raises:
        GateRefused: they differ.
        OutputError: the evaluation is unfinished, or a file of it was changed.
    """
    read_evaluation(folder)
    path, differing = folder / RESULTS, ["they cannot be read"]
    with contextlib.suppress(Exception):  # whatever forged raw files raise
        text = json_text(compute_results(folder, load_pairs(evaluation_of(folder))))
        if path.read_text(encoding="utf-8") == text:
            return
        differing = seal.differences(read_json(path), json.loads(text)) or ["its formatting"]
    raise GateRefused(
        f"{path} is not what its raw files give: {'; '.join(differing[:5])}",
        why="the verdict must follow from the stored answers alone",
        fix=f"make it again: fintune eval --rescore {folder}",
    )


def rescore(folder: Path) -> Json:
    """Make test_results.json and report.html of an evaluation again, from its raw files alone.

    Raises:
        OutputError: the evaluation is absent or unfinished, a raw file was changed since it was
            sealed, the folder cannot be written, or another process writes it.
    """
    done = read_evaluation(folder, unread=(RESULTS, REPORT))
    with seal.lock(folder), reaching(folder, fix="copy it to a place that can be written"):
        write_results(folder)
        seal.seal(folder, done["inputs"])
    return tell(folder)


def tell(folder: Path, line: Callable[[str], None] = say) -> Json:
    """Print what test_results.json says, and return it.

    Args:
        line: prints a line of it; notes go to standard error.
    """
    results = read_json(folder / RESULTS)
    accuracy, loss = results["accuracy"], results["loss"]
    for name in VARIANTS:
        measured = "not measured" if loss[name] is None else f"{loss[name]:.3f}"
        line(f"{name}: accuracy {accuracy[name] or 0:.1%}, held-out loss {measured}")
    if loss["tokens"] and loss["adapter"] >= loss["base"]:
        warn("the adapter's held-out loss is NOT BELOW THE BASE'S: it learnt nothing that holds")
    for name, cut in results["n"]["thoughts_cut"].items():
        if cut:
            fix = "raise eval.max_new_tokens, or set chat.thinking=drop"
            warn(f"{name}: {cut} answers ended inside a thought and count as none: {fix}")
    for sentence in summary(results):
        line(sentence)
    if found := results.get("labels"):
        answers = read_jsonl(evaluation_of(folder) / ANSWERS)
        labels.tell(found, (as_example(Item.from_json(row["item"])) for row in answers))
    return results


def write_results(folder: Path) -> Json:
    """Write test_results.json and report.html from the raw files; returns the results.

    The report carries no date, so that rescoring makes the same bytes.
    """
    pairs = load_pairs(evaluation_of(folder))
    results = compute_results(folder, pairs)
    write_json(folder / RESULTS, results)
    rows = read_jsonl(folder / judge.NAME)
    verdicts = [row for row in rows if row.get("key") and not row["control"]]
    groups: dict[str, list[Pair]] = {name: [] for name in PHRASES["groups"]}
    for pair in pairs:
        right = pair.passes("base", lambda graded: graded.correct)
        name = pair.better or ("both" if right else "neither")
        groups[name if pair.item.kind in CHECKED else "undecided"].append(pair)
    save_page(
        folder / REPORT,
        "eval_report",
        results=results,
        head=read_json(evaluation_of(folder) / RUN).get("run"),
        sentences=summary(results),
        phrases=PHRASES,
        groups=groups,
        verdicts=verdicts,
    )
    return results
