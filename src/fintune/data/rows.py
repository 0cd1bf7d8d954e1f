"""From a raw row to messages: known column names, turns written into one text, repaired text.

Row-level problems are raised as `Rejected` with the reason that goes into the ledger.
"""

import html
import html.entities
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

from fintune.example import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("user",), "assistant"),
    (("instruction", "input"), "output"),
    (("prompt",), "completion"),
    (("context", "question"), "answer"),
    (("context", "instruction", "input"), "response"),
    (("prompt",), "response"),
    (("context", "question"), "response"),
)
"""Flat formats: columns that make up the question, answer column."""

CONTROL = "".join(chr(code) for code in range(32) if chr(code) not in "\t\n\r") + "\x7f"
ZERO_WIDTH = "\u200b\u2060\ufeff\u00ad"
SPACES = "\u00a0\u202f\u2007"
_REPAIRS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("control_character", re.compile(f"[{re.escape(CONTROL)}]"), ""),
    ("lone_surrogate", re.compile("[\ud800-\udfff]"), "\ufffd"),
    ("line_end", re.compile("\r\n?"), "\n"),
    ("no_break_space", re.compile(f"[{SPACES}]"), " "),
    ("zero_width", re.compile(f"[{ZERO_WIDTH}]"), ""),
    ("zero_width", re.compile("(?<=[ -~])[\u200c\u200d]|[\u200c\u200d](?=[ -~])"), ""),
    ("lost_escape", re.compile(r" ?\b2019(s|t|re|ve|ll|d|m)\b"), "\u2019\\1"),
    (
        "lost_escape",
        re.compile(
            r"(?:\b201c(?=[\w$(])|(?<!ction )(?<!ctions )(?<!§ )(?<!rule )\b201c "
            r"(?=(?:(?!201d)\S+ ){3}))((?:(?!\b201c).)*?) ?\b201d\b"
        ),
        "\u201c\\1\u201d",
    ),
)
"""A quotation opens and closes in one line. What opens it stands at a word, or three words follow
and no section is named before it: the sections 201c and 201d of a law are none."""
_SUSPECT = re.compile(f"[{re.escape(CONTROL)}\r]|201[9cd]|\\\\u[0-9a-fA-F]|&[#a-zA-Z]|[^\x00-\x7f]")
_ENTITY = re.compile(r"&(?:#\d{1,6}|#x[0-9a-fA-F]{1,5}|[a-zA-Z][a-zA-Z0-9]{1,30});")
_ESCAPE = re.compile(
    r"\\{1,2}u(?i:d[89ab][0-9a-f]{2}\\{1,2}ud[c-f][0-9a-f]{2}|[0-9a-f]{4})", re.ASCII
)
_CODE = re.compile(
    r"(```.*?(?:```|\Z)|`[^`\n]+`|\[(?>[^][\s]*?\\u)[^][\s]*+(?:\[[^][\s]*+){0,3}+\])", re.DOTALL
)
"""Between backticks; and square brackets with an escape but no blank, as patterns have them. No
step goes back and few brackets are passed over: 10 MB of unclosed ones take no longer than text."""
_TURN = re.compile(r"^(User|Assistant):[ \t]*", re.MULTILINE)


class Rejected(Exception):
    """A row that is out before any filter, with reason and detail for the ledger."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


def to_messages(
    row: Any, columns: dict[str, str] | None, *, inline_turns: bool
) -> tuple[Message, ...]:
    """The conversation of a raw row; a blank system text is no turn, one told twice is one.

    Args:
        columns: our column -> the row's column; absent: the known formats are tried.
        inline_turns: cut a user text of `User:` / `Assistant:` lines into real turns.

    Raises:
        Rejected: no object, no known format, a wrong type, turns out of order.
    """
    if not isinstance(row, dict):
        raise Rejected("not_an_object", type(row).__name__)
    if columns is not None:
        row = {ours: row.get(theirs) for ours, theirs in columns.items()}
    # Files of several formats put together hold every column, those of the others without a value:
    # the first format that has both wins, else the first that has any, else one only named.
    filled = {name for name, value in row.items() if not _is_empty(value)}
    for name in ("messages", "conversations"):
        if name in filled:
            return _turns(row[name], _column(row, "system"))
    rules = ((all, filled), (any, filled), (any, set(row)))
    for (enough, present), (questions, answer) in product(rules, FORMATS):
        if enough((present & {*questions} - {"context"}, answer in present)):
            texts = [text for name in questions if (text := _column(row, name)).strip()]
            user, reply = "\n\n".join(texts), _column(row, answer)
            turns = _split_turns(user) if inline_turns else [Message("user", user)]
            lead = _column(row, "system").strip()
            head = [Message("system", lead)] if lead else []
            return (*head, *turns, Message("assistant", reply.strip()))
    if row.keys() & {"messages", "conversations"}:
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
    if not isinstance(value, list):
        raise Rejected("not_text", f"messages is {type(value).__name__}")
    messages = [Message("system", system.strip())] if system.strip() else []
    for turn in value:
        if not isinstance(turn, dict):
            raise Rejected("not_text", f"a turn is {type(turn).__name__}")
        name = str(turn.get("role") or turn.get("from"))
        role = ROLES.get(name.lower())
        if role is None:
            raise Rejected("unknown_role", name)
        text = (_column(turn, "content") or _column(turn, "value")).strip()
        message = Message(role, text)  # type: ignore[arg-type]
        if role != "system" or (text and message not in messages[:1]):
            messages.append(message)
    start = bool(messages) and messages[0].role == "system"
    roles = [message.role for message in messages[start:]]
    if roles[:1] == ["system"]:
        raise Rejected("two_system_texts")
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(roles)):
        raise Rejected("turns_out_of_order", " ".join(roles)[:200])
    if roles[-1:] == ["user"]:
        messages.append(Message("assistant", ""))
    return tuple(messages)


def _split_turns(user: str) -> list[Message]:
    """Cut `context, User: .., Assistant: .., User: ..` into turns; context opens the first.

    A text whose labels do not alternate from User to User is left as one turn.
    """
    if "\nAssistant:" not in user:
        return [Message("user", user.strip())]
    context, *parts = _TURN.split(user)
    roles = [role.lower() for role in parts[::2]]
    texts = [text.strip() for text in parts[1::2]]
    if roles[-1] == "assistant" and not texts[-1]:
        roles, texts = roles[:-1], texts[:-1]
    alternate = all(role == ("user", "assistant")[index % 2] for index, role in enumerate(roles))
    if not alternate or len(roles) % 2 == 0 or not all(texts):
        return [Message("user", user.strip())]
    texts[0] = f"{context.strip()}\n\n{texts[0]}".strip()
    return [Message(r, t) for r, t in zip(roles, texts, strict=True)]  # type: ignore[arg-type]


def repair(text: str, counts: Counter[str]) -> str:
    """Undo what conversions did to a text; each kind of repair is counted once a text.

    HTML entities, also twice escaped, and `\\u2019` (neither inside markup or code), its remains
    (`company 2019s`, `201cso-called 201d`), no-break and zero-width characters, control characters,
    line ends, Unicode NFC.
    """
    if _SUSPECT.search(text) is None:
        return text
    steps: list[tuple[str, Callable[[str], str]]] = [
        ("unicode_escape", partial(_outside_code, partial(_ESCAPE.sub, _escape))),
        *((name, partial(pattern.sub, new)) for name, pattern, new in _REPAIRS),
        ("unicode_nfc", partial(unicodedata.normalize, "NFC")),
    ]
    if "&" in text and "</" not in text:
        once = partial(_outside_code, partial(_ENTITY.sub, _entity))
        steps.insert(0, ("html_entity", lambda broken: once(once(broken))))
    kinds: set[str] = set()
    for name, step in steps:
        fixed = step(text)
        if fixed != text:
            kinds.add(name)
            text = fixed
    counts.update(kinds)
    return text


def _outside_code(step: Callable[[str], str], text: str) -> str:
    parts = _CODE.split(text)
    return "".join(part if at % 2 else step(part) for at, part in enumerate(parts))


def _escape(found: re.Match[str]) -> str:
    """The character of an escape, which may be a pair of surrogates. Those below U+00A0 are left:
    a quote, a backslash or a line end means something where the text is JSON or another source."""
    digits = found[0].replace("\\", "").replace("u", "")
    character = bytes.fromhex(digits).decode("utf-16-be", "replace")
    return character if "\u00a0" <= character != "\ufffd" else found[0]


def _entity(found: re.Match[str]) -> str:
    name = found[0][1:]
    return html.unescape(found[0]) if name[0] == "#" or name in html.entities.html5 else found[0]
