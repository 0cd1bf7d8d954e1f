"""The command line: one readable message and the right exit code; nothing half-written."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from tiny import ROOT

from fintune import cli

ROWS = ROOT / "src" / "fintune" / "sample" / "made_up_rows.jsonl"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command; the demo gets the tiny base."""
    if ("-c" in words or words[0] == "demo") and not any("model." in word for word in words):
        words = (*words, "-s", f"model.path={tiny.base()}")
    before, sys.argv = sys.argv, ["fintune", *words]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def row(user: str = "What is EBITDA?" + " Tell me more about it." * 8) -> str:
    return json.dumps({"user": user, "assistant": "Earnings before interest and more. " * 6}) + "\n"


def bad_inputs(root: Path, tiny_base: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> overrides of the preset demo, and words that the message must hold."""
    (root / "empty").mkdir()
    (root / "columns.jsonl").write_text('{"alpha": "1", "beta": "2"}\n')
    (root / "broken.jsonl").write_text("this is not JSON\n")
    (root / "list.jsonl").write_text("[1, 2]\n")
    (root / "short.jsonl").write_text(json.dumps({"user": "Hi", "assistant": "Ho"}) + "\n")
    (root / "good.jsonl").write_text(row())
    (root / "weightless").mkdir()
    (root / "weightless" / "config.json").write_text("{}")
    (root / "hooked").mkdir()
    (root / "hooked" / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    (root / "wordless").mkdir()
    for path in tiny_base.iterdir():
        if path.suffix != ".jinja":
            (root / "wordless" / path.name).write_bytes(path.read_bytes())
    good = f"data.source={root / 'good.jsonl'}"
    return {
        "a missing file": ([f"data.source={root / 'no.jsonl'}"], "no file or folder at"),
        "a folder without data": ([f"data.source={root / 'empty'}"], "holds no data file"),
        "unknown columns": ([f"data.source={root / 'columns.jsonl'}"], "alpha"),
        "only broken lines": ([f"data.source={root / 'broken.jsonl'}"], "not_json"),
        "only lists": ([f"data.source={root / 'list.jsonl'}"], "not_an_object"),
        "nothing left": ([f"data.source={root / 'short.jsonl'}"], "too_short"),
        "no base folder": ([good, f"model.path={root / 'nothing'}"], "no folder at"),
        "code in a base": ([good, f"model.path={root / 'hooked'}"], "auto_map"),
        "no template": ([good, f"model.path={root / 'wordless'}"], "no chat template"),
        "no network": ([good, "model.id=meta-llama/Meta-Llama-3.1-8B-Instruct"], "model.path"),
        "an unknown key": ([good, "data.min_token=3"], "did you mean data.min_tokens?"),
        "a wrong type": ([good, "data.min_tokens=few"], "data.min_tokens"),
    }


CASES = (
    "a missing file",
    "a folder without data",
    "unknown columns",
    "only broken lines",
    "only lists",
    "nothing left",
    "no base folder",
    "code in a base",
    "no template",
    "no network",
    "an unknown key",
    "a wrong type",
)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_message(
    case: str, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, expected = bad_inputs(tmp_path, tiny_base)[case]
    sets = [
        word for override in [*overrides, f"out={tmp_path / 'out'}"] for word in ("-s", override)
    ]
    code, _, err = run(capsys, "prepare", "-c", "demo", *sets)
    assert code == (3 if case == "code in a base" else 1), err
    assert expected in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "data").exists(), "nothing half-written under a final name"


def test_a_base_without_weights_is_refused_by_train(
    tmp_path: Path, prepared: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in tiny_base.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    sets = [f"data.out={prepared}", f"model.path={tmp_path}", f"out={tmp_path / 'out'}"]
    code, _, err = run(capsys, "train", "-c", "demo", *(w for s in sets for w in ("-s", s)))
    assert (code, "holds no weights" in err) == (1, True)


def test_one_bad_row_never_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ROWS.read_text(encoding="utf-8").splitlines(keepends=True)[:120]
    lines[3:3] = ["not json\n", "[1]\n", '{"user": 7, "assistant": {}}\n', "\n"]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    sets = [f"data.source={tmp_path / 'rows.jsonl'}", f"out={tmp_path / 'out'}"]
    code, out, _ = run(
        capsys, "prepare", "-c", "demo", "--json", *(w for s in sets for w in ("-s", s))
    )
    rows = json.loads(out)["rows"]
    assert code == 0
    assert rows["read"] == 123, "a blank line is no row"
    kept = sum(rows[part] for part in ("train", "validation", "test"))
    assert rows["read"] == kept + sum(rows["dropped"].values())
    assert rows["dropped"]["not_json"] == 1
    code, out, _ = run(
        capsys, "dropped", "-c", "demo", "--reason", "not_json",
        *(w for s in sets for w in ("-s", s)),
    )  # fmt: skip
    assert code == 0
    assert " 4 " in out, "the ledger names the line"
    for line, word in (("4", "not_json"), ("1", "trained")):
        code, out, _ = run(
            capsys, "inspect", "-c", "demo", "--source", "rows.jsonl", "--line", line,
            *(w for s in sets for w in ("-s", s)),
        )  # fmt: skip
        assert code == 0 and word in out


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "prepare", "--no-such-option")[0] == 2
    assert run(capsys, "no-such-verb")[0] == 2


def test_without_a_config_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "prepare")
    assert (code, "smollm2-135m" in err) == (1, True)
    assert run(capsys, "init", "--preset", "demo")[0] == 0
    assert "fintune.yaml" in [path.name for path in tmp_path.iterdir()]
    assert run(capsys, "init")[0] == 1, "never over an existing file"


@pytest.mark.parametrize(
    "words",
    [("prepare", "-s", "out={}/x"), ("train", "-s", "out={}/x/y"), ("run", "-s", "data.out={}/x"),
     ("demo", "--out", "{}/x"), ("init", "--preset", "demo", "--out", "{}/x/a.yaml"),
     ("export", "gguf", "release", "--out", "{}/x/a.gguf")],
)  # fmt: skip
def test_a_place_below_a_file_is_one_message(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    preset = () if words[0] in ("demo", "init", "export") else ("-c", "demo")
    given = [word.format(tmp_path / "file") for word in words]
    code, _, said = run(capsys, *given[:1], *preset, *given[1:])
    assert (code, "Traceback" in said) == (1, False), said
    assert "Not a directory" in said or "File exists" in said
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("place", ["/proc/x/y", "{}/" + "x" * 300, "{}/" + "x" * 248])
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = run(capsys, "prepare", "-c", "demo", "-s", f"data.out={place.format(tmp_path)}")
    assert (code, "cannot be written" in said, "rows read" in said) == (1, True, False), said


def test_an_interrupt_while_modules_are_loaded_shows_no_traceback() -> None:
    code = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "fintune.cli":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.meta_path.insert(0, Interrupt())
from fintune.__main__ import main
main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (-signal.SIGINT, "", "")
