"""What is asked, which test rows are such questions, and when an answer is right.

`grade` reads an answer and gives one of four outcomes: correct, wrong, abstained (said that it
cannot be answered), unparsed (no number or label in it). Numbers are decided by `numbers.py`,
labels by the words offered.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fintune.evals import numbers
from fintune.example import Message
from fintune.files import read_jsonl, read_toml, sha256_bytes

Kind = Literal["number", "label", "span", "tags", "text", "unanswerable", "refuse", "comply"]
UNREFERENCED: tuple[Kind, ...] = ("unanswerable", "refuse", "comply")
"""Kinds without a reference: right is to abstain, to refuse, or to answer without refusing."""
Outcome = Literal["correct", "wrong", "abstained", "unparsed"]

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
_NOT = re.compile(PHRASES["negates"])


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
    if kind == "text":
        return None
    if kind == "number":
        return _grade_number(reference, answer, question, context)
    if kind in UNREFERENCED:
        pattern = _ABSTAINS if kind == "unanswerable" else _REFUSES
        match = pattern.search(answer)
        right = bool(match) == (kind != "comply") and bool(answer)
        return Graded("correct" if right else "wrong", right, match[0] if match else None)
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
    amounts = numbers.ungrounded(answer, context, question, reference)
    ungrounded = tuple(answer[amount.start : amount.end] for amount in amounts)
    if verdict.read is None or (not verdict.lenient and _ABSTAINS.search(answer)):
        outcome: Outcome = "abstained" if _ABSTAINS.search(answer) else "unparsed"
        return Graded(outcome, False, ungrounded=ungrounded)
    read = answer[verdict.read.start : verdict.read.end]
    outcome = "correct" if verdict.correct else "wrong"
    return Graded(outcome, verdict.lenient, read, verdict.miss, ungrounded)


def read_label(answer: str, choices: tuple[str, ...]) -> str | None:
    """The one choice that an answer names, or None where it names none or several.

    The first line is tried, then the whole text. A longer choice has precedence over a shorter
    one inside it ("mildly positive", "positive"); a negated one ("not positive") does not count.
    """
    words = [rf"(?<!\w){re.escape(choice)}(?!\w)" for choice in sorted(choices, key=len)[::-1]]
    pattern = re.compile("|".join(words) or r"(?!)", re.IGNORECASE)
    for text in (answer.split("\n", 1)[0], answer):
        matches = [at for at in pattern.finditer(text) if not _NOT.search(text[: at.start()])]
        named = {match[0].casefold() for match in matches}
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
    """A label without case, outer punctuation and extra spaces, as it is compared."""
    return " ".join(text.casefold().strip(" \t\n.,;:!?\"'`*()[]{}").split())


@dataclass(frozen=True, slots=True)
class Item:
    """One question and what is needed to grade an answer to it.

    Attributes:
        task: a key of `eval.tasks`, or source and kind of a test row.
        group: the document or group of related rows it is of, the unit of resampling.
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
    """Makes items of test rows, and finds which of them are contaminated.

    The training rows decide which short answers are labels: LABEL_ROWS of them share it, or a
    prompt lists it. An answer that is a number is graded as a number, any other is `text`.

    Args:
        train: rows of train.parquet with `messages` and `group`.
    """

    def __init__(self, train: Iterable[dict[str, Any]]) -> None:
        self._prompts, self._groups = set[str](), set[str]()
        shared, short = Counter[str](), list[tuple[str, str]]()
        for row in train:
            self._groups.add(row["group"])
            if not row["messages"]:
                continue
            *prompt, last = map(Message.of, row["messages"])
            self._prompts.add(_prompt_hash(prompt))
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

    def contaminated(self, item: Item) -> bool:
        """Whether a training row has the item's prompt or is of its group."""
        return item.group in self._groups or _prompt_hash(item.messages) in self._prompts

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


def _prompt_hash(messages: Iterable[Message]) -> str:
    """Hash of a prompt that ignores case and spacing."""
    text = "\n".join(f"{message.role} {message.content}" for message in messages)
    return sha256_bytes(" ".join(text.casefold().split()).encode("utf-8", "backslashreplace"))


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
