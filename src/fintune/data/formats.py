"""The formats of files: JSON Lines, JSON, CSV and Parquet, as batches of raw rows.

A JSON Lines file is cut into blocks of bytes at line ends and parsed where it is filtered, which
may be another process. Every other format is parsed here. A row that cannot be read is a `Bad`
with its line; only a file that is no data at all ends the run.
"""

import csv
import io
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fintune.data.elements import WINDOW, elements, members
from fintune.data.raw import BLOCK_BYTES, BOM, LONE, PACKINGS, Bad, Batch, blocks, parse, pieces
from fintune.errors import DataError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
ROWS_A_BATCH = 4096
_END = "\ud800"  # what no file's text can hold


def format_of(path: Path) -> str | None:
    """The ending that names a file's format, a packing's apart; None for none known."""
    suffix = path.with_suffix("").suffix if path.suffix in PACKINGS else path.suffix
    return suffix if suffix in FORMATS else None


def file_batches(path: Path) -> Iterator[Batch]:
    """All rows of a file, in order.

    Raises:
        DataError: it is no data of its format.
    """
    kind = format_of(path)
    if kind == ".parquet":
        yield from _parquet_batches(path)
        return
    try:
        head = next(pieces(path, WINDOW), b"").removeprefix(BOM).lstrip()
    except OSError as error:
        raise DataError(f"{path}: {error}", fix="check that it is what its name says") from None
    if kind == ".csv":
        yield from _grouped(_csv_rows(path))
    elif kind == ".json" and (head[:1] == b"[" or (head[:1] == b"{" and not _is_lines(head))):
        yield from _grouped(elements(path))
    else:
        yield from blocks(path)


def _is_lines(head: bytes) -> bool:
    """Whether a file that starts so is JSON Lines: its first line is JSON and not a document."""
    first, _, rest = head.partition(b"\n")
    if rest.strip():
        return not isinstance(parse(first), Bad)
    return not members(head.decode("utf-8", "replace"), 0)[1]


def _grouped(rows: Iterator[tuple[int, Any]]) -> Iterator[Batch]:
    while batch := list(islice(rows, ROWS_A_BATCH)):
        yield Batch(batch[0][0], rows=batch)


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines, but not one in which a file breaks off; then `_END` and how it breaks, if it does."""
    bad = ""
    for batch in blocks(path):
        # Bytes that are no UTF-8 become lone surrogates.
        yield from io.TextIOWrapper(io.BytesIO(batch.block), "utf-8", "surrogateescape", "")
        bad = "".join(row.detail for _, row in batch.rows)
    yield _END + bad


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows by the header's names, cut where the header is: at commas, semicolons or tabs.

    A quotation that is not closed within `BLOCK_BYTES` characters is one `Bad`, and the next line
    a row again.
    """
    csv.field_size_limit(BLOCK_BYTES)
    lines = _csv_lines(path)
    head = [next(lines)]
    while not head[-1].strip():
        head.append(next(lines))
    reader = csv.reader(chain(head, lines), delimiter=max(",;\t", key=head[-1].count))
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except csv.Error as error:
            yield line, Bad("wrong_cells", str(error)[:200])
            continue
        text = ",".join(cells)
        if _END in text:
            break
        raw = text.encode("utf-8", "surrogateescape")
        if not header:
            header = cells
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise DataError(
                    f"{path}: the header names {twice[0]} more than once",
                    why="all but the last of these columns would be lost",
                    fix="rename or remove them",
                )
        elif cells and len(cells) != len(header):
            yield line, Bad("wrong_cells", f"{len(cells)} cells, {len(header)} columns", raw)
        elif cells:
            whole = not LONE.search(text)
            yield line, dict(zip(header, cells, strict=True)) if whole else Bad("not_utf8", "", raw)
    if text != _END:
        bad = text.partition(_END)[2] or "a quotation is not closed"
        yield line, Bad("truncated_file", bad, text.encode("utf-8", "replace"))


def _parquet_batches(path: Path) -> Iterator[Batch]:
    line = 1
    try:
        with pq.ParquetFile(path) as file:
            for chunk in file.iter_batches(ROWS_A_BATCH):
                try:
                    rows = chunk.to_pylist()
                except (ValueError, OverflowError):
                    rows = [_cells(chunk.slice(at, 1)) for at in range(len(chunk))]
                yield Batch(line, rows=list(enumerate(rows, line)))
                line += len(rows)
    except (pa.ArrowException, OSError) as error:
        yield Batch(line, rows=[(line, Bad("truncated_file", str(error)[:200]))])


def _cells(row: pa.RecordBatch) -> Any:
    """One row of a batch in which some row holds what Python cannot."""
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Bad("not_utf8", f"byte {error.start}", error.object)
    except (ValueError, OverflowError) as error:
        return Bad("not_text", str(error)[:200])
