"""`fintune inspect`: a row as the model sees it, or why a row was dropped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.text import Text

from fintune import seal
from fintune.config import Config
from fintune.errors import DataError
from fintune.example import IGNORE
from fintune.model import find_base, load_tokenizer

FILES = {"train": "train.parquet", "validation": "validation.parquet"}


@dataclass(frozen=True, slots=True)
class Shown:
    """One row of prepared data, decoded."""

    example_id: str
    source: str
    part: str
    group: str
    length: int
    trained: int
    pieces: list[tuple[str, bool]]
    """Consecutive text of the conversation, and whether its tokens are trained."""

    def text(self) -> Text:
        """The row for a terminal: what is trained in green, what is only read dimmed."""
        line = Text(
            f"{self.example_id}  {self.source}  {self.part}  group {self.group}  "
            f"{self.length} tokens, {self.trained} trained\n",
            style="bold",
        )
        for piece, trained in self.pieces:
            line.append(piece, style="green" if trained else "dim")
        return line


def inspect(
    config: Config, *, row: str | None = None, part: str = "train", count: int = 1
) -> list[Shown]:
    """Rows of prepared data as the model sees them.

    Args:
        row: an example id or the start of one; absent: the first `count` rows of `part`.
        part: train or validation.

    Raises:
        DataError: no such row in `part`.
        OutputError: the data is not prepared.
    """
    folder = _folder(config)
    table = pq.read_table(folder / FILES[part])
    if row is not None:
        table = table.filter(pc.starts_with(table["example_id"], row))
        if table.num_rows == 0:
            raise DataError(
                f"no row {row} in {folder / FILES[part]}",
                fix="it may have been dropped: fintune inspect --dropped, or be in the other part",
            )
    tokenizer = load_tokenizer(find_base(config.model, weights=False))
    return [_shown(found, part, tokenizer) for found in table.slice(0, count).to_pylist()]


def why_dropped(
    config: Config, *, source: str | None = None, line: int | None = None, reason: str | None = None
) -> list[dict[str, Any]]:
    """Lines of the ledger (source, line, row_sha256, reason, detail) that fit all arguments."""
    table = pq.read_table(_folder(config) / "ledger.parquet")
    for column, value in (("source", source), ("line", line), ("reason", reason)):
        if value is not None:
            table = table.filter(pc.equal(table[column], value))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _folder(config: Config) -> Path:
    seal.read_seal(config.data_dir, stage="prepared data", make="fintune prepare")
    return config.data_dir


def _shown(row: dict[str, Any], part: str, tokenizer: Any) -> Shown:
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        trained = label != IGNORE
        if not pieces or pieces[-1][1] != trained:
            pieces.append(([], trained))
        pieces[-1][0].append(token)
    decoded = [(str(tokenizer.decode(ids)), trained) for ids, trained in pieces]
    return Shown(
        example_id=row["example_id"],
        source=row["source"],
        part=row.get("part", part),
        group=row["group"],
        length=row["length"],
        trained=sum(label != IGNORE for label in row["labels"]),
        pieces=decoded,
    )
