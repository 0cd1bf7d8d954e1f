"""The plan: exact parameters on the meta device, memory as autograd keeps it."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, LlamaForCausalLM

from fintune import attention
from fintune.collate import padding_free_batch
from fintune.config import load_config
from fintune.model import attach
from fintune.plan import count
from fintune.presets import presets
from fintune.training import lora, pointwise
from fintune.training.memory import PROBE_TOKENS, model_size

PUBLISHED = {
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


def planned(preset: str, *changes: str) -> Any:
    """The JSON of `fintune plan`."""
    return tiny.answer_json("plan", "-c", preset, *(w for each in changes for w in ("-s", each)))


KINDS = {"meta-llama/": "llama", "Smol": "llama", "Qwen3": "qwen3", "gemma-3": "gemma3_text"}
"""Part of a preset's model.id -> the architecture of that base."""


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_planned_on_the_shrunk_shape_of_its_base(
    preset: str, tmp_path: Path
) -> None:
    name = load_config(preset).model.id
    kind = next((kind for part, kind in KINDS.items() if part in name), "llama")
    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    found = planned(preset, *write_shape(tmp_path, kind, **small, **heads))
    assert found["adapter"]["trainable_parameters"] > 0 and found["settings"]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameters_of_any_architecture_are_the_published_ones(kind: str, tmp_path: Path) -> None:
    parameters, shape = PUBLISHED[kind]
    changes = write_shape(tmp_path, kind, **shape)
    found = planned("demo", *changes, "train.strategy=fsdp")
    assert found["base"]["parameters"] == parameters
    settings = {setting["quantization"] for setting in found["settings"]}
    assert settings == {"none"}, "a base in parts is not planned quantized"


def test_the_published_recipe(tmp_path: Path) -> None:
    """Exact: 167,772,160 trained; 3,125 steps, 63 evaluations; 30 % spent on them."""
    changes = [f"out={tmp_path}", "data.max_held_out_rows=8000", "train.max_eval_samples=4000"]
    found = planned("llama-3.1-8b-finance", *changes)
    assert found["adapter"]["trainable_parameters"] == 167_772_160
    assert (found["batches"]["steps"], found["rows"]["evaluations"]) == (3125, 63)
    assert any(re.match(r"(29|3\d)% of the run is evaluation", note) for note in found["notes"])
    peaks = {(s["quantization"], s["gradient_checkpointing"]): s["peak"] for s in found["settings"]}
    assert peaks["4bit", "on"] < peaks["8bit", "on"] < peaks["none", "on"] < peaks["none", "off"]
    memory = {s["quantization"]: s["memory"] for s in found["settings"]}  # with checkpointing
    assert memory["none"]["weights"] == 2 * 8_030_261_248
    assert memory["none"]["weights"] / memory["4bit"]["weights"] == pytest.approx(2.8, abs=0.1)
    # A quantized base is left to peft, which keeps more.
    kept = [s["memory"]["activations"] for s in found["settings"] if "on" not in s.values()]
    assert 1.3 * kept[0] < kept[1] == kept[2] < 2 * kept[0]
    assert {gpu["gpu"]: gpu["fits"] for gpu in found["gpus"]}["H200"]
    assert not list(tmp_path.iterdir())


def test_the_preset_for_24_gb_fits_24_gb(tmp_path: Path) -> None:
    found = planned("llama-3.1-8b-finance-24gb", f"out={tmp_path}")
    (configured,) = [setting for setting in found["settings"] if setting["configured"]]
    assert configured["quantization"] == "4bit"
    assert configured["peak"] * (1 + found["memory_band"]) < 22 * 2**30
    # What is said of a GPU can be given as it is.
    (l4,) = [gpu for gpu in found["gpus"] if gpu["gpu"] == "L4"]
    load_config("llama-3.1-8b-finance", [f"{key}={value}" for key, value in l4["set"].items()])


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
    config = load_config("demo", [*changes, "train.lora.lora_dropout=0.05"])
    planned = count(config)[0]["none"]
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
    # On a CPU attention in bf16 does not keep its output and fp32 sums of 4 heads of 32, as flash
    # attention does. Without bf16 it runs in fp32 on 4 query and 2 x 2 key and value heads, and its
    # output is kept twice. A dropout mask is a bit an element, where a GPU draws it again.
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    attended = -(2 * 32 * 4 + 4 * 4) if has_bf16 else 2 * 32 * (4 + 2 * 2 + 4)
    masks = 3 * 128 / 8 + 352 / 8
    assert planned.saved + 3 * (attended + masks) == real.saved


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.id=someone/unknown", "not on this machine"),
        ("train.lora.target_modules=[no_such_proj]", "no_such_proj"),
        ("model.path={}", "no-such-model"),
    ],
)
def test_what_cannot_be_planned_is_said(change: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    words = ("-s", f"model.path={tiny.base()}") if "lora" in change else ()
    said = tiny.fintune("plan", "-c", "demo", *words, "-s", change.format(tmp_path))
    assert (said.code, says in said.err, "Traceback" in said.err) == (1, True, False), said.err


def test_the_tables(tmp_path: Path) -> None:
    """100 steps of 4 rows, of those on disk, evaluated after 50 steps twice."""
    changes = [f"out={tmp_path}", f"model.path={tiny.base()}", "data.max_train_rows=400"]
    changes += ["train.eval_steps=50", "train.learning_rate=0.002"]
    said = tiny.done("plan", "-c", "demo", *(w for each in changes for w in ("-s", each)))
    rows = [[cell.strip() for cell in line.split("│")] for line in said.out.splitlines()]
    facts = {row[1]: row[2] for row in rows if len(row) > 3}
    assert (facts["trainable parameters"], facts["steps"], facts["evaluations"]) == (
        "59,392", "100", "2",
    )  # fmt: skip
    assert (facts["learning_rate"], facts["lora alpha"], facts["H100"]) == ("0.002", "32", "none")
    assert re.search(r"400 training rows \(of [\d,]+ on disk\) of 2", said.err)


def test_this_machine_has_a_line_and_times_have_a_unit_that_fits(tmp_path: Path) -> None:
    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    changes = write_shape(tmp_path / "b", "llama", **small, **heads)
    found = planned("smollm2-135m", *changes)["machine"]
    assert found["device"] == "cpu" and found["threads"] >= 1 and found["gflops"] > 0
    less, more = found["hours"]
    assert 0 < less < more < 10
    words = (word for each in changes for word in ("-s", each))
    told = tiny.done("plan", "-c", "smollm2-135m", *words)
    assert re.search(
        r"this machine \(cpu, [\d,]+ GFLOP/s in (bf16|fp32), .*\): .* (s|min)\n", told.out
    )
    assert "e-0" not in told.out.split("one GPU, one process")[1]
