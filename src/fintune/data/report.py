"""`report.html`: what was read, what was dropped and why, with examples, lengths and batches."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fintune.batches import Plan, facts, plan_epoch
from fintune.data import WORDS
from fintune.data.lengths import STEP
from fintune.page import Page

Ints = np.ndarray[Any, np.dtype[np.int64]]
MEANING: dict[str, str] = WORDS["reasons"]


@dataclass(frozen=True, slots=True)
class Findings:
    """What the page shows besides the manifest."""

    samples: dict[str, list[str]]
    lengths_before: list[int]
    lengths_train: list[int]
    contamination: list[dict[str, Any]]
    languages: Counter[str]


def write_report(path: Path, manifest: dict[str, Any], findings: Findings) -> None:
    """Write the page of one preparation."""
    rows = manifest["rows"]
    dropped: dict[str, int] = rows["dropped"]
    page = Page("Prepared data", "Every row that was read is in exactly one of these counts.")
    page.cards(
        [
            ("rows read", rows["read"]),
            ("train", rows["train"]),
            ("validation", rows["validation"]),
            ("dropped", sum(dropped.values())),
            ("max_length, tokens", manifest["max_length"]),
        ]
    )
    page.heading("Dropped rows")
    ordered = sorted(dropped.items(), key=lambda item: -item[1])
    page.bars([reason for reason, _ in ordered], {"rows": [count for _, count in ordered]})
    for reason, count in ordered:
        shown = "\n\n".join(findings.samples.get(reason, []))
        page.fold(f"{reason} ({count:,}): {MEANING.get(reason, '')}", shown or "see ledger.parquet")
    page.heading("Sources")
    names = ["source", "read", "train", "select", "decide", "licence"]
    page.table(
        names,
        [
            [name, *(fact.get(column, 0) for column in names[1:5]), fact["licence"] or "not given"]
            for name, fact in manifest["sources"].items()
        ],
    )
    related = manifest["related"]
    page.text(
        f"{related['groups']:,} groups of related rows. {related['groups_on_both_sides']} of them "
        "have rows on both sides of the split, because a row's side follows from its own passage "
        f"alone; their {related['held_out_rows_of_those']} held-out rows choose the checkpoint "
        "and never decide the verdict."
    )
    _lengths(page, manifest, findings)
    _content(page, manifest, findings)
    page.heading("Inputs")
    page.code("\n".join(f"{key}: {value}" for key, value in manifest["inputs"].items()))
    page.save(path)


def _lengths(page: Page, manifest: dict[str, Any], findings: Findings) -> None:
    page.heading("Lengths")
    before = np.array(findings.lengths_before, np.int64)
    kept = float((before <= manifest["max_length"]).mean()) if len(before) else 0.0
    page.text(
        f"max_length {manifest['max_length']} keeps {kept:.2%} of the rows measured. "
        f"{manifest['shortened']['rows']} rows were shortened, by "
        f"{manifest['shortened']['tokens']} tokens in all."
    )
    top = max(64, manifest["max_length"] * 2)
    edges = np.linspace(0, top, 33)
    counts = {
        name: np.histogram(np.minimum(lengths, top), edges)[0].tolist()
        for name, lengths in (("before", before), ("train", findings.lengths_train))
    }
    page.columns(
        edges.astype(int).tolist(), counts, caption="Tokens a row; the last column holds the rest."
    )
    columns = ["", *manifest["lengths"]["before"]]
    page.table(
        columns,
        [
            [name, *(fact.get(column) for column in columns[1:])]
            for name, fact in manifest["lengths"].items()
        ],
    )
    policy = manifest["inputs"]["settings"]["over_length"]
    page.table(
        ["max_length", "rows", "share", "tokens", "share "],
        length_costs(before, manifest["max_length"], shorten=policy == "shorten"),
        caption=f"What other lengths would lose, under over_length={policy}.",
    )
    lengths = np.array(findings.lengths_train, np.int64)
    plans: list[list[object]] = []
    choices: list[tuple[Plan, bool]]
    choices = [("random", True), ("bucketed", True), ("stratified", False)]
    for plan, padded in choices:
        epoch = plan_epoch(lengths, micro_batch_size=16, accumulation=4, seed=0, epoch=0, plan=plan)
        fact = facts(lengths, epoch, padded=padded)
        name = f"{plan}, {'padded' if padded else 'padding-free'}"
        plans.append(
            [name, f"{fact.padding:.1%}", fact.largest_micro_batch, round(fact.step_token_cv, 3)]
        )
    page.table(
        ["batching plan", "padding", "largest micro-batch, tokens", "step variation"],
        plans,
        caption="One epoch of the training rows in steps of 16 × 4, as the recipe's.",
    )


def length_costs(lengths: Ints, chosen: int, *, shorten: bool) -> list[list[object]]:
    """Rows over the chosen maximum length and multiples of 64 around it, and tokens lost: of
    shortened rows those beyond it, else all of theirs."""
    table: list[list[object]] = []
    for length in (chosen + STEP * step for step in (-4, -2, -1, 0, 1, 2, 4)):
        if length > 0 and len(lengths):
            long = lengths[lengths > length]
            lost = int(long.sum()) - shorten * length * len(long)
            name = f"{length:,} (chosen)" if length == chosen else f"{length:,}"
            shares = (f"{len(long) / len(lengths):.2%}", f"{lost / lengths.sum():.2%}")
            table.append([name, len(long), shares[0], lost, shares[1]])
    return table


def _content(page: Page, manifest: dict[str, Any], findings: Findings) -> None:
    page.heading("Language, repairs, personal data")
    page.table(
        ["found", "rows or texts"],
        [
            *((f"dropped as {code}", count) for code, count in findings.languages.most_common(8)),
            *((f"repaired: {name}", count) for name, count in manifest["repairs"].items()),
            *((f"personal: {kind}", count) for kind, count in manifest["personal_data"].items()),
        ],
    )
    page.heading("Contamination")
    if not manifest["inputs"]["benchmarks"]:
        page.text("No benchmark is named in data.benchmarks, so nothing was compared.")
        return
    found = manifest["contamination"]
    page.table(
        ["benchmark", "rows dropped"],
        [[name, found.get(name, 0)] for name in manifest["inputs"]["benchmarks"]],
    )
    page.text(
        "Compared: sequences of 13 words, of 8 for short questions, and rewordings that keep the "
        "answer. A question asked in wholly other words, or with another answer, is not found; "
        "a sibling that asks nearly the same may be taken for one: look at the pairs below.",
        dim=True,
    )
    for hit in findings.contamination[:12]:
        page.fold(
            f"{hit['source']}:{hit['line']} ~ {hit['benchmark']}:{hit['benchmark_line']}"
            f" ({hit['measure']}, {hit['score']})",
            f"row: {hit['row_text']}\n\nbenchmark: {hit['benchmark_text']}",
        )
