"""`fintune inspect`: a row as the model sees it, or why a row was dropped.

Every function raises OutputError where the data is not prepared, or by an earlier version, and
DataError for a source or a reason that no row has.
"""

from itertools import groupby
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.text import Text

from fintune import seal
from fintune.config import Config
from fintune.console import printable
from fintune.data.report import PARTS
from fintune.errors import DataError
from fintune.example import IGNORE_INDEX
from fintune.files import read_json
from fintune.model import find_base, load_tokenizer


def inspect(
    config: Config, row: str = "", part: str = "train", count: int = 1, source: str | None = None
) -> list[Text]:
    """Rows of prepared data as the model sees them: trained tokens in green.

    Args:
        row: an example id or the start of one; absent: the first `count` rows of `part`.
        part: train, validation or test.
        source: only rows of this source.

    Raises:
        DataError: no such row in `part`.
    """
    table = _matching(config, part, source=source)
    table = table.filter(pc.starts_with(table["example_id"], row)).slice(0, count)
    if table.num_rows == 0:
        raise DataError(
            f"no such row in {part}.parquet of {config.data_dir}",
            fix="it may have been dropped: fintune dropped, or be in another part: --part",
        )
    return _texts(config, {part: table})


def why_dropped(
    config: Config, *, source: str | None = None, line: int | None = None, reason: str | None = None
) -> list[dict[str, Any]]:
    """Lines of the ledger (source, line, row_sha256, reason, detail) that fit all arguments."""
    found = _matching(config, "ledger", source=source, line=line, reason=reason)
    return list(found.to_pylist())


def find(
    config: Config, line: int, source: str | None = None
) -> tuple[list[Text], list[dict[str, Any]]]:
    """The row of a line, of every source that has one unless it is named: kept, or of the ledger.

    Raises:
        DataError: no source has a row there.
    """
    tables = {part: _matching(config, part, source=source, line=line) for part in PARTS}
    dropped = why_dropped(config, source=source, line=line)
    if not dropped and not any(map(len, tables.values())):
        fix = "lines count from 1; a row of several lines goes by its first"
        raise DataError(f"no row at {source or 'any source'}:{line}", fix=fix)
    return _texts(config, tables), dropped


def _matching(config: Config, name: str, **wanted: str | int | None) -> Any:
    """The rows of a prepared file whose columns have these values; None: any."""
    folder = config.data_dir
    seal.read_data(folder)
    table = pq.read_table(folder / f"{name}.parquet")
    manifest = read_json(folder / "manifest.json")
    there = {"source": manifest["sources"], "reason": manifest["rows"]["dropped"]}
    for column, value in wanted.items():
        if value is not None:
            known = there.get(column, [value])
            if value not in known:
                raise DataError(f"no {column} {value}", fix=f"there are: {', '.join(known)}")
            table = table.filter(pc.equal(table[column], value))
    return table


def _texts(config: Config, tables: dict[str, Any]) -> list[Text]:
    """Rows of parts for a terminal: what is trained in green, what is only read dimmed."""
    tokenizer = load_tokenizer(find_base(config.model, weights=False, kept_in=[config.data_dir]))
    texts = []
    for part, row in ((part, row) for part, rows in tables.items() for row in rows.to_pylist()):
        trained = [label != IGNORE_INDEX for label in row["labels"]]
        place = f"{row['example_id']}  {row['source']}:{row['line']}  {part}"
        head = f"{place}  group {row['group']}  {row['length']} tokens, {sum(trained)} trained\n"
        text = Text(printable(head), style="bold")
        for style, run in groupby(zip(row["input_ids"], trained, strict=True), lambda one: one[1]):
            piece = str(tokenizer.decode([token for token, _ in run]))
            text.append(printable(piece), style="green" if style else "dim")
        texts.append(text)
    return texts
