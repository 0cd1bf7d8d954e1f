"""What a run must be before it is sealed, and the measured facts that it leaves for the card."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fintune.errors import NotFinite, OutputError
from fintune.files import read_json, sha256_file
from fintune.model import device
from fintune.train.rows import Rows
from fintune.train.run_state import PACKAGES, RunState
from fintune.train.trainer import ADAPTER, BEST, LoraTrainer


def check_best(best: Path, trainer: LoraTrainer) -> None:
    """The adapter that leaves training is the one of the best evaluation, whole, finite, trained.

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
    try:
        weights = load_file(best / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{best / ADAPTER} does not load: {error}", fix=again) from None
    trained = trainer.trainable()
    if sha256_file(best / ADAPTER) != facts["sha256"] or len(weights) != len(trained):
        raise OutputError(
            f"{best / ADAPTER} is not the file that the evaluation kept"
            f" ({len(weights)} of {len(trained)} tensors)",
            fix=again,
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise NotFinite(f"{best} holds weights that are not finite")
    if not any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name):
        raise OutputError(
            f"{best}: every lora_B is zero, so the adapter does nothing",
            fix="raise train.learning_rate or train longer",
        )


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
