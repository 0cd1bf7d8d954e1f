"""Amounts read out of prose.

    scan("Revenue fell 3.5% to $1.2bn in FY2023")   3.5 % (down), 1,200,000,000 $, a year

Values are exact `Decimal`s in one system: the scale is applied, and percent, percentage points
and basis points are fractions (12.5 % is 0.125, 25 bps is 0.0025). A number is negative when it
carries a minus, accounting parentheses, or the word "negative" or "minus". "A loss of 5" stays
+5 with `cue="down"`: whether that is minus five depends on the question, so `compare` decides.
Every pattern is anchored or bounded, so reading is linear in the length of the text.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from fintune.files import read_toml

Role = Literal["", "range", "year", "label"]
Cue = Literal["", "down", "up", "aside"]


def _by_word(table: dict[str, str]) -> dict[str, str]:
    """Each word of a table of numbers.toml -> its key."""
    return {word: key for key, words in table.items() for word in words.split()}


def _any_of(words: Iterable[str]) -> str:
    """An alternation, longest first, so that "seventeen" is not read as "seven"."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_TEXTS = read_toml(__file__, "numbers.toml")
FACTORS = {unit: Decimal(factor) for unit, factor in _TEXTS["factors"].items()}
UNITS = (*FACTORS, "multiple")
SCALES = {word: Decimal(10) ** int(power) for word, power in _by_word(_TEXTS["powers"]).items()}
_CURRENCIES = _by_word(_TEXTS["currencies"])
_ONES, _TENS = _TEXTS["counting"]["ones"].split(), _TEXTS["counting"]["tens"].split()
_WORDS = {word: n for n, word in enumerate(_ONES)}
_WORDS |= {word: 10 * n for n, word in enumerate(_TENS, start=2)}
WORDS: dict[str, str] = {
    **_TEXTS["words"],
    "tens": _any_of(_TENS),
    "ones": _any_of(_ONES[1:10]),
    "counts": _any_of(_WORDS),
    "scales": _any_of(word for word in SCALES if len(word) > 1),
}


@dataclass(frozen=True, slots=True)
class Amount:
    """One number as it stands in a text.

    `mantissa` is unsigned and as printed, `decimals` its number of printed decimals. `unit` is
    "plain", one of UNITS, or the word of a duration ("month"). `role` is empty for an amount, else
    why it is none that an answer could be: an end of a range, a year, or a label ("Note 12",
    "S&P 500", "Q3", a footnote mark, a list number). `cue` is the wording beside it: "down" ("a
    loss of"), "up", or "aside" for parentheses that may be a remark instead of a minus ("bonds
    (82%)", read as negative). `start` and `end` are offsets into the text.
    """

    sign: int
    mantissa: Decimal
    scale: Decimal
    unit: str
    currency: str
    decimals: int
    start: int
    end: int
    role: Role = ""
    cue: Cue = ""

    @property
    def value(self) -> Decimal:
        """Signed and absolute: mantissa x scale, percentages and basis points as fractions."""
        return self.sign * self.mantissa * self.scale * FACTORS.get(self.unit, 1)

    @property
    def half_unit(self) -> Decimal:
        """Half a unit of the last printed digit, in the units of `value`."""
        return Decimal(5).scaleb(-self.decimals - 1) * self.scale * FACTORS.get(self.unit, 1)

    @property
    def bare(self) -> bool:
        """Printed without a scale and without a percent or other unit."""
        return self.scale == 1 and self.unit == "plain"


CHARACTERS = str.maketrans(
    {other: plain for plain, others in _TEXTS["characters"].items() for other in others}
)
_SIGNS = {"times": "×", "cdot": "×", "div": "÷", "approx": "≈"}


def clean(text: str) -> str:
    """The text without mark-up and with plain dashes and digits, each character in its place."""
    markup = _GRAMMAR["markup"]

    def plain(match: re.Match[str]) -> str:
        new = _SIGNS.get(match["sign"] or "", "")
        if match["half"]:
            new = f"{match['half']}⁄{match['one']}"
        elif match["over"]:
            over, under = (markup.sub(plain, match[part]) for part in ("over", "under"))
            new = f"{over} ⁄{under} "
        elif match["math"]:
            new = markup.sub(plain, match["math"]) + " " * (match.end() - match.end("math"))
        return new.rjust(len(match[0]))

    return markup.sub(plain, text.translate(CHARACTERS))


def ends_with(pattern: re.Pattern[str], text: str, at: int, width: int) -> re.Match[str] | None:
    """The match of a pattern that ends in `\\Z` among the `width` characters before `at`."""
    return pattern.search(text, max(0, at - width), at)


def patterns(table: str, flags: int = re.VERBOSE | re.IGNORECASE) -> dict[str, re.Pattern[str]]:
    """The patterns of a table of numbers.toml by name; `@word@` stands for an entry of `words`."""
    return {
        name: re.compile(re.sub(r"@(\w+)@", lambda at: WORDS[at[1]], text), flags)
        for name, text in _TEXTS[table].items()
    }


_GRAMMAR, _AROUND = patterns("grammar", re.VERBOSE), patterns("around")
"""The parts of an amount, and what stands before, after or between amounts; see numbers.toml."""


def scan(text: str) -> tuple[str, list[Amount]]:
    """The cleaned text and its numbers in order, each with its `role`, but those of dates and
    sections (7.1.2); offsets are those of the text given.

    "3M" is the company, "1,234" is grouped and "12,5" has a decimal comma; a small whole number
    in parentheses after a word is a footnote mark. The first end of "$10 to $12 million" takes
    the scale and unit of the second, and each end has the role `range` ("from ... to" is a change,
    not a range). About 0.5 ms for 500 characters, linear in the length.
    """
    text, amounts = clean(text), list[Amount]()
    cue: re.Match[str] | None = None
    end = 0
    for match in _GRAMMAR["token"].finditer(text):
        if match.lastgroup == "cue":
            cue = match
        elif match.lastgroup not in ("skip", None) and match.start() >= end:
            amounts.append(_amount(text, match, cue))
            end = amounts[-1].end
    _join_ranges(text, amounts)
    return text, amounts


def _amount(text: str, match: re.Match[str], nearest: re.Match[str] | None) -> Amount:
    mantissa, decimals = _mantissa(match)
    before = ends_with(_GRAMMAR["prefix"], text, match.start(), 10)
    after = _GRAMMAR["suffix"].match(text, match.end())
    assert before and after  # the two patterns also match an empty string
    mark = re.sub("[ .]", "", before["currency"] or after["currency"] or "").lower()
    word = after["scale"] or after["letter"] or after["capital"] or ""
    scale = SCALES[word.lower()] if word else Decimal(1)
    scale /= 100 if mark in _TEXTS["hundredths"] else 1
    unit = next((name for name in UNITS if after[name]), (after["duration"] or "plain").lower())
    end = after.end()
    if after["duration"] and re.fullmatch("(?:19|20)[0-9]{2}", match[0]):  # "the 2019 quarter"
        unit, end = "plain", match.end()
    sign, begin = _sign(text, before, match.start())
    rich = bool(word or mark or decimals or sign < 0 or unit != "plain")
    role = _role(text, match, begin, end, rich)
    cue: Cue = ""
    inner = "(" in text[begin : match.start()]  # $(3.4)
    first = begin if inner else text.rfind("(", max(0, begin - 2), begin)
    closed = _AROUND["closed"].match(text, end) if first >= 0 and not role and sign > 0 else None
    if closed and not text[first + 1 : begin].strip():
        marked = bool(mark or word or closed["scale"] or closed["percent"] or unit != "plain")
        amountlike = marked or rich or "," in match[0]
        kind = _parenthesis(text, first, closed.end(), amountlike, marked)
        if kind == "footnote":
            role = "label"
        else:
            sign, begin, end = -1, first, closed.end()
            cue = "aside" if kind == "aside" else ""
            scale *= SCALES[closed["scale"].lower()] if closed["scale"] and not word else 1
            unit = "percent" if closed["percent"] and unit == "plain" else unit
    if not role and not cue:
        cue = _cue(text, nearest, begin, end)
    if sign > 0 and not role and _AROUND["ledger"].match(text, end):
        sign, end = -1, end + 1
    currency = _CURRENCIES.get(mark, mark.upper())
    return Amount(sign, mantissa, scale, unit, currency, decimals, begin, end, role, cue)


def _mantissa(match: re.Match[str]) -> tuple[Decimal, int]:
    """What the matched digits or words say, unsigned and without a scale, and its decimals."""
    if match.lastgroup == "words":
        return Decimal(sum(_WORDS[word] for word in re.split("[ -]", match[0].lower()))), 0
    if match.lastgroup == "fraction":
        over, under = re.split(" *[/\u2044] ?", unicodedata.normalize("NFKC", match["part"]))
        value = Decimal(match["whole"] or 0) + Decimal(over) / Decimal(under)
        endless = _decimals(value) > 20
        return value, max(2, 1 - value.adjusted()) if endless else _decimals(value)
    token = re.sub(r"[ \u00a0'{}\\!;:]", "", match[0])
    if match.lastgroup == "us":
        token = token.replace(",", "")
    elif match.lastgroup == "eu":
        token = token.replace(".", "").replace(",", ".")
    return Decimal(token), _decimals(Decimal(token))


def _decimals(value: Decimal) -> int:
    return max(0, -int(value.as_tuple().exponent))


def _sign(text: str, before: re.Match[str], start: int) -> tuple[int, int]:
    """The sign that stands before a number, and where the number with its marks begins.

    A hyphen after a letter, digit or bracket joins or subtracts ("10-12", "COVID-19", "8 - 3").
    """
    begin = before.start("currency") if before["currency"] else start
    if (before["inner"] or "").endswith("-"):
        return -1, begin
    if not before["sign"]:
        worded = ends_with(_AROUND["negative"], text, begin, 10)
        return (-1, worded.start()) if worded else (1, begin)
    at = before.start("sign")
    previous = text[at - 1 : at] if at else ""
    if previous.isalnum() or previous in tuple(")%]'}"):
        return 1, begin
    back = text[max(0, at - 4) : at].rstrip()[-1:]
    if text[at + 1] in " \u00a0" and back not in ("=", ":", "(", "|"):
        return 1, begin  # "= - 5" is minus five; "a - 5" and a bullet are not
    return (-1 if before["sign"] == "-" else 1), at


def _role(text: str, match: re.Match[str], begin: int, end: int, rich: bool) -> Role:
    """Why a number is no amount, or an empty string; `rich` ones carry a mark of an amount."""
    digits = match[0]
    if match.lastgroup == "words":
        one = digits.lower() == "one" and not rich
        return "label" if one or _AROUND["glue"].match(text, end) else ""
    glued = begin == match.start() and ends_with(_AROUND["glued"], text, begin, 2)
    fiscal = ends_with(_AROUND["fiscal"], text, begin, 8)
    if glued:
        return "year" if fiscal else "label"
    if _AROUND["glue"].match(text, end) or text[begin:end] == "3M":  # the company
        return "label"
    if not rich:
        counted = _AROUND["counted"].match(text, end)
        if (re.fullmatch("(?:19|20)..", digits) and not counted) or (
            fiscal and len(digits) in (2, 4)
        ):
            return "year"
        listed = ends_with(_AROUND["bullet"], text, begin, 8) and _AROUND["listed"].match(text, end)
        if len(digits) <= 3 and (listed or text[begin - 1 : end + 1] == f"[{digits}]"):
            return "label"
    plain = not rich or text[begin:end] == digits
    return "label" if plain and ends_with(_AROUND["label"], text, begin, 16) else ""


def _parenthesis(text: str, first: int, stop: int, rich: bool, marked: bool) -> str:
    """What parentheses around one number mean: "minus", "aside" or "footnote".

    `(1,234)` is the accounting minus. `bonds (82%)` and `5.2 (5.2)` may be remarks, asides: either
    sign will do. `sales (1)` and `12.3(1)` are footnote marks; `= (5)` and a table cell are not.
    """
    back = text[max(0, first - 4) : first].rstrip(" ")[-1:]
    linked = not back or back in "\n$" or ends_with(_AROUND["verb"], text, first, 16)
    whole = first == 0 and text[stop : stop + 1] in ("", ",")  # "(43), (118) thousand"
    if not rich and _AROUND["tiny"].match(text, first) and not whole and (not linked or not back):
        return "footnote"
    return "minus" if linked or (back.isalpha() and not marked) else "aside"


def _cue(text: str, nearest: re.Match[str] | None, begin: int, end: int) -> Cue:
    if nearest and begin - nearest.end() <= 70:
        tail = _AROUND["tail"].match(text, nearest.end(), begin)
        far = tail and (nearest["down_noun"] or nearest["up_noun"] or tail[1].lower() == "by")
        if far or _AROUND["link"].match(text, nearest.end(), begin):
            return "down" if nearest["down"] else "up"
    after = _AROUND["cue_after"].match(text, end)
    return "" if not after else "down" if after["down"] else "up"


def _join_ranges(text: str, amounts: list[Amount]) -> None:
    """Give the two ends of each range that role, in place; the first takes scale and unit of the
    second where it prints none."""
    for left in range(len(amounts) - 1):
        a, b = amounts[left], amounts[left + 1]
        restated = _AROUND["restated"].fullmatch(text, a.end, b.start)
        if restated and a.cue and not b.cue and not b.role:
            amounts[left + 1] = replace(b, cue=a.cue)  # "decreased by $5 million, or 3.7%"
        join = _AROUND["join"].fullmatch(text, a.end, b.start) if b.start - a.end <= 9 else None
        if not join or a.role or b.role or b.sign < 0 or a.cue in ("up", "down"):
            continue
        joined = (join[1] or "").lower() not in ("and", "or")
        joined = joined or bool(ends_with(_AROUND["between"], text, a.start, 10))
        if _AROUND["more"].match(text, b.end) or not joined:
            continue
        scale = b.scale if a.scale == 1 else a.scale
        a = replace(a, scale=scale, unit=b.unit, currency=a.currency or b.currency)
        if join[1] or a.value < b.value:  # else a subtraction
            role: Role = "" if ends_with(_AROUND["from"], text, a.start, 8) else "range"
            amounts[left] = replace(a, role=role)
            amounts[left + 1] = replace(b, role=role, currency=a.currency)
