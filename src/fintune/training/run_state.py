"""A run's folder: its fingerprint, what was resolved when it began, and its checkpoints.

inputs.json     the run fingerprint (config, data, base, tokenizer, versions), accepted changes
record.json     precision, gradient checkpointing, threads and out-of-memory errors, of one
                fingerprint: measured on the machine, which a second start must not repeat.
checkpoints/    each written beside its place, every file synced, sealed like a stage's folder
                (`seal.py`: size and sha256 of each file), renamed, the parent synced.

transformers writes a checkpoint in place: of 60 random kill -9, 29 left a newest one on which
resuming crashed, with an intact one beside it. A run continues from the newest one whose seal
verifies, and says which it skipped and why.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fintune import files, seal
from fintune.chat import ChatFormat
from fintune.config import Config, dump_yaml
from fintune.console import say, warn
from fintune.errors import ConfigError, ModelError, OutputError, Stopped
from fintune.model import Base
from fintune.targets import Targets
from fintune.training import distributed, memory
from fintune.training.distributed import world_size
from fintune.training.rows import Order

PACKAGES = ("fintune", "torch", "transformers", "peft", "numpy")
"""Packages whose versions are part of the fingerprint; numpy draws the order of rows."""
RECORD = "record.json"
RESUME = "resume.json"
"""In a checkpoint: the state that transformers does not save."""
KEEP = 2
"""Newest checkpoints kept; the best adapter is kept besides."""
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
class RunState:
    """An open run.

    Attributes:
        folder: the run's folder.
        fingerprint, sha256: what the run depends on, and its hash.
        accepted: changes of the fingerprint: `reason`, `differs`, and the hash that it `was`.
        resolved: what `record.json` holds; `out_of_memory` has an entry for each such error: the
            `step`, and the `micro_batches` of an optimizer step since then.
        finished: whether there is nothing left to do.
        targets: what gets an adapter; None: to be found on the model.
    """

    folder: Path
    fingerprint: dict[str, Any]
    accepted: list[dict[str, Any]] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    targets: Targets | None = None

    def __post_init__(self) -> None:
        self.sha256 = files.sha256_json(self.fingerprint)
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

        return cls(folder, fingerprint, *distributed.from_rank0(begin))

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
    def noting_memory(self, order: Order, step: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """Turn an out-of-memory error into twice as many micro-batches for the next start.

        Args:
            step: optimizer steps made so far.

        Raises:
            Stopped: out of memory; the same command continues with smaller micro-batches.
            ModelError: out of memory on a single example.
        """
        try:
            yield
            return
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
        what = f"step {step() + 1}: out of memory on micro-batches of {order.most_tokens:,} tokens"
        if len(order.largest) == 1:
            fix = "it is one example: set train.gradient_checkpointing=on, or lower data.max_length"
            raise ModelError(what, fix=fix)
        more = 2 * order.accumulation * world_size()
        self.resolved.pop("gradient_checkpointing", None)
        self.resolved["out_of_memory"].append({"step": step(), "micro_batches": more})
        # By the rank that met it; the others wait.
        files.write_json(self.folder / RECORD, self.resolved)
        fix = f"the same command continues from the last checkpoint, with {more} micro-batches"
        raise Stopped(what, fix=f"{fix} an optimizer step (of the same examples)")

    def newest_checkpoint(self) -> dict[str, Any]:
        """RESUME of the checkpoint to continue from and its folder, as `checkpoint`; empty where
        there is none. Collective.

        Raises:
            OutputError: none verifies, or it is of another run.
        """
        newest = distributed.from_rank0(lambda: newest_checkpoint(self.folder / "checkpoints"))
        if newest is None:
            return {}
        resume = files.read_json(newest / RESUME)
        if resume["fingerprint_sha256"] not in {self.sha256, *(c["was"] for c in self.accepted)}:
            raise OutputError(f"{newest} is of another run", fix="remove it")
        if resume["processes"] != world_size():
            warn(
                f"{newest} is of {resume['processes']} processes, this is a run of {world_size()}:"
                " rows and order are the same, dropout masks are not"
            )
        say(f"continuing from {newest}")
        return {**resume, "checkpoint": newest}


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
