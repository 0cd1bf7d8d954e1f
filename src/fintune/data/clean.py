"""Repairs of what conversions did to a text: entities, lost escapes, characters nobody sees."""

import html
import html.entities
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial

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
