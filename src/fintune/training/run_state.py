"""A run: its folder, its fingerprint, what was resolved when it began, and where it is.

inputs.json     the run fingerprint (config, data, base, tokenizer, versions), accepted changes
record.json     precision, gradient checkpointing, threads and out-of-memory errors, of one
                fingerprint: measured on the machine, which a second start must not repeat.
checkpoints/    see checkpoint.py
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fintune import files, seal
from fintune.chat import ChatFormat
from fintune.config import Config, dump_yaml
from fintune.console import Meter, say, warn
from fintune.errors import ConfigError, ModelError, OutputError, Stopped
from fintune.files import JsonlLog
from fintune.model import Base
from fintune.targets import Targets
from fintune.training import distributed
from fintune.training.distributed import world_size
from fintune.training.rows import Order, Rows

PACKAGES = ("fintune", "torch", "transformers", "peft", "numpy")
"""Packages whose versions are part of the fingerprint; numpy draws the order of rows."""
RECORD = "record.json"
_SHAPE = ("optim", "lora.r", "lora.target_modules")
FIXED_KEYS = ("base.revision:", *(f"config.train.{key}:" for key in _SHAPE))
"""What saved weights and optimizer states were made for: no change of it can be accepted."""


def run_fingerprint(config: Config, base: Base, chat: ChatFormat) -> dict[str, Any]:
    """Everything that the losses of a run depend on; a base counts by its content.

    Raises:
        OutputError: there is no prepared data, or it was prepared with another tokenizer.
    """
    data = seal.read_data(config.data_dir)
    sections = config.sections("model", "chat", "train", "seed")
    del sections["model"]["path"], sections["model"]["revision"]  # `base` is what they mean
    tokenizer = {
        "tokenizer_sha256": files.sha256_file(base.folder / "tokenizer.json"),
        "template_sha256": chat.template_sha256,
    }
    encoded = {name: data["inputs"].get(name) for name in tokenizer}
    if differs := seal.differences(encoded, tokenizer):
        what = f"{config.data_dir} was prepared for another base: {'; '.join(differs)}"
        raise OutputError(what, fix="run: fintune prepare --fresh")
    return {
        "config": sections,
        "data": {name: fact["sha256"] for name, fact in data["files"].items() if "parquet" in name},
        "base": base.record,
        **tokenizer,
        "versions": {name: version(name) for name in PACKAGES},
    }


@dataclass
class Progress:
    """Where a run is: what a checkpoint holds besides weights and optimizer state.

    Attributes:
        step: optimizer steps made.
        updates: those of them that moved the schedule; fp16's scaler may skip one.
        tokens: of the rows trained on.
        loss: sum of the losses of the steps since the last line of the log.
        logged: step of that line.
        best_loss: lowest validation loss so far.
        seconds: of training, evaluation and saving, before this start.
        joules: of the whole machine meanwhile; None where nothing counts them.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    loss: float = 0.0
    logged: int = 0
    best_loss: float | None = None
    seconds: float = 0.0
    joules: float | None = None


@dataclass
class RunState:
    """An open run.

    Attributes:
        config, folder: its settings and where it lies.
        fingerprint, sha256: what the run depends on, and its hash.
        accepted: changes of the fingerprint: `reason`, `differs`, and the hash that it `was`.
        resolved: what `record.json` holds; `out_of_memory` has an entry for each such error: the
            `step`, and the `micro_batches` of an optimizer step since then.
        finished: whether there is nothing left to do.
        targets: what gets an adapter; None: to be found on the model.
        at: where the run is.
        order, validation, model, optimizer, schedule, accelerator, metrics, bar, energy: what it
            works with, set by `train.build` and `train.fit`.
    """

    config: Config
    fingerprint: dict[str, Any]
    accepted: list[dict[str, Any]] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    targets: Targets | None = None
    at: Progress = field(default_factory=Progress)
    order: Order = field(init=False)
    validation: Rows = field(init=False)
    model: Any = field(init=False)
    optimizer: Any = field(init=False)
    schedule: Any = field(init=False)
    accelerator: Any = field(init=False)
    metrics: JsonlLog | None = field(init=False, default=None)
    bar: Meter = field(init=False)
    energy: Any = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.config.run_dir
        self.sha256 = files.sha256_json(self.fingerprint)
        self._started = time.monotonic()
        if self.resolved.get("fingerprint_sha256") != self.sha256:
            # A changed fingerprint resolves anew; how much memory there is stays known.
            known = self.resolved.get("out_of_memory", [])
            self.resolved = {"fingerprint_sha256": self.sha256, "out_of_memory": known}

    @classmethod
    def open(
        cls, config: Config, fingerprint: dict[str, Any], *, fresh: bool, force_resume: str | None
    ) -> "RunState":
        """Begin or continue a run. Collective.

        Args:
            fresh: move the folder aside first.
            force_resume: a reason for which an unfinished run goes on with another fingerprint.

        Raises:
            OutputError: the fingerprint is another one, or the folder is not a run's.
            ConfigError: the reason is empty.
        """
        folder = config.run_dir

        def begin() -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
            if fresh and (aside := seal.move_aside(folder)):
                say(f"moved the old run to {aside}")
            if force_resume is not None:
                _accept(folder, fingerprint, force_resume)
            also = ', or go on and have it recorded: --force-resume "why"'
            finished = seal.finished(folder, fingerprint, command="fintune train", also=also)
            if not finished:
                seal.start(folder, fingerprint)
                files.write_text(folder / "config.yaml", dump_yaml(config))
            accepted = seal.read_checked(folder / seal.INPUTS).get("accepted", [])
            known = (folder / RECORD).is_file()
            resolved = files.read_json(folder / RECORD) if known else {}
            return accepted, resolved, finished

        return cls(config, fingerprint, *distributed.from_rank0(begin))

    @property
    def best(self) -> Path:
        """Folder of the best evaluation's adapter."""
        return self.folder / "best"

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        train = self.config.train
        whole = self.order.steps_per_epoch * train.num_train_epochs
        return whole if train.max_steps < 0 else train.max_steps

    @property
    def seconds(self) -> float:
        """Wall time of the steps that count: until the checkpoint resumed from, and since."""
        return self.at.seconds + time.monotonic() - self._started

    @property
    def checkpoint_bytes(self) -> int:
        """Upper bound of a checkpoint: adapter and best one, two fp32 moments a parameter."""
        trained = sum(each.numel() for each in self.model.parameters() if each.requires_grad)
        return files.SMALL_FILES + 4 * 4 * int(trained)

    def resolve(self, name: str, decide: Callable[[], Any]) -> Any:
        """The value that this run resolved before under `name`, or that of `decide()`, recorded."""
        return self.resolved[name] if name in self.resolved else self.record(name, decide())

    def record(self, name: str, value: Any) -> Any:
        """Set a resolved value and return it; rank 0 writes it to `record.json`."""
        self.resolved[name] = value
        if distributed.is_rank0():
            files.write_json(self.folder / RECORD, self.resolved)
        return value

    @contextmanager
    def noting_memory(self) -> Iterator[None]:
        """Turn an out-of-memory error into twice as many micro-batches for the next start.

        Raises:
            Stopped: out of memory; the same command continues with smaller micro-batches.
            ModelError: out of memory on a single example.
        """
        try:
            yield
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        order, step = self.order, self.at.step
        what = f"step {step + 1}: out of memory on micro-batches of {order.most_tokens:,} tokens"
        if len(order.largest) == 1:
            fix = "it is one example: set train.gradient_checkpointing=on, or lower data.max_length"
            raise ModelError(what, fix=fix)
        more = 2 * order.accumulation * world_size()
        self.resolved.pop("gradient_checkpointing", None)
        self.resolved["out_of_memory"].append({"step": step, "micro_batches": more})
        # By the rank that met it; the others wait.
        files.write_json(self.folder / RECORD, self.resolved)
        fix = f"the same command continues from the last checkpoint, with {more} micro-batches"
        raise Stopped(what, fix=f"{fix} an optimizer step (of the same examples)")


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an allocation failed on the device or the machine; only CUDA has a class for it."""
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(word in str(error) for word in words)


def _accept(folder: Path, fingerprint: dict[str, Any], reason: str) -> None:
    """Give an unfinished run another fingerprint, and keep the reason and what differs."""
    if not reason.strip():
        raise ConfigError("--force-resume needs a reason", why="it is recorded for every reader")
    path = folder / seal.INPUTS
    if not path.is_file() or (folder / seal.DONE).is_file():
        return
    begun = seal.read_checked(path)
    before, changes = begun["inputs"], begun.get("accepted", [])
    differs = seal.differences(before, fingerprint)
    if fixed := [line for line in differs if line.startswith(FIXED_KEYS)]:
        what = f"what was saved so far has another shape, or another base: {'; '.join(fixed)}"
        why = "a half-trained adapter fits the weights that it was trained on, and no others"
        fix = "set it back (a base's commit: model.revision), or: fintune train --fresh"
        raise OutputError(what, why=why, fix=fix)
    if differs:
        change = {"reason": reason, "differs": differs, "was": files.sha256_json(before)}
        files.write_json(path, {"inputs": fingerprint, "accepted": [*changes, change]})
        warn(f"accepted, and recorded: {'; '.join(differs)}")
