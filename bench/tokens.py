"""Tokenise and mask the real rows: ours, or TRL's SFTTrainer on prompt/completion.

    python bench/tokens.py ours|trl FOLDER

Prints seconds as JSON; writes one number a row (a hash of its ids and labels, 0 where the row was
not kept) to FOLDER/NAME.npy, so that the two can be compared. `bench/prepare.py tokens` runs both.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "src"))

from fintune.chat import ChatFormat  # noqa: E402
from fintune.data.rows import to_messages  # noqa: E402
from fintune.data.text import hash64  # noqa: E402
from fintune.example import IGNORE, Message  # noqa: E402
from fintune.model import Base, load_tokenizer  # noqa: E402

DATE = "26 Jul 2024"
MAX_LENGTH = 2048


def conversations() -> list[tuple[Message, ...]]:
    """Every row of the sample as system, user, assistant; turns inside a text stay inside."""
    lines = (SHARED / "data" / "finance_instruct_sample.jsonl").read_bytes().split(b"\n")
    rows = [to_messages(json.loads(line), None, inline_turns=False) for line in lines if line]
    return [tuple(Message(m.role, m.content.strip()) for m in row) for row in rows]


def fingerprint(ids: list[int], labels: list[int]) -> int:
    """A number for ids and labels, never 0; rows over the length are 0 in both."""
    if len(ids) >= MAX_LENGTH or all(label == IGNORE for label in labels):
        return 0
    return hash64(str(ids), str(labels)) | 1


def ours(tokenizer: Any, rows: list[tuple[Message, ...]]) -> tuple[float, list[int]]:
    """ChatFormat.encode_many, with all its checks."""
    chat = ChatFormat(tokenizer, DATE)
    start = time.perf_counter()
    encoded = [e for at in range(0, len(rows), 512) for e in chat.encode_many(rows[at : at + 512])]
    seconds = time.perf_counter() - start
    return seconds, [fingerprint(e.input_ids, e.labels) for e in encoded]


def trl(tokenizer: Any, rows: list[tuple[Message, ...]]) -> tuple[float, list[int]]:
    """TRL's own preparation, up to ids and labels."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    def turns(messages: tuple[Message, ...]) -> list[dict[str, str]]:
        return [{"role": m.role, "content": m.content} for m in messages]

    table = Dataset.from_list(
        [
            {
                "prompt": turns(row[:-1]),
                "completion": turns(row[-1:]),
                "chat_template_kwargs": {"date_string": DATE},
            }
            for row in rows
        ]
    )
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = LlamaForCausalLM(shape).to(torch.float32)
    args = SFTConfig(
        output_dir="/tmp/trl", max_length=None, report_to=[], use_cpu=True, bf16=False,
        dataset_num_proc=None, 
    )  # fmt: skip
    start = time.perf_counter()
    trainer = SFTTrainer(model, args, train_dataset=table, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    found = []
    for row in trainer.train_dataset:
        found.append(fingerprint(list(row["input_ids"]), list(row["labels"])))
    return seconds, found


def main(name: str, folder: Path) -> None:
    """Measure one of the two in this process."""
    tokenizer = load_tokenizer(Base("llama", "", SHARED / "tokenizers" / "llama3"))
    rows = conversations()
    seconds, found = (ours if name == "ours" else trl)(tokenizer, rows)
    np.save(folder / f"{name}.npy", np.array(found, np.uint64))
    cpu = round(sum(os.times()[:2]), 2)
    facts = {"seconds": round(seconds, 2), "process_cpu_seconds": cpu, "rows": len(found)}
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
