"""Where rows come from: a file, a folder, a glob or a data set of the hub, and which files of it.

The layout of a data set is read in one way from a folder (a clone) and from the hub: the
configurations in its README.md, else the names of its files and folders, else every data file.
"""

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from fintune import sample
from fintune.config import DataConfig, SourceConfig
from fintune.console import say, some
from fintune.errors import ConfigError, DataError
from fintune.files import sha256_file
from fintune.formats import ENDINGS, ROWS_A_BATCH, Row, check_head, file_rows, format_of, parse
from fintune.hub import COMMIT, Repository, resolve
from fintune.yaml_reader import read_yaml

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Word in the name of a file or folder -> the split it stands for, as on the hub."""
_SHARD = re.compile(r"(?:.*/)?data/([^/]+)-\d{5}-of-\d{5}[^/]*")
_CONVERTED = re.compile(r"[^/]+/[^/]+/\d{4}\.parquet")
"""CONFIGURATION/SPLIT/0000.parquet: the hub's own conversion, revision refs/convert/parquet."""
_NO_ROWS = re.compile(r"(dataset_infos?|dataset_dict|state|config)\.json")
"""What `save_to_disk` and the hub keep beside rows."""
LICENCE = re.compile(r"""(?m)^license:\s*(?:-\s+)?["']?([\w.+-]+)""")
_NAMES_SHOWN = 5
_MOST_FOLDERS = 100
"""In a card's pattern; `_fits` calls itself for each."""

Known = dict[tuple[str, str | None], Repository | str]
"""Hub id and revision of the config -> the commit that an earlier start used, or the repository
that this one resolved: every name is resolved once."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or a data set of the hub.

    `name` stands in the ledger and in `train.parquet`; it is the hub id, or the path below the
    configured folder, or below a glob's part without wildcards, so that prepared data does not
    depend on where the rows lay. `identity` is what the manifest records: a file's sha256 or a data
    set's commit. Files of the hub have no `paths` before they are `fetched`.
    """

    name: str
    identity: str
    config: SourceConfig
    paths: tuple[Path, ...] = ()
    repository: Repository | None = None

    def fetched(self) -> "Source":
        """The source with its files on this machine.

        Raises:
            DataError: no such configuration or split, no data file, or the hub refuses.
            NoSpace: too little disk.
        """
        if self.repository is None or self.paths:
            return self
        files = [*self.repository.files()]
        folder = self.repository.fetch([CARD])
        chosen = choose(files, folder, self.config, self.repository.setting)
        self.repository.fetch([glob.escape(name) for name in chosen])
        for name in chosen:
            check_head(folder / name, self.config.encoding)
        return replace(self, paths=tuple(folder / name for name in chosen))

    def licence(self) -> str | None:
        """The configured one, else what the card of a fetched data set of the hub names."""
        card = self.repository.folder / CARD if self.repository else None
        text = card.read_text("utf-8", "replace") if card and card.is_file() else ""
        match = LICENCE.search(text.partition("\n---")[0])
        return self.config.licence or (match and match[1])

    def rows(self) -> Iterator[Row]:
        """All rows in order, those of JSON Lines not parsed yet; lines count on from file to file.

        Raises:
            DataError: a file is no data of its format, or as `fetched`.
        """
        line = 0
        for path in self.fetched().paths:
            before = line
            for at, row in file_rows(path, self.config.encoding):
                line = before + at
                yield line, row

    def batches(self) -> Iterator[list[Row]]:
        """All rows, `ROWS_A_BATCH` at a time.

        Raises:
            DataError: as `rows`, or none of the first rows has a column that the config names.
        """
        rows, there = self.rows(), set[str]()
        while batch := list(islice(rows, ROWS_A_BATCH)):
            if self.config.columns and not there:
                parsed = [row for _, raw in batch if isinstance(row := parse(raw), dict)]
                there = {str(name) for row in parsed for name in row}
                if there and (unknown := {*self.config.columns.values()} - there):
                    raise DataError(
                        f"{self.name} has no column {', '.join(sorted(unknown))}",
                        fix=f"its columns: {', '.join(sorted(there))}; name them under `columns`",
                    )
            yield batch


def find_sources(config: DataConfig, known: Known) -> list[Source]:
    """Every file and hub id of the config, ordered by name.

    Raises:
        ConfigError: no source is configured.
        DataError: a missing path, a folder or glob without data, a Git LFS pointer, no hub.
    """
    wanted = [SourceConfig(path=config.source)] if config.source else []
    if not wanted and not config.sources:
        raise ConfigError("data.source is empty", fix="name a file, a folder, a glob or a hub id")
    wanted = [
        item.model_copy(update={"encoding": item.encoding or config.encoding})
        for item in (*wanted, *config.sources)
    ]
    return named(wanted, "data.sources", known)


def rows_on_disk(config: DataConfig) -> int | None:
    """Rows of all sources; None where one of them is not on this machine."""
    paths = [item.path for item in config.sources] + [config.source] * bool(config.source)
    there = (path == sample.SAMPLE or glob.glob(os.path.expanduser(path)) for path in paths)
    if not paths or not all(there):
        return None
    return sum(1 for source in find_sources(config, {}) for _ in source.rows())


def named(wanted: list[SourceConfig], setting: str, known: Known) -> list[Source]:
    """Every file and hub id of these, ordered by name; of equal names later ones get a number."""
    sources = [source for item in wanted for source in locate(item, setting, known)]
    sources.sort(key=lambda source: (source.name, source.identity))
    seen: Counter[str] = Counter()
    for at, source in enumerate(sources):
        seen[source.name] += 1
        if (count := seen[source.name]) > 1:
            sources[at] = replace(source, name=f"{source.name}#{count}")
    return sources


def locate(item: SourceConfig, setting: str, known: Known) -> list[Source]:
    """The files of one configured source, or the hub's data set that it names.

    Args:
        setting: the config key, for messages.
        known: commits that are kept; gets the ones that are resolved now.
    """
    made_up = item.path == sample.SAMPLE
    path = sample.rows_path() if made_up else Path(item.path).expanduser()
    if path.is_file():
        return [_local(path, path.name, item)]
    if path.is_dir():
        entries = glob.glob("**/*", root_dir=path, recursive=True)  # hidden ones are left out
        names = [PurePath(name).as_posix() for name in entries if (path / name).is_file()]
        return [_local(path / name, name, item) for name in choose(names, path, item, setting)]
    if glob.has_magic(item.path):
        root = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        paths = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not (data := [each for each in paths if format_of(each.name) and each.is_file()]):
            raise DataError(f"{item.path} holds no data file", fix=ENDINGS)
        return [_local(each, each.relative_to(root).as_posix(), item) for each in data]
    if not HUB_ID.fullmatch(item.path) or format_of(item.path):
        raise DataError(f"no file or folder at {item.path}", fix=f"check {setting}")
    key = (item.path, item.revision)
    if not isinstance(repository := known.get(key), Repository):
        repository = resolve("dataset", *key, setting=setting, recorded=repository)
        known[key] = repository
    return [Source(item.path, repository.commit, item, repository=repository)]


def _local(path: Path, name: str, item: SourceConfig) -> Source:
    check_head(path, item.encoding)
    return Source(name, sha256_file(path), item, (path,))


def recorded_commits(*tables: dict[str, Any]) -> Known:
    """The commits of hub ids in the inputs of seals: their tables of sources, benchmarks, tasks."""
    return {
        (old.get("path", name.partition("#")[0]), old.get("revision")): str(old["identity"])
        for table in tables
        for name, old in table.items()
        if isinstance(old, dict) and COMMIT.fullmatch(str(old.get("identity")))
    }


# ---- the layout of a data set --------------------------------------------------------------------


def choose(names: list[str], folder: Path, item: SourceConfig, setting: str) -> list[str]:
    """The names of a data set's files that its configuration and split consist of, in order.

    Args:
        names: of all files, relative to the data set's root.
        folder: where its README.md lies, if it has one.
        setting: the config key, for messages.

    Raises:
        DataError: no such configuration or split (those that are there are named), no data file.
    """
    names = sorted(name for name in names if not re.search(r"(^|/)([.]|__)", name))
    data = [n for n in names if format_of(n) and not _NO_ROWS.fullmatch(PurePath(n).name)]
    if not data and (scripts := [name for name in names if name.endswith(".py")]):
        what = f"{item.path} consists of a loading script ({scripts[0]}), which is never run"
        raise DataError(what, fix="try revision refs/convert/parquet, the hub's copy of its rows")
    subset, entry = _configuration(data, folder, item, setting)
    splits = {split: each for split, each in _splits(data, entry).items() if each}
    if not splits:
        raise DataError(f"{item.path}{subset} holds no data file", fix=ENDINGS)
    split = item.split or ("test" if "train" in splits else None)
    if "train" not in splits and "" in splits:
        splits["train"] = splits.pop("")
    if split is None:
        chosen = sorted({name for each in splits.values() for name in each})
    elif not (chosen := splits.get(split) or splits.get(KEYWORDS.get(split, split), [])):
        raise _absent(f"no split {split}", "split", [*splits], item, setting)
    left = [name for name in names if name not in chosen and name not in (CARD, "LICENSE")]
    apart = f"; left out: {some(left, _NAMES_SHOWN)}" if left else ""
    say(f"{item.path}{subset}, {split or 'every'} split: {some(chosen, _NAMES_SHOWN)}{apart}")
    return chosen


def _absent(what: str, key: str, there: list[str], item: SourceConfig, setting: str) -> DataError:
    fix = f"choose by {setting}.{key}: {{path: {item.path}, {key}: {there[0]}}}"
    return DataError(f"{item.path} has {what}; there are: {some(there, _NAMES_SHOWN)}", fix=fix)


def _configuration(
    data: list[str], folder: Path, item: SourceConfig, setting: str
) -> tuple[str, dict[str, Any]]:
    """The chosen configuration: its name for messages, and what the card says of it.

    Where the card has none, the folders at the top are the configurations, for one who asks.
    """
    card = folder / CARD
    text = card.read_text("utf-8-sig", "replace") if card.is_file() else ""
    # That key alone: the card of a large data set has thousands of other values.
    front = re.match(r"---\s*\n(.*?\n)---(\s|\Z)", text, re.DOTALL)
    block = re.search(r"(?ms)^configs:\s.*?(?=^\w|\Z)", front[1]) if front else None
    listed = read_yaml(block[0], f"{item.path}/{CARD}")["configs"] if block else None
    entries = [each for each in listed or [] if isinstance(each, dict)]
    configs = {str(each.get("config_name", "default")): each for each in entries}
    if not configs and (item.subset or all(map(_CONVERTED.fullmatch, data))):
        configs = {
            top: {"data_dir": top} for name in data if (top := name.partition("/")[0]) != name
        }
    configs = configs or {"default": {}}
    main = [
        n for n, e in configs.items() if n == "default" or str(e.get("default")).lower() == "true"
    ]
    main = [item.subset] if item.subset else main or [*configs]
    if len(main) > 1 or main[0] not in configs:
        lacks = f"no configuration {item.subset}" if item.subset else "several configurations"
        raise _absent(lacks, "subset", [*configs], item, setting)
    return f" ({main[0]})" if len(configs) > 1 else "", configs[main[0]]


def _splits(data: list[str], entry: dict[str, Any]) -> dict[str, list[str]]:
    """Files by split, as a configuration of the card says it or their names; under "": none."""
    top = re.sub(r"^[./]+|/+$", "", str(entry.get("data_dir") or "."))
    top = top and f"{top}/"
    names = [name.removeprefix(top) for name in data if name.startswith(top)]
    splits, files = defaultdict[str, list[str]](list), entry.get("data_files")
    if not files:
        for name in [name for name in names if _SHARD.fullmatch(name)] or names:
            splits[_split_of(name)].append(top + name)
    for part in files if isinstance(files, list) else [files] if files else []:
        said = part if isinstance(part, dict) else {"split": "", "path": part}
        path = said.get("path")
        listed = path if isinstance(path, list) else [path]
        # Of brackets a card's [0-9] alone is a range; a file's name may hold others.
        texts = [re.sub(r"\[(?!0-9\])", "[[]", str(each)) for each in listed]
        parts = [each for t in texts if len(each := PurePath(t).parts) <= _MOST_FOLDERS]
        fits = [n for n in names for each in parts if _fits(PurePath(n).parts, each)]
        splits[str(said.get("split"))] += [top + name for name in dict.fromkeys(fits)]
    return splits


def _split_of(name: str) -> str:
    """The split that a file's path names: a shard's own, a folder's, the file's, or none."""
    if shard := _SHARD.fullmatch(name):
        return shard[1]
    words = re.split(r"[-._ 0-9/]+", name.lower())
    return next((KEYWORDS[word] for word in words if word in KEYWORDS), "")


@cache
def _fits(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the parts of a path fit a card's pattern: `**` stands for any number of folders.

    The rest is fnmatch's, part by part: one regular expression over the whole path would need
    hours for a hostile pattern such as `*x*x*x*x*x*x*`.
    """
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_fits(path[at:], pattern[1:]) for at in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])
