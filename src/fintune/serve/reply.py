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
    """A running job's events, on the event loop's side."""

    def __init__(self, ids: list[int], options: Sampling, limit: int) -> None:
        self._events: asyncio.Queue[tuple[str, Finish | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(text: str, finish: Finish | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone when a server stops hard
                loop.call_soon_threadsafe(self._events.put_nowait, (text, finish))

        stops = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ())
        self.job = Job(
            ids,
            options.model == "adapter",
            limit,
            emit,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            stops=stops,
        )

    async def pieces(self) -> AsyncGenerator[tuple[str, Finish | None]]:
        """Pieces of text, the last with its finish; whoever stops listening stops the job."""
        try:
            async with asyncio.timeout(ANSWER_S):
                while True:
                    text, finish = await self._events.get()
                    if finish == "error":
                        raise ApiError(500, "the model failed; restart the server", "server_error")
                    yield text, finish
                    if finish:
                        return
        finally:
            self.job.cancelled = True

    def usage(self) -> dict[str, int]:
        """Token counts so far."""
        prompt, made = len(self.job.ids), self.job.made
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }


class Words:
    """The two reply formats, chat and completion, whole and streamed."""

    def __init__(self, model: str, chat: bool) -> None:
        self._chat = chat
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """One JSON object when the answer is complete."""
        parts = [part async for part in answer.pieces()]
        text, finish = "".join(piece for piece, _ in parts), parts[-1][1]
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": finish, "logprobs": None}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": answer.usage()}

    async def events(self, answer: Answer, usage: bool) -> AsyncIterator[str]:
        """Server-sent events; an error after the first byte is an event too."""
        if self._chat:
            yield self._event({"delta": {"role": "assistant", "content": ""}}, None)
        try:
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece, finish in pieces:
                    if piece:
                        said = {"delta": {"content": piece}} if self._chat else {"text": piece}
                        yield self._event(said, None)
                    if finish:
                        yield self._event({"delta": {}} if self._chat else {"text": ""}, finish)
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        except TimeoutError:
            yield f"data: {json.dumps(error_body('the answer took too long', 'timeout'))}\n\n"
        if usage:
            tree = {**self._head, "object": self._kind, "choices": [], "usage": answer.usage()}
            yield f"data: {json.dumps(tree)}\n\n"
        yield "data: [DONE]\n\n"

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _event(self, said: dict[str, Any], finish: Finish | None) -> str:
        choice = {"index": 0, **said, "finish_reason": finish, "logprobs": None}
        tree = {**self._head, "object": self._kind, "choices": [choice]}
        return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"
