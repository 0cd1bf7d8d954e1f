"""What makes a stage's folder finished: `done.json`, written last.

It holds the size and sha256 of every file of the folder and the hashes of what the stage read.
A folder without it is unfinished and no later stage reads it. The same command again keeps a
finished stage whose inputs are unchanged, and refuses when they differ, naming them.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from fintune.console import warn
from fintune.errors import OutputError
from fintune.files import reaching, read_json, sha256_file, sha256_json, write_json

DONE = "done.json"
INPUTS = "inputs.json"
UNREAD = ("checkpoints/",)
"""Beginnings of names that only an unfinished run reads, under manifests of their own."""


class State(Enum):
    """What a stage's folder is before the stage starts."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


def seal(
    folder: Path,
    inputs: dict[str, Any],
    *,
    needed: Iterable[str] = (),
    accepted: Iterable[dict[str, Any]] = (),
) -> None:
    """Write `done.json`: every file with size and sha256, and the inputs' hashes. Call it last.

    Args:
        accepted: changes of the inputs while the stage ran.

    Raises:
        OutputError: a file that is `needed` is not there.
    """
    files = {name: _fact(path) for name, path in _files(folder).items()}
    if lacking := sorted({*needed} - files.keys()):
        raise OutputError(
            f"{folder} has lost {', '.join(lacking)} while it was written",
            fix="see to it that nothing else writes there, and run the same command again",
        )
    done = {"inputs": inputs, "inputs_sha256": sha256_json(inputs), "files": files}
    changes = [*accepted]
    write_json(folder / DONE, done | ({"accepted": changes} if changes else {}))


def read_seal(
    folder: Path,
    *,
    stage: str,
    make: str,
    needed: Iterable[str] = (),
    unread: tuple[str, ...] = UNREAD,
) -> dict[str, Any]:
    """Return a finished folder's `done.json`, after hashing every file that it names.

    Args:
        folder: the folder a later stage wants to read.
        stage: its name in the message, such as "prepared data".
        make: the command that makes it.
        needed: files that the caller reads.
        unread: beginnings of names that no caller reads: they may be changed or gone.

    Raises:
        OutputError: when the folder is absent, unfinished, its seal is damaged, or a file in it
            was changed, removed or added since. A hidden file that was added is passed over.
    """
    if not (folder / DONE).is_file():
        state = "is unfinished (no done.json)" if folder.is_dir() else "does not exist"
        raise OutputError(f"{stage}: {folder} {state}", fix=f"run: {make}")
    done, found = read_checked(folder / DONE), _files(folder)
    problems = []
    for name in sorted(done["files"].keys() | found.keys() | {*needed}):
        if name.startswith(unread):
            continue
        if name not in found:
            problems.append(f"{name} is missing")
        elif name not in done["files"]:
            if not found[name].name.startswith("."):
                problems.append(f"{name} was not there when it was finished")
        elif done["files"][name] != _fact(found[name]):
            problems.append(f"{name} was changed after it was finished")
    if problems:
        raise OutputError(
            f"{stage}: {folder}: {'; '.join(problems[:5])}",
            why="a later stage must read exactly what the earlier one wrote",
            fix=f"put the files back, or run: {make} --fresh (it moves the old folder aside)",
        )
    return done


def read_data(folder: Path) -> dict[str, Any]:
    """The seal of prepared data, which most stages read (see `read_seal`)."""
    needed = ("train.parquet", "validation.parquet", "manifest.json")
    return read_seal(folder, stage="prepared data", make="fintune prepare", needed=needed)


@contextmanager
def lock(folder: Path) -> Iterator[str]:
    """Be the only one that writes a folder, while the block runs.

    The lock is the kernel's and ends with its owner, however that one died, so none is ever stale.
    Its file stands beside the folder, which may be moved aside meanwhile.

    Yields:
        Who held it last and died, or an empty string.

    Raises:
        OutputError: another process holds it, or nothing can be written there.
    """
    path = folder.with_name(f".{folder.name}.lock")
    with reaching(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+", encoding="utf-8")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OutputError(
                f"{folder} is being written by {file.read() or 'another process'}",
                why="two runs in one folder would destroy each other's files",
                fix="wait for it, stop it (SIGTERM), or choose another folder: --set out=...",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                raise
            warn(f"{path.parent} has no locks: see to it that one run alone writes {folder.name}")
        file.seek(0)
        dead = file.read()
        file.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError):  # a full volume: the name is a courtesy, the lock is held
            file.write(f"process {os.getpid()} since {now}")
            file.flush()
        try:
            yield dead
        finally:
            file.truncate(0)


def state(folder: Path, inputs: dict[str, Any], *, command: str, also: str = "") -> State:
    """Say whether a stage has to run, may be skipped, or must be refused.

    Args:
        also: another way out than a fresh folder, for the message.

    Raises:
        OutputError: the folder holds the result of other inputs or files that are not ours, or
            is finished and a file of it changed since.
    """
    found_here = [path.name for path in folder.iterdir()] if folder.exists() else []
    # A kill inside the very first write leaves its temporary file, which is nothing yet.
    if all(name.startswith(f".{INPUTS}.") for name in found_here):
        return State.NEW
    for name, found in ((DONE, State.FINISHED), (INPUTS, State.UNFINISHED)):
        if (folder / name).is_file():
            differing = differences(read_checked(folder / name)["inputs"], inputs)
            if differing:
                raise OutputError(
                    f"{folder} holds the result of other inputs; these differ: "
                    + "; ".join(differing),
                    why="mixing two runs in one folder would make both unaccountable",
                    fix=f"choose another folder (--set out=...), or: {command} --fresh{also}",
                )
            if found is State.FINISHED:
                read_seal(folder, stage=command, make=command)
            return found
    raise OutputError(
        f"{folder} holds files that are not of this stage",
        fix=f"choose another folder (--set out=...), or: {command} --fresh (moves it aside)",
    )


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Name the dotted keys whose values differ, as `key: old -> new`, shortened."""
    rows: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            rows += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            rows.append(f"{prefix}{key}: {str(before)[:60]} -> {str(after)[:60]}")
    return rows


def start(folder: Path, inputs: dict[str, Any]) -> None:
    """Mark a folder that grows in place as begun, with what it reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f".{INPUTS}.*"):
        unfinished.unlink()
    if not (folder / INPUTS).is_file():
        write_json(folder / INPUTS, {"inputs": inputs})


def move_aside(folder: Path) -> Path | None:
    """Rename an existing folder to the first free `NAME.old-K`; nothing is deleted."""
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    shutil.move(folder, aside)
    return aside


def read_checked(path: Path) -> dict[str, Any]:
    """A `done.json` or `inputs.json` of the form in which they are written here.

    Raises:
        OutputError: it has another form, or `inputs` are not those of `inputs_sha256`.
    """
    try:
        tree = read_json(path)
        inputs, files = tree.get("inputs"), tree.setdefault("files", {})
        ours = isinstance(inputs, dict) and isinstance(files, dict)
        ours &= path.name == INPUTS or tree.get("inputs_sha256") == sha256_json(inputs)
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise OutputError(
            f"{path} was changed or damaged after it was written",
            why="it says what the folder was made from, and nothing else does",
            fix="put the file back, or make the folder again with --fresh (moves it aside)",
        )
    return tree


def _files(folder: Path) -> dict[str, Path]:
    """Every file below a folder but the seal itself, by its name in the seal."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != DONE)
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _fact(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
