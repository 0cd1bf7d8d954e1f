"""What a preparation records: `ledger.parquet`, `manifest.json`, and `report.html` for people."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fintune import labels
from fintune.data.filters import MEANINGS
from fintune.data.texts import mask, repair
from fintune.example import Dropped, Example
from fintune.files import write_json
from fintune.page import save_page
from fintune.sources import Source

PARTS, FINAL = ("train", "validation", "test"), "final"
"""The last where `data.final_share` keeps a part back."""

SAMPLES = 3
"""Rows of each reason whose text the report shows."""

SHOWN = 20_000
"""Characters of a text that are masked; of them `SAMPLE` are shown, so that no cut number is."""

SAMPLE = 500
_LEDGER = pa.schema(
    [(name, pa.int64() if name == "line" else pa.string()) for name in Dropped.__slots__]
)
_ESCAPED = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))")
Int32 = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A row with its training examples: one, or one an answer (see `chat.py`).

    Attributes:
        encoded: of each example the token ids and labels, int32 of the same length; the last is
            the whole conversation.
        truncated: tokens cut off.
    """

    example: Example
    encoded: list[tuple[Int32, Int32]]
    truncated: int = 0

    @property
    def length(self) -> int:
        """Tokens of the conversation."""
        return len(self.encoded[-1][0])

    @property
    def repeated(self) -> int:
        """Tokens that are read again, as an earlier example of the conversation holds them."""
        return sum(len(ids) for ids, _ in self.encoded[:-1])


Part = list[tuple[str, Tokenized]]
Parts = dict[str, Part]
"""train, validation and test -> rows with the key of their group of related rows."""


class Ledger:
    """Counts of rows read, repairs and personal data; dropped rows with their reasons.

    Args:
        redact: personal data is masked in what is shown.
    """

    def __init__(self, *, redact: bool) -> None:
        self.redact = redact
        self.read, self.repairs, self.personal = Counter[str](), Counter[str](), Counter[str]()
        self.rows: list[Dropped] = []
        self.columns: list[str] = []
        self.samples: dict[str, list[str]] = defaultdict(list)

    @staticmethod
    def beside(folder: Path) -> Path:
        """Where the ledger of a preparation lies of which no row was left, and so no folder."""
        return folder.with_name(f"{folder.name}.ledger.parquet")

    def drop(self, example: Example, reason: str, detail: str = "", text: str = "") -> None:
        """Record a dropped row, and its text while its reason has fewer than SAMPLES."""
        row = Dropped(example.source, example.line, example.row_sha256, reason, detail)
        self.rows.append(row)
        text = text or "\n".join(f"{m.role}: {m.content}" for m in example.messages)
        if len(self.samples[reason]) < SAMPLES and text:
            shown = self.shown(text)
            self.samples[reason].append(f"{example.place} ({detail})\n{shown[:SAMPLE]}")

    def extend(self, other: "Ledger") -> None:
        """Add the counts, rows and samples of another ledger."""
        self.read += other.read
        self.repairs += other.repairs
        self.columns = self.columns or other.columns
        self.rows += other.rows
        for reason, samples in other.samples.items():
            self.samples[reason] += samples[: SAMPLES - len(self.samples[reason])]

    def counts(self) -> Counter[str]:
        """Rows by reason."""
        return Counter(row.reason for row in self.rows)

    def shown(self, text: str) -> str:
        """The start of a text without escapes, which would hide values, and masked."""
        plain = _ESCAPED.sub(lambda match: chr(int(match[1] or match[2], 16)), text[:SHOWN])
        plain = repair(plain, Counter()).replace("\ufffd", " ")
        return mask(plain)[0] if self.redact else plain

    def write(self, path: Path) -> None:
        """Write the rows by source and line."""
        self.rows.sort(key=lambda row: (row.source, row.line))
        # By column: half a million objects take 0.3 GB more as dictionaries.
        columns = {name: [getattr(row, name) for row in self.rows] for name in _LEDGER.names}
        pq.write_table(pa.table(columns, _LEDGER), path, compression="zstd")


@dataclass(frozen=True, slots=True)
class Selected:
    """All rows of one preparation: kept in a part, or dropped in the ledger."""

    ledger: Ledger
    contaminated: list[dict[str, Any]]
    lengths: list[int]
    """Tokens of every row before the maximum length applied."""
    max_length: int
    parts: Parts
    chat: dict[str, Any]
    """How conversations became text (`ChatTemplate.record`)."""
    test_share: float


def write_account(
    folder: Path, selected: Selected, sources: list[Source], inputs: dict[str, Any]
) -> dict[str, Any]:
    """Write ledger, manifest and report, and where there are benchmarks what was contaminated.

    Returns:
        The manifest: counts of every row read, by part, reason and source; lengths; the inputs.
    """
    ledger, parts = selected.ledger, selected.parts
    dropped = ledger.counts()
    by_source: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
    for out in ledger.rows:
        by_source[out.source][out.reason] += 1
    lengths = {"before": selected.lengths}
    for part, rows in parts.items():
        lengths[part] = [len(ids) for _, row in rows for ids, _ in row.encoded]
        for _, row in rows:
            by_source[row.example.source][part] += 1
    sizes = {part: len(rows) for part, rows in parts.items()}
    if ledger.read.total() != sum(sizes.values()) + dropped.total():
        raise AssertionError(f"{ledger.read} rows read, {sizes} kept, {dropped}")
    kept = [each for rows in parts.values() for each in rows]
    repeated = sum(row.repeated for _, row in kept)
    cut = [row.truncated for _, row in kept if row.truncated]
    manifest = {
        "rows": {"read": ledger.read.total(), **sizes, "dropped": _sorted(dropped)},
        "sources": {
            source.name: {
                "identity": source.identity,
                "licence": source.licence(),
                "read": ledger.read[source.name],
                **_sorted(by_source[source.name]),
            }
            for source in sources
        },
        "test_share": selected.test_share,
        "related": _related(parts),
        "max_length": selected.max_length,
        "lengths": {part: _distribution(each) for part, each in lengths.items()},
        "reasoning": sum(any(m.thought for m in row.example.messages) for _, row in kept),
        "truncated": {"rows": len(cut), "tokens": sum(cut)},
        "chat": {**selected.chat, "tokens_read_again": repeated},
        "labels": labels.by_words(row.example for _, row in kept),
        "personal_data": _sorted(ledger.personal),
        "contamination": _sorted(Counter(hit["benchmark"] for hit in selected.contaminated)),
        "repairs": _sorted(ledger.repairs),
        "inputs": inputs,
    }
    ledger.write(folder / "ledger.parquet")
    write_json(folder / "manifest.json", manifest)
    if inputs["benchmarks"]:
        write_json(folder / "contamination.json", {"contaminated": selected.contaminated})
    _write_report(folder / "report.html", manifest, selected)
    return manifest


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _related(parts: Parts) -> dict[str, int]:
    """Groups of related rows, rows of the largest, groups with rows in training and held out."""
    sizes = Counter(group for rows in parts.values() for group, _ in rows)
    trained = {group for group, _ in parts["train"]}
    held_out = [group for part, rows in parts.items() if part != "train" for group, _ in rows]
    return {
        "groups": len(sizes),
        "largest": max(sizes.values()),
        "groups_on_both_sides": len(trained.intersection(held_out)),
        "held_out_rows_of_those": sum(group in trained for group in held_out),
    }


def _distribution(lengths: list[int]) -> dict[str, float]:
    """Count, total, mean and percentiles of lengths in tokens."""
    ordered, rows, tokens = sorted(lengths), len(lengths), sum(lengths)
    percentiles = {f"p{p}": ordered[rows * p // 100] for p in (5, 50, 95, 99)}
    mean = round(tokens / rows, 1)
    return {"rows": rows, "tokens": tokens, "mean": mean, **percentiles, "max": ordered[-1]}


def _write_report(path: Path, manifest: dict[str, Any], selected: Selected) -> None:
    """Write the page: what was read, what was dropped and why, with examples, and lengths."""
    save_page(
        path,
        "data_report",
        manifest=manifest,
        dropped=[
            (reason, count, MEANINGS.get(reason, ""), "\n\n".join(selected.ledger.samples[reason]))
            for reason, count in selected.ledger.counts().most_common()
        ],
        kept=float(np.mean(np.array(selected.lengths) <= selected.max_length)),
        hits=selected.contaminated[:12],
    )
