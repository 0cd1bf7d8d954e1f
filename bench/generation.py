"""Generation: our batched loop against the one-by-one `generate` of the seed's snippet.

The nano base, fp32, greedy, at most 64 new tokens: both times, the ratio and how many answers are
the same, token for token.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from fintune import model, nano  # noqa: E402
from fintune.chat import ChatFormat  # noqa: E402
from fintune.config import Config  # noqa: E402
from fintune.example import Message  # noqa: E402
from fintune.generation import Request, generate  # noqa: E402

LIMIT, BATCH = 64, 64


def generation(count: int = 300) -> dict[str, Any]:
    """Time both on the same prompts."""
    torch.set_num_threads(2)
    config = Config()
    base = model.find_base(config.model)
    tokenizer = model.load_tokenizer(base)
    loaded = model.load_base(base, "none", "fp32").eval()
    chat = ChatFormat(tokenizer, config.chat.date_string)
    prompts = _prompts(chat, count)
    ends = model.end_token_ids(base, tokenizer)
    warm = [Request("", prompts[0].prompt_ids, 4)]
    list(generate(loaded, tokenizer, warm, stop_token_ids=ends, batch_size=1))

    start = time.perf_counter()
    ours: dict[str, list[int]] = {}
    for part in generate(loaded, tokenizer, prompts, stop_token_ids=ends, batch_size=BATCH):
        ours |= {answer.id: answer.token_ids for answer in part}
    batched = time.perf_counter() - start

    start, same = time.perf_counter(), 0
    for prompt in prompts:
        ids = torch.tensor([prompt.prompt_ids])
        out = loaded.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LIMIT,
            do_sample=False,
        )
        same += out[0, ids.shape[1] :].tolist() == ours[prompt.id]
    single = time.perf_counter() - start
    tokens = sum(map(len, ours.values()))
    return {
        "answers": count,
        "tokens": tokens,
        "batched_seconds": round(batched, 1),
        "one_by_one_seconds": round(single, 1),
        "ratio": round(single / batched, 1),
        "the_same_answers": same,
    }


def _prompts(chat: ChatFormat, count: int) -> list[Request]:
    found: dict[str, Request] = {}
    for line in nano.rows_path().read_text(encoding="utf-8").split("\n"):
        try:
            text = json.loads(line)["user"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        ids = chat.prompt_ids([Message("user", text)])
        if len(ids) < 500:
            found.setdefault(text, Request(str(len(found)), ids, LIMIT))
        if len(found) == count:
            break
    return list(found.values())
