"""Labels by their likelihoods: every choice of a question in one forward pass.

A row is the question behind the beginning that questions share, then a tree of the choices' tokens:
a node for each way in which some choice begins, which sees the question and its own ancestors. The
last token of a choice is asked for and not read. A choice counts by the log-probability of its
tokens and of the end of the turn, as training taught it; nothing is divided by its length.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fintune.chat import ChatFormat
from fintune.errors import ConfigError, NotFinite
from fintune.evals.grading import Item
from fintune.example import IGNORE_INDEX, Message
from fintune.generation import PREFILL_TOKENS, by_beginning, of_like_lengths, open_batch
from fintune.kv_cache import growing_cache

MOST_LOGITS = 2**27
"""Of a forward pass: 0.5 GB in fp32."""


@dataclass(frozen=True)
class Labelled:
    """A question with the choices of its answer, and the ids of each."""

    id: str
    prompt_ids: list[int]
    choices: tuple[str, ...]
    choice_ids: tuple[tuple[int, ...], ...]


def choice_ids(
    chat: ChatFormat, messages: Sequence[Message], choices: Iterable[str]
) -> tuple[tuple[int, ...], ...]:
    """Ids of each choice as the answer to a question, with the end of the turn."""
    start = len(chat.prompt_ids(messages))
    found = []
    for choice in choices:
        made = chat.encode([*messages, Message("assistant", choice)])
        answer = zip(made.input_ids[start:], made.labels[start:], strict=True)
        found.append(tuple(token for token, label in answer if label != IGNORE_INDEX))
    return tuple(found)


def with_choices(
    chat: ChatFormat, prompts: Iterable[tuple[Item, list[int]]]
) -> dict[str, Labelled]:
    """The questions of which the likeliest choice is the answer, by id of their item."""
    known: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
    found = {}
    for item, ids in prompts:
        if item.kind == "label" and (choices := tuple(item.choices)):
            if choices not in known:
                known[choices] = choice_ids(chat, item.messages, choices)
            found[item.id] = Labelled(item.id, ids, choices, known[choices])
    return found


def log_likelihoods(
    model: Any, questions: Iterable[Labelled]
) -> Iterator[list[tuple[Labelled, list[float]]]]:
    """Yield questions with the log-probability of each choice, in nats.

    Raises:
        ConfigError: the base's keys cannot be shared by several answers.
        NotFinite: a log-probability.
    """
    if not open_batch(model, ()).sharing:
        what = "eval.label_scoring=likelihood: this base keeps a window or a state, not all keys"
        raise ConfigError(what, fix="--set eval.label_scoring=generate")
    vocabulary = model.get_output_embeddings().weight.shape[0]
    for group in by_beginning(questions, lambda question: question.choice_ids):
        nodes = len(_nodes(group[0].choice_ids))
        shared = list(commonprefix([each.prompt_ids[:-1] for each in group]))
        begun = _begin(model, shared)
        for part in of_like_lengths(list(group), len(shared)):
            most = PREFILL_TOKENS // (len(part[0].prompt_ids) - len(shared) + nodes)
            size = max(1, min(most, MOST_LOGITS // (vocabulary * (1 + nodes))))
            for start in range(0, len(part), size):
                rows = part[start : start + size]
                yield list(zip(rows, _scores(model, rows, shared, begun), strict=True))


@torch.inference_mode()
def _begin(model: Any, shared: list[int]) -> Cache:
    """Keys and values of what the questions of a group begin with, one row."""
    cache = growing_cache()
    if shared:
        ids = torch.tensor([shared], device=model.device)
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def _scores(model: Any, rows: list[Labelled], shared: list[int], begun: Cache) -> list[list[float]]:
    """Log-probabilities of the choices that all rows have in common, a list a row."""
    device, choices, cache = model.device, rows[0].choice_ids, growing_cache()
    cache.layers = [layer.repeated(len(rows)) for layer in begun.layers]
    nodes = _nodes(choices)
    ends = [row.prompt_ids[len(shared) :] for row in rows]
    longest = max(map(len, ends))
    padding = [longest - len(ids) for ids in ends]
    tail = [node[-1] for node in nodes]
    ids = [[0] * left + end + tail for left, end in zip(padding, ends, strict=True)]
    places = [
        [0] * left
        + list(range(len(shared), len(row.prompt_ids)))
        + [len(row.prompt_ids) + len(node) - 1 for node in nodes]
        for left, row in zip(padding, rows, strict=True)
    ]
    logits = model(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(places, device=device),
        attention_mask=_mask(len(shared), longest, padding, nodes).to(device, model.dtype),
        past_key_values=cache,
        logits_to_keep=len(nodes) + 1,
    ).logits
    likely = logits.log_softmax(-1, dtype=torch.float32)
    # Logits of the question's last token come first, then those of each node.
    at = {node: number for number, node in enumerate([(), *nodes])}
    before = [at[choice[:place]] for choice in choices for place in range(len(choice))]
    each = likely[:, before, [token for choice in choices for token in choice]]
    scores = torch.stack([part.sum(-1) for part in each.split(list(map(len, choices)), 1)], 1)
    if not torch.isfinite(scores).all():
        raise NotFinite("the model's logits are not finite", fix="use --set train.precision=fp32")
    found: list[list[float]] = scores.tolist()
    return found


def _nodes(choices: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    """Every beginning of a choice that another token of it follows."""
    return sorted({choice[:size] for choice in choices for size in range(1, len(choice))})


def _mask(shared: int, longest: int, padding: list[int], nodes: list[tuple[int, ...]]) -> Tensor:
    """What is added to attention's scores, [rows, 1, queries, keys]: 0, or the least number."""
    size = longest + len(nodes)
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    seen[longest:, longest:] = torch.tensor(
        [[other == node[: len(other)] for other in nodes] for node in nodes], dtype=torch.bool
    ).view(len(nodes), len(nodes))
    rows = torch.cat([torch.ones(size, shared, dtype=torch.bool), seen], 1)
    rows = rows.repeat(len(padding), 1, 1)
    for row, left in enumerate(padding):
        rows[row, :, shared : shared + left] = False
        rows[row, :left, shared] = True  # a query that sees nothing would be NaN
    return torch.zeros(rows.shape).masked_fill(~rows, torch.finfo(torch.float32).min)[:, None]
