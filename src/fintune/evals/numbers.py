"""Which number of a reply is its answer, and whether it equals the reference's.

compare("$1,577", "It was $1.577 billion.", question="... in USD millions?").correct   True
compare("12.5%", "The margin was 1250%").miss                                          "percent"

- A gold in percent takes 12.5 %, a bare 12.5, and a bare 0.125 up to 1.5. A bare gold takes
  its percentage by value (0.125 = 12.5 %); where `question` asks for a percentage or a rate also
  a bare 12.5, and the percent sign beside a bare gold above 1.5.
- Percent and percentage points differ, unless the question asks for points; basis points may
  stand for either.
- A unit in the question ("in USD millions") is the unit of a bare gold and of a bare reply,
  applied once. Without one, a bare number is not a scaled one: 388 for "388 million" is a
  scale miss. A scale that only `context` names ("in thousands" over a table) lets the reply
  add it to a bare gold, or write the gold out in full with its currency.
- A fall in words ("decreased by 5 %") is negative. Where the question names a fall or a loss
  ("by how much did it fall", "the net loss"), a positive gold also takes a minus or a fall in
  words, and a negative gold takes a number without a sign.
- A bare year is no gold; it is a label.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Set
from dataclasses import replace
from decimal import Decimal
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

import numpy as np

from fintune.errors import DataError
from fintune.evals.amounts import FACTORS, SCALES, Amount, clean, ends_with, patterns, scan

Miss = Literal["scale", "percent", "sign", "other"]

STRICT, LENIENT = Decimal("0.005"), Decimal("0.01")  # relative tolerances
_FRACTION = Decimal("1.5")  # largest |x| that may stand for a percentage written as a fraction
_DOLLARS = {"$", "USD", "CAD", "AUD", "HKD", "NZD", "SGD"}  # "$" alone may be any of these
_CONSTANTS = {*map(Decimal, range(11)), *map(Decimal, (12, 52, 100, 360, 365, 1000))}
_THOUSAND = Decimal(1000)  # "in 000s"
_CROWD = 6
"""A sentence with more amounts than this is a list, and only its leading amount counts."""
_MANY = 12
"""A reply with more amounts retells a passage: without a result in it, it has no answer."""
_LONGEST = 400
"""Most characters of a statement; without a limit many of them take the square of the length."""
_NEAR = 60
"""Characters around an amount among which a year, or words that repeat in a list, belong to it."""
_MOST_FACTS = 500
"""Numbers of a context that `ungrounded` combines: the work grows with their square."""
_STOP = re.compile(r"\n+|[.!?;。][\"')\]]{0,3}(?:\s+|\Z)")
_YEAR = re.compile(r"(?:19|20)[0-9]{2}(?![0-9])")
_CLAUSE = re.compile(r"[,;:\n]\s|[.]\s|\b(?:and|while|whereas|but|compared|versus|from|to)\b")
_OPERATOR = re.compile(r"[ \u00a0)\]}]{0,12}([-+*/×÷·^⁄]|[xX](?=[ (]))[ \u00a0(\[{]{0,12}")
_REPLY, _QUESTION = patterns("reply"), patterns("question")
"""How a reply states its answer, and what a question says of it; see numbers.toml."""


# --- which amounts of a reply are its answer ------------------------------------------------------


def _eligible(text: str, amounts: list[Amount]) -> list[Amount]:
    """The amounts that may be an answer: no operand of a written calculation, no end of a range."""
    operands: set[int] = set()
    for left in range(len(amounts) - 1):
        a, b = amounts[left], amounts[left + 1]
        sign = _OPERATOR.fullmatch(text, a.end, b.start) if b.start - a.end <= 25 else None
        if sign and (a.role == b.role or sign[1] != "-"):  # "2018 - 1,577" subtracts nothing
            operands |= {left, left + 1}
    return [a for at, a in enumerate(amounts) if not a.role and at not in operands]


def _sentence_ends(text: str) -> list[int]:
    return sorted({len(text), *(match.end() for match in _STOP.finditer(text))})


def statements(text: str) -> Iterator[tuple[int, int]]:
    """Where a text states its answer in so many words ("the answer is", `####`, `\\boxed{`): begin
    and end of each such statement, the last one first; a reason behind it is none of it."""
    ends = _sentence_ends(text)
    for marker in reversed(list(_REPLY["marker"].finditer(text))):
        at = bisect_left(ends, marker.end() + 1)
        if at + 1 < len(ends) and not text[marker.end() : ends[at]].strip("*: \n"):
            at += 1  # "Answer:" alone on a line
        stop = min(ends[min(at, len(ends) - 1)], marker.end() + _LONGEST)
        because = _REPLY["because"].search(text, marker.end(), stop)
        yield marker.end(), because.start() if because else stop


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text that are not blank."""
    parts = (text[start:stop] for start, stop in pairwise([0, *_sentence_ends(text)]))
    return [part for part in parts if part.strip()]


def _stated(text: str, amounts: list[Amount], years: Set[str] = frozenset()) -> list[Amount]:
    """The eligible amounts that state the answer: one, or two forms of one ("0.125 (12.5 %)").

    Those of the last statement; else of the first line if nothing else is in it; else of the last
    sentence that says what something is or comes to; else of the last sentence. FinanceBench's
    human labels (832 answers) decided this order. None of several amounts without a choice
    ("10 or 11") counts, and none that is denied ("12, not 10") or counts years of an average.

    Args:
        years: that the question names; sentences that name others alone come last.
    """
    listed = _listed(text, amounts)
    usable = [
        one
        for at, one in enumerate(amounts)
        if at not in listed
        and not ends_with(_REPLY["denies"], text, one.start, 40)
        and not _REPLY["denied"].match(text, one.end)
    ]
    for start, stop in statements(text):
        if inside := [one for one in usable if start <= one.start < stop]:
            return _chosen(text, inside, years)
    ends = [0, *_sentence_ends(text)]
    parts = [(at, [*g]) for at, g in groupby(usable, lambda one: bisect_left(ends, one.end))]
    if parts and not re.search(r"[^\W\d_]", _without(text[: ends[parts[0][0]]], parts[0][1])):
        return _chosen(text, parts[0][1], years)
    asked = [group for at, group in parts if _is_of(years, text[ends[at - 1] : ends[at]])]
    groups = asked or [group for _, group in parts]
    least = 0 if len(usable) <= _MANY else 1  # of a retold passage only what follows "=" counts
    says = [group for group in groups if any(_rank(text, one) > least for one in group)]
    return _chosen(text, (says or groups)[-1], years) if says or (groups and not least) else []


def _without(text: str, amounts: list[Amount]) -> str:
    for amount in reversed(amounts):
        text = text[: amount.start] + text[amount.end :]
    return text


def _sentence(text: str, one: Amount) -> str:
    """The sentence of an amount, without remarks in parentheses."""
    ends = [0, *_sentence_ends(text)]
    at = bisect_left(ends, one.end)
    return re.sub(r"\([^()]*\)", "", text[ends[at - 1] : ends[at]])


def _is_of(years: Set[str], text: str) -> bool:
    """Whether a text names one of these years, or none, or none is asked for."""
    named = {*_YEAR.findall(text)}
    return not years or not named or bool(named & years)


def _listed(text: str, amounts: list[Amount]) -> set[int]:
    """Which amounts stand in a list, without words that would choose one of them: "10 or 11",
    "9, 10, 11", "It was 9. It was 10. It was 11."; two forms of one are none."""
    gaps = [text[a.end : b.start].casefold() for a, b in pairwise(amounts)]
    joints = [_REPLY["joint"].fullmatch(gap) for gap in gaps]
    found = set[int]()
    for at, (a, b) in enumerate(pairwise(amounts)):
        forms = a.value == b.value or (a.unit in FACTORS) != (b.unit in FACTORS)
        beside = [other for other in (at - 1, at + 1) if 0 <= other < len(gaps)]
        alone = len(gaps) == 1 and not (text[: a.start] + text[b.end :]).strip(" .*\n")
        joint = (gap := joints[at]) and (gap[1] or alone or any(joints[one] for one in beside))
        again = len(gaps[at]) < _NEAR and any(gaps[one] == gaps[at] for one in beside)
        found |= {at, at + 1} if not forms and (joint or again) else set()
    return found


def _rank(text: str, one: Amount) -> int:
    """2 behind "=" or "gives", 1 behind "is" or "was", -1 for what is compared with, else 0."""
    if ends_with(_REPLY["result"], text, one.start, 60):
        return 2
    if ends_with(_REPLY["states"], text, one.start, 30):
        return 1
    return -1 if ends_with(_REPLY["base"], text, one.start, 12) else 0


def _chosen(text: str, amounts: list[Amount], years: Set[str]) -> list[Amount]:
    """The amount of one sentence that is its result, and another form of it that follows: the
    last behind "=" or "gives", else the first behind a verb, else the first; of those beside a
    year that the question names, where there are such."""

    def clause(one: Amount) -> str:
        start, stop = max(0, one.start - _NEAR), one.end + _NEAR
        before = [start, *(at.end() for at in _CLAUSE.finditer(text, start, one.start))][-1]
        after = _CLAUSE.search(text, one.end, stop)
        return text[before : after.start() if after else stop]

    beside = [one for one in amounts if years & {*_YEAR.findall(clause(one))}]
    amounts = beside or amounts
    ranks = [_rank(text, one) for one in amounts]
    best = max(ranks)
    at = len(ranks) - 1 - ranks[::-1].index(2) if best == 2 else ranks.index(best)
    pair = amounts[at : at + 2]
    form = pair[1:] and _REPLY["form"].fullmatch(text, pair[0].end, pair[1].start)
    return pair if form else pair[:1]


def is_number_answer(reference: str) -> bool:
    """Whether a reference answer is, as a whole, one number that `compare` can check.

    Yes for "$1.2 billion", "(1,234)", "2.9 years", "(3 + 5) / 2 = 4", "The answer is 7.5%, ..."
    and a short sentence that ends in its only amount. No for a bare year (a label for exact
    match), several amounts, ranges, yes or no with a number, and prose that mentions a number.
    """
    text, amounts = scan(reference.strip())
    usable, marked = _eligible(text, amounts), _REPLY["marker"].search(text)
    stated = _stated(text, usable) if marked else usable
    if len({amount.value for amount in stated}) != 1 or _REPLY["yes_no"].match(text):
        return False
    rest = _without(text, amounts)
    if marked or not any(character.isalpha() for character in rest):
        return True
    one, words = stated[0], len(text.split())
    if words > 25 or len(text[one.end :].split()) > 6 or len(_sentence_ends(text)) > 1:
        return False
    stands = ends_with(_REPLY["states"], text, one.start, 30)
    phrase = ends_with(_REPLY["phrase"], text, one.start, 30) if words <= 8 else None
    return bool(stands or phrase) and not _REPLY["open"].search(text, one.end)


# --- whether it is the reference's ----------------------------------------------------------------


class NumberVerdict(NamedTuple):
    """Whether a reply's number is right, at 0.5 % (`correct`) and at 1 % (`lenient`).

    `read` is the amount judged, with offsets into the reply; None when the reply holds no amount,
    which is for the caller to count as unparsed or abstained. `miss` is None when correct.
    `stated`: the reply states it, for a year that the question names, if it names any.
    """

    correct: bool
    lenient: bool
    miss: Miss | None
    read: Amount | None
    stated: bool = False


class _Asked(NamedTuple):
    """What a question says of its answer.

    A scale or unit to give it in, the scales that tables of the context name, that it is a
    percentage or a rate, that it names a fall (so that -5 means 5), and the years it names.
    """

    scale: Decimal | None
    lent: set[Decimal]
    unit: str | None
    percent: bool
    fall: bool
    years: Set[str]


def _read_question(question: str, context: str) -> _Asked:
    text, around = clean(question), clean(context)
    scales, lent = (
        [SCALES.get(word.lower(), _THOUSAND) for word in _QUESTION["scale"].findall(part)]
        for part in (text, around)
    )
    unit, neutral = _QUESTION["unit"].search(text), _QUESTION["either"].sub(" ", text)
    fall = bool(_QUESTION["falls"].search(neutral)) and not _QUESTION["rises"].search(neutral)
    percent = bool(_QUESTION["percent"].search(text))
    scale, years = scales[0] if scales else None, {*_YEAR.findall(text)}
    return _Asked(scale, {*lent}, unit and unit.lastgroup, percent, fall, years)


def compare(gold: str, reply: str, *, question: str = "", context: str = "") -> NumberVerdict:
    """Whether a reply gives the gold number: |x - g| <= max(rel x |g|, half a printed unit of g).

    `rel` is 0.5 % for `correct` and 1 % for `lenient`. The reply is right when any amount that
    may be its answer is. See the module.

    Args:
        gold: the reference; its first amount that may be an answer counts.
        question: what was asked, without documents and tables; those are `context`.
        context: documents and tables; they may name a scale.

    Raises:
        DataError: the gold holds no number but a year.
    """
    target = _gold(gold)
    asked = _read_question(question, context)
    text, amounts = scan(reply)
    eligible, targets = _eligible(text, amounts), _targets(target, asked)
    candidates = _stated(text, eligible, asked.years)
    stated = bool(candidates) and _is_of(asked.years, _sentence(text, candidates[0]))
    if not candidates:  # "The total is 2015." may be 2,015.
        years = _stated(text, [replace(year, role="") for year in amounts if year.role == "year"])
        candidates = [one for one in years if ends_with(_REPLY["said"], text, one.start, 12)]
    if not candidates:  # only operands, a range or a list: something was said, nothing was answered
        first = next((amount for amount in amounts if amount.role in ("", "range")), None)
        listed = len(_listed(text, eligible))
        if first is None or 0 < listed <= _CROWD:
            return NumberVerdict(False, False, "other", None)
        return NumberVerdict(
            False, False, _miss(first, targets, asked) if listed else "other", first
        )
    for tolerance in (STRICT, LENIENT):
        for read in candidates:
            if _agrees(read, targets, asked, tolerance):
                correct = tolerance != LENIENT
                return NumberVerdict(correct, True, None if correct else "other", read)
    misses = [_miss(read, targets, asked) for read in candidates]
    named = next((at for at, miss in enumerate(misses) if miss != "other"), 0)
    return NumberVerdict(False, False, misses[named], candidates[named], stated)


def _gold(gold: str) -> Amount:
    text, amounts = scan(gold)
    for amount in _stated(text, _eligible(text, amounts)):
        return amount
    raise DataError(f"the reference {gold[:80]!r} holds no number")


def _targets(gold: Amount, asked: _Asked) -> list[Amount]:
    """The readings of the gold; a bare one takes its unit or scale from the question."""
    if not gold.bare:
        return [gold]
    if asked.unit and not gold.currency:
        return [replace(gold, unit=asked.unit)]
    if asked.scale:
        return [replace(gold, scale=asked.scale)]
    targets = [gold]
    if asked.percent and not gold.currency and gold.mantissa > _FRACTION:
        targets.append(replace(gold, unit="percent"))
    return targets


def _readings(amount: Amount, target: Amount, asked: _Asked) -> Iterator[Decimal]:
    """The unsigned values that a reply's amount may have, in the units of the target."""
    value, factor = abs(amount.value), FACTORS.get(target.unit)
    if not (amount.bare and factor and value > _FRACTION):
        yield value
    if target.bare and not asked.percent and (amount.scale != 1 or amount.currency):
        yield from (value / scale for scale in asked.lent)
    if not amount.bare:
        if asked.scale and asked.percent and amount.unit in FACTORS:
            yield value * asked.scale  # "the percentage change in millions" has no scale
    elif factor:
        yield value * factor
    else:
        if asked.scale or target.scale < 1:  # pence
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
    if units - {*FACTORS, "multiple"}:  # a duration
        return len(units) == 2 or bool(money)
    return bool(
        (target.currency and amount.unit != "plain") or (amount.currency and target.unit != "plain")
    )


def _same_sign(amount: Amount, target: Amount, asked: _Asked) -> bool:
    if amount.cue == "aside" or target.value == 0:
        return True
    if amount.sign < 0 or amount.cue == "down":
        return target.sign < 0 or target.cue == "down" or asked.fall
    return target.sign > 0 or (asked.fall and amount.cue != "up")


def _miss(amount: Amount, targets: list[Amount], asked: _Asked) -> Miss:
    """Why a reply's amount is wrong: a power of ten, its sign, or something else."""
    powers: set[int] = set()
    for target in targets:
        for value in filter(None, _readings(amount, target, asked)):
            if target.value:
                power = round(math.log10(abs(target.value) / value))
                powers |= {power} if _near(value.scaleb(power), target, LENIENT) else set()
    if 0 in powers:
        return "other" if all(_clash(amount, target, asked) for target in targets) else "sign"
    money = amount.currency or targets[0].currency or amount.scale * targets[0].scale != 1
    if powers & {2, -2} and not money:
        return "percent"
    return "scale" if powers else "other"


def ungrounded(answer: str, *known: str, derived: bool = True) -> list[Amount]:
    """The amounts of an answer without support in the known texts.

    Supported are amounts that are in a text, or that one operation on two amounts of them gives at
    the printed precision (sum, difference, product, quotient, relative change) where `derived`.
    Whole numbers up to 10 and constants of calculation (100, 12, 365) need no support.
    """
    facts = [fact for text in known for fact in scan(text)[1] if fact.mantissa]
    sizes = {float(size): 0 for fact in facts for size in (abs(fact.value), fact.mantissa)}
    a = np.array([*sizes][:_MOST_FACTS])
    b = a[:, None]
    steps = (a + b, a - b, a * b, a / b, a / b - 1) if derived else ()
    made = np.concatenate([a, *(abs(x).ravel() for x in steps)])

    def grounded(amount: Amount) -> bool:
        if amount.mantissa in _CONSTANTS and amount.bare and not amount.currency:
            return True
        printed = replace(amount, scale=Decimal(1), unit="plain")
        spans = [(float(abs(one.value)), float(one.half_unit)) for one in (printed, amount)]
        return any(size and (abs(made - size) <= half + 1e-9 * size).any() for size, half in spans)

    return [one for one in scan(answer)[1] if one.role in ("", "range") and not grounded(one)]
