"""Raw rows before anything is known of them: a file's bytes, blocks of lines, rows or `Bad`."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

PACKINGS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"
LONE = re.compile("[\udc80-\udcff]")  # what bytes that are no UTF-8 become


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


def pieces(path: Path, size: int) -> Iterator[bytes]:
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


def blocks(path: Path) -> Iterator[Batch]:
    """A file cut at line ends; where it breaks off, the last line is a `Bad`."""
    line, kept, bad = 1, [b""], ""
    try:
        for data in pieces(path, BLOCK_BYTES):
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
            yield line, parse(raw)


def parse(raw: bytes) -> Any:
    """One JSON value, or a `Bad` that says what is wrong with it."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return Bad("not_utf8", f"byte {error.start}", raw)
    except (ValueError, RecursionError) as error:
        return Bad("not_json", str(error)[:200], raw)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
