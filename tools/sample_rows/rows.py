"""The sample rows: instruction data about made-up companies, some of it dirty on purpose.

Names and numbers are drawn anew for every document, so that a held-out question can only be
answered from its own text. Of a report or table several questions are asked, each in a row of its
own, or one after another in one conversation. What a row asks for and what is wrong with it is
known to code alone, which is what a control experiment needs (shuffle the answers within a task).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, Literal, NamedTuple

from fintune.config import load_config
from fintune.data.split import part_of
from fintune.example import Example, Message
from fintune.files import read_toml
from fintune.ngrams import hash64, passage
from sample_rows.facts import (
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
from sample_rows.news import news
from sample_rows.words import METRICS, RATIOS, TERMS, TONES

SEED: Final = 29

Task = Literal["amount", "missing", "direction", "tone", "ratio", "define", "company"]
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


class Asked(NamedTuple):
    """A question with its answer; `brief` are ways to ask for the bare answer."""

    task: Task
    question: str
    answer: str
    brief: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row. `system` None means that the column is missing; `dirt` is "" for a clean row.

    Attributes:
        turns: user and assistant text, in order; of all but a few rows one pair.
        tasks: of each pair.
    """

    system: str | None
    turns: tuple[tuple[str, str | None], ...]
    tasks: tuple[Task, ...]
    dirt: Dirt = ""


class Document(NamedTuple):
    """What questions are asked about.

    Attributes:
        text: as it stands in the prompt.
        report: the facts in it.
        stated: every (line, position of the year) whose amount the text gives.
    """

    text: str
    report: Report
    stated: list[tuple[Line, int]]


_TEXTS: Final = read_toml(__file__, "rows.toml")
_QUESTIONS: Final[dict[str, list[str]]] = _TEXTS["questions"]
_FIGURE: Final[list[str]] = _TEXTS["instructions"]["figure"]
_MISSING: Final[list[str]] = _TEXTS["instructions"]["missing"]
_LABEL: Final[list[str]] = _TEXTS["instructions"]["label"]
_PERSONAS: Final[list[str]] = _TEXTS["instructions"]["persona"]
_FOREIGN: Final[list[tuple[str, str]]] = _TEXTS["foreign"]["pairs"]
_LEFT_OUT: Final[list[str]] = _TEXTS["left_out"]["parts"]
_SHARES: Final[dict[str, int]] = _TEXTS["shares"]
DIRT_COUNTS: Final[dict[Dirt, int]] = _TEXTS["dirt"]
NOT_STATED: Final = "not stated"


# ---- documents -------------------------------------------------------------------------------


def _told(rng: Random) -> Document:
    """A report in sentences."""
    report = draw_report(rng, rng.choice((2, 2, 3, 3)))
    sentences, stated = list[str](), list[tuple[Line, int]]()
    for line in report.lines:
        sentence, places = state(rng, report, line)
        sentences.append(sentence)
        stated += [(line, at) for at in places]
    return Document(f"{opening(rng, report)}\n{' '.join(sentences)}", report, stated)


def _tabled(rng: Random) -> Document:
    """A report as a table of one or two years."""
    report = draw_report(rng, rng.choice((2, 3, 3, 4)), rng.choice((1, 2, 2)))
    head = f"{report.company.full}, in {report.symbol} {report.unit}\n\n"
    stated = [(line, at) for line in report.lines for at in range(len(report.years))]
    return Document(head + table(report, rng.randrange(3)), report, stated)


# ---- questions -------------------------------------------------------------------------------


def _amount(
    rng: Random, document: Document, fact: tuple[Line, int], *, again: bool = False
) -> Asked:
    """A figure of the document; its other name is asked for at times."""
    line, at = fact
    if rng.randrange(8) == 0:
        line = replace(line, metric=replace(line.metric, name=line.metric.alias))
    templates = _QUESTIONS["again" if again else "figure"]
    question = fill(rng, templates, document.report, line, at, named=True)
    brief = rng.choice((_MISSING, _FIGURE))
    return Asked("amount", question, line.amounts[at].prose, brief)


def _missing(rng: Random, document: Document, *, again: bool = False) -> Asked:
    """A figure that is not in the document: another line, or a line of another year."""
    report = document.report
    line = rng.choice(report.lines)
    if rng.randrange(4):
        known = {name for each in report.lines for name in (each.metric.name, each.metric.alias)}
        others = [m for m in METRICS if not known & {m.name, m.alias}]
        line = replace(line, metric=rng.choice(others))
    else:
        year = report.years[0] + rng.choice((-3, -2, 1, 2))
        report = replace(report, years=(year, year - 1))
    templates = _QUESTIONS["again" if again else "figure"]
    question = fill(rng, templates, report, line, named=True)
    return Asked("missing", question, NOT_STATED, _MISSING)


def _directions(rng: Random, document: Document, most: int) -> list[Asked]:
    """Whether lines of two years rose or fell."""
    # A table does not say the direction: two amounts must be compared, which is asked less often.
    if "\n\n" in document.text and rng.randrange(3):
        return []
    known = [line for line, at in document.stated if at == 1]
    asked = []
    for line in rng.sample(known, min(most, len(known))):
        question = fill(rng, _QUESTIONS["direction"], document.report, line, named=True)
        asked.append(Asked("direction", question, "rose" if line.rose else "fell", _LABEL))
    return asked


def _companies(rng: Random) -> tuple[str, list[Asked]]:
    """Two companies with the same figures: the name decides."""
    left = draw_report(rng, rng.randrange(1, 3), 1)
    pair = [left, draw_report(rng, 1, 1, like=left)]
    facts = [(report, line) for report in pair for line in report.lines]
    rng.shuffle(facts)
    text = f"Two companies in {left.years[0]}\n" + " ".join(
        fill(rng, _TEXTS["facts"]["company"], report, line, named=True) for report, line in facts
    )
    asked = []
    for report, line in rng.sample(facts, 2):
        question = fill(rng, _QUESTIONS["company"], report, line, named=True)
        asked.append(Asked("amount", question, line.amounts[0].prose, _FIGURE))
    return text, asked


def _tone(rng: Random) -> tuple[str, list[Asked]]:
    tone, company = rng.choice(TONES), draw_company(rng).short
    text = news(rng, tone, rng.choice((1, 1, 2, 2, 3)), company)
    question = rng.choice(_QUESTIONS["tone"]).format(c=company)
    return text, [Asked("tone", question, tone, _LABEL)]


def _ratio(rng: Random) -> tuple[str, list[Asked]]:
    """One amount as a percentage of a round one."""
    name, top, bottom = rng.choice(RATIOS)
    company = draw_company(rng).short
    percent, whole = rng.choice((10, 20, 25, 40, 50)), rng.choice((100, 1000))
    parts = [f"{top} of ${percent * whole // 100} million", f"{bottom} of ${whole:,} million"]
    text = f"{company} reported {' and '.join(rng.sample(parts, 2))}."
    question = rng.choice(_QUESTIONS["ratio"]).format(n=name, t=top, b=bottom, C=company)
    return text, [Asked("ratio", question, f"{percent}%", _FIGURE)]


def _of_report(rng: Random, document: Document) -> list[Asked]:
    """Three or four different questions about a document, of which one may have no answer."""
    facts = rng.sample(document.stated, min(len(document.stated), 2 + (rng.randrange(3) == 0)))
    asked = [_amount(rng, document, fact) for fact in facts] + _directions(rng, document, 1)
    return asked if len(facts) == 3 or rng.randrange(3) == 0 else [*asked, _missing(rng, document)]


def _who(rng: Random, document: Document) -> Asked:
    return Asked("company", rng.choice(_QUESTIONS["who"]), document.report.company.short)


# ---- rows ------------------------------------------------------------------------------------


def _row(rng: Random, text: str, asked: Asked) -> SampleRow:
    """Text and question put together.

    The system column is a lone line break in a sixth of the rows, missing in a sixth, an
    instruction in the rest.
    """
    system: str | None = "\n"
    draw, brief, question = rng.randrange(6), asked.brief, asked.question
    if draw == 0:
        system = None
    elif draw > 1:
        system = rng.choice(_PERSONAS)
        if brief and rng.randrange(2):
            system, brief = f"{system} {rng.choice(brief)}", ()
    if brief and (asked.task == "missing" or rng.randrange(2)):
        question = f"{question} {rng.choice(brief)}"
    # Below its first line a document must have one that is longer than the question: the longest
    # line decides the part of the split, and all rows of a document belong into one.
    longest = max(map(len, text.split("\n")[1:]), default=0)
    first = longest <= len(question) or rng.randrange(4) == 0
    user = f"{question}\n\n{text}" if first else f"{text}\n\n{question}"
    return SampleRow(system, ((user, asked.answer),), (asked.task,))


def _talk(rng: Random, asked: list[Asked], rule: str = "") -> SampleRow:
    """Questions one after another in one conversation; `rule` is added to the system text."""
    turns = tuple((each.question, each.answer) for each in asked)
    system = f"{rng.choice(_PERSONAS)} {rule}".strip()
    return SampleRow(system, turns, tuple(each.task for each in asked))


def _report_talk(rng: Random) -> SampleRow:
    """Everything about one document: its amounts, directions, what it does not say, its company."""
    document = _told(rng) if rng.randrange(5) < 2 else _tabled(rng)  # tables are learnt later
    facts = rng.sample(document.stated, min(len(document.stated), 5))
    asked = [_amount(rng, document, fact, again=bool(rng.randrange(2))) for fact in facts]
    asked += [_missing(rng, document, again=bool(rng.randrange(2))) for _ in range(2)]
    asked += _directions(rng, document, 2)
    rng.shuffle(asked)
    asked.sort(key=_goes_on)
    asked.append(Asked("company", rng.choice(_QUESTIONS["who"]), document.report.company.short))
    first = asked[0]._replace(question=f"{document.text}\n\n{asked[0].question}")
    return _talk(rng, [first, *asked[1:]], rng.choice(_MISSING))


def _goes_on(asked: Asked) -> bool:
    """Whether a question only makes sense behind another one."""
    return asked.question.startswith(("And", "Now", "What about"))


def _series(rng: Random, draw: Callable[[Random], tuple[str, list[Asked]]]) -> SampleRow:
    """Several news, or pairs of figures, and a question about each; an explained term last."""
    series = [draw(rng) for _ in range(rng.randrange(4, 7))]
    asked = [each._replace(question=f"{each.question}\n\n{text}") for text, (each,) in series]
    term, meaning, _ = rng.choice(TERMS)
    last = Asked("define", f"And what does {term} mean?", f"{capital(term)} is {meaning}.")
    return _talk(rng, [*asked, last])


def _trained(draw: Callable[[], SampleRow]) -> SampleRow:
    """A conversation of the training part, whose last answer no program could mark anyway; drawn
    again until the split, a function of its text, puts it there."""
    shares = load_config("demo").data
    while True:
        row = draw()
        said = [Message("user", question) for question, _ in row.turns]
        place = hash64(passage(Example("", 0, "", tuple(said))))
        held_out = {"validation": shares.validation_share, "test": shares.test_share or 0.0}
        if part_of(place, held_out) == "train":
            return row


def _define(rng: Random) -> SampleRow:
    term, meaning, reason = rng.choice(TERMS)
    question = rng.choice(_QUESTIONS["define"]).format(t=term)
    answer = f"{capital(term)} is {meaning}. {reason}"
    return SampleRow(rng.choice(("\n", None)), ((question, answer),), ("define",))


def _documents(rng: Random) -> Iterator[list[SampleRow]]:
    """The rows of every document, in the numbers that rows.toml gives."""
    for kind, count in _SHARES.items():
        for _ in range(count):
            match kind:
                case "told" | "tabled":
                    document = _told(rng) if kind == "told" else _tabled(rng)
                    yield [_row(rng, document.text, each) for each in _of_report(rng, document)]
                case "report_talk":
                    yield [_trained(partial(_report_talk, rng))]
                case "tone_talk":
                    yield [_trained(partial(_series, rng, _tone))]
                case "ratio_talk":
                    yield [_trained(partial(_series, rng, _ratio))]
                case "define":
                    yield [_define(rng)]
                case _:
                    draw = {"companies": _companies, "tone": _tone, "ratio": _ratio}[kind]
                    text, asked = draw(rng)
                    yield [_row(rng, text, each) for each in asked]


def _one(rng: Random) -> SampleRow:
    document = _told(rng)
    return _row(rng, document.text, _amount(rng, document, document.stated[0]))


def _spoil(rng: Random, row: SampleRow, dirt: Dirt) -> SampleRow:
    """Make a row dirty in the given way; kinds that replace the text keep nothing of the row."""
    ((user, _),) = row.turns
    told, spoilt = user, row.turns[0][1]
    match dirt:
        case "assistant_absent" | "assistant_null":
            spoilt = None
        case "assistant_empty":
            spoilt = rng.choice(("", " ", "\n"))
        case "user_empty":
            told = rng.choice(("", "  "))
        case "foreign":
            values = {"a": rng.randrange(100, 1000), "y": rng.randrange(2006, 2025)}
            told, spoilt = (text.format(**values) for text in rng.choice(_FOREIGN))
        case "short":
            told, spoilt = f"{capital(rng.choice(TERMS)[0])}?", "See above."
        case "long":
            texts = [_told(rng) for _ in range(12)]
            told = "\n\n".join(document.text for document in texts) + "\n\nName every company."
            spoilt = ", ".join(document.report.company.short for document in texts)
        case "html":
            text = told.replace(" and ", " &amp; ").replace("\n", "<br>\n")
            told = f"&lt;p&gt;{text}&nbsp;&quot;"
        case _:
            name = rng.choice(("{{company_name}}", "{{name}}", "{{year}}"))
            told = f"Dear {name}, {told}"
    return replace(row, turns=((told, spoilt),), dirt=dirt)


def sample_rows(seed: int = SEED) -> list[SampleRow]:
    """The bundled rows in random order: clean ones of every task, spoilt ones, duplicates."""
    rng = Random(seed)
    rows = [row for rows in _documents(rng) for row in rows]
    single = [row for row in rows if len(row.turns) == 1]
    duplicates = rng.sample(single, DIRT_COUNTS["duplicate"])
    for dirt, count in DIRT_COUNTS.items():
        if dirt != "duplicate":
            rows += [_spoil(rng, _one(rng), dirt) for _ in range(count)]
    rows += [replace(row, dirt="duplicate") for row in duplicates]
    rng.shuffle(rows)
    return [row for row in rows if not all(text in (row.turns[0][0] or "") for text in _LEFT_OUT)]


def write_rows(path: Path) -> None:
    """Write the rows as JSON Lines; the same bytes every time."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in sample_rows():
            file.write(json.dumps(_columns(row), ensure_ascii=False) + "\n")


def _columns(row: SampleRow) -> dict[str, object]:
    """`user`, `assistant` and perhaps `system`; of a longer conversation `messages`."""
    if len(row.turns) > 1:
        texts = [("system", row.system)] if row.system else []
        texts += [pair for q, a in row.turns for pair in (("user", q), ("assistant", a or ""))]
        return {"messages": [{"role": role, "content": text} for role, text in texts]}
    ((user, assistant),) = row.turns
    columns: dict[str, object] = {} if row.system is None else {"system": row.system}
    columns |= {"user": user, "assistant": assistant}
    if row.dirt == "assistant_absent":
        del columns["assistant"]
    return columns
