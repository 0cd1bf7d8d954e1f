"""What makes a stage's folder finished: `done.json`, written last.

It holds the size and sha256 of every file of the folder and the hashes of what the stage read.
A folder without it is unfinished and no later stage reads it. The same command again keeps a
finished stage whose inputs are unchanged, and refuses when they differ, naming them.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from itertools import count
from pathlib import Path
from typing import Any

from fintune.console import warn
from fintune.errors import OutputError
from fintune.files import reaching, read_json, sha256_file, sha256_json, space_for, write_json
from fintune.stop import STOP

DONE = "done.json"
INPUTS = "inputs.json"
EVALUATIONS = "evaluations.jsonl"
"""Beside prepared data: a line for each evaluation of them."""
JUDGINGS = "judgings"
"""In an evaluation: a folder with a seal of its own for each judge."""
FORMS = "forms"
"""In an evaluation: a folder with a seal of its own for each form that its adapter is served in."""
UNREAD = ("checkpoints/", f"{JUDGINGS}/", f"{FORMS}/", "judge_calls.jsonl", EVALUATIONS)
"""Beginnings of names that are not read with a folder: checkpoints, judgings and forms have a seal
each, and the logs grow when their stage is finished."""
HOLDER = "process "
"""Beginning of a lock file's content."""
_ELSEWHERE = "choose another folder: --set out=..."


def seal(folder: Path, inputs: dict[str, Any], **more: Any) -> None:
    """Write `done.json`: every file with size and sha256, and the inputs' hashes. Call it last.

    Args:
        more: further keys, such as the changes of the inputs that were accepted meanwhile.
    """
    done = {"inputs": inputs, "inputs_sha256": sha256_json(inputs), "files": manifest(folder)}
    write_json(folder / DONE, {**done, **more})


def manifest(folder: Path, unread: tuple[str, ...] = ()) -> dict[str, Any]:
    """`bytes` and `sha256` of every file but hidden ones, the seal and what is not read."""
    facts = {}
    for path in sorted(folder.rglob("[!.]*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != DONE and not name.startswith(unread):
            facts[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return facts


def read_seal(
    folder: Path, *, stage: str, make: str, needed: Iterable[str] = (), unread: Iterable[str] = ()
) -> dict[str, Any]:
    """Return a finished folder's `done.json`, after hashing every file that it names.

    Args:
        folder: the folder a later stage wants to read.
        stage: its name in the message, such as "prepared data".
        make: the command that makes it.
        needed: files that the caller reads.
        unread: beginnings of more names that the caller does not read: changed or gone.

    Raises:
        OutputError: when the folder is absent, unfinished, its seal is damaged, or a file in it
            was changed, removed or added since. A hidden file that was added is passed over.
    """
    if not (folder / DONE).is_file():
        state = "is unfinished (no done.json)" if folder.is_dir() else "does not exist"
        raise OutputError(f"{stage}: {folder} {state}", fix=f"run: {make}")
    done, passed = read_checked(folder / DONE), (*UNREAD, *unread)
    present = manifest(folder, passed)
    listed = {name: fact for name, fact in done["files"].items() if not name.startswith(passed)}
    problems = [f"{name} is missing" for name in sorted({*listed, *needed} - present.keys())]
    for name, fact in present.items():
        if name not in listed:
            problems.append(f"{name} was not there when it was finished")
        elif listed[name] != fact:
            problems.append(f"{name} was changed after it was finished")
    if problems:
        fix = f"put the files back, or run: {make} --fresh (it moves the old folder aside)"
        raise OutputError(f"{stage}: {folder}: {'; '.join(problems[:5])}", fix=fix)
    return done


def read_data(folder: Path) -> dict[str, Any]:
    """The seal of prepared data, which most stages read (see `read_seal`)."""
    needed = ("train.parquet", "validation.parquet", "test.parquet", "manifest.json")
    return read_seal(folder, stage="prepared data", make="fintune prepare", needed=needed)


def check_place(folder: Path) -> None:
    """Refuse a folder that no stage may own: it is written as a whole and renamed by `--fresh`.

    Raises:
        OutputError: a symbolic link, or a folder that is or holds the home or current directory.
    """
    problem = "is a symbolic link" if os.path.islink(folder) else ""
    for name, home in (("home", Path.home()), ("current", Path.cwd())):
        if home.resolve().is_relative_to(folder.resolve()):
            problem = f"is or holds the {name} directory"
    if problem:
        raise OutputError(f"{folder} {problem}; a stage owns its folder", fix=_ELSEWHERE)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Be the only one that writes a folder, while the block runs.

    The lock is the kernel's and ends with its owner, however that one died, so none is ever stale.
    Its file stands beside the folder, which may be moved aside meanwhile.

    Raises:
        OutputError: another process holds it, nothing can be written there, or no stage may own
            the folder (`check_place`).
        NoSpace: the volume is full, before the block or in it.
    """
    check_place(folder)
    path = folder.with_name(f".{folder.name}.lock")
    STOP.guard()
    with reaching(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        # "r+" opens what can be sought alone: no FIFO, socket or terminal.
        opened = os.fdopen(os.open(path, flags, 0o666), "r+", errors="replace")
    with space_for(folder), opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"{folder} is being written by {file.read() or 'another process'}"
            fix = f"wait for it, stop it (SIGTERM), or {_ELSEWHERE}"
            raise OutputError(what, fix=fix) from None
        except OSError:
            warn(f"{path.parent} has no locks: see to it that one run alone writes {folder.name}")
        last = file.read(200)
        if last and not last.startswith(HOLDER):
            raise OutputError(f"{path} holds something else than a lock", fix=_ELSEWHERE)
        file.seek(0)
        file.truncate()
        file.write(f"{HOLDER}{os.getpid()} since {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        file.flush()
        yield


def held(folder: Path) -> bool:
    """Whether a process holds the lock of a folder now. Its file must be there."""
    with folder.with_name(f".{folder.name}.lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
    return False


def evaluations(data: Path) -> list[dict[str, Any]]:
    """What EVALUATIONS holds; a line that is damaged is passed over, as no seal vouches for it."""
    rows = []
    with suppress(OSError):
        for line in (data / EVALUATIONS).read_text("utf-8", "replace").splitlines():
            with suppress(ValueError, LookupError, TypeError, RecursionError):
                row = json.loads(line)
                date.fromisoformat(row["date"])
                names = {key: str(row.get(key) or "") for key in ("inputs", "judging")}
                rows.append({**row, **names, "questions": {*row["questions"]}})
    return rows


def recorded_inputs(folder: Path) -> dict[str, Any]:
    """What a finished or begun folder was made from; {} where it does not say or is damaged."""
    for mark in (folder / DONE, folder / INPUTS):
        with suppress(OutputError):  # absent, or damaged: its stage says so
            return dict(read_checked(mark)["inputs"])
    return {}


def recorded_base(folders: Iterable[Path], base_id: str) -> dict[str, Any]:
    """What stages recorded of a base (`model.Base.record`), of the first folder that has it."""
    for folder in folders:
        base = recorded_inputs(folder).get("base")
        if isinstance(base, dict) and base.get("id") == base_id and "named" in base:
            return base
    return {}


def finished(folder: Path, inputs: dict[str, Any], *, command: str, also: str = "") -> bool:
    """Whether a stage may be skipped; else it has to begin or go on.

    Args:
        also: another way out of an unfinished folder than a fresh one, for the message.

    Raises:
        OutputError: the folder holds the result of other inputs or files that are not ours, or
            is finished and a file of it changed since.
    """
    if empty(folder):
        return False
    done = (folder / DONE).is_file()
    mark = folder / (DONE if done else INPUTS)
    if not mark.is_file():
        raise _foreign(folder)
    if differing := "; ".join(differences(read_checked(mark)["inputs"], inputs)):
        state, also = ("finished", "") if done else ("unfinished", also)
        what = f"{folder} holds the {state} result of other inputs; these differ: {differing}"
        raise OutputError(what, fix=f"{_ELSEWHERE}, or: {command} --fresh{also}")
    if done:
        read_seal(folder, stage=command, make=command)
    return done


def empty(folder: Path) -> bool:
    """Whether a folder is absent or holds nothing, or no more than a kill left of a first write."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return all(name.startswith(f".{INPUTS}.") for name in names)


def check_ours(folder: Path) -> None:
    """Refuse a folder without the mark of a stage (done.json, inputs.json) or of a release.

    Raises:
        OutputError: it was not written by fintune.
    """
    keys = {DONE: "inputs", INPUTS: "inputs", "training_config.json": "provenance"}
    for name, key in keys.items():
        with suppress(OSError, ValueError, RecursionError):
            if isinstance(read_json(folder / name).get(key), dict):
                return
    raise _foreign(folder)


def _foreign(folder: Path) -> OutputError:
    return OutputError(f"{folder} holds files that are not of this stage", fix=_ELSEWHERE)


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
    if not (folder / INPUTS).is_file():
        write_json(folder / INPUTS, {"inputs": inputs})


def move_aside(folder: Path) -> Path | None:
    """Rename a folder of ours to the first free `NAME.old-K`; nothing is deleted.

    Returns:
        Its new name; None where there was nothing to move.

    Raises:
        OutputError: the folder is not ours, or no stage may own it.
    """
    if empty(folder):
        return None
    check_ours(folder)
    names = (folder.with_name(f"{folder.name}.old-{number}") for number in count(1))
    return folder.rename(next(name for name in names if not os.path.lexists(name)))


def read_checked(path: Path) -> dict[str, Any]:
    """A `done.json` or `inputs.json` of the form in which they are written here.

    Raises:
        OutputError: it has another form, or `inputs` are not those of `inputs_sha256`.
    """
    try:
        tree = {"files": {}} | read_json(path)
        ours = isinstance(tree["inputs"], dict) and isinstance(tree["files"], dict)
        ours &= path.name == INPUTS or tree["inputs_sha256"] == sha256_json(tree["inputs"])
    except (OSError, ValueError, LookupError, RecursionError):
        ours = False
    if not ours:
        fix = f"put the file back, or {_ELSEWHERE}"
        raise OutputError(f"{path} was changed or damaged after it was written", fix=fix)
    return tree
