"""What the judge is asked, and how its reply is read.

A candidate's text is hostile input. It is quoted line by line between fences that carry a nonce,
nothing in it can look like a fence, and a verdict counts only as the last JSON object of the
reply that carries the same nonce, which no candidate can know. Control items, whose verdict is
known, are part of every run.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fintune.config import JudgeConfig
from fintune.evals.grading import PHRASES
from fintune.evals.items import VARIANTS, Item
from fintune.files import sha256_bytes, sha256_json
from fintune.numbers import compare

RUBRIC = resources.files("fintune.evals").joinpath("rubric.md").read_text(encoding="utf-8")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "rationale": {"type": "string"},
        "winner": {"type": "string", "enum": ["A", "B", "tie"]},
    },
    "required": ["id", "rationale", "winner"],
    "additionalProperties": False,
}
OUTCOMES = (*VARIANTS, "tie")
MOST_OBJECTS = 1000
"""JSON objects of a reply that are looked at; a reply of braces alone would take minutes."""
_ANGLES = str.maketrans({"<": "‹", ">": "›", "＜": "‹", "＞": "›", "﹤": "‹", "﹥": "›"})
_SPOILT: dict[str, str] = PHRASES["spoilt"]
"""Answers that must lose: nothing, phrases that fit any question, and an attack."""
_DIGITS = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Call:
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


def plan(
    items: Sequence[tuple[Item, dict[str, str]]], config: JudgeConfig, *, seed: int
) -> list[Call]:
    """Every call of a run: each item in both orders, then the control items.

    Args:
        items: each with the completions of `base` and `adapter`.
    """
    calls = [
        _call(item, order, completions, config)
        for item, completions in items
        for order in (("base", "adapter"), ("adapter", "base"))
    ]
    return calls + _controls([item for item, _ in items], config, seed)


def read_verdict(call: Call, reply: str) -> dict[str, Any] | None:
    """The last JSON object of a reply, if it carries the call's nonce and fits the schema."""
    decoder = json.JSONDecoder()
    found: Any = None
    at, tried = reply.find("{"), 0
    while at >= 0 and tried < MOST_OBJECTS:
        tried += 1
        try:
            found, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):
            end = at + 1
        at = reply.find("{", end)
    fits = isinstance(found, dict) and isinstance(found.get("rationale", ""), str)
    if not fits or found.get("id") != call.nonce or found.get("winner") not in ("A", "B", "tie"):
        return None
    return dict(found)


def outcome(call: Call, verdict: dict[str, Any]) -> str:
    """Who won: `base`, `adapter` (of a control item `good`, `bad`), or `tie`."""
    winner = verdict["winner"]
    return "tie" if winner == "tie" else call.positions["AB".index(winner)]


def fence(name: str, nonce: str, text: str) -> str:
    """Text as data: quoted line by line, with nothing in it that could be read as a fence."""
    lines = text.translate(_ANGLES).splitlines() or [""]
    return "\n".join([f"<{name} {nonce}>", *(f"| {line}" for line in lines), f"</{name} {nonce}>"])


def _call(
    item: Item,
    positions: tuple[str, str],
    completions: dict[str, str],
    config: JudgeConfig,
    *,
    control: str | None = None,
    expect: str | None = None,
) -> Call:
    texts = [completions[name] for name in positions]
    # The nonce depends on every text shown, so no text can contain its own.
    asked = [[message.role, message.content] for message in item.messages]
    material = [config.model, config.base_url, RUBRIC, positions, control]
    key = sha256_json([*material, item.id, asked, item.reference, texts])
    nonce = sha256_bytes(f"nonce {key}".encode())[:32]
    prompt = "\n".join(f"{message.role}: {message.content}" for message in item.messages)
    shown = [fence("question", nonce, prompt), fence("reference", nonce, item.reference)]
    shown += [fence(f"candidate {at}", nonce, text) for at, text in zip("AB", texts, strict=True)]
    messages = [
        {"role": "system", "content": RUBRIC.strip()},
        {"role": "user", "content": "\n\n".join([*shown, f"id: {nonce}"])},
    ]
    return Call(key, item.id, positions, nonce, messages, control, expect)


def _controls(items: Sequence[Item], config: JudgeConfig, seed: int) -> list[Call]:
    """Calls whose verdict is known: spoilt references must lose, two equal answers must tie."""
    order = sorted(items, key=lambda item: sha256_bytes(f"control {seed} {item.id}".encode()))
    calls: list[Call] = []
    kinds = ("empty", "boilerplate", "injection", "digit", "scale" if seed % 2 else "sign", "same")
    for at, kind in enumerate(kinds):
        usable = [item for item in order if kind not in _NUMERIC or _changes(kind, item)]
        if not usable:
            continue
        item = usable[at % len(usable)]
        answers = {"good": item.reference, "bad": _spoil(kind, item.reference)}
        positions = ("good", "bad") if at % 2 else ("bad", "good")
        expect = "tie" if kind == "same" else "good"
        calls.append(_call(item, positions, answers, config, control=kind, expect=expect))
    return calls


def _changes(kind: str, item: Item) -> bool:
    """Whether spoiling really changes the number of a reference; it may be "three", or 0."""
    if item.kind != "number":
        return False
    return not compare(item.reference, _spoil(kind, item.reference)).lenient


def _spoil(kind: str, text: str) -> str:
    return _NUMERIC[kind](text) if kind in _NUMERIC else _SPOILT.get(kind, text)


def _other_digit(text: str) -> str:
    return re.sub("[0-9]", lambda at: str((int(at[0]) + 4) % 9 + 1), text, count=1)


def _other_sign(text: str) -> str:
    return text.replace("-", "", 1) if "-" in text else _DIGITS.sub(r"-\g<0>", text, count=1)


def _other_scale(text: str) -> str:
    def thousandfold(found: re.Match[str]) -> str:
        return f"{float(found[0].replace(',', '')) * 1000:,.6g}"

    return _DIGITS.sub(thousandfold, text, count=1)


_NUMERIC = {"digit": _other_digit, "scale": _other_scale, "sign": _other_sign}
