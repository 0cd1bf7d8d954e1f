"""The config: typed, frozen, every problem at once, unknown keys answered."""

import time
import tomllib
from functools import reduce
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.utils import LoggerType
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from fintune import config
from fintune.config import (
    Config,
    dotted_keys,
    dump_yaml,
    load_config,
    presets,
)
from fintune.errors import ConfigError
from fintune.model import find_base


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "again.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path) == config


def test_every_key_says_what_it_is() -> None:
    assert [key for key, text in dotted_keys().items() if len(text) < 5] == []


def test_overrides_are_typed() -> None:
    config = load_config(
        "demo",
        ["train.learning_rate=2e-4", "train.bucket_boundaries=[10, 20]", "data.source=a b.csv"],
    )
    assert config.train.learning_rate == 2e-4
    assert config.train.bucket_boundaries == (10, 20)
    assert config.data.source == "a b.csv"


def test_a_quantized_base_is_not_sharded() -> None:
    with pytest.raises(ConfigError, match="cannot shard a quantized base"):
        load_config("demo", ["train.strategy=fsdp", "model.quantization=4bit"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1", "did you mean train.learning_rate?"),
        ("train.epochs=1", "train.num_train_epochs now"),
        ("train.lora.alpha=8", "train.lora.lora_alpha now"),
        ("train.num_train_epochs=many", "valid integer"),
        ("train.num_train_epochs=0", "greater than or equal to 1"),
        ("train.max_steps=0", "-1 trains all epochs"),
        ("train.learning_rate=nan", "finite"),
        ("train.learning_rate=.inf", "valid number"),
        ("train.num_train_epochs", "key=value"),
        ("name.sub=1", "is a value, not a section"),
        ("name=../up", "pattern"),
        (
            "data.sources=[{path: x, columns: {usr: question}}]",
            "columns.usr: String should match pattern '^(system|",
        ),
    ],
)
def test_a_wrong_key_or_value_is_one_readable_error(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    assert expected in str(caught.value)


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("out", "data.out", "train.out", "eval.out", "release.out", "model.path")  # fmt: skip
    tree = load_config("demo", [f"{key}=~/{key}" for key in keys]).model_dump(mode="json")
    for key in keys:
        assert reduce(lambda found, part: found[part], key.split("."), tree) == f"/home/me/{key}"


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", ["train.num_train_epochs=0", "data.min_tokens=-1", "nonsense=1"])
    assert all(word in str(caught.value) for word in ("epochs", "min_tokens", "nonsense"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {epochs: 1}\ntrain: {epochs: 2}\n", "written twice: train"),
        ("- a\n- b\n", "holds no keys"),
        ("train: [unclosed", "not readable YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("spelled", "key", "value"),
    [
        ("010", "train.num_train_epochs", 10),
        ("1e-4", "train.learning_rate", 1e-4),
        ("2E+1", "train.weight_decay", 20.0),
        (".5", "train.weight_decay", 0.5),
        ("true", "data.filter_english_only", True),
        ("False", "data.filter_english_only", False),
        ("null", "train.bucket_boundaries", None),
        ("~", "model.path", None),
        ("'null'", "model.revision", "null"),
        ("010", "name", "010"),
        ("2024", "out", Path("2024")),
        ("1234567", "model.revision", "1234567"),
        ("1e10", "model.revision", "1e10"),
        ("true", "data.source", "true"),
        ("1:30", "data.source", "1:30"),
        ("1_000", "data.source", "1_000"),
        ("2024-07-26", "chat.date_string", "2024-07-26"),
        ("on", "train.gradient_checkpointing", "on"),
        ("off", "data.pii", "off"),
        ("no", "name", "no"),
        ("{a: 010, b: yes}", "eval.tasks", {"a": "010", "b": "yes"}),
        ("[010, 17]", "train.bucket_boundaries", (10, 17)),
        ("[2024, {path: 007, split: 1}]", "data.benchmarks", None),
    ],
)
@pytest.mark.parametrize("way", ["file", "--set"])
def test_scalars_are_those_of_yaml_1_2_and_text_where_text_is_wanted(
    spelled: str, key: str, value: object, way: str, tmp_path: Path
) -> None:
    path = tmp_path / "one.yaml"
    if way == "file":
        *sections, last = key.split(".")
        lines = [f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections)]
        path.write_text("".join(lines) + f"{'  ' * len(sections)}{last}: {spelled}\n")
        config = load_config(path)
    else:
        path.write_text("seed: 07\n")
        config = load_config(path, [f"{key}={spelled}"])
        assert config.seed == 7
    found = reduce(getattr, key.split("."), config)
    if key == "eval.tasks":
        assert {name: item.path for name, item in found.items()} == value
    elif key == "data.benchmarks":
        assert [(item.path, item.split) for item in found] == [("2024", None), ("007", "1")]
    else:
        assert found == value and type(found) is type(value)
    path.write_text(dump_yaml(config))
    assert load_config(path) == config, "written out, it is the same"


@pytest.mark.parametrize("spelled", ["1:30", "0b1", "0x10", "maybe", "[1]", "''"])
def test_what_no_longer_is_a_number_is_refused_as_one(spelled: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.learning_rate"):
        load_config("demo", [f"train.learning_rate={spelled}"])


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(f'*{before}' for _ in range(9))}]\n"
    for before, name in pairwise("abcdefghijklm")
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "alias"),
        ("a: &a [*a]\n", "alias"),
        ("a: " + "[" * 500_000, "recursion"),
        ("? " * 500_000, "recursion"),
        ("a: " + "{a: " * 100_000, "recursion"),
        ("a: [" + "a, " * 300_000 + "]", "5000 values"),
        ("".join(f"k{number}: 1\n" for number in range(100_000)), "5000 values"),
        ("name: !!python/object/apply:os.system [ls]\n", "name: .* valid string"),
        ("name: caf\udce9\n", "not readable YAML"),
        ('name: "\\U00110000"\n', "not readable YAML"),
        ("[a]: 1\n", "unhashable key"),
        ("a: 1\n---\nb: 2\n", "not readable YAML"),
        ("<<: {epochs: 1}\n", "<<: unknown key"),
    ],
)
def test_a_hostile_document_is_refused_at_once(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    started = time.process_time()
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(path)
    assert time.process_time() - started < 3, "0.3 s on a quiet machine"
    assert len(str(caught.value)) < 500
    if "\n" not in text:
        with pytest.raises(ConfigError, match=says):
            load_config("demo", [f"data.sources={text}"])


SECRET = "sk-proj-AbCdEf0123456789xyz"


@pytest.mark.parametrize(
    "override",
    [
        f"eval.judge.api_key={SECRET}",
        f"eval.judge.key_variable={SECRET}",
        f"eval.judge.key_variable=[{SECRET}]",
        f"eval.judge.max_tokens={SECRET}",
        "eval.judge.max_tokens=sesame1",
        f"eval.judge={{api_key: {SECRET}}}",
        "eval.judge=[{api_key: sesame1}]",
        f"eval={SECRET}",
        f"train.num_train_epochs={SECRET}",
        f"{SECRET}=1",
        f"{SECRET}",
        f"train.num_train_epochs=[{SECRET}",
        "eval.judge.base_url=https://me:sesame1@host/v1",
        "eval.judge.base_url={https://me:sesame1@host: 1}",
    ],
)
def test_no_message_shows_a_secret(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    assert SECRET not in str(caught.value) and "sesame1" not in str(caught.value)


def test_a_file_that_is_no_yaml_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("eval:\n  judge: {api_key: sesame1: x}\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        load_config(path)
    assert "sesame1" not in str(caught.value)


def test_what_is_no_secret_is_shown() -> None:
    with pytest.raises(ConfigError, match=r"train\.num_train_epochs: .* \(given: many\)"):
        load_config("demo", ["train.num_train_epochs=many"])
    with pytest.raises(ConfigError, match=r"data\.min_tokens: .* \(given: -1\)"):
        load_config("demo", ["data.min_tokens=-1"])


def test_a_base_goes_by_its_own_name_or_by_none() -> None:
    given = {"path=a/My base.gguf": "local/My-base", "path=~/b": "local/b", "id=x/y": "x/y"}
    for change, name in given.items():
        assert Config.model_validate({"model": dict([change.split("=")])}).model.id == name
    assert Config().model.id == ""
    with pytest.raises(ConfigError, match="no base is named"):
        find_base(Config().model)


def test_a_preset_misspelt_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean demo"):
        load_config("demoo")
    with pytest.raises(ConfigError, match="no config file at missing"):
        load_config("missing.yaml")


def test_the_config_is_frozen_and_a_moved_run_is_the_same_run() -> None:
    config = load_config("demo")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    moved = load_config("demo", ["out=/elsewhere", "train.out=/elsewhere/run"])
    assert moved.sections("train", "data") == config.sections("train", "data")
    other = load_config("demo", ["train.num_train_epochs=9"])
    assert other.sections("train") != config.sections("train")


def test_defaults_are_the_published_recipe() -> None:
    train = Config().train
    assert (train.lora.r, train.lora.lora_alpha, train.lora.lora_dropout) == (64, 128, 0.1)
    assert (train.learning_rate, train.warmup_ratio, train.weight_decay) == (1e-4, 0.05, 0.01)


def test_names_of_transformers_are_known_to_it() -> None:
    optimizers = {name.value for name in OptimizerNames}
    schedules = {name.value for name in SchedulerType}
    known = tomllib.loads((Path(config.__file__).parent / "names.toml").read_text())
    assert {*known["optim"]} <= optimizers and {*known["lr_scheduler_type"]} <= schedules
    assert {*known["report_to"]} <= {tracker.value for tracker in LoggerType}
    for key in ("optim", "lr_scheduler_type", "report_to"):
        with pytest.raises(ConfigError, match=f"train.{key}"):
            load_config(presets()[0], [f"train.{key}={'[x]' if key == 'report_to' else 'x'}"])
