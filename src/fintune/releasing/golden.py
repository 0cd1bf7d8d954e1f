"""Golden prompts (`prompt_fixture.json`): conversations with exact prompt, ids, labels and answers.

They travel with the adapter, so that any server can be held against what was trained: the same
base gets different prompts from different servers (a second BOS, a missing date block, another
template), and the adapter then answers a question it was never taught.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fintune.example import Message
from fintune.files import read_json
from fintune.generation import Request, generate
from fintune.model import LoadedRelease
from fintune.untrusted.checks import Check

ANSWER_TOKENS = 24
"""Length of a recorded answer: long enough to part two prompts, short enough for a laptop."""
ATOL = {"fp32": 1e-3, "bf16": 0.5, "fp16": 0.1}
"""Largest difference of a log-probability (nats) that the rounding of a precision explains."""
MEAN_SHARE = 0.2
"""Share of `ATOL` that the mean difference may reach. Rounding is large at a few tokens; other
weights are off at all of them, also where a release names a coarse precision as its own."""

CONVERSATIONS: dict[str, list[Message]] = {
    name: [Message(**turn) for turn in turns]
    for name, turns in read_json(Path(__file__).with_name("golden_prompts.json")).items()
}
"""`control` spells control tokens in a user's text: here they are plain characters, while a server
that tokenises the rendered prompt reads them as control tokens. It is compared, and reported."""


def make_golden_prompts(loaded: LoadedRelease) -> dict[str, Any]:
    """The golden prompts of a template, tokenizer and adapter, with greedy answers."""
    chat = loaded.chat
    prompts = {name: chat.prompt_ids(messages) for name, messages in CONVERSATIONS.items()}
    requests = [Request(name, ids, ANSWER_TOKENS) for name, ids in prompts.items()]
    stops = loaded.stop_token_ids
    list(generate(loaded.model, chat.tokenizer, requests, stop_token_ids=stops, batch_size=1))
    conversations = []
    for request in requests:
        logprobs, _ = _likelihood(loaded.model, request.prompt_ids, request.token_ids)
        answer = {
            "ids": request.token_ids,
            "logprobs": [round(value, 4) for value in logprobs.tolist()],
            "text": chat.tokenizer.decode(request.token_ids, skip_special_tokens=True),
        }
        recorded = chat.recorded(CONVERSATIONS[request.id])
        conversations.append({"name": request.id, **recorded, "answer": answer})
    return {
        "template_sha256": chat.template_sha256,
        "date_string": chat.date_string,
        "end_token_ids": stops,
        "decoding": {"greedy": True, "max_new_tokens": ANSWER_TOKENS, "dtype": loaded.dtype},
        "conversations": conversations,
    }


def check_answers(golden: dict[str, Any], model: Any, dtype: str) -> Check:
    """Each recorded greedy token is still the most likely one, as likely as it was, up to rounding.

    One forward pass a conversation over prompt and recorded answer, compared position by position
    within `ATOL` of the coarser precision. Likelihoods are compared too: weights that overflow give
    equal logits everywhere, and then any token is a most likely one.
    """
    atol = max(ATOL[dtype], ATOL[golden["decoding"]["dtype"]])
    found = []
    for row in golden["conversations"]:
        answer = row["answer"]
        logprobs, best = _likelihood(model, row["prompt_ids"], answer["ids"])
        gaps = (best - logprobs).maximum((logprobs - torch.tensor(answer["logprobs"])).abs())
        # NaN compares false with everything, so ask whether all are within, not whether any is out.
        if not bool((gaps <= atol).all()):
            at = int((~(gaps <= atol)).nonzero()[0])
            return Check("answers", "failed", f"{row['name']}: another answer from token {at + 1}")
        found.append(gaps)
    every = torch.cat(found)
    mean, limit = float(every.mean()), MEAN_SHARE * atol
    if mean > limit:
        said = f"log-probabilities differ by {mean:.1e} in the mean (limit {limit:.1e})"
        return Check("answers", "failed", said)
    gaps_said = f"largest gap {float(every.max()):.1e}, mean {mean:.1e}"
    return Check("answers", "ok", f"{len(every)} greedy tokens reproduced ({gaps_said})")


def _likelihood(model: Any, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token, and that of the most likely token there; [answer]."""
    ids = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().cpu()
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0], logprobs.max(-1).values
