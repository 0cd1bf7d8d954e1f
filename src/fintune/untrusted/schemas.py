"""Types and bounds of the JSON files that decide how a folder is loaded.

Keys that are not named here may stand there; `checks` looks for those that name code.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

Text = Annotated[StrictStr, Field(max_length=1000)]
Names = Annotated[list[Text], Field(max_length=2000)]
Rank = Annotated[StrictInt, Field(ge=1, le=65_536)]
Alpha = Annotated[StrictInt | StrictFloat, Field(gt=0, le=1e6, allow_inf_nan=False)]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**24)]], Field(max_length=65_536)]
Labels = Annotated[list[Annotated[StrictInt, Field(ge=-100, lt=2**24)]], Field(max_length=65_536)]
LogProbability = Annotated[StrictFloat | StrictInt, Field(ge=-1e4, le=1e-3, allow_inf_nan=False)]
Layers = StrictInt | Annotated[list[StrictInt], Field(max_length=2000)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class AdapterConfig(_Open):
    """peft's LoraConfig, as far as loading depends on it."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: Text | None = None
    revision: Text | None = None
    r: Rank
    lora_alpha: Alpha
    lora_dropout: Annotated[StrictInt | StrictFloat, Field(ge=0, lt=1)] = 0
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Text | Names | None = None
    exclude_modules: Text | Names | None = None
    modules_to_save: Names | None = None
    target_parameters: Names | None = None
    layers_to_transform: Layers | None = None
    layers_pattern: Text | Names | None = None
    rank_pattern: Annotated[dict[Text, Rank], Field(max_length=2000)] = {}
    alpha_pattern: Annotated[dict[Text, Alpha], Field(max_length=2000)] = {}
    layer_replication: None = None
    init_lora_weights: StrictBool | Text = True
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    lora_bias: StrictBool = False
    fan_in_fan_out: StrictBool = False


class ModelConfig(_Open):
    """A base's config.json; the sizes themselves are tried in the limited child."""

    model_type: Text | None = None
    architectures: Names | None = None


class TokenizerConfig(_Open):
    """tokenizer_config.json."""

    tokenizer_class: Text | None = None
    chat_template: StrictStr | list[dict[str, Any]] | dict[str, Any] | None = None
    model_max_length: StrictInt | StrictFloat | None = None


class Turn(BaseModel):
    """One message of a recorded conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: StrictStr


class Answer(_Open):
    """Greedy tokens and their log-probabilities (natural logarithm)."""

    ids: Annotated[TokenIds, Field(min_length=1)]
    logprobs: Annotated[list[LogProbability], Field(min_length=1)]


class Conversation(_Open):
    """One recorded conversation: text, ids and labels as trained, and the answer."""

    name: Text
    messages: Annotated[list[Turn], Field(min_length=1, max_length=100)]
    text: StrictStr
    prompt: StrictStr
    input_ids: Annotated[TokenIds, Field(min_length=1)]
    labels: Annotated[Labels, Field(min_length=1)]
    prompt_ids: Annotated[TokenIds, Field(min_length=1)]
    answer: Answer


class Decoding(_Open):
    """How the answers were made."""

    greedy: Literal[True]
    dtype: Literal["fp32", "bf16", "fp16"]


class Fixture(_Open):
    """prompt_fixture.json."""

    template_sha256: Annotated[StrictStr, Field(pattern="^[0-9a-f]{64}$")]
    date_string: Text
    end_token_ids: Annotated[TokenIds, Field(min_length=1)]
    decoding: Decoding
    conversations: Annotated[list[Conversation], Field(min_length=3, max_length=100)]


SCHEMAS: dict[str, type[BaseModel]] = {
    "adapter_config.json": AdapterConfig,
    "config.json": ModelConfig,
    "tokenizer_config.json": TokenizerConfig,
    "prompt_fixture.json": Fixture,
}
