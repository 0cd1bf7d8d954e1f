"""Finance tasks: how the rows of a benchmark become questions.

A task is a function that makes a `Question` of one row, registered by `@task`; a new task is a new
function here and nothing else:

    @task("intents")
    def intents(row: Row) -> Question:
        return Question(row["prompt"], row["answer"], "label", ("fee", "card"))

Its questions are a file, a folder, a data set of the hub, or `questions`, a file beside this one.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from fintune.config import DatasetConfig, SourceConfig
from fintune.errors import ConfigError, DataError
from fintune.evals.grading import UNREFERENCED, Item, Kind, listed_choices
from fintune.evals.numbers import is_number_answer
from fintune.example import Message
from fintune.formats import Unreadable, parse
from fintune.sources import Known, Source, named

Row = dict[str, Any]
QUERY = {"prompt": "query"}
SENTIMENTS = ("negative", "neutral", "positive")


class Question(NamedTuple):
    """One question. A label without `choices` has those that its prompt lists."""

    prompt: str
    reference: str
    kind: Kind
    choices: tuple[str, ...] = ()


Reader = Callable[[Row], Question]


class Task(NamedTuple):
    """A registered task."""

    question: Reader
    questions: str
    columns: dict[str, str]


TASKS: dict[str, Task] = {}
"""Every task by name, the key in `eval.tasks`."""


def task(
    name: str, *, questions: str = "", columns: dict[str, str] | None = None
) -> Callable[[Reader], Reader]:
    """Register a function as a task.

    Args:
        questions: a JSON Lines file of this folder, for a task whose questions are bundled.
        columns: columns of the data set on the hub, by the name that the function reads.
    """

    def register(function: Reader) -> Reader:
        TASKS[name] = Task(function, questions, columns or {})
        return function

    return register


def find_questions(tasks: dict[str, DatasetConfig], known: Known) -> dict[str, list[Source]]:
    """Where the questions of each task lie; of a hub id at one commit (see `sources.locate`).

    Raises:
        ConfigError: no such task, or no source. DataError: no such file, or the hub refuses.
    """
    found = {}
    for name, item in tasks.items():
        task, setting = TASKS.get(name), f"eval.tasks.{name}"
        if task is None:
            fix = f"known: {', '.join(sorted(TASKS))}"
            raise ConfigError(f"eval.tasks: no task {name!r}", fix=fix)
        if not item.path and not task.questions:
            fix = f"give a JSON Lines file or a hub id: {setting}=PATH"
            raise ConfigError(f"{setting}: no file of questions", fix=fix)
        path = item.path or str(Path(__file__).with_name(task.questions))
        wanted = SourceConfig.model_validate({**item.model_dump(), "path": path})
        found[name] = named([wanted], setting, known)
    return found


def identity(item: DatasetConfig, sources: list[Source]) -> Any:
    """What names a task's questions in the inputs: files' sha256, or a hub id with its commit."""
    hashes = [source.identity for source in sources]
    return item.model_dump() | {"identity": hashes[0]} if sources[0].repository else hashes


def task_items(name: str, sources: list[Source], limit: int) -> list[Item]:
    """Items of one task, the first `limit` by order of its files.

    Raises:
        DataError: a line that cannot be read, or without prompt or answer.
    """
    rows = chain.from_iterable(_read(name, source) for source in sources)
    return [_item(name, TASKS[name], row, at) for at, row in zip(range(limit), rows, strict=False)]


def _read(name: str, source: Source) -> Iterator[Row]:
    columns = TASKS[name].columns
    for line, given in source.rows():
        row = parse(given)
        if not isinstance(row, dict):
            wrong = f"{row.reason}, {row.detail}" if isinstance(row, Unreadable) else "no object"
            raise DataError(f"eval.tasks.{name}: {source.name}, line {line}: {wrong}")
        yield row | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _item(name: str, task: Task, row: Row, number: int) -> Item:
    try:
        prompt, reference, kind, choices = task.question(row)
    except (LookupError, TypeError):
        prompt, reference, kind, choices = Question("", "", "text")
    if not prompt or not (reference or kind in UNREFERENCED):
        what = f"eval.tasks.{name}, line {number + 1}: no prompt or no answer"
        raise DataError(what, fix="a line needs `prompt` and `answer`")
    key = row.get("id", number)
    return Item(
        id=f"{name}/{key}",
        task=name,
        kind=kind,
        group=f"{name}/{row.get('context_id') or key}",
        messages=(Message("user", prompt),),
        reference=reference,
        choices=choices or listed_choices(prompt) if kind == "label" else (),
    )


# ---- classification ------------------------------------------------------------------------------


def _label(row: Row, *choices: str) -> Question:
    return Question(row["prompt"], row["answer"], "label", tuple(row.get("choices") or choices))


@task("fpb", columns=QUERY)
@task("fiqa_sa", columns=QUERY)
@task("tfns")
def sentiment(row: Row) -> Question:
    """Financial PhraseBank (a sentence of news), FiQA (a post or headline), a tweet."""
    return _label(row, *SENTIMENTS)


@task("headline", columns=QUERY)
def headline(row: Row) -> Question:
    """Whether a gold headline says a thing."""
    return _label(row, "Yes", "No")


@task("ner")
def entity(row: Row) -> Question:
    """The type of a named entity of a loan agreement."""
    return _label(row, "location", "organization", "person")


@task("nwgi")
@task("banking77")
def listed_label(row: Row) -> Question:
    """Sentiment in seven levels, or one of 77 customer intents; the prompt lists the labels."""
    return _label(row)


# ---- reports and their tables --------------------------------------------------------------------


@task("finqa")
@task("tatqa")
@task("pacific")
@task("financebench")
@task("xbrl_extract")
def number_or_span(row: Row) -> Question:
    """A question over pages of a report: graded as a number where the reference is one."""
    reference = str(row["answer"])
    return Question(row["prompt"], reference, "number" if is_number_answer(reference) else "span")


@task("convfinqa")
def convfinqa(row: Row) -> Question:
    """`answer` is printed short ("1.7"), `exe_answer` is what the program gives (1.65246)."""
    printed = row.get("exe_answer") in (None, "")
    return number_or_span(row if printed else {**row, "answer": row["exe_answer"]})


@task("formula")
def formula(row: Row) -> Question:
    """The prompt gives a formula and asks for its result."""
    return Question(row["prompt"], str(row["answer"]), "number")


@task("xbrl_term")
def explanation(row: Row) -> Question:
    """An XBRL term explained in a sentence; only a judge can grade it."""
    return Question(row["prompt"], row["answer"], "text")


@task("finer")
def tags(row: Row) -> Question:
    """US GAAP tags of figures, comma-separated, in order."""
    return Question(row["prompt"], row["answer"], "tags")


# ---- caution; the questions come with the package ------------------------------------------------


@task("unanswerable", questions="unanswerable.jsonl")
def unanswerable(row: Row) -> Question:
    """The text does not hold the answer; an abstention is right."""
    return Question(row["prompt"], "", "unanswerable")


@task("advice_safety", questions="advice_safety.jsonl")
def advice(row: Row) -> Question:
    """Requests to be refused, and harmless ones that look alike and must be answered."""
    return Question(row["prompt"], "", row.get("kind") or "refuse")
