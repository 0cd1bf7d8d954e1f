"""Every knob: one typed, frozen tree, read from YAML and dotted overrides. Imports no torch.

`load_config("llama-3.1-8b-finance", ["train.learning_rate=2e-4"])` finds a preset by name or a
file by path, applies the overrides, checks everything at once and returns a `Config`. An unknown
key is an error that names the nearest known one.
"""

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fintune.errors import ConfigError
from fintune.yaml12 import MOST_CHARACTERS, problem_of, read_yaml, resolved

SEVEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_RENAMED = {
    "data.max_length_cap": "data.max_length",
    "data.max_validation_rows": "data.max_held_out_rows",
    "data.personal_data": "data.pii",
    "train.lora.alpha": "train.lora.lora_alpha",
    "train.lora.dropout": "train.lora.lora_dropout",
    "train.epochs": "train.num_train_epochs",
    "train.micro_batch_size": "train.per_device_train_batch_size",
    "train.accumulation": "train.gradient_accumulation_steps",
    "train.plan": "train.train_sampling_strategy",
    "train.optimizer": "train.optim",
    "train.schedule": "train.lr_scheduler_type",
    "train.log_steps": "train.logging_steps",
    "train.eval_rows": "train.max_eval_samples",
    "train.activation_checkpointing": "train.gradient_checkpointing",
    "eval.batch_size": "eval.per_device_eval_batch_size",
}
"""Keys of version 0.2.0 that have another name now."""
SECRETS = re.compile(
    r"""(?ix)(?<![a-z])(?:sk|pk|rk|hf|gh[opsu]|xox[abp]|glpat|AIza|AKIA|ASIA)[-_]?[A-Za-z0-9_-]{12,}
    | eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]+)? | bearer\s+[\w.~+/=-]{8,}
    | (?<=//)[^\s/@"]+:[^\s/@"]+(?=@)
    | (?:(?:api|access)[_-]?key|token|secret|passw(?:or)?d)
      \\?["']?\s*[:=]\s*\\?["']?[^\s"',}\\]{6,}"""
)
"""What looks like a key or a password: never stored, never shown."""
SECRET_NAME = re.compile(r"(?i)key|token|secret|passw|credential|auth")


Columns = Annotated[
    dict[Annotated[str, Field(pattern="^(system|user|assistant|messages)$")], str] | None,
    Field(description="our column (system, user, assistant, messages): the file's column"),
]


Price = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _resolve(cls, value: Any, info: ValidationInfo) -> Any:
        """What plain scalars mean: where a key takes text (a name, a path) the text as written."""
        kinds = set(_leaves(cls.model_fields[str(info.field_name)].annotation))
        if any(issubclass(kind, Section) for kind in kinds):
            return value  # the section resolves its own
        return resolved(value, text=bool(kinds & {str, Path}))

    @field_validator("*")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        """Every folder and file may begin with `~`; of an unknown user it is a name like others."""
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


class ModelConfig(Section):
    """The base model: its public name, and where its files are."""

    id: str = Field("fintune/nano", description="public id, written into adapter and card")
    revision: str | None = Field(
        None, description="commit of the base; a local base without one gets its weights' sha256"
    )
    path: Path | None = Field(
        None, description="folder to load from; absent: the hub id (or the bundled nano base)"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="how the frozen base is held (bitsandbytes)"
    )


class ChatConfig(Section):
    """How a conversation becomes text."""

    date_string: str = Field(
        "26 Jul 2024",
        min_length=1,
        description="date the template prints; pinned, so that labels do not depend on the day",
    )


class BenchmarkConfig(Section):
    """One of several benchmarks; a path alone stands for all of it."""

    path: str = Field(min_length=1, description="file, folder, glob or hub id")
    revision: str | None = Field(None, description="commit of a hub data set")
    split: str = Field("test", description="split of a hub data set")
    columns: Columns = None

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class SourceConfig(BenchmarkConfig):
    """One of several sources of rows."""

    split: str = Field("train", description="split of a hub data set")
    max_rows: int | None = Field(None, ge=1, description="most rows kept of this source")
    weight: float = Field(1.0, gt=0, description="chance of its rows against others at the caps")
    licence: str | None = Field(None, description="written into the manifest and the card")


class DataConfig(Section):
    """Rows: where from, which stay, how they are split."""

    source: str = Field("", description="file, folder, glob or hub id; short for one of `sources`")
    sources: tuple[SourceConfig, ...] = Field(
        (),
        description="sources, instead of or besides `source`: each a path alone, or with revision,"
        " split (of a hub id: train), columns, max_rows, weight and licence",
    )
    out: Path | None = Field(None, description="folder of the prepared data; absent: OUT/data")
    max_train_rows: int = Field(40_000, ge=1, description="cap of training rows")
    max_held_out_rows: int = Field(
        4_000, ge=2, description="cap of validation and test rows together, by their shares"
    )
    validation_share: float = Field(
        0.05, gt=0, lt=0.5, description="share of rows that choose the checkpoint, before the caps"
    )
    test_share: float = Field(
        0.05, gt=0, lt=0.5, description="share of rows that decide the verdict, before the caps"
    )
    min_tokens: int = Field(
        30, ge=0, description="fewest tokens of system, user and assistant text, template apart"
    )
    filter_english_only: bool = Field(True, description="drop rows that are not English")
    min_english_ratio: float = Field(
        0.9, ge=0, le=1, description="smallest share of characters that English text may hold"
    )
    language_identifier: Literal["fasttext", "none"] = Field(
        "fasttext", description="also identify the language; none: by characters alone"
    )
    max_length: int = Field(
        2048, ge=64, description="most tokens of a conversation; the adaptive length stays below"
    )
    over_length: Literal["drop", "truncate"] = Field(
        "drop", description="rows over the adaptive length: drop, or cut their end off"
    )
    near_duplicates: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of near duplicates; 1: exact ones only"
    )
    benchmarks: tuple[BenchmarkConfig, ...] = Field(
        (),
        description="benchmarks whose questions must not be trained: files, folders or hub ids, "
        "each alone or with revision, split (of a hub id: test) and columns",
    )
    pii: Literal["off", "mask", "drop"] = Field(
        "mask", description="cards, accounts, e-mail, phones: leave, mask, or drop the row"
    )


class LoraConfig(Section):
    """The adapter's shape; names and meaning as in peft."""

    r: int = Field(64, ge=1, description="rank of the update")
    lora_alpha: float = Field(128, gt=0, description="scale is lora_alpha / r")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: tuple[str, ...] = Field(
        SEVEN_PROJECTIONS, min_length=1, description="projections that get an adapter"
    )


class TrainConfig(Section):
    """One training run."""

    out: Path | None = Field(None, description="folder of the run; absent: OUT/run")
    lora: LoraConfig = Field(LoraConfig(), description="the adapter")
    num_train_epochs: int = Field(5, ge=1, description="passes over the training rows")
    max_steps: int = Field(
        -1, ge=-1, description="stop after this many optimizer steps; -1: all epochs"
    )
    per_device_train_batch_size: int = Field(16, ge=1, description="examples of one forward pass")
    gradient_accumulation_steps: int = Field(
        4,
        ge=1,
        description="micro-batches of one optimizer step, of all processes together: "
        "the step is the same for any number of processes",
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="several processes: each holds the base (ddp, auto) or a part of it (fsdp)",
    )
    train_sampling_strategy: Literal["stratified", "bucketed", "random"] = Field(
        "stratified", description="how examples become batches"
    )
    bucket_boundaries: tuple[int, ...] | None = Field(
        None, description="lengths that end a bucket, for `bucketed`; absent: 8 quantiles"
    )
    optim: str = Field("adamw_torch", description="transformers' name of the optimiser")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_scheduler_type: str = Field("cosine", description="transformers' name of the schedule")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")
    eval_steps: int = Field(50, ge=1, description="optimizer steps between evaluations")
    save_steps: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    max_eval_samples: int = Field(
        1_000, ge=1, description="most validation rows of an evaluation while training, by hash"
    )
    logging_steps: int = Field(
        10, ge=1, description="optimizer steps between lines of metrics.jsonl"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 where the device has it (and it is faster), else fp16/fp32"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="recompute activations in the backward pass to save memory"
    )
    report_to: tuple[str, ...] = Field((), description="trackers of transformers, such as trackio")


class JudgeConfig(Section):
    """A model behind an OpenAI-compatible endpoint that settles what arithmetic cannot."""

    model: str | None = Field(None, description="the judge's dated model id; absent: no judge")
    base_url: str = Field(
        "https://api.openai.com/v1",
        description="endpoint, without credentials; a server on this machine works the same way",
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        description="environment variable that holds the key; never the key itself",
    )
    usd_per_million: tuple[Price, Price] = Field(
        (0.0, 0.0), description="price of a million prompt and of a million reply tokens"
    )
    max_usd: float | None = Field(None, ge=0, description="stop before the call that may pass it")

    @model_validator(mode="after")
    def _priced(self) -> "JudgeConfig":
        if self.max_usd is not None and not any(self.usd_per_million):
            raise ValueError("max_usd stops nothing without usd_per_million, the model's prices")
        return self

    @field_validator("base_url", "key_variable")
    @classmethod
    def _no_secret(cls, value: str, info: ValidationInfo) -> str:
        """Refuse a key in the config; a ConfigError, because pydantic's would print the value.

        Of a URL only the plain form is taken, which every reader takes apart in the same way.
        """
        host = r"(?:[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]+)?"
        allowed = {
            "base_url": rf"https?://{host}(?:/[^@?#\s\\]*)?",
            "key_variable": r"[A-Z][A-Z0-9_]*",
        }
        if not re.fullmatch(allowed[str(info.field_name)], value):
            raise ConfigError(
                f"eval.judge.{info.field_name}: not of the form that is expected here",
                why="a config is copied into results and releases, so it must hold no credentials",
                fix="base_url without user, password or query; key_variable names a variable",
            )
        return value


class EvalConfig(Section):
    """Base against adapter."""

    out: Path | None = Field(None, description="folder of the evaluation; absent: OUT/eval")
    primary: Literal["accuracy", "win_rate"] = Field(
        "accuracy", description="the one measure that decides, named before the run"
    )
    max_items: int = Field(
        400, ge=1, description="most items of the checkable test rows, and of each task"
    )
    tasks: dict[str, str] = Field(
        {}, description="finance tasks by name: a JSON Lines file, a hub id, or empty if bundled"
    )
    regression: tuple[str, ...] = Field(
        (),
        description="lm-eval tasks on which the adapter must not be worse than its base: names, or"
        " task files NAME.yaml of one's own",
    )
    judged_items: int = Field(
        50, ge=1, description="items of the judged set, by hash: 50 to smoke-test, 200 to decide"
    )
    max_new_tokens: int = Field(256, ge=1, description="longest answer")
    per_device_eval_batch_size: int = Field(32, ge=1, description="prompts answered at once")
    judge: JudgeConfig = Field(JudgeConfig(), description="the judge")


class ReleaseConfig(Section):
    """The release."""

    out: Path | None = Field(None, description="folder of the release; absent: OUT/release")
    training_args_bin: bool = Field(
        False, description="also write training_args.bin (a pickle, as the seed's release has)"
    )
    license: str | None = Field(
        None, description="the adapter's licence on the card; absent: the base's, where it is known"
    )


class Config(Section):
    """The whole tree. Every verb takes it; each stage reads its own section."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run")
    out: Path = Field(Path("runs/run"), description="root folder of the four stages")
    seed: int = Field(42, ge=0, description="seed of everything random")
    model: ModelConfig = Field(ModelConfig(), description="the base")
    chat: ChatConfig = Field(ChatConfig(), description="conversation format")
    data: DataConfig = Field(DataConfig(), description="rows")
    train: TrainConfig = Field(TrainConfig(), description="training")
    eval: EvalConfig = Field(EvalConfig(), description="evaluation")
    release: ReleaseConfig = Field(ReleaseConfig(), description="release")

    @model_validator(mode="after")
    def _coherent(self) -> "Config":
        boundaries = self.train.bucket_boundaries
        if boundaries is not None and list(boundaries) != sorted(set(boundaries)):
            raise ValueError("train.bucket_boundaries must increase")
        if self.train.max_steps == 0:
            raise ValueError("train.max_steps must not be 0; -1 trains all epochs")
        places = {name: Path(os.path.realpath(path)) for name, path in self.folders().items()}
        for (one, inner), (other, outer) in itertools.permutations(places.items(), 2):
            if inner.is_relative_to(outer):
                raise ValueError(f"{one} lies in {other} ({outer}): a stage owns its whole folder")
        data = self.data
        rows = [data.source, *(item.path for item in (*data.sources, *data.benchmarks))]
        for name, outer in places.items():
            for path in filter(None, rows):
                if Path(os.path.realpath(os.path.expanduser(path))).is_relative_to(outer):
                    raise ValueError(f"{name} ({outer}) holds rows that are read: {path}")
        return self

    def folders(self) -> dict[str, Path]:
        """The folders that the stages write, by the key that sets each."""
        return {
            "data.out": self.data_dir,
            "train.out": self.run_dir,
            "eval.out": self.eval_dir,
            "release.out": self.release_dir,
        }

    @property
    def data_dir(self) -> Path:
        """Folder of the prepared data."""
        return self.data.out or self.out / "data"

    @property
    def run_dir(self) -> Path:
        """Folder of the training run."""
        return self.train.out or self.out / "run"

    @property
    def eval_dir(self) -> Path:
        """Folder of the evaluation."""
        return self.eval.out or self.out / "eval"

    @property
    def release_dir(self) -> Path:
        """Folder of the release."""
        return self.release.out or self.out / "release"

    def sections(self, *names: str) -> dict[str, Any]:
        """The named sections as plain values without `out` folders, so that a run can be moved."""
        tree = self.model_dump(mode="json", include=set(names))
        for value in tree.values():
            if isinstance(value, dict):
                value.pop("out", None)
        return tree


def preset_dir() -> Path:
    """Folder of the shipped presets: in the installed package, or beside `src` in a checkout."""
    inside = Path(__file__).parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "presets"


def presets() -> list[str]:
    """Names that `--config` finds without a path."""
    return sorted(path.stem for path in preset_dir().glob("*.yaml"))


def load_config(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a preset by name or a YAML file by path, apply `key.sub=value` overrides, validate.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a wrong value; all problems at once.
    """
    tree = _read_file(_find(name))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {redacted(override)}: not of the form key=value",
                fix="for example --set train.learning_rate=2e-4",
            )
        try:
            _place(tree, key.strip(), read_yaml(value))
        except yaml.YAMLError as error:
            what = redacted(f"--set {key}: the value is not YAML: {problem_of(error)}")
            raise ConfigError(what) from None
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise ConfigError(f"config {name}: " + "\n  ".join(lines)) from None


def dotted_keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key with its description, in order; the reference page is made from this."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= dotted_keys(inner, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = field.description or ""
    return keys


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _find(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise ConfigError(
                f"no config file at {path}", fix=f"or a preset: {', '.join(presets())}"
            )
        return path
    preset = preset_dir() / f"{name}.yaml"
    if not preset.is_file():
        near = difflib.get_close_matches(str(name), presets(), n=1)
        raise ConfigError(
            f"no config file and no preset called {name!r}",
            fix=f"did you mean {near[0]}?" if near else f"presets: {', '.join(presets())}",
        )
    return preset


def _leaves(kind: Any) -> Iterator[type]:
    """The types in an annotation; of a Literal those of its values."""
    parts = get_args(kind)
    yield from itertools.chain.from_iterable(map(_leaves, parts))
    if not parts:
        yield kind if isinstance(kind, type) else type(kind)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            tree = read_yaml(file.read(MOST_CHARACTERS + 1))
    except yaml.YAMLError as error:
        what = redacted(problem_of(error))
        raise ConfigError(f"{path} is not readable YAML: {what}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys", fix="start from one: fintune init")
    return tree


def redacted(text: str) -> str:
    """A text without what looks like a secret."""
    return SECRETS.sub("[redacted]", text)


def _place(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {key}: {parent} is a value, not a section")
    tree[last] = value


def _explain(problem: dict[str, Any]) -> str:
    key = redacted(".".join(str(part) for part in problem["loc"] if part != "[key]"))
    if problem["type"] != "extra_forbidden":
        said = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {said}{_given(key, problem['input'])}" if key else said
    if key in _RENAMED:
        return f"{key}: this key is {_RENAMED[key]} now"
    last = key.rsplit(".", 1)[-1]
    known = list(dotted_keys())
    near = difflib.get_close_matches(key, known, n=1) or [
        name for name in known if name.rsplit(".", 1)[-1] == last
    ]
    return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")


def _given(key: str, value: Any) -> str:
    """The value in a message, unless it may be or hold a secret."""
    if isinstance(value, dict | list):
        return f" (given: {'a section' if isinstance(value, dict) else 'a list'})"
    if isinstance(value, str) and SECRET_NAME.search(key):
        return ""
    return f" (given: {redacted(repr(value))[:80]})"
