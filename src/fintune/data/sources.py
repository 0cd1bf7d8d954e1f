"""Where rows come from: local files, globs and folders, or a hub id, as batches of raw rows.

A JSON Lines file is cut into blocks of bytes at line ends and parsed where it is filtered, which
may be another process. Every other format is parsed here. A row that cannot be read is a `Bad`
with its line; only a file that is no data at all ends the run.
"""

import csv
import glob
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from fintune import nano
from fintune.config import DataConfig, SourceConfig
from fintune.errors import ConfigError, DataError
from fintune.files import sha256_file

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 4 << 20
ROWS_A_BATCH = 4096
LFS_HEAD = b"version https://git-lfs.github.com/spec/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Bad:
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


@dataclass(frozen=True, slots=True)
class Source:
    """One file or hub data set.

    `name` stands in the ledger and in `train.parquet`; it is the path below the configured
    folder, or below a glob's part without wildcards, so that prepared data does not depend on
    where the rows lay. `identity` is what the manifest records: a file's sha256 or a data set's
    commit.
    """

    name: str
    identity: str
    config: SourceConfig
    path: Path | None

    def batches(self) -> Iterator[Batch]:
        """All rows in order.

        Raises:
            DataError: the file is no data of its format, or the hub refuses.
        """
        if self.path is None:
            return _hub_batches(self.config, self.identity)
        return _file_batches(self.path)


def find_sources(config: DataConfig) -> list[Source]:
    """Every file and hub id of the config, ordered by name.

    Raises:
        ConfigError: no source is configured.
        DataError: a missing path, a folder or glob without data, a Git LFS pointer, no hub.
    """
    wanted = list(config.sources)
    if config.source:
        wanted.insert(
            0,
            SourceConfig(
                path=config.source,
                revision=config.revision,
                split=config.split,
                columns=config.columns,
            ),
        )
    if not wanted:
        raise ConfigError("data.source is empty", fix="name a file, a folder, a glob or a hub id")
    return named(wanted)


def named(wanted: list[SourceConfig]) -> list[Source]:
    """Every file and hub id of these, ordered by name; of equal names later ones get a number."""
    found = [source for item in wanted for source in locate(item)]
    found.sort(key=lambda source: (source.name, source.identity))
    seen: dict[str, int] = {}
    sources = []
    for source in found:
        seen[source.name] = count = seen.get(source.name, 0) + 1
        name = source.name if count == 1 else f"{source.name}#{count}"
        sources.append(Source(name, source.identity, source.config, source.path))
    return sources


def locate(item: SourceConfig) -> list[Source]:
    """The files of one configured source, or the hub data set it names."""
    # The bundled sample rows go by the bundled base's name.
    path = nano.rows_path() if item.path == nano.NANO_ID else Path(item.path).expanduser()
    if path.is_file():
        return [_local(path, path.name, item)]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _format(p) and not p.name.startswith("."))
        if not files:
            raise DataError(
                f"{path} holds no data file", fix=f"it needs one of {', '.join(FORMATS)}"
            )
        return [_local(file, file.relative_to(path).as_posix(), item) for file in files]
    if any(sign in item.path for sign in "*?["):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise DataError(f"no file matches {item.path}", fix="check the pattern")
        fixed = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        return [_local(file, file.relative_to(fixed).as_posix(), item) for file in files]
    if _HUB_ID.fullmatch(item.path) and _format(path) is None:
        return [Source(item.path, _hub_commit(item), item, None)]
    raise DataError(f"no file or folder at {item.path}", fix="check data.source")


def _format(path: Path) -> str | None:
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in PACKINGS:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _local(path: Path, name: str, item: SourceConfig) -> Source:
    if _format(path) is None:
        raise DataError(
            f"{path}: no known data format", fix=f"it must end in one of {', '.join(FORMATS)}"
        )
    with path.open("rb") as file:
        head = file.read(len(LFS_HEAD))
    if head == LFS_HEAD:
        raise DataError(
            f"{path} is a Git LFS pointer, not the data",
            why="git cloned without LFS leaves a few lines of text in place of the file",
            fix="run: git lfs pull",
        )
    if not head:
        raise DataError(f"{path} is empty", fix="check how it was made or downloaded")
    return Source(name, sha256_file(path), item, path)


def _open(path: Path) -> BinaryIO:
    packing = PACKINGS.get(path.suffix)
    return cast(BinaryIO, pa.input_stream(str(path), compression=packing))


def _file_batches(path: Path) -> Iterator[Batch]:
    kind = _format(path)
    if kind == ".parquet":
        yield from _parquet_batches(path)
        return
    with _open(path) as stream:
        if kind == ".csv":
            yield from _grouped(_csv_rows(stream))
            return
        head = stream.read(1 << 16).lstrip(b"\xef\xbb\xbf").lstrip()
    with _open(path) as stream:
        if kind == ".json" and head[:1] == b"[":
            yield from _grouped(_array_rows(stream))
        elif kind == ".json" and head[:1] == b"{" and not _is_json(head.split(b"\n")[0]):
            yield from _grouped(_document_rows(stream))
        else:
            yield from _blocks(stream)


def _is_json(line: bytes) -> bool:
    """Whether a first line stands alone (or was cut at the head's end, being a long line)."""
    try:
        return len(line) >= 1 << 15 or json.loads(line) is not None
    except ValueError:
        return False


def _grouped(rows: Iterator[tuple[int, Any]]) -> Iterator[Batch]:
    batch: list[tuple[int, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS_A_BATCH:
            yield Batch(batch[0][0], rows=batch)
            batch = []
    if batch:
        yield Batch(batch[0][0], rows=batch)


def _blocks(stream: BinaryIO) -> Iterator[Batch]:
    line, kept = 1, [b""]
    while True:
        try:
            data = stream.read(BLOCK_BYTES)
        except OSError as error:
            rest = b"".join(kept)
            yield Batch(line, rows=[(line, Bad("truncated_file", str(error)[:200], rest))])
            return
        if line == 1 and kept == [b""]:
            data = data.removeprefix(b"\xef\xbb\xbf")
        cut = data.rfind(b"\n") + 1 if data else 0
        if data and not cut:
            kept.append(data)
            continue
        block = b"".join(kept) + data[:cut]
        if block:
            yield Batch(line, block)
        if not data:
            return
        line += block.count(b"\n")
        kept = [data[cut:]]


def parse_block(batch: Batch) -> Iterator[tuple[int, Any]]:
    """The rows of a batch with their lines, blank lines left out; unreadable ones as `Bad`."""
    yield from batch.rows
    if not batch.block:
        return
    for line, raw in enumerate(batch.block.removesuffix(b"\n").split(b"\n"), batch.first_line):
        if not raw.isspace() and raw:
            yield line, _parse(raw)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return Bad("not_utf8", f"byte {error.start}", raw)
    except (ValueError, RecursionError) as error:
        return Bad("not_json", str(error)[:200], raw)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _text(stream: BinaryIO) -> io.TextIOWrapper:
    """Text of a stream; bytes that are no UTF-8 become lone surrogates, found by `_checked`."""
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _checked(line: int, row: Any) -> tuple[int, Any]:
    values = row.values() if isinstance(row, dict) else ()
    if any(isinstance(v, str) and re.search("[\udc80-\udcff]", v) for v in values):
        return line, Bad("not_utf8", "", repr(row).encode("ascii", "backslashreplace"))
    return line, row


def _csv_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(_text(stream))
    line = 1
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield _checked(line, dict(zip(header, cells, strict=True)))
            elif cells:
                detail = f"{len(cells)} cells, {len(header)} columns"
                yield line, Bad("wrong_cells", detail, repr(cells).encode("ascii", "replace"))
            line = reader.line_num + 1
    except (csv.Error, OSError) as error:
        yield line, Bad("truncated_file", str(error)[:200])


def _array_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Elements of one JSON array, streamed; the line is the element's number, from 1."""
    decoder = json.JSONDecoder()  # NaN is one row's fault, not the end of all that follow
    text, buffer, at, number, more = _text(stream), "", 0, 0, True
    skip = re.compile(r"[\s,\[]*")
    while True:
        try:
            if at > BLOCK_BYTES or not buffer:
                buffer, at = buffer[at:] + text.read(BLOCK_BYTES), 0
            start = skip.match(buffer, at).end()  # type: ignore[union-attr]
            if buffer[start : start + 1] == "]":
                return
            row, end = decoder.raw_decode(buffer, start)
            if end == len(buffer) and more:
                raise ValueError("cut by the buffer's end")
        except (ValueError, RecursionError, OSError) as error:
            addition = "" if isinstance(error, OSError) else text.read(max(1, len(buffer)))
            more, buffer, at = bool(addition), buffer[at:] + addition, 0
            if more:
                continue
            detail = f"the array breaks after {number} elements: {error}"[:200]
            rest = buffer[:1000].encode("utf-8", "replace")
            yield number + 1, Bad("truncated_file", detail, rest)
            return
        number, at, written = number + 1, end, buffer[start:end]
        if "NaN" in written or "Infinity" in written:
            row = _parse(written.encode("utf-8", "replace"))
        yield (number, row) if isinstance(row, Bad) else _checked(number, row)


def _document_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """One object that holds the rows under one of its keys (`{"data": [...]}`)."""
    raw = stream.read()
    document = _parse(raw)
    if isinstance(document, Bad):
        yield 1, document
        return
    lists = [value for value in document.values() if isinstance(value, list)]
    rows = lists[0] if len(lists) == 1 else [document]
    yield from enumerate(rows, 1)


def _parquet_batches(path: Path) -> Iterator[Batch]:
    line = 1
    try:
        with pq.ParquetFile(path) as file:
            for chunk in file.iter_batches(ROWS_A_BATCH):
                rows = list(enumerate(chunk.to_pylist(), line))
                line += len(rows)
                yield Batch(rows[0][0] if rows else line, rows=rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Batch(line, rows=[(line, Bad("truncated_file", str(error)[:200]))])


def _hub_commit(item: SourceConfig) -> str:
    """The commit that a hub id means now; a pinned full commit needs no network."""
    if item.revision and re.fullmatch(r"[0-9a-f]{40}", item.revision):
        return item.revision
    import huggingface_hub

    try:
        return str(huggingface_hub.dataset_info(item.path, revision=item.revision).sha)
    except Exception as error:
        raise _hub_error(item, error) from None


def _hub_batches(item: SourceConfig, commit: str) -> Iterator[Batch]:
    import datasets

    try:
        rows = datasets.load_dataset(item.path, revision=commit, split=item.split)
    except Exception as error:
        raise _hub_error(item, error) from None
    for start in range(0, len(rows), ROWS_A_BATCH):
        chunk = rows[start : start + ROWS_A_BATCH]
        names = list(chunk)
        columns = zip(*(chunk[name] for name in names), strict=True)
        numbered = enumerate((dict(zip(names, cells, strict=True)) for cells in columns), start + 1)
        yield Batch(start + 1, rows=list(numbered))


def _hub_error(item: SourceConfig, error: Exception) -> DataError:
    """The hub's many errors as one message. Only the cause's name is shown: no tokens, no URLs."""
    import datasets
    import huggingface_hub.errors as hub

    cause: BaseException | None = error
    kinds: set[type] = set()
    while cause is not None:
        kinds.add(type(cause))
        cause = cause.__cause__ or cause.__context__
    page = f"https://huggingface.co/datasets/{item.path}"

    def is_a(*wanted: type) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    if is_a(hub.GatedRepoError):
        return DataError(
            f"{item.path} is gated: its licence must be accepted first",
            fix=f"accept it at {page} and set HF_TOKEN to a read token",
        )
    if is_a(hub.RevisionNotFoundError):
        return DataError(f"{item.path} has no revision {item.revision}", fix=f"see {page}")
    if is_a(hub.RepositoryNotFoundError, hub.HFValidationError):
        return DataError(
            f"the hub knows no data set {item.path}, and there is no such local path",
            fix=f"check data.source; a private or gated one ({page}) needs HF_TOKEN",
        )
    if isinstance(error, ValueError) and not is_a(datasets.exceptions.DatasetsError, OSError):
        return DataError(f"{item.path}: {str(error)[:200]}", fix="check data.split")
    return DataError(
        f"{item.path} is not on this machine and the hub cannot be reached"
        f" ({type(error).__name__})",
        fix="check the network, or set data.source to a local copy",
    )
