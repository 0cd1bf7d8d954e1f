"""Hostile folders against every verb that reads one: refused by name, in time, nothing run.

`make test` takes every third of them, `make test-all` all.
"""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from fuzz import meaning, mutate, redo
from hostile import BASES, MARK, RELEASES, SUMS_CASES, Outcome, edit_json, make, run_verb
from tiny_release import built

EVERY = bool(os.environ.get("FINTUNE_TEST_ALL"))
CONTROLS = {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), 0x202E)}
SLOW = ("10^10 rounds", "explode", "explodes", "recursion")
"""Cases that end at the limit of 20 s of processor time."""


def chosen(names: list[str]) -> list[str]:
    """All cases, or the fast third of them."""
    fast = [name for name in names if not name.endswith(SLOW)]
    return names if EVERY else fast[::3]


@pytest.fixture(autouse=True)
def _mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    monkeypatch.setenv("COLUMNS", "200")


def check_refused(outcome: Outcome, tmp_path: Path, *, code: int = 3) -> None:
    assert outcome.code == code, outcome.output[-2000:]
    assert "Traceback" not in outcome.output
    assert "refused" in outcome.output or "asks to" in outcome.output
    assert not CONTROLS & set(outcome.output), "a control character reached the terminal"
    assert outcome.seconds < 140
    assert not (tmp_path / "mark").exists(), "code of the folder ran"


@pytest.mark.parametrize("name", chosen([*RELEASES]))
def test_verify_refuses(name: str, tmp_path: Path) -> None:
    release, base = built()
    kind, _, case = name.partition(": ")
    redone = kind != "sums" or case not in SUMS_CASES or case == "the base of another"
    folder = make(release, tmp_path / "release", RELEASES[name], sums=redone)
    words = ["verify", str(folder), "--base", str(base)]
    check_refused(run_verb(words, tmp_path / "log"), tmp_path)


VERBS = (
    "code: auto_map with a file", "code: attention kernel", "code: a pickle",
    "code: template to the class", "file: a link to a device", "file: weights as a FIFO",
    "file: a name that paints", "json: config not UTF-8", "json: 200,000 brackets",
    "json: modules that explode", "template: 10^10 rounds", "tokenizer: end of turn is another",
    "tokenizer: a pattern that explodes", "weights: NaN", "sums: one bit",
    "sums: the base of another",
)  # fmt: skip


@pytest.mark.parametrize("verb", ["serve", "chat", "export"])
@pytest.mark.parametrize("name", chosen([*VERBS]))
def test_the_other_verbs_refuse(verb: str, name: str, tmp_path: Path) -> None:
    release, base = built()
    folder = make(release, tmp_path / "release", RELEASES[name], sums=name != "sums: one bit")
    words = {
        "serve": ["serve", str(folder), "--port", "0"],
        "chat": ["chat", str(folder)],
        "export": ["export", "merged", str(folder), "--out", str(tmp_path / "merged")],
    }[verb]
    outcome = run_verb([*words, "--base", str(base)], tmp_path / "log", stdin="y\nyes\n/quit\n")
    check_refused(outcome, tmp_path)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", chosen([*BASES]))
def test_prepare_refuses_a_base(name: str, tmp_path: Path) -> None:
    _, base = built()
    folder = make(base, tmp_path / "base", BASES[name])
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a b c", "output": "d e f"}\n')
    sets = [
        f"model.path={folder}",
        f"data.source={tmp_path / 'rows.jsonl'}",
        f"out={tmp_path / 'o'}",
    ]
    words = ["prepare", "-c", "demo", *(word for value in sets for word in ("-s", value))]
    check_refused(run_verb(words, tmp_path / "log", stdin="y\n"), tmp_path)
    assert not (tmp_path / "o" / "data").exists()


def test_code_that_a_base_needs_not_is_ignored_and_said(tmp_path: Path) -> None:
    """Published Phi and DeepSeek folders carry auto_map for classes that transformers has."""
    _, base = built()
    names = {"AutoConfig": "cfg.C", "AutoModelForCausalLM": "cfg.M"}
    folder = make(base, tmp_path / "base", edit_json("config.json", auto_map=names))
    words = ["prepare", "-c", "demo", "-s", f"model.path={folder}", "-s", f"out={tmp_path / 'o'}"]
    outcome = run_verb([*words, "-s", "data.source=nothing.jsonl"], tmp_path / "log", stdin="y\n")
    assert outcome.code == 1, outcome.output
    assert "names code that is never imported (config.json: auto_map)" in outcome.output
    assert not (tmp_path / "mark").exists()


def test_links_of_a_hub_cache_are_followed_into_its_blobs_alone(tmp_path: Path) -> None:
    release, base = built()
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    shutil.copytree(release, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    words = ["verify", str(snapshot), "--base", str(base)]
    assert run_verb(words, tmp_path / "log").code == 0
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to(release / "README.md")
    check_refused(run_verb(words, tmp_path / "log"), tmp_path)


def test_a_good_release_passes_every_verb(tmp_path: Path) -> None:
    release, base = built()
    folder = shutil.copytree(release, tmp_path / "release")
    words = ["verify", str(folder), "--base", str(base), "--json"]
    good = run_verb(words, tmp_path / "log")
    assert good.code == 0, good.output
    talk = run_verb(["chat", str(folder), "--base", str(base)], tmp_path / "log", stdin="hello\n")
    assert talk.code == 0, talk.output


def test_random_changes_never_pass(tmp_path: Path) -> None:
    """No traceback, no hang; what passes says the same, unless every hash was forged."""
    release, base = built()
    passed = 0
    for seed in range(1000 if EVERY else 60):
        rng = random.Random(seed)
        folder = shutil.copytree(release, tmp_path / f"{seed}")
        how = rng.choice(["none", "sums", "all"])
        done = f"seed {seed}: {mutate(folder, rng)}, redone: {how}"
        redo(folder, release, how)
        words = ["verify", str(folder), "--base", str(base), "--json"]
        outcome = run_verb(words, tmp_path / "log", limit_s=140)
        assert outcome.code in (0, 3), f"{done}\n{outcome.output[-3000:]}"
        assert "Traceback" not in outcome.output, f"{done}\n{outcome.output[-3000:]}"
        start = re.search(r"^\[", outcome.output, re.MULTILINE)
        assert start, f"{done}: no JSON\n{outcome.output}"
        found, _ = json.JSONDecoder().raw_decode(outcome.output, start.start())
        failed = [check for check in found if check["status"] == "failed"]
        assert bool(failed) == (outcome.code == 3), f"{done}: {found}"
        if outcome.code == 0:
            passed += 1
            same = meaning(folder) == meaning(release)
            card_alone = how == "sums" and "README.md" in done
            assert same or how == "all" or card_alone, f"{done}\n{outcome.output[-3000:]}"
        shutil.rmtree(folder)
    assert passed < 500, "the changes change nothing"
