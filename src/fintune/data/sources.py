"""Where rows come from: local files, globs and folders, or a hub id, as batches of raw rows.

A JSON Lines file is cut into blocks of bytes at line ends and parsed where it is filtered, which
may be another process. Every other format is parsed here. A row that cannot be read is a `Bad`
with its line; only a file that is no data at all ends the run.
"""

import codecs
import csv
import glob
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fintune import nano
from fintune.config import DataConfig, SourceConfig
from fintune.data.rows import FORMATS as ROW_FORMATS
from fintune.errors import ConfigError, DataError
from fintune.files import sha256_file

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 4 << 20
ROWS_A_BATCH = 4096
BOM = b"\xef\xbb\xbf"
WINDOW = 1 << 17
"""Characters of JSON read ahead; a broken element is sought to end within them."""
LONGEST = 1 << 26
"""Characters after which an element that does not end is given up."""
DEEPEST = 16
LFS_HEAD = b"version https://git-lfs.github.com/spec/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LONE = re.compile("[\udc80-\udcff]")
_END = "\ud800"  # what no file's text can hold
_COLUMNS = {f'"{name}"' for asked, answer in ROW_FORMATS for name in (*asked, answer)}
_COLUMNS |= {'"messages"', '"conversations"'}
_SPACE = re.compile(r"[\s,]*")
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_MEMBER = re.compile(rf"[\s,{{]*({_STRING})\s*:\s*(\[?)", re.DOTALL)
# A quotation mark that opens nothing a comma, colon or bracket follows is not taken for a string.
_BRACKETS = re.compile(rf"{_STRING}(?=\s*[],:}}])|\\.|[][{{}},]", re.DOTALL)
_NEXT = re.compile(r",\s*(?=\{)")


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
        files = _below(path)
        if not files:
            raise DataError(
                f"{path} holds no data file", fix=f"it needs one of {', '.join(FORMATS)}"
            )
        return [_local(file, file.relative_to(path).as_posix(), item) for file in files]
    if any(sign in item.path for sign in "*?["):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        whole = [file for folder in found if _format(folder) for file in _below(folder)]
        files = sorted({*whole, *(file for file in found if not file.is_dir())})
        if not files:
            raise DataError(f"no file matches {item.path}", fix="check the pattern")
        fixed = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        return [_local(file, file.relative_to(fixed).as_posix(), item) for file in files]
    if _HUB_ID.fullmatch(item.path) and _format(path) is None:
        return [Source(item.path, _hub_commit(item), item, None)]
    raise DataError(f"no file or folder at {item.path}", fix="check data.source")


def _below(folder: Path) -> list[Path]:
    """Files of data at any depth, hidden files and folders left out; none below a file."""
    found = (folder / name for name in glob.glob("**/*", root_dir=folder, recursive=True))
    return sorted(file for file in found if _format(file) and not file.is_dir())


def _format(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix in PACKINGS else path.suffix
    return suffix if suffix in FORMATS else None


def _local(path: Path, name: str, item: SourceConfig) -> Source:
    if _format(path) is None:
        raise DataError(
            f"{path}: no known data format", fix=f"it must end in one of {', '.join(FORMATS)}"
        )
    if not path.is_file() or path.name.endswith((".parquet.gz", ".parquet.zst")):
        raise DataError(f"{path} is no file, or packed Parquet", fix="unpack, mend or remove it")
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


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    """A file's bytes, unpacked; `OSError` where they break off, behind the last byte before."""

    def stream() -> pa.NativeFile:
        return pa.input_stream(str(path), compression=PACKINGS.get(path.suffix))

    whole, opened = 0, stream()
    try:
        while data := opened.read(size):
            whole += 1
            yield data
    except OSError as error:
        # A read that fails loses what it had unpacked: again up to here, then byte by byte.
        opened, rest = stream(), bytearray()
        for _ in range(whole):
            opened.read(size)
        with suppress(OSError):
            while data := opened.read(1):
                rest += data
        if rest:
            yield bytes(rest)
        raise error


def _file_batches(path: Path) -> Iterator[Batch]:
    kind = _format(path)
    if kind == ".parquet":
        yield from _parquet_batches(path)
        return
    try:
        head = next(_pieces(path, WINDOW), b"").removeprefix(BOM).lstrip()
    except OSError as error:
        raise DataError(f"{path}: {error}", fix="check that it is what its name says") from None
    if kind == ".csv":
        yield from _grouped(_csv_rows(path))
    elif kind == ".json" and (head[:1] == b"[" or (head[:1] == b"{" and not _is_lines(head))):
        yield from _grouped(_json_rows(path))
    else:
        yield from _blocks(path)


def _is_lines(head: bytes) -> bool:
    """Whether a file that starts so is JSON Lines: its first line is JSON and not a document."""
    first, _, rest = head.partition(b"\n")
    if rest.strip():
        return not isinstance(_parse(first), Bad)
    return not _members(head.decode("utf-8", "replace"), 0)[1]


def _grouped(rows: Iterator[tuple[int, Any]]) -> Iterator[Batch]:
    while batch := list(islice(rows, ROWS_A_BATCH)):
        yield Batch(batch[0][0], rows=batch)


def _blocks(path: Path) -> Iterator[Batch]:
    line, kept, bad = 1, [b""], ""
    try:
        for data in _pieces(path, BLOCK_BYTES):
            if line == 1 and kept == [b""]:
                data = data.removeprefix(BOM)
            if cut := data.rfind(b"\n") + 1:
                block = b"".join(kept) + data[:cut]
                yield Batch(line, block)
                line, kept = line + block.count(b"\n"), []
            kept.append(data[cut:])
    except OSError as error:
        bad = str(error)[:200]
    rest = b"".join(kept)
    if bad:
        yield Batch(line, rows=[(line, Bad("truncated_file", bad, rest))])
    elif rest:
        yield Batch(line, rest)


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


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines, but not one in which a file breaks off; then `_END` and how it breaks, if it does."""
    bad = ""
    for batch in _blocks(path):
        # Bytes that are no UTF-8 become lone surrogates.
        yield from io.TextIOWrapper(io.BytesIO(batch.block), "utf-8", "surrogateescape", "")
        bad = "".join(row.detail for _, row in batch.rows)
    yield _END + bad


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows by the header's names. A quotation that is not closed within `BLOCK_BYTES` characters
    is one `Bad`, and the next line a row again."""
    csv.field_size_limit(BLOCK_BYTES)
    reader = csv.reader(_csv_lines(path))
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
            whole = not _LONE.search(text)
            yield line, dict(zip(header, cells, strict=True)) if whole else Bad("not_utf8", "", raw)
    if text != _END:
        bad = text.partition(_END)[2] or "a quotation is not closed"
        yield line, Bad("truncated_file", bad, text.encode("utf-8", "replace"))


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of arrays and of documents' lists, and what stands beside them, streamed.

    The line is the element's number, from 1. What cannot be read is one `Bad`, see `_behind`.
    """
    constants: list[str] = []  # NaN is the fault of one element, whose end is known
    decoder = json.JSONDecoder(parse_constant=constants.append)
    text = codecs.iterdecode(_pieces(path, WINDOW), "utf-8-sig", "surrogateescape")
    # The first element begins a line as those behind it do.
    buffer, at, number, wanted, bad = "\n", 0, 0, WINDOW, ""
    inside, document, more = False, False, True
    while True:
        if more and len(buffer) - at < wanted:
            parts = [buffer[at:]]
            try:
                parts += islice(text, wanted // WINDOW)
            except OSError as error:  # what came before it stands in `parts`
                bad = str(error)[:200]
            more, buffer, at = len(parts) > wanted // WINDOW and not bad, "".join(parts), 0
        start = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
        sign = buffer[start : start + 1]
        if not sign:
            at = start
            if not more:
                break
            continue
        if sign == "]" or (not inside and (sign == "[" or (document and sign == "}"))):
            inside, at = sign == "[", start + 1
            continue
        if not inside and (document or (sign == "{" and not number)):
            end, inside = _members(buffer, start)
            if inside or (sign == '"' and end > start):
                document, at = True, end
                continue
        constants.clear()
        try:
            row, end = decoder.raw_decode(buffer, start)
            cut = end == len(buffer)
        except (ValueError, RecursionError) as error:
            row, end = None, -1
            cut = getattr(error, "pos", 0) > len(buffer) - 16 or "Unterminated" in str(error)
        if cut and more and len(buffer) < LONGEST:
            wanted = max(2 * len(buffer), WINDOW)  # a piece at least, or nothing would end
            continue
        wanted, whole = WINDOW, end > 0 and not constants
        if end < 0 and (end := len(buffer) if cut and more else _behind(buffer, at, start)) < 0:
            if not more:
                break
            end = len(buffer)
        written = buffer[start:end].encode("utf-8", "surrogateescape")
        number += 1
        if whole and (written.isascii() or not _LONE.search(buffer, start, end)):
            at = end
            yield number, row
        else:
            buffer, at = buffer[end:], 0  # the next error counts the lines before its place
            yield number, _parse(written)
    if inside or bad or buffer[at:].strip():
        bad = bad or f"what follows {number} elements cannot be read to the end"
        rest = buffer[at : at + 1000].encode("utf-8", "surrogateescape")
        yield number + 1, Bad("truncated_file", bad, rest)


def _members(buffer: str, at: int) -> tuple[int, bool]:
    """Place behind the `[` of a document's next list, and True; behind its last member, and False.

    An object with a column of a row before any list is that row: its list may be its messages.
    """
    while found := _MEMBER.match(buffer, at):
        if found[1] in _COLUMNS:
            break
        if found[2]:
            return found.end(), True
        try:
            _, at = json.JSONDecoder().raw_decode(buffer, found.end())
        except (ValueError, RecursionError):
            break
    return at, False


def _behind(buffer: str, at: int, start: int) -> int:
    """Where a broken element ends that begins at `start`, behind white space from `at`, or -1.

    That is where its brackets close (outside strings), or at the comma where it has none; where
    they do not close, before the next line that begins as the element's own did, with `{` behind
    the same indentation; without such a line, before the next object that follows a comma. At most
    `WINDOW` characters are looked at, so that rubbish costs time in proportion to its length.
    """
    lead, stop = buffer[at:start], min(len(buffer), start + WINDOW)
    line = buffer.find(lead[lead.rindex("\n") :] + "{", start, stop) if "\n" in lead else -1
    awaited: list[str] = []
    for token in _BRACKETS.finditer(buffer, start, stop if line < 0 else line):
        sign = token[0]
        if sign in "{[":
            if not awaited and token.start() > start:
                return token.start()
            awaited.append("}" if sign == "{" else "]")
            if len(awaited) > DEEPEST:
                break
        elif sign in "}]" and awaited:
            if awaited.pop() != sign:
                break
            if not awaited:
                return token.end()
        elif sign in ",]" and not awaited:
            return max(token.start(), start + 1)
    if line < 0 and (found := _NEXT.search(buffer, start + 1, stop)):
        return found.start()
    return line


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
