"""Checkpoints of a run: written whole, found by their seal, loaded into a run.

checkpoint-STEP/
    adapter_model.safetensors, adapter_config.json   the adapter at that step
    state.pt                                         optimizer state and gradient scaler, as tensors
    best_adapter.safetensors, best.json              the best evaluation's adapter until then
    resume.json                                      step, sums of the log, time, the fingerprint

There is no state of a random generator: the seed of each micro-batch follows from the config's
seed, the step and its first row (`train.update`). Each checkpoint is written beside its place,
every file synced, sealed like a stage's folder (`seal.py`: size and sha256 of each file), renamed,
the parent synced.

transformers writes a checkpoint in place: of 60 random kill -9, 29 left a newest one on which
resuming crashed, with an intact one beside it. A run continues from the newest one whose seal
verifies, and says which it skipped and why.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from fintune import files, seal
from fintune.console import say, warn
from fintune.errors import OutputError
from fintune.training import distributed
from fintune.training.arguments import KEEP
from fintune.training.run_state import Progress, RunState
from fintune.untrusted.checks import ADAPTER

RESUME, STATE = "resume.json", "state.pt"
BEST = "best.json"
BEST_ADAPTER = "best_adapter.safetensors"
"""In a checkpoint: the best adapter until then, so that no evaluation after it can replace it."""


def save(state: RunState, *, pending_evaluation: bool = False) -> None:
    """Save a run as it is now. Collective.

    Args:
        pending_evaluation: an evaluation of this step was cut short and comes first on resuming.
    """
    folder = state.folder / "checkpoints"

    def write(staging: Path) -> None:
        save_adapter(state, staging)
        scaler = state.accelerator.scaler
        tensors = {"optimizer": state.optimizer.state_dict()["state"]}
        torch.save(tensors | {"scaler": scaler and scaler.state_dict()}, staging / STATE)
        if state.at.best_loss is not None:
            files.copy_file(state.best / ADAPTER, staging / BEST_ADAPTER)
            files.copy_file(state.best / BEST, staging / BEST)
        facts = {
            "progress": asdict(replace(state.at, seconds=round(state.seconds, 3))),
            "pending_evaluation": pending_evaluation,
            "fingerprint_sha256": state.sha256,
        }
        files.write_json(staging / RESUME, facts)

    def whole() -> None:
        files.require_free_space(folder, state.checkpoint_bytes)
        save_checkpoint(folder, state.at.step, write)
        rotate(folder, KEEP, state.at.step)

    distributed.from_rank0(whole)


def resume(state: RunState) -> dict[str, Any]:
    """Load the newest whole checkpoint, where there is one. Collective.

    Hyperparameters stay those of the config, which an accepted change may have set anew.

    Returns:
        RESUME; empty: the run begins.

    Raises:
        OutputError: none verifies, or it is of another run.
    """
    folder = distributed.from_rank0(lambda: newest_checkpoint(state.folder / "checkpoints"))
    if folder is None:
        return {}
    facts = files.read_json(folder / RESUME)
    if facts["fingerprint_sha256"] not in {state.sha256, *(c["was"] for c in state.accepted)}:
        raise OutputError(f"{folder} is of another run", fix="remove it")
    say(f"continuing from {folder}")
    state.at = Progress(**facts["progress"])
    adapter = load_file(folder / ADAPTER)
    set_peft_model_state_dict(state.accelerator.unwrap_model(state.model), adapter)
    saved = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": saved["optimizer"]})
    if saved["scaler"]:
        state.accelerator.scaler.load_state_dict(saved["scaler"])
    if state.at.updates:
        past = {"last_epoch": state.at.updates - 1, "_step_count": state.at.updates + 1}
        state.schedule.load_state_dict(state.schedule.state_dict() | past)
        state.schedule.step()  # sets the rate of that update
    if (folder / BEST).exists():
        distributed.from_rank0(lambda: _restore_best(state, folder))
    return facts


def save_adapter(state: RunState, folder: Path) -> None:
    """Write the adapter as it is now, as peft does."""
    state.accelerator.unwrap_model(state.model).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def save_best(state: RunState) -> None:
    """Write the adapter as it is now as the best one."""
    with _new_best(state) as staging:
        save_adapter(state, staging)
        sha256 = files.sha256_file(staging / ADAPTER)
        facts = {"step": state.at.step, "eval_loss": state.at.best_loss, "sha256": sha256}
        files.write_json(staging / BEST, facts)


def _restore_best(state: RunState, checkpoint: Path) -> None:
    """`best/` may be of optimizer steps that are undone now."""
    names = {BEST_ADAPTER: ADAPTER, BEST: BEST, "adapter_config.json": "adapter_config.json"}
    with _new_best(state) as staging:
        for source, target in names.items():
            files.copy_file(checkpoint / source, staging / target)


def _new_best(state: RunState) -> AbstractContextManager[Path]:
    """Write `best/` anew; after a kill in between, the next start has it from a checkpoint."""
    return files.staged_folder(state.best, free=lambda: shutil.rmtree(state.best, True))


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Write a checkpoint whole: `write` fills a staging folder, the rest is done here.

    One of the same step that verifies is kept: it is of the same state.
    """
    final = folder / f"checkpoint-{step}"
    if final.exists() and corrupt(final) is None:
        return
    with files.staged_folder(final, free=lambda: shutil.rmtree(final, True)) as staging:
        write(staging)
        seal.seal(staging, {"step": step})


def corrupt(checkpoint: Path) -> str | None:
    """Why a checkpoint is corrupt, with the file's name, or None if it verifies."""
    try:
        seal.read_seal(checkpoint, stage="checkpoint", make="fintune train")
    except OutputError as error:
        return error.what.removeprefix(f"checkpoint: {checkpoint}: ")
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; each newer one that does not is named.

    Raises:
        OutputError: there are checkpoints, and none verifies.
    """
    by_step = checkpoints(folder)
    for checkpoint in reversed(by_step):
        if (reason := corrupt(checkpoint)) is None:
            return checkpoint
        warn(f"{checkpoint} is skipped: {reason}")
    if by_step:
        fix = "start again: fintune train --fresh (the old folder is moved aside)"
        raise OutputError(f"none of the {len(by_step)} checkpoints in {folder} verifies", fix=fix)
    return None


def rotate(folder: Path, keep: int, step: int) -> None:
    """Remove all but the `keep` newest until `step`, the one just written.

    Those after it were skipped when the run resumed, so they must not push out sound ones. The
    best adapter is in each checkpoint and in `best/`, out of reach of this.
    """
    by_step = checkpoints(folder)
    kept = [path for path in by_step if step_of(path) <= step][-keep:]
    for removed in {*by_step, *folder.glob(".staging-*")} - {*kept}:
        (removed / seal.DONE).unlink(missing_ok=True)  # first: half a checkpoint is none
        shutil.rmtree(removed, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint folder holds, by its name."""
    return int(checkpoint.name.rpartition("-")[2])
