"""Files as batches of raw rows: JSON Lines, JSON, CSV and Parquet, also packed by gzip or zstd.

JSON Lines are cut into blocks at line ends and parsed where they are filtered, which may be another
process; every other format is parsed here, and a JSON file that is no JSON Lines is read whole. A
row that cannot be read is an `Unreadable` with its line. Rows before the place where a file breaks
off are kept; the place is one `Unreadable` more.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fintune.errors import DataError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
BROKEN = (OSError, EOFError, zlib.error)
"""What the packings raise where a file breaks off."""
BLOCK_BYTES = 4 << 20
PIECE_BYTES = 1 << 16
"""Bytes of one read of a packed file. What zstd unpacked in a read that fails is lost."""

ROWS_A_BATCH = 4096
BOM = b"\xef\xbb\xbf"
_LONE = re.compile("[\udc80-\udcff]")
"""What bytes that are no UTF-8 become under `surrogateescape`."""
_SKIPPED = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that could not be read, with the reason that goes into the ledger."""

    reason: str
    detail: str
    raw: bytes = b""

    def __str__(self) -> str:
        # A comma may stand between two values.
        return self.raw.decode("utf-8", "replace").replace(",", ", ") or self.detail


@dataclass(frozen=True, slots=True)
class Batch:
    """Raw rows of one source: a block of JSON Lines, or rows parsed already, with their lines."""

    first_line: int
    block: bytes = b""
    rows: list[tuple[int, Any]] = field(default_factory=list)

    def parsed(self) -> Iterator[tuple[int, Any]]:
        """The rows with their lines, blank lines left out."""
        lines = self.block.removesuffix(b"\n").split(b"\n") if self.block else []
        for line, raw in enumerate(lines, self.first_line):
            if raw and not raw.isspace():
                yield line, parse(raw)
        yield from self.rows


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
        return _parquet_batches(path)
    try:
        head = next(_pieces(path), b"").removeprefix(BOM).lstrip()
    except BROKEN as error:
        raise DataError(f"{path}: {error}", fix="check that it is what its name says") from None
    if kind == ".csv":
        return grouped(_csv_rows(path, head.partition(b"\n")[0]))
    return grouped(_array(path)) if kind == ".json" and head[:1] == b"[" else _blocks(path)


def parse(raw: bytes) -> Any:
    """One JSON value, or what is wrong with it; NaN is read as the number, as pandas writes it."""
    try:
        return json.loads(raw)
    except UnicodeDecodeError as error:
        return Unreadable("not_utf8", f"byte {error.start}", raw)
    except (ValueError, RecursionError) as error:
        return Unreadable("not_json", str(error)[:200], raw)


def grouped(rows: Iterator[tuple[int, Any]]) -> Iterator[Batch]:
    """Parsed rows with their lines, `ROWS_A_BATCH` at a time."""
    while batch := list(islice(rows, ROWS_A_BATCH)):
        yield Batch(batch[0][0], rows=batch)


def _pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, unpacked. Raises one of `BROKEN` behind the last piece that is whole."""
    with path.open("rb") as file:
        unpacked: Any = file
        if path.suffix == ".gz":
            unpacked = gzip.GzipFile(fileobj=file)
        elif path.suffix == ".zst":
            unpacked = pa.CompressedInputStream(file, "zstd")
        while data := unpacked.read1(PIECE_BYTES):
            yield data


def _blocks(path: Path) -> Iterator[Batch]:
    """A file cut at line ends; where it breaks off, the unfinished line is an `Unreadable`."""
    line, read, kept, broken = 1, 0, bytearray(), ""
    try:
        for data in _pieces(path):
            kept += data if read else data.removeprefix(BOM)
            read += len(data)
            if len(kept) >= BLOCK_BYTES and b"\n" in data:
                block, _, kept = kept.rpartition(b"\n")
                yield Batch(line, bytes(block + b"\n"))
                line += block.count(b"\n") + 1
    except BROKEN as error:
        broken = f"breaks off behind byte {read}: {error}"[:200]
    if not broken:
        yield Batch(line, bytes(kept))
        return
    block, end, rest = kept.rpartition(b"\n")
    cut = Unreadable("truncated_file", broken, bytes(rest))
    yield Batch(line, bytes(block), [(line + block.count(b"\n") + len(end), cut)])


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of an array, from 1.

    One with bytes that are no UTF-8 costs itself; what is no JSON ends the reading.
    """
    pieces, broken = bytearray(), ""
    try:
        for data in _pieces(path):
            pieces += data
    except BROKEN as error:
        broken = str(error)
    text = pieces.removeprefix(BOM).decode("utf-8", "surrogateescape")
    decoder = json.JSONDecoder()
    number, at = 0, text.index("[") + 1
    while not text.startswith("]", at := _SKIPPED.match(text, at).end()):  # type: ignore[union-attr]
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            broken = broken or str(error)
            break
        number, raw, at = number + 1, text[at:end], end
        yield number, Unreadable("not_utf8", "", _bytes(raw)) if _LONE.search(raw) else row
    if broken or text[at + 1 :].strip():
        detail = f"breaks off behind byte {len(_bytes(text[:at]))}: {broken or 'a second value'}"
        yield number + 1, Unreadable("truncated_file", detail[:200], _bytes(text[at : at + 1000]))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _csv_rows(path: Path, header_line: bytes) -> Iterator[tuple[int, Any]]:
    """Rows by the header's names, cut where the header is: at commas, semicolons or tabs.

    A quotation that is not closed within `BLOCK_BYTES` characters is one `Unreadable`.
    """
    broken: list[tuple[int, Any]] = []

    def lines() -> Iterator[str]:
        for batch in _blocks(path):
            broken.extend(batch.rows)
            yield from io.TextIOWrapper(io.BytesIO(batch.block), "utf-8", "surrogateescape", "")

    csv.field_size_limit(BLOCK_BYTES)
    delimiter = max(",;\t", key=header_line.decode("utf-8", "replace").count)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield line, Unreadable("wrong_cells", str(error)[:200])
            continue
        raw = ",".join(cells)
        if not header or not raw.strip():
            header = header or (cells if raw.strip(", ") else [])
        elif len(cells) != len(header):
            detail = f"{len(cells)} cells, {len(header)} columns"
            yield line, Unreadable("wrong_cells", detail, _bytes(raw))
        elif _LONE.search(raw):
            yield line, Unreadable("not_utf8", "", _bytes(raw))
        else:
            yield line, dict(zip(header, cells, strict=True))
    yield from broken


def _parquet_batches(path: Path) -> Iterator[Batch]:
    line = 1
    try:
        with pq.ParquetFile(path) as file:
            for chunk in file.iter_batches(ROWS_A_BATCH):
                try:
                    rows = chunk.to_pylist()
                except (ValueError, OverflowError):
                    rows = [_parquet_row(chunk.slice(at, 1)) for at in range(len(chunk))]
                yield Batch(line, rows=list(enumerate(rows, line)))
                line += len(rows)
    except (pa.ArrowException, OSError) as error:
        yield Batch(line, rows=[(line, Unreadable("truncated_file", str(error)[:200]))])


def _parquet_row(row: pa.RecordBatch) -> Any:
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_text"
        return Unreadable(reason, str(error)[:200])
