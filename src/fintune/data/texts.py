"""What is changed in a text: damage by format conversions is repaired, personal data is masked.

Repairs: HTML entities, escapes that lost their backslash, invisible characters.

Personal data is detected by form and checksum. Cards carry Luhn's check digit and an issuer's
prefix, accounts IBAN's, US routing numbers theirs; social security numbers exclude what was never
issued.
Only the kind and the row are ever recorded, never the value. CUSIP, ISIN, CIK, amounts and dates
do not look like any of these: a run of digits counts only in the grouping people write, or beside
a word that says what it is.
"""

import html
import html.entities
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from string import ascii_uppercase

from stdnum import iban, luhn, numdb
from stdnum.us import rtn, ssn

from fintune.data import WORDS
from fintune.example import Message

CONTROL = "".join(chr(code) for code in range(32) if chr(code) not in "\t\n\r") + "\x7f"
ZERO_WIDTH = "\u200b\u2060\ufeff\u00ad"
SPACES = "\u00a0\u202f\u2007"
_APOSTROPHE = {name: {*words.split()} for name, words in WORDS["apostrophe"].items()}


def _apostrophe(match: re.Match[str]) -> str:
    """An apostrophe behind a word that takes it; `EUR 2019m` and `in 2019s` are no such words."""
    before = match.string[max(0, match.start() - 20) : match.start()].lower()
    word = re.split(r"[\W\d_]", re.sub(r"(?<=\.[a-z]) \.$", "", before))[-1]  # of the u.k . too
    listed = word in _APOSTROPHE[match[1]]
    takes = bool(word) and not listed if match[1] == "s" else listed
    return f"\u2019{match[1]}" if takes else match[0]


_REPAIRS: tuple[tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    ("control_character", re.compile(f"[{re.escape(CONTROL)}]"), ""),
    ("lone_surrogate", re.compile("[\ud800-\udfff]"), "\ufffd"),
    ("line_end", re.compile("\r\n?"), "\n"),
    ("no_break_space", re.compile(f"[{SPACES}]"), " "),
    ("zero_width", re.compile(f"[{ZERO_WIDTH}]"), ""),
    ("zero_width", re.compile("(?<=[ -~])[\u200c\u200d]|[\u200c\u200d](?=[ -~])"), ""),
    ("lost_escape", re.compile(r" ?\b2019(s|t|re|ve|ll|d|m)\b"), _apostrophe),
    ("lost_escape", re.compile(WORDS["lost_quotation"], re.VERBOSE), "\u201c\\1\u201d"),
)
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
    kinds: set[str] = set()
    for name, step in _STEPS:
        fixed = step(text)
        if fixed != text:
            kinds.add(name)
            text = fixed
    counts.update(kinds)
    return text


def _outside_code(step: Callable[[str], str], text: str) -> str:
    parts = _CODE.split(text)
    return "".join(part if at % 2 else step(part) for at, part in enumerate(parts))


def _entities(text: str) -> str:
    if "&" not in text or "</" in text:
        return text
    once = partial(_outside_code, partial(_ENTITY.sub, _entity))
    return once(once(text))


def _escape(match: re.Match[str]) -> str:
    """The character of an escape, which may be a pair of surrogates. Those below U+00A0 are left:
    a quote, a backslash or a line end means something where the text is JSON or another source."""
    digits = match[0].replace("\\", "").replace("u", "")
    character = bytes.fromhex(digits).decode("utf-16-be", "replace")
    return character if "\u00a0" <= character != "\ufffd" else match[0]


def _entity(match: re.Match[str]) -> str:
    name = match[0][1:]
    return html.unescape(match[0]) if name[0] == "#" or name in html.entities.html5 else match[0]


_STEPS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("html_entity", _entities),
    ("unicode_escape", partial(_outside_code, partial(_ESCAPE.sub, _escape))),
    *((name, partial(pattern.sub, new)) for name, pattern, new in _REPAIRS),
    ("unicode_nfc", partial(unicodedata.normalize, "NFC")),
)


def _valid_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and bool(luhn.is_valid(digits))


def _valid_phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2


def _iban() -> re.Pattern[str]:
    """An account number has its country's length: what follows it may look like more of it."""
    registry, forms = numdb.get("iban"), []
    for code in map("".join, product(ascii_uppercase, repeat=2)):
        structure = registry.info(code)[0][1].get("bban", "")  # such as 4!a14!n
        if length := sum(map(int, re.findall(r"(\d+)!", structure))):
            forms.append(rf"{code}\d\d(?: ?[A-Z0-9]){{{length}}}")
    return re.compile(rf"(?<!\w(?<!\\[nrt]))(?=[A-Z]{{2}}\d\d)(?:{'|'.join(forms)})(?!\w)")


def _pattern(name: str) -> re.Pattern[str]:
    """A pattern of `personal` in words.toml, where <name> stands for another one."""
    patterns = WORDS["personal"]
    whole = re.sub("<([a-z]+)>", lambda part: patterns[part[1]], patterns[name])
    return re.compile(whole, re.VERBOSE)


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", _pattern("email"), bool),
    ("iban", _iban(), partial(iban.is_valid, check_country=False)),
    ("card", _pattern("card"), _valid_card),
    ("ssn", _pattern("ssn"), ssn.is_valid),
    ("ssn", _pattern("named_ssn"), ssn.is_valid),
    ("routing_number", _pattern("routing_number"), rtn.is_valid),
    ("phone", _pattern("phone"), _valid_phone),
)


def mask(text: str) -> tuple[str, set[str]]:
    """A text with every personal value replaced by its kind, such as `[EMAIL]`; and the kinds."""
    kinds: set[str] = set()
    for kind, pattern, valid in _KINDS:
        for match in [*pattern.finditer(text)][::-1]:
            groups = (group for group in match.groups() if group and group.strip(" -"))
            value = next(groups, match[0])
            if valid(value):
                kinds.add(kind)
                masked = match[0].replace(value, f"[{kind.upper()}]")
                text = text[: match.start()] + masked + text[match.end() :]
    return text, kinds


def mask_messages(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], set[str]]:
    """All messages masked, and the kinds of personal data in any of them."""
    kinds = set[str]()

    def clean(text: str) -> str:
        text, found = mask(text)
        kinds.update(found)
        return text

    return tuple(
        [each.changed(clean, "content", "thought", "tool_calls") for each in messages]
    ), kinds
