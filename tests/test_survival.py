"""Runs that are killed, stopped, starved of disk and memory, or fed what is not finite.

The short form of bench/soak.py: the same harms, fewer of them.
"""

import errno
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from frozen import read_json
from safetensors.torch import save_file
from tiny import read_lines
from victims import (
    HARMS,
    SAVE,
    SIGNALS,
    STEPS,
    at_boundary,
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
    settings,
    small_volume,
    usable,
)

from fintune import seal, train
from fintune.config import Config
from fintune.errors import FintuneError, NoSpace, NotFinite, OutputError
from fintune.files import space_for, write_json
from fintune.training import checkpoint, run_state
from fintune.training import train as loop
from fintune.untrusted.probe import run_limited

CI_KILLS = 4


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


def continues(config: Config, whole: Whole) -> str:
    """The same command again, and it is the same run. Returns what it said."""
    outcome = harmed(lambda: train(config))
    assert outcome.code == 0, outcome.text
    assert print_of(config) == whole.mark
    return outcome.text


def test_a_run_killed_again_and_again_is_the_same_run(
    new: Callable[..., Config], whole: Whole
) -> None:
    moments = random.Random(5)
    runs = killed_runs(lambda number: new(), whole.seconds, CI_KILLS, moments.random)
    for config, _ in runs:
        assert print_of(config) == whole.mark


def test_killed_at_file_boundaries_three_deep(new: Callable[..., Config], whole: Whole) -> None:
    """A kill before a touch of a file in a save, then in the resumed run's save, and so on."""
    config, place = new(), random.Random(7)
    had = 0
    for _ in range(3):
        outcome = harmed(
            lambda: train(config), at_boundary(config.run_dir, place.randrange(60, 160), die)
        )
        assert outcome.code == -signal.SIGKILL, outcome.text
        assert len(usable(config)) >= had, "never fewer usable checkpoints than one"
        had = min(len(usable(config)), 1)
    continues(config, whole)


def test_killed_at_boundaries_of_a_small_save(tmp_path: Path) -> None:
    def write(staging: Path) -> None:
        for name in ("a", "b"):
            (staging / name).write_text(name)

    def saves(folder: Path) -> None:
        for step in (1, 2, 3, 4):
            checkpoint.save_checkpoint(folder, step, write)
            checkpoint.rotate(folder, 1, step)

    for number in range(1, 400, 9):
        folder = tmp_path / f"at-{number}"
        folder.mkdir()
        outcome = harmed(lambda folder=folder: saves(folder), at_boundary(folder, number, die))
        if outcome.code == 0:
            break
        left = [path for path in checkpoint.checkpoints(folder) if not checkpoint.corrupt(path)]
        assert left or number <= 40, f"boundary {number}: no usable checkpoint"
        saves(folder)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-4"], "nothing is left over"
    assert number > 100


@pytest.mark.parametrize("place", ["in an evaluation", "in a save", "while the base is loaded"])
def test_a_signal_saves_and_the_run_continues(
    place: str, new: Callable[..., Config], whole: Whole
) -> None:
    config = new()
    outcome = harmed(lambda: train(config), SIGNALS[place])
    assert outcome.code == 75, outcome.text
    assert "the same command continues" in outcome.text
    continues(config, whole)


def test_a_second_signal_stops_at_once(new: Callable[..., Config], whole: Whole) -> None:
    config = new()
    outcome = harmed(lambda: train(config), SIGNALS["twice in a step"])
    assert outcome.code == 75, outcome.text
    assert usable(config) == ["checkpoint-5", "checkpoint-10"], "what was saved stays, no more"
    continues(config, whole)


def refused(number: str) -> float:
    raise AssertionError(f"{number} was written")


@pytest.mark.parametrize(
    ("where", "step"), [("loss", 1), ("gradient", STEPS // 2), ("evaluation", STEPS)]
)
def test_what_is_not_finite_stops_the_run(
    where: str, step: int, new: Callable[..., Config]
) -> None:
    config = new("train.eval_steps=1", f"train.max_steps={STEPS}")
    outcome = harmed(lambda: train(config), poisoned(where, step))
    assert outcome.code == 65, outcome.text
    assert f"step {step}:" in outcome.text, "at the step itself, not later"
    assert ("rows of the step" in outcome.text) is (where != "evaluation")
    for path in config.run_dir.rglob("*.json*"):
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refused)
    assert (
        usable(config)
        == [f"checkpoint-{at}" for at in range(SAVE, STEPS + 1, SAVE) if at < step][-2:]
    )


DRIFTS = ("dropout", "rows reordered", "tokenizer", "template", "base")


def test_a_ruined_adapter_ends_with_65(
    new: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = new()
    monkeypatch.setenv("RUN", str(config.run_dir))
    outcome = harmed(lambda: train(config), HARMS["a ruined adapter"])
    assert (outcome.code, "NaN or infinite" in outcome.text) == (65, True), outcome.text
    assert not (config.run_dir / "done.json").exists()


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
    monkeypatch.setattr("fintune.training.run_state.version", lambda name: "9.9")
    with pytest.raises(OutputError, match=r"versions\.transformers: .* -> 9\.9"):
        train(half)


def test_drift_is_accepted_by_name_and_recorded(
    half: Config, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    """A rate, then rows, precision and more, each accepted; a kill between them; all recorded."""
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
    killed = HARMS["killed at the tenth micro-batch"]
    outcome = harmed(lambda: train(first, force_resume="too fast"), killed)
    assert outcome.code == -signal.SIGKILL, outcome.text

    def more(values: list[str]) -> None:
        for name in ("learning rate", "rows reordered", "alpha"):
            ways[name][0](values)
        values += ["train.precision=bf16", "train.gradient_checkpointing=on", "train.eval_steps=9"]

    second = changed(half, more, tmp_path)
    # Not in a fork: torch's thread pool, which loading in bf16 may use, does not survive one.
    train(second, force_resume="sorted")
    rows = read_lines(half.run_dir / "metrics.jsonl")
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    assert 5e-3 < rates[7] <= 1e-2, "as the run began"
    assert 0 < max(rate for step, rate in rates.items() if step > 7) < 1e-3, "as was accepted"
    assert [row["step"] for row in rows if "eval_loss" in row][-2:] == [18, STEPS]
    done, facts, record, arguments = (
        read_json(half.run_dir / f"{name}.json")
        for name in ("done", "environment", "record", "training_arguments")
    )
    assert (record["precision"], facts["precision"]) == ("bf16", "bf16")
    assert (arguments["bf16"], arguments["gradient_checkpointing"]) == (True, True)
    saved = read_json(half.run_dir / "checkpoints" / f"checkpoint-{STEPS}" / "adapter_config.json")
    assert saved["lora_alpha"] == 99
    for accepted in (done["accepted"], facts["accepted_changes"]):
        assert [fact["reason"] for fact in accepted] == ["too fast", "sorted"]
        assert "learning_rate: 0.01 -> 0.001" in accepted[0]["differs"][0]
        assert any("data.train.parquet" in line for line in accepted[1]["differs"])


def test_memory_that_ends_halves_the_micro_batches(new: Callable[..., Config]) -> None:
    """A device that holds 500 tokens: two starts end at once, one more goes through."""
    config = new("train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1")
    outcomes = [harmed(lambda: train(config), HARMS["a device of 500 tokens"]) for _ in range(3)]
    assert [outcome.code for outcome in outcomes] == [75, 75, 0], outcomes
    assert "the same command continues from the last checkpoint, with 2 micro" in outcomes[0].text
    facts = read_json(config.run_dir / "environment.json")
    assert facts["out_of_memory"] == [{"step": 0, "micro_batches": more} for more in (2, 4)]
    assert facts["steps"] == STEPS
    assert read_json(config.run_dir / "training_arguments.json")["gradient_accumulation_steps"] > 1


def test_a_trial_that_does_not_fit_turns_recomputation_on_at_once(
    new: Callable[..., Config],
) -> None:
    """The estimate says that it fits, the device that it does not unless layers are recomputed."""
    config = new("train.max_steps=5")
    outcome = harmed(lambda: train(config), HARMS["a trial that only fits recomputed"])
    assert outcome.code == 0, outcome.text
    assert "gradient checkpointing is off" in outcome.text
    assert "gradient checkpointing is on: the largest micro-batch did not fit" in outcome.text
    arguments = read_json(config.run_dir / "training_arguments.json")
    assert arguments["gradient_checkpointing"] is True
    assert not read_json(config.run_dir / "record.json").get("out_of_memory")


def test_fp16_that_never_gets_a_finite_gradient_stops() -> None:
    """The scaler skips an update for its scale's sake, not one after the other for ever."""
    scale, made, state = [2.0**16], 0, Mock()
    state.accelerator.scaler.get_scale = lambda: scale[0]
    state.at.step, state.order.example_ids = 6, lambda step: ["a", "b"]
    with pytest.raises(NotFinite, match="step 7") as caught:
        while made < 1_000:
            loop._finite(state, 1.0, math.nan)
            made, scale[0] = made + 1, scale[0] / 2
    assert made == 16
    assert "a, b" in str(caught.value)


def test_a_volume_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*words: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(seal.fcntl, "flock", lacking)
    with seal.lock(tmp_path / "run"):
        pass
    assert "has no locks" in capsys.readouterr().err


def test_a_lock_ends_with_its_owner_not_with_a_child_of_it(tmp_path: Path) -> None:
    def held() -> None:
        with seal.lock(tmp_path / "run"):
            run_limited(lambda: time.sleep(5), "a folder")

    assert harmed(held, kill_after=1.0).code == -signal.SIGKILL
    with seal.lock(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / ".run.lock").read_text()


def test_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert run_state.is_out_of_memory(caught.value)
    assert run_state.is_out_of_memory(MemoryError())
    assert not run_state.is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_cap_in_the_middle_changes_no_step(new: Callable[..., Config]) -> None:
    """Memory ends at step 13; the same examples make each step, in smaller micro-batches."""
    changes = ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1"]
    changes.append("train.lora.lora_dropout=0")
    config, whole = new(*changes), new(*changes)
    assert harmed(lambda: train(whole)).code == 0
    outcome = harmed(lambda: train(config), HARMS["out of memory at step 13"])
    assert outcome.code == 75, outcome.text
    assert usable(config) == ["checkpoint-5", "checkpoint-10"]
    outcome = harmed(lambda: train(config))
    assert (outcome.code, "checkpoint-10" in outcome.text) == (0, True), outcome.text
    arguments = read_json(config.run_dir / "training_arguments.json")
    assert arguments["gradient_accumulation_steps"] > 1
    for row, other in zip(print_of(config)[1], print_of(whole)[1], strict=True):
        assert row == pytest.approx(other, rel=1e-4), "two examples twice are four at once"


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

    checkpoint.save_checkpoint(volume, 5, write)
    # 440,000 of 584,000 at most: a writer that failed may hold its deleted file for a while.
    for left in np.linspace(0, 440_000, 24).astype(int):
        ballast = fill(volume, int(left))
        with pytest.raises(NoSpace), space_for(volume):
            checkpoint.save_checkpoint(volume, 10, write)
        assert [path.name for path in volume.iterdir() if path != ballast] == ["checkpoint-5"]
        assert checkpoint.corrupt(volume / "checkpoint-5") is None
        ballast.unlink()
    checkpoint.save_checkpoint(volume, 10, write)


@pytest.mark.parametrize("name", ["a full disk", "a disk that ends in a save"])
def test_a_full_disk_ends_the_run_at_once(
    name: str,
    volume: Path,
    new: Callable[..., Config],
    whole: Whole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a save; inside one, where the volume holds less than it said."""
    config = new(f"train.out={volume / 'run'}")
    monkeypatch.setenv("VOLUME", str(volume))
    outcome = harmed(lambda: train(config), HARMS[name])
    assert outcome.code == 74, outcome.text
    assert "the same command continues" in outcome.text
    assert usable(config) == ["checkpoint-5", "checkpoint-10"]
    assert half_written(config.run_dir) == []
    assert harmed(lambda: train(config)).code == 74, "no space before the run either"
    (volume / "ballast").unlink()
    continues(config, whole)
