"""OpenAI's formats: request bodies, errors, and responses, whole or as server-sent events.

FastAPI validates the bodies: strict types, no unknown field, bounded numbers.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from fintune.console import printable
from fintune.errors import ModelError
from fintune.example import Message, Role
from fintune.serve.engine import Engine, StreamedRequest

MAX_TOKENS = 4096
ModelName = Literal["base", "adapter"]
Stop = Annotated[str, Field(min_length=1, max_length=128)]


NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p"), (0,)),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("logit_bias", "metadata"), ({},)),
    **dict.fromkeys(("store", "include_obfuscation"), (False,)),
    "best_of": (1,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "top_k": (-1, 0),
}
"""Values that ask for nothing: they are left out, as every null is."""
TOOLS, PENALTIES = "this server calls no tools", "this server has no penalties and no biases"
ABSENT = {
    "response_format": "this server has no structured output",
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call"), TOOLS),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "logit_bias"), PENALTIES),
    "best_of": "one answer a prompt",
}
"""What the server lacks, in words, by the field that asks for it."""
NO_PATH = "no such path; there are /v1/chat/completions, /v1/completions, /v1/models and /tokenize"
RULES = {
    "model": "base or adapter",
    "messages": "1 to 256 messages of system, developer, user or assistant; content is a string or"
    " a list of 1 to 64 text parts; other parts, such as images, are not taken",
    "prompt": "a string, token ids, or a list of either: at most 64 prompts",
    "max_tokens": f"a whole number from 1 to {MAX_TOKENS}; 0 with echo",
    "max_completion_tokens": f"a whole number from 1 to {MAX_TOKENS}",
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0, at most 1",
    "seed": "a whole number of 64 bits",
    "stop": "a string of 1 to 128 characters, or at most 8 of them",
    "n": "one answer a prompt",
    "logprobs": "true or false in a chat; 0 to 20 in a completion",
    "top_logprobs": "0 to 20",
}
"""What a field takes."""


class Body(BaseModel):
    """Base of every body: nulls and neutral values are left out; unknown fields, other types and
    NaN are refused. Half a character (a lone surrogate) is replaced."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        known = cls.model_fields
        return {
            key: _whole(value)
            for key, value in tree.items()
            if value is not None and (key in known or value not in NEUTRAL.get(key, ()))
        }


def _whole(value: Any) -> Any:
    """Texts without halves of characters, as `prepare` repairs them."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return [_whole(each) for each in value] if isinstance(value, list) else value


class TextPart(Body):
    """A text part of a message; other kinds of part, such as images by URL, are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of a conversation, also as the openai client dumps an answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    annotations: Annotated[list[Any], Field(max_length=0)] = []

    def as_message(self) -> Message:
        """The message as the chat format knows it."""
        role: Role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, self.content)
        return Message(role, "".join(part.text for part in self.content))


class Conversation(Body):
    """Messages that end with a user's; the body of /tokenize."""

    model: ModelName = "adapter"
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)

    def conversation(self) -> list[Message]:
        """The messages; several system texts at the start are joined."""
        messages = [message.as_message() for message in self.messages]
        while len(messages) > 1 and messages[0].role == messages[1].role == "system":
            texts = [message.content for message in messages[:2]]
            messages[:2] = [Message("system", "\n\n".join(texts))]
        return messages


class StreamOptions(Body):
    """`include_usage` sends the token counts last, `continuous_usage_stats` with every piece."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


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
    ignore_eos: bool = False


class ChatRequest(SamplingRequest, Conversation):
    """Body of /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


Ids = Annotated[list[int], Field(min_length=1, max_length=1 << 17)]


def _none(value: Any) -> Any:
    return None if value is False else value


class CompletionRequest(SamplingRequest):
    """Body of /v1/completions: a text, token ids, or several of either.

    `echo` with `logprobs` gives the log-probabilities of the prompt, as lm-eval asks for them.
    As in vLLM `return_token_ids` adds the ids of prompt and answer, `return_tokens_as_token_ids`
    names tokens by their ids in `logprobs`.
    """

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=64)]
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    echo: bool = False
    logprobs: Annotated[int | None, BeforeValidator(_none)] = Field(None, ge=0, le=20)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, of which there may be one alone."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else self.prompt  # type: ignore[list-item,return-value]


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
        detail = NO_PATH if error.status_code == 404 else error.detail
        error = ApiError(error.status_code, detail, "invalid_request")
    elif not isinstance(error, ApiError):
        message = error.what if isinstance(error, ModelError) else "a defect of the server"
        error = ApiError(500, message, "server_error")
    return JSONResponse(error.body(), error.status_code, headers)


def _invalid(error: RequestValidationError) -> ApiError:
    """Every field that is wrong, with what it takes or why the server has no such thing."""
    said, unknown = dict[str, str](), False
    for each in error.errors():
        if each["type"] == "json_invalid":
            return ApiError(400, "the body is not JSON", "invalid_json")
        field = printable(str((*each["loc"][1:2], "the body")[0])[:100])
        unknown = field == "model" and isinstance(each.get("input"), str)
        if each["type"] == "extra_forbidden" and len(each["loc"]) == 2:
            said[field] = ABSENT.get(field, "no such field")
        elif each["type"] == "missing" and len(each["loc"]) == 2:
            said[field] = f"is missing; it is {RULES.get(field, 'needed')}"
        else:
            said.setdefault(field, RULES.get(field, printable(str(each["msg"])[:200])))
    where = next(iter(said))
    if said.keys() == {"model"} and unknown:
        return ApiError(404, "no such model; there are base and adapter", "model_not_found", where)
    message = "; ".join(f"{field}: {rule}" for field, rule in said.items())
    return ApiError(400, message[:1000], "invalid_value", where)


class Answer:
    """The response to a request, in the format of a chat or a text completion."""

    def __init__(
        self,
        requests: list[StreamedRequest],
        body: SamplingRequest,
        scorer: Engine | None,
        decode: Callable[[Any], str],
    ) -> None:
        """Wait for nothing yet.

        Args:
            requests: an answer each.
            scorer: gives log-probabilities, where they are asked for.
            decode: text of a token or of several.
        """
        self._requests, self._scorer, self._decode = requests, scorer, decode
        self._body, self._chat = body, isinstance(body, ChatRequest)
        self._options = body.stream_options
        self._head = {"id": requests[0].id, "created": int(time.time()), "model": body.model}

    async def whole(self, client: Request) -> dict[str, Any]:
        """The response as one JSON object, when the answers are complete or the client is gone."""
        choices = []
        for index, request in enumerate(self._requests):
            echo = getattr(self._body, "echo", False)
            text, finish_reason = self._decode(request.prompt_ids) if echo else "", "length"
            if request.max_new_tokens:
                async with contextlib.aclosing(request.pieces()) as pieces:
                    async for piece, reason in pieces:
                        text, finish_reason = text + piece, reason or "length"
                        if await client.is_disconnected():
                            for each in self._requests:
                                each.cancelled = True
                            return {}
            message = {"message": {"role": "assistant", "content": text}}
            content = message if self._chat else {"text": text}
            (choice,) = self._tree(content, finish_reason)["choices"]
            if getattr(self._body, "return_token_ids", False):
                choice |= {"token_ids": request.token_ids, "prompt_token_ids": request.prompt_ids}
            choices.append({**choice, "index": index, **await self._logprobs(request)})
        return self._tree({}, None) | {"choices": choices, "usage": self._usage()}

    async def _logprobs(self, request: StreamedRequest) -> dict[str, Any]:
        """The fields of a choice that hold log-probabilities, in the format of either endpoint."""
        if self._scorer is None:
            return {}
        prompt, body = request.prompt_ids, self._body
        ids = [*prompt, *request.token_ids]
        by_id = getattr(body, "return_tokens_as_token_ids", False)
        name: Callable[[int], str] = "token_id:{}".format if by_id else self._decode
        names = [name(token) for token in ids]
        found = self._scorer.score(ids, adapter=body.model == "adapter")
        scored: list[Any] = [None, *await asyncio.wrap_future(found)]

        def top(at: int, count: int) -> dict[str, float] | None:
            likely = scored[at]
            return likely and {name(token): value for token, value in likely.top[:count]}

        if isinstance(body, ChatRequest):
            rows = []
            for at in range(len(prompt), len(ids)):
                likely = [_token(*pair) for pair in (top(at, body.top_logprobs) or {}).items()]
                rows.append(_token(names[at], scored[at].logprob) | {"top_logprobs": likely})
            return {"logprobs": {"content": rows}}
        assert isinstance(body, CompletionRequest)
        fields: dict[str, Any] = {}
        if body.logprobs is not None:
            kept = range(0 if body.echo else len(prompt), len(ids))
            starts = [0, *accumulate(len(names[at]) for at in kept)]
            fields["logprobs"] = {
                "tokens": [names[at] for at in kept],
                "token_logprobs": [scored[at] and scored[at].logprob for at in kept],
                "top_logprobs": [top(at, max(body.logprobs, 1)) for at in kept],
                "text_offset": starts[:-1],
            }
        if body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = [
                each
                and {str(t): {"logprob": each.logprob, "rank": each.rank, "decoded_token": name}}
                for each, t, name in zip(scored, prompt, names, strict=False)
            ]
        return fields

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; an error after the first byte is an event too."""
        if self._chat:
            yield _line(self._tree({"delta": {"role": "assistant", "content": ""}}, None))
        try:
            async with contextlib.aclosing(self._requests[0].pieces()) as pieces:
                async for text, finish_reason in pieces:
                    content = {"delta": {"content": text}} if self._chat else {"text": text}
                    tree = self._tree(content, finish_reason)
                    if self._options.continuous_usage_stats:
                        tree["usage"] = self._usage()
                    yield _line(tree)
        except ModelError as error:
            yield _line(ApiError(500, error.what, "server_error").body())
        if self._options.include_usage:
            last = self._tree({"delta": ""} if self._chat else {"text": ""}, None)
            yield _line(last | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _tree(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        kind = "chat.completion" if self._chat else "text_completion"
        kind += ".chunk" if "delta" in content else ""
        choice = {"index": 0, **content, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head, "object": kind, "choices": [choice]}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt_ids) for request in self._requests)
        completion = sum(len(request.token_ids) for request in self._requests)
        total = prompt + completion
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _line(tree: dict[str, Any]) -> str:
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"
