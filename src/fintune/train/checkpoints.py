"""Atomic checkpoints with a manifest.

A checkpoint is written beside its place, every file synced, listed in a manifest of sizes and
sha256, renamed, the parent synced. transformers writes in place: of 60 random kill -9, 29 left a
newest checkpoint that its own resume crashed on, with an intact one beside it. Resume here takes
the newest whose manifest verifies, and says which it skipped and why.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fintune.console import warn
from fintune.errors import OutputError
from fintune.files import (
    json_text,
    manifest,
    manifest_problems,
    sha256_json,
    staged_folder,
    write_json,
)

MANIFEST = "manifest.json"
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
        if damage(final) is None:
            return final
        shutil.rmtree(final)
    with staged_folder(final) as staging:
        write(staging)
        write_json(staging / MANIFEST, _manifest(step, manifest(staging, without=MANIFEST)))
    return final


def _manifest(step: int, files: dict[str, Any]) -> dict[str, Any]:
    facts = {"step": step, "files": files}
    return facts | {"sha256": sha256_json(facts)}


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is corrupt, with the file's name, or None if it verifies."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        tree = json.loads(text)
        step, files = tree["step"], tree["files"]
        if text != json_text(_manifest(step, files)):
            return f"{MANIFEST} was changed"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    if checkpoint.name != f"checkpoint-{step}":
        return f"{MANIFEST} is of step {step}"
    return next(manifest_problems(checkpoint, files, without=MANIFEST), None)


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
        reason = damage(checkpoint) or incompatible(checkpoint)
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
    sound = [path for path in found if step_of(path) <= step]
    _sweep(folder)
    for checkpoint in {*found} - {*sound[-max(keep, 1) :]}:
        # Renamed first: a kill in the middle of a removal must not leave half a checkpoint.
        checkpoint.rename(checkpoint.with_name(f"{_REMOVED}{checkpoint.name}"))
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Delete removed checkpoints, and the staging folders of killed saves."""
    for leftover in (*folder.glob(f"{_REMOVED}*"), *folder.glob(".staging-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Updates that a checkpoint folder holds, by its name."""
    return int(checkpoint.name.rpartition("-")[2])
