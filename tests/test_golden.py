"""A golden run: small, seeded, its losses in a file. Only a change that says why may change it.

python tests/test_golden.py     writes tests/golden.json anew
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fintune import load_config, prepare, train

NANO = Path(__file__).parents[1] / "src" / "fintune" / "nano"
GOLDEN = Path(__file__).with_name("golden.json")
LOSSES = ("loss", "grad_norm", "eval_loss")


def run(root: Path) -> list[dict[str, float]]:
    """Twelve updates of a 0.2 M parameter Llama on bundled rows: every number that is logged."""
    base = root / "base"
    config = LlamaConfig.from_pretrained(NANO / "base")
    config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base)
    for path in (NANO / "base").glob("*"):
        if "token" in path.name or path.suffix == ".jinja":
            (base / path.name).write_bytes(path.read_bytes())
    lines = (NANO / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "rows.jsonl").write_text("".join(lines[:200]), encoding="utf-8")
    changes = {
        "out": root,
        "model.path": base,
        "model.id": "test/golden",
        "data.source": root / "rows.jsonl",
        "train.precision": "fp32",
        "train.max_steps": 12,
        "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 2,
        "train.eval_steps": 6,
        "train.logging_steps": 1,
        "train.lora.lora_dropout": 0.1,
    }
    settings = load_config("nano", [f"{key}={value}" for key, value in changes.items()])
    prepare(settings)
    train(settings)
    lines = (settings.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{key: row[key] for key in ("step", *LOSSES) if key in row} for row in rows]


def test_the_golden_run_is_as_it_was(tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))["metrics"]
    found = run(tmp_path)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for now, then in zip(found, expected, strict=True):
        for key in then:
            # CPUs sum in other orders; anything larger is another calculation.
            assert now[key] == pytest.approx(then[key], rel=1e-4), (now["step"], key)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps({"format": 1, "metrics": run(Path(folder))}, indent=1) + "\n")
