"""Seeded finance prose for pretraining: statements, tables, news, terms and worked ratios.

Every document states made-up facts and then says them again in other words, so that the only way to
predict the second half is to look the first half up. There are no questions with answers and no
roles: how to answer is left to the adapter.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import Final

from build_nano.facts import (
    TEXTS,
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
from build_nano.words import ADVICE, CITIES, EVENTS, METRICS, MONTHS, RATIOS, TERMS, TONES, Tone


def _join(rng: Random, parts: list[str]) -> str:
    """Join sentences with blanks; a part with a heading of its own is a paragraph."""
    text = ""
    for part in parts:
        if "\n" in part:
            text = f"{text.rstrip()}\n\n{part}\n\n"
        else:
            text += part + ("\n\n" if rng.randrange(12) == 0 else " ")
    return text.strip()


def _restate(rng: Random, report: Report, stated: list[tuple[Line, int]], cells: bool) -> list[str]:
    """Say stated figures again in another order, with directions where both years are known."""
    rng.shuffle(stated)
    parts = []
    texts = TEXTS["restated" if rng.randrange(3) else "headed"]
    for line, at in stated:
        if cells and rng.randrange(2):
            parts.append(fill(rng, TEXTS["cells"], report, line, at))
        else:
            parts.append(fill(rng, texts, report, line, at))
    both = {line for line, at in stated if (line, 1 - at) in stated}
    for line in report.lines:
        if line in both and rng.randrange(2):
            place = rng.randrange(len(parts) + 1)
            texts = TEXTS["rose" if line.rose else "fell"]
            parts.insert(place, fill(rng, texts, report, line))
    return parts


def _prose_report(rng: Random) -> str:
    report = draw_report(rng, rng.randrange(2, 6))
    parts = [opening(rng, report)]
    stated: list[tuple[Line, int]] = []
    for line in report.lines:
        sentence, places = state(rng, report, line)
        parts.append(sentence)
        stated += [(line, at) for at in places]
    return _join(rng, parts) + "\n\n" + _join(rng, _restate(rng, report, stated, cells=False))


def _table_report(rng: Random) -> str:
    report = draw_report(rng, rng.randrange(2, 6), rng.choice((1, 2, 2)))
    head = rng.choice(("{c}, amounts in {u}", "{c}, in {u}", "Key figures of {c} in {u}"))
    text = head.format(c=report.company.full, u=f"{report.symbol} {report.unit}") + "\n\n"
    text += table(report, rng.randrange(3)) + "\n\n"
    stated = [(line, at) for line in report.lines for at in range(len(report.years))]
    return text + _join(rng, _restate(rng, report, stated, cells=True))


def _ledger(rng: Random) -> str:
    """Names with amounts, printed again in other orders: the shortest form of a look-up."""
    if rng.randrange(2):
        names = [draw_company(rng).short for _ in range(rng.randrange(3, 9))]
    else:
        names = [capital(metric.name) for metric in rng.sample(METRICS, rng.randrange(3, 9))]
    low, high = rng.choice(((10, 100), (100, 1000), (100, 1000)))
    form = rng.choice(("{} {}", "{}: {}", "{} ${} million", "{} {}%", "{} had {}.", "{} = ${}"))
    rows = [form.format(name, rng.randrange(low, high)) for name in names]
    blocks = []
    for _ in range(rng.randrange(2, 4)):
        blocks.append("\n".join(rows))
        rng.shuffle(rows)
    return "\n\n".join(blocks)


def _two_companies(rng: Random) -> str:
    """The same metrics for two companies: the name decides which figure is meant."""
    left = draw_report(rng, rng.randrange(1, 4), 1)
    pair = (left, draw_report(rng, 1, 1, like=left))
    facts = [(report, line) for report in pair for line in report.lines]
    texts = TEXTS["of_company"]
    if rng.randrange(2):
        text = "\n".join(
            f"{report.company.short}: "
            + ", ".join(f"{line.metric.name} {line.amounts[0].prose}" for line in report.lines)
            for report in pair
        )
        parts = [f"Figures for {left.years[0]}\n\n{text}"]
    else:
        parts = [fill(rng, texts, report, line, named=True) for report, line in facts]
    rng.shuffle(facts)
    parts += [fill(rng, texts, report, line, named=True) for report, line in facts]
    return _join(rng, parts)


def news(rng: Random, tone: Tone, num_events: int, company: str) -> str:
    """A news text of the given tone: a dateline, and events that all point the same way."""
    values = {
        "c": company,
        "city": rng.choice(CITIES),
        "d": rng.randrange(1, 29),
        "y": rng.randrange(2006, 2025),
    }
    text = rng.choice(TEXTS["datelines"]).format(m=rng.choice(MONTHS)[:3], **values)
    sentences = []
    for event in rng.sample(EVENTS[tone], num_events):
        amount = f"${rng.randrange(10, 1000)} million"
        sentences.append(
            event.format(c=company, n=rng.randrange(3, 60), v=amount, m=rng.choice(MONTHS))
        )
        company = rng.choice((company, "the company", "the group"))
    return text + ". ".join(capital(sentence) for sentence in sentences) + "."


def _news(rng: Random) -> str:
    tone = rng.choice(TONES)
    company = draw_company(rng).short
    text = news(rng, tone, rng.randrange(1, 5), company)
    verdicts = [
        rng.choice(TEXTS["toned"]).format(c=company, t=tone, T=capital(tone))
        for _ in range(rng.randrange(1, 3))
    ]
    return text + "\n\n" + _join(rng, verdicts)


def _term(rng: Random) -> str:
    """One to three terms, in a sentence or under a heading, sometimes with the reason again."""
    parts = []
    for term, meaning, reason in rng.sample(TERMS, rng.randrange(1, 4)):
        sentence = rng.choice(TEXTS["defined"]).format(
            t=term, T=capital(term), d=meaning, D=capital(meaning)
        )
        parts.append(f"{sentence} {reason}" if rng.randrange(4) else sentence)
    return "\n\n".join(parts)


def _ratio(rng: Random) -> str:
    """A ratio worked out with its arithmetic, drawn so that the result is a whole percent."""
    name, top, bottom = rng.choice(RATIOS)
    company = draw_company(rng).short
    percent, base = draw_ratio(rng)
    part = percent * base // 100
    text = rng.choice(TEXTS["worked"]).format(
        C=company, n=name, N=capital(name), t=top, T=capital(top), b=bottom, B=capital(bottom),
        x=f"${part} million", z=f"${base} million", p=percent, xs=part, zs=base,
    )  # fmt: skip
    again = rng.choice(TEXTS["worked_again"]).format(n=name, N=capital(name), C=company, p=percent)
    return f"{text}\n\n{again}"


def draw_ratio(rng: Random) -> tuple[int, int]:
    """Draw a percentage and a base of which it is a whole number."""
    percent = rng.choice((5, 10, 20, 25, 40, 50, 60, 75, 80))
    return percent, 20 * rng.randrange(2, 50)


def _difference(rng: Random) -> str:
    """A change between two years with its subtraction, in round numbers."""
    report = draw_report(rng, 1)
    small, step = 10 * rng.randrange(2, 60), 10 * rng.randrange(1, 30)
    first, last = (small, small + step) if rng.randrange(2) else (small + step, small)
    moved = "rose" if last > first else "fell"
    metric, unit = report.lines[0].metric.name, rng.choice(("million", "billion"))
    return rng.choice(TEXTS["changed"]).format(
        m=metric, M=capital(metric), a=first, b=last, s=step, w=moved, u=unit,
        hi=max(first, last), lo=min(first, last),
        y=report.years[0], q=report.years[1], C=report.company.short,
    )  # fmt: skip


def _advice(rng: Random) -> str:
    return " ".join(rng.sample(ADVICE, rng.randrange(3, 7)))


# Kind of document and its share in 21 parts; look-ups take two thirds.
_MIX: Final[tuple[tuple[Callable[[Random], str], int], ...]] = (
    (_prose_report, 5),
    (_table_report, 4),
    (_news, 3),
    (_two_companies, 1),
    (_term, 1),
    (_ratio, 1),
    (_difference, 1),
    (_advice, 1),
    (_ledger, 4),
)
_DRAWN: Final = tuple(write for write, share in _MIX for _ in range(share))


def documents(seed: int) -> Iterator[str]:
    """Documents without end, the same for the same seed on every machine and Python version."""
    rng = Random(seed)
    while True:
        yield rng.choice(_DRAWN)(rng)
