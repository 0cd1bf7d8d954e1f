"""What a newcomer reads on the terminal: rows by reason, whether a verdict is possible, hints,
narrow terminals, and wrong paths answered before torch is loaded."""

import io
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from rich.console import Console

from fintune import console, load_config
from fintune.data.split import LEAST_TEST_SHARE, share_of_test
from fintune.evals import outlook

TEAMS = ("card", "transfer", "loan", "securities")


def tickets(path: Path, count: int, encoding: str = "utf-8-sig") -> Path:
    """A CSV of a help desk, cut at semicolons: labels and sentences, a duplicate, a broken row."""
    rng, lines = random.Random(5), ["eingang;customer_query;agent_reply"]
    for number in range(count // 2):
        team, case = rng.choice(TEAMS), rng.randrange(10**6)
        asked = f"Which team handles case {case}: {', '.join(TEAMS)}? It is about a {team}."
        lines.append(f"2026-01-02;{asked};{team}")
        said = f"We sent letter {rng.randrange(10**6)} about the fee of € {number} to the customer."
        lines.append(f"2026-01-03;What became of complaint {rng.randrange(10**6)} so far?;{said}")
    lines += [lines[1], "2026-01-04;no answer"]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def prepare(tmp_path: Path, source: Path, **more: Any) -> tiny.Said:
    columns = {"user": "customer_query", "assistant": "agent_reply"}
    changes = {"data.sources": [{"path": str(source), "columns": columns}], "out": str(tmp_path)}
    changes |= {"model.path": str(tiny.base()), "data.near_duplicates": 1, **more}
    words = [w for k, v in changes.items() for w in ("-s", f"{k}={json.dumps(v)}")]
    return tiny.fintune("prepare", "-c", "smollm2-135m", *words)


def test_rows_are_counted_by_reason_and_a_verdict_is_told_before_training(tmp_path: Path) -> None:
    said = prepare(tmp_path, tickets(tmp_path / "in.csv", 120))
    assert said.code == 0, said.err
    rows = json.loads((tmp_path / "data" / "manifest.json").read_text())["rows"]
    assert rows["dropped"] == {"duplicate": 1, "wrong_cells": 1}, "short answers are kept"
    assert all(f"       1 {reason}: " in said.err for reason in rows["dropped"])
    assert "test_share is not set: 40%" in said.err
    assert "no verdict is possible, 100 questions and 20 effective documents" in said.err
    assert "set a judge" in said.err and "times as many rows" in said.err
    again = prepare(tmp_path / "more", tickets(tmp_path / "in.csv", 700))
    assert "no verdict" not in again.err and " checkable questions of " in again.err
    assert "points would usually be missed" in again.err


def test_the_outlook_counts_what_the_evaluation_counts(chain: tiny.Chain) -> None:
    words = [str(word) for word in chain.words()]
    config = load_config(words[1], [word for word in words[2:] if word != "-s"])
    facts = outlook.outlook(config)
    results = json.loads((chain.eval / "test_results.json").read_text())
    assert facts["questions"] == results["n"]["deciding"]
    asked = results["accuracy"]["difference"]
    assert facts["documents"] == asked["clusters"]
    assert bool(facts["impossible"]) == (asked["n"] < 100 or asked["effective"] < 20)


def test_few_rows_have_a_larger_test_share() -> None:
    shares = [share_of_test(rows) for rows in (100, 499, 999, 1999, 3999, 4000, 10**6)]
    assert shares == sorted(shares, reverse=True) and shares[-1] == LEAST_TEST_SHARE
    assert [round(rows * share_of_test(rows)) for rows in (500, 1000, 2000, 4000)] == [
        150, 200, 200, 200,
    ]  # fmt: skip


def test_other_encodings_and_spreadsheets_are_named(tmp_path: Path) -> None:
    said = prepare(tmp_path, tickets(tmp_path / "in.csv", 400, "cp1252"))
    assert "not_utf8: " in said.err and "data.encoding" in said.err
    assert "50% of the rows are dropped, mostly not_utf8" in said.err
    (tmp_path / "in.xlsx").write_bytes(b"PK\x03\x04")
    assert "save it as CSV UTF-8" in prepare(tmp_path / "x", tmp_path / "in.xlsx").err


def test_init_looks_at_the_rows(tmp_path: Path) -> None:
    source, out = tickets(tmp_path / "in.csv", 120, "cp1252"), tmp_path / "mine.yaml"
    said = tiny.done("init", "--source", source, "--out", out)
    assert "about 24 checkable questions, 100 make a verdict" in said.err
    data = yaml.safe_load(out.read_text())["data"]
    assert data["sources"][0]["columns"] == {"user": "customer_query", "assistant": "agent_reply"}
    assert (data["encoding"], data.get("filter_english_only")) == ("cp1252", None)
    assert "data.encoding=cp1252" in said.out
    german = "Frage;Antwort\n" + "Wie hoch ist die Rate für das Jahr?;Sie beträgt neun Euro.\n" * 9
    source.write_text(german)
    tiny.done("init", "--source", source, "--out", out, "--force")
    assert yaml.safe_load(out.read_text())["data"]["filter_english_only"] is False
    for wrong in (
        ("--source", tmp_path / "no.csv"),
        ("--base", tmp_path / "no"),
        ("--base", "./b"),
    ):
        refused = tiny.fintune("init", *wrong, "--out", tmp_path / "other.yaml")
        assert (refused.code, (tmp_path / "other.yaml").exists()) == (1, False), refused.err


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_keeps_step_and_time(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        console, "err", Console(file=out, force_terminal=True, width=width, soft_wrap=True)
    )
    with console.meter("train", 1560) as bar:
        bar.advance(45, note="loss 1.335  145 tokens/s  padding 0.7%  11.2 GB")
        bar._progress.refresh()
    assert "45/1560" in out.getvalue() and "loss 1.335" in out.getvalue()
    assert "…" not in out.getvalue() and "GB" not in out.getvalue()


def test_a_terminal_breaks_lines_between_words_but_never_a_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    narrow = Console(file=out, force_terminal=True, width=60, soft_wrap=True, color_system=None)
    monkeypatch.setattr(console, "err", narrow)
    monkeypatch.setattr(console, "PROGRAM", ["fintune"])
    monkeypatch.setattr(console, "GIVEN", ["--config", "tickets.yaml"])
    console.warn("questions " * 20)
    assert all(set(line.split()) <= {"note:", "questions"} for line in out.getvalue().splitlines())
    console.fail("other inputs: choose another folder, or make it again: fintune eval --fresh")
    assert out.getvalue().endswith("again: fintune eval --fresh --config tickets.yaml\n")


def test_hints_repeat_the_config(tmp_path: Path) -> None:
    words = ("-c", tiny.config(), "-s", f"out={tmp_path / 'a b'}")
    said = tiny.fintune("train", *words)
    assert f"run: fintune prepare -c {tiny.config()} -s 'out={tmp_path / 'a b'}'" in said.err
    for called in ([sys.executable, "-m", "fintune"], [tiny.program()]):
        given = [*called, "show", tmp_path / "none"]
        env = {**os.environ, "PATH": "/nowhere"}
        done = subprocess.run(given, capture_output=True, text=True, check=False, env=env)
        name = shlex.join(called)
        assert f"({name} runs shows them); to make one: {name} eval" in done.stderr


def test_a_row_or_two_are_refused_with_the_reason(tmp_path: Path) -> None:
    for count in range(3):
        source, out = tmp_path / f"{count}.csv", tmp_path / str(count)
        lines = [f"What is the fee of card {at} a year?,{at}0 euros a year" for at in range(count)]
        source.write_text("\n".join(["customer_query,agent_reply", *lines]) + "\n")
        said = prepare(out, source)
        reason = f"{count} rows: too few, no " if count else "0 rows read: the sources are empty"
        assert said.code == 1 and reason in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("verify", "nowhere"), "no release folder at nowhere"),
        (("chat", "nowhere"), "no release folder at nowhere"),
        (("verify", "run"), "did you mean run/release?"),
        (("train", "-c", "nosuch"), "no config file at nosuch"),
        (("serve", "run/release", "--port", "{port}"), "give another --port"),
    ],
)
def test_a_wrong_path_is_told_before_torch_is_loaded(
    words: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    (tmp_path / "run" / "release").mkdir(parents=True)
    (tmp_path / "run" / "release" / "adapter_config.json").write_text("{}")
    code = "import sys; from fintune import cli\ntry: cli.main()\n"
    code += "finally: print('torch' in sys.modules)"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [word.format(port=taken.getsockname()[1]) for word in words]
        done = subprocess.run(
            [sys.executable, "-c", code, *given],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert says in done.stderr and done.stdout == "False\n", done.stderr
    assert done.returncode == (2 if words[0] == "serve" else 1)


def test_ctrl_c_is_answered_and_is_no_error(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path / "tiny", "data")
    metrics = copy.out / "run" / "metrics.jsonl"
    process = tiny.Forked("train", *copy.words(max_steps=3_000), log=tmp_path / "log")
    while process.running() and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send(signal.SIGINT)
    assert process.wait() == 75
    assert "stopping after this step; again to stop now" in process.text()
    assert "\nstopped " in process.text() and "saved" in process.text(), process.text()
    assert "error:" not in process.text()


def test_help_version_and_completion() -> None:
    assert tiny.done("-V").out == tiny.done("--version").out
    assert "--force-resume" in tiny.done("help", "train").out
    known = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert "fintune_completion()" in tiny.fintune("--show-completion", "bash", env=known).out
