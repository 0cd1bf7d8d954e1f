"""What the frozen tests hold the chain against: numbers of its files, kept in frozen.json.

python tests/frozen.py     writes frozen.json anew; a change of it is a line of the changelog
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tiny

FROZEN = Path(__file__).with_name("frozen.json")
LOSSES = ("loss", "grad_norm", "eval_loss")
PARTS = ("train", "validation", "test")


def frozen() -> dict[str, Any]:
    """The numbers that were kept."""
    return dict(json.loads(FROZEN.read_text(encoding="utf-8")))


def sha256(value: Any) -> str:
    """Hex sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def prepared(data: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a prepared file: train, validation, test or ledger."""
    return list(pq.read_table(data / f"{name}.parquet").to_pylist())


def rows_sha256(data: Path) -> str:
    """Hash of what is trained and held out: ids, labels, part and conversation of every row.

    Of the values, not of the files' bytes, which are those of a version of pyarrow.
    """
    rows = [
        [row["example_id"], name, row["input_ids"], row["labels"], row["messages"]]
        for name in PARTS
        for row in prepared(data, name)
    ]
    return sha256(sorted(rows))


def of_base() -> dict[str, str]:
    """Hashes of what the tiny base is made of; they are the same on every machine."""
    names = ("model.safetensors", "tokenizer.json", "chat_template.jinja")
    return {name: tiny.file_sha256(tiny.base() / name) for name in names}


def of_data(data: Path) -> dict[str, Any]:
    """The account of a preparation."""
    manifest = read_json(data / "manifest.json")
    keys = ("rows", "sources", "max_length", "lengths", "related", "repairs")
    return {
        "manifest": {key: manifest[key] for key in keys},
        "rows_sha256": rows_sha256(data),
        "ledger": [[row["line"], row["reason"]] for row in prepared(data, "ledger")],
    }


def of_metrics(run: Path) -> list[dict[str, float]]:
    """Losses and gradient norms of every step."""
    rows = tiny.read_lines(run / "metrics.jsonl")
    return [{key: row[key] for key in ("step", *LOSSES) if key in row} for row in rows]


def of_results(results: dict[str, Any]) -> dict[str, Any]:
    """The decision of an evaluation and the numbers behind it."""
    accuracy = results["accuracy"]
    return {
        "verdict": results["verdict"],
        "primary": results["primary"],
        "n": results["n"],
        "accuracy": {key: accuracy[key] for key in ("base", "adapter", "gained", "lost")},
        "tasks": results["tasks"],
        "loss": {key: results["loss"][key] for key in ("base", "adapter", "rows", "tokens")},
        "keys": sorted(results),
    }


def of_release(release: Path) -> dict[str, Any]:
    """What a release holds, but for what its weights and versions change."""
    fixture = read_json(release / "prompt_fixture.json")
    rendered = ("name", "messages", "text", "prompt", "input_ids", "labels", "prompt_ids")
    conversations = [{key: row[key] for key in rendered} for row in fixture["conversations"]]
    config = read_json(release / "adapter_config.json")
    said = ("base_model_name_or_path", "bias", "inference_mode", "lora_alpha", "lora_dropout")
    said += ("peft_type", "r", "revision", "target_modules", "task_type")
    variables = fixture["chat"]["variables"]
    return {
        "files": sorted(path.name for path in release.iterdir()),
        "adapter_config": {key: config[key] for key in said},
        "prompts_sha256": sha256([fixture["template_sha256"], variables["date_string"]])
        + sha256(conversations),
        "answers": [row["answer"]["ids"] for row in fixture["conversations"]],
        "end_token_ids": fixture["end_token_ids"],
    }


def measured(chain: tiny.Chain) -> dict[str, Any]:
    """All of it."""
    return {
        "base": of_base(),
        "data": of_data(chain.data),
        "metrics": of_metrics(chain.run),
        "results": of_results(read_json(chain.eval / "test_results.json")),
        "release": of_release(chain.release),
    }


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(tiny.make_chain(Path(folder) / "tiny"))
    text = json.dumps({"format": 1, **found}, indent=1, ensure_ascii=False)
    FROZEN.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(f"{FROZEN}\n")
