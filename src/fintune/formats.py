"""Files of rows: JSON Lines, JSON, CSV, Parquet and Arrow streams, also packed.

JSON Lines stay bytes until `parse`, which may be called in another process; every other format is
parsed here, and a JSON array is read whole. A row that cannot be read is an `Unreadable`. Rows
before the place where a file breaks off are kept; the place is one `Unreadable` more.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fintune.errors import DataError

Row = tuple[int, Any]
"""Line, counted from 1, and the row."""

MOST_CELL = 4 << 20
"""Characters of a CSV's cell; a longer one is a quotation that is not closed."""

PIECE_BYTES = 1 << 12
"""Bytes of one read."""

ROWS_A_BATCH = 1024
UTF_8 = (None, "utf-8")
"""Encodings that need no other reading."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
HEADS = {
    b"version https://git-lfs": "a Git LFS pointer; run: git lfs pull",
    b"\x1f\x8b": "packed with gzip; add .gz to its name",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV in UTF-8",
    **dict.fromkeys(UTF_16, "UTF-16; save it as UTF-8, or set data.encoding=utf-16"),
}
"""First bytes of what often stands under the name of a data file, what it is and what to do."""

_NO_UTF8 = re.compile("[\udc80-\udcff]")
"""What bytes that are no UTF-8 become under `surrogateescape`."""
_SKIPPED = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that could not be read, with the reason that goes into the ledger."""

    reason: str
    detail: str
    raw: str = ""

    def __str__(self) -> str:
        # A comma may stand between two values.
        return self.raw.replace(",", ", ") or self.detail


class Written(float):
    """A number of a JSON text, which prints as it is written there: 12.50."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


def format_of(name: str) -> str | None:
    """The ending that names a file's format, a packing's apart; None for none known."""
    path = Path(name.lower())
    suffix = path.with_suffix("").suffix if path.suffix in PACKINGS else path.suffix
    return suffix if suffix in FORMATS else None


def check_head(path: Path, encoding: str | None = None) -> None:
    """Refuse a file that is empty, or something else than its name says.

    Args:
        encoding: as of `file_rows`.

    Raises:
        DataError: so it is.
    """
    if format_of(path.name) is None:
        fix = "save it as CSV UTF-8" if path.suffix.lower() in SPREADSHEETS else ENDINGS
        raise DataError(f"{path}: no known data format", fix=fix)
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise DataError(f"{path} is empty", fix="check how it was made or downloaded")
    for start, what in HEADS.items():
        named = path.suffix.lower() in PACKINGS or (start in UTF_16 and encoding not in UTF_8)
        if head.startswith(start) and not named:
            raise DataError(f"{path} is {what}")


def file_rows(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """All rows of a file, in order.

    Args:
        encoding: of a file of text that is no UTF-8.

    Raises:
        DataError: not one row can be read.
    """
    line, form = 0, format_of(path.name) or ""
    unpacked = PACKINGS.get(path.suffix.lower(), lambda plain: plain)
    with path.open("rb") as opened:
        file = unpacked(opened)
        try:
            if encoding not in UTF_8 and form in TEXTS:
                file = _as_utf8(file, str(encoding))
            for line, row in FORMATS[form](file):
                yield line, row
        except (OSError, EOFError, ValueError, RuntimeError, csv.Error, zlib.error) as error:
            if line == 0:
                fix = "check that it is what its name says"
                raise DataError(f"{path}: {error}", fix=fix) from None
            what = f"breaks off before byte {opened.tell()}: {error}"
            yield line + 1, Unreadable("truncated_file", what[:200])


def _as_utf8(file: Any, encoding: str) -> io.BufferedReader:
    """A text that is no UTF-8, read whole, in UTF-8; bytes that are none of it stay as they are."""
    data = file.read()
    try:
        data.decode()
    except ValueError:
        text = data.decode(encoding, "surrogateescape")
        data = text.encode("utf-8", "surrogateescape")
    return io.BufferedReader(io.BytesIO(data))


def _zstd(file: Any) -> io.BufferedReader:
    """Read in small pieces: pyarrow's reader loses the one at which a file breaks off."""
    return io.BufferedReader(pa.input_stream(file, "zstd"), PIECE_BYTES)


def parse(row: Any) -> Any:
    """The JSON value of a line's bytes, or what is wrong with it; other rows as they are."""
    if not isinstance(row, bytes):
        return row
    return parse_json(row.decode("utf-8-sig", "surrogateescape"))


def parse_json(text: str) -> Any:
    """The value of a JSON text, or what is wrong with it."""
    text = text.strip()
    try:
        value, end = _decode(text, 0)
        if end < len(text):
            what = "object" if isinstance(value, dict) else "value"
            raise ValueError(f"{text[end : end + 20]!r} behind the {what}")
    except (ValueError, RecursionError) as error:
        if found := _NO_UTF8.search(text):
            return Unreadable("not_utf8", _in_cp1252(found), text)
        return Unreadable("not_json", str(error)[:200], text)
    return value


def _decode(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a place, `Unreadable` where it is not strict, and its end.

    Raises:
        ValueError: there is none.
    """
    wrong: list[tuple[str, str]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            wrong.append(("repeated_column", ", ".join(name for name, _ in pairs)))
        return row

    def constant(name: str) -> None:
        wrong.append(("not_json", f"{name} is no JSON"))

    decoder = json.JSONDecoder(
        object_pairs_hook=unique, parse_float=Written, parse_constant=constant
    )
    value, end = decoder.raw_decode(text, at)
    if found := _NO_UTF8.search(text, at, end):
        wrong.append(("not_utf8", _in_cp1252(found)))
    return (Unreadable(*wrong[0], text[at:end]) if wrong else value), end


def _in_cp1252(found: re.Match[str]) -> str:
    """How the word there would read in the encoding that Excel saves a CSV of Europe in."""
    around = found.string[max(0, found.start() - 20) : found.end() + 20]
    read = around.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    words = re.findall(r"[^\W\d_]+", read)
    return f"as Windows-1252: {next((word for word in words if not word.isascii()), '?')}"


def _check_columns(names: list[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f'the column "{twice[0]}" stands twice, all but one would be lost')


def _json_lines(file: Any) -> Iterator[Row]:
    for line, raw in enumerate(file, 1):
        if not raw.isspace():
            yield line, raw


def _json(file: Any) -> Iterator[Row]:
    """JSON Lines, or the elements of an array, from 1; what is no JSON ends the reading."""
    if file.peek(PIECE_BYTES).decode("utf-8-sig", "replace").lstrip()[:1] != "[":
        yield from _json_lines(file)
        return
    data = bytearray()
    with contextlib.suppress(OSError, EOFError):  # the element that is cut off says so
        while piece := file.read1():
            data += piece
    text = data.decode("utf-8-sig", "surrogateescape")
    number, at = 0, text.index("[") + 1
    while not text.startswith("]", at := _SKIPPED.match(text, at).end()):  # type: ignore[union-attr]
        row, at = _decode(text, at)
        yield (number := number + 1), row
    if text[at + 1 :].strip():
        raise ValueError("a second value stands behind the array")


def _csv(file: Any) -> Iterator[Row]:
    """Rows by the header's names, cut where the header is: at commas, semicolons or tabs."""
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    before, head = 0, text.readline()
    while head and not head.strip():
        before, head = before + 1, text.readline()
    csv.field_size_limit(MOST_CELL)
    reader = csv.reader(chain([head], text), delimiter=max(",;\t", key=head.count), strict=True)
    header = next(reader, [])
    _check_columns(header)
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, Unreadable("wrong_cells", str(error)[:200])
            continue
        raw = ",".join(cells)
        if not raw.strip():
            continue
        if len(cells) != len(header):
            detail = f"{len(cells)} cells, {len(header)} columns"
            yield line, Unreadable("wrong_cells", detail, raw)
        elif found := _NO_UTF8.search(raw):
            yield line, Unreadable("not_utf8", _in_cp1252(found), raw)
        else:
            yield line, dict(zip(header, cells, strict=True))


def _parquet(file: Any) -> Iterator[Row]:
    with pq.ParquetFile(file) as table:
        _check_columns(table.schema_arrow.names)
        yield from arrow_rows(table.iter_batches(ROWS_A_BATCH))


def _arrow(file: Any) -> Iterator[Row]:
    """A stream of record batches, as `save_to_disk` of the package datasets writes it."""
    with pa.ipc.open_stream(file) as batches:
        _check_columns(batches.schema.names)
        yield from arrow_rows(batches)


def arrow_rows(tables: Iterable[Any]) -> Iterator[Row]:
    """Rows of Arrow tables; one that Python cannot hold costs itself."""
    return enumerate(chain.from_iterable(map(_rows, tables)), 1)


def _rows(table: Any) -> list[Any]:
    for at, field in enumerate(table.schema):
        if pa.types.is_float32(field.type):  # 0.1, where its double is 0.10000000149011612
            printed = table.column(at).cast(pa.string()).cast(pa.float64())
            table = table.set_column(at, field.name, printed)
    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError) as error:
        if len(table) == 1:
            return [Unreadable("not_text", str(error)[:200])]
        return [row for at in range(len(table)) for row in _rows(table.slice(at, 1))]


FORMATS: dict[str, Callable[[Any], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""Ending -> how such a file is read."""
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
PACKINGS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".zst": _zstd}
ENDINGS = f"data files end in one of {', '.join(FORMATS)}, or as packed: {', '.join(PACKINGS)}"
