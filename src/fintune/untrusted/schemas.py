"""Types and bounds of the JSON whose values are used outside of the limited child.

Keys that are not named here may stand there; `checks` looks for those that name code, and the
child for what transformers and peft make of them.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fintune.example import Message

Text = Annotated[str, Field(max_length=1000)]
Names = Annotated[list[Text], Field(max_length=2000)]
Rank = Annotated[int, Field(ge=1, le=65_536)]
Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**24)]], Field(min_length=1, max_length=65_536)
]
Labels = Annotated[
    list[Annotated[int, Field(ge=-100, lt=2**24)]], Field(min_length=1, max_length=65_536)
]
LogProbability = Annotated[float, Field(ge=-1e4, le=1e-3, allow_inf_nan=False)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class AdapterConfig(_Open):
    """peft's LoraConfig, as far as loading depends on it."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: Text | None = None
    revision: Text | None = None
    r: Rank
    lora_alpha: Alpha
    target_modules: Text | Names | None = None
    rank_pattern: Annotated[dict[Text, Rank], Field(max_length=2000)] = {}
    alpha_pattern: Annotated[dict[Text, Alpha], Field(max_length=2000)] = {}
    layer_replication: None = None


class Answer(_Open):
    """Greedy tokens and their log-probabilities (natural logarithm)."""

    ids: TokenIds
    logprobs: Annotated[list[LogProbability], Field(min_length=1)]


class Conversation(_Open):
    """One recorded conversation: text, ids and labels as trained, and the answer."""

    name: Text
    messages: Annotated[list[Message], Field(min_length=1, max_length=100)]
    text: str
    prompt: str
    input_ids: TokenIds
    labels: Labels
    prompt_ids: TokenIds
    answer: Answer


class Decoding(_Open):
    """How the answers were made."""

    greedy: Literal[True]
    dtype: Literal["fp32", "bf16", "fp16"]


class GoldenPrompts(_Open):
    """prompt_fixture.json."""

    template_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    date_string: Text
    end_token_ids: TokenIds
    decoding: Decoding
    conversations: Annotated[list[Conversation], Field(min_length=3, max_length=100)]


SCHEMAS: dict[str, type[BaseModel]] = {
    "adapter_config.json": AdapterConfig,
    "prompt_fixture.json": GoldenPrompts,
}
