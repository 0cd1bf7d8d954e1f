"""Which amounts of a reply are its answer, and whether a text as a whole is one number."""

import re
from bisect import bisect_left

from fintune.numbers.parse import HEDGES, WORDS, Amount, before, ends_with, scan

_CROWD = 6
"""A sentence with more amounts than this is a list, and only its leading amount counts."""
_STOP = re.compile(r"\n+|[.!?;。][\"')\]]{0,3}(?:\s+|\Z)")
_ABBREVIATION = before(rf"\b(?:{WORDS['abbreviations']})")
_MARKER = re.compile(
    r"(?i:\\boxed\{|\#{4}|<answer>|\banswer\b(?:[ ]to[^.:\n]{1,60}?)?[ ]?(?:\bis\b|\bwas\b|[=:]))"
)
_BECAUSE = re.compile(
    r"(?i:\b(?:calculated|computed|derived|because|since|based|compared|versus|vs|where)\b)"
)
_RESULT = before(
    r"""(?:[=≈]|\b(?:equals?|gives?|yields?|results?[ ]in|comes?[ ]to|therefore|thus|hence))
    [^0-9]{0,14}"""
)
_OPERATOR = re.compile(r"[ \u00a0)\]}]{0,12}([-+*/×÷·^⁄]|[xX](?=[ (]))[ \u00a0(\[{]{0,12}")
_YES_NO = re.compile(r"(?i:\s*(?:yes|no)\b)")
_STATES = before(  # what stands before the one amount of an answer in a sentence, or in a phrase
    rf"""(?:\b(?:is|was|were|are|be|equals?|totall?ed|amounted[ ]to|reached)|[=:≈])[ ]
    (?:{HEDGES})*"""
)
_PHRASES = before(rf"\b(?:of|to|at|by)[ ](?:{HEDGES})*")
_OPEN = re.compile(r"(?i:\bor (?:more|less|greater|fewer)\b)")


def answer_amounts(text: str) -> list[Amount]:
    """The amounts that may be the answer of a reply, the most plausible first.

    After the last "the answer is", `####` or `\\boxed{`: those of that statement. Without one:
    those of the last two and the first sentence that hold amounts, the rule that agreed best with
    FinanceBench's human labels (95.8 % of 832). Years, dates, labels, operands of a written
    calculation and the ends of ranges are no answers; a sentence of more than six amounts counts
    only with its leading one.
    """
    clean, amounts = scan(text)
    return answers(clean, eligible(clean, amounts))


def eligible(text: str, amounts: list[Amount]) -> list[Amount]:
    """The amounts that may be an answer: no operand of a written calculation, no end of a range."""
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


def _sentence_ends(text: str) -> list[int]:
    """Where the sentences of a text end."""
    ends = [
        match.end()
        for match in _STOP.finditer(text)
        if match[0][0] != "." or not ends_with(_ABBREVIATION, text, match.start(), 8)
    ]
    return ends if ends and ends[-1] == len(text) else [*ends, len(text)]


def answers(text: str, amounts: list[Amount]) -> list[Amount]:
    """Those of the amounts that state the answer, the most plausible first."""
    if not amounts:
        return []
    ends = _sentence_ends(text)
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
    results = [amount for amount in amounts if ends_with(_RESULT, text, amount.start, 26)]
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
    clean, amounts = scan(text.strip()[:2001])
    usable = eligible(clean, amounts)
    if not usable or len(clean) > 2000 or _YES_NO.match(clean):
        return False
    stated = answers(clean, usable)
    if _MARKER.search(clean):
        return len({amount.value for amount in stated}) == 1
    if len({amount.value for amount in usable}) != 1 or any(a.is_range for a in amounts):
        return False
    rest = clean
    for amount in reversed(amounts):
        rest = rest[: amount.start] + rest[amount.end :]
    if not any(character.isalpha() for character in rest):
        return True
    one, words = stated[0], len(clean.split())
    if words > 25 or len(clean[one.end :].split()) > 6 or len(_sentence_ends(clean)) > 1:
        return False
    stands = ends_with(_STATES, clean, one.start, 30) or (
        words <= 8 and ends_with(_PHRASES, clean, one.start, 30)
    )
    return bool(stands) and not _OPEN.search(clean, one.end)
