"""docs/hub.md: every command runs, in order, against a hub on loopback that has its ids."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import test_docs
import tiny
import tiny_hub
from hostile import run_verb
from hub.server import Hub

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hub.md"
BASE_ID, ROWS_ID = "Qwen/Qwen2.5-0.5B-Instruct", "Josephgflowers/Finance-Instruct-500k"
ASKED_ID = "PatronusAI/financebench"
SMALL = {
    "min_tokens": 5,
    "max_length": 256,
    "max_train_rows": 64,
    "max_held_out_rows": 30,
    "validation_share": 0.15,
    "test_share": 0.15,
    "batch_size": 4,
    "max_steps": 2,
    "eval_rows": 8,
    "precision": "fp32",
    "judged_items": 4,
    "max_new_tokens": 4,
}


def process(words: list[str], env: dict[str, str]) -> str:
    """What a process writes, which must end well."""
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def command(line: str, hub: Hub, home: Path) -> str:
    """Run a line of the page as it stands, with settings that make a run small; its output."""
    env = hub.env(home, "hf_you") | {"HF_HUB_OFFLINE": "0"}
    program, *words = shlex.split(line)
    if program == "hf":
        return process([str(Path(tiny.program()).with_name("hf")), *words], env)
    if mirror := program.startswith("HF_ENDPOINT=https://"):  # the loopback hub is the mirror
        program, *words = words
    assert program == "fintune"
    if "-c" in words:
        words += [*tiny.words(**SMALL), *(["--accept", "a rehearsal"] * ("run" in words))]
    if mirror or "--offline" in words:  # read where the hub's client is imported
        before = len(hub.log)
        said = process([tiny.program(), *words], env)
        assert (len(hub.log) > before) == mirror
        return said
    with tiny_hub.client(hub, home, "hf_you"):
        if words[0] == "chat":
            outcome = run_verb(words, home / "log", stdin="hello\n/quit\n")
            assert outcome.code == 0, outcome.output
            return outcome.output
        done = tiny.done(*words)
        return done.out + done.err


def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("finance.yaml").write_text(config)
    home = tmp_path / "home"
    home.mkdir()
    with Hub(tmp_path / "served") as hub:
        hub.tokens["hf_you"] = ["you"]
        commit = hub.commit("model", BASE_ID, {path.name: path for path in tiny.base().iterdir()})
        hub.commit("dataset", ROWS_ID, {"train.json": tiny.rows()})
        hub.commit("dataset", ASKED_ID, {"test.jsonl": tiny.questions()})
        lines = test_docs.shell_lines(PAGE)
        assert lines.pop(0).startswith("export HF_TOKEN=") and len(lines) == 15
        text = "".join(command(line.replace("COMMIT", commit), hub, home) for line in lines)
    assert "would upload to you/finance-adapter (private)" in text
    assert text.count(": verified") == 3
    assert hub.repos["model", "you/finance-adapter"].private
    shown = json.loads(Path("runs/finance/release/adapter_config.json").read_text())
    assert shown["revision"] == commit


def test_every_message_of_the_page_is_seen_by_a_test() -> None:
    folder = Path(__file__).parent
    others = [path for path in folder.glob("test_hub_*.py") if path != Path(__file__)]
    text = "".join(path.read_text() for path in others)
    table = PAGE.read_text().partition("## Messages")[2]
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(messages) > 12
    assert [message for message in messages if message not in text] == []


def test_the_readme_shows_the_recipe_by_id() -> None:
    readme = test_docs.shell_lines(tiny.ROOT / "README.md")
    by_id = [line.partition("fintune ")[2] for line in readme if "llama-3.1-8b-finance" in line]
    assert by_id[:2] == ["plan -c llama-3.1-8b-finance", "run -c llama-3.1-8b-finance"]
