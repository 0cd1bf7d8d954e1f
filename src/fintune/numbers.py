"""Amounts read out of prose, and compared: the only place that decides whether a number is right.

    read_amounts("Revenue fell 3.5% to $1.2bn in FY2023")   3.5 % (down), 1,200,000,000 $, a year
    compare("$1,577", "It was $1.577 billion.", question="... in USD millions?").correct   True
    compare("12.5%", "The margin was 1250%").miss                                          "percent"

Values are exact `Decimal`s in one system: the scale is applied, and percent, percentage points
and basis points are fractions (12.5 % is 0.125, 25 bps is 0.0025). A number is negative when it
carries a minus, accounting parentheses, or the word "negative" or "minus". "A loss of 5" stays
+5 with `cue="down"`: whether that is minus five depends on the question, so `compare` decides.
Every pattern is anchored or bounded, so reading is linear in the length of the text.
"""

import ast
import operator
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal, DecimalException
from typing import Literal

from fintune.errors import DataError
from fintune.files import read_toml

Unit = Literal["plain", "percent", "percentage_point", "basis_point", "multiple", "duration"]
Role = Literal["", "year", "date", "ordinal", "label", "footnote", "list"]
Cue = Literal["", "down", "up", "aside"]
Miss = Literal["scale", "percent", "sign", "period", "rounding", "unit", "other"]

STRICT, LENIENT = Decimal("0.005"), Decimal("0.01")  # relative tolerances
_ROUGH = Decimal("0.02")  # a miss within 2 % of the gold is named "rounding", not "other"
_FRACTION = Decimal("1.5")  # largest |x| that may stand for a percentage written as a fraction
_CROWD = 6  # a sentence with more amounts than this is a list, and only its leading amount counts
_UNITS: tuple[Unit, ...] = ("percentage_point", "basis_point", "percent", "multiple", "duration")
_FACTOR: dict[str, Decimal] = {
    "percent": Decimal("0.01"),
    "percentage_point": Decimal("0.01"),
    "basis_point": Decimal("0.0001"),
}


def _by_word(table: dict[str, str]) -> dict[str, str]:
    """Each word of a table of numbers.toml -> its key."""
    return {word: key for key, words in table.items() for word in words.split()}


_TEXTS = read_toml(__file__, "numbers.toml")
_SCALES = {word: Decimal(10) ** int(power) for word, power in _by_word(_TEXTS["powers"]).items()}
_CURRENCIES = _by_word(_TEXTS["currencies"])
_HUNDREDTHS = {"p", "pence", "cent", "cents"}
_DOLLARS = {"$", "USD", "CAD", "AUD", "HKD", "NZD", "SGD"}  # "$" alone may be any of these
_ONES, _TENS = _TEXTS["counting"]["ones"].split(), _TEXTS["counting"]["tens"].split()
_WORDS = {word: n for n, word in enumerate(_ONES)}
_WORDS |= {word: 10 * n for n, word in enumerate(_TENS, start=2)}
_SAY: dict[str, str] = _TEXTS["words"]
_BIG = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


@dataclass(frozen=True, slots=True)
class Amount:
    """One number as it stands in a text.

    `value` is signed and absolute: mantissa x scale, percentages and basis points as fractions.
    `mantissa` is unsigned and as printed, `decimals` its number of printed decimals. `role` is
    empty for an amount, else why it is none: a year, part of a date, an ordinal, a label ("Note
    12", "S&P 500", "Q3"), a footnote mark or a list number. `cue` is the wording beside it:
    "down" ("a loss of"), "up", or "aside" for parentheses that may be a remark instead of a minus
    ("bonds (82%)", read as negative). `period` is the word of a duration ("month"). `start` and
    `end` are offsets into the text.
    """

    value: Decimal
    sign: int
    mantissa: Decimal
    scale: Decimal
    unit: Unit
    currency: str
    decimals: int
    start: int
    end: int
    role: Role = ""
    cue: Cue = ""
    period: str = ""
    is_range: bool = False

    @property
    def half_unit(self) -> Decimal:
        """Half a unit of the last printed digit, in the units of `value`."""
        return _half(self.decimals) * self.scale * _FACTOR.get(self.unit, Decimal(1))

    @property
    def bare(self) -> bool:
        """Printed without a scale and without a percent or other unit."""
        return self.scale == 1 and self.unit == "plain"


@dataclass(frozen=True, slots=True)
class NumberVerdict:
    """Whether a reply's number is right, at the asked tolerance and at both.

    `read` is the amount judged, with offsets into the reply; None when the reply holds no amount,
    which is for the caller to count as unparsed or abstained. `miss` is None when correct.
    """

    correct: bool
    strict: bool
    lenient: bool
    miss: Miss | None
    read: Amount | None


@dataclass(frozen=True, slots=True)
class Step:
    """One `a op b = c` of a reply, recomputed."""

    text: str
    computed: Decimal
    stated: Amount
    ok: bool


def _half(decimals: int) -> Decimal:
    return Decimal(5).scaleb(-decimals - 1)


def _with(amount: Amount, **changes: object) -> Amount:
    """The amount with other fields, its value recomputed."""
    new = replace(amount, **changes)  # type: ignore[arg-type]
    factor = _FACTOR.get(new.unit, Decimal(1))
    return replace(new, value=new.sign * new.mantissa * new.scale * factor)


# --- reading --------------------------------------------------------------------------------------

_CHARS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))), "\u00a0")
    | dict(zip("０１２３４５６７８９．％＄￥（）：’", "0123456789.%$¥():'", strict=True))
)
_NOISE = re.compile(
    r"""
    \\[dt]?frac\{(?P<over>[^{}]{1,80})\}\{(?P<under>[^{}]{1,80})\}   # \frac{a}{b}
    | \\(?P<sign>times|cdot|div|approx)\b
    | \\(?:text|math)(?:bf|rm|it)?\{ | \\(?:left|right)\b            # \text{ million}
    | \\(?=[%$&\#]) | \\[,;:!]                                       # \% and thin spaces
    | \$\$?(?=\S)(?P<math>[^$\n]{1,200}?)(?<=\S)\$\$?(?![0-9A-Za-z]) # $12.5$, not $5 to $10
    | (?<![0-9)])\*\* | \*\*(?![0-9(]) | `                           # markdown, not a power
    """,
    re.VERBOSE,
)
_SIGNS = {"times": "×", "cdot": "×", "div": "÷", "approx": "≈"}


def _clean(text: str) -> str:
    """The text without mark-up and with plain dashes and digits, each character in its place."""

    def plain(match: re.Match[str]) -> str:
        new = _SIGNS.get(match["sign"] or "", "")
        if match["over"]:
            new = f"(({_NOISE.sub(plain, match['over'])} ⁄{_NOISE.sub(plain, match['under'])}⁆"
        elif match["math"]:
            new = _NOISE.sub(plain, match["math"]) + " " * (match.end() - match.end("math"))
        return new.rjust(len(match[0]))

    return _NOISE.sub(plain, text.translate(_CHARS))


def _any(words: Iterable[str]) -> str:
    """An alternation, longest first, so that "seventeen" is not read as "seven"."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


def _before(pattern: str) -> re.Pattern[str]:
    """A pattern, without regard to case, for what stands right before a place."""
    return re.compile(rf"(?i:{pattern})\Z", re.VERBOSE)


def _ends(pattern: re.Pattern[str], text: str, at: int, width: int) -> re.Match[str] | None:
    """The match of a `_before` pattern among the `width` characters before `at`."""
    return pattern.search(text, max(0, at - width), at)


_ONE = rf"(?:{_any(_TENS)})[ -](?:{_any(_ONES[1:10])})\b"
_ONE = rf"(?:{_ONE}|(?:{_any(_WORDS)})\b)"
_HUNDRED = rf"{_ONE}(?:[ -]hundred\b(?:[ ](?:and[ ])?{_ONE})?)?"
_NUMBER = re.compile(
    rf"""
    (?<![0-9])(?:
      (?P<eu> 0,[0-9]{{1,12}}(?![0-9,])                                          # 0,125
        | [0-9]{{1,3}}(?:\.[0-9]{{3}}){{1,7}},[0-9]{{1,2}}(?![0-9,])             # 1.234,56
        | [0-9]{{1,3}}(?:\.[0-9]{{3}}){{2,7}}(?![0-9.])                          # 1.234.567
        | [0-9]{{1,3}}(?:\u00a0[0-9]{{3}}){{1,7}}(?:[.,][0-9]{{1,6}})?(?![0-9])  # no-break space
        | [0-9]{{1,3}}(?:[ ][0-9]{{3}}){{1,7}},[0-9]{{1,2}}(?![0-9])             # 1 234,5
        | [0-9]{{1,3}}(?:[ ][0-9]{{3}}){{2,7}}(?![0-9.,])                        # 1 234 567
        | (?<![0-9],)[0-9]{{1,12}},[0-9]{{1,2}}(?![0-9]|,[0-9]) )                # 12,5
      | (?P<us> [0-9]{{1,3}}(?:(?:[,']|\{{,\}})[0-9]{{3}}){{1,8}}(?:\.[0-9]{{1,30}})?(?![0-9])
        | [0-9]{{1,2}}(?:,[0-9]{{2}}){{1,6}},[0-9]{{3}}(?:\.[0-9]{{1,30}})?(?![0-9,]) )  # 12,34,567
      | (?P<section> [0-9]{{1,4}}(?:\.[0-9]{{1,4}}){{2,6}}(?![0-9]) )                    # 7.1.2
      | (?P<plain> [0-9]{{1,30}}(?:\.[0-9]{{1,30}})?[eE][-+]?[0-9]{{1,2}}(?![0-9A-Za-z])
        | [0-9]{{1,30}}(?![0-9])(?:\.[0-9]{{1,30}})? | \.[0-9]{{1,30}} )
    )
    | \b(?=[zotfsenhZOTFSENH]) (?i:
      (?P<words> {_HUNDRED}(?:[ -](?:{_any(_BIG)})\b(?:[ ](?:and[ ])?{_HUNDRED})?){{0,4}} ))
    """,
    re.VERBOSE,
)
_PREFIX = re.compile(
    rf"""
    (?P<sign>[-+])?[ \u00a0]?
    (?:(?P<currency>
      (?<![A-Za-z])(?:U\.?S\.?[ ]?\$|[A-Z]{{1,3}}\$|[Rr]s\.?|{_SAY["codes"]}) | [$€£¥₹]
    )[ \u00a0]?(?P<inner>\([ ]?-?|-)?)?                                  # $(3.4)  $-3.4
    \Z
    """,
    re.VERBOSE,
)
_SUFFIX = re.compile(
    rf"""
    (?: [ \u00a0-]{{0,8}}(?P<scale>[万億亿兆]
        | (?i:{_any(word for word in _SCALES if len(word) > 1)})(?![A-Za-z]))
      | (?: (?<=[0-9])(?P<letter>[kKmMbBtT]) | [ ](?P<capital>[KMBT]) )(?![\w&'$€£-]) )?
    (?: [ \u00a0-]{{0,8}}(?:
        (?P<percentage_point>
          (?i:(?:percentage|percent|per[ ]cent)[ -]points?|%[ -]?(?:points?|pts?)\b|ppts?|pps?)
          (?![A-Za-z]))
      | (?P<basis_point>(?i:basis[ -]points?|bps?)\b)
      | (?P<percent>%|(?i:per[ ]?cent|pct)(?![A-Za-z]))
      | (?P<multiple>(?:[xX×]|(?i:times|fold)\b)(?![A-Za-z0-9])(?![ ]*[0-9$(]))
      | (?P<duration>(?i:year|yr|quarter|month|week|day|hour))s?(?![A-Za-z]) ))?
    (?: [ \u00a0-]?(?P<currency>
        (?i:U\.?S\.?[ ]dollars?|dollars?|euros?|pounds?(?:[ ]sterling)?|yen|yuan|rupees?|francs?
          |pence|cents?|{_SAY["codes"]})(?![A-Za-z])
      | [€£¥₹円元] | (?<=[0-9])p(?![A-Za-z]) )(?![ ]?[0-9]))?
    """,
    re.VERBOSE,
)
_MONTH = rf"(?:(?i:{_SAY['months']})|May)\b\.?"
_DATE = re.compile(
    rf"""
    \b(?=[A-Za-z]){_MONTH}[ ](?:[0-3]?[0-9](?:st|nd|rd|th)?\b(?![.,]?[0-9%]))?
        (?:[ ]?,?[ ]?(?:19|20)[0-9]{{2}}\b)?
    | \b[0-3]?[0-9](?:st|nd|rd|th)?[ ](?:of[ ])?{_MONTH}(?:,?[ ](?:19|20)[0-9]{{2}}\b)?
    | \b(?:19|20)[0-9]{{2}}-[01][0-9]-[0-3][0-9]\b
    | \b[0-3]?[0-9]([/.-])[0-3]?[0-9]\1(?:19|20)?[0-9]{{2}}\b
    """,
    re.VERBOSE,
)
_LABEL = _before(rf"(?<![\w#])(?:{_SAY['labels']})\.?[ #-]{{0,2}}")
_FISCAL = _before(r"\b(?:FY|CY|fiscal|year)[ ']?|(?<!\w)'")
_NEGATIVE = _before(r"\b(?:negative|minus)[ ]")
_GLUED = _before(r"[A-Z_][-_]?|[0-9]:")  # Q3, COVID-19, 2:1
_GLUE = re.compile(r"[A-Za-z_]|\([a-z]\)|-[A-Za-z]")  # 5G, 401(k), 10-K, two-step
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
_BULLET = _before(r"(?:\A|\n)\s{0,3}[*(>-]{0,2}\s?")
_LISTED = re.compile(r"[.)][ \t]+(?!thousand|[mb]illion|trillion|[bm]n\b)\S")
_COUNTED = re.compile(rf"(?i:[ ](?:{_SAY['counted']})\b)")
_CLOSED = re.compile(  # (12.5)%  (2,085) thousand
    r"[ ]?\)(?:[ ]?(?P<percent>%|percent\b)"
    r"|[ ](?P<scale>(?i:thousand|million|billion|trillion|[bm]n))\b)?"
)
_GROUPS_AFTER = re.compile(r"[ ]{0,2}(?:[+*/×÷^⁄]|-[ ]?[0-9($€£])")
_GROUPS_BEFORE = _before(r"(?:[+*/×÷^(]|[0-9)%][ ]{0,2}-)[ ]{0,2}")
_TINY = re.compile(r"\([ ]?[0-9]{1,2}[ ]?\)")
_VERB = _before(r"(?:\b(?:is|was|were|are|be|of|by|at|to|an?|the|about|approximately)|[|=:])[ ]*")
_DOWN, _UP, _HEDGES = _SAY["down"], _SAY["up"], _SAY["hedges"]
_CUE = re.compile(
    rf"""\b(?=[cdf-jlnorstuCDF-JLNORSTU])(?<![(])(?i:
      (?P<down>(?P<down_noun>{_DOWN}|cash[ ]used|negative[ ]growth)|{_SAY["down_verbs"]})
      | (?P<up>(?P<up_noun>{_UP})|{_SAY["up_verbs"]}) )\b""",
    re.VERBOSE,
)
_LINK = _before(rf"(?:by|of|was|is|were|are|at|totall?ed|the|:|{_HEDGES})*")
_TAIL = _before(  # "decrease in revenue between 2017 and 2018 was ", "fell in the quarter by "
    rf"""(?:[^.;,:()|\n0-9]|(?:19|20)[0-9]{{2}}){{0,60}}\b(of|was|is|were|by|totall?ed)[ ]
    (?:{_HEDGES})*"""
)
_CUE_AFTER = re.compile(
    rf"""(?i:[ ](?:(?!of|in|from|to|on|and|or|the|a\b)[a-z-]{{1,20}}[ ]){{0,2}}
    (?:(?P<down>{_DOWN}|lower)|(?P<up>{_UP}|higher))\b)(?![ ](?:of|from|in[ ]20))""",
    re.VERBOSE,
)
_JOIN = re.compile(r"-|(?i:[ ](to|and|through|or)[ ])")
_RESTATED = re.compile(rf"(?i:,?[ ](?:or|representing)[ ](?:{_HEDGES})*)")
_MORE = re.compile(r"[ )\]]{0,8}[=*/×÷+]")  # "3-5) / 2" subtracts
_FROM = _before(r"\b(?:from|versus|vs\.?|than)[ ]?")
_BETWEEN = _before(r"\b(?:between|either)[ ]")


def read_amounts(text: str) -> list[Amount]:
    """Every number of a text, in order, those that are no amounts marked by `role`.

    "3M" is the company, "1,234" is grouped and "12,5" has a decimal comma; a small whole number
    in parentheses after a word is a footnote mark. The first end of "$10 to $12 million" takes
    the scale and unit of the second, and both are marked `is_range` ("from ... to" is a change,
    not a range). About 0.5 ms for 500 characters, linear in the length.
    """
    return _scan(_clean(text))


def _scan(text: str) -> list[Amount]:
    found: list[Amount] = []
    dates = [match.span() for match in _DATE.finditer(text)]
    cues = list(_CUE.finditer(text))
    cue = date = 0
    for match in _NUMBER.finditer(text):
        start = match.start()
        if found and start < found[-1].end:
            continue
        while date < len(dates) and dates[date][1] <= start:
            date += 1
        while cue < len(cues) and cues[cue].end() <= start:
            cue += 1
        dated = date < len(dates) and dates[date][0] <= start
        found.append(_amount(text, match, dated, cues[cue - 1] if cue else None))
    _join_ranges(text, found)
    return found


def _amount(text: str, match: re.Match[str], dated: bool, cue: re.Match[str] | None) -> Amount:
    mantissa, scale = _mantissa(match)
    before, after = _ends(_PREFIX, text, match.start(), 10), _SUFFIX.match(text, match.end())
    assert before and after  # both patterns also match nothing
    mark = before["currency"] or after["currency"] or ""
    mark = mark.replace(" ", "").replace(".", "").lower()
    word = after["scale"] or after["letter"] or after["capital"] or ""
    scale *= _SCALES[word.lower()] if word else 1
    scale /= 100 if mark in _HUNDREDTHS else 1
    named: list[Unit] = [name for name in _UNITS if after[name]]
    unit: Unit = named[0] if named else "plain"
    end = after.end()
    if unit == "duration" and re.fullmatch("(?:19|20)[0-9]{2}", match[0]):  # "the 2019 quarter"
        unit, end = "plain", match.end()
    sign, begin = _sign(text, before, match.start())
    exponent = mantissa.as_tuple().exponent
    assert isinstance(exponent, int)  # digits only: never NaN or infinite
    rich = bool(word or mark or exponent or sign < 0 or unit != "plain" or scale != 1)
    role: Role = "date" if dated else _role(text, match, begin, end, rich)
    wording: Cue = ""
    inner = "(" in text[begin : match.start()]  # $(3.4)
    first = begin if inner else text.rfind("(", max(0, begin - 2), begin)
    closed = _CLOSED.match(text, end) if first >= 0 and not role and sign > 0 else None
    if closed and not text[first + 1 : begin].strip():
        outer = closed["scale"] if scale == 1 else None
        marked = bool(mark or outer or closed["percent"] or scale != 1 or unit != "plain")
        amountlike = marked or rich or "," in match[0]
        kind = _parenthesis(text, first, closed.end(), amountlike, marked)
        if kind == "footnote":
            role = "footnote"
        elif kind:
            sign, begin, end = -1, first, closed.end()
            wording = "aside" if kind == "aside" else ""
            scale = _SCALES[outer.lower()] if outer else scale
            unit = "percent" if closed["percent"] and unit == "plain" else unit
    if not role and not wording:
        wording = _cue(text, cue, begin, end)
    value = sign * mantissa * scale * _FACTOR.get(unit, Decimal(1))
    code = _CURRENCIES.get(mark, mark.upper())
    period = (after["duration"] or "").lower().replace("yr", "year")
    printed = (value, sign, mantissa, scale, unit, code, -exponent)
    return Amount(*printed, start=begin, end=end, role=role, cue=wording, period=period)


def _mantissa(match: re.Match[str]) -> tuple[Decimal, Decimal]:
    """What the matched digits or words say, and the scale word among them."""
    token = match[0]
    if match.lastgroup == "words":
        words = re.findall("[a-z]+", token.lower())
        total = current = 0
        for word in words:
            if word in _BIG:
                total, current = total + current * _BIG[word], 0
            else:
                current = current * 100 if word == "hundred" else current + _WORDS.get(word, 0)
        if words[-1] in _BIG and len(_BIG.keys() & set(words)) == 1:
            scale = Decimal(_BIG[words[-1]])
            return Decimal(total // int(scale)), scale
        return Decimal(total + current), Decimal(1)
    if match.lastgroup != "plain":
        token = re.sub("[ \u00a0'{}]", "", token)
        if match.lastgroup == "us":
            token = token.replace(",", "")
        elif match.lastgroup == "section":
            token = ".".join(token.split(".")[:2])
        elif "," in token or token.count(".") > 1:
            token = token.replace(".", "").replace(",", ".")
    return Decimal(token), Decimal(1)


def _sign(text: str, before: re.Match[str], start: int) -> tuple[int, int]:
    """The sign that stands before a number, and where the number with its marks begins.

    A hyphen after a letter, digit or bracket joins or subtracts ("10-12", "COVID-19", "8 - 3").
    """
    begin = before.start("currency") if before["currency"] else start
    if (before["inner"] or "").endswith("-"):
        return -1, begin
    if not before["sign"]:
        worded = _ends(_NEGATIVE, text, begin, 10)
        return (-1, worded.start()) if worded else (1, begin)
    at = before.start("sign")
    previous = text[at - 1 : at] if at else ""
    if previous.isalnum() or previous in tuple(")%]'}"):
        return 1, begin
    if text[at + 1] in " \u00a0":  # "= - 5" is minus five; "a - 5" and a bullet are not
        back = text[max(0, at - 4) : at].rstrip()
        if not back or back[-1] not in "=:(|":
            return 1, begin
    return (-1 if before["sign"] == "-" else 1), at


def _role(text: str, match: re.Match[str], begin: int, end: int, rich: bool) -> Role:
    """Why a number is no amount, or an empty string; `rich` ones carry a mark of an amount."""
    digits = match[0]
    if match.lastgroup == "words":
        return "label" if _GLUE.match(text, end) or (digits.lower() == "one" and not rich) else ""
    if match.lastgroup == "section" or (
        begin == match.start() and _ends(_GLUED, text, begin, 2) is not None
    ):
        return "year" if _ends(_FISCAL, text, begin, 8) else "label"
    if _ORDINAL.match(text, end):
        return "ordinal"
    if _GLUE.match(text, end) or text[begin:end] == "3M":  # the company
        return "label"
    if not rich:
        if text[begin - 1 : begin] == "[" and text[end : end + 1] == "]" and len(digits) <= 3:
            return "footnote"
        if len(digits) in (2, 4) and _ends(_FISCAL, text, begin, 8):
            return "year"
        if len(digits) == 4 and digits[:2] in ("19", "20") and not _COUNTED.match(text, end):
            return "year"
        if len(digits) <= 3 and _ends(_BULLET, text, begin, 8) and _LISTED.match(text, end):
            return "list"
    plain = not rich or text[begin:end] == digits
    return "label" if plain and _ends(_LABEL, text, begin, 16) else ""


def _parenthesis(text: str, first: int, stop: int, rich: bool, marked: bool) -> str:
    """What parentheses around one number mean: "minus", "aside", "footnote" or "" (grouping).

    `(1,234)` is the accounting minus. `bonds (82%)` and `5.2 (5.2)` may be remarks, asides: either
    sign will do. `sales (1)` and `12.3(1)` are footnote marks; `= (5)` and a table cell are not.
    Next to an operator they group.
    """
    if _GROUPS_AFTER.match(text, stop) or _ends(_GROUPS_BEFORE, text, first, 6):
        return ""
    back = text[max(0, first - 4) : first].rstrip(" ")[-1:]
    linked = not back or back in "\n$" or _ends(_VERB, text, first, 16)
    whole = first == 0 and text[stop : stop + 1] in ("", ",")  # "(43), (118) thousand"
    if not rich and _TINY.match(text, first) and not whole and (not linked or not back):
        return "footnote"
    return "minus" if linked or (back.isalpha() and not marked) else "aside"


def _cue(text: str, nearest: re.Match[str] | None, begin: int, end: int) -> Cue:
    if nearest and begin - nearest.end() <= 70:
        tail = _TAIL.match(text, nearest.end(), begin)
        far = tail and (nearest["down_noun"] or nearest["up_noun"] or tail[1].lower() == "by")
        if far or _LINK.match(text, nearest.end(), begin):
            return "down" if nearest["down"] else "up"
    after = _CUE_AFTER.match(text, end)
    return "" if not after else "down" if after["down"] else "up"


def _join_ranges(text: str, found: list[Amount]) -> None:
    """Mark both ends of each range in place; the first takes what only the second prints."""
    for left in range(len(found) - 1):
        a, b = found[left], found[left + 1]
        if a.cue and not b.cue and not b.role and _RESTATED.fullmatch(text, a.end, b.start):
            found[left + 1] = replace(b, cue=a.cue)  # "decreased by $5 million, or 3.7%"
        join = _JOIN.fullmatch(text, a.end, b.start) if b.start - a.end <= 9 else None
        if not join or a.role or b.role or b.sign < 0 or a.cue in ("up", "down"):
            continue
        if _MORE.match(text, b.end):
            continue
        if a.unit not in ("plain", b.unit) or a.currency not in ("", b.currency or a.currency):
            continue
        if (join[1] or "").lower() in ("and", "or") and not _ends(_BETWEEN, text, a.start, 10):
            continue
        scale = b.scale if a.scale == 1 else a.scale
        a = _with(a, scale=scale, unit=b.unit, currency=a.currency or b.currency)
        if not join[1] and a.value >= b.value:  # a subtraction
            continue
        is_range = not _ends(_FROM, text, a.start, 8)
        found[left] = replace(a, is_range=is_range)
        found[left + 1] = replace(b, is_range=is_range, currency=a.currency)


# --- the answer of a reply ------------------------------------------------------------------------

_STOP = re.compile(r"\n+|[.!?;。][\"')\]]{0,3}(?:\s+|\Z)")
_ABBREVIATION = _before(rf"\b(?:{_SAY['abbreviations']})")
_MARKER = re.compile(
    r"(?i:\\boxed\{|\#{4}|<answer>|\banswer\b(?:[ ]to[^.:\n]{1,60}?)?[ ]?(?:\bis\b|\bwas\b|[=:]))"
)
_BECAUSE = re.compile(
    r"(?i:\b(?:calculated|computed|derived|because|since|based|compared|versus|vs|where)\b)"
)
_RESULT = _before(
    r"""(?:[=≈]|\b(?:equals?|gives?|yields?|results?[ ]in|comes?[ ]to|therefore|thus|hence))
    [^0-9]{0,14}"""
)
_OPERATOR = re.compile(r"[ \u00a0)\]}⁆]{0,12}([-+*/×÷·^⁄]|[xX](?=[ (]))[ \u00a0(\[{]{0,12}")
_YES_NO = re.compile(r"(?i:\s*(?:yes|no)\b)")
_STATES = _before(  # what stands before the one amount of an answer in a sentence, or in a phrase
    rf"""(?:\b(?:is|was|were|are|be|equals?|totall?ed|amounted[ ]to|reached)|[=:≈])[ ]
    (?:{_HEDGES})*"""
)
_PHRASES = _before(rf"\b(?:of|to|at|by)[ ](?:{_HEDGES})*")
_OPEN = re.compile(r"(?i:\bor (?:more|less|greater|fewer)\b)")


def answer_amounts(text: str) -> list[Amount]:
    """The amounts that may be the answer of a reply, the most plausible first.

    After the last "the answer is", `####` or `\\boxed{`: those of that statement. Without one:
    those of the last two and the first sentence that hold amounts, the rule that agreed best with
    FinanceBench's human labels (95.8 % of 832). Years, dates, labels, operands of a written
    calculation and the ends of ranges are no answers; a sentence of more than six amounts counts
    only with its leading one.
    """
    clean = _clean(text)
    return _answers(clean, _eligible(clean, _scan(clean)))


def _eligible(text: str, amounts: list[Amount]) -> list[Amount]:
    operands: set[int] = set()
    for left in range(len(amounts) - 1):
        a, b = amounts[left], amounts[left + 1]
        sign = _OPERATOR.fullmatch(text, a.end, b.start) if b.start - a.end <= 25 else None
        if sign and (a.role == b.role or sign[1] != "-"):  # "2018 - 1,577" subtracts nothing
            operands |= {left, left + 1}
    return [
        amount
        for index, amount in enumerate(amounts)
        if not amount.role and not amount.is_range and index not in operands
    ]


def _sentences(text: str) -> list[int]:
    """Where the sentences of a text end."""
    ends = [
        match.end()
        for match in _STOP.finditer(text)
        if match[0][0] != "." or not _ends(_ABBREVIATION, text, match.start(), 8)
    ]
    return ends if ends and ends[-1] == len(text) else [*ends, len(text)]


def _answers(text: str, amounts: list[Amount]) -> list[Amount]:
    if not amounts:
        return []
    ends = _sentences(text)
    for marker in reversed(list(_MARKER.finditer(text))):
        at = bisect_left(ends, marker.end() + 1)
        if at + 1 < len(ends) and not text[marker.end() : ends[at]].strip("*: \n"):
            at += 1  # "Answer:" on a line of its own
        because = _BECAUSE.search(text, marker.end(), ends[min(at, len(ends) - 1)])
        stop = because.start() if because else ends[min(at, len(ends) - 1)]
        stated = [amount for amount in amounts if marker.end() <= amount.start < stop]
        if stated:
            return _led(text, stated)
    groups: dict[int, list[Amount]] = {}
    for amount in amounts:
        groups.setdefault(bisect_left(ends, amount.start + 1), []).append(amount)
    spoken = [_led(text, group) for group in groups.values()]
    chosen = [spoken[-1], *spoken[-2:-1], *(spoken[:1] if len(spoken) > 2 else [])]
    return [amount for group in chosen for amount in group]


def _led(text: str, amounts: list[Amount]) -> list[Amount]:
    """The amounts of one sentence, the last that follows "=" or "gives" first, else as written."""
    results = [amount for amount in amounts if _ends(_RESULT, text, amount.start, 26)]
    lead = results[-1] if results else amounts[0]
    if len(amounts) > _CROWD:
        return [lead]
    return [lead, *(amount for amount in amounts if amount is not lead)]


def is_number_answer(text: str) -> bool:
    """Whether a reference answer is, as a whole, one number that `compare` can check.

    Yes for "$1.2 billion", "(1,234)", "2.9 years", "(3 + 5) / 2 = 4", "The answer is 7.5%, ..."
    and a short sentence that ends in its only amount. No for a bare year (a label for exact
    match), several amounts, ranges, yes or no with a number, and prose that mentions a number.
    """
    clean = _clean(text.strip())
    amounts = _scan(clean) if len(clean) <= 2000 else []
    eligible = _eligible(clean, amounts)
    if not eligible or _YES_NO.match(clean):
        return False
    stated = _answers(clean, eligible)
    if _MARKER.search(clean):
        return len({amount.value for amount in stated}) == 1
    if len({amount.value for amount in eligible}) != 1 or any(a.is_range for a in amounts):
        return False
    rest = clean
    for amount in reversed(amounts):
        rest = rest[: amount.start] + rest[amount.end :]
    if not any(character.isalpha() for character in rest):
        return True
    one = stated[0]
    words = len(clean.split())
    if words > 25 or len(clean[one.end :].split()) > 6 or len(_sentences(clean)) > 1:
        return False
    before = _ends(_STATES, clean, one.start, 30) or (
        words <= 8 and _ends(_PHRASES, clean, one.start, 30)
    )
    return bool(before) and not _OPEN.search(clean, one.end)


# --- comparing ------------------------------------------------------------------------------------

_THOUSAND = Decimal(1000)  # "in 000s"
_ASKED_SCALE = re.compile(
    rf"""(?i:(?:\bin|\(|\bUSD|\bEUR|[$€£]|\bdollars?|\bexpressed[ ]as|\bnearest)[ ]?
    (?:the[ ])?(?:nearest[ ])?(?:(?:U\.?S\.?[ ]?)?[$€£]|U\.?S\.?D?|EUR|GBP|INR)?
    [ ]?(?:dollars?[ ])?'?
    (?P<scale>000|{_any(w for w in _SCALES if len(w) > 1 and _SCALES[w] > 999)})s?\b)""",
    re.VERBOSE,
)
_ASKED_UNIT = re.compile(
    r"""(?i:(?:\bin|\bmany|\bof|\()[ ]?
    (?:(?P<basis_point>basis[ -]points?|bps)|(?P<percentage_point>percentage[ -]points?))\b)""",
    re.VERBOSE,
)
_ASKED_PERCENT = re.compile(
    r"(?i:(?:in|what|as|[(]) ?%|% ?[?)]|\b(?:percent|per cent|margin|growth|portion|proportion"
    r"|share of))"
)
_ASKED_RATE = re.compile(r"(?i:%|\b(?:rates?|yield|returns?|ro[aei]|apr|wacc)\b)")
_EITHER = re.compile(  # "increase/(decrease)" and "income (loss)" ask for neither
    r"(?i:\([a-z ]{1,20}\)|\b(?:increase|gain|profit|income)s?[ ]?(?:/|or|and)[ ]?"
    r"(?:decrease|loss)(?:es)?)"
)
_FALLS = re.compile(rf"(?i:\b(?:{_DOWN}|decreas|declin|reduc|fell|drop|shr[iau]nk))")
_RISES = re.compile(r"(?i:\b(?:increas|growth|grow|gain|rise|rose))")
_ASKED_FALL = re.compile(
    rf"""(?i:\b(?:the|this|net|total|percent(?:age)?|trade|amount[ ]of|%)[ ](?:{_DOWN})\b
    |\bdid\b.{{1,120}}?\b(?:decrease|decline|fall|drop|shrink|reduce|lose)\b)""",
    re.VERBOSE,
)
_SAID = _before(r"(?:^|\b(?:is|was|were|are)|[=:{#])[ ]*")
_YEAR = re.compile(r"(?:19|20)[0-9]{2}(?![0-9])")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a question says of its answer.

    A scale or unit to give it in, and the scales that tables of the context lend it; that it is a
    percentage, or a rate and so perhaps one; that it asks for a fall (so that -5 means 5), or only
    names one; that there is a question at all.
    """

    scale: Decimal | None
    lent: frozenset[Decimal]
    unit: Unit | None
    percent: bool
    rate: bool
    fall: bool
    names_fall: bool
    known: bool

    @classmethod
    def of(cls, question: str, context: str) -> "_Asked":
        text = question.translate(_CHARS)
        scale, unit = _ASKED_SCALE.search(text), _ASKED_UNIT.search(text)
        named = {match["scale"] for match in _ASKED_SCALE.finditer(context.translate(_CHARS))}
        neutral = _EITHER.sub(" ", text)
        falls = bool(_FALLS.search(neutral)) and not _RISES.search(neutral)
        return cls(
            scale=_SCALES.get(scale["scale"].lower(), _THOUSAND) if scale else None,
            lent=frozenset(_SCALES.get(word.lower(), _THOUSAND) for word in named),
            unit=next((name for name in _UNITS[:2] if unit and unit[name]), None),
            percent=bool(_ASKED_PERCENT.search(text)),
            rate=bool(_ASKED_PERCENT.search(text) or _ASKED_RATE.search(text)),
            fall=falls and bool(_ASKED_FALL.search(neutral)),
            names_fall=falls,
            known=bool(text.strip()),
        )


def compare(
    gold: Amount | str,
    reply: str,
    *,
    tolerance: Literal["strict", "lenient"] = "strict",
    question: str = "",
    context: str = "",
    decimals: int | None = None,
) -> NumberVerdict:
    """Whether a reply gives the gold number: |x - g| <= max(rel x |g|, half a printed unit of g).

    `rel` is 0.5 % strict and 1 % lenient; both are returned, `tolerance` chooses which one is
    `correct`. The reply is right when any of its `answer_amounts` is.

    - A gold in percent takes 12.5 %, a bare 12.5, and a bare 0.125 up to 1.5. A bare gold takes
      its percentage by value (0.125 = 12.5 %); where `question` asks for a percentage also a bare
      12.5, and the percent sign beside a bare gold above 1.5.
    - Percent and percentage points differ, unless the question asks for points; basis points may
      stand for either.
    - A unit in the question ("in USD millions") is the unit of a bare gold and of a bare reply,
      applied once. Without one, a bare number is not a scaled one: 388 for "388 million" is a
      scale miss. A scale that only `context` names ("in thousands" over a table) lets the reply
      add it to a bare gold, or write the gold out in full with its currency.
    - A fall in words ("decreased by 5 %") is negative. Where the question names a fall or a loss,
      a positive gold takes it, and a negative gold takes a number without a sign; where it asks
      for one ("by how much did it fall", "the net loss"), a positive gold also takes a minus.
    - A bare year as gold must be met exactly, by the first year of the answer.

    Args:
        gold: the reference; of a text, the first of `answer_amounts`.
        question: what was asked, without documents and tables; those are `context`.
        context: names table scales, and tells a value of another year (`period`) from others.
        decimals: printed decimals of the gold where trailing zeros say nothing ("$1577.00").

    Raises:
        DataError: the gold holds no number.
    """
    target = _gold(gold)
    target = target if decimals is None else replace(target, decimals=decimals)
    asked, clean = _Asked.of(question, context), _clean(reply)
    amounts = _scan(clean)
    candidates = _answers(clean, _eligible(clean, amounts))
    exact = target.role == "year" and not asked.scale
    if exact:
        candidates += _years(clean, amounts)[:1]
    else:  # "The total is 2015." may be 2,015
        candidates += [a for a in _years(clean, amounts) if _ends(_SAID, clean, a.start, 12)]
    if not candidates:  # only operands or a range: something was said, nothing was answered
        said = next((amount for amount in amounts if not amount.role), None)
        return NumberVerdict(False, False, False, "other", said)
    targets = _targets(target, asked)
    for rel in (Decimal(0),) if exact else (STRICT, LENIENT):
        for read in candidates:
            if _agrees(read, targets, asked, rel):
                strict = rel != LENIENT
                correct = strict or tolerance == "lenient"
                return NumberVerdict(correct, strict, True, None if correct else "rounding", read)
    misses: list[Miss] = ["other" if exact else _miss(read, targets, asked) for read in candidates]
    named = next((i for i, miss in enumerate(misses) if miss not in ("other", "rounding")), 0)
    miss, read = misses[named], candidates[named]
    if miss in ("other", "rounding") and _other_period(target, read, clean, question, context):
        miss = "period"
    return NumberVerdict(False, False, False, miss, read)


def _years(text: str, amounts: list[Amount]) -> list[Amount]:
    """The years of the answer, as amounts."""
    return _answers(text, [replace(year, role="") for year in amounts if year.role == "year"])


def _gold(gold: Amount | str) -> Amount:
    if isinstance(gold, Amount):
        return gold
    clean = _clean(gold)
    amounts = _scan(clean)
    for found in _answers(clean, _eligible(clean, amounts)):
        return found
    for found in _years(clean, amounts):
        return replace(found, role="year")
    for found in amounts:
        if found.role == "label":  # "one"
            return replace(found, role="")
    raise DataError(
        f"the reference {gold[:80]!r} holds no number",
        fix="choose checkable rows with is_number_answer",
    )


def _targets(gold: Amount, asked: _Asked) -> list[Amount]:
    """The gold in each way that it may be meant; a bare one takes its unit from the question."""
    if not gold.bare:
        return [gold]
    if asked.unit and not gold.currency:
        return [_with(gold, unit=asked.unit)]
    if asked.scale:
        return [_with(gold, scale=asked.scale)]
    targets = [gold]
    if asked.rate and not gold.currency and gold.mantissa > _FRACTION:
        targets.append(_with(gold, unit="percent"))
    return targets


def _readings(amount: Amount, target: Amount, asked: _Asked) -> Iterator[Decimal]:
    """The unsigned values that a reply's amount may have, in the units of the target."""
    value, factor = abs(amount.value), _FACTOR.get(target.unit)
    if target.bare and not asked.percent and (amount.scale != 1 or amount.currency):
        yield from (value / scale for scale in asked.lent)
    if not amount.bare:
        yield value
        if asked.scale and asked.percent and amount.unit in _FACTOR:
            yield value * asked.scale  # "the percentage change in millions" has no scale
    elif factor:
        yield value * factor
        if value <= _FRACTION:
            yield value
    else:
        yield value
        if asked.scale or target.scale < 1:
            yield value * (asked.scale or target.scale)
        fraction = target.bare and target.mantissa <= _FRACTION
        if asked.percent and fraction and not (target.currency or amount.currency):
            yield value / 100


def _near(value: Decimal, target: Amount, rel: Decimal) -> bool:
    size = abs(target.value)
    return abs(value - size) <= max(rel * size, target.half_unit)


def _agrees(amount: Amount, targets: list[Amount], asked: _Asked, rel: Decimal) -> bool:
    return any(
        _near(value, target, rel) and (value == 0 or _same_sign(amount, target, asked))
        for target in targets
        if not _clash(amount, target, asked)
        for value in _readings(amount, target, asked)
    )


def _clash(amount: Amount, target: Amount, asked: _Asked) -> bool:
    """Whether two printed units exclude each other."""
    money = {target.currency, amount.currency} - {""}
    if len(money) == 2 and not ("$" in money and money <= _DOLLARS):
        return True
    units = {target.unit, amount.unit} - {"plain"}
    if units == {"percent", "percentage_point"}:
        return asked.unit is None
    if "duration" in units and (len(units) == 2 or money):
        return True
    if units == {"duration"} and target.period and amount.period:
        return target.period != amount.period
    return bool(
        (target.currency and amount.unit != "plain") or (amount.currency and target.unit != "plain")
    )


def _same_sign(amount: Amount, target: Amount, asked: _Asked) -> bool:
    if amount.cue == "aside" or target.value == 0:
        return True
    falling = target.cue == "down"
    if amount.sign < 0:
        return target.sign < 0 or falling or asked.fall
    if amount.cue == "down":
        return target.sign < 0 or falling or asked.names_fall or not asked.known
    return target.sign > 0 or (asked.names_fall and amount.cue != "up")


def _miss(amount: Amount, targets: list[Amount], asked: _Asked) -> Miss:
    """Why a reply's amount is wrong, the most telling reason first."""
    pairs = [(value, target) for target in targets for value in _readings(amount, target, asked)]

    def off_by(*powers: int) -> bool:
        factors = [Decimal(10) ** power for power in powers]
        return any(v and _near(v * factor, t, LENIENT) for v, t in pairs for factor in factors)

    if off_by(0):
        return "unit" if all(_clash(amount, target, asked) for target in targets) else "sign"
    money = amount.currency or targets[0].currency or amount.scale * targets[0].scale != 1
    if off_by(2, -2):
        return "scale" if money else "percent"
    if off_by(3, -3, 6, -6, 9, -9, 12, -12, 1, -1, 4, -4, 5, -5, 7, -7):
        return "scale"
    rough = (
        abs(v - abs(t.value)) <= max(_ROUGH * abs(t.value), amount.half_unit) for v, t in pairs
    )
    return "rounding" if any(rough) and _same_sign(amount, targets[0], asked) else "other"


def _other_period(gold: Amount, read: Amount, reply: str, question: str, context: str) -> bool:
    """Whether the reply took the right line of the wrong year.

    It did where a line of the context holds both numbers, or where the sentence of the number
    names years and none of them is one that the question names.
    """
    for line in context.splitlines():
        printed = {amount.mantissa for amount in read_amounts(line)}
        if gold.mantissa in printed and read.mantissa in printed:
            return True
    ends = _sentences(reply)
    at = bisect_left(ends, read.start + 1)
    said = set(_YEAR.findall(reply, ends[at - 1] if at else 0, ends[at]))
    wanted = set(_YEAR.findall(question))
    return bool(said and wanted) and not said & wanted


# --- grounding and steps --------------------------------------------------------------------------

_CONSTANTS = {Decimal(number) for number in (12, 52, 100, 360, 365, 1000)}
_PAIRS, _TRIPLES = 400, 32  # context numbers searched in pairs, and in threes (496 pairs)
_EQUALS = re.compile(
    r"[ \u00a0)\]}⁆]{0,12}(?:=|≈|equals?)[ \u00a0~(\[{]{0,12}(?:(?:approx\w*\.?|about)[ ])?"
)
_OPERATORS = str.maketrans("×·xX÷[]{}", "****/()()") | {ord("⁄"): ")/(", ord("⁆"): "))"}
_OPERATIONS: dict[type[ast.operator], Callable[[Decimal, Decimal], Decimal]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def ungrounded(reply: str, context: str) -> list[Amount]:
    """The amounts of a reply that are neither in its context nor derivable from it.

    Grounded: printed in the context, or met at the reply's printed precision by two context
    numbers (sum, difference, product, quotient, relative change, mean) or, with four and more
    significant digits, by three. A grounded amount may serve the next. Signs are ignored; whole
    numbers up to 10, years, dates, labels and the constants of a calculation (100, 12, 365) are
    not asked about. At most 400 context numbers are searched in pairs and 32 in threes, those
    that the reply quotes first: about 10 ms for each number of the reply.
    """
    facts = [amount for amount in read_amounts(context) if not amount.role]
    asked = [amount for amount in read_amounts(reply) if not amount.role]
    quoted = {amount.mantissa for amount in asked}
    facts.sort(key=lambda fact: fact.mantissa not in quoted)
    scaled = sorted(float(abs(fact.value)) for fact in facts)
    printed = sorted(float(fact.mantissa) for fact in facts)
    unscaled = sorted(float(fact.mantissa) for fact in facts if fact.scale == 1)
    sizes = (float(size) for fact in facts for size in (abs(fact.value), fact.mantissa) if size)
    pool = list(dict.fromkeys(sizes))[:_PAIRS]
    missing = []
    for amount in asked:
        whole = amount.bare and not amount.currency and amount.decimals <= 0
        if whole and (amount.mantissa <= 10 or amount.mantissa in _CONSTANTS):
            continue
        value, half = float(abs(amount.value)), float(amount.half_unit)
        size, unit = float(amount.mantissa), float(_half(amount.decimals))
        as_value, as_printed = (value - half, value + half), (size - unit, size + unit)
        spans = {as_value, as_printed, ((size - unit) / 100, (size + unit) / 100)}
        long = len(amount.mantissa.as_tuple().digits) >= 4
        if (
            _within(scaled, *as_value)
            # a scale may stand on one side only: "in thousands" over the table
            or _within(printed if amount.scale == 1 else unscaled, *as_printed)
            or (value and any(_derivable(*span, pool, long) for span in spans))
        ):
            pool = [value, *pool] if value else pool
        else:
            missing.append(amount)
    return missing


def _derivable(low: float, high: float, pool: list[float], long: bool) -> bool:
    """Whether two of the pool, or for `long` numbers three, make a number in [low, high]."""
    values, few = sorted(pool), sorted(pool[:_TRIPLES])
    if any(_pair(a, low, high, values) for a in values):
        return True
    return long and any(_triple(few, first, low, high) for first in range(len(few)))


def _within(values: list[float], low: float, high: float) -> bool:
    edge = 1e-12 * abs(high)
    at = bisect_left(values, low - edge)
    return at < len(values) and values[at] <= high + edge


def _pair(a: float, low: float, high: float, values: list[float]) -> bool:
    """Whether some b makes a+b, b-a, a-b, a*b, a/b, (a+b)/2, a/b-1 or 1-a/b fall in [low, high]."""
    spans = [
        (low - a, high - a),
        (a + low, a + high),
        (a - high, a - low),
        (low / a, high / a),
        (2 * low - a, 2 * high - a),
    ]
    ratios = [(low, high), (1 + low, 1 + high), (1 - high, 1 - low)]
    spans += [(a / top, a / bottom) for bottom, top in ratios if bottom > 0]
    return any(_within(values, *span) for span in spans)


def _triple(few: list[float], first: int, low: float, high: float) -> bool:
    a = few[first]
    for b in few[first + 1 :]:
        if _within(few, 3 * low - a - b, 3 * high - a - b):  # the mean
            return True
        for d in {a + b, b - a, a * b, a / b, b / a} - {0.0}:
            spans = [(low - d, high - d), (d + low, d + high), (d - high, d - low)]
            spans.append((low / d, high / d))
            if low > 0:
                spans.append((d / high, d / low))
            if any(_within(few, *span) for span in spans):
                return True
    return False


def check_steps(reply: str) -> list[Step]:
    """Every written `a op b ... = c` of a reply, recomputed with `Decimal`.

    Operators + - * / ^ (also x, ×, ·, ÷, \\frac) and parentheses. A step is ok when what is
    stated, by value, as printed or as a percentage, is within half a unit of its last printed
    digit, widened by the relative half units of the operands that print decimals. Of `a op b = c
    op d = e` both c and e are checked. What cannot be computed (a division by zero, more than 40
    operands) is no step.
    """
    text = _clean(reply)
    amounts = _scan(text)
    steps = []
    for at in range(2, len(amounts)):
        stated, first = amounts[at], at - 1
        if not _EQUALS.fullmatch(text, amounts[at - 1].end, stated.start):
            continue
        while first and _OPERATOR.fullmatch(text, amounts[first - 1].end, amounts[first].start):
            first -= 1
        operands = amounts[first:at]
        if not 2 <= len(operands) <= 40:
            continue
        stops = [*(amount.start for amount in operands[1:]), stated.start]
        gaps = [text[a.end : stop] for a, stop in zip(operands, stops, strict=True)]
        gaps[-1] = re.split("[=≈e]", gaps[-1])[0]
        computed = _evaluate([amount.value for amount in operands], gaps)
        if computed is not None:
            parts = (a.half_unit / abs(a.value) for a in operands if a.decimals > 0 and a.value)
            slack = abs(computed) * sum(parts, Decimal(0))
            printed, half = stated.sign * stated.mantissa, _half(stated.decimals)
            ways = [(stated.value, stated.half_unit), (printed, half), (printed / 100, half / 100)]
            ok = any(abs(computed - want) <= width + slack for want, width in ways)
            steps.append(Step(reply[operands[0].start : stated.end], computed, stated, ok))
    return steps


def _evaluate(numbers: list[Decimal], gaps: list[str]) -> Decimal | None:
    """The value of numbers with the operators and parentheses of the gap after each of them.

    Parentheses that the text opened before the first number are supplied.
    """
    signs = [re.sub(r"[^-+*/^()]", "", gap.translate(_OPERATORS)) for gap in gaps]
    depth = lowest = 0
    for sign in "".join(signs):
        depth += (sign == "(") - (sign == ")")
        lowest = min(lowest, depth)
    names = "".join(f"n{index}{sign}" for index, sign in enumerate(signs)).replace("^", "**")
    try:
        tree = ast.parse("(" * -lowest + names + ")" * (depth - lowest), mode="eval")
        value = _walk(tree.body, numbers)
    except (SyntaxError, MemoryError, RecursionError, DecimalException, ValueError):
        return None
    return value if value.is_finite() else None


def _walk(node: ast.expr, numbers: list[Decimal]) -> Decimal:
    if isinstance(node, ast.Name):
        return numbers[int(node.id[1:])]
    if not isinstance(node, ast.BinOp):
        raise ValueError(node)
    left, right = _walk(node.left, numbers), _walk(node.right, numbers)
    if isinstance(node.op, ast.Pow):
        return left**right if abs(right) <= 1000 else Decimal("NaN")
    return _OPERATIONS[type(node.op)](left, right)
