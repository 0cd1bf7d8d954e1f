"""An answer on the event loop's side, in OpenAI's formats, whole or as server-sent events."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fintune.serve.engine import StreamedRequest
from fintune.serve.errors import ApiError, error_body
from fintune.serve.schemas import ChatRequest, SamplingRequest

ANSWER_S = 300.0
"""Seconds an answer may take, a slow reader's pauses included."""


class Answer:
    """A request for the engine, and its text in the format of a chat or a completion."""

    def __init__(self, ids: list[int], body: SamplingRequest, limit: int, tokenizer: Any) -> None:
        self._events: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        self._chat = isinstance(body, ChatRequest)
        self._usage_last = bool(body.stream_options and body.stream_options.include_usage)
        loop = asyncio.get_running_loop()

        def emit(text: str, finish_reason: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone when a server stops hard
                loop.call_soon_threadsafe(self._events.put_nowait, (text, finish_reason))

        name = ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12)
        self.request = StreamedRequest(
            name,
            ids,
            limit,
            adapter=body.model == "adapter",
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            emit=emit,
            tokenizer=tokenizer,
            stop_strings=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        )
        self._head = {"id": name, "created": int(time.time()), "model": body.model}

    async def whole(self) -> dict[str, Any]:
        """One JSON object when the answer is complete."""
        pieces = [piece async for piece in self._pieces()]
        text, reason = "".join(text for text, _ in pieces), pieces[-1][1]
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return self._tree([_choice(said, reason)], usage=True, chunk=False)

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; an error after the first byte is an event too."""
        if self._chat:
            yield self._event({"delta": {"role": "assistant", "content": ""}}, None)
        try:
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for text, reason in pieces:
                    if text:
                        said = {"delta": {"content": text}} if self._chat else {"text": text}
                        yield self._event(said, None)
                    if reason:
                        yield self._event({"delta": {}} if self._chat else {"text": ""}, reason)
        except ApiError as error:
            yield _line(error_body(error.detail, error.code))
        except TimeoutError:
            yield _line(error_body("the answer took too long", "timeout"))
        if self._usage_last:
            yield _line(self._tree([], usage=True))
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncGenerator[tuple[str, str | None]]:
        """Pieces of text, the last with its reason; whoever stops listening cancels the request."""
        try:
            async with asyncio.timeout(ANSWER_S):
                reason: str | None = None
                while not reason:
                    text, reason = await self._events.get()
                    if reason == "error":
                        raise ApiError(500, "the model failed; restart the server", "server_error")
                    yield text, reason
        finally:
            self.request.cancelled = True

    def _event(self, said: dict[str, Any], reason: str | None) -> str:
        return _line(self._tree([_choice(said, reason)], usage=False))

    def _tree(self, choices: list[Any], *, usage: bool, chunk: bool = True) -> dict[str, Any]:
        kind = "chat.completion" + ".chunk" * chunk if self._chat else "text_completion"
        tree = {**self._head, "object": kind, "choices": choices}
        if usage:
            prompt, made = len(self.request.prompt_ids), len(self.request.token_ids)
            counts = {"prompt_tokens": prompt, "completion_tokens": made}
            tree["usage"] = counts | {"total_tokens": prompt + made}
        return tree


def _choice(said: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **said, "finish_reason": reason, "logprobs": None}


def _line(tree: dict[str, Any]) -> str:
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"
