"""Finance tasks: how a file of questions is asked, read and scored.

A task is a function that makes a `Question` of one row, registered by `@task`. Every module of
this package is imported, so a new task is a new file here and nothing else:

    @task("intents", "the intent of a bank customer's message")
    def intents(row: Row) -> Question:
        return Question(row["prompt"], row["answer"], "label", ("fee", "card"))

Its questions are a JSON Lines file, a data set of the hub, or `questions`, a file beside it.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fintune.errors import ConfigError, DataError
from fintune.evals.grading import UNREFERENCED, Kind, listed_choices
from fintune.evals.items import Item
from fintune.example import Message
from fintune.files import sha256_file
from fintune.hub import hub_error

Row = dict[str, Any]
SPLIT = "test"
"""Of a data set on the hub."""


class Question(NamedTuple):
    """What one row asks. A label without `choices` takes those that its prompt lists."""

    prompt: str
    reference: str
    kind: Kind
    choices: tuple[str, ...] = ()


class Task(NamedTuple):
    """A registered task."""

    question: Callable[[Row], Question]
    description: str
    questions: str
    columns: dict[str, str]


_TASKS: dict[str, Task] = {}


def task(
    name: str,
    description: str,
    *,
    questions: str = "",
    columns: dict[str, str] | None = None,
) -> Callable[[Callable[[Row], Question]], Callable[[Row], Question]]:
    """Register a function as a task.

    Args:
        name: its key in `eval.tasks`.
        description: what the task asks.
        questions: a JSON Lines file in this package, for a task that brings its own questions.
        columns: columns of the data set on the hub, by the name that the function reads.
    """

    def register(function: Callable[[Row], Question]) -> Callable[[Row], Question]:
        _TASKS[name] = Task(function, description, questions, columns or {})
        return function

    return register


@cache
def registered() -> dict[str, Task]:
    """Every task by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _TASKS


def task_items(name: str, source: str, limit: int) -> list[Item]:
    """Items of one task, the first `limit` by order of the file.

    Args:
        source: a JSON Lines file, a hub id, or empty for a task that brings its own questions.

    Raises:
        ConfigError: no such task, or no source. DataError: a line without prompt or answer.
    """
    found = registered().get(name)
    if found is None:
        known = ", ".join(sorted(registered()))
        raise ConfigError(f"eval.tasks: no task {name!r}", fix=f"known: {known}")
    if not source and not found.questions:
        raise ConfigError(
            f"eval.tasks.{name}: no file of questions",
            fix=f"give a JSON Lines file or a hub id: eval.tasks.{name}=PATH",
        )
    rows = _read(name, source or str(Path(__file__).with_name(found.questions)), found)
    return [_item(name, found, row, at) for at, row in zip(range(limit), rows, strict=False)]


def source_hash(source: str) -> str:
    """What names a task's questions in the inputs: a file's sha256, a hub id, or `bundled`."""
    path = Path(source).expanduser()
    return (sha256_file(path) if path.is_file() else source) if source else "bundled"


def _read(name: str, source: str, task: Task) -> Iterator[Row]:
    path = Path(source).expanduser()
    if path.is_file():
        for number, line in enumerate(path.open(encoding="utf-8"), start=1):
            try:
                yield json.loads(line)
            except ValueError:
                raise DataError(f"{path}, line {number}: not JSON") from None
        return
    if path.suffix or source.startswith((".", "/", "~")):
        raise DataError(f"eval.tasks: no file at {path}")
    import datasets  # seconds to import, and only a hub id needs it

    try:
        rows = datasets.load_dataset(source, split=SPLIT)
    except Exception as error:
        raise hub_error(error, source, setting=f"eval.tasks.{name}") from None
    for row in rows:
        yield {**row, **{ours: row.get(theirs) for ours, theirs in task.columns.items()}}


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
