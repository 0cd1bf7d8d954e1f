"""A thread that answers requests by continuous batching and streams their text."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from tokenizers.decoders import DecodeStream

from fintune.chat import AnswerReader
from fintune.errors import ModelError
from fintune.generation import CACHE_TOKENS, FinishReason, Request, open_batch
from fintune.model import LoadedRelease, adapter_set, context_length

MAX_ROWS = 64
"""Rows of the running batch."""
PREFILL_TOKENS = 8192
"""Padded tokens of one prefill, during which the running rows wait."""
MAX_CONTEXT = 8192
"""Most tokens of prompt and answer, also where the base takes more."""

MAX_SCORED = 2048
"""Tokens of a text whose log-probabilities are asked for: all its logits are in memory at once."""

FAILED = "the model failed; restart the server"


class Scored(NamedTuple):
    """A token's log-probability (nats), its rank among all, and the likeliest tokens there."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


Piece = tuple[str, FinishReason | Literal["error"] | None]


@dataclass(slots=True, eq=False, kw_only=True)
class StreamedRequest(Request):
    """A request whose text is streamed to the event loop that created it.

    Attributes:
        tokenizer: of the tokenizers library, to decode.
        reader: leaves out thought and special tokens.
        stop_strings: texts that end the answer; they are not part of it.
        ignore_eos: go on behind the tokens that end an answer, as a load test asks.
    """

    tokenizer: Any
    reader: AnswerReader
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    _held: str = ""
    _stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=False))
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)

    def append(self, token: int, stop_token_ids: Collection[int]) -> None:
        """Take the next token and send the text, but an end that may begin a stop string."""
        stop_token_ids = () if self.ignore_eos else stop_token_ids
        Request.append(self, token, stop_token_ids)
        if token not in stop_token_ids:
            self._held += self.reader.feed(self._stream.step(self.tokenizer, token) or "")
        if self.finish_reason:
            self._held += self.reader.finish()
        if token not in stop_token_ids:
            ends = [at for stop in self.stop_strings if (at := self._held.find(stop)) >= 0]
            if ends:
                self._held, self.finish_reason = self._held[: min(ends)], "stop"
        kept = 0 if self.finish_reason else max(map(len, self.stop_strings), default=1) - 1
        end = max(0, len(self._held) - kept)
        text, self._held = self._held[:end], self._held[end:]
        if text or self.finish_reason:
            self.send(text, self.finish_reason)

    def send(self, *piece: Any) -> None:
        """Send text and finish reason (or None) to the event loop; callable from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is gone when a server stops hard
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def pieces(self) -> AsyncGenerator[tuple[str, str | None]]:
        """Pieces of text, the last with its finish reason; closing the generator cancels.

        Raises:
            ModelError: the model failed.
        """
        try:
            finish_reason: str | None = None
            while not finish_reason:
                text, finish_reason = await self._pieces.get()
                if finish_reason == "error":
                    raise ModelError(FAILED)
                yield text, finish_reason
        finally:
            self.cancelled = True


class Engine:
    """Answers requests on a background thread, the only one that uses the model.

    Attributes:
        closed: no request is answered any more; before `close` only when the model failed.
    """

    def __init__(self, loaded: LoadedRelease) -> None:
        self.max_context = min(context_length(loaded.model), MAX_CONTEXT)
        self._batch = open_batch(loaded.model, loaded.chat.stop_token_ids)
        self._model = loaded.model
        self._wake = threading.Condition()
        self._waiting: deque[StreamedRequest] = deque()
        self._jobs: deque[tuple[Future[list[Scored]], list[int], bool]] = deque()
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: StreamedRequest) -> None:
        """Queue a request."""
        with self._wake:
            self._waiting.append(request)
            self._wake.notify()
            if self.closed:
                request.send("", "error")

    def score(self, ids: list[int], *, adapter: bool) -> Future[list[Scored]]:
        """Queue the scoring of a text: of each of its tokens from the second on."""
        future: Future[list[Scored]] = Future()
        with self._wake:
            self._jobs.append((future, ids, adapter))
            self._wake.notify()
            if self.closed:
                self._fail()
        return future

    def _score(self, future: Future[list[Scored]], ids: list[int], adapter: bool) -> None:
        if not future.set_running_or_notify_cancel():
            return
        with torch.inference_mode(), adapter_set(self._model, adapter):
            tensor = torch.tensor([ids], device=self._model.device)
            logprobs = self._model(input_ids=tensor).logits[0, :-1].float().log_softmax(-1)
            own = logprobs.gather(-1, tensor[0, 1:, None])
            ranks = (logprobs > own).sum(-1) + 1
            values, tokens = (part.tolist() for part in logprobs.topk(20))
        rows = zip(own[:, 0].tolist(), ranks.tolist(), tokens, values, strict=True)
        future.set_result([Scored(o, r, list(zip(t, v, strict=True))) for o, r, t, v in rows])

    @property
    def load(self) -> tuple[int, int]:
        """Requests running and waiting. A finished one may still have its row for a moment."""
        return sum(not row.finish_reason for row in self._batch.requests), len(self._waiting)

    def close(self) -> None:
        """Stop after the current token; unfinished requests end with `error`."""
        with self._wake:
            self.closed = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        new: list[StreamedRequest] = []
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self.closed or self._jobs or any(self.load))
                    if self.closed:
                        return
                    new = self._admit()
                if self._jobs:
                    self._score(*self._jobs[0])
                    self._jobs.popleft()
                if new:
                    self._batch.add([*new])
                elif self._batch.requests:
                    self._batch.step()
        finally:
            # Also after an error: peft leaves its hooks registered when a forward fails.
            with self._wake:
                self.closed = True
                for request in (*self._batch.requests, *new, *self._waiting):
                    if isinstance(request, StreamedRequest) and request.finish_reason is None:
                        request.send("", "error")
                self._batch.requests, self._waiting = [], deque()
                self._fail()

    def _fail(self) -> None:
        for future, *_ in self._jobs:
            if not future.done():
                future.set_exception(ModelError(FAILED))

    def _admit(self) -> list[StreamedRequest]:
        """Take waiting requests up to MAX_ROWS, CACHE_TOKENS and PREFILL_TOKENS; cancelled ones are
        dropped. A request that alone is larger waits until nothing runs."""
        self._waiting = deque(request for request in self._waiting if not request.cancelled)
        running = len(self._batch.requests)
        lengths = [len(request.prompt_ids) for request in islice(self._waiting, MAX_ROWS - running)]
        longest = max([1, *lengths])
        free = CACHE_TOKENS // max(longest, self._batch.width) - running
        count = min(len(lengths), max(1, PREFILL_TOKENS // longest), max(free, not running))
        return [self._waiting.popleft() for _ in range(count)]
