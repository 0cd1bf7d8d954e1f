"""`prompt_fixture.json`: conversations with the exact prompt, ids, labels and greedy answers.

It travels with the adapter, so that any server can be held against what was trained: the same
base gets different prompts from different servers (a second BOS, a missing date block, another
template), and the adapter then answers a question it was never taught.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fintune.chat import ChatFormat
from fintune.example import Message
from fintune.files import read_json
from fintune.untrusted.checks import FIXTURE, Check

ANSWER_TOKENS = 24
"""Length of a recorded answer: long enough to part two prompts, short enough for a laptop."""
TIE = {"fp32": 1e-3, "bf16": 0.5, "fp16": 0.1}
"""How far log-probabilities may lie apart: the rounding of each precision."""

CONVERSATIONS: dict[str, list[Message]] = {
    name: [Message(**turn) for turn in turns]
    for name, turns in read_json(Path(__file__).with_name("conversations.json")).items()
}
"""`control` spells control tokens in a user's text: here they are plain characters, while a server
that tokenises the rendered prompt reads them as control tokens. It is compared, and reported."""


def make_fixture(chat: ChatFormat, model: Any, ends: list[int], dtype: str) -> dict[str, Any]:
    """The fixture of a template, tokenizer and adapter.

    Args:
        model: base with adapter, ready for inference.
        ends: token ids that end an answer.
        dtype: precision of `model`, a key of `TIE`.
    """
    return {
        "template_sha256": chat.template_sha256,
        "date_string": chat.date_string,
        "end_token_ids": ends,
        "decoding": {"greedy": True, "max_new_tokens": ANSWER_TOKENS, "dtype": dtype},
        "conversations": [
            {"name": name, **chat.recorded(messages)}
            | {"answer": _answer(chat, model, chat.prompt_ids(messages), ends)}
            for name, messages in CONVERSATIONS.items()
        ],
    }


def read_fixture(folder: Path) -> dict[str, Any] | None:
    """A release's fixture, or None where it has none."""
    return read_json(folder / FIXTURE) if (folder / FIXTURE).is_file() else None


def check_answers(fixture: dict[str, Any], model: Any, dtype: str) -> Iterator[Check]:
    """Each recorded greedy token is still the most likely one, as likely as it was, up to rounding.

    One forward pass a conversation over prompt and recorded answer, compared position by position
    within `TIE` of the coarser precision. Likelihoods are compared too: weights that overflow give
    equal logits everywhere, and then any token is a most likely one.
    """
    tie = max(TIE[dtype], TIE[fixture["decoding"]["dtype"]])
    worst, tokens = 0.0, 0
    for row in fixture["conversations"]:
        answer = row["answer"]
        logprobs, best = _likelihood(model, row["prompt_ids"], answer["ids"])
        gaps = (best - logprobs).maximum((logprobs - torch.tensor(answer["logprobs"])).abs())
        # NaN compares false with everything, so ask whether all are within, not whether any is out.
        if not bool((gaps <= tie).all()):
            at = int((~(gaps <= tie)).nonzero()[0])
            yield Check("answers", "failed", f"{row['name']}: another answer from token {at + 1}")
            return
        worst, tokens = max(worst, float(gaps.max())), tokens + len(answer["ids"])
    yield Check("answers", "ok", f"{tokens} greedy tokens reproduced (largest gap {worst:.1e})")


def _likelihood(model: Any, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token, and that of the most likely token there; [answer]."""
    ids = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().cpu()
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0], logprobs.max(-1).values


def _answer(chat: ChatFormat, model: Any, prompt: list[int], ends: list[int]) -> dict[str, Any]:
    """Greedy tokens by transformers' own `generate`: what the world outside would get."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            repetition_penalty=1.0,
            max_new_tokens=ANSWER_TOKENS,
            eos_token_id=ends,
            pad_token_id=chat.tokenizer.pad_token_id,
        )
    made = out[0, len(prompt) :].tolist()
    logprobs, _ = _likelihood(model, prompt, made)
    return {
        "ids": made,
        "logprobs": [round(value, 4) for value in logprobs.tolist()],
        "text": chat.tokenizer.decode(made, skip_special_tokens=True),
    }
