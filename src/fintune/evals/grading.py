"""When an answer is right.

`grade` reads an answer and gives one of four outcomes: correct, wrong, abstained (said that it
cannot be answered), unparsed (no number or label found). Numbers are decided by `numbers.py`,
labels by the words offered.
"""

import re
from dataclasses import dataclass
from typing import Literal

from fintune.evals import numbers
from fintune.files import read_toml

Kind = Literal["number", "label", "span", "tags", "text", "unanswerable", "refuse", "comply"]
UNREFERENCED: tuple[Kind, ...] = ("unanswerable", "refuse", "comply")
"""Kinds whose right answer is to say so, or just to answer."""
Outcome = Literal["correct", "wrong", "abstained", "unparsed"]

LABEL_WORDS = 4
"""Most words of an answer that may be a label."""

PHRASES = read_toml(__file__, "phrases.toml")
_ABSTAINS = re.compile(PHRASES["abstains"])
_REFUSES = re.compile(PHRASES["refuses"])
_LISTS = re.compile(PHRASES["lists"])
_NOT = re.compile(PHRASES["negates"])


@dataclass(frozen=True, slots=True)
class Graded:
    """What the grader read in an answer and made of it."""

    outcome: Outcome
    lenient: bool
    read: str | None = None
    miss: str | None = None
    ungrounded: tuple[str, ...] = ()

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


def grade(
    kind: Kind,
    reference: str,
    answer: str,
    choices: tuple[str, ...] = (),
    question: str = "",
    context: str = "",
) -> Graded | None:
    """Grade an answer, or None where only a judge can (`kind="text"`).

    Args:
        choices: of a label, those offered.
        question: of a number, what was asked; it may name a scale or a fall.
        context: of a number, the documents and tables above the question.
    """
    if kind == "text":
        return None
    if kind == "number":
        return _grade_number(reference, answer, question, context)
    if kind in UNREFERENCED:
        pattern = _ABSTAINS if kind == "unanswerable" else _REFUSES
        found = pattern.search(answer)
        right = bool(found) == (kind != "comply") and bool(answer)
        return Graded("correct" if right else "wrong", right, found[0] if found else None)
    if kind == "label":
        read = read_label(answer, choices)
        right = read is not None and plain(read) == plain(reference)
    elif kind == "tags":
        wanted, given = ([tag.strip() for tag in text.split(",")] for text in (reference, answer))
        read, right = answer.split("\n")[0][:400] or None, wanted == given
    else:
        span = plain(reference)
        read = answer[:400] if span in plain(answer) else None
        right = read is not None and len(plain(answer)) <= 4 * len(span) + 80
    if right:
        return Graded("correct", True, read)
    if _ABSTAINS.search(answer):
        return Graded("abstained", False)
    return Graded("wrong" if read else "unparsed", False, read)


def _grade_number(reference: str, answer: str, question: str, context: str) -> Graded:
    verdict = numbers.compare(reference, answer, question=question, context=context)
    strange = numbers.ungrounded(answer, context, question, reference)
    free = tuple(answer[amount.start : amount.end] for amount in strange)
    if verdict.read is None or (not verdict.lenient and _ABSTAINS.search(answer)):
        outcome: Outcome = "abstained" if _ABSTAINS.search(answer) else "unparsed"
        return Graded(outcome, False, ungrounded=free)
    read = answer[verdict.read.start : verdict.read.end]
    outcome = "correct" if verdict.correct else "wrong"
    return Graded(outcome, verdict.lenient, read, verdict.miss, free)


def read_label(answer: str, choices: tuple[str, ...]) -> str | None:
    """The one choice that an answer names, or None where it names none or several.

    The whole answer first, then its first line, then all of it. A longer choice hides a shorter
    one inside it ("mildly positive", "positive"); a negated one ("not positive") does not count.
    """
    whole = plain(answer)
    for choice in choices:
        if whole == plain(choice):
            return choice
    each = [rf"(?<!\w){re.escape(choice)}(?!\w)" for choice in sorted(choices, key=len)[::-1]]
    pattern = re.compile("|".join(each) or r"(?!)", re.IGNORECASE)
    named: set[str] = set()
    for text in (answer.split("\n", 1)[0], answer):
        named = {
            match[0].casefold()
            for match in pattern.finditer(text)
            if not _NOT.search(text[: match.start()])
        }
        if len(named) == 1:
            return next(choice for choice in choices if choice.casefold() in named)
    return None


def listed_choices(prompt: str) -> tuple[str, ...]:
    """Short choices that a prompt lists ("{a/b/c}", "Options: a, b, c", "Yes or No"), or ()."""
    for match in _LISTS.finditer(prompt):
        text = match["braces"] or match["line"] or match["words"]
        parts = re.split(r"\s*[,/|]\s*(?:or\s+|and\s+)?|\s+or\s+|\s+and\s+", text.strip())
        words = [part.strip(" \"'`[]*-") for part in parts]
        if len(words) > 1 and all(word and len(word.split()) <= LABEL_WORDS for word in words):
            return tuple(dict.fromkeys(words))
    return ()


def plain(text: str) -> str:
    """A label as compared: case, outer punctuation and runs of spaces do not matter."""
    return " ".join(text.casefold().strip(" \t\n.,;:!?\"'`*()[]{}").split())
