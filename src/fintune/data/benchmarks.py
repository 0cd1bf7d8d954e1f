"""Questions of benchmarks, which must not be trained."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from fintune.config import DataConfig, SourceConfig
from fintune.console import warn
from fintune.data.ngrams import asked
from fintune.data.pii import mask
from fintune.data.schema import Rejected, to_messages
from fintune.data.sources import Source, named
from fintune.errors import DataError
from fintune.example import Example


@dataclass(frozen=True, slots=True)
class Question:
    """One benchmark question: where it is from, its text and answer."""

    benchmark: str
    line: int
    text: str
    answer: str


def find_benchmarks(config: DataConfig) -> list[Source]:
    """Every file and hub id of `data.benchmarks`; errors as of `find_sources`."""
    return named([SourceConfig(**item.model_dump()) for item in config.benchmarks])


def read_benchmarks(sources: list[Source], *, redact: bool = False) -> list[Question]:
    """Questions of the benchmarks; a number is read as its text.

    Args:
        redact: mask personal data, as in the rows that they are compared with.

    Raises:
        DataError: a benchmark without one readable question.
    """
    questions: list[Question] = []
    read: dict[str, Counter[bool]] = {source.config.path: Counter() for source in sources}
    for source in sources:
        for line, raw in source.rows():
            question = _question(source, line, raw)
            read[source.config.path][question is not None] += 1
            if question is not None:
                questions.append(question)
    for path, counts in read.items():
        if not counts[True]:
            raise DataError(
                f"benchmark {path} holds no readable question",
                fix="its rows need a column prompt, question, user or messages, or name theirs:"
                " data.benchmarks: [{path: ..., columns: {user: QUESTION, assistant: ANSWER}}]",
            )
        if counts[False]:
            warn(f"benchmark {path}: {counts[False]} rows hold no readable question: not sought")
    if redact:
        return [
            replace(each, text=mask(each.text)[0], answer=mask(each.answer)[0])
            for each in questions
        ]
    return questions


def _question(source: Source, line: int, raw: Any) -> Question | None:
    if isinstance(raw, dict):  # answers are compared as text: 42 for 42.0, True
        numbers = {name: n for name, n in raw.items() if isinstance(n, int | float)}
        raw = raw | {name: str(n).removesuffix(".0") for name, n in numbers.items()}
    try:
        messages = to_messages(raw, source.config.columns)
    except Rejected:
        return None
    text = asked(Example(source.name, line, "", messages))
    if not text.strip():
        return None
    return Question(source.name, line, text, messages[-1].content or str(raw.get("answer", "")))
