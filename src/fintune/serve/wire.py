"""What a client may send: strict bodies with every number bounded, and errors in OpenAI's shape."""

import json
from typing import Annotated, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from fintune.example import Message
from fintune.serve.guard import error_body

MAX_TOKENS = 4096
Stop = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Body(BaseModel):
    """Base of every body: unknown fields, other types and NaN are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(Body):
    """A text part of a message; there are no others here, and nothing is ever fetched."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=64)]

    def plain(self) -> Message:
        """The message as the chat format knows it."""
        if isinstance(self.content, str):
            return Message(self.role, self.content)
        return Message(self.role, "".join(part.text for part in self.content))


class StreamOptions(Body):
    """`include_usage` sends the token counts last."""

    include_usage: bool = False


class Sampling(Body):
    """How an answer is made, in chats and completions alike."""

    model: Literal["base", "adapter"]
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = Field(None, max_length=256)


class Messages(Body):
    """A conversation."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=256)


class Chat(Sampling, Messages):
    """Body of /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)


class Completion(Sampling):
    """Body of /v1/completions: text, or token ids."""

    prompt: str | Annotated[list[int], Field(min_length=1, max_length=1 << 17)]


class Tokenize(Messages):
    """Body of /tokenize."""

    model: Literal["base", "adapter"] = "adapter"


T = TypeVar("T", bound=Body)


class ApiError(Exception):
    """A refusal with its HTTP status."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        self.status, self.body = status, error_body(message, code, param)
        super().__init__(message)


async def parse(request: Request, kind: type[T]) -> T:
    """Strict JSON of a known shape; the message names the first field that is wrong."""
    try:
        tree = json.loads(await request.body(), parse_constant=_no_constant)
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        if where == "model":
            raise ApiError(
                404, "no such model; there are base and adapter", "model_not_found", "model"
            ) from None
        raise ApiError(400, f"{where}: {first['msg']}"[:300], "invalid_value", where) from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", "invalid_json") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
