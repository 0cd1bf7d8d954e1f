"""`fintune doctor`: light, honest about what is missing, silent about secrets."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fintune import doctor, nano


def findings() -> dict[str, doctor.Finding]:
    return {row.name: row for row in doctor.examine()}


def test_everything_is_reported_and_essentials_are_here() -> None:
    found = findings()
    assert {
        "python", "packages", "extra serve", "extra export", "CPU", "memory",
        "disk, here", "hub token", "nano base", "published 8B recipe",
    } <= set(found)  # fmt: skip
    assert "GPU" in found or "GPU 0" in found
    assert [row for row in found.values() if row.status == "missing"] == []


def test_a_secret_is_reported_by_being_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert findings()["judge key"].found == "not set"
    monkeypatch.setenv("HF_TOKEN", "hf_never_printed_anywhere")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-printed-anywhere")
    rows = doctor.examine()
    doctor.show(rows)
    found = {row.name: row.found for row in rows}
    assert (found["hub token"], found["judge key"]) == ("set", "set")
    assert "never" not in capsys.readouterr().out + repr(rows)


def test_what_is_missing_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name in {"peft", "uvicorn"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.0.0" if name == "transformers" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    monkeypatch.setattr(nano, "base_dir", lambda: tmp_path)
    found = findings()
    assert found["packages"].status == "missing"
    assert "peft absent (needs " in found["packages"].found
    assert "transformers 5.0.0 (needs " in found["packages"].found
    assert (found["extra serve"].status, found["extra serve"].found) == ("note", "without uvicorn")
    assert "fintune serve" in found["extra serve"].advice
    assert found["nano base"].status == "missing"


@pytest.mark.parametrize("broken", [False, True])
def test_the_exit_code_tells_and_nothing_heavy_is_loaded(broken: bool) -> None:
    code = "import sys; from fintune import cli, nano; from pathlib import Path\n"
    if broken:
        code += "nano.base_dir = lambda: Path('/nowhere')\n"
    code += (
        "sys.argv = ['fintune', 'doctor', '--json']\n"
        "try: cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'transformers', 'peft', 'datasets', 'bitsandbytes'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == broken, done.stderr
    rows = json.loads(done.stdout)
    assert all(set(row) == {"name", "status", "found", "advice"} for row in rows)
