"""Whether a reply's number is the reference's: the only place that decides it.

compare("$1,577", "It was $1.577 billion.", question="... in USD millions?").correct   True
compare("12.5%", "The margin was 1250%").miss                                          "percent"

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
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from fintune.errors import DataError
from fintune.numbers import answers, parse
from fintune.numbers.parse import FACTORS, SCALES, Amount, Unit, any_of, before, ends_with

Miss = Literal["scale", "percent", "sign", "other"]

STRICT, LENIENT = Decimal("0.005"), Decimal("0.01")  # relative tolerances
_FRACTION = Decimal("1.5")  # largest |x| that may stand for a percentage written as a fraction
_DOLLARS = {"$", "USD", "CAD", "AUD", "HKD", "NZD", "SGD"}  # "$" alone may be any of these
_CONSTANTS = {*map(Decimal, range(11)), *map(Decimal, (12, 52, 100, 360, 365, 1000))}
_THOUSAND = Decimal(1000)  # "in 000s"
_ASKED_SCALE = re.compile(
    rf"""(?i:(?:\bin|\(|\bUSD|\bEUR|[$€£]|\bdollars?|\bexpressed[ ]as|\bnearest)[ ]?
    (?:the[ ])?(?:nearest[ ])?(?:(?:U\.?S\.?[ ]?)?[$€£]|U\.?S\.?D?|EUR|GBP|INR)?
    [ ]?(?:dollars?[ ])?'?
    (?P<scale>000|{any_of(w for w in SCALES if len(w) > 1 and SCALES[w] > 999)})s?\b)""",
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
_FALLS = re.compile(rf"(?i:\b(?:{parse.DOWN}|decreas|declin|reduc|fell|drop|shr[iau]nk))")
_RISES = re.compile(r"(?i:\b(?:increas|growth|grow|gain|rise|rose))")
_ASKED_FALL = re.compile(
    rf"""(?i:\b(?:the|this|net|total|percent(?:age)?|trade|amount[ ]of|%)[ ](?:{parse.DOWN})\b
    |\bdid\b.{{1,120}}?\b(?:decrease|decline|fall|drop|shrink|reduce|lose)\b)""",
    re.VERBOSE,
)
_SAID = before(r"(?:^|\b(?:is|was|were|are)|[=:{#])[ ]*")


@dataclass(frozen=True, slots=True)
class NumberVerdict:
    """Whether a reply's number is right, at 0.5 % (`correct`) and at 1 % (`lenient`).

    `read` is the amount judged, with offsets into the reply; None when the reply holds no amount,
    which is for the caller to count as unparsed or abstained. `miss` is None when correct.
    """

    correct: bool
    lenient: bool
    miss: Miss | None
    read: Amount | None


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
        text = question.translate(parse.CHARACTERS)
        scale, unit = _ASKED_SCALE.search(text), _ASKED_UNIT.search(text)
        named = {
            match["scale"] for match in _ASKED_SCALE.finditer(context.translate(parse.CHARACTERS))
        }
        neutral = _EITHER.sub(" ", text)
        falls = bool(_FALLS.search(neutral)) and not _RISES.search(neutral)
        return cls(
            scale=SCALES.get(scale["scale"].lower(), _THOUSAND) if scale else None,
            lent=frozenset(SCALES.get(word.lower(), _THOUSAND) for word in named),
            unit=next((name for name in parse.UNITS[:2] if unit and unit[name]), None),
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
    question: str = "",
    context: str = "",
    decimals: int | None = None,
) -> NumberVerdict:
    """Whether a reply gives the gold number: |x - g| <= max(rel x |g|, half a printed unit of g).

    `rel` is 0.5 % for `correct` and 1 % for `lenient`. The reply is right when any of its
    `answer_amounts` is. See the module.

    Args:
        gold: the reference; of a text, the first of `answer_amounts`.
        question: what was asked, without documents and tables; those are `context`.
        context: documents and tables; they may name a scale.
        decimals: printed decimals of the gold where trailing zeros say nothing ("$1577.00").

    Raises:
        DataError: the gold holds no number.
    """
    target = _gold(gold)
    target = target if decimals is None else replace(target, decimals=decimals)
    asked = _Asked.of(question, context)
    text, amounts = parse.scan(reply)
    candidates, years = (
        answers.answers(text, answers.eligible(text, amounts)),
        _years(text, amounts),
    )
    exact = target.role == "year" and not asked.scale
    # "The total is 2015." may be 2,015.
    said = [year for year in years if ends_with(_SAID, text, year.start, 12)]
    candidates += years[:1] if exact else said
    if not candidates:  # only operands or a range: something was said, nothing was answered
        first = next((amount for amount in amounts if not amount.role), None)
        return NumberVerdict(False, False, "other", first)
    targets = _targets(target, asked)
    for tolerance in (Decimal(0),) if exact else (STRICT, LENIENT):
        for read in candidates:
            if _agrees(read, targets, asked, tolerance):
                correct = tolerance != LENIENT
                return NumberVerdict(correct, True, None if correct else "other", read)
    misses: list[Miss] = ["other" if exact else _miss(read, targets, asked) for read in candidates]
    named = next((at for at, miss in enumerate(misses) if miss != "other"), 0)
    return NumberVerdict(False, False, misses[named], candidates[named])


def _years(text: str, amounts: list[Amount]) -> list[Amount]:
    """The years of the answer, as amounts."""
    return answers.answers(
        text, [replace(year, role="") for year in amounts if year.role == "year"]
    )


def _gold(gold: Amount | str) -> Amount:
    if isinstance(gold, Amount):
        return gold
    text, amounts = parse.scan(gold)
    for found in answers.answers(text, answers.eligible(text, amounts)):
        return found
    for found in _years(text, amounts):
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
        return [replace(gold, unit=asked.unit)]
    if asked.scale:
        return [replace(gold, scale=asked.scale)]
    targets = [gold]
    if asked.rate and not gold.currency and gold.mantissa > _FRACTION:
        targets.append(replace(gold, unit="percent"))
    return targets


def _readings(amount: Amount, target: Amount, asked: _Asked) -> Iterator[Decimal]:
    """The unsigned values that a reply's amount may have, in the units of the target."""
    value, factor = abs(amount.value), FACTORS.get(target.unit)
    if target.bare and not asked.percent and (amount.scale != 1 or amount.currency):
        yield from (value / scale for scale in asked.lent)
    if not amount.bare:
        yield value
        if asked.scale and asked.percent and amount.unit in FACTORS:
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
    """The amounts of an answer that stand in no known text and that no operation on two of their
    numbers gives (sum, difference, product, quotient, relative change) at the printed precision.

    Whole numbers up to 10 and constants of calculation (100, 12, 365) are not asked about.
    """
    facts = [fact for text in known for fact in parse.read_amounts(text) if not fact.role]
    sizes = {float(size) for fact in facts for size in (abs(fact.value), fact.mantissa) if size}
    pool = np.array(sorted(sizes))

    def grounded(low: float, high: float) -> bool:
        low, high = low - 1e-9 * abs(low), high + 1e-9 * abs(high)  # rounding of the float
        spans: list[tuple[Any, Any]] = [(low, high), (low - pool, high - pool)]
        spans += [(low + pool, high + pool), (low / pool, high / pool), (low * pool, high * pool)]
        spans += [((1 + low) * pool, (1 + high) * pool), ((1 - high) * pool, (1 - low) * pool)]
        return any(
            bool((np.searchsorted(pool, end, "right") > np.searchsorted(pool, start)).any())
            for start, end in spans
        )

    return [
        amount
        for amount in parse.read_amounts(answer)
        if not amount.role
        and not (amount.mantissa in _CONSTANTS and amount.bare and not amount.currency)
        and not (amount.value and any(grounded(*span) for span in _spans(amount)))
    ]


def _spans(amount: Amount) -> list[tuple[float, float]]:
    """What an amount may stand for, in full and as printed, each with half a printed unit."""
    half = Decimal(5).scaleb(-amount.decimals - 1)
    pairs = [(abs(amount.value), amount.half_unit), (amount.mantissa, half)]
    return [(float(size - width), float(size + width)) for size, width in pairs]
