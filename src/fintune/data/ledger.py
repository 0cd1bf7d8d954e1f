"""Rows that are out: one line each for `ledger.parquet`, and a few of every reason to look at."""

import re
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fintune.data.clean import repair
from fintune.data.pii import mask
from fintune.example import Dropped, Example

SAMPLES = 3
"""Rows of each reason whose text the report shows."""

SHOWN = 20_000
"""Characters of a text that are masked; of them `SAMPLE` are shown, so that no cut number is."""

SAMPLE = 500
SCHEMA = pa.schema(
    [(name, pa.int64() if name == "line" else pa.string()) for name in Dropped.__slots__]
)
_ESCAPED = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))")


class Ledger:
    """Dropped rows with their reasons.

    Args:
        redact: personal data is masked in what is shown.
    """

    def __init__(self, *, redact: bool) -> None:
        self.redact = redact
        self.rows: list[Dropped] = []
        self.samples: dict[str, list[str]] = defaultdict(list)

    def add(self, row: Dropped, text: str) -> None:
        """Note a row that is out, and its text where samples of the reason lack."""
        self.rows.append(row)
        if len(self.samples[row.reason]) < SAMPLES and text:
            shown = self.shown(text)
            if len(shown) > SAMPLE:
                shown = f"{shown[: SAMPLE // 2]} [...] {shown[-SAMPLE // 2 :]}"
            self.samples[row.reason].append(f"{row.source}:{row.line} ({row.detail})\n{shown}")

    def drop(self, example: Example, reason: str, detail: str = "") -> None:
        """Note an example that is out."""
        row = Dropped(example.source, example.line, example.row_sha256, reason, detail)
        self.add(row, "\n".join(f"{m.role}: {m.content}" for m in example.messages))

    def extend(self, other: "Ledger") -> None:
        """Take over what another ledger holds."""
        self.rows += other.rows
        for reason, samples in other.samples.items():
            self.samples[reason] += samples[: SAMPLES - len(self.samples[reason])]

    def counts(self) -> Counter[str]:
        """Rows by reason."""
        return Counter(row.reason for row in self.rows)

    def shown(self, text: str) -> str:
        """A text without escapes, which would hide values, and masked; both ends of a long one."""
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]}\n{text[-SHOWN // 2 :]}"
        plain = _ESCAPED.sub(lambda found: chr(int(found[1] or found[2], 16)), text)
        plain = repair(plain, Counter()).replace("\ufffd", " ")
        return mask(plain)[0] if self.redact else plain

    def write(self, path: Path) -> None:
        """Write the rows by source and line."""
        self.rows.sort(key=lambda row: (row.source, row.line))
        table = pa.Table.from_pylist([asdict(row) for row in self.rows], SCHEMA)
        pq.write_table(table, path, compression="zstd")
