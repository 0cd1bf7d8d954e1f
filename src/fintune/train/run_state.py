"""A run's folder: the fingerprint that it continues with, and what was resolved when it began.

inputs.json   the run fingerprint (config, data, base, tokenizer, versions) and its accepted changes
record.json   precision, gradient checkpointing and token caps, of one fingerprint. They come from
              measurements of the machine, which a second start must not repeat.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fintune import seal
from fintune.chat import ChatFormat
from fintune.config import Config, dump_yaml
from fintune.console import say, warn
from fintune.errors import ConfigError, ModelError, OutputError, Stopped
from fintune.files import read_json, sha256_file, sha256_json, write_json, write_text
from fintune.model import Base
from fintune.train import checkpoints, memory, processes
from fintune.train.order import Order

PACKAGES = ("fintune", "torch", "transformers", "peft")
"""Packages whose versions are part of the fingerprint."""
RESUME = "resume.json"
"""In a checkpoint: the state that transformers does not save."""
SHAPE_KEYS = tuple(f"config.train.{key}:" for key in ("optim", "lora.r", "lora.target_modules"))
"""What gives saved weights and optimizer states their shape: no change of it can be accepted."""


def run_fingerprint(config: Config, base: Base, chat: ChatFormat) -> dict[str, Any]:
    """Everything that the losses of a run depend on; a base counts by its content.

    Raises:
        OutputError: there is no prepared data, or it was prepared with another tokenizer.
    """
    data = seal.read_data(config.data_dir)
    sections = config.sections("model", "chat", "train", "seed")
    sections["model"].pop("path")
    tokenizer = {
        "tokenizer_sha256": sha256_file(base.folder / "tokenizer.json"),
        "template_sha256": chat.template_sha256,
    }
    encoded = {name: data["inputs"].get(name) for name in tokenizer}
    if encoded != tokenizer:
        raise OutputError(
            f"{config.data_dir} was prepared for another base: "
            + "; ".join(seal.differences(encoded, tokenizer)),
            why="its token ids would mean other words to this one",
            fix="run: fintune prepare --fresh",
        )
    return {
        "config": sections,
        "data": {name: fact["sha256"] for name, fact in data["files"].items() if "parquet" in name},
        "base": {"id": base.id, "revision": base.revision},
        **tokenizer,
        "versions": {name: version(name) for name in PACKAGES},
    }


class RunState:
    """An open run.

    Attributes:
        folder: the run's folder.
        fingerprint, sha256: what the run depends on, and its hash.
        finished: whether there is nothing left to do.
        accepted: changes of the fingerprint: `reason`, `differs`, and the hash that it `was`.
    """

    def __init__(
        self, folder: Path, fingerprint: dict[str, Any], *, finished: bool = False
    ) -> None:
        self.folder, self.fingerprint, self.finished = folder, fingerprint, finished
        self.sha256 = sha256_json(fingerprint)
        begun = folder / seal.INPUTS
        self.accepted = seal.read_checked(begun).get("accepted", []) if begun.is_file() else []
        path = folder / "record.json"
        self._record = read_json(path) if path.is_file() else {}
        if self._record.get("fingerprint_sha256") != self.sha256:
            # A changed fingerprint resolves anew; how much memory there is stays known.
            caps = self._record.get("token_caps", [])
            self._record = {"fingerprint_sha256": self.sha256, "token_caps": caps}

    @classmethod
    def open(
        cls, config: Config, fingerprint: dict[str, Any], *, fresh: bool, force_resume: str | None
    ) -> "RunState":
        """Begin or continue a run; every rank calls it.

        Args:
            fresh: move the folder aside first.
            force_resume: a reason for which an unfinished run goes on with another fingerprint.

        Raises:
            OutputError: the fingerprint is another one, or the folder is not a run's.
            ConfigError: the reason is empty.
        """
        folder = config.run_dir
        opened = processes.from_rank0(lambda: _open(config, fingerprint, fresh, force_resume))
        run = cls(folder, fingerprint, finished=opened is seal.State.FINISHED)
        processes.wait()  # every rank has read record.json before rank 0 writes it
        return run

    def resolve(self, name: str, decide: Callable[[], Any]) -> Any:
        """What this run resolved before, or resolves now."""
        return self._record[name] if name in self._record else self.record(name, decide())

    def record(self, name: str, value: Any) -> Any:
        """Resolve anew; rank 0 writes it down."""
        self._record[name] = value
        if processes.is_rank0():
            self._write()
        return value

    @property
    def token_caps(self) -> list[dict[str, int]]:
        """One entry for each out-of-memory error: `step`, the tokens that `was` tried, the cap."""
        caps: list[dict[str, int]] = self._record["token_caps"]
        return caps

    def max_tokens(self) -> int | None:
        """Most tokens of a micro-batch since memory ran out, or None."""
        return min((cap["max_tokens"] for cap in self.token_caps), default=None)

    @contextmanager
    def capping_tokens(self, step: Callable[[], int], largest: int, longest: int) -> Iterator[None]:
        """Turn an out-of-memory error into half the tokens a micro-batch for the next start.

        Args:
            step: optimizer steps made so far.
            largest: tokens of the largest micro-batch of this start.
            longest: tokens of the longest example, which no cap can divide.

        Raises:
            Stopped: out of memory; the same command continues with a lower cap.
            ModelError: out of memory on a single example.
        """
        try:
            yield
            return
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
        if largest <= longest:
            raise ModelError(
                f"step {step() + 1}: out of memory on one example of {longest:,} tokens",
                why="a micro-batch cannot be smaller",
                fix="set train.gradient_checkpointing=on or model.quantization=4bit, or lower"
                " data.max_length",
            )
        cap = max(largest // 2, longest)
        self._record.pop("gradient_checkpointing", None)
        self.token_caps.append({"step": step(), "was": largest, "max_tokens": cap})
        self._write()  # by the rank that met it; the others only wait
        raise Stopped(
            f"step {step() + 1}: out of memory on micro-batches of up to {largest:,} tokens; saved"
            " is what the last checkpoint holds",
            fix=f"the same command continues, with at most {cap:,} tokens a micro-batch (the same"
            " examples a step)",
        )

    def incompatible(self, checkpoint: Path) -> str | None:
        """Why a checkpoint is not of this run, or None."""
        ours = {self.sha256, *(change["was"] for change in self.accepted)}
        saved = read_json(checkpoint / RESUME)["fingerprint_sha256"]
        return None if saved in ours else "it is of a run with other inputs"

    def check_data_order(self, order: Order, checkpoint: Path) -> None:
        """Let the order of rows go on from a checkpoint of this run.

        Raises:
            OutputError: the rows consumed until there are not those of this order.
        """
        resume, step = read_json(checkpoint / RESUME), checkpoints.step_of(checkpoint)
        if resume["processes"] != processes.world_size():
            warn(
                f"{checkpoint} is of {resume['processes']} processes, this is a run of"
                f" {processes.world_size()}: rows and order are the same, dropout masks are not"
            )
        if resume["fingerprint_sha256"] != self.sha256:
            order.continue_from(step, resume["consumed_sha256"])
            return
        order.continue_from(*resume["since"])
        if resume["consumed_sha256"] != order.consumed_sha256(step):
            raise OutputError(
                f"{checkpoint} was made with another order of rows",
                fix="start again: fintune train --fresh",
            )

    def _write(self) -> None:
        write_json(self.folder / "record.json", self._record)


def _open(
    config: Config, fingerprint: dict[str, Any], fresh: bool, force_resume: str | None
) -> seal.State:
    folder = config.run_dir
    if fresh and (aside := seal.move_aside(folder)):
        say(f"moved the old run to {aside}")
    if force_resume is not None:
        _accept(folder, fingerprint, force_resume)
    also = ', or go on and have it recorded: --force-resume "why"'
    state = seal.state(folder, fingerprint, command="fintune train", also=also)
    if state is not seal.State.FINISHED:
        seal.start(folder, fingerprint)
        write_text(folder / "config.yaml", dump_yaml(config))
    return state


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
    if fixed := [line for line in differs if line.startswith(SHAPE_KEYS)]:
        raise OutputError(
            f"these cannot be accepted: {'; '.join(fixed)}",
            why="the weights or the optimizer's states saved so far have another shape",
            fix="start again: fintune train --fresh",
        )
    if differs:
        change = {"reason": reason, "differs": differs, "was": sha256_json(before)}
        write_json(path, {"inputs": fingerprint, "accepted": [*changes, change]})
        warn(f"accepted, and recorded: {'; '.join(differs)}")
