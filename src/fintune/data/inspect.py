"""`fintune inspect`: a row as the model sees it, or why a row was dropped.

Every function raises OutputError where the data is not prepared or was changed since, and
DataError for a source that was not read or a reason that no filter has.
"""

from collections.abc import Collection
from itertools import groupby
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.text import Text

from fintune import seal
from fintune.config import Config
from fintune.console import printable
from fintune.data.filters import MEANINGS
from fintune.data.report import PARTS, Ledger
from fintune.errors import DataError
from fintune.example import IGNORE_INDEX
from fintune.files import read_json


def inspect(
    config: Config, row: str, part: str, count: int, source: str | None, line: int | None
) -> tuple[list[Text], list[dict[str, Any]]]:
    """Rows of prepared data as the model sees them: trained tokens in green.

    Args:
        row: an example id or the start of one; empty: any.
        part: train, validation or test.
        count: most rows.
        source: only rows of this source.
        line: only rows of this line, in any part; `row`, `part` and `count` are not used then.

    Returns:
        The rows, and where `line` is given those of the ledger (see `why_dropped`).

    Raises:
        DataError: no such row.
    """
    parts = (part,) if line is None else PARTS
    tables = {name: _matching(config, name, source=source, line=line) for name in parts}
    dropped = why_dropped(config, source=source, line=line) if line else []
    if line is None:
        table = tables[part]
        tables[part] = table.filter(pc.starts_with(table["example_id"], row)).slice(0, count)
    if not dropped and not any(map(len, tables.values())):
        fix = "see fintune dropped, or another --part; lines count from 1, a row's is its first"
        raise DataError(f"no such row in {', '.join(tables)} of {config.data_dir}", fix=fix)
    return _texts(config, tables), dropped


def why_dropped(
    config: Config, *, source: str | None = None, line: int | None = None, reason: str | None = None
) -> list[dict[str, Any]]:
    """Lines of the ledger (source, line, row_sha256, reason, detail) that fit all arguments."""
    return list(_matching(config, "ledger", source=source, line=line, reason=reason).to_pylist())


def _matching(config: Config, name: str, **wanted: str | int | None) -> Any:
    """The rows of a prepared file whose columns have these values; None: any."""
    folder = config.data_dir
    known: dict[str, Collection[str]] = {"reason": MEANINGS}
    path, alone = folder / f"{name}.parquet", Ledger.beside(folder)
    if name == "ledger" and alone.is_file() and not folder.exists():
        path = alone
    else:
        seal.read_data(folder)
        known["source"] = read_json(folder / "manifest.json")["sources"]
    table = pq.read_table(path)
    for column, value in wanted.items():
        if value is not None:
            if (values := known.get(column)) is not None and value not in values:
                raise DataError(f"no {column} {value}", fix=f"there are: {', '.join(values)}")
            table = table.filter(pc.equal(table[column], value))
    return table


def _texts(config: Config, tables: dict[str, Any]) -> list[Text]:
    """Rows of parts for a terminal: what is trained in green, what is only read dimmed."""
    from fintune.model import find_base, load_tokenizer  # torch, which the ledger does not need

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
