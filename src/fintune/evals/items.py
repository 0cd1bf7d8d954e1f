"""What is asked: one question with its reference, and which held-out rows are such questions."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fintune import numbers
from fintune.errors import OutputError
from fintune.evals.grading import LABEL_WORDS, Graded, Kind, grade, listed_choices, plain
from fintune.example import Message
from fintune.files import read_jsonl

VARIANTS = ("base", "adapter")
LABEL_ROWS = 5
"""A short answer that this many training rows share is a label."""
_QUESTION = re.compile(r"(?im)(?:^|(?<=\s))(?:question|q|user)\s*:(?=\s)")


@dataclass(frozen=True, slots=True)
class Item:
    """One question, its reference, and what is needed to grade an answer.

    `group` names the document or row family it came from (the unit of resampling); `majority` is
    the commonest answer of its kind in the training rows.
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
        """What is asked, without the table or text above it, where the prompt marks it."""
        return self._cut[1]

    @property
    def context(self) -> str:
        """Everything else that the model was shown."""
        before = [message.content for message in self.messages[:-1]]
        return "\n".join([*before, self._cut[0]])

    @property
    def _cut(self) -> tuple[str, str]:
        text = self.messages[-1].content
        marks = [match.start() for match in _QUESTION.finditer(text)]
        return (text[: marks[-1]], text[marks[-1] :]) if marks else ("", text)

    def as_json(self) -> dict[str, Any]:
        """As written into predictions.jsonl; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(row: dict[str, Any]) -> "Item":
        known = {name: row[name] for name in Item.__slots__ if name in row}
        messages = tuple(Message(**message) for message in row["messages"])
        return Item(**{**known, "messages": messages, "choices": tuple(row["choices"])})

    def grade(self, answer: str) -> Graded | None:
        """Grade an answer to this question; None where only a judge can."""
        material = (self.choices, self.question, self.context)
        return grade(self.kind, self.reference, answer, *material)


class HeldOutItems:
    """Which test rows can be checked by arithmetic or by their label, learnt from the rows
    of the training set: an answer is a number, or a label that many rows share or a prompt lists.

    Args:
        train: conversations of the training rows; only short last answers matter.
    """

    def __init__(self, train: Iterable[list[Message]]) -> None:
        counts: Counter[str] = Counter()
        rows: list[tuple[str, str]] = []
        for messages in train:
            answer = messages[-1].content.strip()
            if len(answer.split()) <= LABEL_WORDS:
                rows.append((messages[-2].content, answer))
                counts[plain(answer)] += not numbers.is_number_answer(answer)
        self._labels = {label for label, count in counts.items() if count >= LABEL_ROWS and label}
        self._counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for prompt, answer in rows:
            if numbers.is_number_answer(answer):
                self._counts["number",][answer] += 1
            elif plain(answer) in self._labels:
                self._counts[self._family(prompt)][answer] += 1
                self._counts["label",][answer] += 1

    def item(self, row: dict[str, Any]) -> Item:
        """The item of a row of test.parquet; kind `text` where only a judge can check it."""
        messages = tuple(Message(**message) for message in row["messages"])
        *prompt, last = messages
        reference = last.content.strip()
        family = self._family(prompt[-1].content)
        kind: Kind = "text"
        choices: tuple[str, ...] = ()
        if numbers.is_number_answer(reference):
            kind, family = "number", ("number",)
        elif 0 < len(reference.split()) <= LABEL_WORDS and (
            plain(reference) in self._labels or plain(reference) in family
        ):
            kind = "label"
            offered = {answer.strip(" .") for answer in self._counts[family]}
            choices = tuple(sorted({*family, *offered, reference}))
        counted = self._counts[family] or self._counts["label",]
        most = counted.most_common(1) if kind != "text" else []
        return Item(
            id=row["example_id"],
            task=f"{row['source']}:{kind}",
            kind=kind,
            group=row["group"],
            messages=tuple(prompt),
            reference=reference,
            choices=choices,
            majority=most[0][0] if most else None,
        )

    def _family(self, prompt: str) -> tuple[str, ...]:
        """The label set that a prompt lists, or ()."""
        return tuple(sorted({plain(choice) for choice in listed_choices(prompt)}))


@dataclass(frozen=True, slots=True)
class Pair:
    """One item with both completions (rows of predictions.jsonl) and their grades, by variant."""

    item: Item
    answers: dict[str, dict[str, Any]]
    graded: dict[str, Graded | None]

    def text(self, variant: str) -> str:
        """The completion of a variant."""
        return str(self.answers[variant]["text"])

    def holds(self, variant: str, test: Callable[[Graded], bool]) -> bool:
        """Whether a completion is graded and its grade passes a test."""
        graded = self.graded[variant]
        return graded is not None and test(graded)


def load_pairs(folder: Path) -> list[Pair]:
    """Items with both completions, graded now; raises OutputError where one is missing."""
    items: dict[str, Item] = {}
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_jsonl(folder / "predictions.jsonl"):
        item = items.setdefault(row["item"]["id"], Item.from_json(row["item"]))
        answers.setdefault(item.id, {})[row["model"]] = row
    missing = [key for key, found in answers.items() if set(found) != set(VARIANTS)]
    if missing:
        raise OutputError(
            f"{folder / 'predictions.jsonl'}: {len(missing)} items lack an answer of one model",
            fix="run the evaluation again; it continues",
        )
    return [
        Pair(
            item, answers[key], {name: item.grade(answers[key][name]["text"]) for name in VARIANTS}
        )
        for key, item in items.items()
    ]
