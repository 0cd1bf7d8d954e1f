"""Amounts read out of prose.

    read_amounts("Revenue fell 3.5% to $1.2bn in FY2023")   3.5 % (down), 1,200,000,000 $, a year

Values are exact `Decimal`s in one system: the scale is applied, and percent, percentage points
and basis points are fractions (12.5 % is 0.125, 25 bps is 0.0025). A number is negative when it
carries a minus, accounting parentheses, or the word "negative" or "minus". "A loss of 5" stays
+5 with `cue="down"`: whether that is minus five depends on the question, so `compare` decides.
Every pattern is anchored or bounded, so reading is linear in the length of the text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from fintune.files import read_toml

Unit = Literal["plain", "percent", "percentage_point", "basis_point", "multiple", "duration"]
Role = Literal["", "year", "date", "ordinal", "label", "footnote", "list"]
Cue = Literal["", "down", "up", "aside"]

UNITS: tuple[Unit, ...] = ("percentage_point", "basis_point", "percent", "multiple", "duration")
FACTORS: dict[str, Decimal] = {
    "percent": Decimal("0.01"),
    "percentage_point": Decimal("0.01"),
    "basis_point": Decimal("0.0001"),
}


def _by_word(table: dict[str, str]) -> dict[str, str]:
    """Each word of a table of numbers.toml -> its key."""
    return {word: key for key, words in table.items() for word in words.split()}


_TEXTS = read_toml(__file__, "numbers.toml")
SCALES = {word: Decimal(10) ** int(power) for word, power in _by_word(_TEXTS["powers"]).items()}
_CURRENCIES = _by_word(_TEXTS["currencies"])
_HUNDREDTHS = {"p", "pence", "cent", "cents"}
_DOLLARS = {"$", "USD", "CAD", "AUD", "HKD", "NZD", "SGD"}  # "$" alone may be any of these
_ONES, _TENS = _TEXTS["counting"]["ones"].split(), _TEXTS["counting"]["tens"].split()
_WORDS = {word: n for n, word in enumerate(_ONES)}
_WORDS |= {word: 10 * n for n, word in enumerate(_TENS, start=2)}
WORDS: dict[str, str] = _TEXTS["words"]
_BIG = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


@dataclass(frozen=True, slots=True)
class Amount:
    """One number as it stands in a text.

    `mantissa` is unsigned and as printed, `decimals` its number of printed decimals. `role` is
    empty for an amount, else why it is none: a year, part of a date, an ordinal, a label ("Note
    12", "S&P 500", "Q3"), a footnote mark or a list number. `cue` is the wording beside it:
    "down" ("a loss of"), "up", or "aside" for parentheses that may be a remark instead of a minus
    ("bonds (82%)", read as negative). `period` is the word of a duration ("month"). `start` and
    `end` are offsets into the text.
    """

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


# --- reading --------------------------------------------------------------------------------------

CHARACTERS = str.maketrans(
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
            new = f"{_NOISE.sub(plain, match['over'])} ⁄{_NOISE.sub(plain, match['under'])} "
        elif match["math"]:
            new = _NOISE.sub(plain, match["math"]) + " " * (match.end() - match.end("math"))
        return new.rjust(len(match[0]))

    return _NOISE.sub(plain, text.translate(CHARACTERS))


def any_of(words: Iterable[str]) -> str:
    """An alternation, longest first, so that "seventeen" is not read as "seven"."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


def before(pattern: str) -> re.Pattern[str]:
    """A pattern, without regard to case, for what stands right before a place."""
    return re.compile(rf"(?i:{pattern})\Z", re.VERBOSE)


def ends_with(pattern: re.Pattern[str], text: str, at: int, width: int) -> re.Match[str] | None:
    """The match of a `_before` pattern among the `width` characters before `at`."""
    return pattern.search(text, max(0, at - width), at)


_ONE = rf"(?:{any_of(_TENS)})[ -](?:{any_of(_ONES[1:10])})\b"
_ONE = rf"(?:{_ONE}|(?:{any_of(_WORDS)})\b)"
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
      (?P<words> {_HUNDRED}(?:[ -](?:{any_of(_BIG)})\b(?:[ ](?:and[ ])?{_HUNDRED})?){{0,4}} ))
    """,
    re.VERBOSE,
)
_PREFIX = re.compile(
    rf"""
    (?P<sign>[-+])?[ \u00a0]?
    (?:(?P<currency>
      (?<![A-Za-z])(?:U\.?S\.?[ ]?\$|[A-Z]{{1,3}}\$|[Rr]s\.?|{WORDS["codes"]}) | [$€£¥₹]
    )[ \u00a0]?(?P<inner>\([ ]?-?|-)?)?                                  # $(3.4)  $-3.4
    \Z
    """,
    re.VERBOSE,
)
_SUFFIX = re.compile(
    rf"""
    (?: [ \u00a0-]{{0,8}}(?P<scale>[万億亿兆]
        | (?i:{any_of(word for word in SCALES if len(word) > 1)})(?![A-Za-z]))
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
          |pence|cents?|{WORDS["codes"]})(?![A-Za-z])
      | [€£¥₹円元] | (?<=[0-9])p(?![A-Za-z]) )(?![ ]?[0-9]))?
    """,
    re.VERBOSE,
)
_MONTH = rf"(?:(?i:{WORDS['months']})|May)\b\.?"
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
_LABEL = before(rf"(?<![\w#])(?:{WORDS['labels']})\.?[ #-]{{0,2}}")
_FISCAL = before(r"\b(?:FY|CY|fiscal|year)[ ']?|(?<!\w)'")
_NEGATIVE = before(r"\b(?:negative|minus)[ ]")
_GLUED = before(r"[A-Z_][-_]?|[0-9]:")  # Q3, COVID-19, 2:1
_GLUE = re.compile(r"[A-Za-z_]|\([a-z]\)|-[A-Za-z]")  # 5G, 401(k), 10-K, two-step
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
_BULLET = before(r"(?:\A|\n)\s{0,3}[*(>-]{0,2}\s?")
_LISTED = re.compile(r"[.)][ \t]+(?!thousand|[mb]illion|trillion|[bm]n\b)\S")
_COUNTED = re.compile(rf"(?i:[ ](?:{WORDS['counted']})\b)")
_CLOSED = re.compile(  # (12.5)%  (2,085) thousand
    r"[ ]?\)(?:[ ]?(?P<percent>%|percent\b)"
    r"|[ ](?P<scale>(?i:thousand|million|billion|trillion|[bm]n))\b)?"
)
_GROUPS_AFTER = re.compile(r"[ ]{0,2}(?:[+*/×÷^⁄]|-[ ]?[0-9($€£])")
_GROUPS_BEFORE = before(r"(?:[+*/×÷^(]|[0-9)%][ ]{0,2}-)[ ]{0,2}")
_TINY = re.compile(r"\([ ]?[0-9]{1,2}[ ]?\)")
_VERB = before(r"(?:\b(?:is|was|were|are|be|of|by|at|to|an?|the|about|approximately)|[|=:])[ ]*")
DOWN, _UP, HEDGES = WORDS["down"], WORDS["up"], WORDS["hedges"]
_CUE = re.compile(
    rf"""\b(?=[cdf-jlnorstuCDF-JLNORSTU])(?<![(])(?i:
      (?P<down>(?P<down_noun>{DOWN}|cash[ ]used|negative[ ]growth)|{WORDS["down_verbs"]})
      | (?P<up>(?P<up_noun>{_UP})|{WORDS["up_verbs"]}) )\b""",
    re.VERBOSE,
)
_LINK = before(rf"(?:by|of|was|is|were|are|at|totall?ed|the|:|{HEDGES})*")
_TAIL = before(  # "decrease in revenue between 2017 and 2018 was ", "fell in the quarter by "
    rf"""(?:[^.;,:()|\n0-9]|(?:19|20)[0-9]{{2}}){{0,60}}\b(of|was|is|were|by|totall?ed)[ ]
    (?:{HEDGES})*"""
)
_CUE_AFTER = re.compile(
    rf"""(?i:[ ](?:(?!of|in|from|to|on|and|or|the|a\b)[a-z-]{{1,20}}[ ]){{0,2}}
    (?:(?P<down>{DOWN}|lower)|(?P<up>{_UP}|higher))\b)(?![ ](?:of|from|in[ ]20))""",
    re.VERBOSE,
)
_JOIN = re.compile(r"-|(?i:[ ](to|and|through|or)[ ])")
_RESTATED = re.compile(rf"(?i:,?[ ](?:or|representing)[ ](?:{HEDGES})*)")
_MORE = re.compile(r"[ )\]]{0,8}[=*/×÷+]")  # "3-5) / 2" subtracts
_FROM = before(r"\b(?:from|versus|vs\.?|than)[ ]?")
_BETWEEN = before(r"\b(?:between|either)[ ]")


def read_amounts(text: str) -> list[Amount]:
    """Every number of a text, in order, those that are no amounts marked by `role`.

    "3M" is the company, "1,234" is grouped and "12,5" has a decimal comma; a small whole number
    in parentheses after a word is a footnote mark. The first end of "$10 to $12 million" takes
    the scale and unit of the second, and both are marked `is_range` ("from ... to" is a change,
    not a range). About 0.5 ms for 500 characters, linear in the length.
    """
    return scan(text)[1]


def scan(text: str) -> tuple[str, list[Amount]]:
    """The cleaned text and its numbers; offsets are those of the text given."""
    text, found = _clean(text), list[Amount]()
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
    return text, found


def _amount(text: str, match: re.Match[str], dated: bool, cue: re.Match[str] | None) -> Amount:
    mantissa, scale = _mantissa(match)
    before, after = ends_with(_PREFIX, text, match.start(), 10), _SUFFIX.match(text, match.end())
    assert before and after  # both patterns also match nothing
    mark = before["currency"] or after["currency"] or ""
    mark = mark.replace(" ", "").replace(".", "").lower()
    word = after["scale"] or after["letter"] or after["capital"] or ""
    scale *= SCALES[word.lower()] if word else 1
    scale /= 100 if mark in _HUNDREDTHS else 1
    named: list[Unit] = [name for name in UNITS if after[name]]
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
            scale = SCALES[outer.lower()] if outer else scale
            unit = "percent" if closed["percent"] and unit == "plain" else unit
    if not role and not wording:
        wording = _cue(text, cue, begin, end)
    code = _CURRENCIES.get(mark, mark.upper())
    period = (after["duration"] or "").lower().replace("yr", "year")
    printed = (sign, mantissa, scale, unit, code, -exponent)
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
        worded = ends_with(_NEGATIVE, text, begin, 10)
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
        begin == match.start() and ends_with(_GLUED, text, begin, 2) is not None
    ):
        return "year" if ends_with(_FISCAL, text, begin, 8) else "label"
    if _ORDINAL.match(text, end):
        return "ordinal"
    if _GLUE.match(text, end) or text[begin:end] == "3M":  # the company
        return "label"
    if not rich:
        if text[begin - 1 : begin] == "[" and text[end : end + 1] == "]" and len(digits) <= 3:
            return "footnote"
        if len(digits) in (2, 4) and ends_with(_FISCAL, text, begin, 8):
            return "year"
        if len(digits) == 4 and digits[:2] in ("19", "20") and not _COUNTED.match(text, end):
            return "year"
        if len(digits) <= 3 and ends_with(_BULLET, text, begin, 8) and _LISTED.match(text, end):
            return "list"
    plain = not rich or text[begin:end] == digits
    return "label" if plain and ends_with(_LABEL, text, begin, 16) else ""


def _parenthesis(text: str, first: int, stop: int, rich: bool, marked: bool) -> str:
    """What parentheses around one number mean: "minus", "aside", "footnote" or "" (grouping).

    `(1,234)` is the accounting minus. `bonds (82%)` and `5.2 (5.2)` may be remarks, asides: either
    sign will do. `sales (1)` and `12.3(1)` are footnote marks; `= (5)` and a table cell are not.
    Next to an operator they group.
    """
    if _GROUPS_AFTER.match(text, stop) or ends_with(_GROUPS_BEFORE, text, first, 6):
        return ""
    back = text[max(0, first - 4) : first].rstrip(" ")[-1:]
    linked = not back or back in "\n$" or ends_with(_VERB, text, first, 16)
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
        if (join[1] or "").lower() in ("and", "or") and not ends_with(_BETWEEN, text, a.start, 10):
            continue
        scale = b.scale if a.scale == 1 else a.scale
        a = replace(a, scale=scale, unit=b.unit, currency=a.currency or b.currency)
        if not join[1] and a.value >= b.value:  # a subtraction
            continue
        is_range = not ends_with(_FROM, text, a.start, 8)
        found[left] = replace(a, is_range=is_range)
        found[left + 1] = replace(b, is_range=is_range, currency=a.currency)
