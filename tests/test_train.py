"""A run: what it leaves, best kept, damage found, the recipe. What harms it: test_survival.py."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from fintune import train
from fintune.collate import Collator
from fintune.config import Config, load_config
from fintune.errors import ConfigError
from fintune.files import read_json, read_jsonl, sha256_file
from fintune.model import Base, attach, find_base, load_base, load_tokenizer
from fintune.training import checkpoint, memory
from fintune.training import train as loop
from fintune.training.rows import Order, read_train
from fintune.training.run_state import RunState
from fintune.training.train import build, fit

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    # Each line of a run's metrics collects garbage, which walks all of torch's modules: 0.2 s.
    gc.freeze()


@pytest.fixture
def config(tmp_path: Path, prepared: Path, tiny_base: Path) -> Config:
    return load_config("demo", settings(tmp_path, prepared, tiny_base))


def settings(root: Path, prepared: Path, base: Path) -> list[str]:
    values = {
        "out": root,
        "data.out": prepared,
        "model.path": base,
        "model.id": "test/tiny",
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.num_train_epochs": 1,
        "train.max_steps": STEPS,
        "train.eval_steps": 2,
        "train.save_steps": 2,
        "train.logging_steps": 1,
        "train.max_eval_samples": 6,
        "train.learning_rate": 1e-2,
        "train.precision": "fp32",
        "train.lora.lora_dropout": 0.1,
    }
    return [f"{key}={value}" for key, value in values.items()]


def adapter(config: Config) -> str:
    return sha256_file(config.run_dir / "best" / "adapter_model.safetensors")


def built(config: Config) -> RunState:
    """The run of a config, as `train` builds it."""
    base = find_base(config.model)
    config.run_dir.mkdir(parents=True)
    rows, state = read_train(config.data_dir), RunState(config, {})
    build(base, load_tokenizer(base), rows, state)
    return state


def test_updates_move_the_adapter_and_not_a_bit_of_the_base(config: Config) -> None:
    run = built(config)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    fit(run)
    for name, parameter in run.model.named_parameters():
        assert parameter.requires_grad is ("lora_" in name)
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    assert sum("lora_" in name for name in before) == 28


def test_an_update_is_the_same_however_it_is_dealt(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One micro-batch of 16 rows, or four of 4, give one gradient."""
    found: list[list[torch.Tensor]] = []

    def clip(parameters: Any, *settings: Any, **named: Any) -> torch.Tensor:
        found.append([p.grad.clone() for p in parameters if p.requires_grad])
        return torch.zeros(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    means = []
    for micro, accumulation in ((16, 1), (4, 4)):
        changed = config.train.model_copy(
            update={
                "out": tmp_path / str(micro),
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": accumulation,
                "max_steps": 1,
                "lora": config.train.lora.model_copy(update={"lora_dropout": 0.0}),
            }
        )
        run = built(config.model_copy(update={"train": changed}))
        fit(run)
        means.append(next(read_jsonl(run.folder / "metrics.jsonl"))["loss"])
    assert means[0] == pytest.approx(means[1], rel=1e-6)
    for gradient, other in zip(*found, strict=True):
        scale = max(float(gradient.norm()), 1e-6)
        assert float((gradient - other).norm()) <= 1e-5 * scale


def test_a_tracker_that_is_absent_is_said_before_any_work(config: Config) -> None:
    changed = config.train.model_copy(update={"report_to": ("clearml",)})
    with pytest.raises(ConfigError, match="clearml not installed"):
        train(config.model_copy(update={"train": changed}))
    assert not config.run_dir.exists()


def test_damage_is_found_and_named(config: Config) -> None:
    train(config)
    found = checkpoint.checkpoints(config.run_dir / "checkpoints")
    assert [path.name for path in found] == ["checkpoint-6", "checkpoint-8"]
    files = list(found[1].iterdir())
    assert len(files) == 7
    for path in files:
        whole = path.read_bytes()
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        strange = (found[0] / path.name).read_bytes() + b" "
        for damaged in (None, b"", whole[: len(whole) // 2], flipped, strange):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            reason = checkpoint.corrupt(found[1]) or ""
            # A list of another step's files names every file as changed.
            assert path.name in reason or damaged == strange and "changed" in reason
            assert checkpoint.newest_checkpoint(found[1].parent) == found[0]
            path.write_bytes(whole)
    assert checkpoint.corrupt(found[1]) is None


@pytest.mark.parametrize("best_at", [2, 8])
def test_the_best_evaluation_is_the_one_kept(
    best_at: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between two saves: evaluation every 2 steps, save every 4."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"save_steps": 4})})
    kept: dict[int, str] = {}
    evaluate = loop.evaluate

    def planned(run: RunState) -> None:
        step = run.at.step
        run.model.save_pretrained(config.out / f"at-{step}")
        kept[step] = sha256_file(config.out / f"at-{step}" / "adapter_model.safetensors")
        shift = 0.0 if step == best_at else 1.0 + step
        with pytest.MonkeyPatch.context() as patch:
            real = loop.sum_loss

            def shifted(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
                total, count = real(model, batch)
                return total + shift * count, count

            patch.setattr(loop, "sum_loss", shifted)
            evaluate(run)

    monkeypatch.setattr(loop, "evaluate", planned)
    train(config)
    assert read_json(config.run_dir / "best" / "best.json")["step"] == best_at
    assert adapter(config) == kept[best_at]


def test_the_published_recipe_is_what_is_configured(tmp_path: Path) -> None:
    words = ("-c", "llama-3.1-8b-finance", "-s", f"out={tmp_path}")
    plan = tiny.answer_json("plan", *words)
    expected = {
        "num_train_epochs": 5,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "optim": "paged_adamw_8bit",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # transformers 5: below 1 it is the share of all steps
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "eval_steps": 50,
        "save_steps": 100,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "bf16": True,
        "activation_checkpointing": True,
        "train_sampling_strategy": "group_by_length",
    }
    assert {key: plan["training_arguments"][key] for key in expected} == expected
    lora = plan["lora_config"]
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"], lora["bias"]) == (
        64,
        128,
        0.1,
        "none",
    )
    assert lora["target_modules"] == [*tiny.SEVEN_PROJECTIONS]
    assert plan["batches"]["estimated"] is True
    assert plan["batches"]["steps"] == 3125


def test_recomputing_is_decided_by_measured_memory(
    tiny_base: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_config("demo")
    base = Base("test/tiny", "x", tiny_base)
    peft = attach(load_base(base, "none", "fp32"), config.train.lora, 1)
    order = Order(config, read_train(prepared), Collator(padding_free=True, pad_token_id=0))
    for free, expected in ((10**12, False), (10**6, True)):
        monkeypatch.setattr(
            memory.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free)
        )
        assert memory.needs_checkpointing(peft, order, "fp32", config.train)[0] is expected
        assert f"{order.most_tokens:,} tokens" in capsys.readouterr().err
    before = {name: value.clone() for name, value in peft.named_parameters()}
    state = torch.random.get_rng_state()
    for on in (False, True):
        memory.try_largest(peft, order, "fp32", checkpointing=on)
    assert torch.equal(torch.random.get_rng_state(), state), "a trial leaves no trace"
    assert all(torch.equal(value, before[name]) for name, value in peft.named_parameters())
    assert all(parameter.grad is None for parameter in peft.parameters())
