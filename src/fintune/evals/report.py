"""`report.html`: the verdict first, then what it rests on, then every item with both answers."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fintune import seal
from fintune.errors import GateRefused
from fintune.evals import raw
from fintune.evals.judge import SCORE
from fintune.evals.results import CHECKED, WHO, Pair, load_pairs, results, words
from fintune.evals.tasks import PHRASES
from fintune.files import FORMAT, json_text, read_json, read_jsonl, write_json, write_text
from fintune.page import Page, escape

COMMAND = "fintune eval"
RESULTS, REPORT = "test_results.json", "report.html"
OUTCOMES: dict[str, str] = PHRASES["outcomes"]
NAMES: dict[str, str] = PHRASES["names"]
SAID: dict[str, str] = PHRASES["report"]
_STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


class _Report(Page):
    """A page with what an evaluation shows besides tables and bars."""

    def add(self, html: str) -> None:
        """HTML of ours; every text in it is escaped by the caller."""
        self._parts.append(html)

    def intervals(self, rows: Sequence[tuple[str, dict[str, Any], bool]], *, caption: str) -> None:
        """Differences with their 95 % intervals around zero, in points; the first decides."""
        reach = max([0.02, *(abs(end) for _, found, _ in rows for end in found["ci95"])]) * 1.05
        cells = []
        for name, found, decides in rows:
            ends = (found["ci95"][0], found["value"], found["ci95"][1])
            low, value, high = (50 + 50 * end / reach for end in ends)
            points = [f"{100 * end:+.1f}" for end in (found["value"], *found["ci95"])]
            cells.append(
                f"<span>{'<b>' * decides}{escape(name)}{'</b>' * decides}</span>"
                f'<span class="track span{" decides" * decides}">'
                f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
                f'<b style="left:{value:.2f}%"></b></span>'
                f"<span>{points[0]} ({points[1]} to {points[2]})</span>"
            )
        self.add(f"<div class=chart>{''.join(cells)}</div>")
        self.text(caption, dim=True)

    def outcomes(self, tasks: dict[str, Any]) -> None:
        """One stacked bar a task and model: correct, abstained, no answer found, wrong."""
        cells = []
        for name, found in tasks.items():
            for who in WHO:
                parts = "".join(
                    f"<i class={outcome} style=width:{100 * found[who][outcome] / found['n']:.2f}%"
                    f' title="{found[who][outcome]} {outcome}"></i>'
                    for outcome in OUTCOMES
                )
                cells.append(
                    f"<span>{escape(name)}, {who}</span><span class=track>{parts}</span>"
                    f"<span>{found[who]['correct']} of {found['n']} correct</span>"
                )
        keys = "".join(
            f"<span class='key {outcome}'>&nbsp;</span>{label} &ensp;"
            for outcome, label in OUTCOMES.items()
        )
        self.add(f"<div class=chart>{''.join(cells)}</div><p class=dim>{keys}</p>")


def read_evaluation(folder: Path, *, unread: tuple[str, ...] = ()) -> dict[str, Any]:
    """The seal of a finished evaluation with its raw files; see `seal.read_seal`."""
    needed = ("run.json", "predictions.jsonl", "heldout.jsonl", raw.NAME)
    return seal.read_seal(folder, stage="evaluation", make=COMMAND, needed=needed, unread=unread)


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
    """Write report.html from the results and the raw files of an evaluation."""
    page = _Report("Adapter against its base")
    page.add(f"<style>{_STYLE}</style>")
    first, *others = words(found)
    lines = "".join(f"<br>{escape(line)}" for line in others)
    page.add(f'<div class="verdict {found["verdict"]}"><b>{escape(first)}</b>{lines}</div>')
    _head(page, found)
    _differences(page, found)
    _tasks(page, found)
    _loss(page, found)
    _judge(page, found, pairs)
    _items(page, found, pairs, folder)
    page.heading("Where this comes from")
    page.code("\n".join(_flat(found["provenance"])))
    # The file is a function of the raw files, so it carries no date.
    write_text(folder / REPORT, page.html())


def _head(page: _Report, found: dict[str, Any]) -> None:
    accuracy, loss = found["accuracy"], found["loss"]
    page.cards(
        [
            ("accuracy, base", _percent(accuracy["base"])),
            ("accuracy, adapter", _percent(accuracy["adapter"])),
            ("always the commonest", _percent(accuracy["always_commonest"]["value"])),
            ("held-out loss, base", loss["base"]),
            ("held-out loss, adapter", loss["adapter"]),
            ("questions", found["n"]["checkable"]),
        ]
    )
    page.text(SAID["how"], dim=True)


def _differences(page: _Report, found: dict[str, Any]) -> None:
    page.heading("Differences, adapter less base")
    primary = found["primary"]
    name = "accuracy" if primary["measure"] == "accuracy" else NAMES["judge_win_rate"]
    rows = [(f"{name} (decides)", primary, True)]
    rows += [
        (NAMES.get(key, key), measure["difference"], False)
        for key, measure in found["measures"].items()
        if not (key == "judge_win_rate" and primary["measure"] == "win_rate")
    ]
    page.intervals(rows, caption=SAID["differences"])
    page.table(
        ["measure", "base", "adapter", "points", "found at 80 % from", "p", "p (Holm)"],
        [
            [
                NAMES.get(key, key),
                _percent(measure.get("base", {}).get("value")),
                _percent(measure.get("adapter", measure).get("value")),
                f"{100 * measure['difference']['value']:+.1f}",
                f"{100 * measure['difference']['mde80']:.1f}",
                _probability(measure["p"]),
                _probability(measure["p_holm"]),
            ]
            for key, measure in found["measures"].items()
        ],
        caption=SAID["measures"],
    )


def _tasks(page: _Report, found: dict[str, Any]) -> None:
    page.heading("Outcomes by task")
    page.outcomes(found["tasks"])
    page.table(
        ["task", "questions"]
        + ["correct less wrong, base", "adapter", "less 3 × wrong, base", "adapter "],
        [
            [
                name,
                task["n"],
                *(task[who][f"correct_less_{k}wrong"] for k in ("", "3_") for who in WHO),
            ]
            for name, task in found["tasks"].items()
        ],
        caption=SAID["tasks"],
    )
    kinds = list(dict.fromkeys(kind for who in WHO for kind in found["misses"][who]))
    if kinds:
        page.heading("How wrong figures were wrong")
        page.bars(
            kinds,
            {who: [float(found["misses"][who].get(kind, 0)) for kind in kinds] for who in WHO},
            caption=SAID["misses"],
        )


def _loss(page: _Report, found: dict[str, Any]) -> None:
    page.heading("Held-out loss")
    loss = found["loss"]
    rows = [["all", loss], *loss["by_source"].items(), *loss["by_length"].items()]
    page.table(
        ["rows", "count", "tokens", "base", "adapter", "change", "perplexity, base", "adapter "],
        [
            [
                name if name in loss["by_source"] or name == "all" else f"{name} tokens",
                part["rows"],
                part["tokens"],
                part["base"],
                part["adapter"],
                f"{100 * part['change']:+.1f} %",
                part["perplexity"]["base"],
                part["perplexity"]["adapter"],
            ]
            for name, part in rows
        ],
        caption=SAID["loss"],
    )


def _judge(page: _Report, found: dict[str, Any], pairs: list[Pair]) -> None:
    page.heading("The judge")
    judged = found["judge"]
    if judged is None:
        page.text(SAID["no_judge"])
        return
    cost, canaries = judged["cost"], judged["canaries"]
    facts = [
        ("calls", judged["calls"]),
        ("unscored", _percent(judged["unscored"]["value"])),
        ("canaries", f"{canaries['ok']} of {canaries['of']}"),
        ("cost", f"${cost['usd']:.2f}"),
        ("possibly paid twice", cost["possibly_paid_calls"]),
    ]
    if "win_rate" in judged:
        reliability = judged["reliability"]
        facts += [
            ("win rate", _percent(judged["win_rate"]["value"])),
            ("same verdict in both orders", _percent(reliability["swap_consistency"]["value"])),
            ("chose the first shown", _percent(reliability["first_slot"]["value"])),
            ("against arithmetic", reliability["against_arithmetic"]),
        ]
    page.cards(facts)
    if "win_rate" in judged:
        _lengths(page, judged, pairs)
    if "checks" in judged:
        page.table(
            ["check", "base", "adapter", "difference", "p", "p (Holm)"],
            [
                [
                    name,
                    check["base"],
                    check["adapter"],
                    check["difference"]["value"],
                    _probability(check["p"]),
                    _probability(check["p_holm"]),
                ]
                for name, check in judged["checks"].items()
            ],
            caption=SAID["checks"],
        )


def _lengths(page: _Report, judged: dict[str, Any], pairs: list[Pair]) -> None:
    bins: dict[str, list[float]] = {"shorter": [], "alike (± 20 %)": [], "longer": []}
    for pair in pairs:
        if pair.item.id in judged["items"]:
            base, adapter = (len(pair.answers[who]["text"]) + 1 for who in WHO)
            ratio = adapter / base
            name = "shorter" if ratio < 0.8 else "longer" if ratio > 1.25 else "alike (± 20 %)"
            bins[name].append(SCORE[judged["items"][pair.item.id]])
    kept = {name: wins for name, wins in bins.items() if wins}
    even = judged["win_rate"]["at_equal_length"]
    page.bars(
        [f"{name} ({len(wins)})" for name, wins in kept.items()],
        {"win rate": [round(100 * sum(wins) / len(wins), 1) for wins in kept.values()]},
        unit=" %",
        caption="Win rate of the adapter by the length of its answer beside the base's"
        + (f"; at equal length {100 * even:.0f} %." if even is not None else "."),
    )


def _items(page: _Report, found: dict[str, Any], pairs: list[Pair], folder: Path) -> None:
    said: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(folder / raw.NAME):
        if row.get("mode") and not row["canary"]:
            said.setdefault(row["id"], []).append(row)
    groups: dict[str, list[Pair]] = {
        "Only the adapter is right": [],
        "Only the base is right": [],
        "Neither is right": [],
        "Both are right": [],
        "Not decided by arithmetic": [],
    }
    for pair in pairs:
        if pair.item.kind not in CHECKED:
            groups["Not decided by arithmetic"].append(pair)
            continue
        base, adapter = (bool((g := pair.graded[who]) and g.correct) for who in WHO)
        at = (2 + base) if base == adapter else int(base)
        groups[list(groups)[at]].append(pair)
    for name, chosen in groups.items():
        if chosen:
            page.heading(f"{name}: {len(chosen)}")
            page.add("".join(_item(pair, said.get(pair.item.id, [])) for pair in chosen))


def _item(pair: Pair, said: list[dict[str, Any]]) -> str:
    asked = " ".join(pair.item.question.split())
    shown = asked if len(asked) <= 110 else f"… {asked[-108:].partition(' ')[2]}"
    sides = []
    for who in WHO:
        graded, text = pair.graded[who], pair.answers[who]["text"]
        verdict, style = ("not graded", "na") if graded is None else (graded.outcome, "no")
        style = "ok" if verdict == "correct" else "na" if verdict == "abstained" else style
        facts = [f"read: {graded.read}"] if graded and graded.read else []
        facts += [f"miss: {graded.miss}"] if graded and graded.miss else []
        if graded and graded.ungrounded:
            facts.append(f"ungrounded: {', '.join(graded.ungrounded)}")
        sides.append(
            f"<div><b>{who}</b> <span class={style}>{verdict}</span>"
            f"<pre>{escape(text or '(empty)')}</pre><small>{escape('; '.join(facts))}</small></div>"
        )
    judged = "".join(
        f"<p><small>judge, {' then '.join(row['slots'])}: <b>{escape(str(row['outcome']))}</b> "
        f"{escape(str((row['verdict'] or {}).get('rationale', row['unscored_reason'])))}"
        "</small></p>"
        for row in said
    )
    reference = pair.item.reference or "(refuse, or say that it cannot be known)"
    prompt = "\n\n".join(f"{turn.role}: {turn.content}" for turn in pair.item.messages)
    return (
        f"<details class=item><summary><span>{escape(pair.item.task)}</span> {escape(shown)}"
        f"</summary><pre>{escape(prompt)}</pre><p>Reference: <b>{escape(reference)}"
        f"</b></p><div class=pair>{''.join(sides)}</div>{judged}</details>"
    )


def _flat(value: dict[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, entry in value.items():
        if isinstance(entry, dict):
            lines += _flat(entry, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {entry}")
    return lines


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _probability(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"
