"""The config: typed, frozen, every problem at once, unknown keys answered."""

from functools import reduce
from pathlib import Path

import pytest

from fintune.config import Config, dotted_keys, dump_yaml, load_config, presets
from fintune.errors import ConfigError


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
        "nano",
        ["train.learning_rate=2e-4", "train.bucket_boundaries=[10, 20]", "data.source=a b.csv"],
    )
    assert config.train.learning_rate == 2e-4
    assert config.train.bucket_boundaries == (10, 20)
    assert config.data.source == "a b.csv"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1", "did you mean train.learning_rate?"),
        ("train.group_by_length=true", "train.plan=bucketed"),
        ("lora_r=8", "train.lora.r"),
        ("train.epochs=many", "valid integer"),
        ("train.epochs=0", "greater than or equal to 1"),
        ("train.max_steps=0", "-1 trains all epochs"),
        ("train.learning_rate=.nan", "finite"),
        ("train.bucket_boundaries=[20, 10]", "must increase"),
        ("train.epochs", "key=value"),
        ("name.sub=1", "is a value, not a section"),
        ("name=../up", "pattern"),
        (
            "data.columns={usr: question}",
            "columns.usr: String should match pattern '^(system|",
        ),
    ],
)
def test_a_wrong_key_or_value_is_one_readable_error(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("nano", [override])
    assert expected in str(caught.value)


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("out", "data.out", "train.out", "eval.out", "release.out", "model.path",
            "eval.regression_folder", "eval.judge.labels", "release.license_file")  # fmt: skip
    tree = load_config("nano", [f"{key}=~/x" for key in keys]).model_dump(mode="json")
    for key in keys:
        assert reduce(lambda found, part: found[part], key.split("."), tree) == "/home/me/x", key


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("nano", ["train.epochs=0", "data.min_tokens=-1", "nonsense=1"])
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


def test_a_preset_misspelt_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean nano"):
        load_config("nanoo")
    with pytest.raises(ConfigError, match="no config file"):
        load_config("missing.yaml")


def test_the_config_is_frozen_and_a_moved_run_is_the_same_run() -> None:
    config = load_config("nano")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    moved = load_config("nano", ["out=/elsewhere", "train.out=/elsewhere/run"])
    assert moved.sections("train", "data") == config.sections("train", "data")
    other = load_config("nano", ["train.epochs=9"])
    assert other.sections("train") != config.sections("train")


def test_defaults_are_the_published_recipe() -> None:
    train = Config().train
    assert (train.lora.r, train.lora.alpha, train.lora.dropout) == (64, 128, 0.1)
    assert (train.learning_rate, train.warmup_ratio, train.weight_decay) == (1e-4, 0.05, 0.01)
