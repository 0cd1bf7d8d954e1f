"""Finance tasks: how the rows of a benchmark become questions.

A task is an entry of `[tasks]` in phrases.toml, or a function registered by `@task` where rows need
more than other names of columns. Its questions are a file, a folder, a data set of the hub, or
`questions`, a file beside this one.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from fintune.config import DatasetConfig, SourceConfig
from fintune.errors import ConfigError, DataError
from fintune.evals.grading import PHRASES, UNREFERENCED, Item, listed_choices
from fintune.evals.numbers import is_number_answer
from fintune.example import Message
from fintune.formats import Unreadable, parse
from fintune.sources import Known, Source
from fintune.sources import named as named_sources

Row = dict[str, Any]
Reader = Callable[[Row], Row]


class Task(NamedTuple):
    """How a benchmark's rows, with `prompt` and `answer`, are asked and graded.

    Attributes:
        kind: of grading, one of `grading.Kind`; "number or span" is a number where the reference
            is one, "refuse or comply" what the row's `kind` says.
        choices: of a label; a row's own have precedence, and without any those count that its
            prompt lists.
        questions: a JSON Lines file of this folder, for a task whose questions are bundled.
        columns: columns of the data set, by the name that is read here.
        read: makes such a row of the data set's.
    """

    kind: str
    choices: tuple[str, ...] = ()
    questions: str = ""
    columns: dict[str, str] = {}
    read: Reader = dict


TASKS = {name: Task(**entry) for name, entry in PHRASES["tasks"].items()}
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
    """Items of one task, the first `limit` by order of its files.

    Raises:
        DataError: a line that cannot be read, or without prompt or answer.
    """
    rows = chain.from_iterable(_read(name, source) for source in sources)
    return [_item(name, row, at) for at, row in zip(range(limit), rows, strict=False)]


def _read(name: str, source: Source) -> Iterator[Row]:
    columns = TASKS[name].columns
    for line, given in source.rows():
        row = parse(given)
        if not isinstance(row, dict):
            wrong = f"{row.reason}, {row.detail}" if isinstance(row, Unreadable) else "no object"
            raise DataError(f"eval.tasks.{name}: {source.name}, line {line}: {wrong}")
        named = {ours: row.get(theirs) for ours, theirs in columns.items()}
        row |= {ours: value for ours, value in named.items() if value not in (None, "")}
        try:
            yield TASKS[name].read(row)
        except (LookupError, TypeError):
            what = f"eval.tasks.{name}: {source.name}, line {line}: columns are missing"
            raise DataError(what, fix="a line needs what the task reads") from None


def _item(name: str, row: Row, number: int) -> Item:
    task, prompt, reference = TASKS[name], row.get("prompt"), str(row.get("answer", ""))
    kind: Any = task.kind
    if kind == "number or span":
        kind = "number" if is_number_answer(reference) else "span"
    elif kind == "refuse or comply":
        kind = row.get("kind") or "refuse"
    if not isinstance(prompt, str) or not prompt or not (reference or kind in UNREFERENCED):
        what = f"eval.tasks.{name}, line {number + 1}: no prompt or no answer"
        raise DataError(what, fix="a line needs `prompt` and `answer`")
    key, choices = row.get("id", number), tuple(row.get("choices") or task.choices)
    return Item(
        id=f"{name}/{key}",
        task=name,
        kind=kind,
        group=f"{name}/{row.get('context_id') or key}",
        messages=(Message("user", prompt),),
        reference="" if kind in UNREFERENCED else reference,
        choices=choices or listed_choices(prompt) if kind == "label" else (),
    )
