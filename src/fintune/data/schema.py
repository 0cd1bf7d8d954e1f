"""From a raw row to messages: known formats, named columns, turns written into one text.

Problems of one row are raised as `Rejected` with the reason that goes into the ledger.
"""

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

from fintune.data import WORDS
from fintune.example import Message, Role

ROLES: dict[str, Role] = WORDS["roles"]
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
FORMATS: list[tuple[list[str], str]] = WORDS["formats"]
"""Flat formats: columns that make up the question, answer column."""

TURNS = ("messages", "conversations")
_TURN = re.compile(r"^(User|Assistant):[ \t]*", re.MULTILINE)


class Rejected(Exception):
    """A row dropped before any filter, with reason and detail for the ledger."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


def to_messages(row: Any, columns: dict[str, str] | None) -> tuple[Message, ...]:
    """The conversation of a raw row; a blank system text is no turn.

    Args:
        columns: our column -> the row's column; absent: the known formats are tried.

    Raises:
        Rejected: no object, no known format, a wrong type, turns out of order.
    """
    if not isinstance(row, dict):
        raise Rejected("not_an_object", type(row).__name__)
    if columns is not None:
        row = {ours: row.get(theirs) for ours, theirs in columns.items()}
    # Files of several formats put together hold every column, those of the others without a value:
    # the first format of which question and answer are filled, else the first with one of them
    # filled, else the first that has one of them.
    filled = {name for name, value in row.items() if not _is_empty(value)}
    for name in TURNS:
        if name in filled:
            messages = _turns(row[name], _column(row, "system"))
            tools = _json(row.get("tools"))
            return (replace(messages[0], tools=tools), *messages[1:]) if messages else messages
    rules = ((all, filled), (any, filled), (any, set(row)))
    for (enough, present), (questions, answer) in product(rules, FORMATS):
        if enough((present & {*questions} - {"context"}, answer in present)):
            texts = [text for name in questions if (text := _column(row, name)).strip()]
            lead = _column(row, "system").strip()
            head = [Message("system", lead)] if lead else []
            reply = _answer(_column(row, answer))
            return (*head, *_split_turns("\n\n".join(texts)), reply)
    if row.keys() & {*TURNS}:
        return ()  # no_user to the filters, as where a flat format holds nothing
    raise Rejected("unknown_columns", ", ".join(map(str, row)))


def _is_empty(value: Any) -> bool:
    """Null, also as the NaN of a column of numbers; the blank cell of a CSV; a list of no turns."""
    blank = isinstance(value, str) and not value.strip()
    return blank or value is None or value == [] or value != value


def _column(row: dict[str, Any], name: str) -> str:
    """The text of a column; a number's is 42 for 42.0, as a column of numbers with gaps has it."""
    value = row.get(name)
    if _is_empty(value):
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != math.inf:
        return str(value).removesuffix(".0")
    if not isinstance(value, str):
        raise Rejected("not_text", f"{name} is {type(value).__name__}")
    return value


def _turns(value: Any, system: str) -> tuple[Message, ...]:
    """Turns of a list; a system turn in it goes before the system column."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Rejected("not_text", "the turns are no list of objects")
    messages = []
    for turn in value:
        name = str(turn.get("role") or turn.get("from"))
        text = (_column(turn, "content") or _column(turn, "value")).strip()
        if (role := ROLES.get(name.lower())) is None:
            raise Rejected("unknown_role", name)
        if role == "assistant":
            thoughts = (thought for name in THOUGHTS if (thought := _column(turn, name)))
            messages.append(_answer(text, next(thoughts, ""), _calls(turn)))
        elif role != "system" or text:
            messages.append(Message(role, text))
    if system.strip() and [message.role for message in messages[:1]] != ["system"]:
        messages.insert(0, Message("system", system.strip()))
    roles = [m.role for m in messages if m.role != "tool" and not m.tool_calls]
    if not _alternate(roles[roles[:1] == ["system"] :]):
        raise Rejected("turns_out_of_order", " ".join(roles)[:200])
    if roles[-1:] == ["user"]:
        messages.append(Message("assistant", ""))
    return tuple(messages)


def _answer(text: str, thought: str = "", tool_calls: str = "") -> Message:
    """An assistant's turn; a thought in <think> at its start is none of its text."""
    if not thought and (parts := _THOUGHT.fullmatch(text)):
        thought, text = parts[1], parts[2]
    return Message("assistant", text.strip(), thought.strip(), tool_calls)


def _calls(turn: dict[str, Any]) -> str:
    """The calls of a turn as JSON text, arguments as objects, which the templates take."""
    calls = turn.get("tool_calls") or [{"function": turn.get("function_call")}]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Rejected("not_text", "tool_calls is no list of objects")
    made = []
    for call in calls:
        function = call.get("function") or (call if "name" in call else {})
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            continue
        given = function.get("arguments")
        with suppress(ValueError):
            given = json.loads(given) if isinstance(given, str) else given
        named = {"name": function["name"], "arguments": given}
        made.append({"type": "function", "function": named})
    return _json(made)


def _json(value: Any) -> str:
    """JSON text of a list of objects, which may be such a text already; of others nothing."""
    with suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) else value
    whole = isinstance(value, list) and all(isinstance(each, dict) for each in value)
    return json.dumps(value, ensure_ascii=False, default=str) if whole and value else ""


def _alternate(roles: list[Any]) -> bool:
    return all(role == ("user", "assistant")[index % 2] for index, role in enumerate(roles))


def _split_turns(user: str) -> list[Message]:
    """Cut `context, User: .., Assistant: .., User: ..` into turns; context opens the first.

    A text whose labels do not alternate from User to User is left as one turn.
    """
    whole = [Message("user", user.strip())]
    if "\nAssistant:" not in user:
        return whole
    context, *parts = _TURN.split(user)
    roles = [role.lower() for role in parts[::2]]
    texts = [text.strip() for text in parts[1::2]]
    if roles[-1] == "assistant" and not texts[-1]:
        roles, texts = roles[:-1], texts[:-1]
    if not _alternate(roles) or len(roles) % 2 == 0 or not all(texts):
        return whole
    texts[0] = f"{context.strip()}\n\n{texts[0]}".strip()
    return [Message(r, t) for r, t in zip(roles, texts, strict=True)]  # type: ignore[arg-type]
