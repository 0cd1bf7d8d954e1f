"""The plan: exact parameters on the meta device, memory as autograd keeps it."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fintune import attention, memory
from fintune.cli import app
from fintune.collate import padding_free_batch
from fintune.config import load_config
from fintune.errors import ConfigError, ModelError
from fintune.kernels import pointwise
from fintune.memory import PROBE_TOKENS, model_size
from fintune.model import attach
from fintune.plan import count, dry_run, lengths, plan, read_rates
from fintune.training import lora

PUBLISHED = {
    "llama": (8_030_261_248, {}),
    "mistral": (7_248_023_552, {"vocab_size": 32768}),
    "qwen3": (8_190_735_360, {"vocab_size": 151936, "intermediate_size": 12288, "head_dim": 128,
                              "num_hidden_layers": 36}),
    "phi3": (14_659_507_200, {"vocab_size": 100352, "hidden_size": 5120, "num_hidden_layers": 40,
                              "intermediate_size": 17920, "num_attention_heads": 40,
                              "num_key_value_heads": 10, "pad_token_id": 0}),
}  # fmt: skip
"""Parameters as the model pages count them, and how the shape differs from Llama 3.1 8B's."""
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def write_shape(folder: Path, kind: str, **shape: int) -> list[str]:
    """A folder with nothing but a config.json, and the changes that name it."""
    AutoConfig.for_model(kind, **{**LLAMA, **shape}).save_pretrained(folder)
    return [f"model.path={folder}", f"model.id=test/{kind}", f"out={folder / 'run'}"]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameters_of_any_architecture_are_the_published_ones(kind: str, tmp_path: Path) -> None:
    parameters, shape = PUBLISHED[kind]
    changes = write_shape(tmp_path, kind, **shape)
    if kind == "phi3":  # q, k and v are one matrix, gate and up another
        changes.append("train.lora.target_modules=[qkv_proj,o_proj,gate_up_proj,down_proj]")
    assert count(load_config("nano", changes)).parameters == parameters


def test_the_published_recipe(tmp_path: Path) -> None:
    """Exact: 167,772,160 trained; 3,125 steps, 63 evaluations; 30 % spent on them."""
    changes = [f"out={tmp_path}", "data.max_held_out_rows=8000", "train.max_eval_samples=4000"]
    found = plan(load_config("llama-3.1-8b-finance", changes))
    assert found["adapter"]["trainable_parameters"] == 167_772_160
    assert (found["batches"]["steps"], found["rows"]["evaluations"]) == (3125, 63)
    assert any(re.match(r"(29|3\d)% of the run is evaluation", note) for note in found["notes"])
    peaks = {(s["quantization"], s["gradient_checkpointing"]): s["peak"] for s in found["settings"]}
    assert peaks["4bit", "on"] < peaks["8bit", "on"] < peaks["none", "on"] < peaks["none", "off"]
    assert found["settings"][0]["memory"]["weights"] == 2 * 8_030_261_248
    assert {gpu["gpu"]: gpu["fits"] for gpu in found["gpus"]}["H200"]


def test_the_preset_for_24_gb_fits_24_gb(tmp_path: Path) -> None:
    found = plan(load_config("llama-3.1-8b-finance-24gb", [f"out={tmp_path}"]))
    (configured,) = [setting for setting in found["settings"] if setting["configured"]]
    assert configured["quantization"] == "4bit"
    assert configured["peak"] * (1 + found["memory_band"]) < 22 * 2**30


@pytest.mark.parametrize("name", ["llama-3.1-8b-finance-24gb", "llama-3.1-8b-finance-8gpu"])
def test_presets_keep_the_published_update(name: str) -> None:
    train = load_config(name).train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 64
    assert (train.lora.r, train.lora.lora_alpha, train.lora.lora_dropout) == (64, 128, 0.1)


def test_a_model_without_data_keeps_what_the_real_one_keeps(tmp_path: Path) -> None:
    """Counted on meta and on a CPU: they differ by what is laid out otherwise on a GPU."""
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    changes = write_shape(tmp_path, "llama", **shape)
    config = load_config("nano", changes)
    planned = count(config)
    base = LlamaForCausalLM._from_config(
        AutoConfig.from_pretrained(tmp_path), attn_implementation=attention.NAME, dtype="bfloat16"
    )
    model = attach(base.requires_grad_(False), config.train.lora, seed=1)
    pointwise.fuse(model)
    lora.fuse(model)
    rows = [{"input_ids": [0] * n, "labels": [0] * n} for n in (PROBE_TOKENS, 2 * PROBE_TOKENS)]
    with torch.autocast("cpu", torch.bfloat16):
        real = model_size(model, [padding_free_batch([row]) for row in rows], 2)
    assert (planned.parameters, planned.trainable) == (real.parameters, real.trainable)
    # On a CPU attention runs in fp32 on 4 query and 2 x 2 key and value heads of 32, and its output
    # is kept twice; a dropout mask is a bit an element, where a GPU draws it again.
    attended = 2 * 32 * (4 + 2 * 2 + 4)
    masks = 3 * 128 / 8 + 352 / 8
    assert planned.saved + 3 * (attended + masks) == real.saved


def test_a_quantised_base_is_left_to_peft_and_keeps_more(tmp_path: Path) -> None:
    config = load_config("llama-3.1-8b-finance", [f"out={tmp_path}"])
    plain, packed = count(config), count(config, quantized=True)
    assert 1.3 * plain.saved < packed.saved < 2 * plain.saved
    sizes = {
        kind: memory.step_memory(size, "adamw_torch", 1000, 500, kind, checkpointing=True)
        for kind, size in (("none", plain), ("4bit", packed))
    }
    assert sizes["none"]["weights"] / sizes["4bit"]["weights"] == pytest.approx(2.8, abs=0.1)


def test_prepared_rows_are_counted(prepared: Path, tiny_base: Path) -> None:
    changes = [f"data.out={prepared}", f"model.path={tiny_base}", "model.id=test/tiny"]
    config = load_config("nano", changes)
    found = lengths(config)
    assert not found.assumed
    assert 0.05 < found.label_share < 0.95
    assert len(lengths(config, 1000, 100).train) == 1000
    assert lengths(config, 1000, 100).train.mean() == pytest.approx(100, rel=0.1)


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not on this machine"):
        count(load_config("nano", ["model.id=someone/unknown"]))
    with pytest.raises(ModelError, match="no_such_proj"):
        count(load_config("nano", ["train.lora.target_modules=[no_such_proj]"]))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match="no-such-model"):
        count(load_config("nano", [f"model.path={tmp_path}"]))
    for rate in ("A1000=1", "L4=-1", "L4=nan", "L4=inf", "L4"):
        with pytest.raises(ConfigError, match="GPU=USD"):
            read_rates([rate])
    assert read_rates(["rtx 4090=0.5"]) == {"RTX 4090": 0.5}


def test_the_command(tmp_path: Path) -> None:
    command = ["plan", "-c", "llama-3.1-8b-finance-24gb", "-s", f"out={tmp_path}", "--rows", "2000"]
    done = CliRunner().invoke(app, [*command, "--rate", "L4=1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["cheapest"] == "L4"
    (said,) = (note for note in found["notes"] if note.startswith("cheapest"))
    settings = re.findall(r"-s (\S+)", said)
    assert len(settings) == 2
    load_config("llama-3.1-8b-finance-24gb", settings)  # as a person would paste them
    assert found["rows"]["rows"] == 2000
    shown = CliRunner().invoke(app, command)
    assert "167,772,160" in shown.output
    assert max(len(line) for line in shown.stdout.splitlines() if line[:1] in "┏┃│└") <= 80


def test_a_dry_run_says_what_the_plan_says(tmp_path: Path) -> None:
    config = load_config("llama-3.1-8b-finance", [f"out={tmp_path}"])
    planned, dry = plan(config), dry_run(config)
    for part in ("base", "adapter", "rows", "batches", "flops"):
        assert dry[part] == planned[part]


def test_the_last_update_is_evaluated_too(tmp_path: Path) -> None:
    for every, expected in ((50, 4), (99, 2), (500, 1)):
        config = load_config("nano", [f"out={tmp_path}", f"train.eval_steps={every}"])
        found = plan(config, row_count=2112, mean_tokens=100)
        assert (found["batches"]["steps"], found["rows"]["evaluations"]) == (198, expected)


def test_a_base_in_parts_is_not_planned_quantised(tmp_path: Path) -> None:
    changes = [f"out={tmp_path}", "train.strategy=fsdp"]
    found = plan(load_config("llama-3.1-8b-finance", changes))
    kinds = {gpu["set"]["model.quantization"] for gpu in found["gpus"] if gpu["fits"]}
    assert kinds == {"none"}
