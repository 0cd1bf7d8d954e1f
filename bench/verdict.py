"""Error rates of the verdict: simulated comparisons, and rows that leak between the parts.

    python bench/verdict.py [null|coverage|found|tasks|power|constant|leaks ...] [--runs 5000]

null      false `better` and `worse` at truth 0: 28 designs of 20 to 200 documents
coverage  of the 95 % interval, documents of five with ICC 0.2 and at least 10 questions differing
found     how often a gain of 10 points is found, 40 documents of five, ICC 0.2
tasks     a task of 100 questions that loses 40 points while nine gain 10; ten unchanged ones
power     at the printed minimum detectable effect, with the gain on top of what differs anyway
constant  an adapter that always says the commonest answer, and the recorded control of the demo
leaks     test rows whose report or reworded twin is also in the training part

Every figure is computed by the product's own functions. Prints and keeps them in
bench/results/verdict.json. One process; about 25 minutes at 5,000 data sets a cell.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "verdict.json"
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "bench")]

from prepare import machine  # noqa: E402

from fintune.console import result  # noqa: E402
from fintune.data.prepare import repeats  # noqa: E402
from fintune.data.split import split  # noqa: E402
from fintune.evals import stats, verdict  # noqa: E402
from fintune.evals.results import MOST_A_DOCUMENT  # noqa: E402
from fintune.example import Example, Message  # noqa: E402
from fintune.files import read_json, write_json  # noqa: E402

Sizes = list[int]
FIVES = {documents: [5] * documents for documents in (20, 30, 40, 60, 100, 200)}
DESIGNS: dict[str, Sizes] = {
    "20 of five": FIVES[20],
    "20 of ten": [10] * 20,
    "30 of five": FIVES[30],
    "40 of five": FIVES[40],
    "50 of four": [4] * 50,
    "100 of two": [2] * 100,
    "30 of five, one of 40 %": [100, *FIVES[30]],
    "100 of five, one of 40 %": [333, *FIVES[100]],
}
ALONE = {"100 alone": [1] * 100, "200 alone": [1] * 200}
ICC = (0.0, 0.2, 0.6)
RARE, COMMON = 0.1, 0.3
"""Shares of the questions on which base and adapter differ."""


def drawn(
    rng: np.random.Generator, runs: int, sizes: Sizes, icc: float, gained: float, lost: float
) -> Any:
    """Sums of the documents' deciding questions, shape (runs, documents).

    A question copies its document's prototype with probability √ICC, so that margins and ICC are
    exact. Of a document at most MOST_A_DOCUMENT decide.
    """
    columns, shares = [], [lost, 1 - lost - gained, gained]
    for size in np.minimum(sizes, MOST_A_DOCUMENT):
        prototype = rng.choice([-1, 0, 1], size=(runs, 1), p=shares)
        own = rng.choice([-1, 0, 1], size=(runs, size), p=shares)
        copied = rng.random((runs, size)) < icc**0.5
        columns.append(np.where(copied, prototype, own).sum(axis=1))
    return np.stack(columns, axis=1)


def compared(sums: Any, sizes: Sizes) -> tuple[list[float], float]:
    """Interval and p value of one data set."""
    taken = np.minimum(sizes, MOST_A_DOCUMENT)
    values, documents = [], []
    for at, (total, size) in enumerate(zip(sums.tolist(), taken.tolist(), strict=True)):
        values += [float(np.sign(total))] * abs(total) + [0.0] * (size - abs(total))
        documents += [str(at)] * size
    mean = stats.cluster_mean(values, documents, (1.0, -1.0))
    return mean.interval(1.0), stats.sign_flip(mean.sums)


def called(sums: Any, sizes: Sizes) -> dict[str, float]:
    """Shares of the data sets that are called better and worse."""
    words = []
    for row in sums:
        ends, p = compared(row, sizes)
        words.append(verdict.word({"ci95": ends, "p": p}, passed=True, lost=False))
    return {word: round(words.count(word) / len(words), 4) for word in ("better", "worse")}


def null(runs: int) -> dict[str, Any]:
    rng, cells = np.random.default_rng(1), {}
    for name, sizes in DESIGNS.items():
        for icc in ICC:
            sums = drawn(rng, runs, sizes, icc, COMMON / 2, COMMON / 2)
            cells[f"{name}, ICC {icc:g}"] = called(sums, sizes)
    for name, sizes in ALONE.items():
        for share in (RARE, COMMON):
            sums = drawn(rng, runs, sizes, 0, share / 2, share / 2)
            cells[f"{name}, {share:.0%} differ"] = called(sums, sizes)
    most = {word: max(cell[word] for cell in cells.values()) for word in ("better", "worse")}
    return {"designs": len(cells), "most": most, "cells": cells}


def coverage(runs: int) -> dict[str, Any]:
    rng, cells = np.random.default_rng(2), {}
    for documents, sizes in FIVES.items():
        for share in (0.1, 0.2, 0.3, 0.5):
            for gain in (0.0, 0.02, 0.05, 0.2):
                if gain > share or share * documents * 5 < 10:
                    continue
                sums = drawn(rng, runs, sizes, 0.2, (share + gain) / 2, (share - gain) / 2)
                ends = [compared(row, sizes)[0] for row in sums]
                covered = [low <= gain <= high for low, high in ends]
                cells[f"{documents}, {share:.0%} differ, {gain:.0%}"] = sum(covered) / runs
    values = list(cells.values())
    return {
        "mean": round(sum(values) / len(values), 4),
        "least": round(min(values), 4),
        "cells": cells,
    }


def found(runs: int) -> dict[str, Any]:
    rng, sizes = np.random.default_rng(3), FIVES[40]
    sums = drawn(rng, runs, sizes, 0.2, (COMMON + 0.1) / 2, (COMMON - 0.1) / 2)
    return called(sums, sizes)


def tasks(runs: int) -> dict[str, Any]:
    """Ten tasks of 100 questions that stand alone, 30 % of which differ (of the lost one 50 %)."""
    rng, drop = np.random.default_rng(4), 0.05

    def lost(gains: list[float]) -> list[str]:
        p_values = {}
        for at, gain in enumerate(gains):
            share = max(COMMON, abs(gain) + 0.1)
            shares = [(share - gain) / 2, 1 - share, (share + gain) / 2]
            change = rng.choice([-1.0, 0.0, 1.0], size=100, p=shares).tolist()
            p_values[str(at)] = 2 * stats.cluster_mean(change, None, (1.0, -1.0)).below(-drop)
        return [name for name, p in stats.holm(p_values).items() if p < stats.LEVEL]

    named = sum("9" in lost([0.1] * 9 + [-0.4]) for _ in range(runs))
    false = sum(bool(lost([0.0] * 10)) for _ in range(runs))
    return {"named": round(named / runs, 4), "false_alarm": round(false / runs, 4)}


def power(runs: int) -> dict[str, Any]:
    """The minimum detectable effect is printed by one comparison without any gain; another one has
    a gain of that size on top of as many losses."""
    rng, cells = np.random.default_rng(5), {}
    designs = {**ALONE, "400 alone": [1] * 400, "40 of five": FIVES[40], "100 of five": FIVES[100]}
    for name, sizes in designs.items():
        for share in (RARE, COMMON):
            icc = 0.0 if name.endswith("alone") else 0.2
            seen = drawn(rng, runs // 10, sizes, icc, share / 2, share / 2)
            hits = []
            for row in seen:
                values, documents = _spread(row, sizes)
                gain = stats.paired(values, documents)["mde80"]
                if share + gain <= 1:
                    again = drawn(rng, 4, sizes, icc, share / 2 + gain, share / 2)
                    hits.append(called(again, sizes)["better"])
            cells[f"{name}, {share:.0%} differ"] = round(sum(hits) / len(hits), 4)
    gains = {n: round(stats.detectable(COMMON / 2, n, n + 1), 4) for n in (100, 200, 400, 1000)}
    ends = {"least": min(cells.values()), "most": max(cells.values())}
    return {**ends, "cells": cells, "detectable": {str(n): gain for n, gain in gains.items()}}


def _spread(sums: Any, sizes: Sizes) -> tuple[list[float], list[str]]:
    """Questions of which some are gained, some lost, that have these sums."""
    values, documents = [], []
    for at, (total, size) in enumerate(zip(sums.tolist(), sizes, strict=True)):
        values += [float(np.sign(total))] * abs(total) + [0.0] * (size - abs(total))
        documents += [str(at)] * size
    return values, documents


def constant(runs: int) -> dict[str, Any]:
    """How often an adapter is called better that says the commonest of three answers (60 %), where
    its base guesses among them; and what the demo's control was called."""
    rng, better = np.random.default_rng(6), 0
    for _ in range(runs):
        right, base = rng.random(200) < 0.6, rng.random(200) < 1 / 3
        gain = stats.paired((right.astype(float) - base).tolist())
        over = stats.paired([0.0] * 200)  # it is the majority class
        better += verdict.word(gain, passed=over["ci95"][0] > 0, lost=False) == "better"
    kept = read_json(ROOT / "bench" / "results" / "control.json")
    return {"better": better / runs, "control": kept["control"]["verdict"]}


def leaks(runs: int) -> dict[str, Any]:
    """`runs` is not used: one set of 300 reports a cell, and of 400 pairs."""
    cells: dict[str, Any] = {}
    for excerpts in (3, 4, 6, 8, 10):
        for named in (False, True):
            rows = list(_reports(excerpts, named))
            name = f"{excerpts} excerpts a report{', named' * named}"
            cells[name] = _straddling(rows)
    for changed in (0.02, 0.05, 0.1, 0.15, 0.3):
        cells[f"{changed:.0%} of a twin's words changed"] = _twins(changed)
    return cells


SHARES = {"validation": 0.1, "test": 0.1}
SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
VOCABULARY = [one + other for one in SYLLABLES for other in SYLLABLES][:4000]


def _text(rng: np.random.Generator, count: int) -> list[str]:
    """Made-up words, as often as words are; every tenth is a number."""
    ranks = np.minimum(rng.zipf(1.3, count), len(VOCABULARY)) - 1
    numbers = rng.integers(10, 9999, count)
    return [str(numbers[at]) if at % 10 == 0 else VOCABULARY[rank] for at, rank in enumerate(ranks)]


def _example(at: int, text: list[str], answer: str, document: str = "") -> Example:
    asked = Message("user", f"Read the text.\n{' '.join(text)}\nWhat is the figure?")
    return Example("made up", at, str(at), (asked, Message("assistant", answer)), document)


def _reports(excerpts: int, named: bool) -> Iterator[tuple[int, Example]]:
    """Excerpts of 200 words of a report, of which neighbours share 95 %; `named` by context_id."""
    rng = np.random.default_rng(excerpts)
    for report in range(300):
        text = _text(rng, 200 + 10 * excerpts)
        for at in range(excerpts):
            words, name = text[10 * at :][:200], str(report) if named else ""
            yield report, _example(report * excerpts + at, words, str(at), name)


def _straddling(rows: list[tuple[int, Example]]) -> dict[str, float]:
    """Test rows, their share, and those of a report that was trained on."""
    placed = split([example for _, example in rows], SHARES)
    parts = list(zip((report for report, _ in rows), placed, strict=True))
    trained = {report for report, (_, part) in parts if part == "train"}
    test = [report for report, (_, part) in parts if part == "test"]
    rows_and_share = {"test_rows": len(test), "share": round(len(test) / len(rows), 3)}
    return {**rows_and_share, "leaked": sum(report in trained for report in test)}


def _twins(changed: float) -> dict[str, int]:
    """Of 400 pairs of 120 words and one answer: test rows, and those with a twin in training."""
    rng, rows = np.random.default_rng(int(1000 * changed)), []
    for pair in range(400):
        text, answer = _text(rng, 120), f"{pair * 7 + 100}.{pair % 10}"
        other = list(text)
        for at in rng.choice(120, round(120 * changed), replace=False):
            other[at] = VOCABULARY[rng.integers(len(VOCABULARY))]
        rows += [
            (pair, _example(2 * pair + at, one, answer)) for at, one in enumerate((text, other))
        ]
    placed = split([example for _, example in rows], SHARES)
    by_part: dict[str, list[tuple[int, Example]]] = {"train": [], "validation": [], "test": []}
    for row, (_, part) in zip(rows, placed, strict=True):
        by_part[part].append(row)
    train, test = ([example for _, example in by_part[part]] for part in ("train", "test"))
    hits = repeats(train, test)
    left = {pair for at, (pair, _) in enumerate(by_part["train"]) if at not in hits}
    before = {pair for pair, _ in by_part["train"]}
    return {
        "test_rows": len(test),
        "with_twin_before": sum(pair in before for pair, _ in by_part["test"]),
        "leaked": sum(pair in left for pair, _ in by_part["test"]),
    }


MEASURED: dict[str, Callable[[int], dict[str, Any]]] = {
    each.__name__: each for each in (null, coverage, found, tasks, power, constant, leaks)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("figures", nargs="*", choices=[*MEASURED, []], help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=5000)
    arguments = parser.parse_args()
    for name in arguments.figures or MEASURED:
        figures = {**MEASURED[name](arguments.runs), "runs": arguments.runs}
        result(f"{name}: {figures}")
        kept = read_json(RESULTS) if RESULTS.is_file() else {}
        kept.pop("format", None)
        write_json(RESULTS, {**kept, name: figures, "machine": machine()})


if __name__ == "__main__":
    main()
