"""Atomic checkpoints, sealed like every other folder (`seal.py`: size and sha256 of each file).

A checkpoint is written beside its place, every file synced, sealed, renamed, the parent synced.
transformers writes in place: of 60 random kill -9, 29 left a newest checkpoint that its own resume
crashed on, with an intact one beside it. A run continues from the newest one whose seal verifies,
and says which it skipped and why.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from fintune import seal
from fintune.console import warn
from fintune.errors import OutputError
from fintune.files import staged_folder

KEEP = 2
"""Newest checkpoints kept; the best adapter is kept besides."""
_NAME = re.compile(r"checkpoint-\d+")
_REMOVED = ".old-"


def save(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint whole: `write` fills a staging folder, the rest is done here.

    One of the same step that verifies is kept: it is of the same state.
    """
    final = folder / f"checkpoint-{step}"
    if final.exists():
        if corrupt(final) is None:
            return final
        shutil.rmtree(final)
    with staged_folder(final) as staging:
        write(staging)
        seal.seal(staging, {"step": step})
    return final


def corrupt(checkpoint: Path) -> str | None:
    """Why a checkpoint is corrupt, with the file's name, or None if it verifies."""
    try:
        inputs = seal.read_checked(checkpoint / seal.DONE)["inputs"]
        if inputs != {"step": step_of(checkpoint)}:
            return f"{seal.DONE} is of {inputs}"
        seal.read_seal(checkpoint, stage="checkpoint", make="fintune train")
    except OutputError as error:
        return error.what.removeprefix(f"checkpoint: {checkpoint}: ")
    return None


def newest(
    folder: Path, incompatible: Callable[[Path], str | None] = lambda path: None
) -> Path | None:
    """The newest checkpoint that verifies; each newer one that does not is named.

    Args:
        incompatible: why a checkpoint that verifies is not of this run, or None.

    Raises:
        OutputError: there are checkpoints, and none verifies.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        reason = corrupt(checkpoint) or incompatible(checkpoint)
        if reason is None:
            return checkpoint
        warn(f"{checkpoint} is skipped: {reason}")
    if found:
        raise OutputError(
            f"none of the {len(found)} checkpoints in {folder} verifies",
            why="continuing from corrupt state would not be the same run",
            fix="start again: fintune train --fresh (the old folder is moved aside)",
        )
    return None


def rotate(folder: Path, keep: int, step: int) -> None:
    """Remove all but the `keep` newest until `step`, the one just written.

    Those after it were skipped when the run resumed, so they must not push out sound ones. The
    best adapter is in each checkpoint and in `best/`, out of reach of this.
    """
    found = checkpoints(folder)
    kept = [path for path in found if step_of(path) <= step][-keep:]
    for checkpoint in {*found} - {*kept}:
        # Renamed first: a kill in the middle of a removal must not leave half a checkpoint.
        removed = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
        shutil.rmtree(removed, ignore_errors=True)
        checkpoint.rename(removed)
    for leftover in (*folder.glob(f"{_REMOVED}*"), *folder.glob(".staging-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint folder holds, by its name."""
    return int(checkpoint.name.rpartition("-")[2])
