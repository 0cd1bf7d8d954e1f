"""Where rows come from: local files, globs and folders, or a hub id, as batches of raw rows."""

import glob
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fintune import nano
from fintune.config import DataConfig, SourceConfig
from fintune.data.readers import (
    FORMATS,
    PACKINGS,
    ROWS_A_BATCH,
    Batch,
    file_batches,
    format_of,
    grouped,
)
from fintune.errors import ConfigError, DataError
from fintune.files import sha256_file
from fintune.hub import hub_error

HEADS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "run: git lfs pull"),
    b"\x1f\x8b": ("packed with gzip", "add .gz to its name"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save it as CSV in UTF-8"),
    b"\xff\xfe": ("UTF-16", "save it as UTF-8"),
}
"""First bytes of what often stands under the name of a data file, what it is and what to do."""

_ENDINGS = f"data files end in one of {', '.join(FORMATS)}"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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
        return file_batches(self.path)

    def rows(self) -> Iterator[tuple[int, Any]]:
        """All rows with their lines, parsed; see `batches`."""
        for batch in self.batches():
            yield from batch.parsed()


def find_sources(config: DataConfig) -> list[Source]:
    """Every file and hub id of the config, ordered by name.

    Raises:
        ConfigError: no source is configured.
        DataError: a missing path, a folder or glob without data, a Git LFS pointer, no hub.
    """
    wanted = [SourceConfig(path=config.source)] if config.source else []
    if not wanted and not config.sources:
        raise ConfigError("data.source is empty", fix="name a file, a folder, a glob or a hub id")
    return named([*wanted, *config.sources])


def named(wanted: list[SourceConfig]) -> list[Source]:
    """Every file and hub id of these, ordered by name; of equal names later ones get a number."""
    found = [source for item in wanted for source in locate(item)]
    found.sort(key=lambda source: (source.name, source.identity))
    seen: Counter[str] = Counter()
    for at, source in enumerate(found):
        seen[source.name] += 1
        if (count := seen[source.name]) > 1:
            found[at] = replace(source, name=f"{source.name}#{count}")
    return found


def locate(item: SourceConfig) -> list[Source]:
    """The files of one configured source, or the hub data set it names."""
    # The bundled sample rows go by the bundled base's name.
    path = nano.rows_path() if item.path == nano.NANO_ID else Path(item.path).expanduser()
    if path.is_file():
        return [_local(path, path.name, item)]
    if path.is_dir():
        root, pattern = path, "**/*"  # hidden files and folders are left out
    elif glob.has_magic(item.path):
        root = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        pattern = str(path.relative_to(root))
    elif _HUB_ID.fullmatch(item.path) and format_of(path) is None:
        return [Source(item.path, _hub_commit(item), item, None)]
    else:
        raise DataError(f"no file or folder at {item.path}", fix="check data.source")
    found = sorted(root / name for name in glob.glob(pattern, root_dir=root, recursive=True))
    files = [file for file in found if format_of(file) and file.is_file()]
    if not files:
        raise DataError(f"{item.path} holds no data file", fix=_ENDINGS)
    return [_local(file, file.relative_to(root).as_posix(), item) for file in files]


def _local(path: Path, name: str, item: SourceConfig) -> Source:
    if format_of(path) is None:
        raise DataError(f"{path}: no known data format", fix=_ENDINGS)
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise DataError(f"{path} is empty", fix="check how it was made or downloaded")
    for start, (what, fix) in HEADS.items():
        if head.startswith(start) and path.suffix not in PACKINGS:
            raise DataError(f"{path} is {what}", fix=fix)
    return Source(name, sha256_file(path), item, path)


def _hub_commit(item: SourceConfig) -> str:
    """The commit that a hub id means now; a pinned full commit needs no network."""
    if item.revision and re.fullmatch(r"[0-9a-f]{40}", item.revision):
        return item.revision
    import huggingface_hub

    try:
        return str(huggingface_hub.dataset_info(item.path, revision=item.revision).sha)
    except Exception as error:
        raise hub_error(error, item.path, setting="data.source", revision=item.revision) from None


def _hub_batches(item: SourceConfig, commit: str) -> Iterator[Batch]:
    import datasets

    try:
        rows = datasets.load_dataset(item.path, revision=commit, split=item.split)
    except Exception as error:
        raise hub_error(error, item.path, setting="data.source", revision=commit) from None
    tables = rows.with_format("arrow").iter(ROWS_A_BATCH)
    yield from grouped(enumerate((row for table in tables for row in table.to_pylist()), 1))
