"""What is asked, and when an answer is right.

An `Item` is one question with its reference; `grade` reads an answer and gives one of four
outcomes: correct, wrong, abstained (said that it cannot be answered), unparsed (no number or
label found). Numbers are decided by `fintune.numbers` alone, labels by the words offered.

Items come from the checkable `decide` rows, and from task files in the format of one JSON object
a line (`id`, `prompt`, `answer`, and where it applies `choices`, `context_id`, ...). How a task
file is asked, read and scored is one small YAML file in `evals/tasks/`.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from fintune import numbers
from fintune.config import Section
from fintune.errors import ConfigError, DataError
from fintune.example import Message
from fintune.files import read_toml, sha256_file

Kind = Literal["number", "label", "span", "tags", "text", "unanswerable", "refuse", "comply"]
Outcome = Literal["correct", "wrong", "abstained", "unparsed"]

LABEL_WORDS = 4
"""Most words of an answer that may be a label."""
LABEL_ROWS = 5
"""A short answer that this many training rows share is a label."""

PHRASES = read_toml(__file__, "phrases.toml")
_ABSTAINS = re.compile(PHRASES["abstains"])
_REFUSES = re.compile(PHRASES["refuses"])
_LISTS = re.compile(PHRASES["lists"])
_QUESTION = re.compile(r"(?im)(?:^|(?<=\s))(?:question|q|user)\s*:(?=\s)")
_NOT = re.compile(
    r"(?i)(?:\bnot?|n['’]t|\bneither|\bnor|\brather than|\binstead of)\s+(?:an?\s+|the\s+)?\Z"
)


@dataclass(frozen=True, slots=True)
class Item:
    """One question, its reference, and what is needed to grade an answer.

    `group` names the document or row family it came from (the unit of resampling); `commonest` is
    the answer that a model would give that always says the commonest of its kind.
    """

    id: str
    task: str
    kind: Kind
    group: str
    messages: tuple[Message, ...]
    reference: str
    choices: tuple[str, ...] = ()
    commonest: str | None = None

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
        messages = tuple(Message(**message) for message in row["messages"])
        return Item(**{**row, "messages": messages, "choices": tuple(row["choices"])})


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


def grade(item: Item, answer: str) -> Graded | None:
    """Grade an answer, or None where only a judge can (`kind="text"`)."""
    if item.kind == "text":
        return None
    if item.kind == "number":
        return _grade_number(item, answer)
    if item.kind in ("unanswerable", "refuse", "comply"):
        pattern = _ABSTAINS if item.kind == "unanswerable" else _REFUSES
        found = pattern.search(answer)
        right = bool(found) == (item.kind != "comply") and bool(answer)
        return Graded("correct" if right else "wrong", right, found[0] if found else None)
    if item.kind == "label":
        read = read_label(answer, item.choices)
        right = read is not None and _plain(read) == _plain(item.reference)
    elif item.kind == "tags":
        wanted, given = (
            [part.strip() for part in text.split(",")] for text in (item.reference, answer)
        )
        read, right = answer.split("\n")[0][:400] or None, wanted == given
    else:
        wanted_words = _plain(item.reference)
        read = answer[:400] if wanted_words in _plain(answer) else None
        right = read is not None and len(_plain(answer)) <= 4 * len(wanted_words) + 80
    if right:
        return Graded("correct", True, read)
    if _ABSTAINS.search(answer):
        return Graded("abstained", False)
    return Graded("wrong" if read else "unparsed", False, read)


def _grade_number(item: Item, answer: str) -> Graded:
    verdict = numbers.compare(item.reference, answer, question=item.question, context=item.context)
    known = (item.context, item.question, item.reference)
    free = tuple(answer[a.start : a.end] for a in numbers.ungrounded(answer, *known))
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
    whole = _plain(answer)
    for choice in choices:
        if whole == _plain(choice):
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


class DecideItems:
    """Which `decide` rows can be checked by arithmetic or by their label, learnt from the rows
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
                counts[_plain(answer)] += not numbers.is_number_answer(answer)
        self._labels = {label for label, count in counts.items() if count >= LABEL_ROWS and label}
        self._commonest: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for prompt, answer in rows:
            if numbers.is_number_answer(answer):
                self._commonest["number",][answer] += 1
            elif _plain(answer) in self._labels:
                self._commonest[self._family(prompt)][answer] += 1
                self._commonest["label",][answer] += 1

    def item(self, row: dict[str, Any]) -> Item:
        """The item of a row of validation.parquet; kind `text` where only a judge can check it."""
        messages = tuple(Message(**message) for message in row["messages"])
        *prompt, last = messages
        reference = last.content.strip()
        family = self._family(prompt[-1].content)
        kind: Kind = "text"
        choices: tuple[str, ...] = ()
        if numbers.is_number_answer(reference):
            kind, family = "number", ("number",)
        elif 0 < len(reference.split()) <= LABEL_WORDS and (
            _plain(reference) in self._labels or _plain(reference) in family
        ):
            kind = "label"
            offered = {answer.strip(" .") for answer in self._commonest[family]}
            choices = tuple(sorted({*family, *offered, reference}))
        counted = self._commonest[family] or self._commonest["label",]
        most = counted.most_common(1) if kind != "text" else []
        return Item(
            id=row["example_id"],
            task=f"{row['source']}:{kind}",
            kind=kind,
            group=row["group"],
            messages=tuple(prompt),
            reference=reference,
            choices=choices,
            commonest=most[0][0] if most else None,
        )

    def _family(self, prompt: str) -> tuple[str, ...]:
        """The label set that a prompt lists, or ()."""
        return tuple(sorted({_plain(choice) for choice in listed_choices(prompt)}))


class Task(Section):
    """How a task file is asked, read and scored."""

    description: str = Field(description="what the task asks, for the report")
    kind: Kind | Literal["auto"] = Field(
        description="how an answer is scored; auto: a number where the reference is one, else span"
    )
    ask: str = Field("{prompt}", description="user turn; {prompt} is the line's own text")
    system: str = Field("", description="system turn")
    answer: tuple[str, ...] = Field(("answer",), description="keys of the reference; first found")
    choices: tuple[str, ...] = Field((), description="labels, where the lines list none")
    group: str = Field("context_id", description="key of the document that questions share")
    hub: dict[str, str] = Field(
        {}, description="columns of the hub data set, where they differ, and its split"
    )
    file: str = Field("", description="bundled questions beside the task file")


def task_items(name: str, source: str, limit: int) -> list[Item]:
    """Items of one task, the first `limit` by order of the file.

    Args:
        name: a file of `evals/tasks/`, without its ending.
        source: a JSON Lines file, a hub id, or empty for a task that brings its own questions.

    Raises:
        ConfigError: no such task, or no source. DataError: a line without prompt or answer.
    """
    folder = resources.files("fintune.evals") / "tasks"
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith("yaml"))
        raise ConfigError(f"eval.tasks: no task {name!r}", fix=f"known: {', '.join(known)}")
    try:
        task = Task.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ConfigError(f"task file {name}.yaml: {error}") from None
    if not source and not task.file:
        raise ConfigError(
            f"eval.tasks.{name}: no file of questions",
            fix=f"give a JSON Lines file or a hub id: eval.tasks.{name}=PATH",
        )
    bundled = (folder / task.file).read_text(encoding="utf-8") if not source else None
    lines = map(json.loads, bundled.splitlines()) if bundled else _read(source, task)
    return [
        _task_item(name, task, row, number, source)
        for number, row in zip(range(limit), lines, strict=False)
    ]


def source_hash(source: str) -> str:
    """What names a task's questions in the inputs: a file's sha256, a hub id, or `bundled`."""
    path = Path(source).expanduser()
    return (sha256_file(path) if path.is_file() else source) if source else "bundled"


def _read(source: str, task: Task) -> Iterator[dict[str, Any]]:
    path = Path(source).expanduser()
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise DataError(f"{path}, line {number}: not JSON") from None
        return
    if path.suffix or source.startswith((".", "/", "~")):
        raise DataError(f"eval.tasks: no file at {path}")
    import datasets  # seconds to import, and only a hub id needs it

    columns = {ours: theirs for ours, theirs in task.hub.items() if ours != "split"}
    try:
        rows = datasets.load_dataset(source, split=task.hub.get("split", "test"))
    except (OSError, ValueError) as error:
        raise DataError(f"eval.tasks: {source} does not load: {str(error)[:200]}") from None
    for row in rows:
        yield {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}


def _task_item(name: str, task: Task, row: dict[str, Any], number: int, source: str) -> Item:
    found = [row[key] for key in task.answer if row.get(key) not in (None, "")]
    if not row.get("prompt") or not (found or task.kind in ("unanswerable", "refuse", "comply")):
        raise DataError(
            f"{source or name}, line {number + 1}: no prompt or no answer",
            fix=f"a line needs `prompt` and one of: {', '.join(task.answer)}",
        )
    reference = str(found[0]) if found else ""
    kind = row.get("kind") or task.kind
    if kind == "auto":
        kind = "number" if numbers.is_number_answer(reference) else "span"
    messages = [Message("system", task.system)] if task.system else []
    messages.append(Message("user", task.ask.format(prompt=row["prompt"])))
    choices = tuple(row.get("choices") or task.choices or listed_choices(row["prompt"]))
    return Item(
        id=f"{name}/{row.get('id', number)}",
        task=name,
        kind=kind,
        group=f"{name}/{row.get(task.group) or row.get('id', number)}",
        messages=tuple(messages),
        reference=reference,
        choices=choices if kind == "label" else (),
    )


def _plain(text: str) -> str:
    """A label as compared: case, outer punctuation and runs of spaces do not matter."""
    return " ".join(text.casefold().strip(" \t\n.,;:!?\"'`*()[]{}").split())
