"""A run: what it leaves, best kept, damage found, the recipe. What harms it: test_survival.py."""

import gc
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from fintune import attention
from fintune.collate import Collator
from fintune.config import SEVEN_PROJECTIONS, Config, load_config
from fintune.files import read_json, read_jsonl, sha256_file
from fintune.model import Base, attach, find_base, load_base, load_tokenizer
from fintune.plan import plan as planned
from fintune.training import memory, run_state, trainer
from fintune.training.rows import Order, read_train
from fintune.training.run import build, train
from fintune.training.run_state import RunState

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    # Each line of a run's metrics collects garbage, which walks all of torch's modules: 0.2 s.
    gc.freeze()


@pytest.fixture
def config(tmp_path: Path, prepared: Path, tiny_base: Path) -> Config:
    return load_config("nano", settings(tmp_path, prepared, tiny_base))


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


def losses(config: Config) -> list[dict[str, Any]]:
    keep = ("step", "loss", "grad_norm", "eval_loss")
    rows = read_jsonl(config.run_dir / "metrics.jsonl")
    return [{key: row[key] for key in keep if key in row} for row in rows]


def test_a_run_leaves_what_it_promises(config: Config) -> None:
    run = train(config)
    names = {path.name for path in run.iterdir()}
    assert {"best", "checkpoints", "metrics.jsonl", "curves.png", "done.json"} <= names
    rows = losses(config)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    evaluated = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert read_json(run / "best" / "best.json")["eval_loss"] == min(evaluated.values())
    assert evaluated[STEPS] < evaluated[2], "it learns"
    weights = load_file(run / "best" / "adapter_model.safetensors")
    ups = [name for name in weights if "lora_B" in name]
    assert len(ups) == 14
    assert all(weights[name].abs().max() > 0 for name in ups), "every trained matrix moved"
    assert read_json(run / "environment.json")["trainable_parameters"] == sum(
        tensor.numel() for tensor in weights.values()
    )
    before = adapter(config)
    train(config)
    assert adapter(config) == before, "a finished run is kept"


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
        means.append(run.losses.last[-1])
    assert means[0] == pytest.approx(means[1], rel=1e-6)
    for name, gradient in found[0].items():
        scale = max(float(gradient.norm()), 1e-6)
        assert float((gradient - found[1][name]).norm()) <= 1e-5 * scale, name


def test_one_process_takes_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would wrap the model in DataParallel, which cuts a flat batch's boundaries."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self._n_gpu))
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: setattr(self, "_n_gpu", 2))
    config = load_config("nano", [f"out={tmp_path}"])
    found = trainer.training_arguments(
        config, precision="fp32", checkpointing=False, accumulation=1
    )
    assert found.n_gpu == 1


def test_damage_is_found_and_named(config: Config, tmp_path: Path) -> None:
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
            assert path.name in (run_state.corrupt(found[1]) or "")
            assert run_state.newest_checkpoint(found[1].parent) == found[0]
            path.write_bytes(whole)
    assert run_state.corrupt(found[1]) is None
    shutil.copytree(found[0], tmp_path / "checkpoint-9")
    assert "'step': 6" in (run_state.corrupt(tmp_path / "checkpoint-9") or "")


def test_a_failing_save_never_costs_the_previous_checkpoint(tmp_path: Path) -> None:
    def write(staging: Path) -> None:
        (staging / "weights").write_text("good")

    def fail(staging: Path) -> None:
        (staging / "weights").write_text("ba")
        raise OSError(28, "No space left on device")

    run_state.save_checkpoint(tmp_path, 5, write)
    with pytest.raises(OSError, match="No space"):
        run_state.save_checkpoint(tmp_path, 10, fail)
    assert run_state.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    run_state.save_checkpoint(tmp_path, 10, write)
    run_state.rotate(tmp_path, keep=1, step=10)
    assert run_state.checkpoints(tmp_path) == [tmp_path / "checkpoint-10"]


@pytest.mark.parametrize("best_at", [2, 4, 6, 8])
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
    plan = planned(load_config("llama-3.1-8b-finance", [f"out={tmp_path}"]))
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
    assert lora["target_modules"] == [*SEVEN_PROJECTIONS]
    assert plan["batches"]["estimated"] is True
    assert plan["batches"]["steps"] == 3125


def test_recomputing_is_decided_by_measured_memory(
    tiny_base: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("nano")
    base = Base("test/tiny", "x", tiny_base)
    peft = attach(load_base(base, "none", "fp32", attention=attention.NAME), config.train.lora, 1)
    order = Order(config, read_train(prepared), Collator(padding_free=True, pad_token_id=0))
    for free, expected in ((10**12, False), (10**6, True)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        on, why = memory.estimate(config.train, peft, order, "fp32")
        assert on is expected
        assert f"{order.most_tokens:,} tokens" in why
    before = {name: value.clone() for name, value in peft.named_parameters()}
    state = torch.random.get_rng_state()
    for on in (False, True):
        memory.try_largest(peft, order, "fp32", checkpointing=on)
    assert torch.equal(torch.random.get_rng_state(), state), "a trial leaves no trace"
    assert all(torch.equal(value, before[name]) for name, value in peft.named_parameters())
    assert all(parameter.grad is None for parameter in peft.parameters())
