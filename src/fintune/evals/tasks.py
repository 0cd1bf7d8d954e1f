"""Finance tasks: how the rows of a benchmark become questions.

A task is a file of `suite/`, or a function registered by `@task` where rows need more than other
names of columns. Its questions are a file, a folder, a data set of the hub, or `questions`, a file
beside this one.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from decimal import Decimal
from heapq import nsmallest
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, get_args

from fintune.config import DatasetConfig, EvalConfig, SourceConfig
from fintune.console import some, warn
from fintune.errors import ConfigError, DataError
from fintune.evals.grading import UNREFERENCED, Item, Kind, grade, listed_choices, plain
from fintune.evals.numbers import is_number_answer
from fintune.example import Message, named_document
from fintune.formats import Unreadable, parse
from fintune.ngrams import hash64
from fintune.sources import Known, Source
from fintune.sources import named as named_sources

Row = dict[str, Any]
Reader = Callable[[Row], Row]


class Task(NamedTuple):
    """How a benchmark's rows, with `prompt` and `answer`, are asked and graded.

    Attributes:
        kind: of grading, one of `grading.Kind`; "number or span" is a number where the reference
            is one, "refuse or comply" what the row's `kind` says. A row's own has precedence.
        choices: of a label; a row's own have precedence, and without any those count that its
            prompt lists.
        questions: a JSON Lines file of this folder, for a task whose questions are bundled.
        columns: columns of the data set, by the name that is read here.
        ask: the prompt of a row without one, with the row's columns in braces.
        labels: what the integers of a data set's label column mean, in their order.
        file: of the questions, in a folder of the suite's (`eval.suite`).
        hub: the data set of the hub that holds the questions, and its split.
        source: where the questions come from. licence: theirs.
        read: makes such a row of the data set's.
    """

    kind: str
    choices: tuple[str, ...] = ()
    questions: str = ""
    columns: dict[str, str] = {}
    ask: str = ""
    labels: tuple[str, ...] = ()
    file: str = ""
    hub: dict[str, str] = {}
    source: str = ""
    licence: str = ""
    read: Reader = dict

    def prompt(self, row: Row) -> str:
        """The question of a row that has none, by `ask`; a brace that names no column stays."""
        known = {"options": ", ".join(self.choices)} | row
        return re.sub(r"\{(\w+)\}", lambda found: str(known.get(found[1], found[0])), self.ask)


TASKS = {
    path.stem: Task(**tomllib.loads(path.read_text(encoding="utf-8")))
    for path in sorted(Path(__file__).with_name("suite").glob("*.toml"))
}
"""Every task by name, the key in `eval.tasks`."""


def task(name: str, kind: str, **options: Any) -> Callable[[Reader], Reader]:
    """Register a function as a task: from a row of its data set it makes one as `Task` says.

    @task("intents", "label", choices=("fee", "card"))
    def intents(row: Row) -> Row:
        return {"prompt": f"What does the customer want? {row['text']}", "answer": row["intent"]}

    Args:
        options: of `Task`.
    """

    def register(function: Reader) -> Reader:
        TASKS[name] = Task(kind, **options, read=function)
        return function

    return register


def suite_tasks(settings: EvalConfig) -> dict[str, DatasetConfig]:
    """The tasks of `eval.suite` and `eval.tasks`; of one that both name, the latter's questions.

    Raises:
        ConfigError: a folder that holds no task's file.
    """
    named, suite = settings.tasks, settings.suite
    if suite is None:
        return named
    bundled = {name: DatasetConfig() for name, task in TASKS.items() if task.questions}
    if suite == "hub":
        held = {name: task.hub for name, task in TASKS.items() if task.hub}
        return bundled | {name: DatasetConfig(**hub) for name, hub in held.items()} | named
    files = {
        name: Path(suite).expanduser() / task.file for name, task in TASKS.items() if task.file
    }
    there = {name: DatasetConfig(path=str(path)) for name, path in files.items() if path.exists()}
    if not there:
        what, names = (
            f"eval.suite: no task's file in {suite}",
            (path.name for path in files.values()),
        )
        raise ConfigError(what, fix=f"a folder of {some([*names])}; or `hub`")
    if absent := files.keys() - there.keys() - named.keys():
        warn(f"eval.suite: {suite} has no file of {', '.join(sorted(absent))}")
    return bundled | there | named


def find_questions(tasks: dict[str, DatasetConfig], known: Known) -> dict[str, list[Source]]:
    """Where the questions of each task lie; of a hub id at one commit (see `sources.locate`).

    Raises:
        ConfigError: no such task, or no source. DataError: no such file, or the hub refuses.
    """
    sources = {}
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
        sources[name] = named_sources([wanted], setting, known)
    return sources


def identity(item: DatasetConfig, sources: list[Source]) -> Any:
    """What names a task's questions in the inputs: files' sha256, or a hub id with its commit."""
    hashes = [source.identity for source in sources]
    return item.model_dump() | {"identity": hashes[0]} if sources[0].repository else hashes


def task_items(name: str, sources: list[Source], limit: int) -> list[Item]:
    """Items of one task, `limit` of them by hash of their prompt, in the order of its files.

    Raises:
        DataError: a line that cannot be read, or without a prompt or an answer that can be right;
            no question at all.
    """
    rows = enumerate(chain.from_iterable(_read(name, source) for source in sources))
    chosen = nsmallest(limit, rows, key=lambda numbered: hash64(str(numbered[1][0].get("prompt"))))
    items = [_item(name, *row, at) for at, row in sorted(chosen, key=itemgetter(0))]
    if not items:
        what = f"eval.tasks.{name}: {sources[0].name} holds no question"
        raise DataError(what, fix="give a line for each question, or leave the task out")
    return items


def _read(name: str, source: Source) -> Iterator[tuple[Row, int, str]]:
    """Rows as the task says, each with its line and file."""
    columns = TASKS[name].columns
    for line, given in source.rows():
        row, place = parse(given), f"eval.tasks.{name}: {source.name}, line {line}"
        if not isinstance(row, dict):
            wrong = f"{row.reason}, {row.detail}" if isinstance(row, Unreadable) else "no object"
            raise DataError(f"{place}: {wrong}")
        named = {ours: row.get(theirs) for ours, theirs in columns.items()}
        row |= {ours: value for ours, value in named.items() if value not in (None, "")}
        row.setdefault("prompt", TASKS[name].prompt(row))
        try:
            row["answer"] = _labelled(TASKS[name], row.get("answer"))
            found = TASKS[name].read(row)
            yield {key: _whole(value) for key, value in found.items()}, line, source.name
        except (LookupError, TypeError):
            what = f"{place}: columns are missing"
            raise DataError(what, fix="a line needs what the task reads") from None


def _whole(value: Any) -> Any:
    """A text whose lone surrogates, half a character each, are U+FFFD."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _labelled(task: Task, answer: Any) -> Any:
    """The label that an integer of the data set means."""
    index = str(answer)
    return task.labels[int(index)] if task.labels and index.isdecimal() else answer


def _item(name: str, row: Row, line: int, file: str, number: int) -> Item:
    task, prompt = TASKS[name], row.get("prompt")
    kind: Any = str(row.get("kind") or task.kind)
    place = f"eval.tasks.{name}, line {line}"
    try:
        reference = _text(row.get("answer"))
        choices = _choices(row.get("choices")) or task.choices
    except ValueError as error:
        raise DataError(f"{place}: {error}", fix=f"give each line of {file} one answer") from None
    chosen = "number" if is_number_answer(reference) else "span"
    kind = {"number or span": chosen, "refuse or comply": "refuse"}.get(kind, kind)
    if kind not in get_args(Kind):
        known = ", ".join(get_args(Kind))
        raise DataError(f"{place}: no kind {kind[:40]!r}", fix=f"known kinds: {known}")
    if not isinstance(prompt, str) or not prompt.strip() or not (reference or kind in UNREFERENCED):
        what = f"{place}: no prompt or no answer"
        raise DataError(what, fix=f"a line of {file} needs `prompt` and `answer`, both text")
    key = row.get("id", number)
    item = Item(
        id=f"{name}/{key}",
        task=name,
        kind=kind,
        group=f"document {named}" if (named := named_document(row)) else f"{name}/{key}",
        messages=(Message("user", prompt),),
        reference="" if kind in UNREFERENCED else reference,
        choices=choices or listed_choices(prompt) if kind == "label" else (),
    )
    graded = grade(kind, reference, reference, item.choices) if item.reference else None
    if item.reference and not plain(reference) or graded and not graded.correct:
        among = f", of {', '.join(item.choices) or 'no choices'}" if kind == "label" else ""
        raise DataError(
            f"{place}: the answer {reference[:80]!r} can never be right, as a {kind}{among}",
            why=f"given back word for word it would be wrong ({file})",
            fix="write it as a model would say it: a label by its words, not by an index",
        )
    return item


def _text(value: Any) -> str:
    """A text or number of a row; of a list that holds one.

    Raises:
        ValueError: it is something else.
    """
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"{str(value)[:80]} is no text or number, but a {type(value).__name__}")
    return str(_whole(str(value))).strip()


def _choices(given: Any) -> tuple[str, ...]:
    """The labels of a row: a list, or a text that lists them, as a cell of a CSV does."""
    if isinstance(given, str):
        given = re.split(r"[,;|/\n]", given.strip("[](){} "))
    listed = given if isinstance(given, list) or not given else [given]
    return tuple(_text(label).strip(" \"'") for label in listed or ())
