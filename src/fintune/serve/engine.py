"""Continuous batching over one model: base and adapter rows share every forward pass.

peft's `adapter_names` chooses per row (`__base__` or the adapter), so no global switch can leak one
model's answer into another's. One thread owns the model. New prompts are prefilled together,
padded on the left, and join the running batch; a row leaves it the moment it ends, is cancelled
or reaches its limit. Positions count from each row's own first token and padding is masked, so an
answer does not depend on its neighbours.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from fintune.serve.loaded import Loaded

MAX_ROWS = 64
"""Rows of the running batch."""
MAX_WAITING = 256
"""Requests that may wait; one more is told to come back (429)."""
PREFILL_TOKENS = 8192
"""Padded tokens prefilled at once: what running rows may have to wait for."""

Finish = Literal["stop", "length", "error"]
Emit = Callable[[str, Finish | None], None]


@dataclass(slots=True, eq=False)
class Job:
    """One answer being made.

    `emit(text, finish)` is called on the engine's thread: with pieces of text, and last with the
    reason it finished. `cancelled` may be set from any thread; the row leaves at the next token.
    """

    ids: list[int]
    adapter: bool
    max_tokens: int
    emit: Emit
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    cancelled: bool = False
    made: int = 0
    _held: str = ""
    _stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))
    _random: torch.Generator | None = None

    def noise(self, like: Tensor) -> Tensor:
        """The next exponential noise of this answer, [vocabulary]: its seed's own sequence."""
        if self._random is None:
            self._random = torch.Generator(device=like.device)
            self._random.manual_seed(self.seed) if self.seed is not None else self._random.seed()
        return torch.empty_like(like, dtype=torch.float32).exponential_(generator=self._random)

    def take(self, token: int, tokenizer: Any, ends: frozenset[int]) -> bool:
        """Count one more token and emit what it adds; False when the answer is complete."""
        self.made += 1
        if token in ends:
            return self._end("stop")
        text = self._held + (self._stream.step(tokenizer, token) or "")
        cuts = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if cuts:
            self._held = text[: min(cuts)]
            return self._end("stop")
        if self.made >= self.max_tokens:
            self._held = text
            return self._end("length")
        keep = _beginning(text, self.stops)
        self._held = text[len(text) - keep :] if keep else ""
        if len(text) > keep:
            self.emit(text[: len(text) - keep], None)
        return True

    def _end(self, finish: Finish) -> bool:
        self.emit(self._held, finish)
        return False


class Busy(Exception):
    """The queue is full."""


class Engine:
    """Answers jobs on a thread of its own until `close`."""

    def __init__(self, loaded: Loaded) -> None:
        self._model = loaded.model
        self._tokenizer = loaded.chat.tokenizer.backend_tokenizer
        self._ends = frozenset(loaded.ends)
        self._adapter: str = loaded.model.active_adapter
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: list[Job] = []
        self._cache: Any = None
        self._mask = self._next = torch.empty(0)
        self._closed = False
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy when too many wait already."""
        with self._wake:
            if len(self._waiting) >= MAX_WAITING:
                # Clients that hung up hold no place.
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
            if len(self._waiting) >= MAX_WAITING:
                raise Busy
            self._waiting.append(job)
            self._wake.notify()

    @property
    def load(self) -> tuple[int, int]:
        """Rows running and jobs waiting."""
        return len(self._jobs), len(self._waiting)

    def close(self) -> None:
        """Stop after the current token; unfinished jobs end with `error`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._closed or self._waiting or self._jobs):
                        self._wake.wait()
                    if self._closed:
                        return
                    new = self._admit()
                with torch.inference_mode():
                    if new:
                        self._prefill(new)
                    elif self._jobs:
                        self._step()
        except Exception:
            # peft leaves its hooks behind when a forward fails, so this model must not go on.
            self.failed = True
            raise
        finally:
            with self._wake:
                for job in [*self._jobs, *self._waiting]:
                    job.emit("", "error")
                self._jobs, self._waiting, self._closed = [], deque(), True

    def _admit(self) -> list[Job]:
        """Take waiting jobs as far as rows and prefill tokens allow; cancelled ones vanish."""
        new: list[Job] = []
        width = 0
        while self._waiting and len(self._jobs) + len(new) < MAX_ROWS:
            job = self._waiting[0]
            width = max(width, len(job.ids))
            if new and width * (len(new) + 1) > PREFILL_TOKENS:
                break
            self._waiting.popleft()
            if not job.cancelled:
                new.append(job)
        return new

    def _prefill(self, new: list[Job]) -> None:
        width, device = max(len(job.ids) for job in new), self._model.device
        ids = torch.tensor([[0] * (width - len(j.ids)) + j.ids for j in new], device=device)
        mask = torch.tensor(
            [[0] * (width - len(j.ids)) + [1] * len(j.ids) for j in new], device=device
        )
        cache = DynamicCache()
        logits = self._forward(new, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        jobs, parts = self._jobs + new, [(self._mask, self._cache)] if self._jobs else []
        # Columns that are padding in every row go; what is left is padded to one width.
        parts = [_cropped(part, kept) for part, kept in [*parts, (mask, cache)]]
        width = max(part.shape[1] for part, _ in parts)
        self._mask = torch.cat([pad(part, (width - part.shape[1], 0)) for part, _ in parts])
        self._cache = _joined([kept for _, kept in parts], width)
        old = [self._next] if self._jobs else []
        self._jobs = jobs
        self._next = torch.cat([*old, torch.zeros_like(mask[:, :1])])
        self._advance(range(len(jobs) - len(new), len(jobs)), logits)

    def _step(self) -> None:
        self._mask = pad(self._mask, (0, 1), value=1)
        position = self._mask.sum(-1, keepdim=True) - 1
        logits = self._forward(self._jobs, self._next, self._mask, position, self._cache)
        self._advance(range(len(self._jobs)), logits)

    def _forward(
        self, jobs: list[Job], ids: Tensor, mask: Tensor, position: Tensor, cache: Any
    ) -> Tensor:
        names = [self._adapter if job.adapter else "__base__" for job in jobs]
        # peft hooks every layer at each call; a batch of the adapter alone needs none.
        mixed = {"adapter_names": names} if "__base__" in names else {}
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **mixed,
        ).logits[:, -1]
        return logits

    def _advance(self, rows: range, logits: Tensor) -> None:
        """Choose each row's next token, tell its job, and drop the rows that are complete."""
        jobs = [self._jobs[row] for row in rows]
        chosen = logits.argmax(-1)
        sampled = [at for at, job in enumerate(jobs) if job.temperature > 0]
        if sampled:
            chosen[sampled] = _sample(logits[sampled], [jobs[at] for at in sampled])
        self._next[rows.start :, 0] = chosen
        gone = set()
        for row, job, token in zip(rows, jobs, chosen.tolist(), strict=True):
            if job.cancelled or not job.take(token, self._tokenizer, self._ends):
                gone.add(row)
        if not gone:
            return
        kept = [row for row in range(len(self._jobs)) if row not in gone]
        self._jobs = [self._jobs[row] for row in kept]
        if kept:
            index = torch.tensor(kept, device=self._mask.device)
            self._mask, self._next = self._mask[index], self._next[index]
            self._cache.batch_select_indices(index)


def _sample(logits: Tensor, jobs: list[Job]) -> Tensor:
    """Sample a token from each row of [rows, vocabulary]; [rows].

    An exponential race (Gumbel-max): argmax of share / noise. A draw held against cumulated shares
    would do the same with one number a row, but the rounding of a batch then moved 3 of 4,800
    tokens across one of the thousands of borders; here two tokens must nearly tie.
    """
    options = torch.tensor([[j.temperature, j.top_p] for j in jobs], device=logits.device)
    temperature, top_p = options[:, :1], options[:, 1:]
    scores = logits.float() / temperature
    if bool((top_p < 1).any()):  # nucleus sampling, arXiv 1904.09751
        shares, order = scores.softmax(-1).sort(-1, descending=True)
        cut = shares.cumsum(-1) - shares >= top_p
        scores = scores.masked_fill(cut.gather(-1, order.argsort(-1)), float("-inf"))
    noise = torch.stack([job.noise(logits[0]) for job in jobs])
    return (scores - noise.log()).argmax(-1)


def _beginning(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that could be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0


def _cropped(mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    lead = int((mask.cumsum(-1) == 0).sum(-1).min())
    if lead:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, lead:], layer.values[:, :, lead:]
    return mask[:, lead:], cache


def _joined(caches: list[Any], width: int) -> DynamicCache:
    """One cache of all rows, each layer's [rows, heads, tokens, size] padded on the left."""
    joined = DynamicCache()
    for index in range(len(caches[0].layers)):
        pairs = [(c.layers[index].keys, c.layers[index].values) for c in caches]
        padded = [
            torch.cat([pad(t, (0, 0, width - t.shape[2], 0)) for t in side])
            for side in zip(*pairs, strict=True)
        ]
        joined.update(padded[0], padded[1], index)
    return joined
