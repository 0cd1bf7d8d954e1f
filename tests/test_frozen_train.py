"""Frozen: a training run's numbers, its files, and that a broken run ends like an unbroken one."""

import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import frozen
import pytest
import tiny
import torch
from safetensors import safe_open

ADAPTER = "best/adapter_model.safetensors"
STEPS = 2
CHANGES = {
    "learning_rate": (0.02, "learning_rate: 0.01 -> 0.02"),
    "seed": (7, "seed: 42 -> 7"),
    "rank": (4, "r: 8 -> 4"),
    "batch_size": (2, "batch_size: 4 -> 2"),
}


def same_metrics(found: list[dict[str, float]], kept: list[dict[str, float]]) -> None:
    """Every number as it was kept, within 1e-5; processors add up in other orders."""
    assert [sorted(row) for row in found] == [sorted(row) for row in kept]
    for now, then in zip(found, kept, strict=True):
        for name, value in then.items():
            # A norm is a sum over many more rounded numbers than a loss.
            allowed = 1e-4 if name == "grad_norm" else 1e-5
            assert now[name] == pytest.approx(value, rel=allowed), (now["step"], name)


def alike(one: Path, other: Path) -> None:
    """Two runs are the same run: adapter to the byte, metrics to the last digit."""
    assert tiny.file_sha256(one / ADAPTER) == tiny.file_sha256(other / ADAPTER)
    assert frozen.of_metrics(one) == frozen.of_metrics(other)


def logged(run: Path) -> int:
    """Lines of metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_the_losses_are_the_golden_ones(chain: tiny.Chain) -> None:
    same_metrics(frozen.of_metrics(chain.run), frozen.frozen()["metrics"])


def test_two_threads_make_the_golden_losses(chain: tiny.Chain, tmp_path: Path) -> None:
    """The first steps: on a busy machine two threads wait for each other for seconds a step."""
    copy = chain.copy(tmp_path, "data")
    process = tiny.Forked(
        *("train", *copy.words()), log=tmp_path / "log", prepare=lambda: torch.set_num_threads(2)
    )
    tiny.until(lambda: logged(copy.run) >= STEPS, process)
    process.send(signal.SIGKILL)
    process.wait()
    found, kept = frozen.of_metrics(copy.run), frozen.frozen()["metrics"]
    same_metrics(found[:STEPS], kept[:STEPS])


def test_a_run_leaves_what_it_promises(chain: tiny.Chain) -> None:
    rows = tiny.read_lines(chain.run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [*range(1, 25)]
    assert all({"learning_rate", "grad_norm", "useful_tokens_per_second"} <= set(r) for r in steps)
    evaluations = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert [*evaluations] == [6, 12, 18, 24]
    best = frozen.read_json(chain.run / "best" / "best.json")
    assert best["eval_loss"] == min(evaluations.values())
    assert evaluations[best["step"]] == best["eval_loss"]
    assert best["sha256"] == tiny.file_sha256(chain.run / ADAPTER)
    for name in ("config.yaml", "environment.json", "training_arguments.json", "curves.png"):
        assert (chain.run / name).stat().st_size, name


def test_the_adapter_is_pefts(chain: tiny.Chain) -> None:
    config = frozen.read_json(chain.run / "best" / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    with safe_open(chain.run / ADAPTER, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(tensors) == 2 * 2 * 7  # A and B, two layers, seven projections
    assert all(value.dtype == torch.float32 for value in tensors.values())
    assert all(value.isfinite().all() and value.any() for value in tensors.values())


def test_a_killed_process_goes_on_to_the_same_bytes(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "data")
    command = [tiny.program(), "train", *copy.words()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        while process.poll() is None and logged(copy.run) < 9:
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (copy.run / "done.json").exists()
    assert tiny.fintune("eval", *copy.words()).code == 1, "an unfinished run is not evaluated"
    said = tiny.done("train", *copy.words())
    assert "continuing from" in said.err
    alike(copy.run, chain.run)


def test_a_signal_ends_with_75_and_the_same_command_goes_on(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path / "one", "data")
    process = tiny.Forked("train", *copy.words(), log=tmp_path / "log")
    tiny.until(lambda: logged(copy.run) > 8, process)
    process.send(signal.SIGTERM)
    assert process.wait() == 75, process.text()
    assert "continue with: fintune train" in process.text()
    refused = tiny.fintune("train", *copy.words(learning_rate=0.02))
    assert (refused.code, "learning_rate: 0.01 -> 0.02" in refused.err) == (1, True)
    accepted = copy.copy(tmp_path / "other", "data", "run")
    tiny.done("train", *copy.words())
    alike(copy.run, chain.run)
    tiny.done("train", "--force-resume", "too slow", *accepted.words(learning_rate=0.02))
    (change,) = frozen.read_json(accepted.run / "done.json")["accepted"]
    assert change["reason"] == "too slow"
    assert "learning_rate: 0.01 -> 0.02" in change["differs"][0]
    assert tiny.file_sha256(accepted.run / ADAPTER) != tiny.file_sha256(chain.run / ADAPTER)


def test_the_same_command_keeps_a_finished_run(chain: tiny.Chain) -> None:
    before = {path: path.stat().st_mtime_ns for path in chain.run.rglob("*")}
    said = tiny.done("train", *chain.words())
    assert "unchanged, kept" in said.err
    assert {path: path.stat().st_mtime_ns for path in chain.run.rglob("*")} == before


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_is_refused_by_name(chain: tiny.Chain, name: str) -> None:
    value, named = CHANGES[name]
    change: dict[str, Any] = {name: value}
    said = tiny.fintune("train", *chain.words(**change))
    assert (said.code, named in said.err) == (1, True), said.err
    assert "--fresh" in said.err


def test_other_rows_are_refused_by_name(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "run")
    fewer = copy.words(max_train_rows=60)
    tiny.done("prepare", *fewer)
    said = tiny.fintune("train", *fewer)
    assert (said.code, "data.train.parquet" in said.err) == (1, True), said.err


def test_two_runs_in_one_folder_are_refused(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "data")
    process = tiny.Forked("train", *copy.words(), log=tmp_path / "log")
    tiny.until(lambda: logged(copy.run) > 0, process)
    said = tiny.fintune("train", *copy.words())
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert said.code == 1
    assert f"is being written by process {process.pid}" in said.err


def test_a_loss_that_is_not_finite_ends_with_65(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "data")
    said = tiny.fintune("train", *copy.words(learning_rate=1e30))
    assert said.code == 65, said.err
    assert "step 3" in said.err
    rows = frozen.of_metrics(copy.run)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert not (copy.run / "done.json").exists()


def test_the_plan_says_what_would_be_done(chain: tiny.Chain, tmp_path: Path) -> None:
    plan = tiny.answer_json("plan", *chain.words())
    assert {"batches", "lora_config", "notes", "training_arguments"} <= plan.keys()
    arguments = plan["training_arguments"]
    assert (arguments["learning_rate"], arguments["lr_scheduler_type"]) == (0.01, "cosine")
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (
        4,
        2,
    )
    assert (plan["lora_config"]["r"], plan["lora_config"]["lora_alpha"]) == (8, 16)
    assert plan["batches"]["steps"] == 24  # max_steps; 64 rows, 8 a step
    nothing = tiny.answer_json("plan", *tiny.chain(tmp_path / "none"))
    assert nothing["batches"]["estimated"] is True
    assert not (tmp_path / "none").exists()


def test_the_plan_counts_what_the_run_then_has(chain: tiny.Chain) -> None:
    plan = tiny.answer_json("plan", *chain.words())
    with safe_open(tiny.base() / "model.safetensors", "pt") as file:
        sizes = [math.prod(file.get_slice(n).get_shape()) for n in file.keys()]  # noqa: SIM118
    assert plan["base"]["parameters"] == sum(sizes) == 377_472
    rows, batches = plan["rows"], plan["batches"]
    assert plan["adapter"]["trainable_parameters"] == 29_696
    assert (rows["rows"], batches["steps"], rows["evaluations"]) == (64, 24, 4)
    assert (rows["rows_per_evaluation"], batches["examples_per_step"]) == (15, 8)
    parts = {"base", "adapter", "rows", "batches", "flops", "settings", "gpus", "notes"}
    assert parts <= plan.keys()
    assert [gpu for gpu in plan["gpus"] if gpu["fits"]]


def test_what_cannot_be_trained_is_refused(chain: tiny.Chain, tmp_path: Path) -> None:
    nothing = tiny.fintune("train", *tiny.chain(tmp_path / "none"))
    assert (nothing.code, "run: fintune prepare" in nothing.err) == (1, True)
    base = tiny.fintune("train", *chain.words(base_path=tmp_path / "nowhere"))
    assert (base.code, "no folder at" in base.err) == (1, True)
