"""The checks before a run is finished, and the measured facts that it leaves for the card."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fintune.errors import NotFinite, OutputError
from fintune.files import read_json, sha256_file
from fintune.model import device
from fintune.train.rows import Rows
from fintune.train.run_state import PACKAGES, RunState
from fintune.train.trainer import ADAPTER, BEST, LoraTrainer
from fintune.untrusted.checks import read_header
from fintune.untrusted.static import check_weights


def check_best(best: Path, trainer: LoraTrainer) -> None:
    """Check that the adapter is the one of the best evaluation, whole, finite and trained.

    Raises:
        OutputError: it is another one, incomplete, or does nothing.
        NotFinite: a weight is not finite.
    """
    again = "continue with the same command; where it comes again: fintune train --fresh"
    evaluations = {
        row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row
    }
    facts = read_json(best / BEST)
    lowest = min(evaluations, key=lambda step: evaluations[step])
    if (facts["step"], facts["eval_loss"]) != (lowest, evaluations[lowest]):
        raise OutputError(
            f"{best} is of step {facts['step']}, the best evaluation of step {lowest}", fix=again
        )
    if not (best / ADAPTER).is_file() or sha256_file(best / ADAPTER) != facts["sha256"]:
        raise OutputError(f"{best / ADAPTER} is not the file that the evaluation kept", fix=again)
    saved, trained = len(read_header(best, ADAPTER)), len(trainer.trainable())
    if saved != trained:
        raise OutputError(f"{best / ADAPTER} holds {saved} of {trained} trained tensors", fix=again)
    for check in check_weights(best):
        if check.status == "failed" and check.detail.startswith("NaN"):
            raise NotFinite(f"{best}: {check.detail}", fix="lower train.learning_rate")
        if check.status == "failed":
            fix = "raise train.learning_rate or train longer"
            raise OutputError(f"{best}: {check.detail}", fix=fix)


def environment(trainer: LoraTrainer, rows: Rows, state: RunState) -> dict[str, Any]:
    """Measured facts of the run, for the card."""
    on = device()
    epochs = trainer.state.epoch or 0.0
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in (*PACKAGES, "accelerate")},
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else platform.machine(),
        "device_type": on.type,
        "processes": trainer.args.world_size,
        "cpu_cores": os.cpu_count(),
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "seconds": round(trainer.seconds(), 1),
        "steps": trainer.state.global_step,
        "epochs": round(epochs, 3),
        "trained_tokens": int(np.sum(rows.lengths) * epochs),
        "trainable_parameters": sum(p.numel() for p in trainer.trainable()),
        "adapter_sha256": sha256_file(Path(trainer.best) / ADAPTER),
        "token_caps": state.token_caps,
        "accepted_changes": state.accepted,
    }
