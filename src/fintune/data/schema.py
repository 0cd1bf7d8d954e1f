"""From a raw row to messages: known formats, named columns, turns written into one text.

Problems of one row are raised as `Rejected` with the reason that goes into the ledger.
"""

import ast
import json
import math
import re
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from itertools import product
from typing import Any

from fintune.data import WORDS
from fintune.example import Message, Role
from fintune.formats import Unreadable, parse_json

ROLES: dict[str, Role] = WORDS["roles"]
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MARKS = ("weight", "train", "training", "loss_mask", "loss")
"""Keys of a turn that say 0 or false where it is not to be trained."""
TEXT_PARTS = (None, "text", "input_text", "output_text")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
FORMATS: list[tuple[list[str], str]] = WORDS["formats"]
"""Flat formats: columns that make up the question, answer column."""

TURNS = ("messages", "conversations")
_TURN = re.compile(r"^(User|Assistant):[ \t]*", re.MULTILINE)
_ABOUT_A_CHAT = re.compile(WORDS["transcript"], re.IGNORECASE | re.VERBOSE)
MOST_INSTRUCTION = 200
"""Characters of a line above a chat that may say what is to be done with it."""
IGNORED = Counter[str]()
"""Counts that nobody reads."""


class Rejected(Exception):
    """A row dropped before any filter, with reason and detail for the ledger."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


def to_messages(
    row: Any, columns: dict[str, str] | None, cut: Counter[str] | None = IGNORED
) -> tuple[Message, ...]:
    """The conversation of a raw row; a blank system text is no turn.

    Args:
        columns: our column -> the row's column; absent: the known formats are tried.
        cut: counts as `inline_turns` the rows whose question is cut into turns; None: none is.

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
            given = _listed(row[name], name)
            messages = _up_to_trained(_turns(given, _column(row, "system")))
            tools = _json(row.get("tools"))
            return (replace(messages[0], tools=tools), *messages[1:]) if messages else messages
    asked = [form for form in FORMATS if row.keys() & {*form[0]} - {"context"}]
    rules = ((all, filled), (any, filled), (any, set(row)))
    for (enough, present), (questions, answer) in product(rules, asked):
        if enough((present & {*questions} - {"context"}, answer in present)):
            return _flat(row, questions, answer, cut)
    if row.keys() & {*TURNS}:
        return ()  # no_user to the filters, as where a flat format holds nothing
    raise Rejected("unknown_columns", ", ".join(map(str, row)))


def _flat(
    row: dict[str, Any], questions: list[str], answer: str, cut: Counter[str] | None
) -> tuple[Message, ...]:
    """The turns of a question and its answer, behind those of `history`."""
    system, history = _column(row, "system"), _listed(row.get("history"), "history")
    earlier = [] if _is_empty(history) else _pairs(history)
    asked, said = row.get(questions[-1]), row.get(answer)
    if isinstance(asked, list) and any(isinstance(turn, dict) and "role" in turn for turn in asked):
        reply = said if isinstance(said, list) else [{"role": "assistant", "content": said}]
        return _up_to_trained(_turns([*earlier, *asked, *reply], system))
    text = "\n\n".join(text for name in questions if (text := _column(row, name)).strip())
    turns = _split_turns(text) if cut is not None else [Message("user", text.strip())]
    if cut is not None:
        cut["inline_turns"] += len(turns) > 1
    return (*_turns(earlier, system), *turns, _answer(_column(row, answer)))


def _pairs(history: Any) -> list[Any]:
    """Turns of a list of pairs of question and answer, or of turns."""
    turns: list[Any] = []
    for pair in history if isinstance(history, list) else [history]:
        said = pair if isinstance(pair, list) and len(pair) == 2 else ()
        named = zip(("user", "assistant"), said, strict=False)
        turns += [{"role": role, "content": text} for role, text in named] or [pair]
    return turns


def _listed(value: Any, name: str) -> Any:
    """A list or object, which a cell of a CSV holds as text: JSON, or what Python prints of it."""
    if not isinstance(value, str) or not value.strip():
        return value
    found = parse_json(value)
    if isinstance(found, Unreadable):
        errors = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
        with suppress(*errors), warnings.catch_warnings(action="ignore"):
            return ast.literal_eval(value.strip())
        raise Rejected("not_text", f"{name} is text, and no JSON: {found.detail}")
    return found


def _is_empty(value: Any) -> bool:
    """Null, also as the NaN of a column of numbers; the blank cell of a CSV; a list of no turns."""
    blank = isinstance(value, str) and not value.strip()
    return blank or value is None or value == [] or value != value


def _column(row: dict[str, Any], name: str) -> str:
    """The text of a column, also of a number or of a list of parts.

    A number's is what is printed; but 42 for 42.0, as a column of numbers with gaps has it.
    """
    value = row.get(name)
    if _is_empty(value):
        return ""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != math.inf:
        return str(value).removesuffix(".0")
    if isinstance(value, list) and (name == "content" or all(isinstance(p, dict) for p in value)):
        return "".join(_part(part, name) for part in value)
    if not isinstance(value, str):
        raise Rejected("not_text", f"{name} is {type(value).__name__}")
    return value


def _part(part: Any, name: str) -> str:
    """The text of a part of a message."""
    part = {"text": part} if isinstance(part, str) else part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise Rejected("not_text", f"{name} has a part that is no text: {kind}")
    return str(part["text"])


def _turns(value: Any, system: str) -> tuple[Message, ...]:
    """Turns of a list; a system turn in it goes before the system column."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Rejected("not_text", "turns or history are no list of objects")
    messages = []
    for turn in value:
        name = str(turn.get("role") or turn.get("from"))
        text = (_column(turn, "content") or _column(turn, "value")).strip()
        if (role := ROLES.get(name.lower())) is None:
            raise Rejected("unknown_role", name)
        if role == "assistant":
            thoughts = (thought for name in THOUGHTS if (thought := _column(turn, name)))
            reply = _answer(text, next(thoughts, ""), _calls(turn))
            messages.append(replace(reply, trained=_is_trained(turn)))
        elif role != "system" or text:
            messages.append(Message(role, text))
    if system.strip() and [message.role for message in messages[:1]] != ["system"]:
        messages.insert(0, Message("system", system.strip()))
    roles = [m.role for m in messages if m.role != "tool" and not m.tool_calls]
    if not _alternate(roles[roles[:1] == ["system"] :]):
        raise Rejected("turns_out_of_order", " ".join(roles)[:200])
    if [message.role for message in messages[-1:]] == ["user"]:
        messages.append(Message("assistant", ""))
    return tuple(messages)


def _up_to_trained(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Without what stands behind the last answer that is trained, which nobody would read."""
    answers = [at for at, turn in enumerate(messages, 1) if turn.role == "assistant"]
    trained = [at for at in answers if messages[at - 1].trained]
    if answers and not trained:
        raise Rejected("masked_answers")
    return messages[: trained[-1]] if trained else messages


def _is_trained(turn: dict[str, Any]) -> bool:
    marks = (str(turn[name]).strip().lower() for name in MARKS if name in turn)
    return not {"0", "0.0", "false", "no"}.intersection(marks)


def _answer(text: str, thought: str = "", tool_calls: str = "") -> Message:
    """An assistant's turn; a thought in <think> at its start is none of its text."""
    if not thought and (parts := _THOUGHT.fullmatch(text)):
        thought, text = parts[1], parts[2]
    return Message("assistant", text.strip(), thought.strip(), tool_calls)


def _calls(turn: dict[str, Any]) -> str:
    """The calls of a turn as JSON text, arguments as objects, which the templates take."""
    calls = _listed(turn.get("tool_calls"), "tool_calls") or [
        _listed(turn.get("function_call"), "function_call")
    ]
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not call or (isinstance(call, dict) and all(each is None for each in call.values())):
            continue  # null, also as Parquet has it
        function = call.get("function") or call if isinstance(call, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Rejected("not_text", "a tool call without a name")
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
    if not whole or not value:
        return ""
    text = json.dumps(value, ensure_ascii=False, skipkeys=True, default=str)
    return text.encode(errors="replace").decode()  # no half character


def _alternate(roles: list[Any]) -> bool:
    return all(role == ("user", "assistant")[index % 2] for index, role in enumerate(roles))


def _split_turns(user: str) -> list[Message]:
    """Cut `context, User: .., Assistant: .., User: ..` into turns; context opens the first.

    A text whose labels do not alternate from User to User is left as one turn, and one whose last
    line of context says that the chat is the text to work on ("Summarise the call below").
    """
    whole = [Message("user", user.strip())]
    if "\nAssistant:" not in user:
        return whole
    context, *parts = _TURN.split(user)
    above = context.strip().rpartition("\n")[2]
    if len(above) <= MOST_INSTRUCTION and _ABOUT_A_CHAT.search(above):
        return whole
    roles = [role.lower() for role in parts[::2]]
    texts = [text.strip() for text in parts[1::2]]
    if roles[-1] == "assistant" and not texts[-1]:
        roles, texts = roles[:-1], texts[:-1]
    if not _alternate(roles) or len(roles) % 2 == 0 or not all(texts):
        return whole
    texts[0] = f"{context.strip()}\n\n{texts[0]}".strip()
    return [Message(r, t) for r, t in zip(roles, texts, strict=True)]  # type: ignore[arg-type]
