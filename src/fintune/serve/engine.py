"""A thread that answers requests in one continuous batch, and streams their text."""

import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers.decoders import DecodeStream

from fintune.generation import Batch, FinishReason, Request
from fintune.model import LoadedRelease

MAX_ROWS = 64
"""Rows of the running batch."""
MAX_WAITING = 256
"""Requests that may wait; one more is told to come back (429)."""
PREFILL_TOKENS = 8192
"""Padded tokens prefilled at once: what running rows may have to wait for."""
MAX_CONTEXT = 8192
"""Most tokens of prompt and answer served here, also where the base could take more: one process
keeps every request's keys and values, and longer loads belong to vLLM."""

Emit = Callable[[str, FinishReason | Literal["error"] | None], None]


@dataclass(slots=True, eq=False, kw_only=True)
class StreamedRequest(Request):
    """A request whose text is sent while it is made.

    `emit(text, finish_reason)` is called on the engine's thread: with pieces of text, and last
    with the reason.

    Attributes:
        stop_strings: texts that end the answer, and are no part of it.
    """

    emit: Emit
    tokenizer: Any
    stop_strings: tuple[str, ...] = ()
    _held: str = ""
    _stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))

    def append(self, token: int, stop_token_ids: Collection[int]) -> None:
        """Take the next token and emit the text that can no longer become a stop string."""
        Request.append(self, token, stop_token_ids)
        if token not in stop_token_ids:
            self._held += self._stream.step(self.tokenizer, token) or ""
            found = [at for stop in self.stop_strings if (at := self._held.find(stop)) >= 0]
            if found:
                self._held, self.finish_reason = self._held[: min(found)], "stop"
        keep = 0 if self.finish_reason else _stop_prefix(self._held, self.stop_strings)
        text, self._held = self._held[: len(self._held) - keep], self._held[-keep:] * bool(keep)
        if text or self.finish_reason:
            self.emit(text, self.finish_reason)


def _stop_prefix(text: str, stop_strings: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that could be the beginning of a stop string."""
    longest = max((len(stop) for stop in stop_strings), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stop_strings):
            return size
    return 0


def max_context(loaded: LoadedRelease) -> int:
    """Most tokens of a prompt and its answer."""
    return min(int(loaded.model.config.max_position_embeddings), MAX_CONTEXT)


class QueueFull(Exception):
    """More requests wait than `MAX_WAITING`."""


class Engine:
    """Answers requests on a thread of its own, which alone uses the model, until `close`."""

    def __init__(self, loaded: LoadedRelease) -> None:
        self._batch = Batch(loaded.model, loaded.stop_token_ids)
        self._wake = threading.Condition()
        self._waiting: deque[StreamedRequest] = deque()
        self._closed = False
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: StreamedRequest) -> None:
        """Queue a request. Raises QueueFull."""
        with self._wake:
            if len(self._waiting) >= MAX_WAITING:
                # Clients that hung up hold no place.
                self._waiting = deque(r for r in self._waiting if not r.cancelled)
            if len(self._waiting) >= MAX_WAITING:
                raise QueueFull
            self._waiting.append(request)
            self._wake.notify()

    @property
    def load(self) -> tuple[int, int]:
        """Requests running and waiting."""
        return len(self._batch.requests), len(self._waiting)

    def close(self) -> None:
        """Stop after the current token; unfinished requests end with `error`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        new: list[Request] = []
        try:
            while True:
                with self._wake:
                    while not (self._closed or self._waiting or self._batch.requests):
                        self._wake.wait()
                    if self._closed:
                        return
                    new = self._admit()
                if new:
                    self._batch.add(new)
                elif self._batch.requests:
                    self._batch.step()
        except Exception:
            # peft leaves its hooks behind when a forward fails, so this model must not go on.
            self.failed = True
            raise
        finally:
            with self._wake:
                for request in [*self._batch.requests, *new, *self._waiting]:
                    if isinstance(request, StreamedRequest) and request.finish_reason is None:
                        request.emit("", "error")
                self._batch.requests, self._waiting, self._closed = [], deque(), True

    def _admit(self) -> list[Request]:
        """Take waiting requests as far as rows and prefill tokens allow; cancelled ones vanish."""
        new: list[Request] = []
        width = 0
        while self._waiting and len(self._batch.requests) + len(new) < MAX_ROWS:
            request = self._waiting[0]
            width = max(width, len(request.prompt_ids))
            if new and width * (len(new) + 1) > PREFILL_TOKENS:
                break
            self._waiting.popleft()
            if not request.cancelled:
                new.append(request)
        return new
