"""Finished data and run folders over the sample rows, for tests of the evaluation."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny_release import tiny_adapter, tiny_base

from fintune import files, seal
from fintune.chat import ChatFormat
from fintune.config import Config
from fintune.example import Message
from fintune.model import Base, load_tokenizer
from fintune.sample import rows_path


def eval_config(root: Path, *, train: int = 400, test: int = 130, **settings: object) -> Config:
    """A config whose data and run are finished: sample rows, a tiny random base and adapter."""
    base = tiny_base(root / "base")
    config = Config.model_validate(
        {
            "name": "tiny",
            "out": root,
            "model": {"id": "fintune/tiny", "path": base},
            "eval": {
                "max_new_tokens": 8,
                "per_device_eval_batch_size": 64,
                "judged_items": 50,
                **settings,
            },
        }
    )
    chat = ChatFormat(load_tokenizer(Base("x", "y", base)), config.chat)
    rows = _rows(chat, train + test)
    _write(config.data_dir / "train.parquet", rows[:train])
    _write(config.data_dir / "validation.parquet", [])
    _write(config.data_dir / "test.parquet", rows[train:])
    files.write_json(config.data_dir / "manifest.json", {"rows": {"read": len(rows)}})
    seal.seal(config.data_dir, {})
    tiny_adapter(base, config.run_dir / "best")
    seal.seal(config.run_dir, {})
    return config


def _rows(chat: ChatFormat, wanted: int) -> list[dict[str, object]]:
    """Short clean sample rows, one a prompt."""
    found: dict[str, dict[str, object]] = {}
    for line in rows_path().read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
            texts = {key: str(row[key] or "").strip() for key in ("user", "assistant")}
        except (ValueError, TypeError, KeyError):
            continue
        if not all(texts.values()) or len(texts["assistant"].split()) > 4:
            continue
        messages = [Message(role, text) for role, text in texts.items()]  # type: ignore[arg-type]
        encoded = chat.encode(messages)
        if len(encoded.input_ids) > 400:
            continue
        name = files.sha256_json(texts["user"].casefold())[:16]
        found[name] = {
            "example_id": name,
            "source": "made_up_rows.jsonl",
            "group": name,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "length": len(encoded.input_ids),
        }
        if len(found) == wanted:
            break
    return list(found.values())


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
