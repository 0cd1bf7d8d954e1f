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
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from fintune.errors import DataError
from fintune.evals.amounts import FACTORS, SCALES, UNITS, Amount, clean, ends_with, patterns, scan

Miss = Literal["scale", "percent", "sign", "other"]

STRICT, LENIENT = Decimal("0.005"), Decimal("0.01")  # relative tolerances
_FRACTION = Decimal("1.5")  # largest |x| that may stand for a percentage written as a fraction
_DOLLARS = {"$", "USD", "CAD", "AUD", "HKD", "NZD", "SGD"}  # "$" alone may be any of these
_CONSTANTS = {*map(Decimal, range(11)), *map(Decimal, (12, 52, 100, 360, 365, 1000))}
_THOUSAND = Decimal(1000)  # "in 000s"
_CROWD = 6
"""A sentence with more amounts than this is a list, and only its leading amount counts."""
_MOST_FACTS = 500
"""Numbers of a context that `ungrounded` combines: the work grows with their square."""
_STOP = re.compile(r"\n+|[.!?;。][\"')\]]{0,3}(?:\s+|\Z)")
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


def _stated(text: str, amounts: list[Amount]) -> list[Amount]:
    """The amounts among the eligible ones that may state the answer, the most plausible first.

    After the last "the answer is", `####` or `\\boxed{`: those of that statement. Without one:
    those of the last two and the first sentence that hold amounts, the rule that agreed best with
    FinanceBench's human labels (95.8 % of 832). A sentence of more than six amounts counts only
    with its leading one.
    """
    if not amounts:
        return []
    ends = _sentence_ends(text)
    for marker in reversed(list(_REPLY["marker"].finditer(text))):
        at = bisect_left(ends, marker.end() + 1)
        if at + 1 < len(ends) and not text[marker.end() : ends[at]].strip("*: \n"):
            at += 1  # "Answer:" alone on a line
        stop = ends[min(at, len(ends) - 1)]
        because = _REPLY["because"].search(text, marker.end(), stop)
        stop = because.start() if because else stop
        stated = [amount for amount in amounts if marker.end() <= amount.start < stop]
        if stated:
            return _led(text, stated)
    sentences = groupby(amounts, lambda amount: bisect_left(ends, amount.start + 1))
    spoken = [_led(text, [*group]) for _, group in sentences]
    chosen = [spoken[-1], *spoken[-2:-1], *(spoken[:1] if len(spoken) > 2 else [])]
    return [amount for group in chosen for amount in group]


def _led(text: str, amounts: list[Amount]) -> list[Amount]:
    """The amounts of one sentence, the last that follows "=" or "gives" first, else as written."""
    results = [amount for amount in amounts if ends_with(_REPLY["result"], text, amount.start, 26)]
    lead = results[-1] if results else amounts[0]
    rest = amounts if len(amounts) <= _CROWD else []
    return [lead, *(amount for amount in rest if amount is not lead)]


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
    rest = text
    for amount in reversed(amounts):
        rest = rest[: amount.start] + rest[amount.end :]
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
    """

    correct: bool
    lenient: bool
    miss: Miss | None
    read: Amount | None


class _Asked(NamedTuple):
    """What a question says of its answer.

    A scale or unit to give it in, the scales that tables of the context name, that it is a
    percentage or a rate, that it names a fall (so that -5 means 5).
    """

    scale: Decimal | None
    lent: set[Decimal]
    unit: str | None
    percent: bool
    fall: bool


def _read_question(question: str, context: str) -> _Asked:
    text, around = clean(question), clean(context)
    scales, lent = (
        [SCALES.get(word.lower(), _THOUSAND) for word in _QUESTION["scale"].findall(part)]
        for part in (text, around)
    )
    unit, neutral = _QUESTION["unit"].search(text), _QUESTION["either"].sub(" ", text)
    fall = bool(_QUESTION["falls"].search(neutral)) and not _QUESTION["rises"].search(neutral)
    percent = bool(_QUESTION["percent"].search(text))
    return _Asked(scales[0] if scales else None, {*lent}, unit and unit.lastgroup, percent, fall)


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
    candidates = _stated(text, _eligible(text, amounts))
    # "The total is 2015." may be 2,015.
    years = _stated(text, [replace(year, role="") for year in amounts if year.role == "year"])
    candidates += [year for year in years if ends_with(_REPLY["said"], text, year.start, 12)]
    if not candidates:  # only operands or a range: something was said, nothing was answered
        first = next((amount for amount in amounts if amount.role in ("", "range")), None)
        return NumberVerdict(False, False, "other", first)
    targets = _targets(target, asked)
    for tolerance in (STRICT, LENIENT):
        for read in candidates:
            if _agrees(read, targets, asked, tolerance):
                correct = tolerance != LENIENT
                return NumberVerdict(correct, True, None if correct else "other", read)
    misses = [_miss(read, targets, asked) for read in candidates]
    named = next((at for at, miss in enumerate(misses) if miss != "other"), 0)
    return NumberVerdict(False, False, misses[named], candidates[named])


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
    if units - {*UNITS}:  # a duration
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


def ungrounded(answer: str, *known: str) -> list[Amount]:
    """The amounts of an answer without support in the known texts.

    Supported are amounts that are in a text, or that one operation on two amounts of them gives at
    the printed precision (sum, difference, product, quotient, relative change). Whole numbers up
    to 10 and constants of calculation (100, 12, 365) need no support.
    """
    facts = [fact for text in known for fact in scan(text)[1] if fact.mantissa]
    sizes = {float(size): 0 for fact in facts for size in (abs(fact.value), fact.mantissa)}
    a = np.array([*sizes][:_MOST_FACTS])
    b = a[:, None]
    made = np.concatenate([a, *(abs(x).ravel() for x in (a + b, a - b, a * b, a / b, a / b - 1))])

    def grounded(amount: Amount) -> bool:
        if amount.mantissa in _CONSTANTS and amount.bare and not amount.currency:
            return True
        printed = replace(amount, scale=Decimal(1), unit="plain")
        spans = [(float(abs(one.value)), float(one.half_unit)) for one in (printed, amount)]
        return any(size and (abs(made - size) <= half + 1e-9 * size).any() for size, half in spans)

    return [one for one in scan(answer)[1] if one.role in ("", "range") and not grounded(one)]
