"""Made-up companies and figures, and the sentences and tables that state them."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from fintune.files import read_toml
from sample_rows.words import (
    LEGAL_FORMS,
    METRICS,
    NAME_HEADS,
    NAME_MIDDLES,
    NAME_TAILS,
    SECTORS,
    Kind,
    Metric,
)

TEXTS: Final[dict[str, list[str]]] = read_toml(__file__, "sentences.toml")


@dataclass(frozen=True, slots=True)
class Company:
    """A made-up company: `full` is the registered name, `short` the one used in running text."""

    full: str
    short: str
    sector: str


@dataclass(frozen=True, slots=True)
class Amount:
    """A figure as written in prose and in a table; `size` orders two amounts of one line."""

    prose: str
    cell: str
    size: int


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of one company with its amounts, aligned with the years of the report."""

    metric: Metric
    amounts: tuple[Amount, ...]

    @property
    def rose(self) -> bool:
        return self.amounts[0].size > self.amounts[1].size


@dataclass(frozen=True, slots=True)
class Report:
    """What is known about one company. `years` runs backwards, the latest first."""

    company: Company
    years: tuple[int, ...]
    lines: tuple[Line, ...]
    symbol: str
    unit: str


def capital(text: str) -> str:
    """Upper-case the first character and keep the rest ("EBITDA" stays as it is)."""
    return text[:1].upper() + text[1:]


def draw_company(rng: Random) -> Company:
    """Draw one of about 80,000 name stems, a sector and a legal form."""
    stem = rng.choice(NAME_HEADS) + rng.choice(NAME_MIDDLES) + rng.choice(NAME_TAILS)
    sector = rng.choice(SECTORS)
    short = f"{stem} {sector}"
    return Company(f"{short} {rng.choice(LEGAL_FORMS)}", short, sector.lower())


def _draw_money(rng: Random, symbol: str, unit: str) -> Amount:
    if unit == "billion":
        tenths = rng.randrange(11, 999)
        cell = f"{tenths // 10}.{tenths % 10}"
        return Amount(f"{symbol}{cell} billion", cell, tenths)
    # Most amounts have two or three digits; every eighth has a thousands group.
    shape = rng.randrange(8)
    low, high = (1000, 10000) if shape == 0 else (10, 1000) if shape < 3 else (100, 1000)
    value = rng.randrange(low, high)
    return Amount(f"{symbol}{value:,} {unit}", f"{value:,}", value)


def draw_amount(rng: Random, kind: Kind, symbol: str, unit: str) -> Amount:
    """Draw a figure of the given kind; money is stated in `symbol` and `unit` ("million",
    "billion").
    """
    if kind == "money":
        return _draw_money(rng, symbol, unit)
    if kind == "percent":
        tenths = rng.randrange(10, 700)
        text = f"{tenths // 10}.{tenths % 10}" if rng.randrange(2) else f"{tenths // 10}"
        return Amount(f"{text}%", f"{text}%", tenths if "." in text else tenths // 10 * 10)
    if kind == "per_share":
        cents = rng.randrange(11, 999)
        text = f"{symbol}{cents // 100}.{cents % 100:02d}"
        return Amount(text, text, cents)
    value = rng.randrange(12, 1000) if rng.randrange(3) else rng.randrange(1000, 30000)
    return Amount(f"{value:,}", f"{value:,}", value)


def draw_report(
    rng: Random, num_lines: int, num_years: int = 2, like: Report | None = None
) -> Report:
    """Draw a report whose amounts are all different, so that an amount names one line and one year.

    With `like`, another company gets the same metrics, years and unit as that report.
    """
    latest = rng.randrange(2006, 2025)
    symbol = rng.choice(("$", "$", "$", "$", "€", "£"))
    unit = "billion" if rng.randrange(6) == 0 else "million"
    metrics: Sequence[Metric] = rng.sample(METRICS, num_lines)
    if like is not None:
        latest, symbol, unit = like.years[0], like.symbol, like.unit
        metrics = [line.metric for line in like.lines]
    seen: set[str] = set()
    lines = []
    for metric in metrics:
        amounts: list[Amount] = []
        while len(amounts) < num_years:
            amount = draw_amount(rng, metric.kind, symbol, unit)
            if amount.cell not in seen and amount.size not in {other.size for other in amounts}:
                seen.add(amount.cell)
                amounts.append(amount)
        lines.append(Line(metric, tuple(amounts)))
    years = tuple(latest - back for back in range(num_years))
    return Report(draw_company(rng), years, tuple(lines), symbol, unit)


def fill(
    rng: Random,
    templates: Sequence[str],
    report: Report,
    line: Line,
    at: int = 0,
    named: bool = False,
) -> str:
    """Fill a template about one line in the year at position `at`.

    `{m}` metric, `{a}` its alias, `{v}` amount, `{c}` table cell, `{y}` year; `{p}` and `{q}` are
    the amount and the year on the other side. `{C}` is the company, every other time "the company"
    unless `named`.
    """
    other = 1 - at if len(line.amounts) > 1 else at
    name = report.company.short
    if not named and rng.randrange(2):
        name = rng.choice(("the company", "the group"))
    text = rng.choice(templates).format(
        C=name,
        m=line.metric.name,
        M=capital(line.metric.name),
        was=line.metric.was,
        a=line.metric.alias,
        A=capital(line.metric.alias),
        v=line.amounts[at].prose,
        c=line.amounts[at].cell,
        y=report.years[at],
        p=line.amounts[other].prose,
        q=report.years[other],
    )
    return capital(text)


def state(rng: Random, report: Report, line: Line) -> tuple[str, tuple[int, ...]]:
    """Say one line in a sentence; also return the positions of the years whose amounts it gives."""
    if len(line.amounts) > 1 and rng.randrange(4):
        verb = "risen" if line.rose else "fallen"
        return fill(rng, TEXTS[rng.choice(("both", verb, verb))], report, line), (0, 1)
    return fill(rng, TEXTS["stated"], report, line), (0,)


def opening(rng: Random, report: Report) -> str:
    """The first sentence of a report; it names the company."""
    company = report.company
    name = company.full if rng.randrange(2) else company.short
    text = rng.choice(TEXTS["openings"]).format(C=name, y=report.years[0], s=company.sector)
    return text.replace("..", ".")  # "Inc." at the end of a sentence


def table(report: Report, style: int) -> str:
    """The report as a table: style 0 with bars, 1 with a colon and commas, 2 one figure a row."""
    rows = []
    if style == 0:
        rows.append("| Item | " + " | ".join(map(str, report.years)) + " |")
    for line in report.lines:
        name, cells = capital(line.metric.name), [amount.cell for amount in line.amounts]
        pairs = list(zip(cells, report.years, strict=True))
        if style == 0:
            rows.append(f"| {name} | {' | '.join(cells)} |")
        elif style == 1:
            rows.append(f"{name}: " + ", ".join(f"{cell} ({year})" for cell, year in pairs))
        else:
            rows += [f"{name} {year}: {cell}" for cell, year in pairs]
    return "\n".join(rows)
