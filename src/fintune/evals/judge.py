"""The judge: what it is asked, how its reply is read, and what its verdicts add up to.

A candidate's text is hostile input. It is quoted line by line between fences that carry a nonce,
nothing in it can look like a fence, and a verdict counts only as the last JSON object of the
reply that carries the same nonce, which no candidate can know. Canaries whose verdict is known
go into every run. Arithmetic outranks the judge: where exactly one answer is right by number or
label, that decides the item, and the judge's opposite opinion is counted against the judge.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from fintune.config import JudgeConfig
from fintune.evals import stats
from fintune.evals.tasks import PHRASES, Item
from fintune.files import sha256_bytes, sha256_json

RUBRIC = resources.files("fintune.evals").joinpath("rubric.md").read_text(encoding="utf-8")
CHECKS = ("agrees", "contradicts", "grounded", "complete", "safe")
SCORE = {"adapter": 1.0, "tie": 0.5, "base": 0.0}
"""What an outcome of a pair counts in the adapter's win rate."""
_ANGLES = str.maketrans({"<": "‹", ">": "›", "＜": "‹", "＞": "›", "﹤": "‹", "﹥": "›"})
_SPOILT: dict[str, str] = PHRASES["spoilt"]
"""Answers of canaries that must lose: nothing, phrases that fit any question, and an attack."""


@dataclass(frozen=True, slots=True)
class Call:
    """One question to the judge. `slots` names who wrote each candidate, in the order shown.

    `key` hashes everything that the verdict depends on; a call with a known key is never made
    again. `expect` is the verdict of a canary.
    """

    key: str
    item: str
    mode: Literal["pairwise", "pointwise"]
    slots: tuple[str, ...]
    nonce: str
    messages: list[dict[str, str]]
    schema: dict[str, Any]
    canary: str | None = None
    expect: str | None = None


def plan(
    items: Sequence[tuple[Item, dict[str, str]]], config: JudgeConfig, *, seed: int
) -> list[Call]:
    """Every call of a run: each item in both orders and each answer alone, then the canaries.

    Args:
        items: each with the texts of `base` and `adapter`.
    """
    calls: list[Call] = []
    for mode in config.modes:
        for item, answers in items:
            orders = itertools.permutations(("base", "adapter"), 2 if mode == "pairwise" else 1)
            calls += [_call(item, mode, order, answers, config) for order in orders]
        calls += _canaries([item for item, _ in items], mode, config, seed)
    return calls


def read_verdict(call: Call, reply: str) -> dict[str, Any] | None:
    """The last JSON object of a reply, if it carries the call's nonce and fits its schema."""
    decoder = json.JSONDecoder()
    found: dict[str, Any] | None = None
    at, tried = reply.find("{"), 0
    while at >= 0 and tried < 1000:
        tried += 1
        try:
            value, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found = value
        at = reply.find("{", end)
    if not isinstance(found, dict) or found.get("id") != call.nonce:
        return None
    if not isinstance(found.get("rationale", ""), str):
        return None
    if call.mode == "pairwise":
        return found if found.get("winner") in ("A", "B", "tie") else None
    answered = all(isinstance(found.get(check), bool) for check in CHECKS)
    quality = found.get("quality")
    return found if answered and type(quality) is int and 1 <= quality <= 5 else None


def outcome(call: Call, verdict: dict[str, Any]) -> str:
    """A verdict as one word: who won (`base`, `adapter`, `tie`), or `right` or `wrong`."""
    if call.mode == "pairwise":
        winner = verdict["winner"]
        return "tie" if winner == "tie" else call.slots["AB".index(winner)]
    return "right" if verdict["agrees"] and not verdict["contradicts"] else "wrong"


def fence(name: str, nonce: str, text: str) -> str:
    """Text as data: quoted line by line, with nothing in it that could be read as a fence."""
    lines = text.translate(_ANGLES).splitlines() or [""]
    return "\n".join([f"<{name} {nonce}>", *(f"| {line}" for line in lines), f"</{name} {nonce}>"])


def _call(
    item: Item,
    mode: Literal["pairwise", "pointwise"],
    slots: tuple[str, ...],
    answers: dict[str, str],
    config: JudgeConfig,
    *,
    canary: str | None = None,
    expect: str | None = None,
) -> Call:
    texts = [answers[slot] for slot in slots]
    # The nonce depends on every text shown, so no text can contain its own.
    material = [config.model, config.base_url, config.max_tokens, RUBRIC, mode, slots, canary]
    asked = [[message.role, message.content] for message in item.messages]
    key = sha256_json([*material, item.id, asked, item.reference, texts])
    nonce = sha256_bytes(f"nonce {key}".encode())[:32]
    names = ("candidate A", "candidate B") if mode == "pairwise" else ("candidate",)
    prompt = "\n".join(f"{message.role}: {message.content}" for message in item.messages)
    shown = [fence("question", nonce, prompt), fence("reference", nonce, item.reference)]
    shown += [fence(name, nonce, text) for name, text in zip(names, texts, strict=True)]
    head, *sections = re.split(r"(?m)^# (?=pairwise|pointwise)", RUBRIC)
    rules = next(section for section in sections if section.startswith(mode))
    messages = [
        {"role": "system", "content": f"{head.strip()}\n\n{rules.split(chr(10), 1)[1].strip()}"},
        {"role": "user", "content": "\n\n".join([*shown, f"id: {nonce}"])},
    ]
    schema = _schema(mode)
    return Call(key, item.id, mode, slots, nonce, messages, schema, canary, expect)


def _schema(mode: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": {"type": "string"}, "rationale": {"type": "string"}}
    if mode == "pairwise":
        fields["winner"] = {"type": "string", "enum": ["A", "B", "tie"]}
    else:
        fields |= {check: {"type": "boolean"} for check in CHECKS}
        fields["quality"] = {"type": "integer", "enum": [1, 2, 3, 4, 5]}
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def _canaries(
    items: Sequence[Item], mode: Literal["pairwise", "pointwise"], config: JudgeConfig, seed: int
) -> list[Call]:
    """Calls whose verdict is known: spoilt references must lose, the reference must win."""
    order = sorted(items, key=lambda item: sha256_bytes(f"canary {seed} {item.id}".encode()))
    figure = next((item for item in order if item.kind == "number"), None)
    calls: list[Call] = []
    kinds = ["empty", "boilerplate", "injection", "digit", "scale", "sign", "same"]
    if mode == "pairwise":  # scale and sign take turns; the reference itself is in every pair
        kinds.remove("sign" if seed % 2 else "scale")
    for number, kind in enumerate(kinds):
        item = figure if kind in ("digit", "scale", "sign") else order[number % len(order)]
        if item is None:
            continue
        answers = {"good": item.reference, "bad": _spoilt(kind, item.reference)}
        if mode == "pairwise":
            slots: tuple[str, ...] = ("good", "bad") if number % 2 else ("bad", "good")
            expect = "tie" if kind == "same" else "good"
        else:
            slots = ("bad",)
            expect = "right" if kind == "same" else "wrong"
        calls.append(_call(item, mode, slots, answers, config, canary=kind, expect=expect))
    return calls


def _spoilt(kind: str, text: str) -> str:
    if kind == "digit":
        return re.sub("[0-9]", lambda found: str((int(found[0]) + 4) % 9 + 1), text, count=1)
    digits = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?")
    if kind == "scale":
        return digits.sub(
            lambda found: f"{float(found[0].replace(',', '')) * 1000:,.6g}", text, count=1
        )
    if kind == "sign":
        return text.replace("-", "", 1) if "-" in text else digits.sub(r"-\g<0>", text, count=1)
    return _SPOILT.get(kind, text)


def summary(
    rows: Sequence[dict[str, Any]],
    settled: dict[str, str | None],
    groups: dict[str, str],
    *,
    seed: int,
) -> dict[str, Any] | None:
    """What the judge's calls add up to; None where no judge was asked.

    Args:
        rows: of the raw file, one a call.
        settled: for every item whose answer arithmetic prefers, or None.
        groups: the document of every item, the unit of resampling.
    """
    asked = [row for row in rows if row.get("mode")]
    if not asked:
        return None
    real = [row for row in asked if row["canary"] is None]
    planted = [row for row in asked if row["canary"] is not None]
    failed = sorted({row["canary"] for row in planted if row["outcome"] != row["expect"]})
    unscored = sum(row["status"] != "scored" for row in asked)
    paid = [row["usage"] for row in asked if row["usage"]]
    found: dict[str, Any] = {
        "model": asked[0]["model"],
        "served": sorted({row["served_model"] for row in asked if row["served_model"]}),
        "rubric_sha256": asked[0]["rubric_sha256"],
        "calls": len(asked),
        "unscored": stats.rate(unscored, len(asked)),
        "canaries": {
            "ok": sum(r["outcome"] == r["expect"] for r in planted),
            "of": len(planted),
            "failed": failed,
        },
        "cost": {
            "usd": round(sum(usage["usd"] for usage in paid), 6),
            "tokens_in": sum(usage["in"] for usage in paid),
            "tokens_out": sum(usage["out"] for usage in paid),
            "possibly_paid_calls": sum(row["possibly_paid"] for row in asked),
        },
    }
    pairwise = [row for row in real if row["mode"] == "pairwise"]
    if pairwise:
        found |= _pairwise(pairwise, settled, groups, seed)
    pointwise = [row for row in real if row["mode"] == "pointwise"]
    if pointwise:
        found["checks"] = _pointwise(pointwise, groups, seed)
    labelled = [row for row in real if row["human"] and row["outcome"]]
    if labelled:
        said, human = [row["outcome"] for row in labelled], [row["human"] for row in labelled]
        alike = sum(a == b for a, b in zip(said, human, strict=True))
        found["human"] = {
            "n": len(labelled),
            "kappa": round(stats.kappa(said, human), 6),
            "agreement": stats.rate(alike, len(labelled)),
        }
    return found


def _pairwise(
    rows: list[dict[str, Any]], settled: dict[str, str | None], groups: dict[str, str], seed: int
) -> dict[str, Any]:
    both: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        both.setdefault(row["id"], {})[row["slots"][0]] = row
    wins: dict[str, str] = {}
    unscored, agree, against, first, decided = 0, 0, 0, 0, 0
    for key, orders in both.items():
        words = [row["outcome"] for row in orders.values()]
        for row in orders.values():
            decided += row["outcome"] in ("base", "adapter")
            first += row["outcome"] == row["slots"][0]
        opinion = None
        if len(words) == 2 and all(words):
            opinion = words[0] if words[0] == words[1] else "tie"
            agree += words[0] == words[1]
        if settled.get(key):
            against += opinion in ("base", "adapter") and opinion != settled[key]
            opinion = settled[key]
        if opinion is None:
            unscored += 1
        else:
            wins[key] = opinion
    values, names = [SCORE[opinion] for opinion in wins.values()], [groups[key] for key in wins]
    n, total = len(values), sum(values)
    difference = stats.paired([value - 0.5 for value in values], names, seed=seed).as_json()
    lengths = {row["id"]: row["lengths"] for row in rows}
    ratios = [(lengths[key]["adapter"] + 1) / (lengths[key]["base"] + 1) for key in wins]
    return {
        "win_rate": {
            "value": round(total / n, 6) if n else None,
            "difference": difference,
            "won": values.count(1.0),
            "tied": values.count(0.5),
            "lost": values.count(0.0),
            "p": round(stats.mcnemar_midp(values.count(1.0), values.count(0.0)), 6),
            "bounds_with_unscored": [
                round((total + add) / max(len(both), 1), 6) for add in (0, unscored)
            ],
            "at_equal_length": stats.length_controlled(values, ratios),
        },
        "reliability": {
            "swap_consistency": stats.rate(agree, len(both)),
            "first_slot": stats.rate(first, decided),
            "settled_by_arithmetic": sum(settled.get(key) is not None for key in both),
            "against_arithmetic": against,
        },
        "items": wins,
    }


def _pointwise(rows: list[dict[str, Any]], groups: dict[str, str], seed: int) -> dict[str, Any]:
    """Share of answers that pass each check, and the mean quality, base and adapter."""
    both: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["verdict"]:
            both.setdefault(row["id"], {})[row["slots"][0]] = row["verdict"]
    whole = {key: found for key, found in both.items() if len(found) == 2}
    names = [groups[key] for key in whole]
    table: dict[str, Any] = {}
    for check in (*CHECKS, "quality"):
        values = {who: [int(v[who][check]) for v in whole.values()] for who in ("base", "adapter")}
        change = [a - b for b, a in zip(values["base"], values["adapter"], strict=True)]
        table[check] = {
            **{who: round(sum(v) / max(len(v), 1), 6) for who, v in values.items()},
            "difference": stats.paired(change, names, seed=seed).as_json(),
            "p": round(
                stats.mcnemar_midp(sum(c > 0 for c in change), sum(c < 0 for c in change)), 6
            ),
        }
    return table
