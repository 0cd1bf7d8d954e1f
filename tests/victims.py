"""Runs that are harmed on purpose, each in a forked process.

A fork costs a tenth of a second where a new process would import torch for five; the child is
thrown away, so it is harmed by plain assignment, without undoing.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tiny_made
import torch
from safetensors.torch import load_file, save_file

from fintune import files, sample, seal
from fintune.config import Config, load_config
from fintune.data.prepare import prepare
from fintune.errors import FintuneError
from fintune.files import read_json, read_jsonl, sha256_file
from fintune.training import checkpoint, distributed, memory, metrics
from fintune.training import train as loop
from fintune.training.rows import Order
from fintune.training.train import train

Harm = Callable[[], None]
STEPS, SAVE = 20, 5
AUDITED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree")


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code (minus the signal's number), what it said, when."""

    code: int
    text: str
    ended: float


def harmed(work: Callable[[], Any], *harms: Harm, kill_after: float | None = None) -> Outcome:
    """Do `work` in a fork, as the command line would, after the harms; perhaps kill -9 it."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
        child = os.fork()
        if child == 0:
            os._exit(_in_child(log.name, work, harms))
        if kill_after is not None:
            # A thread, so that a child that ends by itself is not waited for.
            timer = threading.Timer(kill_after, os.kill, (child, signal.SIGKILL))
            timer.start()
        # The child is not reaped before the timer is off: its number cannot be another's by then.
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        ended = time.monotonic()
        if kill_after is not None:
            timer.cancel()
            timer.join()
        status = os.waitpid(child, 0)[1]
        return Outcome(os.waitstatus_to_exitcode(status), log.read(), ended)


def _in_child(log: str, work: Callable[[], Any], harms: tuple[Harm, ...]) -> int:
    sys.stdout = sys.stderr = open(log, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a shell may ignore some
        signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # a collection would walk all of torch's modules, 0.2 s each time
    metrics.draw_curves = lambda log, picture: None  # a third of these runs
    try:
        for harm in harms:
            harm()
        work()
    except FintuneError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def settings(root: Path, prepared: Path, base: Path, *changes: str) -> Config:
    """A run of 20 updates with a save, and an evaluation, every 5."""
    values = {
        "out": root,
        "data.out": prepared,
        "model.path": base,
        "model.id": "test/tiny",
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.num_train_epochs": 1,
        "train.max_steps": STEPS,
        "train.eval_steps": SAVE,
        "train.save_steps": SAVE,
        "train.logging_steps": 1,
        "train.max_eval_samples": 6,
        "train.learning_rate": 1e-2,
        "train.precision": "fp32",
        "train.lora.lora_dropout": 0.1,
    }
    return load_config("demo", [*(f"{key}={value}" for key, value in values.items()), *changes])


def materials(root: Path) -> tuple[Path, Path]:
    """Prepared rows and the tiny base, as conftest.py has them."""
    base = tiny_made.wide_base(root / "base")
    lines = sample.rows_path().read_text(encoding="utf-8").splitlines(keepends=True)
    short = [line for line in lines if '"messages"' not in line]  # no conversations
    (root / "rows.jsonl").write_text("".join(short[:260]), encoding="utf-8")
    changes = [f"data.source={root / 'rows.jsonl'}", f"out={root}", f"model.path={base}"]
    prepare(load_config("demo", [*changes, "model.id=test/tiny"]))
    return root / "data", base


def print_of(config: Config) -> tuple[str, list[dict[str, Any]]]:
    """What two runs must have in common to be the same: adapter, losses, gradient norms."""
    keep = ("step", "loss", "grad_norm", "eval_loss")
    rows = read_jsonl(config.run_dir / "metrics.jsonl")
    adapter = sha256_file(config.run_dir / "best" / checkpoint.ADAPTER)
    return adapter, [{key: row[key] for key in keep if key in row} for row in rows]


def usable(run: Config | Path) -> list[str]:
    """Checkpoints of a run that verify."""
    folder = run if isinstance(run, Path) else run.run_dir
    found = checkpoint.checkpoints(folder / "checkpoints")
    return [path.name for path in found if checkpoint.corrupt(path) is None]


def send(number: int, mark: Path | None = None) -> None:
    """A signal to this process, the moment written down."""
    if mark is not None and not mark.exists():
        mark.write_text(str(time.monotonic()))
    os.kill(os.getpid(), number)


def at_call(owner: Any, name: str, count: int, action: Callable[[], None]) -> Harm:
    """Before the `count`-th call of a function, do something."""

    def harm() -> None:
        real, calls = getattr(owner, name), [0]

        def counted(*args: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                action()
            return real(*args, **keywords)

        setattr(owner, name, counted)

    return harm


def poisoned(where: str, step: int, accumulation: int = 2) -> Harm:
    """A value that is not finite in the loss or gradient of an update, or an evaluation from it."""

    def harm() -> None:
        real, updates = loop.sum_loss, [0]

        def sum_loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
            total, count = real(model, batch)
            updates[0] += torch.is_grad_enabled()
            if where == "evaluation":
                bad = not torch.is_grad_enabled() and updates[0] >= step * accumulation
            else:
                bad = torch.is_grad_enabled() and updates[0] == step * accumulation
            if bad and where == "gradient":
                total.register_hook(lambda gradient: gradient * float("inf"))
            elif bad:
                total = total * float("nan")
            return total, count

        loop.sum_loss = sum_loss  # type: ignore[assignment]

    return harm


def at_boundary(folder: Path, number: int, action: Callable[[int], None]) -> Harm:
    """Before the `number`-th touch of a file below `folder` by what saves, do something.

    Opening, renaming, linking, removing, making a folder, fsync, and torch's own writer count;
    `action` gets the count, and with number 0 it is called at every touch.
    """

    def harm() -> None:
        state = {"inside": 0, "count": 0}

        def touched() -> None:
            state["count"] += 1
            if number in (0, state["count"]):
                inside, state["inside"] = state["inside"], 0
                action(state["count"])
                state["inside"] = inside

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if state["inside"] and event in AUDITED and str(folder) in str(args[0]):
                touched()

        def watched(owner: Any, name: str) -> None:
            real = getattr(owner, name)

            def call(*args: Any, **keywords: Any) -> Any:
                state["inside"] += 1
                try:
                    return real(*args, **keywords)
                finally:
                    state["inside"] -= 1

            setattr(owner, name, call)

        def counted(owner: Any, name: str) -> None:
            real = getattr(owner, name)

            def call(*args: Any, **keywords: Any) -> Any:
                if state["inside"]:
                    touched()
                return real(*args, **keywords)

            setattr(owner, name, call)

        counted(os, "fsync")
        counted(torch, "save")
        for owner, name in SAVERS:
            watched(owner, name)
        sys.addaudithook(hook)

    return harm


SAVERS: tuple[tuple[Any, str], ...] = (
    (checkpoint, "save_checkpoint"),
    (checkpoint, "rotate"),
    (checkpoint, "save_best"),
)


def die(count: int) -> None:
    """kill -9 oneself."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_runs(
    new: Callable[[int], Config], whole: float, kills: int, pick: Callable[[], float]
) -> Iterator[tuple[Config, int]]:
    """Runs killed again and again at random moments until they end; (config, its kills) of each.

    Args:
        new: the config of the n-th run, each in a folder of its own.
        whole: seconds of a run that nobody harms.
        kills: at least so many in all.
        pick: a share of `whole`.
    """
    made = number = 0
    while made < kills:
        config, own, ended = new(number), 0, False
        while not ended:
            outcome = harmed(lambda config=config: train(config), kill_after=pick() * whole)
            ended = outcome.code == 0
            if not ended and outcome.code != -signal.SIGKILL:
                raise AssertionError(f"exit {outcome.code}: {outcome.text}")
            own += not ended
            if own + made >= kills and not ended:
                last = harmed(lambda config=config: train(config))
                assert last.code == 0, last.text
                ended = True
        made, number = made + own, number + 1
        yield config, own


@contextmanager
def small_volume(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of its own, which root can mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount() -> bool:
    """Whether this user may mount; a container's root often may not."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    try:
        with tempfile.TemporaryDirectory() as folder, small_volume(Path(folder), 65536):
            return True
    except subprocess.CalledProcessError:
        return False


def fill(volume: Path, left: int) -> Path:
    """Take all space of a volume but `left` bytes."""
    ballast = volume / "ballast"
    free = shutil.disk_usage(volume).free
    with ballast.open("wb") as file:
        file.write(bytes(max(free - left, 0)))
    return ballast


def half_written(run: Path) -> list[str]:
    """Files of a run that are of a write that did not end."""
    found = []
    for path in run.rglob("*"):
        if path.name.startswith("."):
            found.append(path.name)
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            try:
                for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
                    json.loads(part)
            except ValueError:
                found.append(path.name)
    return found


def drifts(root: Path, prepared: Path, base: Path) -> dict[str, tuple[Callable[..., None], str]]:
    """Name -> how it changes a copy of data and base, and what the refusal must name."""

    def override(change: str) -> Callable[..., None]:
        return lambda values: values.append(change)

    def rows(change: Callable[[Any], Any]) -> Callable[..., None]:
        def edit(values: list[str]) -> None:
            folder = root / "data"
            shutil.copytree(prepared, folder)
            table = pq.read_table(folder / "train.parquet")
            pq.write_table(change(table), folder / "train.parquet")
            inputs = read_json(folder / "done.json")["inputs"]
            (folder / "done.json").unlink()
            seal.seal(folder, inputs)
            values.append(f"data.out={folder}")

        return edit

    def other_base(name: str, change: Callable[[str], str]) -> Callable[..., None]:
        def edit(values: list[str]) -> None:
            shutil.copytree(base, root / "base")
            path = root / "base" / name
            path.write_text(change(path.read_text()))
            values.append(f"model.path={root / 'base'}")

        return edit

    def other_weights(values: list[str]) -> None:
        shutil.copytree(base, root / "base")
        save_file({"a": torch.zeros(1)}, root / "base" / "model.safetensors")
        values.append(f"model.path={root / 'base'}")

    return {
        "rank": (override("train.lora.r=3"), "config.train.lora.r"),
        "alpha": (override("train.lora.lora_alpha=99"), "config.train.lora.lora_alpha"),
        "dropout": (override("train.lora.lora_dropout=0.2"), "config.train.lora.lora_dropout"),
        "learning rate": (override("train.learning_rate=1e-3"), "config.train.learning_rate"),
        "accumulation": (
            override("train.gradient_accumulation_steps=1"),
            "config.train.gradient_accumulation_steps",
        ),
        "batch": (
            override("train.per_device_train_batch_size=1"),
            "config.train.per_device_train_batch_size",
        ),
        "seed": (override("seed=7"), "config.seed"),
        "rows removed": (rows(lambda table: table.slice(1)), "data.train.parquet"),
        "rows reordered": (
            rows(lambda table: table.take(np.arange(len(table))[::-1].copy())),
            "data.train.parquet",
        ),
        "tokenizer": (
            other_base("tokenizer.json", lambda text: text + " "),
            "tokenizer_sha256",
        ),
        "template": (
            other_base("chat_template.jinja", lambda text: text + "{# #}"),
            "template_sha256",
        ),
        "base": (other_weights, "base.revision"),
    }


def changed(half: Config, change: Callable[..., None], root: Path) -> Config:
    """The same run folder with something changed under it."""
    values: list[str] = []
    change(values)
    given = [f"train.out={half.run_dir}", *values]
    return settings(root, half.data_dir, half.model.path or Path(), *given)


def _full(left: int) -> None:
    """Fill the volume of the run; with 250,000 bytes left it also says that it has more."""
    fill(Path(os.environ["VOLUME"]), left)
    if left == 250_000:
        files.free_bytes = lambda folder: 2**60


def _loss(change: Callable[[Any, torch.Tensor, Any], torch.Tensor], owner: Any = loop) -> Harm:
    """Another loss: `change` gets the model, the sum and the batch, or raises."""

    def harm() -> None:
        real = owner.sum_loss

        def sum_loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
            total, count = real(model, batch)
            return change(model, total, batch), count

        owner.sum_loss = sum_loss

    return harm


def _scarce(model: Any, total: torch.Tensor, batch: Any) -> torch.Tensor:
    if batch["input_ids"].numel() > 500:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return total


def _fits_recomputed(model: Any, total: torch.Tensor, batch: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and not model.is_gradient_checkpointing:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return total


def _tried_and_recomputed() -> None:
    memory.SPARED = 0
    _loss(_fits_recomputed, memory)()


def _ruin_best() -> None:
    """NaN in the adapter that the run is about to seal; its folder is RUN."""
    path = Path(os.environ["RUN"]) / "best" / checkpoint.ADAPTER
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)


def _out_of_memory() -> None:
    raise MemoryError


SIGNALS = {
    # the second micro-batch of the seventh update, an evaluation's second batch, a save's middle
    "between micro-batches": at_call(Order, "seed", 14, lambda: send(signal.SIGTERM)),
    "in an evaluation": at_call(loop, "send_to_device", 12, lambda: send(15)),
    "in a save": at_call(torch, "save", 2, lambda: send(signal.SIGINT)),
    "while the base is loaded": at_call(loop, "load_base", 1, lambda: send(15)),
    "after step 2": at_call(distributed, "stop_asked", 2, lambda: send(15)),
    "twice in a step": at_call(
        Order, "seed", 26, lambda: [send(signal.SIGTERM) for _ in range(2)] and None
    ),
}
HARMS = {
    "killed at the tenth micro-batch": at_call(Order, "seed", 10, lambda: die(0)),
    "out of memory at step 13": at_call(Order, "seed", 13, _out_of_memory),
    "a device of 500 tokens": _loss(_scarce),
    "a trial that only fits recomputed": _tried_and_recomputed,
    "a ruined adapter": at_call(loop, "check_weights", 1, _ruin_best),
    "a full disk": at_call(checkpoint, "save", 3, lambda: _full(60_000)),
    "a disk that ends in a save": at_call(checkpoint, "save", 3, lambda: _full(250_000)),
}
"""Of a run of `settings`; the last ones read the folders of VOLUME and RUN in the environment."""
