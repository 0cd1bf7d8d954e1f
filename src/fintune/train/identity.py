"""What makes a run the run it is: its inputs, and the checkpoints and order that belong to them.

A run continues only with the inputs it began with. Others are refused with a list of what differs,
or accepted by name; then the change is in the run's seal, and the hash of consumed rows goes on
from where the old order ended.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from fintune import seal
from fintune.chat import ChatFormat
from fintune.config import Config
from fintune.console import say, warn
from fintune.errors import ConfigError, OutputError
from fintune.files import read_json, sha256_file
from fintune.model import Base
from fintune.train import checkpoints, processes
from fintune.train.order import Order
from fintune.train.record import Record

PACKAGES = ("fintune", "torch", "transformers", "peft")
"""Versions that a resumed run must share with the run it continues."""
RESUME = "resume.json"
"""In a checkpoint: what transformers does not keep."""
FIXED = ("r", "bias", "target_modules")
"""Keys of train.lora that give weights their shape: no change of them can be accepted."""


def inputs_of(config: Config, base: Base, chat: ChatFormat) -> dict[str, Any]:
    """All that makes a run the run it is; a base counts by its content, wherever it is."""
    data = seal.read_data(config.data_dir)
    sections = config.sections("model", "chat", "train", "seed")
    sections["model"].pop("path")
    words = {
        "tokenizer_sha256": sha256_file(base.folder / "tokenizer.json"),
        "template_sha256": chat.template_sha256,
    }
    encoded = {name: data["inputs"].get(name) for name in words}
    if encoded != words:
        raise OutputError(
            f"{config.data_dir} was prepared for another base: "
            + "; ".join(seal.differences(encoded, words)),
            why="its token ids would mean other words to this one",
            fix="run: fintune prepare --fresh",
        )
    return {
        "config": sections,
        "data": {name: fact["sha256"] for name, fact in data["files"].items() if "parquet" in name},
        "base": {"id": base.id, "revision": base.revision},
        **words,
        "versions": {name: version(name) for name in PACKAGES},
    }


def accept(run: Path, inputs: dict[str, Any], reason: str, record: Record) -> None:
    """Take changed inputs for the rest of the run, if its state fits them at all."""
    if not reason.strip():
        raise ConfigError("--accept-drift needs a reason", why="it is recorded for every reader")
    before = read_json(run / seal.INPUTS)["inputs"] if (run / seal.INPUTS).is_file() else inputs
    old, new = (_fixed(tree["config"]["train"]) for tree in (before, inputs))
    if old != new:
        raise OutputError(
            "these cannot be accepted: " + "; ".join(seal.differences(old, new)),
            why="the weights or the optimizer's states saved so far have another shape",
            fix="start again: fintune train --fresh",
        )
    differing = seal.accept(run, inputs, reason)
    if differing:
        record.forget("precision", "activations")
        warn(f"accepted, and recorded: {'; '.join(differing)}")


def _fixed(train: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer": train["optimizer"], **{key: train["lora"][key] for key in FIXED}}


def foreign(checkpoint: Path, run: Path, inputs_sha256: str) -> str | None:
    """Why a checkpoint is not of this run, or None."""
    ours = {inputs_sha256, *(change["was"] for change in seal.accepted(run))}
    if read_json(checkpoint / RESUME)["inputs_sha256"] not in ours:
        return "it is of a run with other inputs"
    return None


def continue_order(order: Order, checkpoint: Path, inputs_sha256: str) -> bool:
    """Let the order go on where the checkpoint ends; whether its last step was evaluated.

    Raises:
        OutputError: the order of rows until there is another one.
    """
    resume, done = read_json(checkpoint / RESUME), checkpoints.step_of(checkpoint)
    if resume["processes"] != processes.world_size():
        warn(
            f"{checkpoint} is of {resume['processes']} processes, this is a run of"
            f" {processes.world_size()}: rows and order are the same, dropout masks are not"
        )
    if resume["inputs_sha256"] != inputs_sha256:
        order.continue_from(done, resume["consumed_sha256"])
    else:
        order.continue_from(*resume["since"])
        if resume["consumed_sha256"] != order.consumed_sha256(done):
            raise OutputError(
                f"{checkpoint} was made with another order of rows",
                fix="start again: fintune train --fresh",
            )
    say(f"continuing from {checkpoint}")
    return not resume["pending_evaluation"]
