"""A running answer on the event loop's side, and the two formats it is told in."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fintune.serve.engine import Finish, Job
from fintune.serve.guard import error_body
from fintune.serve.wire import ApiError, Sampling

ANSWER_S = 300.0
"""Seconds an answer may take, a slow reader's pauses included."""


class Answer:
    """A job and its events, told as OpenAI's chats or completions are, whole or streamed."""

    def __init__(self, ids: list[int], asked: Sampling, limit: int, *, chat: bool) -> None:
        self._events: asyncio.Queue[tuple[str, Finish | None]] = asyncio.Queue()
        self._chat = chat
        self._usage_last = bool(asked.stream_options and asked.stream_options.include_usage)
        loop = asyncio.get_running_loop()

        def emit(text: str, finish: Finish | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone when a server stops hard
                loop.call_soon_threadsafe(self._events.put_nowait, (text, finish))

        self.job = Job(
            ids,
            asked.model == "adapter",
            limit,
            emit,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stops=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        )
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": asked.model,
        }

    async def whole(self) -> dict[str, Any]:
        """One JSON object when the answer is complete."""
        parts = [part async for part in self._pieces()]
        text, finish = "".join(piece for piece, _ in parts), parts[-1][1]
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return self._tree([_choice(said, finish)], usage=True, chunk=False)

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; an error after the first byte is an event too."""
        if self._chat:
            yield self._event({"delta": {"role": "assistant", "content": ""}}, None)
        try:
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for piece, finish in pieces:
                    if piece:
                        said = {"delta": {"content": piece}} if self._chat else {"text": piece}
                        yield self._event(said, None)
                    if finish:
                        yield self._event({"delta": {}} if self._chat else {"text": ""}, finish)
        except ApiError as error:
            yield _line(error.body)
        except TimeoutError:
            yield _line(error_body("the answer took too long", "timeout"))
        if self._usage_last:
            yield _line(self._tree([], usage=True))
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncGenerator[tuple[str, Finish | None]]:
        """Pieces of text, the last with its finish; whoever stops listening stops the job."""
        try:
            async with asyncio.timeout(ANSWER_S):
                finish: Finish | None = None
                while not finish:
                    text, finish = await self._events.get()
                    if finish == "error":
                        raise ApiError(500, "the model failed; restart the server", "server_error")
                    yield text, finish
        finally:
            self.job.cancelled = True

    def _event(self, said: dict[str, Any], finish: Finish | None) -> str:
        return _line(self._tree([_choice(said, finish)], usage=False))

    def _tree(self, choices: list[Any], *, usage: bool, chunk: bool = True) -> dict[str, Any]:
        kind = "chat.completion" + ".chunk" * chunk if self._chat else "text_completion"
        tree = {**self._head, "object": kind, "choices": choices}
        if usage:
            prompt, made = len(self.job.ids), self.job.made
            counts = {"prompt_tokens": prompt, "completion_tokens": made}
            tree["usage"] = counts | {"total_tokens": prompt + made}
        return tree


def _choice(said: dict[str, Any], finish: Finish | None) -> dict[str, Any]:
    return {"index": 0, **said, "finish_reason": finish, "logprobs": None}


def _line(tree: dict[str, Any]) -> str:
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"
