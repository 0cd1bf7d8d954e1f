"""What the judge is asked, how its reply is read, and what its verdicts add up to.

A candidate's text is hostile input. It is quoted line by line between fences that carry a nonce,
nothing in it can look like a fence, and a verdict counts only as the last JSON object of the
reply that carries the same nonce, which no candidate can know. Control items, whose verdict is
known, are part of every run. Where exactly one completion is right by number or label, that
decides the item, and the judge's opposite opinion is counted against the judge.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fintune.config import JudgeConfig
from fintune.errors import DataError
from fintune.evals import stats
from fintune.evals.grading import PHRASES
from fintune.evals.items import VARIANTS, Item, Pair
from fintune.evals.numbers import compare
from fintune.files import FORMAT, read_json, read_jsonl, sha256_bytes, sha256_json

NAME = "eval_50_gpt_judged_raw.jsonl"
"""A line a judge call, or a line an item of the judged set without a judge."""
RUBRIC = Path(__file__).with_name("rubric.md").read_text("utf-8")
SCHEMA = read_json(Path(__file__).with_name("verdict_schema.json"))
SCORE = {"adapter": 1.0, "tie": 0.5, "base": 0.0}
"""What an outcome of a pair counts in the adapter's win rate."""
MOST_OBJECTS = 1000
"""JSON objects of a reply that are looked at; a reply of braces alone would take minutes."""
_ANGLES = str.maketrans({"<": "‹", ">": "›", "＜": "‹", "＞": "›", "﹤": "‹", "﹥": "›"})
_SPOILT: dict[str, str] = PHRASES["spoilt"]
"""Answers that must lose: nothing, phrases that fit any question, and an attack."""
NUMERIC = ("digit", "scale")
"""References that must lose with another digit or scale."""


class Call(NamedTuple):
    """One question to the judge.

    `positions` names who wrote candidates A and B. `key` hashes everything that the verdict
    depends on; a call with a known key is never made again. `control` is the kind of a control
    item and `expect` its verdict.
    """

    key: str
    item: str
    positions: tuple[str, str]
    nonce: str
    messages: list[dict[str, str]]
    control: str | None = None
    expect: str | None = None


def plan(pairs: Sequence[Pair], config: JudgeConfig, seed: int) -> list[Call]:
    """Every call over the judged set: each item in both orders, then the control items.

    None without a judge.
    """
    if config.model is None:
        return []
    orders = (VARIANTS, VARIANTS[::-1])
    calls = [_call(pair.item, order, pair.texts, config) for pair in pairs for order in orders]
    return calls + _controls([pair.item for pair in pairs], config, seed)


def _call(
    item: Item,
    positions: tuple[str, ...],
    completions: dict[str, str],
    config: JudgeConfig,
    control: str | None = None,
    expect: str | None = None,
) -> Call:
    first, second = positions
    texts = [completions[first], completions[second]]
    asked = [[message.role, message.content] for message in item.messages]
    material = [config.model, config.base_url, RUBRIC, positions, control]
    key = sha256_json([*material, item.id, asked, item.reference, texts])
    # The nonce depends on every text shown, so no text can contain its own.
    nonce = sha256_bytes(f"nonce {key}".encode())[:32]
    prompt = "\n".join(f"{role}: {content}" for role, content in asked)
    shown = [fence("question", nonce, prompt), fence("reference", nonce, item.reference)]
    shown += [fence(f"candidate {at}", nonce, text) for at, text in zip("AB", texts, strict=True)]
    messages = [
        {"role": "system", "content": RUBRIC.strip()},
        {"role": "user", "content": "\n\n".join([*shown, f"id: {nonce}"])},
    ]
    return Call(key, item.id, (first, second), nonce, messages, control, expect)


def fence(name: str, nonce: str, text: str) -> str:
    """Text as data: quoted line by line, with nothing in it that could be read as a fence."""
    lines = text.translate(_ANGLES).splitlines() or [""]
    return "\n".join([f"<{name} {nonce}>", *(f"| {line}" for line in lines), f"</{name} {nonce}>"])


def _controls(items: Sequence[Item], config: JudgeConfig, seed: int) -> list[Call]:
    """Calls whose verdict is known: spoilt references must lose, two equal answers must tie."""
    order = sorted(items, key=lambda item: sha256_bytes(f"control {seed} {item.id}".encode()))
    calls: list[Call] = []
    for at, kind in enumerate((*_SPOILT, *NUMERIC, "same")):
        usable = [item for item in order if kind not in NUMERIC or _changes(kind, item)]
        if usable:
            item = usable[at % len(usable)]
            answers = {"good": item.reference, "bad": _spoil(kind, item.reference)}
            positions = ("good", "bad") if at % 2 else ("bad", "good")
            expect = "tie" if kind == "same" else "good"
            calls.append(_call(item, positions, answers, config, kind, expect))
    return calls


def _spoil(kind: str, text: str) -> str:
    """A reference made wrong; as it is for kind `same`."""
    if kind == "digit":
        return re.sub("[0-9]", lambda at: str((int(at[0]) + 4) % 9 + 1), text, count=1)
    if kind == "scale":
        number = re.search(r"[0-9][0-9,]*(?:\.[0-9]+)?", text)
        more = f"{float(number[0].replace(',', '')) * 1000:,.6g}" if number else ""
        return text.replace(number[0], more, 1) if number else text
    return _SPOILT.get(kind, text)


def _changes(kind: str, item: Item) -> bool:
    """Whether spoiling changes the number of a reference; "three" has no digit."""
    spoilt = _spoil(kind, item.reference)
    return item.kind == "number" and not compare(item.reference, spoilt).lenient


def read_verdict(call: Call, reply: str) -> dict[str, Any] | None:
    """The last JSON object of a reply that carries the call's nonce, if it fits the schema."""
    decoder, starts = json.JSONDecoder(), [match.start() for match in re.finditer("{", reply)]
    for start in reversed(starts[-MOST_OBJECTS:]):
        with suppress(ValueError, RecursionError):
            found: dict[str, Any] = decoder.raw_decode(reply, start)[0]
            if found.get("id") == call.nonce:
                fits = found.get("winner") in ("A", "B", "tie")
                return found if fits and isinstance(found.get("rationale", ""), str) else None
    return None


def outcome(call: Call, verdict: dict[str, Any]) -> str:
    """Who won: `base`, `adapter` (of a control item `good`, `bad`), or `tie`."""
    winner = verdict["winner"]
    return "tie" if winner == "tie" else call.positions["AB".index(winner)]


def raw_rows(
    pairs: Sequence[Pair],
    calls: Sequence[Call] = (),
    done: dict[str, dict[str, Any]] | None = None,
    model: str | None = None,
    labels: Path | None = None,
) -> list[dict[str, Any]]:
    """The lines of the raw file: one a call, or one an item where no judge was asked.

    Args:
        done: the finished calls by key; see `calls.ask`.
        labels: human verdicts, JSON Lines of id and verdict.

    Raises:
        DataError: `labels` is no such file.
    """
    facts = {pair.item.id: _facts(pair) for pair in pairs}
    if not done:
        unjudged = {"status": "unscored", "unscored_reason": "no_judge"}
        return [{**row, **unjudged} for row in facts.values()]
    human, rubric = _labels(labels), sha256_bytes(RUBRIC.encode())
    return [
        {
            **facts[call.item],
            **done[call.key],
            "model": model,
            "rubric_sha256": rubric,
            "positions": call.positions,
            "control": call.control,
            "expect": call.expect,
            "human": None if call.control else human.get(call.item),
        }
        for call in calls
    ]


def _facts(pair: Pair) -> dict[str, Any]:
    graded = {name: asdict(found) if found else None for name, found in pair.graded.items()}
    return {
        "format": FORMAT,
        "id": pair.item.id,
        "task": pair.item.task,
        "question": pair.item.question,
        "reference": pair.item.reference,
        "answers": pair.texts,
        "deterministic": graded,
    }


def _labels(path: Path | None) -> dict[str, str]:
    """Human verdicts (`base`, `adapter`, `tie`) by item."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        labels = {row["id"]: row["verdict"] for row in read_jsonl(path)} if path else {}
        if set(labels.values()) <= SCORE.keys():
            return labels
    what = f"--labels {path}: no file of human verdicts"
    raise DataError(what, fix='lines such as {"id": "...", "verdict": "adapter"}; or base, or tie')


def summary(
    rows: Sequence[dict[str, Any]],
    decided: dict[str, str | None],
    groups: dict[str, str],
    seed: int,
) -> dict[str, Any] | None:
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
    rows: list[dict[str, Any]], decided: dict[str, str | None], groups: dict[str, str], seed: int
) -> dict[str, Any]:
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
    scores = [SCORE[winner] for winner in wins.values()]
    difference = stats.paired([s - 0.5 for s in scores], [groups[key] for key in wins], seed=seed)
    chosen = [row for row in rows if row["outcome"] in VARIANTS]
    first = sum(row["outcome"] == row["positions"][0] for row in chosen)
    return {
        "win_rate": {
            "value": round(sum(scores) / len(scores), 6) if scores else None,
            "difference": difference,
            "won": scores.count(1.0),
            "tied": scores.count(0.5),
            "lost": scores.count(0.0),
            "p": round(stats.mcnemar_midp(scores.count(1.0), scores.count(0.0)), 6),
        },
        "position_consistency": stats.rate(consistent, len(orders)),
        "first_position": stats.rate(first, len(chosen)),
        "against_arithmetic": against,
        "items": wins,
    }
