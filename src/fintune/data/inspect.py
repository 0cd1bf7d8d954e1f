"""`fintune inspect`: a row as the model sees it, or why a row was dropped.

Every function raises OutputError where the data is not prepared, or by an earlier version, and
DataError for a source or a reason that no row has.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.text import Text

from fintune import seal
from fintune.config import Config
from fintune.console import printable
from fintune.errors import DataError
from fintune.example import IGNORE_INDEX
from fintune.files import read_json
from fintune.model import find_base, load_tokenizer

FILES = {part: f"{part}.parquet" for part in ("train", "validation", "test")}


@dataclass(frozen=True, slots=True)
class Shown:
    """One row of prepared data, decoded."""

    example_id: str
    source: str
    line: int
    part: str
    group: str
    length: int
    trained: int
    pieces: list[tuple[str, bool]]
    """Consecutive text of the conversation, and whether its tokens are trained."""

    def text(self) -> Text:
        """The row for a terminal: what is trained in green, what is only read dimmed."""
        head = (
            f"{self.example_id}  {self.source}:{self.line}  {self.part}  group {self.group}  "
            f"{self.length} tokens, {self.trained} trained\n"
        )
        line = Text(printable(head), style="bold")
        for piece, trained in self.pieces:
            line.append(printable(piece), style="green" if trained else "dim")
        return line


def inspect(
    config: Config,
    *,
    row: str | None = None,
    part: str = "train",
    count: int = 1,
    source: str | None = None,
) -> list[Shown]:
    """Rows of prepared data as the model sees them.

    Args:
        row: an example id or the start of one; absent: the first `count` rows of `part`.
        part: train, validation or test.
        source: only rows of this source.

    Raises:
        DataError: no such row in `part`.
    """
    table = _matching(config, FILES[part], source=source)
    if row is not None:
        table = table.filter(pc.starts_with(table["example_id"], row))
    if table.num_rows == 0:
        raise DataError(
            f"no such row in {config.data_dir / FILES[part]}",
            fix="it may have been dropped: fintune dropped, or be in another part: --part",
        )
    tokenizer = load_tokenizer(find_base(config.model, weights=False))
    return [_shown(found, part, tokenizer) for found in table.slice(0, count).to_pylist()]


def why_dropped(
    config: Config, *, source: str | None = None, line: int | None = None, reason: str | None = None
) -> list[dict[str, Any]]:
    """Lines of the ledger (source, line, row_sha256, reason, detail) that fit all arguments."""
    found = _matching(config, "ledger.parquet", source=source, line=line, reason=reason)
    return list(found.to_pylist())


def find(
    config: Config, line: int, source: str | None = None
) -> tuple[list[Shown], list[dict[str, Any]]]:
    """The row of a line, of every source that has one unless it is named: kept, or of the ledger.

    Raises:
        DataError: no source has a row there.
    """
    kept = [
        (row, part)
        for part, name in FILES.items()
        for row in _matching(config, name, source=source, line=line).to_pylist()
    ]
    dropped = why_dropped(config, source=source, line=line)
    if not kept and not dropped:
        fix = "lines count from 1; a row of several lines goes by its first"
        raise DataError(f"no row at {source or 'any source'}:{line}", fix=fix)
    tokenizer = load_tokenizer(find_base(config.model, weights=False)) if kept else None
    return [_shown(row, part, tokenizer) for row, part in kept], dropped


def _matching(config: Config, name: str, **wanted: str | int | None) -> Any:
    """The rows of a prepared file whose columns have these values; None: any."""
    folder = config.data_dir
    seal.read_data(folder)
    table = pq.read_table(folder / name)
    manifest = read_json(folder / "manifest.json")
    there = {"source": manifest["sources"], "reason": manifest["rows"]["dropped"]}
    for column, value in wanted.items():
        if value is not None:
            known = there.get(column, [value])
            if value not in known:
                raise DataError(f"no {column} {value}", fix=f"there are: {', '.join(known)}")
            table = table.filter(pc.equal(table[column], value))
    return table


def _shown(row: dict[str, Any], part: str, tokenizer: Any) -> Shown:
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        trained = label != IGNORE_INDEX
        if not pieces or pieces[-1][1] != trained:
            pieces.append(([], trained))
        pieces[-1][0].append(token)
    decoded = [(str(tokenizer.decode(ids)), trained) for ids, trained in pieces]
    return Shown(
        example_id=row["example_id"],
        source=row["source"],
        line=row["line"],
        part=part,
        group=row["group"],
        length=row["length"],
        trained=sum(label != IGNORE_INDEX for label in row["labels"]),
        pieces=decoded,
    )
