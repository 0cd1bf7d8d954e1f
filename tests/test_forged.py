"""Edits of one file of a finished chain, each refused by the next verb that reads that file.

Of equal size (`=`) and of another; a release's files also with their line in SHA256SUMS redone.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny

from fintune import cli, verify
from fintune.config import dump_yaml, load_config

ADAPTER = "best/adapter_model.safetensors"
JUDGED = "eval_50_gpt_judged_raw.jsonl"
Change = Callable[[bytes], bytes]


class Edit(NamedTuple):
    """A file below the chain's root, how it is changed, and who must refuse it."""

    path: str
    change: Change
    verbs: tuple[str, ...]
    exit_code: int = 1
    names: str = ""
    """What the message holds; absent: the file's name."""
    resealed: bool = False
    """The folder's own list of hashes is made to agree with the edit."""


def flip(share: float) -> Change:
    """One bit, that far into the file."""

    def change(data: bytes) -> bytes:
        at = int(share * len(data))
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return change


def swap(old: str, new: str) -> Change:
    """The first of a text by another."""

    def change(data: bytes) -> bytes:
        assert old.encode() in data, old
        return data.replace(old.encode(), new.encode(), 1)

    return change


def first_line_gone(data: bytes) -> bytes:
    return data[data.index(b"\n") + 1 :]


def first_item_gone(data: bytes) -> bytes:
    """Both models' answers to it."""
    return first_line_gone(first_line_gone(data))


def appended(data: bytes) -> bytes:
    return data + b"\n"


BETTER = swap('"verdict": "invalid",', '"verdict": "better", ')
RIGHT = swap('"text": "', '"text": "7')
EDITS = {
    "= a bit of the training rows": Edit("data/train.parquet", flip(0.3), ("train", "eval")),
    "= another bit of them": Edit("data/train.parquet", flip(0.6), ("release", "plan")),
    "= a bit of the test rows": Edit(
        "data/test.parquet", flip(0.3), ("eval", "train", "plan")
    ),
    "more validation rows": Edit("data/validation.parquet", appended, ("release",)),
    "= test rows, resealed": Edit(
        "data/test.parquet", flip(0.999), ("release",), 3, "decided by other rows", True
    ),
    "= the manifest": Edit("data/manifest.json", swap('"read": 2', '"read": 9'), ("release",)),
    "the manifest": Edit("data/manifest.json", swap('"read": 2', '"read": 92'), ("eval",)),
    "= the ledger": Edit("data/ledger.parquet", flip(0.5), ("dropped",)),
    "= the training config": Edit("run/config.yaml", swap("seed: 42", "seed: 43"), ("release",)),
    "the training config": Edit("run/config.yaml", swap("seed: 42", "seed: 421"), ("eval",)),
    "= the run's seal": Edit(
        "run/done.json", swap('"seed": 42', '"seed": 43'), ("eval", "release", "train")
    ),
    "= the adapter": Edit(f"run/{ADAPTER}", flip(0.9), ("eval", "release", "train")),
    "= the adapter's scale": Edit(
        "run/best/adapter_config.json", swap('"lora_alpha": 32', '"lora_alpha": 64'), ("eval",)
    ),
    "= the log of losses": Edit("run/metrics.jsonl", swap('"loss": ', '"loss":1'), ("release",)),
    "a line of the log gone": Edit("run/metrics.jsonl", first_line_gone, ("eval",)),
    "= the measured facts": Edit(
        "run/environment.json", swap('"seconds": ', '"seconds":1'), ("release",)
    ),
    "= the verdict": Edit("eval/test_results.json", BETTER, ("release", "eval")),
    "the verdict": Edit(
        "eval/test_results.json", swap('"invalid"', '"better"'), ("release", "judge")
    ),
    "= the verdict, resealed": Edit(
        "eval/test_results.json", BETTER, ("release",), 3, resealed=True
    ),
    "= an answer": Edit(
        "eval/predictions.jsonl", swap('"text": "', '"text":"7'), ("eval --rescore", "release")
    ),
    "an answer": Edit("eval/predictions.jsonl", RIGHT, ("eval --rescore", "release")),
    "an answer, resealed": Edit(
        "eval/predictions.jsonl", first_item_gone, ("release",), 3, "test_results.json", True
    ),
    "= a held-out loss": Edit(
        "eval/heldout.jsonl", swap('"adapter": ', '"adapter":-'), ("eval --rescore", "release")
    ),
    "= a held-out loss, resealed": Edit(
        "eval/heldout.jsonl", swap('"adapter": ', '"adapter":-'), ("release",), 3,
        "test_results.json", True,
    ),
    "an answer without its item, resealed": Edit(
        "eval/predictions.jsonl", swap('"item"', '"it"'), ("release",), 3, "test_results.json", True
    ),
    "= a judged row": Edit(
        f"eval/{JUDGED}", swap('"unscored"', '"scored"  '), ("eval --rescore", "release")
    ),
    "a judged row": Edit(f"eval/{JUDGED}", first_line_gone, ("eval --rescore", "release")),
}  # fmt: skip

SHIPPED = {
    "= the verdict": ("test_results.json", BETTER),
    "the verdict": ("test_results.json", swap('"invalid"', '"better"')),
    "= a judged row": (JUDGED, swap('"not_judged"', '"scored"    ')),
    "a judged row": (JUDGED, first_line_gone),
    "= the adapter": ("adapter_model.safetensors", flip(0.99)),
    "= the adapter's scale": ("adapter_config.json", swap('alpha": 32', 'alpha": 64')),
    "= the training config": ("training_config.json", swap('"seed": 42', '"seed": 43')),
    "the training config": ("training_config.json", swap('"seed": 42', '"seed": 421')),
    "= no provenance": ("training_config.json", swap('"provenance"', '"provinance"')),
    "= its provenance": ("training_config.json", swap('"accepted": "', '"accepted":"A')),
    "provenance of another type": (
        "training_config.json",
        lambda data: json.dumps(json.loads(data) | {"provenance": 7}).encode(),
    ),
    "= the card's verdict": ("README.md", swap("Verdict: **invalid**.", "Verdict: **better**. ")),
    "a second verdict": ("README.md", lambda data: data + b"\nVerdict: **better**.\n"),
    "= the template": ("chat_template.jinja", swap("system", "sYstem")),
    "= a tolerance": ("prompt_fixture.json", swap('"format": 3', '"format":33')),
}
"""Files of a release and how they are changed; each once as it is, once with its line redone."""


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, prepared: Path, tiny_base: Path) -> Path:
    """A root with data, run, eval and release, made through the command line."""
    root = tmp_path_factory.mktemp("chain")
    shutil.copytree(prepared, root / "data")
    shutil.copy(prepared.parent / "rows.jsonl", root)
    values = {
        "out": root,
        "data.source": root / "rows.jsonl",
        "model.path": tiny_base,
        "model.id": "test/tiny",
        "train.max_steps": 2,
        "train.max_eval_samples": 6,
        "train.precision": "fp32",
        "eval.max_new_tokens": 2,
    }
    config = load_config("demo", [f"{key}={value}" for key, value in values.items()])
    (root / "config.yaml").write_text(dump_yaml(config))
    assert fintune(root, "run", "--accept", "a test")[0] == 0
    return root


def fintune(root: Path, *words: str) -> tuple[int, str]:
    """Exit code and what stands on standard error of a command on a chain."""
    before = sys.argv
    about = [] if words[0] == "verify" else ["-c", str(root / "config.yaml"), "-s", f"out={root}"]
    if "--rescore" in words:
        about = [str(root / "eval")]
    sys.argv = ["fintune", *words, *about]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.argv = before
    return code, said.getvalue()


@pytest.fixture
def copy(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain, tmp_path / "chain"))


def edit(path: Path, change: Change, name: str) -> None:
    """Change a file and set its times back."""
    before, times = path.read_bytes(), path.stat()
    after = change(before)
    assert after != before and (len(after) == len(before)) == name.startswith("= "), name
    path.write_bytes(after)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", EDITS)
def test_the_next_verb_refuses_it(copy: Path, name: str) -> None:
    forged = EDITS[name]
    path, folder = copy / forged.path, copy / forged.path.partition("/")[0]
    edit(path, forged.change, name)
    if forged.resealed:
        done = json.loads((folder / "done.json").read_text())
        fact = {"bytes": path.stat().st_size, "sha256": tiny.file_sha256(path)}
        done["files"][path.relative_to(folder).as_posix()] = fact
        (folder / "done.json").write_text(json.dumps(done))
    for verb in forged.verbs:
        more = ["--accept", "a test"] if verb == "release" else []
        if verb == "release":
            shutil.rmtree(copy / "release")
        code, said = fintune(copy, *verb.split(), *more)
        assert code == forged.exit_code, said
        assert (forged.names or path.name) in said, said
        assert not more or not (copy / "release").exists()


EMPTY = hashlib.sha256(b"{}").hexdigest()
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "no UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "deep": b"[" * 200_000,
    "no inputs": b"{}",
    "inputs of another type": b'{"inputs": 7, "inputs_sha256": "", "files": {}}',
    "inputs that are no JSON": b'{"inputs": {"a": NaN}, "inputs_sha256": "", "files": {}}',
    "files of another type": b'{"inputs": {}, "inputs_sha256": "%s", "files": 7}' % EMPTY.encode(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_seal_is_one_message(copy: Path, name: str) -> None:
    for folder, verb in (("data", "train"), ("data", "prepare"), ("run", "eval"), ("eval", "eval")):
        path = copy / folder / "done.json"
        kept = path.read_bytes()
        path.write_bytes(DAMAGED[name])
        code, said = fintune(copy, verb)
        assert code == 1 and "done.json was changed or damaged" in said, said
        path.write_bytes(kept)


def test_a_seal_names_files_of_its_folder_alone(copy: Path) -> None:
    done = json.loads((copy / "data" / "done.json").read_text())
    fact = {"bytes": 1, "sha256": "0"}
    for name in ("../run/config.yaml", "/etc/passwd", "a" * 5000, "train.parquet/x", "\0", ""):
        forged = done | {"files": done["files"] | {name: fact}}
        (copy / "data" / "done.json").write_text(json.dumps(forged))
        code, said = fintune(copy, "eval")
        assert code == 1 and "is missing" in said, said
    shutil.rmtree(copy / "data")
    (copy / "data").mkdir()
    (copy / "data" / "done.json").write_text(json.dumps(done | {"files": {}}))
    code, said = fintune(copy, "eval")
    assert code == 1 and "train.parquet is missing" in said, said


def stated(release: Path, base: Path) -> dict[str, str]:
    """Outcome of the checks of what a release states of itself, without its sums."""
    (release / "SHA256SUMS").unlink(missing_ok=True)
    names = ("provenance", "card")
    return {c.name: c.status for c in verify(release, base=base).checks if c.name in names}


HOSTILE: dict[str, bytes] = {
    **{name: data for name, data in DAMAGED.items() if "files" not in name and "in" not in name},
    "a provenance of another type": b'{"provenance": [1]}',
    "an empty provenance": b'{"provenance": {}}',
    "hashes of other types": b'{"provenance": {"adapter_sha256": 7, "judged_sha256": {}}}',
    "files of another type": b'{"provenance": {}, "files": [1]}',
    "files elsewhere": b'{"provenance": {}, "files": {"/dev/zero": "", "../x": "", "\\u0000": 1}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_provenance_that_cannot_be_read_fails(copy: Path, tiny_base: Path, name: str) -> None:
    (copy / "release" / "training_config.json").write_bytes(HOSTILE[name])
    (copy / "release" / "test_results.json").write_bytes(HOSTILE[name])
    (copy / "release" / "README.md").write_bytes(b"\xff Verdict: **better**")
    assert stated(copy / "release", tiny_base)["provenance"] == "failed"


@pytest.mark.parametrize("redone", [False, True], ids=["", "line redone"])
@pytest.mark.parametrize("name", SHIPPED)
def test_verify_refuses_it(copy: Path, tiny_base: Path, name: str, redone: bool) -> None:
    (shipped, change), sums = SHIPPED[name], copy / "release" / "SHA256SUMS"
    path = copy / "release" / shipped
    old = tiny.file_sha256(path)
    edit(path, change, name)
    if redone:
        sums.write_text(sums.read_text().replace(old, tiny.file_sha256(path)))
    code, said = fintune(copy, "verify", str(copy / "release"), "--base", str(tiny_base))
    assert (code, shipped in said, "checksums: " in said) == (3, True, not redone), said


def test_what_nobody_changed_is_read(chain: Path, tiny_base: Path) -> None:
    """The refusals above are of the edits; every verb reads the chain itself."""
    for words in (
        ["train"],
        ["eval"],
        ["eval", "--rescore"],
        ["plan"],
        ["dropped"],
        ["release", "--accept", "a test"],
        ["verify", str(chain / "release"), "--base", str(tiny_base)],
    ):
        code, said = fintune(chain, *words)
        assert code == 0, said


def test_a_release_that_states_less_is_read(copy: Path, tiny_base: Path) -> None:
    """Until 0.2 three files alone were named; other tools name none."""
    path, card = copy / "release" / "training_config.json", copy / "release" / "README.md"
    tree = json.loads(path.read_text())
    for kept, found in (
        (tree.keys() - {"files"}, {"provenance": "ok", "card": "ok"}),
        (tree.keys() - {"files", "provenance"}, {"provenance": "note", "card": "ok"}),
    ):
        path.write_text(json.dumps({key: tree[key] for key in kept}))
        card.write_text("Verdict: **invalid**. Settings: `training_config.json`.")
        assert stated(path.parent, tiny_base) == found


def test_the_verdict_is_made_again_from_the_answers(copy: Path) -> None:
    """Rescoring undoes an edit of what it makes, and only of that."""
    kept = (copy / "eval" / "test_results.json").read_bytes()
    edit(copy / "eval" / "test_results.json", BETTER, "= ")
    assert fintune(copy, "eval", "--rescore")[0] == 0
    assert (copy / "eval" / "test_results.json").read_bytes() == kept


def test_the_adapter_config_has_one_order(chain: Path) -> None:
    config = json.loads((chain / "run" / "best" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 7
