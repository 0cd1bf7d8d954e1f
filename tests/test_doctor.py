"""`fintune doctor`: light, honest about what is missing, silent about secrets."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import tiny


def findings() -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in json.loads(tiny.fintune("doctor", "--json").out)}


def test_a_secret_is_reported_by_being_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_printed_anywhere")
    assert findings()["hub token"]["value"] == "set"
    assert "never" not in tiny.done("doctor").out


def test_what_is_missing_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name in {"peft", "uvicorn"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.0.0" if name == "transformers" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    found = findings()
    assert found["packages"]["status"] == "missing"
    assert "peft absent (needs " in found["packages"]["value"]
    assert "transformers 5.0.0 (needs " in found["packages"]["value"]
    serve = found["extra serve"]
    assert (serve["status"], serve["value"]) == ("note", "without uvicorn")
    assert serve["advice"] == "pip install 'fintune[serve]'"
    said = tiny.fintune("doctor")
    assert (said.code, "missing  packages" in said.out) == (1, True)


def test_nothing_heavy_is_loaded() -> None:
    code = (
        "import sys; from fintune import cli\n"
        "sys.argv = ['fintune', 'doctor']\n"
        "try: cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'transformers', 'peft', 'datasets', 'bitsandbytes'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
