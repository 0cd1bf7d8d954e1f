"""Every setting: one typed, frozen tree, read from YAML and dotted overrides. Imports no torch.

`load_config("llama-3.1-8b-finance", ["train.learning_rate=2e-4"])` finds a preset by name or a
file by path, applies the overrides, checks everything at once and returns a `Config`.
"""

import difflib
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fintune.errors import ConfigError
from fintune.files import read_toml
from fintune.presets import preset_dir, presets
from fintune.yaml_reader import read_yaml, redacted, set_key

RENAMED: dict[str, str] = read_toml(__file__, "renamed.toml")
"""Key of version 0.2.0 -> its name now."""
SECRET_NAME = re.compile(r"(?i)key|token\b|secret|passw|credential|auth|url")
URL = r"^https?://([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(:[0-9]+)?(/[^@?#\s\\]*)?$"
"""A plain form without credentials, which every reader takes apart in the same way."""
_EXPANDED = BeforeValidator(lambda v: os.path.expanduser(v) if isinstance(v, str | Path) else v)
Folder = Annotated[Path, _EXPANDED]
"""It may begin with `~`; of an unknown user that is a name like others."""
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
_KNOWN = {key: f"^({'|'.join(names)})$" for key, names in read_toml(__file__, "names.toml").items()}
"""Key -> pattern of the names that it takes."""
LOCAL = "local/"
"""What the id of a base begins with that is named after its folder."""
Price = Annotated[float, Field(ge=0)]
_URL_ALONE = BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)
ColumnName = Annotated[str, Field(pattern="^(system|user|assistant|messages|history|context_id)$")]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused; the text below a field describes it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )


class ModelConfig(Section):
    """The base model: its public name, and where its files are."""

    id: str = ""
    """public id, written into adapter and card; absent: local/ and the name of `path`"""
    revision: str | None = None
    """commit, tag or branch, resolved once a run; of a local base without: its weights' sha256"""
    path: Folder | None = None
    """folder or GGUF file to load from; absent: the hub id"""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """how the frozen base is held (bitsandbytes)"""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A base without an id goes by its own name, never by another's."""
        if not isinstance(value, dict) or value.get("id") or not value.get("path"):
            return value
        return value | {"id": local_id(str(value["path"]))}


def local_id(path: str) -> str:
    """The id of a base on this machine that is given none: the name of its folder or file."""
    name = os.path.basename(os.path.abspath(os.path.expanduser(path))).removesuffix(".gguf")
    return LOCAL + re.sub(r"[^\w.-]+", "-", name)


class ChatConfig(Section):
    """How a conversation becomes text."""

    date_string: str = Field("26 Jul 2024", min_length=1)
    """date the template prints; pinned, so that labels do not depend on the day"""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """other variables of the template, such as {enable_thinking: false}"""
    thinking: Literal["auto", "keep", "drop"] = "auto"
    """thoughts in the rows: trained where the template writes them, or left out; auto: keep any"""
    no_system_role: Literal["merge", "drop"] = "merge"
    """rows whose system text the template refuses: it goes before the first user text, or drop"""
    control_tokens: Literal["text", "drop"] = "text"
    """rows that spell a control token: plain characters, or drop"""


class DatasetConfig(Section):
    """A data set; a path alone stands for all of it."""

    path: str = ""
    """file, folder, glob or hub id"""
    revision: str | None = None
    """branch, tag or commit of a hub data set"""
    subset: str | None = None
    """configuration of a folder or hub data set that has several"""
    split: str | None = "test"
    """split of a folder or hub data set"""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class BenchmarkConfig(DatasetConfig):
    """One of several benchmarks."""

    path: str = Field(min_length=1)
    """file, folder, glob or hub id"""
    split: str | None = None
    """split of a folder or hub data set; absent: test where there is a train split, else all"""
    columns: dict[ColumnName, str] | None = None
    """our column (system, user, assistant, messages, history): the file's column"""


class SourceConfig(BenchmarkConfig):
    """One of several sources of rows."""

    split: str | None = "train"
    """split of a folder or hub data set"""
    encoding: str | None = Field(None, pattern=_KNOWN["encoding"])
    """of its text files; absent: `data.encoding`"""
    max_rows: int | None = Field(None, ge=1)
    """most rows kept of this source"""
    weight: float = Field(1.0, gt=0)
    """chance of its rows against others at the caps"""
    licence: str | None = None
    """written into the manifest and the card"""


class DataConfig(Section):
    """Rows: where from, which stay, how they are split."""

    source: str = ""
    """file, folder, glob or hub id; short for one of `sources`"""
    sources: tuple[SourceConfig, ...] = ()
    """sources, instead of or besides `source`: each a path alone, or with revision, subset, split
    (of a folder or hub id: train), encoding, columns, max_rows, weight and licence"""
    encoding: str = Field("utf-8", pattern=_KNOWN["encoding"])
    """of text files (rows, benchmarks) that are no UTF-8; one that is stays what it is"""
    inline_turns: Literal["cut", "keep"] = "cut"
    """questions with User: and Assistant: lines: cut into turns, or keep as one text"""
    out: Folder | None = None
    """folder of the prepared data; absent: OUT/data"""
    max_train_rows: int = Field(40_000, ge=1)
    """cap of training rows"""
    max_held_out_rows: int = Field(4_000, ge=2)
    """cap of validation and test rows together, by their shares"""
    validation_share: float = Field(0.05, gt=0, lt=0.5)
    """share of rows that choose the checkpoint, before the caps"""
    test_share: float | None = Field(None, gt=0, lt=0.5)
    """share of rows that decide the verdict, before the caps; absent: 0.05, of few rows more"""
    final_share: float = Field(0.0, ge=0, lt=0.5)
    """share of rows kept back, before the caps: `fintune eval --final` opens them once"""
    min_tokens: int = Field(1, ge=0)
    """fewest tokens of system, user and assistant text, template apart"""
    filter_english_only: bool = True
    """drop rows that are not English"""
    min_english_ratio: float = Field(0.9, ge=0, le=1)
    """smallest share of characters that English text may hold"""
    language_identifier: Literal["fasttext", "none"] = "fasttext"
    """also identify the language; none: by characters alone"""
    max_length: int = Field(2048, ge=64)
    """most tokens of a conversation; the adaptive length stays below"""
    over_length: Literal["drop", "truncate"] = "drop"
    """rows over the adaptive length: drop, or cut their end off"""
    near_duplicates: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity of near duplicates; 1: exact ones only"""
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """whose questions must not be trained: paths, or path, revision, subset, split and columns"""
    pii: Literal["off", "mask", "drop"] = "mask"
    """cards, accounts, e-mail, phones: leave, mask, or drop the row"""


class LoraConfig(Section):
    """The adapter's shape; names and meaning as in peft."""

    r: int = Field(64, ge=1)
    """rank of the update"""
    lora_alpha: float = Field(128, gt=0)
    """scale is lora_alpha / r"""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """dropout on the adapter's input"""
    target_modules: Names = Field(("all-linear",), min_length=1)
    """layers with an adapter, by the ends of their names; `all-linear`: all of the text decoder"""


class TrainConfig(Section):
    """One training run."""

    out: Folder | None = None
    """folder of the run; absent: OUT/run"""
    lora: LoraConfig = LoraConfig()
    """the adapter"""
    num_train_epochs: int = Field(5, ge=1)
    """passes over the training rows"""
    max_steps: int = Field(-1, ge=-1)
    """stop after this many optimizer steps; -1: all epochs"""
    per_device_train_batch_size: int = Field(16, ge=1)
    """examples of one forward pass"""
    gradient_accumulation_steps: int = Field(4, ge=1)
    """micro-batches of one optimizer step, of all processes together"""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """several processes: each holds the base (ddp, auto) or a part of it (fsdp)"""
    train_sampling_strategy: Literal["stratified", "bucketed", "random"] = "stratified"
    """how examples become batches"""
    bucket_boundaries: tuple[int, ...] | None = None
    """lengths that end a bucket, for `bucketed`, in any order; absent: 8 quantiles"""
    loss_aggregation: Literal["token", "example"] = "token"
    """mean over the label tokens of a step, or over its examples, of each one's own mean"""
    optim: str = Field("adamw_torch", pattern=_KNOWN["optim"])
    """transformers' name of the optimiser"""
    learning_rate: float = Field(1e-4, gt=0)
    """peak learning rate"""
    lr_scheduler_type: str = Field("cosine", pattern=_KNOWN["lr_scheduler_type"])
    """transformers' name of the schedule, of those that need no settings of their own"""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """share of the steps that warm up"""
    weight_decay: float = Field(0.01, ge=0)
    """decoupled weight decay"""
    max_grad_norm: float = Field(1.0, gt=0)
    """gradient norm is clipped to this"""
    eval_steps: int = Field(50, ge=1)
    """optimizer steps between evaluations"""
    save_steps: int = Field(100, ge=1)
    """optimizer steps between checkpoints"""
    max_eval_samples: int = Field(1_000, ge=1)
    """most validation rows of an evaluation while training, by hash"""
    logging_steps: int = Field(10, ge=1)
    """optimizer steps between lines of metrics.jsonl; fewer in a run of less than 20 such lines"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device has it (and it is faster), else fp16/fp32"""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """recompute activations in the backward pass to save memory"""
    report_to: tuple[Annotated[str, Field(pattern=_KNOWN["report_to"])], ...] = ()
    """trackers of accelerate, such as trackio"""


class JudgeConfig(Section):
    """A model behind an OpenAI-compatible endpoint that settles what arithmetic cannot."""

    model: str | None = None
    """the judge's dated model id; absent: no judge"""
    base_url: str = Field("https://api.openai.com/v1", pattern=URL)
    """endpoint, without credentials; a server on this machine works the same way"""
    key_variable: str = Field("OPENAI_API_KEY", pattern="^[A-Z][A-Z0-9_]*$")
    """environment variable that holds the key; never the key itself"""
    usd_per_million: tuple[Price, Price] = (0.0, 0.0)
    """price of a million prompt and of a million reply tokens"""
    max_usd: float | None = Field(None, ge=0)
    """stop before the call that may pass it"""

    @model_validator(mode="after")
    def _priced(self) -> "JudgeConfig":
        if self.max_usd is not None and not any(self.usd_per_million):
            raise ValueError("max_usd stops nothing without usd_per_million, the model's prices")
        return self


class ServerConfig(Section):
    """A running OpenAI-compatible server that answers in place of a model loaded here."""

    url: str | None = Field(None, pattern=URL)
    """its address; absent: the model is loaded here"""
    base_url: str | None = Field(None, pattern=URL)
    """of the base's server, where it is another one"""
    adapter: str = "adapter"
    """the adapter's name there"""
    base: str = "base"
    """the base's name there"""


class EvalConfig(Section):
    """Base against adapter."""

    out: Folder | None = None
    """folder of the evaluation; absent: OUT/eval"""
    primary: Literal["accuracy", "macro_accuracy", "win_rate"] = "accuracy"
    """the one measure that decides, named before the run; macro: the mean of the tasks"""
    max_task_drop: float = Field(0.05, ge=0, lt=1)
    """a task that certainly fell by more is lost, and the verdict is not `better`"""
    max_items: int = Field(400, ge=1)
    """most items of the checkable test rows, and of each task"""
    suite: str | None = None
    """every public finance task: a folder of their files, or `hub`"""
    tasks: dict[str, DatasetConfig] = {}
    """finance tasks by name: a path (empty if bundled), or path, revision, subset, split (test)"""
    judged_items: int = Field(60, ge=1)
    """items of the judged set, by hash: 60 to smoke-test, 200 to decide"""
    max_new_tokens: int = Field(256, ge=1)
    """longest answer"""
    label_scoring: Literal["generate", "likelihood"] = "generate"
    """label tasks: grade a generated answer, or take the choice that is likeliest as one"""
    per_device_eval_batch_size: int = Field(32, ge=1)
    """prompts answered at once"""
    server: Annotated[ServerConfig, _URL_ALONE] = ServerConfig()
    """the server that answers; an address alone is its url"""
    judge: JudgeConfig = JudgeConfig()
    """the judge"""


class ReleaseConfig(Section):
    """The release."""

    out: Folder | None = None
    """folder of the release; absent: OUT/release"""
    training_args_bin: bool = False
    """also write training_args.bin (a pickle, as the seed's release has)"""
    license: str | None = None
    """the adapter's licence on the card; absent: the base's, where it is known"""
    samples: Literal["none", "ids", "text"] = "ids"
    """held-out rows in the release: none, their ids and grades, or questions and answers too"""
    intended_use: str = ""
    """what the adapter is meant for, on the card; absent: not stated"""
    not_for: str = ""
    """what it must not be used for, on the card; absent: not stated"""


class Config(Section):
    """The whole tree. Every command takes it; each stage reads its section."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """name of the run"""
    out: Folder = Path("runs/run")
    """root folder of the four stages"""
    seed: int = Field(42, ge=0)
    """seed of everything random"""
    model: ModelConfig = ModelConfig()
    """the base"""
    chat: ChatConfig = ChatConfig()
    """conversation format"""
    data: DataConfig = DataConfig()
    """rows"""
    train: TrainConfig = TrainConfig()
    """training"""
    eval: EvalConfig = EvalConfig()
    """evaluation"""
    release: ReleaseConfig = ReleaseConfig()
    """release"""

    @model_validator(mode="after")
    def _coherent(self) -> "Config":
        if self.train.max_steps == 0:
            raise ValueError("train.max_steps must not be 0; -1 trains all epochs")
        if self.train.strategy == "fsdp" and self.model.quantization != "none":
            raise ValueError("train.strategy=fsdp cannot shard a quantized base; use ddp")
        data, places = self.data, self.folders()
        rows = [data.source, *(item.path for item in (*data.sources, *data.benchmarks))]
        read = {path: Path(os.path.expanduser(path)) for path in rows if path}
        pairs = itertools.product({**read, **places}.items(), places.items())
        for (one, inner), (other, outer) in pairs:
            inside = Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer))
            if inside and one != other:
                raise ValueError(f"{one} lies in {other} ({outer}): a stage owns its whole folder")
        return self

    def folders(self) -> dict[str, Path]:
        """The folders that the stages write, by the key that sets each."""
        names = {"data": "data", "train": "run", "eval": "eval", "release": "release"}
        return {f"{s}.out": getattr(self, s).out or self.out / name for s, name in names.items()}

    @property
    def data_dir(self) -> Path:
        """Folder of the prepared data."""
        return self.folders()["data.out"]

    @property
    def run_dir(self) -> Path:
        """Folder of the training run."""
        return self.folders()["train.out"]

    @property
    def eval_dir(self) -> Path:
        """Folder of the evaluation."""
        return self.folders()["eval.out"]

    @property
    def release_dir(self) -> Path:
        """Folder of the release."""
        return self.folders()["release.out"]

    def sections(self, *names: str) -> dict[str, Any]:
        """The named sections as plain values without `out` folders, so that a run can be moved."""
        folders = {stage: {"out"} for stage in ("data", "train", "eval", "release")}
        return self.model_dump(mode="json", include=set(names), exclude=folders)


def load_config(name: str | Path | None, overrides: Iterable[str] | None = None) -> Config:
    """Read a preset by name or a YAML file by path (None: none), apply `key.sub=value` overrides.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a wrong value; all problems at once.
    """
    path = Path(os.path.expanduser(name or ""))
    if not path.is_file() and path.suffix not in {".yaml", ".yml"}:
        path = preset_dir() / f"{name}.yaml"
    if name and not path.is_file():
        near = difflib.get_close_matches(str(name), presets(), n=1)
        fix = f"did you mean {near[0]}?" if near else f"presets: {', '.join(presets())}"
        raise ConfigError(f"no config file at {name}", fix=fix)
    tree = read_yaml(path.read_bytes(), str(path)) if name else {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys", fix="start from one: fintune init")
    for override in overrides or ():
        set_key(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise ConfigError(f"config {name or ''}: " + "\n  ".join(lines)) from None


def dotted_keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key with its description, in order; the reference page is made from this."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= dotted_keys(inner, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = " ".join(str(field.description).split())
    return keys


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _explain(problem: dict[str, Any]) -> str:
    """A problem of pydantic's; without a value that may be or hold a secret."""
    key = redacted(".".join(str(part) for part in problem["loc"] if part != "[key]"))
    if key in RENAMED:
        return f"{key}: this key is {RENAMED[key]} now"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, dotted_keys(), n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    said, value = problem["msg"].removeprefix("Value error, "), problem["input"]
    if isinstance(value, str) and not SECRET_NAME.search(key):
        said += f" (given: {redacted(value)[:80]})"
    return f"{key}: {said}" if key else said
