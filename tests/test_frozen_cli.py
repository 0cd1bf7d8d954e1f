"""Frozen: verbs without a stage, exit codes, and that `run` is its four stages."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

VERBS = (
    *(
        "chat",
        "demo",
        "doctor",
        "dropped",
        "eval",
        "export",
        "init",
        "inspect",
        "judge",
        "plan",
        "prepare",
    ),
    *("release", "run", "serve", "train", "verify"),
)


def test_help_names_every_verb() -> None:
    said = tiny.done("--help")
    assert all(f" {verb} " in said.out for verb in VERBS)
    for verb in VERBS:
        assert "Usage: " in tiny.done(verb, "--help").out


def test_version() -> None:
    found = tiny.done("--version").out.strip()
    assert found
    assert all(part.isdigit() for part in found.split("."))


@pytest.mark.parametrize(
    "words", [("nonsense",), ("prepare", "--nonsense"), ("verify",), ("dropped", "--count", "0")]
)
def test_a_wrong_use_ends_with_2(words: tuple[str, ...]) -> None:
    said = tiny.fintune(*words)
    assert said.code == 2
    assert said.err.startswith("Usage: ")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("data.min_token=3", "did you mean data.min_tokens?"),
        ("seed=many", "seed: "),
        ("seed", "not of the form key=value"),
        ("train.lora.rr=4", "train.lora.rr: unknown key"),
    ],
)
def test_a_wrong_setting_is_one_message(setting: str, named: str) -> None:
    said = tiny.fintune("prepare", "-c", tiny.config(), "-s", setting)
    assert (said.code, named in said.err) == (1, True), said.err
    assert "Traceback" not in said.err


def test_all_wrong_settings_are_told_at_once() -> None:
    said = tiny.fintune("prepare", "-c", tiny.config(), *("-s", "seed=x"), *("-s", "nothing=1"))
    assert said.code == 1
    assert "seed: " in said.err
    assert "nothing: unknown key" in said.err


def test_every_setting_of_the_tests_is_a_key(tmp_path: Path) -> None:
    """So that no test takes the refusal of an old name for the one that it looks for."""
    values = {name: value for name, (_, value) in tiny.SETTINGS.items()}
    values |= {"out": tmp_path, "base_path": tiny.base(), "data_out": tmp_path / "data"}
    tiny.done("plan", "-c", tiny.config(), *tiny.words(**values))


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        said = tiny.fintune("prepare")
    assert (said.code, "no config file at fintune.yaml" in said.err) == (1, True), said.err
    other = tiny.fintune("prepare", "-c", "demoo")
    assert (other.code, "did you mean demo?" in other.err) == (1, True), other.err


def test_doctor_reports_what_is_here() -> None:
    findings = tiny.answer_json("doctor")
    assert {"name", "status", "value", "advice"} == set(findings[0])
    status = {finding["name"]: finding["status"] for finding in findings}
    assert {"python", "packages", "CPU", "GPU", "memory"} <= set(status)
    assert status["python"] == status["packages"] == "ok"


def test_init_writes_a_config_that_the_verbs_take(chain: tiny.Chain, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    given = ("--source", tiny.rows(), "--base", tiny.base(), "--name", "mine", "--out", path)
    tiny.done("init", "--preset", "demo", *given)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (tree["name"], tree["out"]) == ("mine", "runs/mine")
    again = tiny.fintune("init", "--preset", "demo", *given)
    assert (again.code, "exists already" in again.err) == (1, True)
    plan = tiny.answer_json("plan", "-c", path, *tiny.words(out=tmp_path / "out"))
    assert plan["base"]["parameters"] == 377_472


def test_run_makes_what_is_missing_and_keeps_what_is_there(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path / "tiny", "data", "run")
    kept = [path for path in copy.out.rglob("*") if path.name != "evaluations.jsonl"]  # grows
    before = {path: path.stat().st_mtime_ns for path in kept}
    tiny.done("run", *copy.words())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert tiny.tree_sha256(copy.eval) == tiny.tree_sha256(chain.eval)
    assert tiny.tree_sha256(copy.release) == tiny.tree_sha256(chain.release)
    again = tiny.done("run", *copy.words())
    assert again.err.count("unchanged") == len(tiny.VERBS)


# ---- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def volume() -> Iterator[Path]:
    """A volume of half a megabyte, which root can mount."""
    folder = Path(tempfile.mkdtemp(prefix="volume-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    able = os.geteuid() == 0 and shutil.which("mount") is not None
    if not able or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a volume to fill")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


def stages(chain: tiny.Chain, volume: Path) -> dict[str, tuple[Path, list[Any]]]:
    """Verb -> the folder that it writes on the volume, and its words."""
    words, why = chain.words(), ("--accept", tiny.REASON)
    return {
        "prepare": (volume / "data", tiny.chain(volume)),
        "eval": (volume / "eval", [*words, *tiny.words(eval_out=volume / "eval")]),
        "release": (
            volume / "release",
            [*words, *tiny.words(release_out=volume / "release"), *why],
        ),
    }


@pytest.mark.parametrize("verb", ["prepare", "eval", "release"])
def test_a_full_disk_ends_with_74_and_room_ends_in_the_same_bytes(
    verb: str, chain: tiny.Chain, volume: Path
) -> None:
    folder, words = stages(chain, volume)[verb]
    ballast = volume / "ballast"
    free = shutil.disk_usage(volume).free
    ballast.write_bytes(bytes(free - 16_384))
    said = tiny.fintune(verb, *words)
    assert said.code == 74, said.err
    assert "Traceback" not in said.err
    assert not (folder / "done.json").exists()
    assert not (folder / "SHA256SUMS").exists()
    ballast.unlink()
    tiny.done(verb, *words)
    kept = {"prepare": chain.data, "eval": chain.eval, "release": chain.release}[verb]
    found = tiny.tree_sha256(folder)
    sealed = {name: digest for name, digest in tiny.tree_sha256(kept).items() if name[0] != "."}
    sealed.pop("evaluations.jsonl", None)  # grows when the data are sealed
    for name, digest in sealed.items():
        # An evaluation keeps a line that was cut off beside its file, and seals it.
        assert found[name] == digest or (verb, name) == ("eval", "done.json"), name


def test_results_go_to_standard_output_alone(chain: tiny.Chain) -> None:
    """Of finished stages; progress and notices go to standard error."""
    for verb in ("prepare", "train", "plan", "doctor"):
        said = tiny.done(verb, "--json", *([] if verb == "doctor" else chain.words()))
        json.loads(said.out)
