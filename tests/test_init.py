"""`fintune init`: every key with its meaning, loading to what was asked, never over a file."""

from pathlib import Path

import pytest
import tiny
import yaml

from fintune.config import dotted_keys, load_config
from fintune.presets import presets


@pytest.mark.parametrize("preset", presets())
def test_a_preset_comes_back_as_it_is_and_with_every_key(preset: str, tmp_path: Path) -> None:
    out = tmp_path / "config.yaml"
    tiny.done("init", "--out", out, "--preset", preset)
    assert load_config(out) == load_config(preset)
    # With every comment sign taken off, each key is there once, where the config has it.
    body = out.read_text().split("\n\n", 1)[1]
    lines = [line.replace("# ", "", 1) if "# " in line[:9] else line for line in body.splitlines()]
    tree = yaml.safe_load("\n".join(lines))
    found = [
        f"{prefix}{key}"
        for prefix, branch in branches(tree, "")
        for key, value in branch.items()
        if f"{prefix}{key}" in dotted_keys() or not isinstance(value, dict)
    ]
    assert sorted(found) == sorted(dotted_keys())
    assert all(" # " in line for line in lines), "a key without its meaning"


def branches(tree: dict, prefix: str) -> list[tuple[str, dict]]:
    below = [
        row
        for key, value in tree.items()
        if isinstance(value, dict)
        for row in branches(value, f"{prefix}{key}.")
    ]
    return [(prefix, tree), *below]


def test_options_are_answers(tmp_path: Path) -> None:
    out, base, source = tmp_path / "mine.yaml", tmp_path / "base", tmp_path / "a: b #é\n.jsonl"
    base.mkdir()
    source.write_text('{"user": "What is a bond?", "assistant": "A loan that can be traded."}\n')
    answers = ("--name", "7", "--source", source, "--base", base)
    tiny.done("init", "--out", out, *answers)
    config = load_config(out)
    assert (config.name, str(config.out), config.data.source) == ("7", "runs/7", str(source))
    assert (config.model.id, config.model.path) == ("local/base", base)
    assert config.release.license is None, "a preset's is its own base's"
    (tmp_path / "b.Q4_1.gguf").touch()
    tiny.done("init", "--out", tmp_path / "gguf.yaml", "--base", tmp_path / "b.Q4_1.gguf")
    assert load_config(tmp_path / "gguf.yaml").model.id == "local/b.Q4_1"
    assert config.data.pii == "mask", "only the preset's own rows may pass unmasked"
    again = tiny.fintune("init", "--out", out, "--preset", "demo")
    assert (again.code, "--force" in again.err) == (1, True)
    assert load_config(out) == config
    tiny.done("init", "--out", out, "--preset", "demo", "--force")
    assert load_config(out).name == "smollm2-demo"
    refused = tiny.fintune("init", "--out", tmp_path / "bad.yaml", "--name", "no spaces")
    assert (refused.code, "name: " in refused.err) == (1, True)
    assert not (tmp_path / "bad.yaml").exists()


def test_without_options_it_is_the_smallest_preset(tmp_path: Path) -> None:
    tiny.done("init", "--out", tmp_path / "mine.yaml")
    assert load_config(tmp_path / "mine.yaml") == load_config("smollm2-135m")


def test_what_a_preset_knows_of_public_rows_is_not_taken_for_others(tmp_path: Path) -> None:
    """The published recipe publishes its rows and shows them to a judge; nobody else's."""
    preset = load_config("llama-3.1-8b-finance")
    assert preset.release.samples == "text" and preset.eval.judge.model is not None
    (tmp_path / "tickets.csv").write_text("user,assistant\nWhat is a fee?,A price.\n")
    words = ("init", "--preset", "llama-3.1-8b-finance", "--source", tmp_path / "tickets.csv")
    tiny.done(*words, "--out", tmp_path / "own.yaml")
    own = load_config(tmp_path / "own.yaml")
    assert (own.release.samples, own.eval.judge.model, own.data.pii) == ("ids", None, "mask")


def test_the_first_rows_propose_columns_encoding_and_language(tmp_path: Path) -> None:
    lines = [f"Wie hoch ist die Gebühr für Karte {at}?;Gebühren" for at in range(150)]
    source = tmp_path / "anfragen.csv"
    text = "\n".join(["Anfrage;Abteilung;Antwort", *(f"{line};Karten" for line in lines)])
    source.write_bytes(text.encode("cp1252"))
    said = tiny.done("init", "--source", source, "--out", tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml")
    assert "150 rows; of the first 100, 100 are read" in said.err
    assert config.data.encoding == "cp1252" and not config.data.filter_english_only
    assert config.data.sources[0].columns == {"user": "Anfrage", "assistant": "Antwort"}
    assert "Qwen3-0.6B" in config.model.id, "SmolLM2 learnt English alone"


def test_columns_that_nothing_names_are_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_text("a,b\nWhat is a bond?,A loan.\n")
    said = tiny.done("init", "--source", source, "--out", tmp_path / "c.yaml")
    assert "columns a, b: name question and answer: data.sources=" in said.err
