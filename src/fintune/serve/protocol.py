"""OpenAI's formats: request bodies, errors, and responses, whole or as server-sent events.

FastAPI validates the bodies: strict types, no unknown field, bounded numbers.
"""

import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException

from fintune.console import printable
from fintune.errors import ModelError
from fintune.example import Message
from fintune.serve.engine import StreamedRequest

MAX_TOKENS = 4096
ModelName = Literal["base", "adapter"]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Body(BaseModel):
    """Base of every body: unknown fields, other types and NaN are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A text part of a message; other kinds of part, such as images by URL, are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    def as_message(self) -> Message:
        """The message as the chat format knows it."""
        if isinstance(self.content, str):
            return Message(self.role, self.content)
        return Message(self.role, "".join(part.text for part in self.content))


class Conversation(Body):
    """Messages that end with a user's; the body of /tokenize."""

    model: ModelName = "adapter"
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)


class StreamOptions(Body):
    """`include_usage` sends the token counts last."""

    include_usage: bool = False


class SamplingRequest(Body):
    """The parameters that chat and text completions share."""

    model: ModelName
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    user: str | None = Field(None, max_length=256)


class ChatRequest(SamplingRequest, Conversation):
    """Body of /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)


class CompletionRequest(SamplingRequest):
    """Body of /v1/completions: text, or token ids."""

    prompt: str | Annotated[list[int], Field(min_length=1, max_length=1 << 17)]


class ApiError(HTTPException):
    """A refusal with its HTTP status and OpenAI's code."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message)
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        names = {"type": kind, "param": self.param, "code": self.code}
        return {"error": {"message": self.detail, **names}}


async def error_response(_: Request, error: Exception) -> JSONResponse:
    """Any exception as a response; an internal error shows no details to the client."""
    headers = getattr(error, "headers", None)
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    elif isinstance(error, HTTPException) and not isinstance(error, ApiError):
        error = ApiError(error.status_code, error.detail, "invalid_request")
    elif not isinstance(error, ApiError):
        message = error.what if isinstance(error, ModelError) else "a defect of the server"
        error = ApiError(500, message, "server_error")
    return JSONResponse(error.body(), error.status_code, headers)


def _invalid(error: RequestValidationError) -> ApiError:
    """The error of the first invalid field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", "invalid_json")
    where = printable(".".join(map(str, first["loc"][1:]))[:100])
    if where == "model" and isinstance(first.get("input"), str):
        return ApiError(404, "no such model; there are base and adapter", "model_not_found", where)
    message = printable(f"{where or 'the body'}: {first['msg']}"[:300])
    return ApiError(400, message, "invalid_value", where)


class Answer:
    """The response to a request, in the format of a chat or a text completion."""

    def __init__(self, request: StreamedRequest, body: SamplingRequest) -> None:
        self._request, self._chat = request, isinstance(body, ChatRequest)
        self._include_usage = body.stream_options.include_usage
        self._head = {"id": request.id, "created": int(time.time()), "model": body.model}

    async def whole(self, client: Request) -> dict[str, Any]:
        """The response as one JSON object, when the answer is complete or the client is gone."""
        text, finish_reason = "", None
        async with contextlib.aclosing(self._request.pieces()) as pieces:
            async for piece, reason in pieces:
                text, finish_reason = text + piece, reason
                if await client.is_disconnected():
                    break
        message = {"message": {"role": "assistant", "content": text}}
        content = message if self._chat else {"text": text}
        return self._tree(content, finish_reason) | {"usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; an error after the first byte is an event too."""
        if self._chat:
            yield _line(self._tree({"delta": {"role": "assistant", "content": ""}}, None))
        try:
            async with contextlib.aclosing(self._request.pieces()) as pieces:
                async for text, finish_reason in pieces:
                    content = {"delta": {"content": text}} if self._chat else {"text": text}
                    yield _line(self._tree(content, finish_reason))
        except ModelError as error:
            yield _line(ApiError(500, error.what, "server_error").body())
        if self._include_usage:
            last = self._tree({"delta": ""} if self._chat else {"text": ""}, None)
            yield _line(last | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _tree(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        kind = "chat.completion" if self._chat else "text_completion"
        kind += ".chunk" if "delta" in content else ""
        choice = {"index": 0, **content, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head, "object": kind, "choices": [choice]}

    def _usage(self) -> dict[str, int]:
        prompt, completion = len(self._request.prompt_ids), len(self._request.token_ids)
        total = prompt + completion
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _line(tree: dict[str, Any]) -> str:
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"
