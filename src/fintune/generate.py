"""Answers: batched greedy generation with a key-value cache.

The loop is ours, not transformers' `generate`, for three reasons. Greedy means greedy: a base's
generation_config (Llama 3.1 ships do_sample=true, temperature 0.6, top_p 0.9) is not read here.
Rows that have ended leave the batch, so that one rambling answer does not hold 63 others. And the
cache grows in place: transformers' DynamicCache copies every key and value at every token.

Prompts of like length share a batch, padded on the left; padding is masked out and positions
count from each row's first token, so an answer does not depend on its neighbours (in fp32; in
bf16 and fp16 the order of summation may flip a near tie).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fintune.errors import NotFinite

GROWTH = 64
"""Tokens of room a cache layer gets at a time: one copy every 64 tokens instead of each."""
KEEP_SHARE = 0.75
"""A batch is compacted when this share of its rows, or less, is still unfinished."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to answer, under a name that the answer keeps."""

    id: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said; `finish` is `stop` (an end token) or `length` (cut at the limit)."""

    id: str
    text: str
    tokens: int
    finish: Literal["stop", "length"]


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """DynamicLayer whose keys and values are views of a buffer with room for more tokens."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, new, size] behind what is there; return views of everything."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            self._room = (
                self._grown(self.keys, key_states, end + GROWTH),
                self._grown(self.values, value_states, end + GROWTH),
            )
        for buffer, new in zip(self._room, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys: Tensor = self._room[0][:, :, :end]
        self.values: Tensor = self._room[1][:, :, :end]
        return self.keys, self.values

    @staticmethod
    def _grown(old: Tensor, new: Tensor, length: int) -> Tensor:
        buffer = new.new_empty((*new.shape[:2], length, new.shape[-1]))
        if old.numel():
            buffer[:, :, : old.shape[-2]] = old
        return buffer

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        super().batch_select_indices(indices)
        self._room = None


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[list[Answer]]:
    """Answer prompts greedily, a batch at a time, longest first; yield each batch when done.

    The longest batch comes first, so that a machine too small fails at once and not at the end.

    Args:
        model: a causal language model of transformers, or a PeftModel (adapter on or off).
        ends: token ids that end an answer (`model.end_token_ids`).
        batch_size: prompts answered at once.

    Raises:
        NotFinite: the model's logits are NaN or infinite.
    """
    order = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.id))
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        tokens = _greedy(model, [prompt.ids for prompt in batch], frozenset(ends), max_new_tokens)
        texts = tokenizer.batch_decode(
            [[token for token in row if token not in ends] for row in tokens],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        yield [
            Answer(
                prompt.id, text.strip(), len(row), "stop" if row and row[-1] in ends else "length"
            )
            for prompt, text, row in zip(batch, texts, tokens, strict=True)
        ]


def _cache(model: Any) -> DynamicCache:
    """An empty cache of the model's layer kinds, plain layers growing in place."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def _greedy(model: Any, rows: list[list[int]], ends: frozenset[int], limit: int) -> list[list[int]]:
    """Greedy continuations, each up to and with its first end token, at most `limit` long."""
    width, device = max(map(len, rows)), model.device
    padded = any(len(row) < width for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (width - len(row)) + [1] * (len(row) + limit) for row in rows], device=device
    )
    position = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
    made: list[list[int]] = [[] for _ in rows]
    active = list(range(len(rows)))  # row of the batch -> row of the result
    cache = _cache(model)
    with torch.inference_mode():
        for step in range(limit):
            logits = model(
                input_ids=ids,
                attention_mask=mask[:, : width + step] if padded else None,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if step == 0:
                _check_finite(logits)
            chosen = logits.argmax(-1)
            for row, token in zip(active, chosen.tolist(), strict=True):
                if not made[row] or made[row][-1] not in ends:
                    made[row].append(token)
            ids, position = chosen[:, None], position[:, -1:] + 1
            going = [at for at, row in enumerate(active) if made[row][-1] not in ends]
            if not going:
                break
            if len(going) <= KEEP_SHARE * len(active):
                kept = torch.tensor(going, device=device)
                ids, position, mask = ids[kept], position[kept], mask[kept]
                active = [active[at] for at in going]
                cache.batch_select_indices(kept)
    return made


def _check_finite(logits: Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise NotFinite(
            "the model's logits are not finite",
            why="every answer would be noise",
            fix="check the weights, or use --set train.precision=fp32",
        )
