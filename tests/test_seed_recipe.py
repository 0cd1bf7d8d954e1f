"""The published recipe on a Llama-3.1 shape of two layers, with the real Llama 3 tokenizer."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fintune import Config, load_config, prepare, train

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Config:
    root = tmp_path_factory.mktemp("seed-recipe")
    base = root / "base"
    shape = LlamaConfig(
        vocab_size=128_256,
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
        bos_token_id=128_000,
        eos_token_id=[128_001, 128_008, 128_009],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared / "tokenizers" / "llama3" / name, base)
    with (shared / "data" / "finance_instruct_sample.jsonl").open(encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(420), strict=False)]
    (root / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    changes = {
        "out": root,
        "model.path": base,
        "data.source": root / "rows.jsonl",
        "train.max_steps": 2,
        "data.max_length": 256,
        "train.max_eval_samples": 2,
        "train.eval_steps": 2,
        "train.save_steps": 2,
    }
    return load_config("llama-3.1-8b-finance", [f"{key}={value}" for key, value in changes.items()])


def test_two_steps_of_the_recipe(config: Config) -> None:
    manifest = prepare(config)
    rows = manifest["rows"]
    assert rows["read"] == 420
    assert rows["read"] == sum(rows[part] for part in PARTS) + sum(rows["dropped"].values())
    run = train(config)
    arguments = json.loads((run / "training_arguments.json").read_text())
    assert arguments["optim"] == "paged_adamw_8bit"
    assert arguments["activation_checkpointing"] is True
    facts = json.loads((run / "environment.json").read_text())
    assert facts["steps"] == 2
    # r (in + out) over the seven projections of two layers, r = 64
    assert facts["trainable_parameters"] == 2 * 64 * (
        2 * (64 + 64) + 2 * (64 + 16) + 3 * (64 + 224)
    )


def test_labels_on_real_rows(config: Config) -> None:
    """Prompt masked, answer and end of turn trained, by decoding; the end cut off at max_length."""
    manifest = prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    cut = 0
    for name in PARTS:
        for row in pq.read_table(config.data_dir / f"{name}.parquet").to_pylist():
            trained = tokenizer.decode([label for label in row["labels"] if label != -100])
            answers = [m["content"].strip() for m in row["messages"] if m["role"] == "assistant"]
            expected = "".join(f"{answer}<|eot_id|>" for answer in answers)
            if trained != expected:
                assert row["length"] == manifest["max_length"] and expected.startswith(trained)
                cut += 1
            assert row["input_ids"].count(128_000) == 1
            assert row["input_ids"][0] == 128_000
            assert all(
                label in (-100, token)
                for label, token in zip(row["labels"], row["input_ids"], strict=True)
            )
    assert 0 < cut <= manifest["truncated"]["rows"]
