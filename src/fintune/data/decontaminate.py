"""The questions of benchmarks, that training rows must not repeat (`fintune.rewording`)."""

import contextlib
from typing import Any

from fintune.console import warn
from fintune.data.schema import Rejected, to_messages
from fintune.data.texts import mask_messages
from fintune.errors import DataError
from fintune.example import Example, Message
from fintune.formats import parse
from fintune.ngrams import asked
from fintune.sources import Source


def read_benchmarks(sources: list[Source], *, redact: bool = False) -> list[Example]:
    """Questions of the benchmarks, with their answers.

    Args:
        redact: mask personal data, as in the rows that they are compared with.

    Raises:
        DataError: a benchmark without one readable question.
    """
    questions: list[Example] = []
    for source in sources:
        rows = [row for batch in source.batches() for row in batch]
        readable = [each for row in rows if asked(each := _question(source, *row, redact)).strip()]
        if not readable:
            fix = "name its columns: data.benchmarks: [{path: ..., columns: {user: QUESTION}}]"
            raise DataError(f"benchmark {source.name} holds no readable question", fix=fix)
        if unread := len(rows) - len(readable):
            warn(f"benchmark {source.name}: {unread} rows hold no readable question: not compared")
        questions += readable
    return questions


def _question(source: Source, line: int, given: Any, redact: bool) -> Example:
    raw, messages = parse(given), tuple[Message, ...]()
    if isinstance(raw, dict):  # a yes or no is an answer here
        raw = {name: str(cell) if isinstance(cell, bool) else cell for name, cell in raw.items()}
    with contextlib.suppress(Rejected, RecursionError):
        messages = to_messages(raw, source.config.columns)
    return Example(source.name, line, "", mask_messages(messages)[0] if redact else messages)
