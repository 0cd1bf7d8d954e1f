"""The account of a preparation: `manifest.json`, and `report.html` for people."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fintune.data.filters import MEANINGS
from fintune.data.scan import Scanned
from fintune.data.sources import Source
from fintune.data.tokenize import Tokenized
from fintune.files import sha256_json
from fintune.page import save_page

PARTS = ("train", "validation", "test")
Parts = dict[str, list[tuple[str, Tokenized]]]
"""train, validation and test -> rows with the key of their group of related rows."""


@dataclass(frozen=True, slots=True)
class Selected:
    """All rows of one preparation: kept in a part, or dropped in the ledger."""

    scanned: Scanned
    pii: Counter[str]
    """Rows in which each kind of personal data was found."""
    contaminated: list[dict[str, Any]]
    lengths: list[int]
    """Tokens of every row before the maximum length applied."""
    max_length: int
    parts: Parts


def make_manifest(
    selected: Selected, sources: list[Source], inputs: dict[str, Any]
) -> dict[str, Any]:
    """Counts of every row read, by part, reason and source; lengths; and the inputs."""
    scanned, parts = selected.scanned, selected.parts
    read, dropped = scanned.read, scanned.ledger.counts()
    by_source: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
    for out in scanned.ledger.rows:
        by_source[out.source][out.reason] += 1
    for part, rows in parts.items():
        for _, row in rows:
            by_source[row.example.source][part] += 1
    sizes = {part: len(rows) for part, rows in parts.items()}
    if read.total() != sum(sizes.values()) + dropped.total():
        raise AssertionError(f"{read} rows read, {sizes} kept, {dropped}")
    cut = [row.truncated for rows in parts.values() for _, row in rows if row.truncated]
    hits = Counter(str(hit["benchmark"]) for hit in selected.contaminated)
    return {
        "rows": {"read": read.total(), **sizes, "dropped": dict(sorted(dropped.items()))},
        "sources": {
            source.name: {
                "identity": source.identity,
                "licence": source.config.licence,
                "read": read[source.name],
                **dict(sorted(by_source[source.name].items())),
            }
            for source in sources
        },
        "related": _related(parts),
        "max_length": selected.max_length,
        "lengths": {
            "before": _distribution(selected.lengths),
            **{part: _distribution([r.length for _, r in rows]) for part, rows in parts.items()},
        },
        "truncated": {"rows": len(cut), "tokens": sum(cut)},
        "personal_data": dict(sorted(selected.pii.items())),
        "contamination": dict(sorted(hits.items())),
        "repairs": dict(sorted(scanned.repairs.items())),
        "inputs": inputs,
        "inputs_sha256": sha256_json(inputs),
    }


def _related(parts: Parts) -> dict[str, int]:
    """Groups of related rows, and those with rows both in training and held out."""
    trained = {group for group, _ in parts["train"]}
    held_out = [group for part, rows in parts.items() if part != "train" for group, _ in rows]
    return {
        "groups": len(trained.union(held_out)),
        "groups_on_both_sides": len(trained.intersection(held_out)),
        "held_out_rows_of_those": sum(group in trained for group in held_out),
    }


def _distribution(lengths: list[int]) -> dict[str, float]:
    """Count, total, mean and percentiles of lengths in tokens."""
    ordered, rows, tokens = sorted(lengths), len(lengths), sum(lengths)
    percentiles = {f"p{p}": ordered[rows * p // 100] for p in (5, 50, 95, 99)}
    mean = round(tokens / rows, 1)
    return {"rows": rows, "tokens": tokens, "mean": mean, **percentiles, "max": ordered[-1]}


def write_report(path: Path, manifest: dict[str, Any], selected: Selected) -> None:
    """Write the page: what was read, what was dropped and why, with examples, and lengths."""
    ledger = selected.scanned.ledger
    dropped = sorted(manifest["rows"]["dropped"].items(), key=lambda item: -item[1])
    foreign = (row.detail for row in ledger.rows if row.reason == "not_english")
    languages = Counter("other script" if text[0].isdigit() else text[:2] for text in foreign)
    before = np.array(selected.lengths)
    train = np.array([row.length for _, row in selected.parts["train"]])
    edges = np.linspace(0, max(64, 2 * selected.max_length), 33)  # the last column holds the rest
    save_page(
        path,
        "data_report",
        manifest=manifest,
        dropped=[
            (reason, count, MEANINGS.get(reason, ""), "\n\n".join(ledger.samples.get(reason, [])))
            for reason, count in dropped
        ],
        kept=float((before <= selected.max_length).mean()),
        edges=edges.astype(int).tolist(),
        histogram={
            name: np.histogram(np.minimum(lengths, edges[-1]), edges)[0].tolist()
            for name, lengths in (("before", before), ("train", train))
        },
        content=[
            *((f"dropped as {code}", count) for code, count in languages.most_common(8)),
            *((f"repaired: {name}", count) for name, count in manifest["repairs"].items()),
            *((f"personal: {kind}", count) for kind, count in manifest["personal_data"].items()),
        ],
        hits=selected.contaminated[:12],
    )
