"""A run: what it leaves, best kept, damage found, the recipe. What harms it: test_survival.py."""

import gc
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments

from fintune import train
from fintune.collate import Collator
from fintune.config import Config, load_config
from fintune.files import read_json, sha256_file
from fintune.model import Base, attach, find_base, load_base, load_tokenizer
from fintune.training import memory, run_state, trainer
from fintune.training.rows import Order, read_train
from fintune.training.run import build
from fintune.training.run_state import RunState

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


def built(config: Config) -> Any:
    """The trainer of a config, as `train` builds it."""
    base = find_base(config.model)
    config.run_dir.mkdir(parents=True)
    rows, state = read_train(config.data_dir), RunState(config.run_dir, {})
    return build(config, base, load_tokenizer(base), rows, state)


def test_updates_move_the_adapter_and_not_a_bit_of_the_base(config: Config) -> None:
    run = built(config)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    for name, parameter in run.model.named_parameters():
        assert parameter.requires_grad is ("lora_" in name)
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    assert sum("lora_" in name for name in before) == 28


def test_an_update_is_the_same_however_it_is_dealt(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer's own loop: one micro-batch of 16 rows, or four of 4, give one gradient."""
    found: list[dict[str, torch.Tensor]] = []

    def clip(run: Any, model: Any) -> torch.Tensor:
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        return torch.zeros(())

    monkeypatch.setattr(Trainer, "_clip_grad_norm", clip)
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
        run.train()
        means.append(run.state.log_history[0]["loss"])
    assert means[0] == pytest.approx(means[1], rel=1e-6)
    for name, gradient in found[0].items():
        scale = max(float(gradient.norm()), 1e-6)
        assert float((gradient - found[1][name]).norm()) <= 1e-5 * scale, name


def test_one_process_takes_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would wrap the model in DataParallel, which cuts a flat batch's boundaries."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self._n_gpu))
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: setattr(self, "_n_gpu", 2))
    config = load_config("demo", [f"out={tmp_path}"])
    assert trainer.training_arguments(config, "fp32", False, 1).n_gpu == 1


def test_damage_is_found_and_named(config: Config) -> None:
    train(config)
    found = run_state.checkpoints(config.run_dir / "checkpoints")
    assert [path.name for path in found] == ["checkpoint-6", "checkpoint-8"]
    files = list(found[1].iterdir())
    assert len(files) >= 9
    for path in files:
        whole = path.read_bytes()
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        strange = (found[0] / path.name).read_bytes() + b" "
        for damaged in (None, b"", whole[: len(whole) // 2], flipped, strange):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            reason = run_state.corrupt(found[1]) or ""
            # A list of another step's files names every file as changed.
            assert path.name in reason or damaged == strange and "changed" in reason
            assert run_state.newest_checkpoint(found[1].parent) == found[0]
            path.write_bytes(whole)
    assert run_state.corrupt(found[1]) is None


@pytest.mark.parametrize("best_at", [2, 8])
def test_the_best_evaluation_is_the_one_kept(
    best_at: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between two saves: evaluation every 2 steps, save every 4."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"save_steps": 4})})
    kept: dict[int, str] = {}
    evaluate = trainer.LoraTrainer.evaluate

    def planned(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        step = self.state.global_step
        self.model.save_pretrained(config.out / f"at-{step}")
        kept[step] = sha256_file(config.out / f"at-{step}" / "adapter_model.safetensors")
        shift = 0.0 if step == best_at else 1.0 + step
        with pytest.MonkeyPatch.context() as patch:
            real = trainer.sum_loss

            def shifted(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
                total, count = real(model, batch)
                return total + shift * count, count

            patch.setattr(trainer, "sum_loss", shifted)
            metrics: dict[str, float] = evaluate(self, *args, **kwargs)
        return metrics

    monkeypatch.setattr(trainer.LoraTrainer, "evaluate", planned)
    train(config)
    assert read_json(config.run_dir / "best" / "best.json")["step"] == best_at
    assert adapter(config) == kept[best_at]


def test_overridden_methods_still_have_transformers_signatures() -> None:
    """The list at the top of trainer.py, at most 8; the pinned transformers calls them so."""
    own = {name for name in vars(trainer.LoraTrainer) if callable(getattr(Trainer, name, None))}
    own -= {"__init__"}
    listed = {line.split()[0] for line in (trainer.__doc__ or "").splitlines() if "   " in line}
    assert own == listed
    assert len(own) <= 8
    for name in own:
        ours = inspect.signature(getattr(trainer.LoraTrainer, name)).parameters
        assert list(ours) == list(inspect.signature(getattr(Trainer, name)).parameters), name


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
        assert memory.needs_checkpointing(peft, order, "fp32", config.train) is expected
        assert f"{order.most_tokens:,} tokens" in capsys.readouterr().err
    before = {name: value.clone() for name, value in peft.named_parameters()}
    state = torch.random.get_rng_state()
    for on in (False, True):
        memory.try_largest(peft, order, "fp32", checkpointing=on)
    assert torch.equal(torch.random.get_rng_state(), state), "a trial leaves no trace"
    assert all(torch.equal(value, before[name]) for name, value in peft.named_parameters())
    assert all(parameter.grad is None for parameter in peft.parameters())
