"""Where rows come from: local files, globs and folders, or a hub id, as batches of raw rows."""

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fintune import nano
from fintune.config import DataConfig, SourceConfig
from fintune.data.formats import FORMATS, ROWS_A_BATCH, file_batches, format_of
from fintune.data.raw import PACKINGS, Batch
from fintune.errors import ConfigError, DataError
from fintune.files import sha256_file

HEADS: dict[tuple[bytes, ...], tuple[str, str]] = {
    (b"version https://git-lfs",): ("a Git LFS pointer, not the data", "run: git lfs pull"),
    (b"\x1f\x8b",): ("packed with gzip", "add .gz to its name"),
    (b"\x28\xb5\x2f\xfd",): ("packed with zstd", "add .zst to its name"),
    (b"PK\x03\x04",): ("a zip archive or a spreadsheet", "unpack it, or save it as CSV in UTF-8"),
    (b"\xff\xfe", b"\xfe\xff"): ("UTF-16", "save it as UTF-8"),
    (b"<!", b"<html"): ("a web page", "download the file itself"),
}
"""First bytes of what often stands under the name of a data file, what it is and what to do."""

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
        whole = [file for folder in found if format_of(folder) for file in _below(folder)]
        files = sorted({*whole, *(file for file in found if not file.is_dir())})
        if not files:
            raise DataError(f"no file matches {item.path}", fix="check the pattern")
        fixed = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        return [_local(file, file.relative_to(fixed).as_posix(), item) for file in files]
    if _HUB_ID.fullmatch(item.path) and format_of(path) is None:
        return [Source(item.path, _hub_commit(item), item, None)]
    raise DataError(f"no file or folder at {item.path}", fix="check data.source")


def _below(folder: Path) -> list[Path]:
    """Files of data at any depth, hidden files and folders left out; none below a file."""
    found = (folder / name for name in glob.glob("**/*", root_dir=folder, recursive=True))
    return sorted(file for file in found if format_of(file) and not file.is_dir())


def _local(path: Path, name: str, item: SourceConfig) -> Source:
    if format_of(path) is None:
        raise DataError(
            f"{path}: no known data format", fix=f"it must end in one of {', '.join(FORMATS)}"
        )
    if not path.is_file() or path.name.endswith((".parquet.gz", ".parquet.zst")):
        raise DataError(f"{path} is no file, or packed Parquet", fix="unpack, mend or remove it")
    with path.open("rb") as file:
        head = file.read(64)
    for starts, (what, fix) in HEADS.items():
        if head.startswith(starts) and what != f"packed with {PACKINGS.get(path.suffix)}":
            raise DataError(f"{path} is {what}", fix=fix)
    if not head:
        raise DataError(f"{path} is empty", fix="check how it was made or downloaded")
    return Source(name, sha256_file(path), item, path)


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
