"""`report.html`: what was read, what was dropped and why, with examples, lengths and batches."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fintune.batches import Plan, facts, plan_epoch
from fintune.data.filters import MEANINGS
from fintune.data.ledger import Ledger
from fintune.data.tokenize import LENGTH_MULTIPLE
from fintune.page import save_page

Ints = np.ndarray[Any, np.dtype[np.int64]]


def write_report(
    path: Path,
    manifest: dict[str, Any],
    *,
    ledger: Ledger,
    before: list[int],
    train: list[int],
    hits: list[dict[str, Any]],
) -> None:
    """Write the page of one preparation.

    Args:
        before: tokens of every row before the maximum length applied.
        train: tokens of every training row.
        hits: contaminated rows, as in `contamination.json`.
    """
    chosen, policy = manifest["max_length"], manifest["inputs"]["settings"]["over_length"]
    dropped = sorted(manifest["rows"]["dropped"].items(), key=lambda item: -item[1])
    foreign = (row.detail for row in ledger.rows if row.reason == "not_english")
    languages = Counter("other script" if text[0].isdigit() else text[:2] for text in foreign)
    all_lengths, kept_lengths = np.array(before, np.int64), np.array(train, np.int64)
    edges, histogram = _histogram(all_lengths, kept_lengths, 2 * chosen)
    save_page(
        path,
        "data_report",
        manifest=manifest,
        dropped=[
            (reason, count, MEANINGS.get(reason, ""), "\n\n".join(ledger.samples.get(reason, [])))
            for reason, count in dropped
        ],
        kept=float((all_lengths <= chosen).mean()) if before else 0.0,
        edges=edges,
        histogram=histogram,
        costs=length_costs(all_lengths, chosen, truncate=policy == "truncate"),
        plans=_plans(kept_lengths),
        content=[
            *((f"dropped as {code}", count) for code, count in languages.most_common(8)),
            *((f"repaired: {name}", count) for name, count in manifest["repairs"].items()),
            *((f"personal: {kind}", count) for kind, count in manifest["personal_data"].items()),
        ],
        hits=hits[:12],
    )


def _histogram(before: Ints, train: Ints, top: int) -> tuple[list[int], dict[str, list[int]]]:
    """Edges of 32 columns, the last of which holds the rest, and counts before and in training."""
    edges = np.linspace(0, max(64, top), 33)
    counts = {
        name: np.histogram(np.minimum(lengths, edges[-1]), edges)[0].tolist()
        for name, lengths in (("before", before), ("train", train))
    }
    return edges.astype(int).tolist(), counts


def _plans(lengths: Ints) -> list[list[object]]:
    """One epoch by each batching plan, in steps of 16 x 4 as the recipe's."""
    rows: list[list[object]] = []
    choices: list[tuple[Plan, bool]]
    choices = [("random", True), ("bucketed", True), ("stratified", False)]
    for plan, padded in choices:
        epoch = plan_epoch(lengths, micro_batch_size=16, accumulation=4, seed=0, epoch=0, plan=plan)
        fact = facts(lengths, epoch, padded=padded)
        name = f"{plan}, {'padded' if padded else 'padding-free'}"
        numbers = (fact["largest_micro_batch"], round(fact["step_token_cv"], 3))
        rows.append([name, f"{fact['padding']:.1%}", *numbers])
    return rows


def length_costs(lengths: Ints, chosen: int, *, truncate: bool) -> list[list[object]]:
    """Rows over the chosen maximum length and multiples of 64 around it, and tokens lost: of
    truncated rows those beyond it, else all of theirs."""
    table: list[list[object]] = []
    for length in (chosen + LENGTH_MULTIPLE * step for step in (-4, -2, -1, 0, 1, 2, 4)):
        if length > 0 and len(lengths):
            long = lengths[lengths > length]
            lost = int(long.sum()) - truncate * length * len(long)
            name = f"{length:,} (chosen)" if length == chosen else f"{length:,}"
            shares = (f"{len(long) / len(lengths):.2%}", f"{lost / lengths.sum():.2%}")
            table.append([name, len(long), shares[0], lost, shares[1]])
    return table
