"""Files as batches of raw rows: JSON Lines, JSON, CSV and Parquet, also packed by gzip or zstd.

JSON Lines are cut into blocks at line ends and parsed where they are filtered, which may be another
process; every other format is parsed here. A row that cannot be read is an `Unreadable` with its
line. Rows before the place where a file breaks off are kept; the place is one `Unreadable` more.
"""

import codecs
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

from fintune.data.schema import COLUMNS
from fintune.errors import DataError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
BROKEN = (OSError, EOFError, zlib.error)
"""What the packings raise where a file breaks off."""

BLOCK_BYTES = 4 << 20
PIECE_BYTES = 1 << 16
"""Bytes of one read of a packed file. What zstd unpacked in a read that fails is lost."""

LONGEST_ELEMENT = 1 << 24
"""Characters of a JSON array's element; one that does not end within them ends the reading."""

ROWS_A_BATCH = 4096
BOM = b"\xef\xbb\xbf"
_LONE = re.compile("[\udc80-\udcff]")  # what bytes that are no UTF-8 become
_ARRAY = re.compile("[\\s\ufeff]*\\[")
_SKIPPED = re.compile("[\\s,\ufeff]*")
_KEY = rf'"(?!(?:{"|".join(COLUMNS)})")[^"]*"\s*:\s*'
_SCALAR = r'(?:"(?:[^"\\]|\\.)*"|[\w.+-]+)\s*,\s*'
_DOCUMENT = re.compile(rf"[\s\ufeff]*{{\s*(?:{_KEY}{_SCALAR})*{_KEY}\[(?=\s*{{)")
"""The opening of an object whose first list holds the rows; its members before that are scalars. An
object with a column of a row is that row."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that could not be read, with the reason that goes into the ledger."""

    reason: str
    detail: str
    raw: bytes = b""


@dataclass(frozen=True, slots=True)
class Batch:
    """Raw rows of one source: a block of JSON Lines, or rows parsed already, with their lines."""

    first_line: int
    block: bytes = b""
    rows: list[tuple[int, Any]] = field(default_factory=list)

    def parsed(self) -> Iterator[tuple[int, Any]]:
        """The rows with their lines, blank lines left out."""
        yield from self.rows
        lines = self.block.removesuffix(b"\n").split(b"\n") if self.block else []
        for line, raw in enumerate(lines, self.first_line):
            if raw and not raw.isspace():
                yield line, parse(raw)


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
        return _grouped(_csv_rows(path, head))
    if kind == ".json" and not _is_lines(head):
        return _grouped(_elements(path))
    return _blocks(path)


def parse(raw: bytes) -> Any:
    """One JSON value, or what is wrong with it."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return Unreadable("not_utf8", f"byte {error.start}", raw)
    except (ValueError, RecursionError) as error:
        return Unreadable("not_json", str(error)[:200], raw)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _grouped(rows: Iterator[tuple[int, Any]]) -> Iterator[Batch]:
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
    line, read, kept, size, broken = 1, 0, [b""], 0, ""
    try:
        for data in _pieces(path):
            kept.append(data if read else data.removeprefix(BOM))
            read, size = read + len(data), size + len(data)
            if size >= BLOCK_BYTES and b"\n" in data:
                block, _, rest = b"".join(kept).rpartition(b"\n")
                yield Batch(line, block + b"\n")
                line, kept, size = line + block.count(b"\n") + 1, [rest], len(rest)
    except BROKEN as error:
        broken = f"breaks off behind byte {read}: {error}"[:200]
    rest = b"".join(kept)
    if broken:
        block, end, rest = rest.rpartition(b"\n")
        yield Batch(line, block + end)
        bad = Unreadable("truncated_file", broken, rest)
        yield Batch(line, rows=[(line + block.count(b"\n") + len(end), bad)])
    elif rest:
        yield Batch(line, rest)


def _is_lines(head: bytes) -> bool:
    """Whether a `.json` that starts so is JSON Lines. A row a line is no document, and one broken
    line among the first does not make it one."""
    if head[:1] != b"{":
        return head[:1] != b"["
    lines = head.split(b"\n")[:8]
    whole = [line[:1] == b"{" and not isinstance(parse(line), Unreadable) for line in lines]
    if whole[0] and any(line.strip() for line in lines[1:]):
        return True
    return any(whole) and not _DOCUMENT.match(head.decode("utf-8", "replace"))


def _elements(path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of an array, of a document's first list, or values one after another, from 1.

    One with NaN or with bytes that are no UTF-8 costs itself; what is no JSON ends the reading.
    """
    text = codecs.iterdecode(_pieces(path), "utf-8", "surrogateescape")
    constants: list[str] = []
    decoder = json.JSONDecoder(parse_constant=constants.append)
    buffer, at, dropped, broken = next(text, ""), 0, 0, ""

    def more() -> bool:
        """Read on and let go of what lies behind; False at the end, also of a broken file."""
        nonlocal buffer, at, dropped, broken
        try:
            piece = next(text, "") if len(buffer) - at < LONGEST_ELEMENT else ""
        except BROKEN as error:
            piece, broken = "", str(error)
        dropped += len(_bytes(buffer[:at]))
        buffer, at = buffer[at:] + piece, 0
        return bool(piece)

    document = _DOCUMENT.match(buffer)
    array = document or _ARRAY.match(buffer)
    at, number, problem = array.end() if array else 0, 0, ""
    while True:
        at = _SKIPPED.match(buffer, at).end()  # type: ignore[union-attr]
        if array and buffer.startswith("]", at):
            if not document:
                array, at = None, at + 1
                continue
            more()
            if not re.search(r"[\[{]", buffer[at:]):
                return
            at, problem = at + 1, "only the first list of a document is read"
            break
        constants.clear()
        try:
            row, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            row, end, problem = None, 0, getattr(error, "msg", str(error))
        # An error, or a number at the end of the buffer, may be an element that goes on.
        if end in (0, len(buffer)) and more():
            continue
        if not end:
            break
        number, written, at = number + 1, buffer[at:end], end
        if constants:
            row = Unreadable("not_json", f"{constants[0]} is not JSON", _bytes(written))
        elif not written.isascii() and _LONE.search(written):
            row = Unreadable("not_utf8", "", _bytes(written))
        yield number, row
    if array or broken or at < len(buffer):
        detail = f"breaks off behind byte {dropped + len(_bytes(buffer[:at]))}: {broken or problem}"
        yield number + 1, Unreadable("truncated_file", detail[:200], _bytes(buffer[at:][:1000]))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _csv_rows(path: Path, head: bytes) -> Iterator[tuple[int, Any]]:
    """Rows by the header's names, cut where the header is: at commas, semicolons or tabs.

    A quotation that is not closed within `BLOCK_BYTES` characters is one `Unreadable`.
    """
    broken: list[tuple[int, Any]] = []

    def lines() -> Iterator[str]:
        for batch in _blocks(path):
            broken.extend(batch.rows)
            yield from io.TextIOWrapper(io.BytesIO(batch.block), "utf-8", "surrogateescape", "")

    csv.field_size_limit(BLOCK_BYTES)
    delimiter = max(",;\t", key=head.split(b"\n")[0].decode("utf-8", "replace").count)
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
        if not header:
            header = cells if any(map(str.strip, cells)) else []
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise DataError(
                    f"{path}: the header names {twice[0]} more than once",
                    why="all but the last of these columns would be lost",
                    fix="rename or remove them",
                )
        elif cells:
            yield line, _cells(header, cells)
    yield from broken


def _cells(header: list[str], cells: list[str]) -> Any:
    text = ",".join(cells)
    raw = _bytes(text)
    if len(cells) != len(header):
        return Unreadable("wrong_cells", f"{len(cells)} cells, {len(header)} columns", raw)
    return (
        dict(zip(header, cells, strict=True))
        if not _LONE.search(text)
        else Unreadable("not_utf8", "", raw)
    )


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
    """One row of a batch in which some row holds what Python cannot."""
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Unreadable("not_utf8", f"byte {error.start}", error.object)
    except (ValueError, OverflowError) as error:
        return Unreadable("not_text", str(error)[:200])
