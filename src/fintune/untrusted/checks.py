"""What all checks share: reading files of a folder within bounds, and the report.

Only regular files are opened, never through a symbolic link, and read up to a size limit. JSON is
parsed with bounded depth and without duplicate keys, a safetensors header by safetensors itself.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic_core import from_json
from safetensors import safe_open

from fintune.console import printable, some
from fintune.errors import FintuneError, GateRefused
from fintune.files import read_toml

ADAPTER = "adapter_model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
CONFIG = "training_config.json"
FIXTURE = "prompt_fixture.json"
JUDGED = "eval_50_gpt_judged_raw.jsonl"
PROVENANCE = "provenance"
RESULTS = "test_results.json"
SUMS = "SHA256SUMS"
REPORT = "report.html"
RISK = "model_risk.md"
SETTINGS = "fintune.yaml"
TEMPLATE = "chat_template.jinja"
TRAINING_ARGS = "training_args.bin"
HUB_FILES = {".gitattributes", ".cache"}
"""What the hub makes in every repository, and its client beside a download."""
LIMITS: dict[str, Any] = read_toml(__file__, "limits.toml")
_ENTRIES = 10_000
_SMALL = 2**20
"""Largest text file in bytes, where limits.toml does not name it."""


class Unreadable(GateRefused):
    """A file that may not be opened or has another content than its name says."""


class Note(str):
    """The detail of a check with status `note`: something that is not required."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check of a folder; a `note` informs and never refuses the folder."""

    name: str
    status: Literal["ok", "failed", "note"]
    detail: str


@dataclass(slots=True)
class Report:
    """Every check of one folder, in the order they ran."""

    folder: Path
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """The checks that refuse the folder."""
        return [check for check in self.checks if check.status == "failed"]

    def run(self, stage: Callable[[], Iterable[Check]]) -> None:
        """Add a stage's checks up to the first refusal, unless an earlier stage failed."""
        for check in [] if self.failed else stage():
            # Details contain names of files; a line break in one could imitate another row.
            line = printable(check.detail).replace("\n", "\\n").replace("\t", "\\t")
            self.checks.append(replace(check, detail=line))
            if self.failed:
                break

    def settle(self) -> None:
        """Raise GateRefused with every failed check, if there is one."""
        failed = "; ".join(f"{check.name}: {check.detail}" for check in self.failed)
        if self.failed and self.failed[0].name == "server":
            raise GateRefused(
                f"{self.folder.name} is verified, its server is not: {failed}",
                why="another prompt or another model gets other answers than were evaluated",
            )
        if self.failed and self.failed[0].name == "verdict":
            raise GateRefused(
                f"{self.folder.name} is what it says, but {self.failed[0].detail}",
                why="the figures do not show that its adapter is better than the base",
                fix="see README.md there; without --require its verdict decides nothing here",
            )
        if failed:
            fix = "download it again; a release made here: fintune release"
            raise GateRefused(f"{self.folder.name} is refused: {failed}", fix=fix)


def ask(name: str, question: Callable[..., str], *about: Any) -> Check:
    """Run one check.

    Args:
        name: of the check.
        question: returns the detail (a `Note`: status `note`) or raises, which is status `failed`.
        about: arguments of `question`.
    """
    try:
        answer = question(*about)
    except FintuneError as error:
        return Check(name, "failed", error.what)
    except Exception as error:  # whatever a library raises for bytes that it cannot read
        return Check(name, "failed", f"{type(error).__name__}: {str(error)[:200]}")
    return Check(name, "note" if isinstance(answer, Note) else "ok", answer)


def refuse(what: str, names: Collection[str]) -> None:
    """Raise Unreadable where `names` is not empty; the message has the first three."""
    if names:
        raise Unreadable(f"{what} {some(names)}")


def entries(folder: Path) -> list[Path]:
    """What a folder holds, at most 10,000 by name, without `HUB_FILES`, which are never opened."""
    return sorted(p for p in islice(folder.iterdir(), _ENTRIES) if p.name not in HUB_FILES)


def open_file(folder: Path, name: str) -> BufferedReader:
    """Open a regular file of a folder; symbolic links are not followed.

    Exception: a link from a snapshot of the hub's cache to the `blobs` folder of its repository, or
    on to the one of the cache, where the hub's client keeps what repositories share.

    Raises:
        Unreadable: absent, a link, a device, a FIFO, a folder, or not permitted.
    """
    path, snapshots = folder / name, folder.absolute().parent
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        real, places = path.resolve(), (snapshots.parent, snapshots.parent.parent)
        ours = any(real.is_relative_to((place / "blobs").resolve()) for place in places)
        if path.is_symlink() and snapshots.name == "snapshots" and ours:
            path = real
        handle = os.open(path, flags)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or "no file name"
        raise Unreadable(f"{name} cannot be opened: {reason}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unreadable(f"{name} is no regular file")
    return os.fdopen(handle, "rb")


def read_text(folder: Path, name: str) -> str:
    """A file's UTF-8 text within its bound (limits.toml). Raises Unreadable."""
    limit = LIMITS["bytes"].get(name, _SMALL)
    with open_file(folder, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Unreadable(f"{name} is larger than {limit:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable(f"{name} is not UTF-8") from None


def read_object(folder: Path, name: str, *, absent: bool = False) -> dict[str, Any]:
    """A JSON object of bounded depth that holds no key twice and no NaN.

    Args:
        absent: the file need not exist; it is then empty.

    Raises:
        Unreadable: with what is wrong.
    """
    if absent and not os.path.lexists(folder / name):
        return {}
    text = read_text(folder, name)
    try:
        from_json(text, allow_inf_nan=False)  # no NaN, and nested no deeper than 200
        tree = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise Unreadable(f"{name} is not JSON: {str(error)[:100]}") from None
    if not isinstance(tree, dict):
        raise Unreadable(f"{name} is no JSON object")
    return tree


def read_header(folder: Path, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor of a safetensors file, in the order of their bytes.

    safetensors itself refuses unknown types, sizes that do not fit, gaps and overlaps.

    Raises:
        Unreadable: no regular file. SafetensorError: no safetensors.
    """
    open_file(folder, name).close()
    with safe_open(folder / name, "np") as file:
        slices = {key: file.get_slice(key) for key in file.offset_keys()}
        return {key: (each.get_dtype(), (*each.get_shape(),)) for key, each in slices.items()}


def sha256_of(folder: Path, name: str) -> str:
    """Hex sha256 of a regular file of a folder. Raises Unreadable."""
    with open_file(folder, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of json: refuse duplicate keys, of which parsers take different ones."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("duplicate key")
    return tree
