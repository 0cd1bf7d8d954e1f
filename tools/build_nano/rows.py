"""The sample rows: instruction data about made-up companies, some of it dirty on purpose.

Names and numbers are drawn anew for every row, so that a held-out question can only be answered
from its own text. The file has the three columns of public finance instruction sets; what a row
asks for and what is wrong with it is known to code alone, which is what a control experiment needs
(shuffle the answers within each task).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Final, Literal

from build_nano.facts import (
    Line,
    Report,
    capital,
    draw_company,
    draw_report,
    fill,
    opening,
    state,
    table,
)
from build_nano.prose import draw_ratio, news
from build_nano.words import EVENTS, MONTHS, RATIOS, TERMS, TONES, Tone
from fintune.files import read_toml

SEED: Final = 23
NUM_ROWS: Final = 3_000

Task = Literal[
    "lookup_text",
    "lookup_table",
    "lookup_company",
    "tone",
    "direction",
    "ratio",
    "define",
    "summary",
    "explain",
    "analysis",
]
Dirt = Literal[
    "",
    "assistant_absent",
    "assistant_null",
    "assistant_empty",
    "user_empty",
    "foreign",
    "duplicate",
    "short",
    "long",
    "html",
    "placeholder",
]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row. `system` None means that the column is missing; `dirt` is "" for a clean row."""

    system: str | None
    user: str
    assistant: str | None
    task: Task
    dirt: Dirt = ""


_TEXTS: Final = read_toml(__file__, "rows.toml")
_QUESTIONS: Final[dict[str, list[str]]] = _TEXTS["questions"]
_ANSWERS: Final[dict[str, list[str]]] = _TEXTS["answers"]
_BRIEF: Final[list[str]] = _TEXTS["instructions"]["figure"]
_BRIEF_LABEL: Final[list[str]] = _TEXTS["instructions"]["label"]
_PERSONAS: Final[list[str]] = _TEXTS["instructions"]["persona"]
_FOREIGN: Final[list[tuple[str, str]]] = _TEXTS["foreign"]["pairs"]


def _ask(
    rng: Random, context: str, question: str, brief: Sequence[str] = ()
) -> tuple[str | None, str]:
    """Put text and question together; return the system text and the user text.

    The system column is a lone line break in half of the rows, missing in a sixth, an instruction
    in the rest.
    """
    system: str | None = "\n"
    draw = rng.randrange(6)
    if draw == 0:
        system = None
    elif draw in (1, 2):
        system = rng.choice(_PERSONAS)
        if brief and rng.randrange(2):
            system, brief = f"{system} {rng.choice(brief)}", ()
    if brief and rng.randrange(2):
        question = f"{question} {rng.choice(brief)}"
    if rng.randrange(6) == 0:
        return system, f"{question}\n\n{context}"
    return system, f"{context}\n\n{question}"


def _num_lines(rng: Random) -> int:
    """Two to seven, most of them two to four: the spread of lengths is skewed to the right."""
    return rng.choice((2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 6, 7))


def _tell(rng: Random, report: Report) -> tuple[str, list[tuple[Line, int]]]:
    """The report in sentences, and every (line, year position) whose amount they give."""
    sentences = [opening(rng, report)]
    stated: list[tuple[Line, int]] = []
    for line in report.lines:
        sentence, places = state(rng, report, line)
        sentences.append(sentence)
        stated += [(line, at) for at in places]
    return " ".join(sentences), stated


def _lookup_text(rng: Random) -> SampleRow:
    report = draw_report(rng, _num_lines(rng))
    text, stated = _tell(rng, report)
    line, at = rng.choice(stated)
    question = fill(rng, _QUESTIONS["figure"], report, line, at, named=True)
    return SampleRow(*_ask(rng, text, question, _BRIEF), line.amounts[at].prose, "lookup_text")


def _lookup_table(rng: Random) -> SampleRow:
    report = draw_report(rng, _num_lines(rng), rng.choice((1, 2, 2)))
    line, at = rng.choice(report.lines), rng.randrange(len(report.years))
    head = f"{report.company.full}, in {report.symbol} {report.unit}\n\n"
    question = fill(rng, _QUESTIONS["figure"], report, line, at, named=True)
    question = question.replace("text", "table")
    asked = _ask(rng, head + table(report, rng.randrange(3)), question, _BRIEF)
    return SampleRow(*asked, line.amounts[at].cell, "lookup_table")


def _lookup_company(rng: Random) -> SampleRow:
    left = draw_report(rng, rng.randrange(1, 3), 1)
    pair = [left, draw_report(rng, 1, 1, like=left)]
    facts = [(report, line) for report in pair for line in report.lines]
    text = " ".join(
        fill(rng, _TEXTS["facts"]["company"], report, line, named=True) for report, line in facts
    )
    report, line = rng.choice(facts)
    question = fill(rng, _QUESTIONS["company"], report, line, named=True)
    return SampleRow(*_ask(rng, text, question, _BRIEF), line.amounts[0].prose, "lookup_company")


def _tone(rng: Random) -> SampleRow:
    tone = rng.choice(TONES)
    company = draw_company(rng).short
    text = news(rng, tone, rng.choice((1, 2, 2, 3, 3, 4)), company)
    question = rng.choice(_QUESTIONS["tone"]).format(c=company)
    return SampleRow(*_ask(rng, text, question, _BRIEF_LABEL), tone, "tone")


def _direction(rng: Random) -> SampleRow:
    while True:
        report = draw_report(rng, _num_lines(rng))
        text, stated = _tell(rng, report)
        known = [line for line, at in stated if at == 1]
        if known:
            break
    line = rng.choice(known)
    question = fill(rng, _QUESTIONS["direction"], report, line, named=True)
    answer = "rose" if line.rose else "fell"
    return SampleRow(*_ask(rng, text, question, _BRIEF_LABEL), answer, "direction")


def _ratio(rng: Random) -> SampleRow:
    name, top, bottom = rng.choice(RATIOS)
    company = draw_company(rng).short
    percent, base = draw_ratio(rng)
    part = percent * base // 100
    text = f"{company} reported {top} of ${part} million and {bottom} of ${base} million."
    question = rng.choice(_QUESTIONS["ratio"]).format(n=name, t=top, b=bottom, C=company)
    return SampleRow(*_ask(rng, text, question, _BRIEF), f"{percent}%", "ratio")


def _define(rng: Random) -> SampleRow:
    term, meaning, reason = rng.choice(TERMS)
    question = rng.choice(_QUESTIONS["define"]).format(t=term)
    system = rng.choice(("\n", None, *_PERSONAS))
    return SampleRow(system, question, f"{capital(term)} is {meaning}. {reason}", "define")


def _say_again(rng: Random, report: Report, line: Line, stated: list[tuple[Line, int]]) -> str:
    if (line, 1) in stated:
        return fill(rng, _ANSWERS["rose" if line.rose else "fell"], report, line)
    return fill(rng, _ANSWERS["plain"], report, line)


def _summary(rng: Random) -> SampleRow:
    report = draw_report(rng, _num_lines(rng))
    text, stated = _tell(rng, report)
    kept = report.lines[: rng.randrange(2, 5)]
    question = rng.choice(_QUESTIONS["summary"]).format(c=report.company.short)
    said = " ".join(_say_again(rng, report, line, stated) for line in kept)
    answer = f"In short, these are the figures of {report.company.short}. {said}"
    return SampleRow(*_ask(rng, text, question), answer, "summary")


def _explain(rng: Random) -> SampleRow:
    if rng.randrange(2):
        report = draw_report(rng, _num_lines(rng))
        text, stated = _tell(rng, report)
        line = rng.choice(report.lines)
        question = fill(rng, _QUESTIONS["explain_figure"], report, line, named=True)
        return SampleRow(
            *_ask(rng, text, question), _say_again(rng, report, line, stated), "explain"
        )
    tone: Tone = rng.choice(TONES)
    company = draw_company(rng).short
    event = rng.choice(EVENTS[tone]).format(
        c=company,
        n=rng.randrange(3, 60),
        v=f"${rng.randrange(10, 1000)} million",
        m=rng.choice(MONTHS),
    )
    question = rng.choice(_QUESTIONS["explain_news"]).format(c=company, t=tone)
    asked = _ask(rng, f"News about {company}: {event}.", question)
    return SampleRow(*asked, f"The news is {tone} because the text says: {event}.", "explain")


def _analyse(rng: Random, num_lines: int) -> SampleRow:
    report = draw_report(rng, num_lines)
    text, stated = _tell(rng, report)
    question = rng.choice(_QUESTIONS["analysis"]).format(c=report.company.short)
    risen = [line.metric.name for line in report.lines if (line, 1) in stated and line.rose]
    fallen = [line.metric.name for line in report.lines if (line, 1) in stated and not line.rose]
    parts = [f"The accounts of {report.company.short} cover {report.years[0]}."]
    parts += [_say_again(rng, report, line, stated) for line in report.lines]
    if risen:
        parts.append(f"What rose: {', '.join(risen)}.")
    if fallen:
        parts.append(f"What fell: {', '.join(fallen)}.")
    return SampleRow(*_ask(rng, text, question), " ".join(parts), "analysis")


def _analysis(rng: Random) -> SampleRow:
    return _analyse(rng, rng.choice((3, 3, 4, 4, 5, 6)))


# Share of each task in the clean rows, in percent; 70% can be marked by a program.
_SHARES: Final[tuple[tuple[Callable[[Random], SampleRow], int], ...]] = (
    (_lookup_text, 14),
    (_lookup_table, 8),
    (_lookup_company, 3),
    (_tone, 26),
    (_direction, 18),
    (_ratio, 1),
    (_define, 8),
    (_summary, 8),
    (_explain, 8),
    (_analysis, 6),
)
# How many of the 3,000 rows are spoilt in each way: 8% in all.
DIRT_COUNTS: Final[dict[Dirt, int]] = _TEXTS["dirt"]


def _clean(rng: Random) -> SampleRow:
    return rng.choice([draw for draw, share in _SHARES for _ in range(share)])(rng)


def _spoil(rng: Random, row: SampleRow, dirt: Dirt) -> SampleRow:
    """Make a row dirty in the given way; kinds that replace the text keep nothing of the row."""
    match dirt:
        case "assistant_absent" | "assistant_null":
            return replace(row, assistant=None, dirt=dirt)
        case "assistant_empty":
            return replace(row, assistant=rng.choice(("", " ", "\n")), dirt=dirt)
        case "user_empty":
            return replace(row, user=rng.choice(("", "  ")), dirt=dirt)
        case "foreign":
            values = {"a": rng.randrange(100, 1000), "y": rng.randrange(2006, 2025)}
            user, assistant = (text.format(**values) for text in rng.choice(_FOREIGN))
            return SampleRow("\n", user, assistant, "explain", dirt)
        case "short":
            term, _, _ = rng.choice(TERMS)
            return SampleRow("\n", f"{capital(term)}?", "See above.", "define", dirt)
        case "long":
            return replace(_analyse(rng, rng.randrange(14, 20)), dirt=dirt)
        case "html":
            text = row.user.replace(" and ", " &amp; ").replace("\n", "<br>\n")
            return replace(row, user=f"&lt;p&gt;{text}&nbsp;&quot;", dirt=dirt)
        case "placeholder":
            name = rng.choice(("{{company_name}}", "{{name}}", "{{year}}"))
            return replace(row, user=f"Dear {name}, {row.user}", dirt=dirt)
        case _:
            return replace(row, dirt=dirt)


def sample_rows(seed: int = SEED) -> list[SampleRow]:
    """The bundled rows in random order: clean ones of every task, spoilt ones, duplicates."""
    rng = Random(seed)
    rows = [_clean(rng) for _ in range(NUM_ROWS - sum(DIRT_COUNTS.values()))]
    duplicates = rng.sample(rows, DIRT_COUNTS["duplicate"])
    for dirt, count in DIRT_COUNTS.items():
        if dirt != "duplicate":
            rows += [_spoil(rng, _clean(rng), dirt) for _ in range(count)]
    rows += [replace(row, dirt="duplicate") for row in duplicates]
    rng.shuffle(rows)
    return rows


def write_rows(path: Path) -> None:
    """Write the three columns as JSON Lines; the same bytes every time."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in sample_rows():
            columns: dict[str, str | None] = {"user": row.user, "assistant": row.assistant}
            if row.system is not None:
                columns = {"system": row.system, **columns}
            if row.dirt == "assistant_absent":
                del columns["assistant"]
            file.write(json.dumps(columns, ensure_ascii=False) + "\n")
