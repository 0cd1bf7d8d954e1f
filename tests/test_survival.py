"""Runs that are killed, stopped, starved of disk and memory, or fed what is not finite.

The short form of bench/soak.py: the same harms, fewer of them.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer
from victims import (
    SAVE,
    SIGNALS,
    STEPS,
    at_boundary,
    at_call,
    can_mount,
    changed,
    die,
    drifts,
    fill,
    half_written,
    harmed,
    killed_runs,
    poisoned,
    print_of,
    send,
    settings,
    small_volume,
    usable,
)

from fintune import files, seal
from fintune.config import Config, dump_yaml
from fintune.data import prepare
from fintune.errors import FintuneError, NoSpace, NotFinite, OutputError
from fintune.files import read_json, read_jsonl, space_for, write_json
from fintune.releasing.bundle import release
from fintune.training import memory, metrics, run_state, trainer
from fintune.training import run as stage
from fintune.training.run import train
from fintune.untrusted.probe import run_limited

CI_KILLS = 20


@dataclass(frozen=True)
class Whole:
    """What a run leaves that nobody harms, and the seconds it takes."""

    config: Config
    mark: Any
    seconds: float


@pytest.fixture(scope="module")
def new(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path, tiny_base: Path
) -> Callable[..., Config]:
    """A config of the same run in a folder of its own."""
    return lambda *changes: settings(tmp_path_factory.mktemp("run"), prepared, tiny_base, *changes)


@pytest.fixture(scope="module")
def whole(new: Callable[..., Config]) -> Whole:
    config, start = new(), time.monotonic()
    outcome = harmed(lambda: train(config))
    assert outcome.code == 0, outcome.text
    return Whole(config, print_of(config), outcome.ended - start)


def continues(config: Config, whole: Whole) -> None:
    """The same command again, and it is the same run."""
    outcome = harmed(lambda: train(config))
    assert outcome.code == 0, outcome.text
    assert print_of(config) == whole.mark


def test_a_run_killed_again_and_again_is_the_same_run(
    new: Callable[..., Config], whole: Whole
) -> None:
    moments = random.Random(5)
    runs = killed_runs(lambda number: new(), whole.seconds, CI_KILLS, moments.random)
    for config, _ in runs:
        assert print_of(config) == whole.mark


def test_killed_at_file_boundaries_five_deep(new: Callable[..., Config], whole: Whole) -> None:
    """A kill before a touch of a file in a save, then in the resumed run's save, and so on."""
    config, place = new(), random.Random(7)
    had = 0
    for _ in range(5):
        outcome = harmed(
            lambda: train(config), at_boundary(config.run_dir, place.randrange(60, 160), die)
        )
        assert outcome.code == -signal.SIGKILL, outcome.text
        assert len(usable(config)) >= had, "never fewer usable checkpoints than one"
        had = min(len(usable(config)), 1)
    continues(config, whole)


def test_killed_at_every_boundary_of_a_small_save(tmp_path: Path) -> None:
    def write(staging: Path) -> None:
        for name in ("a", "b"):
            (staging / name).write_text(name)

    def saves(folder: Path) -> None:
        for step in (1, 2, 3, 4):
            run_state.save_checkpoint(folder, step, write)
            run_state.rotate(folder, 1, step)

    for number in range(1, 400):
        folder = tmp_path / f"at-{number}"
        folder.mkdir()
        outcome = harmed(lambda folder=folder: saves(folder), at_boundary(folder, number, die))
        if outcome.code == 0:
            break
        left = [path for path in run_state.checkpoints(folder) if not run_state.corrupt(path)]
        assert left or number <= 40, f"boundary {number}: no usable checkpoint"
        assert len(left) == len(run_state.checkpoints(folder)), "what has the name is whole"
        saves(folder)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-4"], "nothing is left over"
    assert number > 100


@pytest.mark.parametrize("place", SIGNALS)
def test_a_signal_saves_and_the_run_continues(
    place: str, new: Callable[..., Config], whole: Whole
) -> None:
    config = new()
    outcome = harmed(lambda: train(config), SIGNALS[place])
    assert outcome.code == 75, outcome.text
    assert "the same command continues" in outcome.text
    with pytest.raises(OutputError, match="unfinished"):
        release(config)
    continues(config, whole)


def test_a_second_signal_stops_at_once(new: Callable[..., Config], whole: Whole) -> None:
    config = new()

    def twice() -> None:
        send(signal.SIGTERM)
        send(signal.SIGTERM)

    outcome = harmed(lambda: train(config), at_call(trainer.LoraTrainer, "compute_loss", 26, twice))
    assert outcome.code == 75, outcome.text
    assert usable(config) == ["checkpoint-5", "checkpoint-10"], "what was saved stays, no more"
    continues(config, whole)


def test_a_stop_before_the_first_step_is_met_at_once(
    new: Callable[..., Config], whole: Whole
) -> None:
    config = new()
    outcome = harmed(lambda: train(config), at_call(stage, "load_base", 1, lambda: send(15)))
    assert (outcome.code, usable(config)) == (75, [])
    continues(config, whole)


def test_a_stopped_preparation_leaves_nothing(
    tmp_path: Path, prepared: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fintune import cli

    source = prepared.parent / "rows.jsonl"
    words = ["prepare", "-c", "nano", "--fresh"]
    for pair in (f"data.source={source}", f"out={tmp_path}", f"model.path={tiny_base}"):
        words += ["-s", pair]

    def work() -> None:
        monkeypatch.setattr("sys.argv", ["fintune", *words])
        try:
            cli.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    outcome = harmed(work, at_call(prepare, "write_report", 1, lambda: send(signal.SIGTERM)))
    assert outcome.code == 75, outcome.text
    assert "continue with: fintune prepare -c nano -s" in outcome.text
    assert [path.name for path in tmp_path.iterdir()] == [".data.lock"]


def refused(number: str) -> float:
    raise AssertionError(f"{number} was written")


@pytest.mark.parametrize("step", [1, STEPS // 2, STEPS])
@pytest.mark.parametrize("where", ["loss", "gradient", "evaluation"])
def test_what_is_not_finite_stops_the_run(
    where: str, step: int, new: Callable[..., Config]
) -> None:
    config = new("train.eval_steps=1", f"train.max_steps={STEPS}")
    outcome = harmed(lambda: train(config), poisoned(where, step))
    assert outcome.code == 65, outcome.text
    assert f"step {step}:" in outcome.text, "at the step itself, not later"
    named = "rows of its first" if where == "evaluation" else "rows of the step"
    assert named in outcome.text
    for path in config.run_dir.rglob("*.json*"):
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refused)
    assert (
        usable(config)
        == [f"checkpoint-{at}" for at in range(SAVE, STEPS + 1, SAVE) if at < step][-2:]
    )


def test_one_run_a_folder(new: Callable[..., Config], whole: Whole) -> None:
    config = new()
    config.run_dir.mkdir(parents=True)
    with seal.lock(config.run_dir):
        started = time.monotonic()
        outcome = harmed(lambda: train(config))
        assert outcome.code == 1
        assert f"process {os.getpid()}" in outcome.text
        assert outcome.ended - started < 5
    assert list(config.run_dir.iterdir()) == [], "the second one touched nothing"
    assert harmed(lambda: train(config), at_call(stage, "load_base", 1, lambda: die(0))).code == -9
    outcome = harmed(lambda: train(config))
    assert (outcome.code, "taking over" in outcome.text) == (0, True)
    assert print_of(config) == whole.mark


DRIFTS = tuple(drifts(Path(), Path(), Path()))


@pytest.fixture(scope="module")
def half(new: Callable[..., Config]) -> Config:
    """A run that was stopped after its seventh update."""
    config = new()
    assert harmed(lambda: train(config), SIGNALS["between micro-batches"]).code == 75
    return config


@pytest.mark.parametrize("name", DRIFTS)
def test_drift_is_refused_by_name(
    name: str, half: Config, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    change, named = drifts(tmp_path, prepared, tiny_base)[name]
    before = usable(half)
    with pytest.raises(FintuneError, match=named):
        train(changed(half, change, tmp_path))
    assert usable(half) == before


def test_versions_are_part_of_a_run(half: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_state, "version", lambda name: "9.9")
    with pytest.raises(OutputError, match=r"versions\.transformers: .* -> 9\.9"):
        train(half)


def test_drift_is_accepted_by_name_and_recorded(
    half: Config, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    """Another rate, then other rows, each accepted; a kill between them; both on the record."""
    shutil.copytree(half.run_dir, tmp_path / "run")
    half = half.model_copy(
        update={"train": half.train.model_copy(update={"out": tmp_path / "run"})}
    )
    ways = drifts(tmp_path, prepared, tiny_base)
    with pytest.raises(FintuneError, match="another shape"):
        train(changed(half, ways["rank"][0], tmp_path), force_resume="wanted")
    other = half.train.model_copy(update={"optim": "adafactor"})
    with pytest.raises(FintuneError, match="optim: adamw_torch -> adafactor"):
        train(half.model_copy(update={"train": other}), force_resume="wanted")
    first = changed(half, ways["learning rate"][0], tmp_path)
    killed = at_call(trainer.LoraTrainer, "compute_loss", 10, lambda: die(0))
    outcome = harmed(lambda: train(first, force_resume="too fast"), killed)
    assert outcome.code == -signal.SIGKILL, outcome.text
    both = [ways["learning rate"][0], ways["rows reordered"][0]]
    second = changed(half, lambda values: [change(values) for change in both], tmp_path)
    outcome = harmed(lambda: train(second, force_resume="sorted"))
    assert outcome.code == 0, outcome.text
    rates = {
        row["step"]: row["learning_rate"]
        for row in read_jsonl(half.run_dir / "metrics.jsonl")
        if "learning_rate" in row
    }
    assert 5e-3 < rates[7] <= 1e-2, "as the run began"
    assert 0 < max(rate for step, rate in rates.items() if step > 7) < 1e-3, "as was accepted"
    for facts in (
        read_json(half.run_dir / "done.json")["accepted"],
        read_json(half.run_dir / "environment.json")["accepted_changes"],
    ):
        assert [fact["reason"] for fact in facts] == ["too fast", "sorted"]
        assert "learning_rate: 0.01 -> 0.001" in facts[0]["differs"][0]
        assert "data.train.parquet" in facts[1]["differs"][0]


def test_accepted_changes_take_effect(new: Callable[..., Config], tmp_path: Path) -> None:
    """A process that is killed in fp32 and continued in bf16, with other intervals and scale."""
    config = new("train.max_steps=60")
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    command = [str(Path(sys.executable).with_name("fintune")), "train", "-c"]
    command.append(str(tmp_path / "run.yaml"))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (config.run_dir / "checkpoints/checkpoint-5").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert read_json(config.run_dir / "record.json")["precision"] == "fp32"
    for change in ("train.precision=bf16", "train.gradient_checkpointing=on",
                   "train.eval_steps=13", "train.lora.lora_alpha=99"):  # fmt: skip
        command += ["-s", change]
    subprocess.run([*command, "--force-resume", "a wider range"], check=True, capture_output=True)
    (accepted,) = read_json(config.run_dir / "done.json")["accepted"]
    assert "config.train.precision: fp32 -> bf16" in accepted["differs"]
    assert read_json(config.run_dir / "record.json")["precision"] == "bf16"
    assert read_json(config.run_dir / "environment.json")["precision"] == "bf16"
    arguments = read_json(config.run_dir / "training_arguments.json")
    assert (arguments["bf16"], arguments["gradient_checkpointing"]) == (True, True)
    last = config.run_dir / "checkpoints" / "checkpoint-60"
    assert json.loads((last / "adapter_config.json").read_text())["lora_alpha"] == 99
    steps = [row["step"] for row in read_jsonl(config.run_dir / "metrics.jsonl")
             if "eval_loss" in row]  # fmt: skip
    assert steps[-4:] == [26, 39, 52, 60]


def test_another_runs_checkpoint_is_not_taken(
    half: Config, tmp_path: Path, new: Callable[..., Config], whole: Whole
) -> None:
    other = new("seed=7")
    shutil.copytree(half.run_dir / "checkpoints", tmp_path / "own")
    assert harmed(lambda: train(other)).code == 0
    config = new()
    shutil.copytree(half.run_dir, config.run_dir)
    shutil.copytree(
        other.run_dir / "checkpoints" / "checkpoint-20",
        config.run_dir / "checkpoints" / "checkpoint-20",
    )
    outcome = harmed(lambda: train(config))
    assert (outcome.code, "checkpoint-20 is skipped" in outcome.text) == (0, True), outcome.text
    assert print_of(config) == whole.mark


def test_memory_that_ends_halves_the_micro_batches(new: Callable[..., Config]) -> None:
    """A device that holds 500 tokens: a start ends at once, or at the third step; one more goes."""
    config = new("train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1")

    def scarce() -> None:
        real = trainer.sum_loss

        def sum_loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
            if batch["input_ids"].numel() > 500:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, batch)

        trainer.sum_loss = sum_loss

    outcomes = [harmed(lambda: train(config), scarce) for _ in range(2)]
    assert [outcome.code for outcome in outcomes] == [75, 0], outcomes
    assert "the same command continues, with at most" in outcomes[0].text
    facts = read_json(config.run_dir / "environment.json")
    (cap,) = facts["token_caps"]
    assert (cap["max_tokens"], facts["steps"]) == (cap["was"] // 2, STEPS)
    assert read_json(config.run_dir / "training_arguments.json")["gradient_accumulation_steps"] > 1


def test_memory_that_lacks_before_the_first_update_ends_with_75_and_a_cap(
    new: Callable[..., Config],
) -> None:
    changes = ("train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1")
    config = new("train.gradient_checkpointing=on", *changes)

    def full() -> None:
        def lacking(model: Any, batch: Any) -> Any:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        memory.sum_loss = lacking

    outcome = harmed(lambda: train(config), full)
    assert outcome.code == 75, outcome.text
    (cap,) = read_json(config.run_dir / "record.json")["token_caps"]
    assert (cap["step"], cap["max_tokens"] <= cap["was"] // 2 + 1) == (0, True)


def test_a_trial_that_does_not_fit_turns_recomputation_on_at_once(
    new: Callable[..., Config],
) -> None:
    """The estimate says that it fits, the device that it does not unless layers are recomputed."""
    config = new()

    def small() -> None:
        real = memory.sum_loss

        def sum_loss(model: Any, batch: Any) -> Any:
            if torch.is_grad_enabled() and not model.is_gradient_checkpointing:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, batch)

        memory.sum_loss = sum_loss

    outcome = harmed(lambda: train(config), small)
    assert outcome.code == 0, outcome.text
    assert "gradient checkpointing is off" in outcome.text
    assert "gradient checkpointing is on: the largest micro-batch did not fit" in outcome.text
    arguments = read_json(config.run_dir / "training_arguments.json")
    assert arguments["gradient_checkpointing"] is True
    assert not read_json(config.run_dir / "record.json").get("token_caps")


def test_fp16_that_never_gets_a_finite_gradient_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler skips an update for its scale's sake, not one after the other for ever."""
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model: torch.tensor(torch.nan))
    owner, made = object.__new__(trainer.LoraTrainer), 0
    owner._step_loss, owner._skipped = torch.tensor(1.0), 0
    owner.accelerator = SimpleNamespace(scaler=object())
    owner.losses = metrics.Losses()
    owner.losses.limit = 1.0
    owner.args = SimpleNamespace(world_size=1)
    owner.state = SimpleNamespace(global_step=6)
    owner.order = SimpleNamespace(example_ids=lambda step: ["a", "b"])  # type: ignore[assignment]
    with pytest.raises(NotFinite, match="step 7") as caught:
        while made < 1_000:
            owner._clip_grad_norm(None)
            made += 1
    assert made == trainer.SKIPS - 1
    assert owner.losses.limit is None, "the update before it is no spike twice"
    assert "a, b" in str(caught.value)


def test_a_volume_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*words: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(seal.fcntl, "flock", lacking)
    with seal.lock(tmp_path / "run") as dead:
        assert dead == ""
    assert "has no locks" in capsys.readouterr().err


def test_a_lock_ends_with_its_owner_not_with_a_child_of_it(tmp_path: Path) -> None:
    def held() -> None:
        with seal.lock(tmp_path / "run"):
            run_limited(lambda: time.sleep(5), "a folder")

    assert harmed(held, kill_after=1.0).code == -signal.SIGKILL
    with seal.lock(tmp_path / "run") as dead:
        assert "process" in dead


def test_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert memory.is_out_of_memory(caught.value)
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_cap_in_the_middle_changes_no_step(new: Callable[..., Config], whole: Whole) -> None:
    """Memory ends at step 13; the same examples make each step, in smaller micro-batches."""
    config = new("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1")

    def ends() -> None:
        raise MemoryError

    outcome = harmed(lambda: train(config), at_call(trainer.LoraTrainer, "compute_loss", 13, ends))
    assert outcome.code == 75, outcome.text
    assert usable(config) == ["checkpoint-5", "checkpoint-10"]
    outcome = harmed(lambda: train(config))
    assert (outcome.code, "checkpoint-10" in outcome.text) == (0, True), outcome.text
    arguments = read_json(config.run_dir / "training_arguments.json")
    assert arguments["gradient_accumulation_steps"] > 1
    ends_with = [
        read_json(one.run_dir / "checkpoints" / "checkpoint-20" / run_state.RESUME)[
            "consumed_sha256"
        ]
        for one in (config, whole.config)
    ]
    assert ends_with[0] == ends_with[1], "two examples twice are four at once"


def test_a_spike_is_flagged(new: Callable[..., Config]) -> None:
    losses = metrics.Losses()
    noise = np.random.default_rng(0)
    for value in 5 + 0.1 * noise.standard_normal(2_000):
        losses.add(float(value))
        assert losses.limit is None
    losses.add(6.0, share=1 / 16)
    assert losses.limit is None, "a mean over a sixteenth of the rows varies four times as much"
    losses.add(6.0)
    assert losses.limit is not None
    assert losses.limit < 6
    config = new("train.max_steps=26")

    def spike() -> None:
        real, calls = trainer.sum_loss, [0]

        def sum_loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
            total, count = real(model, batch)
            calls[0] += torch.is_grad_enabled()
            return (total * 20 if calls[0] == 49 and torch.is_grad_enabled() else total), count

        trainer.sum_loss = sum_loss

    outcome = harmed(lambda: train(config), spike)
    assert (outcome.code, "loss spike at step 25" in outcome.text) == (0, True), outcome.text
    rows = [row for row in read_jsonl(config.run_dir / "metrics.jsonl") if "spike_loss" in row]
    assert [(row["step"], len(row["rows"])) for row in rows] == [(25, 4)]


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    if not can_mount():
        pytest.skip("only root can mount a small volume to fill")
    with small_volume(tmp_path / "volume", 16 * 2**20) as folder:
        yield folder


def test_no_size_of_a_full_disk_costs_a_checkpoint(volume: Path) -> None:
    """24 amounts of free space, each too little; all three kinds of writers meet the end of it."""
    values = torch.randn(40_000)

    def write(staging: Path) -> None:
        (staging / "first").write_bytes(values.numpy().tobytes())
        save_file({"a": values}, staging / "second")
        torch.save({"a": values}, staging / "third")
        write_json(staging / "fourth", {"a": values[:4_000].tolist()})

    run_state.save_checkpoint(volume, 5, write)
    # 440,000 of 584,000 at most: a writer that failed may hold its deleted file for a while.
    for left in np.linspace(0, 440_000, 24).astype(int):
        ballast = fill(volume, int(left))
        with pytest.raises(NoSpace), space_for(volume, 0):
            run_state.save_checkpoint(volume, 10, write)
        assert [path.name for path in volume.iterdir() if path != ballast] == ["checkpoint-5"]
        assert run_state.corrupt(volume / "checkpoint-5") is None
        ballast.unlink()
    run_state.save_checkpoint(volume, 10, write)


@pytest.mark.parametrize("left", [0, 60_000, 250_000])
def test_a_full_disk_ends_the_run_at_once(
    left: int, volume: Path, new: Callable[..., Config], whole: Whole
) -> None:
    """Before a save; inside one, where the volume holds less than it said."""
    config = new(f"train.out={volume / 'run'}")

    def full() -> None:
        fill(volume, left)
        if left == 250_000:
            files.free_bytes = lambda folder: 2**60

    outcome = harmed(
        lambda: train(config), at_call(trainer.LoraTrainer, "_save_checkpoint", 3, full)
    )
    assert outcome.code == 74, outcome.text
    assert "the same command continues" in outcome.text
    assert usable(config) == ["checkpoint-5", "checkpoint-10"]
    assert half_written(config.run_dir) == []
    assert harmed(lambda: train(config)).code == 74, "no space before the run either"
    (volume / "ballast").unlink()
    continues(config, whole)


def test_a_line_of_metrics_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    kept = metrics.open_metrics(path, resumed_at=9)
    with pytest.raises(ValueError, match="JSON compliant"):
        kept.append({"step": 3, "loss": float("nan")})
    kept.append({"step": 3, "loss": 1.5})
    kept.close()
    assert [row["loss"] for row in read_jsonl(path)] == [2.0, 1.0, 1.5]
