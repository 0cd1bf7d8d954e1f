"""What is asked: one question with its reference, and which held-out rows are such questions."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintune.evals import numbers
from fintune.evals.grading import LABEL_WORDS, Graded, Kind, grade, listed_choices, plain
from fintune.example import Message
from fintune.files import read_jsonl, sha256_bytes

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
        return self.parts()[0]

    def parts(self) -> tuple[str, str]:
        """The question, and everything else that the model was shown."""
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
    """Which test rows can be checked by arithmetic or by their label, learnt from the rows
    of the training set: an answer is a number, or a label that many rows share or a prompt lists.

    Args:
        train: rows of train.parquet with `messages` and `group`.
    """

    def __init__(self, train: Iterable[dict[str, Any]]) -> None:
        self._prompts: set[str] = set()
        self._groups: set[str] = set()
        shared: Counter[str] = Counter()
        short: list[tuple[str, str]] = []
        for row in train:
            *prompt, last = (Message(**message) for message in row["messages"])
            self._groups.add(row["group"])
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

    def saw(self, item: Item) -> bool:
        """Whether a training row has the item's prompt, or is of its group."""
        return item.group in self._groups or _prompt_hash(item.messages) in self._prompts

    def item(self, row: dict[str, Any]) -> Item:
        """The item of a row of test.parquet; kind `text` where only a judge can check it."""
        *prompt, last = (Message(**message) for message in row["messages"])
        reference, label = last.content.strip(), plain(last.content)
        key = _label_set(prompt[-1].content)
        kind: Kind = "text"
        choices: set[str] = set()
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
    """A prompt as compared with the training prompts: its words, case and spacing apart."""
    text = "\n".join(f"{message.role} {message.content}" for message in messages)
    return sha256_bytes(" ".join(text.casefold().split()).encode("utf-8", "backslashreplace"))


@dataclass(frozen=True, slots=True)
class Pair:
    """One item with the texts of both answers and their grades, by variant."""

    item: Item
    texts: dict[str, str]
    graded: dict[str, Graded | None]

    def holds(self, variant: str, test: Callable[[Graded], bool]) -> bool:
        """Whether an answer is graded and its grade passes a test."""
        graded = self.graded[variant]
        return graded is not None and test(graded)


def load_pairs(folder: Path) -> list[Pair]:
    """Items with both answers, graded now."""
    pairs: dict[str, Pair] = {}
    for row in read_jsonl(folder / "predictions.jsonl"):
        key = row["item"]["id"]
        pair = pairs.get(key) or pairs.setdefault(key, Pair(Item.from_json(row["item"]), {}, {}))
        pair.texts[row["model"]] = row["text"]
        pair.graded[row["model"]] = pair.item.grade(row["text"])
    return [*pairs.values()]
