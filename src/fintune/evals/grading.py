"""What is asked, which test rows are such questions, and when an answer is right.

`grade` reads an answer and gives one of four outcomes: correct, wrong, abstained (said that it
cannot be answered), unparsed (no number or label in it). Numbers are decided by `numbers.py`,
labels by the words offered.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from fintune.documents import document_keys
from fintune.evals import numbers
from fintune.evals.amounts import clean
from fintune.example import Example, Message
from fintune.files import read_jsonl, read_toml

Kind = Literal["number", "label", "span", "tags", "text", "unanswerable", "refuse", "comply"]
UNREFERENCED: tuple[Kind, ...] = ("unanswerable", "refuse", "comply")
"""Kinds without a reference: right is to abstain, to refuse, or to answer without refusing."""
Outcome = Literal["correct", "wrong", "abstained", "unparsed"]

_YES_NO = ("yes", "no")
_OUTER = " \t\n.,;:!?\"'`*()[]{}"
VARIANTS = ("base", "adapter")
LABEL_ROWS = 5
"""A short answer that this many training rows share is a label."""
LABEL_WORDS = 4
"""Most words of an answer that may be a label."""

PHRASES = read_toml(__file__, "phrases.toml")
_QUESTION = re.compile(r"(?im)(?:^|(?<=\s))(?:question|q|user)\s*:(?=\s)")
_ABSTAINS = re.compile(PHRASES["abstains"])
_REFUSES = re.compile(PHRASES["refuses"])
_LISTS = re.compile(PHRASES["lists"])
_NOT, _SAYS, _ALONE = (re.compile(PHRASES[name]) for name in ("negates", "says", "alone"))
_THOUGHTS = re.compile(PHRASES["thoughts"])
_JOINT = re.compile(r"\W*(?:(?:and|or|then)\W+)?")
_BUT = re.compile(r"(?i)\b(?:but|though|still)\b[^.\n]{0,80}\Z")


@dataclass(frozen=True, slots=True)
class Graded:
    """The grade of an answer.

    Attributes:
        outcome: at the strict tolerance.
        lenient: right at 1 % instead of 0.5 % (numbers); else as `outcome`.
        read: the part of the answer that was graded; None where there is none.
        miss: of a wrong number: `scale`, `percent`, `sign` or `other`.
        ungrounded: the answer's numbers that neither stand in nor follow from question, context
            and reference (`numbers.ungrounded`).
    """

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
    """Grade an answer.

    Args:
        kind: of the question.
        reference: the right answer.
        choices: of a label, those offered.
        question: of a number, the question; it may name a scale or a fall.
        context: of a number, the documents and tables above the question.

    Returns:
        The grade; None where only a judge can grade (`kind="text"`).

    Raises:
        DataError: the reference of a number holds no number.
    """
    answer = _THOUGHTS.sub("", answer).strip()
    if kind == "text":
        return None
    if kind == "number":
        return _grade_number(reference, answer, question, context)
    if kind in UNREFERENCED:
        match = (_ABSTAINS if kind == "unanswerable" else _REFUSES).search(answer)
        right = bool(match) == (kind != "comply") and bool(answer)
        if kind == "unanswerable" and right:
            right = not numbers.ungrounded(answer, question, context, derived=False)
        return Graded("correct" if right else "wrong", right, match[0] if match else None)
    if kind == "span" and plain(reference) in _YES_NO:
        kind, choices = "label", _YES_NO
    if kind == "label":
        read = read_label(answer, choices)
        right = read is not None and label_key(read) == label_key(reference)
    elif kind == "tags":
        wanted, given = ([tag.strip() for tag in text.split(",")] for text in (reference, answer))
        read, right = answer.split("\n")[0][:400] or None, wanted == given
    else:
        read, right = _read_span(reference, answer)
    if right:
        return Graded("correct", True, read)
    if _ABSTAINS.search(answer):
        return Graded("abstained", False)
    return Graded("wrong" if read else "unparsed", False, read)


def _grade_number(reference: str, answer: str, question: str, context: str) -> Graded:
    verdict = numbers.compare(reference, answer, question=question, context=context)
    amounts = numbers.ungrounded(answer, context, question, reference)
    ungrounded = tuple(answer[amount.start : amount.end] for amount in amounts)
    gives_up = [*_ABSTAINS.finditer(answer)]
    if (at := verdict.read) is None or (gives_up and not verdict.lenient):
        # Given up is the question, or only something else ("Segment data is not provided.").
        whole = [min(match.end(), at.start) for match in gives_up if at and match["whole"]]
        but = at and whole and _BUT.search(answer, whole[0], at.start)
        if at is None or not verdict.stated or (whole and not but):
            return Graded("abstained" if gives_up else "unparsed", False, ungrounded=ungrounded)
    outcome: Outcome = "correct" if verdict.correct else "wrong"
    return Graded(outcome, verdict.lenient, answer[at.start : at.end], verdict.miss, ungrounded)


def _read_span(reference: str, answer: str) -> tuple[str | None, bool]:
    """What an answer says instead of a name or phrase, and whether it is that: in whole words, in
    its last statement or the whole answer: behind a verb, at the end of a sentence, or almost
    alone, with few other words and numbers."""
    text = next((answer[start:] for start, _ in numbers.statements(answer)), answer)
    span, said = plain(reference), plain(text)
    found = re.search(rf"(?<!\w){re.escape(span)}(?!\w)", said)
    if not found or _NOT.search(before := _before(said, found)):
        return None, False
    figures = [len(re.findall(r"[0-9][0-9.,]*", text)) for text in (said, span)]
    placed = _SAYS.search(before.lstrip(_OUTER)) or re.match(r"\W*(?:\Z|[.;])", said[found.end() :])
    near = len(said) <= len(span) + 40 or (placed and len(said) <= 2 * len(span) + 80)
    return text[:400], bool(near) and figures[0] <= figures[1] + 2


def read_label(answer: str, choices: tuple[str, ...]) -> str | None:
    """The one choice that an answer says, or None where it says none, or several.

    It is said in the last statement ("the answer is yes"), else in the first sentence, else in
    the last one that says one: at its beginning or behind a verb or colon. A longer choice has
    precedence over a shorter one inside it ("mildly positive", "positive"); one that is denied
    ("isn't positive", "non-negative") or stands in a list ("positive or negative") does not
    count, and none where the same sentence is said of several.
    """
    names = {label_key(choice): choice for choice in choices}
    words = (re.escape(name).replace(r"\ ", "[ _-]") for name in sorted(names, key=len)[::-1])
    pattern = re.compile(rf"(?i)(?<!\w)(?<!\w-)(?:{'|'.join(words) or '(?!)'})(?!\w|-\w)")
    answer = clean(answer)
    first, *others = numbers.sentences(answer) or [""]
    parts = [*(answer[slice(*part)] for part in numbers.statements(answer)), first, *others[::-1]]
    for part in parts:
        if said := _said(part, pattern):
            frame = plain(pattern.sub("_", part))
            same = {plain(one) for one in parts if plain(pattern.sub("_", one)) == frame}
            return names[said] if len(same) == 1 else None
    return None


def _said(text: str, pattern: re.Pattern[str]) -> str | None:
    """The one label that a sentence says, in words, or None."""
    matches = [at for at in pattern.finditer(text) if not _NOT.search(_before(text, at))]
    gaps = [_JOINT.fullmatch(text, a.end(), b.start()) for a, b in pairwise(matches)]
    said: dict[str, int] = {}
    for at, match in enumerate(matches):
        name, listed = label_key(match[0]), any(gaps[max(0, at - 1) : at + 1])
        inner = (name in _YES_NO or len(name) == 1) and not _ALONE.match(text, match.end())
        if not listed and not inner and _SAYS.search(_before(text, match).lstrip(_OUTER)):
            said.setdefault(name, len(text[: match.start()].strip(_OUTER)))
    first = next(iter(said), None)  # "Positive, as ...": what follows are reasons
    return first if len(said) == 1 or (first and not said[first]) else None


def _before(text: str, match: re.Match[str]) -> str:
    """The part of a text that may bear on a match; all of it would take the length's square."""
    return text[max(0, match.start() - 80) : match.start()]


def label_key(label: str) -> str:
    """A label in words, as it is compared: card_arrival is "card arrival"."""
    return re.sub(r"(?<=\w)[ _-]+(?=\w)", " ", plain(label))


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
    """A label without case, outer punctuation and extra spaces, as it is compared."""
    return " ".join(text.casefold().strip(_OUTER).split())


@dataclass(frozen=True, slots=True)
class Item:
    """One question and what is needed to grade an answer to it.

    Attributes:
        task: a key of `eval.tasks`, or source and kind of a test row.
        group: the document that it is about, the unit of every interval.
        messages: the prompt.
        choices: of a label.
        majority: the most frequent answer of its kind in the training rows, if there is one.
    """

    id: str
    task: str
    kind: Kind
    group: str
    messages: tuple[Message, ...]
    reference: str
    choices: tuple[str, ...] = ()
    majority: str | None = None

    @property
    def question(self) -> str:
        """The question without the table or text above it, where the prompt marks it."""
        return self.parts()[0]

    def parts(self) -> tuple[str, str]:
        """The question, and the rest of the prompt."""
        text = self.messages[-1].content
        start = max((match.start() for match in _QUESTION.finditer(text)), default=0)
        before = [message.content for message in self.messages[:-1]]
        return text[start:], "\n".join([*before, text[:start]])

    @staticmethod
    def from_json(row: dict[str, Any]) -> "Item":
        """The item of a line of predictions.jsonl, where `asdict` wrote it."""
        messages = tuple(Message(**message) for message in row["messages"])
        return Item(**{**row, "messages": messages, "choices": tuple(row["choices"])})

    def grade(self, answer: str) -> Graded | None:
        """Grade an answer to this question; None where only a judge can."""
        return grade(self.kind, self.reference, answer, self.choices, *self.parts())


class HeldOutItems:
    """Makes items of test rows.

    The training rows decide which short answers are labels: LABEL_ROWS of them share it, or a
    prompt lists it. An answer that is a number is graded as a number, any other is `text`.

    Args:
        train: rows of train.parquet with `messages`.
    """

    def __init__(self, train: Iterable[dict[str, Any]]) -> None:
        shared, short = Counter[str](), list[tuple[str, str]]()
        for row in train:
            if not row["messages"]:
                continue
            *prompt, last = map(Message.of, row["messages"])
            answer = last.content.strip()
            if len(answer.split()) <= LABEL_WORDS:
                short.append((prompt[-1].content, answer))
                shared[plain(answer)] += not numbers.is_number_answer(answer)
        self._labels = {label for label, count in shared.items() if count >= LABEL_ROWS and label}
        self._answers: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for text, answer in short:
            if numbers.is_number_answer(answer):
                self._answers["number",][answer] += 1
            elif plain(answer) in self._labels:
                self._answers[_label_set(text)][answer] += 1
                self._answers["label",][answer] += 1

    def item(self, row: dict[str, Any]) -> Item:
        """The item of a row of test.parquet; kind `text` where only a judge can check it."""
        *prompt, last = map(Message.of, row["messages"])
        reference, label = last.content.strip(), plain(last.content)
        key = _label_set(prompt[-1].content)
        kind: Kind = "text"
        choices = set[str]()
        if numbers.is_number_answer(reference):
            kind, key = "number", ("number",)
        elif 0 < len(reference.split()) <= LABEL_WORDS and (label in self._labels or label in key):
            kind = "label"
            choices = {*key, *(answer.strip(" .") for answer in self._answers[key]), reference}
        known = self._answers[key] or self._answers["label",]
        return Item(
            id=row["example_id"],
            task=f"{row['source']}:{kind}",
            kind=kind,
            group=row["group"],
            messages=tuple(prompt),
            reference=reference,
            choices=tuple(sorted(choices)),
            majority=known.most_common(1)[0][0] if known and kind != "text" else None,
        )


def _label_set(prompt: str) -> tuple[str, ...]:
    """The labels that a prompt lists, or ()."""
    return tuple(sorted({plain(choice) for choice in listed_choices(prompt)}))


def as_example(item: Item) -> Example:
    """A question with its reference, as training rows are compared with it."""
    answer = Message("assistant", item.reference)
    return Example(item.task, 0, item.id, (*item.messages, answer))


def by_document(items: list[Item]) -> list[Item]:
    """The questions with one key a document as their group, for all tasks."""
    keys = document_keys([as_example(item) for item in items], [item.group for item in items])
    return [replace(item, group=key) for item, key in zip(items, keys, strict=True)]


@dataclass(frozen=True, slots=True)
class Pair:
    """One item with the text and grade of each variant's answer."""

    item: Item
    texts: dict[str, str]
    graded: dict[str, Graded | None]

    @property
    def better(self) -> str | None:
        """The variant that is correct where only one is, else None."""
        base, adapter = (self.passes(variant, lambda g: g.correct) for variant in VARIANTS)
        return None if base == adapter else VARIANTS[adapter]

    def passes(self, variant: str, test: Callable[[Graded], bool]) -> bool:
        """Whether a variant's answer is graded and its grade passes a test."""
        graded = self.graded[variant]
        return graded is not None and test(graded)


def load_pairs(folder: Path) -> list[Pair]:
    """The items of predictions.jsonl with the answers of base and adapter, graded again."""
    pairs: dict[str, Pair] = {}
    for row in read_jsonl(folder / "predictions.jsonl"):
        key = row["item"]["id"]
        pair = pairs.get(key) or pairs.setdefault(key, Pair(Item.from_json(row["item"]), {}, {}))
        pair.texts[row["model"]] = row["text"]
        pair.graded[row["model"]] = pair.item.grade(row["text"])
    return [*pairs.values()]
