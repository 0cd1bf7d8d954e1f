"""A golden run: small, seeded, its losses in a file. Only a change that says why may change it.

python tests/test_golden.py     writes tests/golden.json anew
"""

import json
import tempfile
from pathlib import Path

import pytest
import tiny_made

from fintune import load_config, prepare, train

GOLDEN = Path(__file__).with_name("golden.json")
LOSSES = ("loss", "grad_norm", "eval_loss")


def run(root: Path) -> list[dict[str, float]]:
    """Twelve updates of the tiny base on its own rows: every number that is logged."""
    changes = {
        "out": root,
        "model.path": tiny_made.base(),
        "model.id": "test/golden",
        "data.source": tiny_made.rows(),
        "data.min_tokens": 5,
        "data.validation_share": 0.125,
        "data.test_share": 0.125,
        "train.precision": "fp32",
        "train.learning_rate": 2e-3,
        "train.max_steps": 12,
        "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 2,
        "train.eval_steps": 6,
        "train.lora.lora_dropout": 0.1,
    }
    settings = load_config("demo", [f"{key}={value}" for key, value in changes.items()])
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
