"""Files on disk: atomic writes, JSON and JSON Lines, hashes, folders that appear whole or never.

Nothing here is half-written under its final name: a file is written beside its place, synced and
renamed. JSON never contains NaN (`allow_nan=False`), because `NaN` is not JSON and hides failures.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fintune.errors import NoSpace, OutputError

FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = (*(f"os error {code}" for code in FULL), "unexpected pos", "iostream error")
"""How safetensors (Rust) and torch's zip writer say it, which raise no OSError."""
_FREE = "what was saved before is intact: free some space; the same command continues"
SMALL_FILES = 2**20
"""Bytes to have free besides large files: JSON, a line of metrics, blocks of the file system."""
FORMAT = 1
"""Version of every JSON file written here."""


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Our folder in the user's cache directory, whether or not it is there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fintune"


def same_file(path: Path) -> str:
    """Path, inode, size and times of a file that was not changed since it was last described.

    The time of the inode is one: a program can set the time of the content back, that one not.
    """
    facts = path.stat()
    times = (facts.st_mtime_ns, facts.st_ctime_ns)
    return f"{path.resolve()} {facts.st_ino} {facts.st_size} {times}"


def cached_sha256(path: Path) -> str:
    """Hex sha256 of a large file that seldom changes, kept in the user's cache directory; it counts
    for the same file alone."""
    cache = cache_dir() / sha256_bytes(same_file(path).encode())
    with contextlib.suppress(OSError):
        return cache.read_text()
    digest = sha256_file(path)
    with contextlib.suppress(OSError):  # it only saves time
        write_text(cache, digest)
    return digest


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces. Used wherever JSON is hashed."""
    return json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )


def sha256_json(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON. A lone surrogate is hashed as its escape."""
    return sha256_bytes(canonical_json(value).encode("utf-8", "backslashreplace"))


def _sync(path: Path) -> None:
    """fsync a file, or the renames inside a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: a temporary name beside it, fsync, rename, folder fsync.

    Its mode is what the umask leaves of 0666: what is written may hold rows of the user.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a read-only volume refuses this too
            temporary.unlink()
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole (see `write_bytes`)."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as readable JSON with its format number. Raises ValueError on NaN."""
    write_text(path, json_text(value))


def json_text(value: dict[str, Any]) -> str:
    """What `write_json` writes, byte for byte. Raises ValueError on NaN."""
    tree = {"format": FORMAT, **value}
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read an object written by `write_json`. Raises OSError or ValueError."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not an object")
    return value


def read_toml(module: str, name: str) -> dict[str, Any]:
    """The tables that lie beside a module, named by its `__file__`."""
    return tomllib.loads(Path(module).with_name(name).read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines whole (see `write_bytes`); meant for files that fit in memory."""
    write_text(path, "".join(map(json_line, rows)))


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file that we wrote; blank lines are skipped."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


class JsonlLog(contextlib.AbstractContextManager["JsonlLog"]):
    """An append-only JSON Lines file of whoever holds its folder's lock (`seal.lock`).

    A line that a kill or a full disk left torn is cut off when it is opened again. A row is with
    the kernel when `append` returns, on disk when the block ends.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._file = path, path.open("ab")
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def rows(self) -> list[dict[str, Any]]:
        """Everything written so far."""
        return list(read_jsonl(self.path))

    def append(self, *rows: dict[str, Any]) -> None:
        """Write rows, one line each. Raises ValueError on NaN."""
        self._file.write("".join(map(json_line, rows)).encode("utf-8", "backslashreplace"))
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file)
        self._file.close()


def copy_file(source: Path, target: Path) -> None:
    """Copy content (never mode or times) through `write_bytes`."""
    write_bytes(target, source.read_bytes())


@contextlib.contextmanager
def reaching(folder: Path, fix: str = "choose another folder: --set out=...") -> Iterator[None]:
    """Raise OutputError where a folder's place cannot be written, NoSpace on a full volume."""
    try:
        with space_for(folder):
            yield
    except OSError as error:
        what = f"{folder} cannot be written: {error.strerror}"
        raise OutputError(what, fix=fix) from None


@contextlib.contextmanager
def staged_folder(
    final: Path, *, published: bool = False, free: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """Build a folder beside its place and rename it into a free name when the block succeeds.

    On any exception the staging folder is removed and `final` is as it was. The caller holds the
    lock of `final`, so what a killed build left under the one staging name can be removed first.

    Args:
        published: for others to read: modes 0755 and 0644; else what the umask leaves.
        free: called when the new folder is complete, to take an existing `final` away.
    """
    staging = final.with_name(f".staging-{final.name}")
    with reaching(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    try:
        yield staging
        if published:
            staging.chmod(0o755)
        mode = staging.stat().st_mode & 0o666  # safetensors writes 0600 under any umask
        for path in [*staging.rglob("*"), staging]:
            if path.is_file():
                path.chmod(mode)
            _sync(path)
        free()
        os.rename(staging, final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def free_bytes(path: Path) -> int:
    """Free bytes of the volume that would hold `path`, whether or not it exists yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free_space(folder: Path, needed: int, fix: str = _FREE) -> None:
    """Raise NoSpace where fewer than `needed` bytes are free on the volume of a folder."""
    if (free := free_bytes(folder)) < needed:
        what = f"{folder}: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        raise NoSpace(what, fix=fix)


@contextlib.contextmanager
def space_for(folder: Path) -> Iterator[None]:
    """Raise NoSpace where the volume of a folder becomes full inside the block."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if full or any(word in str(error) for word in _FULL_WORDS):
            raise NoSpace(f"no space left on the volume of {folder}", fix=_FREE) from error
        raise
