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
from dataclasses import replace
from functools import partial
from itertools import product
from string import ascii_uppercase
from typing import Any

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

# Where a value may begin: also after an escape left in a text, as after a line end (`\n4111 ...`).
_AFTER, _WORD = r"(?<![\w.,$/-](?<!\\[nrt]))", r"(?<!\w(?<!\\[nrt]))"
_CARD = re.compile(
    _AFTER + r"(?:4\d{3}|5[1-5]\d{2}|2[2-7]\d{2}|6011|65\d{2}|3[47]\d{2}|3(?:0[0-5]|[689]\d)\d)"
    r"(?:[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}|[ -]?\d{6}[ -]?\d{4,5}|\d{9,12})(?![\w%]|[.,]\d)"
)
_SSN = re.compile(_AFTER + r"\d{3}([- ])\d{2}\1\d{4}(?![\w/-]|[.,]\d)")
_NINE = r"\W{0,3}(?:is|was|of|:|#)?\W{0,3}(\d{9})(?!\d)"
_BARE_SSN = re.compile(_WORD + r"(?:SSN|social security (?:number|no\.?))" + _NINE, re.I)
_ROUTE = r"(?:routing|ABA|RTN|transit)(?: (?:transit|routing|number|no\.?|code|#)){0,3}"
_ROUTING = re.compile(_WORD + _ROUTE + _NINE, re.I)
_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9-]*\.)+[A-Za-z]{2,24}(?![\w-])"
)
_YEARS = r"\(?(?:19|20)\d\d(?: |[/-](?:19|20)?\d\d(?!\d))|\d\d?[/-]\d\d?[/-](?:19|20)\d\d(?!\d)"
_PHONE = re.compile(
    r"(?=[\d(+cfmpt])(?:"  # a third of the time, as most letters begin none
    rf"{_AFTER}(?:\+?1[ .-]?)?(?:\(\d{{3}}\) ?|\d{{3}}[.-])\d{{3}}[ .-]\d{{4}}(?![\w%/-]|[.,]\d)"
    rf"|{_AFTER}\+(?!1[ .-]?\d{{3}})[1-9]\d{{0,2}}(?:[ .-]\(?\d{{1,8}}\)?){{2,5}}(?![\w%/-]|[.,]\d)"
    rf"|(?<!\+){_AFTER}\+[1-9]\d{{9,14}}(?!\d)"
    rf"|{_WORD}(?:call|phone|ph|tel|telephone|mobile|cell|fax)\b"
    r"(?: (?:number|no\.?|me at|us at|at|is))*[ .:\\\"']{1,5}(\+?\d{10,13})(?!\d)"
    rf"|{_WORD}(?:phone|ph|tel|telephone|fax)(?:\.:?|[\\\"']{{0,2}}:) ?[\\\"']{{0,2}}(?!{_YEARS})"
    r"(\+?\(?\d[\d ()/-]{6,16}\d)(?![\d%]|[.,]\d))",
    re.I,
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
    return re.compile(rf"{_WORD}(?=[A-Z]{{2}}\d\d)(?:{'|'.join(forms)})(?!\w)")


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", _EMAIL, bool),
    ("iban", _iban(), partial(iban.is_valid, check_country=False)),
    ("card", _CARD, _valid_card),
    ("ssn", _SSN, ssn.is_valid),
    ("ssn", _BARE_SSN, ssn.is_valid),
    ("routing_number", _ROUTING, rtn.is_valid),
    ("phone", _PHONE, _valid_phone),
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
    names, kinds, masked = ("content", "thought", "tool_calls"), set[str](), []
    for message in messages:
        texts = {name: mask(getattr(message, name)) for name in names}
        kinds.update(*(found for _, found in texts.values()))
        clean: dict[str, Any] = {name: text for name, (text, _) in texts.items()}
        masked.append(replace(message, **clean))
    return tuple(masked), kinds
