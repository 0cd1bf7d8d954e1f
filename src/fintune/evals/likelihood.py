"""Labels by their likelihoods: every choice of a question in one forward pass.

A row is the question behind a prefix that questions share, computed once, then a tree of the
choices' tokens: a node for each way in which some choice begins, which sees the question and its
own ancestors. The last token of a choice is asked for and not read. A choice counts by the
log-probability of its tokens and of the end of the turn, as training taught it; nothing is divided
by its length.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fintune.chat import ChatFormat
from fintune.errors import ConfigError, NotFinite
from fintune.evals.grading import Item
from fintune.example import IGNORE_INDEX, Message
from fintune.generation import CACHE_TOKENS, open_batch
from fintune.kv_cache import GrowingLayer, growing_cache
from fintune.prompt_groups import PART_SHARE, PREFILL_TOKENS, SHARED_TOKENS

MOST_LOGITS = 2**27
"""Of a forward pass: 0.5 GB in fp32."""


@dataclass(frozen=True)
class Labelled:
    """A question with the choices of its answer, and the ids of each."""

    id: str
    prompt_ids: list[int]
    choices: tuple[str, ...]
    choice_ids: tuple[tuple[int, ...], ...]
    prefix: tuple[int, ...] = ()

    @property
    def own(self) -> int:
        """Tokens behind the prefix that it shares with others."""
        return len(self.prompt_ids) - len(self.prefix)


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
    for group in _by_choices(questions):
        prefixes = _prefill(model, sorted({row.prefix for row in group}))
        nodes = 1 + len(_nodes(group[0].choice_ids))
        group.sort(key=lambda row: (-row.own, row.id))
        start = 0
        while start < len(group):
            longest = group[start].own
            most = min(
                PREFILL_TOKENS // (longest + nodes),
                CACHE_TOKENS // (prefixes.width + longest + nodes),
                MOST_LOGITS // (vocabulary * nodes),
            )
            near = (row for row in group[start:] if row.own >= PART_SHARE * longest)
            rows = [*islice(near, max(1, most))]
            yield list(zip(rows, _scores(model, rows, prefixes), strict=True))
            start += len(rows)


def _by_choices(questions: Iterable[Labelled]) -> Iterator[list[Labelled]]:
    """Questions of the same choices, each with the prefix that it shares; so many that the keys
    of their prefixes fit."""
    by_choices = defaultdict[Any, list[Labelled]](list)
    for question in questions:
        by_choices[question.choice_ids].append(question)
    for every in by_choices.values():
        every.sort(key=lambda row: row.prompt_ids)
        common, runs = _common_prefix(every), defaultdict[tuple[int, ...], list[Labelled]](list)
        for _, run in groupby(every, key=lambda row: row.prompt_ids[:SHARED_TOKENS]):
            rows = list(run)
            prefix = _common_prefix(rows) if len(rows) > 1 else common
            runs[prefix] += [replace(row, prefix=prefix) for row in rows]
        group, longest, count = list[Labelled](), 0, 0
        for prefix in sorted(runs, key=lambda ids: (-len(ids), ids)):
            full = (count + 1) * longest > CACHE_TOKENS // 2
            if group and (full or len(prefix) < PART_SHARE * longest):
                yield group
                group, count = [], 0
            longest, count = longest if group else len(prefix), count + 1
            group += runs[prefix]
        yield group


def _common_prefix(rows: list[Labelled]) -> tuple[int, ...]:
    """The common prefix of prompts, less at least the last token of each."""
    return tuple(commonprefix([row.prompt_ids[:-1] for row in rows]))


class _Prefixes(NamedTuple):
    """Keys and values of prefixes, padded on the left to `width` tokens, and the row of each."""

    layers: list[GrowingLayer]
    row: dict[tuple[int, ...], int]
    width: int


@torch.inference_mode()
def _prefill(model: Any, prefixes: list[tuple[int, ...]]) -> _Prefixes:
    longest = max(map(len, prefixes))
    size = max(1, PREFILL_TOKENS // max(1, longest))
    starts = range(0, len(prefixes) if longest else 0, size)
    parts = [_prefill_part(model, prefixes[at : at + size], longest) for at in starts]
    if len(parts) > 1:
        for first, *others in zip(*parts, strict=True):
            first.join(others, longest)
    layers = parts[0] if parts else []
    return _Prefixes(layers, {ids: row for row, ids in enumerate(prefixes)}, longest)


def _prefill_part(model: Any, rows: list[tuple[int, ...]], longest: int) -> list[GrowingLayer]:
    """Keys and values of rows, padded on the left."""
    cache, left = growing_cache(), [longest - len(ids) for ids in rows]
    ids = [[0] * pad + [*own] for pad, own in zip(left, rows, strict=True)]
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in left])
    model(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=None if mask.all() else mask.to(model.device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
        past_key_values=cache,
        logits_to_keep=1,
    )
    layers: list[GrowingLayer] = cache.layers
    return layers


@torch.inference_mode()
def _scores(model: Any, rows: list[Labelled], prefixes: _Prefixes) -> list[list[float]]:
    """Log-probabilities of the choices that all rows have in common, a list a row."""
    device, choices, cache = model.device, rows[0].choice_ids, growing_cache()
    cache.layers = [
        layer.picked([prefixes.row[r.prefix] for r in rows]) for layer in prefixes.layers
    ]
    width, nodes = prefixes.width, _nodes(choices)
    tail = [node[-1] for node in nodes]
    longest = rows[0].own
    padding = [longest - row.own for row in rows]
    ids = [
        [0] * left + row.prompt_ids[len(row.prefix) :] + tail
        for left, row in zip(padding, rows, strict=True)
    ]
    places = [
        [0] * left
        + list(range(len(row.prefix), len(row.prompt_ids)))
        + [len(row.prompt_ids) + len(node) - 1 for node in nodes]
        for left, row in zip(padding, rows, strict=True)
    ]
    mask = _mask([width - len(row.prefix) for row in rows], width, longest, padding, nodes)
    logits = model(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(places, device=device),
        attention_mask=mask.to(device, model.dtype),
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
    """Every prefix of a choice that another token of it follows."""
    return sorted({choice[:size] for choice in choices for size in range(1, len(choice))})


def _mask(
    before: list[int], width: int, longest: int, padding: list[int], nodes: list[tuple[int, ...]]
) -> Tensor:
    """What is added to attention's scores, [rows, 1, queries, keys]: 0, or the least number.

    Args:
        before: padding of each row's prefix, of `width` tokens with it.
        padding: of each row's own tokens, `longest` with it.
    """
    size = longest + len(nodes)
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    seen[longest:, longest:] = torch.tensor(
        [[other == node[: len(other)] for other in nodes] for node in nodes], dtype=torch.bool
    ).view(len(nodes), len(nodes))
    whole = torch.cat([torch.ones(size, width, dtype=torch.bool), seen], 1)
    rows = whole.repeat(len(padding), 1, 1)
    for row, (first, left) in enumerate(zip(before, padding, strict=True)):
        rows[row, :, :first] = False
        rows[row, :, width : width + left] = False
        rows[row, :left, width] = True  # a query that sees nothing would be NaN
    return torch.zeros(rows.shape).masked_fill(~rows, torch.finfo(torch.float32).min)[:, None]
