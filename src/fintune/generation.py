"""Continuous batching with a key-value cache, used by evaluation, server, terminal and release.

Why not transformers' `generate`:
- A base's generation_config is not read (Llama 3.1 has do_sample=true, temperature 0.6, top_p
  0.9), so that greedy decoding is greedy.
- A row leaves the batch when its answer ends and a waiting prompt takes its place.
- Rows of base and adapter share a forward pass (peft's `adapter_names`), so that no adapter has
  to be switched on or off between requests.
- The cache grows in place; DynamicCache copies every key and value at every token.
- A prefix that the prompts of a batch share (the instruction of a task) is computed once.

Prompts are padded on the left; padding is masked out and positions count from each row's first
token, so an answer does not depend on its neighbours (in fp32; in bf16 and fp16 the order of
summation may flip a near tie). Every layer keeps all its keys. A model whose layers carry another
state than keys and values (Mamba, convolutions, linear attention) answers its rows one by one, each
with transformers' own cache.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from os.path import commonprefix
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from fintune.attention import why_padded
from fintune.chat import ChatFormat
from fintune.collate import padding_free_batch
from fintune.console import warn
from fintune.cpu import padded_size
from fintune.errors import NotFinite
from fintune.kv_cache import growing_cache
from fintune.loss import causal_model
from fintune.prompt_groups import SHARED_ROWS, by_prefix, of_few_tokens, of_like_lengths

REFILL_SHARE = 0.25
"""Share of a batch that must be free before `generate` prefills more prompts."""
SHARED_SHARE = 0.2
"""Of the tokens of a group that must be shared, or prefilling end to end is faster."""
CACHE_TOKENS = 32_768
"""Most tokens of a batch's rows, padding included: of one long prompt among many all would be as
long. 1.5 GB of keys and values of SmolLM2-135M in fp32, 4.3 GB of Llama 3.1 8B in bf16."""
_PADDED = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
"""Layers of transformers' cache that hold keys and values alone, or nothing."""

FinishReason = Literal["stop", "length"]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, how to answer it, and the answer so far.

    Attributes:
        adapter: False answers with the base of a PeftModel, in the same batch.
        temperature: 0 is greedy.
        seed: of the sampling noise of this request; None: a random one.
        token_ids: generated ids, up to and with the first stop token.
        text: of a finished answer of `generate`, without stop tokens and thought.
        in_thought: the answer ended before its thought did, so there is none.
        cancelled: may be set from any thread; the row leaves the batch at the next token.
    """

    id: str
    prompt_ids: list[int]
    max_new_tokens: int
    adapter: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    in_thought: bool = False
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    _generator: torch.Generator | None = None
    _cache: Cache | None = None

    def append(self, token: int, stop_token_ids: Collection[int]) -> None:
        """Take the next token; sets `finish_reason` when it is the last."""
        self.token_ids.append(token)
        if token in stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = "length"

    def noise(self, like: Tensor) -> Tensor:
        """The next exponential noise of this answer, [vocabulary]."""
        if self._generator is None:
            self._generator = generator = torch.Generator(device=like.device)
            generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        return torch.empty_like(like, dtype=torch.float32).exponential_(generator=self._generator)


def generate(
    model: Any,
    chat: ChatFormat,
    requests: Iterable[Request],
    *,
    batch_size: int,
    stop_token_ids: Collection[int] | None = None,
) -> Iterator[list[Request]]:
    """Answer requests; yield lists of them as they are finished.

    Prompts with a common prefix are answered together, the longest first, so that memory that does
    not suffice shows at once.

    Args:
        model: a causal language model of transformers, or a PeftModel (adapter on or off).
        chat: reads an answer from the generated tokens.
        stop_token_ids: ids that end an answer; None: those of `chat`.
        batch_size: most prompts answered at once.

    Raises:
        NotFinite: the model's logits are NaN or infinite.
    """
    waiting = by_prefix(requests, lambda request: request.adapter)
    stops = chat.stop_token_ids if stop_token_ids is None else stop_token_ids
    batch, shared = open_batch(model, stops), None
    while waiting or batch.requests:
        most = _most_rows(batch, waiting[0][0], batch_size) if waiting else 0
        if waiting and len(batch.requests) <= (1 - REFILL_SHARE) * most:
            group = waiting[0]
            if len(group) >= SHARED_ROWS and group is not shared:
                batch.share_prefix(group)
                shared = group
            free = min(most - len(batch.requests), len(group))
            done = batch.add([group.popleft() for _ in range(free)])
            if not group:
                waiting.popleft()
        else:
            done = batch.step()
        for request in done:
            request.text, request.in_thought = chat.answer(request.token_ids)
        if done:
            yield done


def _most_rows(batch: "Batch", longest: Request, batch_size: int) -> int:
    """Rows of a batch that takes this prompt, by its number and by CACHE_TOKENS."""
    width = max(batch.width, len(longest.prompt_ids)) + longest.max_new_tokens
    return max(1, min(batch_size, CACHE_TOKENS // width))


class Batch:
    """Requests that are answered together. `add` gives new rows a token, `step` every row.

    Args:
        sharing: whether a prefix that prompts share is computed once. Padding then stands behind
            it, within a row, so a base that counts a window of keys by their place cannot.
        flat: whether prompts are computed end to end, without padding.
    """

    def __init__(
        self,
        model: Any,
        stop_token_ids: Collection[int],
        *,
        sharing: bool = False,
        flat: bool = False,
    ) -> None:
        self._model, self._stop_token_ids = model, frozenset(stop_token_ids)
        self._flat = flat
        self.sharing = sharing
        self._prefix: tuple[bool, list[int]] = True, []
        self._prefix_cache: Cache | None = None  # of the last prefix, one row
        self.requests: list[Request] = []
        self._cache: Cache | None = None
        self._mask = self._last = torch.empty(0)  # [rows, tokens so far] and [rows, 1]

    @property
    def width(self) -> int:
        """Tokens of each row so far, padding included."""
        return self._mask.shape[1] if self.requests and self._mask.ndim > 1 else 0

    def add(self, new: list[Request]) -> list[Request]:
        """Prefill prompts and add them to the batch; returns those that are finished at once.

        Raises:
            NotFinite: the logits of a prompt are NaN or infinite.
        """
        with torch.inference_mode():
            shared = self._shared(new)
            parts = of_like_lengths(new, shared) if shared else [new]
            small = [rows for part in parts for rows in of_few_tokens(part, shared)]
            logits, masks, caches = zip(
                *(self._prefill(rows, shared) for rows in small), strict=True
            )
            self._join(masks, caches)
            self.requests = [*self.requests, *new]
            return self._append(torch.cat(logits))

    def _join(self, masks: Sequence[Tensor], caches: Sequence[Cache]) -> None:
        """Add rows to those of the batch, all in one copy."""
        last = [torch.zeros_like(mask[:, :1]) for mask in masks]
        if self._cache is not None:
            masks, caches = [self._mask, *masks], [self._cache, *caches]
            last = [self._last, *last]
        width = max(mask.shape[1] for mask in masks)
        self._cache = caches[0]
        if len(caches) > 1:
            for first, *others in zip(*(cache.layers for cache in caches), strict=True):
                first.join(others, width)
        self._mask = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        self._last = torch.cat(last)

    def _prefill(self, new: list[Request], shared: int) -> tuple[Tensor, Tensor, Cache]:
        """Logits of the prompts' last tokens, their mask, and the cache, padded on the left."""
        cache = growing_cache()
        prompts = [torch.tensor(request.prompt_ids[shared:]) for request in new]
        ones = [torch.ones_like(prompt) for prompt in prompts]
        padded = partial(pad_sequence, batch_first=True, padding_side="left")
        ids, mask = (padded(rows).to(self._model.device) for rows in (prompts, ones))
        if shared and self._prefix_cache is not None:
            cache.layers = [layer.repeated(len(new)) for layer in self._prefix_cache.layers]
        alike = len({request.adapter for request in new}) == 1
        if shared or not self._flat or not alike or mask.all():
            mask = pad(mask, (shared, 0), value=1)
            return self._forward(new, ids, mask, cache), mask, cache
        rows = [{"input_ids": request.prompt_ids, "labels": request.prompt_ids} for request in new]
        tokens, on_cpu = int(mask.sum()), self._model.device.type == "cpu"
        size = padded_size(tokens) if on_cpu else tokens
        batch = send_to_device(padding_free_batch(rows, size), self._model.device)
        del batch["labels"]
        last = batch["cu_seq_lens_q"][1 : len(new) + 1] - 1
        with _adapter_of_each_row(self._model, new[:1]):
            logits = self._model(
                **batch, past_key_values=cache, use_cache=True, logits_to_keep=last
            ).logits[0]
        for layer in cache.layers:
            layer.cut([len(prompt) for prompt in prompts])
        return _finite(logits), mask, cache

    def share_prefix(self, prompts: Sequence[Request]) -> None:
        """Compute the common prefix of these prompts, of which all ask for base or adapter alike;
        rows that are added later and have it are computed from there."""
        # Each prompt keeps a token of its own, of which the logits are wanted.
        shared = list(commonprefix([request.prompt_ids[:-1] for request in prompts]))
        tokens = sum(len(request.prompt_ids) for request in prompts)
        if self.sharing and len(shared) * len(prompts) >= SHARED_SHARE * tokens:
            self._prefix, self._prefix_cache = (prompts[0].adapter, shared), growing_cache()
            ids = torch.tensor([shared], device=self._model.device)
            with torch.inference_mode():
                self._forward([prompts[0]], ids, torch.ones_like(ids), self._prefix_cache)

    def _shared(self, new: list[Request]) -> int:
        """Tokens of the prefix that is computed, where every one of these rows has it."""
        adapter, known = self._prefix
        alike = (r.adapter is adapter and r.prompt_ids[: len(known)] == known for r in new)
        fits = all(len(request.prompt_ids) > len(known) for request in new)
        return len(known) if fits and all(alike) else 0

    def step(self) -> list[Request]:
        """Generate one token of every row; returns the rows that leave, finished or cancelled."""
        with torch.inference_mode():
            self._mask = pad(self._mask, (0, 1), value=1)
            logits = self._forward(self.requests, self._last, self._mask, self._cache)
            return self._append(logits)

    def _forward(self, requests: list[Request], ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits of the last position, [rows, vocabulary]."""
        # Behind a prefix, several tokens without a mask would be taken for the first ones.
        plain = ids.shape[1] in (1, mask.shape[1])
        with _adapter_of_each_row(self._model, requests):
            logits: Tensor = self._model(
                input_ids=ids,
                attention_mask=None if plain and mask.all() else mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        return _finite(logits) if ids.shape[1] > 1 else logits

    def _append(self, logits: Tensor) -> list[Request]:
        """Choose the next token of the last rows, and drop and return every complete row."""
        requests = self.requests[-len(logits) :]
        chosen = logits.argmax(-1)
        sampled = [row for row, request in enumerate(requests) if request.temperature > 0]
        if sampled:
            chosen[sampled] = sample(logits[sampled], [requests[row] for row in sampled])
        self._last[-len(logits) :, 0] = chosen
        for request, token in zip(requests, chosen.tolist(), strict=True):
            if not request.cancelled:
                request.append(token, self._stop_token_ids)
        gone = [request for request in self.requests if request.finish_reason or request.cancelled]
        if gone:
            self._drop(gone)
        return gone

    def _drop(self, gone: list[Request]) -> None:
        kept = [row for row, request in enumerate(self.requests) if request not in gone]
        self.requests = [self.requests[row] for row in kept]
        if not kept or self._cache is None:
            self._cache = None
            return
        index = torch.tensor(kept, device=self._mask.device)
        mask = self._mask[index]
        first = int((mask.cumsum(-1) == 0).sum(-1).min())  # columns of padding in every row
        self._mask, self._last = mask[:, first:], self._last[index]
        stay = next((new for new, old in enumerate(kept) if new != old), len(kept))
        for layer in self._cache.layers:
            layer.select(stay, index[stay:], first)


@contextmanager
def _adapter_of_each_row(model: Any, requests: list[Request]) -> Iterator[None]:
    """Rows without the adapter get none, as by peft's own `adapter_names`; a layer that sees the
    tokens of all rows in one dimension (in a mixture of experts) has a name for each token."""
    if all(request.adapter for request in requests):
        yield
        return
    names = [model.active_adapter if request.adapter else "__base__" for request in requests]

    def name(layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        times = len(args[0]) // len(names)
        return args, kwargs | {"adapter_names": [each for each in names for _ in range(times)]}

    layers = (
        each for each in model.modules() if isinstance(each, LoraLayer | AuxiliaryTrainingWrapper)
    )
    hooks = [layer.register_forward_pre_hook(name, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _finite(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        fix = "check the weights, or use --set train.precision=fp32"
        why = "every answer would be noise"
        raise NotFinite("the model's logits are not finite", why=why, fix=fix)
    return logits


class _RowByRow(Batch):
    """Requests whose caches cannot be padded nor joined: a forward pass each."""

    def add(self, new: list[Request]) -> list[Request]:
        """As `Batch.add`."""
        for request in new:
            request._cache = DynamicCache(config=self._model.config)
        self.requests = [*self.requests, *new]
        return self._advance(new)

    def step(self) -> list[Request]:
        """As `Batch.step`."""
        return self._advance(self.requests)

    def _advance(self, requests: list[Request]) -> list[Request]:
        self._last = torch.zeros(len(requests), 1)
        with torch.inference_mode():
            return self._append(torch.cat([self._next(request) for request in requests]))

    def _next(self, request: Request) -> Tensor:
        """Logits of a row's next token, [1, vocabulary]."""
        on, ids = self._model.device, [request.token_ids[-1:] or request.prompt_ids]
        so_far = torch.ones(1, len(request.prompt_ids + request.token_ids), dtype=torch.long)
        return self._forward([request], torch.tensor(ids, device=on), so_far.to(on), request._cache)


def open_batch(model: Any, stop_token_ids: Collection[int]) -> Batch:
    """An empty batch of the kind that a model needs.

    Args:
        stop_token_ids: ids that end an answer.
    """
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers} - _PADDED
    if not kinds:
        layers = DynamicCache(config=model.config).layers
        sharing = not any(type(layer) is DynamicSlidingWindowLayer for layer in layers)
        flat = why_padded(causal_model(model)) is None
        return Batch(model, stop_token_ids, sharing=sharing, flat=flat)
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    warn(f"answers are made one by one: the base keeps a state of another kind ({names})")
    return _RowByRow(model, stop_token_ids)


def sample(logits: Tensor, requests: list[Request]) -> Tensor:
    """Sample a token from each row of logits [rows, vocabulary]; returns [rows].

    The Gumbel-max trick with exponential noise: argmax of probability / noise. Inverse transform
    sampling needs one number per row instead, but there the rounding of another batch changed 3 of
    4,800 tokens; here it changes one only where two tokens nearly tie.
    """
    options = torch.tensor([[r.temperature, r.top_p] for r in requests], device=logits.device)
    temperature, top_p = options[:, :1], options[:, 1:]
    scores = logits.float() / temperature
    if bool((top_p < 1).any()):  # nucleus sampling, arXiv 1904.09751
        shares, order = scores.softmax(-1).sort(-1, descending=True)
        cut = shares.cumsum(-1) - shares >= top_p
        scores = scores.masked_fill(cut.gather(-1, order.argsort(-1)), float("-inf"))
    noise = torch.stack([request.noise(logits[0]) for request in requests])
    return (scores - noise.log()).argmax(-1)
