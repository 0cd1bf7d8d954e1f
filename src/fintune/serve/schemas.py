"""Bodies of requests: strict, and every number bounded. FastAPI validates them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fintune.example import Message

MAX_TOKENS = 4096
ModelName = Literal["base", "adapter"]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Body(BaseModel):
    """Base of every body: unknown fields, other types and NaN are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A text part of a message; there are no others here, and nothing is ever fetched."""

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
    """Messages that end with a user's."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=256)


class TokenizeRequest(Conversation):
    """Body of /tokenize."""

    model: ModelName = "adapter"


class StreamOptions(Body):
    """`include_usage` sends the token counts last."""

    include_usage: bool = False


class SamplingRequest(Body):
    """How an answer is made, in chats and completions alike."""

    model: ModelName
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = Field(None, max_length=256)


class ChatRequest(SamplingRequest, Conversation):
    """Body of /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)


class CompletionRequest(SamplingRequest):
    """Body of /v1/completions: text, or token ids."""

    prompt: str | Annotated[list[int], Field(min_length=1, max_length=1 << 17)]
