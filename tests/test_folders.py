"""Folders of the user: what is never written, moved or shared, and how a signal leaves them."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import run
from tiny_eval import eval_config
from tiny_release import built, tiny_run
from tiny_release import tiny_base as release_base
from victims import at_call, harmed, send, settings

from fintune import cli, files, nano, pipeline, seal
from fintune.chat import ChatFormat
from fintune.config import Config, dump_yaml, load_config
from fintune.data import prepare as preparing
from fintune.data.prepare import prepare
from fintune.errors import ConfigError
from fintune.evals import evaluate as evaluating
from fintune.evals import judge
from fintune.model import find_base, load_tokenizer
from fintune.releasing import bundle, export
from fintune.training.run import train

KEYS = {"prepare": "data.out", "train": "train.out", "eval": "eval.out", "release": "release.out"}


def rows(root: Path, count: int = 200) -> str:
    """A setting that reads the first bundled rows."""
    lines = nano.rows_path().read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "rows.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return f"data.source={root / 'rows.jsonl'}"


@pytest.fixture(autouse=True)
def _results_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiny_run writes its results by hand; test_forged.py holds them against the answers."""
    monkeypatch.setattr(pipeline, "check_results", lambda folder: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Finished data, run and evaluation on a tiny base."""
    root = tmp_path_factory.mktemp("finished")
    config = tiny_run(root / "out", release_base(root / "base"))
    rows(config.out)
    files.write_text(config.out / "config.yaml", dump_yaml(config))
    base = find_base(config.model)
    template = ChatFormat(load_tokenizer(base), config.chat.date_string).template_sha256
    tokenizer = files.sha256_file(base.folder / "tokenizer.json")
    (config.data_dir / seal.DONE).unlink()
    words = {"tokenizer_sha256": tokenizer, "template_sha256": template}
    seal.seal(config.data_dir, words)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Rows and a run that can be evaluated."""
    config = eval_config(tmp_path_factory.mktemp("trained") / "out")
    files.write_text(config.out / "config.yaml", dump_yaml(config))
    return config


def words(config: Config, *changes: str) -> list[str]:
    """The options that name a config and what differs from it."""
    given = ["-c", str(config.out / "config.yaml")]
    return [*given, *(word for change in changes for word in ("-s", change))]


def tree(root: Path) -> dict[str, Any]:
    """Every path below a folder: its kind and mode, and what is in it."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        inside = path.read_bytes() if stat.S_ISREG(mode) else None
        found[str(path.relative_to(root))] = (
            mode,
            os.readlink(path) if path.is_symlink() else inside,
        )
    return found


def place(root: Path, name: str) -> str:
    """A folder that no stage may own, with what stands there; its spelling in a config."""
    (root / "photos").mkdir()
    (root / "photos" / "me.jpg").write_text("mine")
    lock = root / ".out.lock"
    if name == "a link":
        (root / "out").symlink_to(root / "photos")
    elif name == "a dangling link":
        (root / "out").symlink_to(root / "nowhere")
    elif name == "the lock is a link":
        lock.symlink_to(root / "photos" / "me.jpg")
    elif name == "the lock is a pipe":
        os.mkfifo(lock)
    elif name == "the lock is a folder":
        lock.mkdir()
    elif name == "the lock is another's file":
        lock.write_text("mine")
    spelled = {"above": "..", "home": str(root), "above home": str(root.parent)}
    return name if name in (".", "/") else spelled.get(name, str(root / "out"))


PLACES = (
    ".", "above", "/", "home", "above home", "a link", "a dangling link", "the lock is a link",
    "the lock is a pipe", "the lock is a folder", "the lock is another's file",
)  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("verb", KEYS)
def test_a_place_that_is_no_stages_is_refused_by_name_and_untouched(
    verb: str,
    name: str,
    finished: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "user"
    root.mkdir()
    spelled = place(root, name)
    monkeypatch.setenv("HOME", str(root if "home" in name else tmp_path / "elsewhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))  # remembered hashes
    monkeypatch.chdir(root / "photos" if name in (".", "above") else "/proc")
    before = tree(tmp_path)
    for fresh in ([], ["--fresh"]):
        code, _, said = run(capsys, verb, *words(finished, f"{KEYS[verb]}={spelled}"), *fresh)
        assert (code, "Traceback" in said) == (1, False), said
        named = root / ".out.lock" if "lock" in name else spelled
        ways = (f"{named} is ", f"{named} holds ", f"{named} cannot be ", f" ({named})")
        assert any(way in said for way in ways) and "--fresh)" not in said, said
        assert tree(tmp_path) == before


@pytest.mark.parametrize("done", [None, "{}", '{"format": 1, "files": {}}', "[" * 100_000, "\xff"])
@pytest.mark.parametrize("verb", KEYS)
def test_fresh_moves_no_folder_without_our_mark(
    verb: str,
    done: str | None,
    finished: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "rows.jsonl").write_text("mine")
    if done is not None:
        for name in ("done.json", "inputs.json", "training_config.json"):
            (tmp_path / "thesis" / name).write_text(done, encoding="latin-1")
    before = tree(tmp_path)
    for fresh in ([], ["--fresh"]):
        thesis = f"{KEYS[verb]}={tmp_path / 'thesis'}"
        code, _, said = run(capsys, verb, *words(finished, thesis), *fresh)
        foreign = "not of this stage" in said or "was changed or damaged" in said
        assert (code, foreign, "--fresh" in said) == (1, True, False), said
        (tmp_path / ".thesis.lock").unlink()
        assert tree(tmp_path) == before


def test_fresh_moves_what_is_ours_and_takes_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [w for s in (rows(tmp_path), f"out={tmp_path / 'out'}") for w in ("-s", s)]
    (tmp_path / "out" / "data").mkdir(parents=True)
    assert run(capsys, "prepare", "-c", "nano", *given, "--fresh")[0] == 0
    first = tree(tmp_path / "out" / "data")
    monkeypatch.chdir(tmp_path / "out" / "data")
    code, _, said = run(capsys, "prepare", "-c", "nano", *given, "--fresh")
    assert (code, "holds the current directory" in said) == (1, True), said
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "prepare", "-c", "nano", *given, "--fresh")[0] == 0
    assert tree(tmp_path / "out" / "data.old-1") == first
    assert sorted(os.listdir(tmp_path / "out")) == [".data.lock", "data", "data.old-1"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.out=x", "train.out=x"], "data.out lies in train.out"),
        (["train.out=x", "eval.out=x/eval"], "eval.out lies in train.out"),
        (["data.out=runs/n", "out=runs/n"], "train.out lies in data.out"),
        (["release.out=link/run/x", "train.out=real/run"], "release.out lies in train.out"),
        (["data.out=raw", "data.source=raw/*.jsonl"], "data.out"),
        (["train.out=raw", "data.sources=[{path: raw/a/rows.csv}]"], "train.out"),
        (["eval.out=raw", "data.benchmarks=[raw]"], "eval.out"),
    ],
)
def test_a_stage_has_a_folder_of_its_own_without_rows_in_it(
    changes: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ConfigError) as caught:
        load_config("nano", changes)
    assert says in str(caught.value) and len(str(caught.value)) < 400


def test_a_run_is_refused_before_its_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, said = run(capsys, "run", "-c", "nano", "-s", "out=out", "-s", "release.out=.")
    assert (code, os.listdir(tmp_path)) == (1, []), said


@pytest.mark.parametrize("out", ["2024", "010", "a: b", "x #y", "~/[z]", "true"])
def test_a_demo_goes_where_it_is_told(
    out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Config] = []
    monkeypatch.setattr(cli, "_run", lambda config, **_: taken.append(config))
    monkeypatch.setattr("fintune.demo.show", lambda config: None)
    assert run(capsys, "demo", "--out", out)[0] == 0
    assert taken[0].out == Path(out).expanduser()


@pytest.mark.parametrize("name", ["data", "[ab]", "data-x"])
def test_builds_of_other_folders_are_left_alone(name: str, tmp_path: Path) -> None:
    others = [".staging-data-y", ".staging-a", ".staging-data-x-old", ".staging-data-12345678"]
    for other in others:
        files.write_text(tmp_path / other / "half", "another build")
    with files.staged_folder(tmp_path / name) as staging:
        files.write_text(staging / "whole", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([name, *others])


def writing(name: str, config: Config, root: Path) -> list[str]:
    """The command of a verb that writes `root/taken`."""
    taken = str(root / "taken")
    if name == "rescore":
        return ["eval", "--rescore", taken]
    if name in ("merged", "gguf", "ollama"):
        folder, base = built()
        return ["export", name, str(folder), "--base", str(base), "--out", taken]
    key = KEYS.get(name, "eval.out")
    return [name, *words(config, f"{key}={taken}", "eval.judge.model=m")]


WRITES = ("prepare", "train", "eval", "rescore", "judge", "release", "merged", "gguf", "ollama")


@pytest.mark.parametrize("name", WRITES)
def test_every_verb_that_writes_takes_the_lock(
    name: str, finished: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("rescore", "judge"):
        shutil.copytree(finished.eval_dir, tmp_path / "taken")
    given = writing(name, finished, tmp_path)
    with seal.lock(tmp_path / "taken"):
        before = tree(tmp_path)
        code, _, said = run(capsys, *given)
        assert (code, f"written by process {os.getpid()}" in said) == (1, True), said
        assert tree(tmp_path) == before


@pytest.mark.parametrize("words", [["eval", "--rescore", "no/eval"], ["judge", "-c", "nano"]])
def test_what_is_not_there_gets_no_lock(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *words)[0] == 1
    assert os.listdir(tmp_path) == []


# Signals

IMPORTS = """
import os, signal, sys
number, how = getattr(signal, sys.argv[1]), sys.argv[2]
# A shell's background process ignores SIGINT, under nohup SIGHUP: each test says what it wants.
signal.signal(number, signal.SIG_IGN if how == "ignored" else signal.SIG_DFL)
if how != "ignored" and number == signal.SIGINT:
    signal.signal(number, signal.default_int_handler)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), number)
                for _ in range(1000): pass
            except Exception:  # as libraries do around what they can do without
                pass
sys.meta_path.insert(0, Finder())
sys.argv = ["fintune", *sys.argv[3:]]
from fintune import cli
cli.main()
"""


def in_imports(root: Path, number: str, how: str, *given: str) -> subprocess.CompletedProcess[str]:
    """A command that gets a signal when it imports torch."""
    command = [sys.executable, "-c", IMPORTS, number, how, *given]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "verb", ["prepare", "train", "eval", "release", "judge", "run", "demo", "export"]
)
def test_a_signal_in_the_imports_ends_with_75(verb: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "o ut")]
    others = {"demo": out, "export": ["merged", "release", *out], "judge": ["-c", "nano"]}
    given = others.get(verb, ["-c", "nano", "--fresh"])
    for number in ("SIGTERM", "SIGHUP", "SIGINT")[: 3 if verb == "train" else 1]:
        done = in_imports(tmp_path, number, "", verb, *given)
        assert done.returncode == 75, done.stderr
        again = shlex.join(["fintune", verb, *given])
        assert f"continue with: {again}\n" in done.stderr
        assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_nohup_keeps_working_and_readers_end_as_ever(tmp_path: Path) -> None:
    given = ("prepare", "-c", "nano", "-s", f"data.source={tmp_path / 'none.jsonl'}")
    done = in_imports(tmp_path, "SIGHUP", "ignored", *given)
    assert (done.returncode, "no file or folder" in done.stderr) == (1, True), done.stderr
    assert in_imports(tmp_path, "SIGTERM", "", "verify", "x").returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("verb", "owner", "function"),
    [
        ("prepare", preparing, "write_report"),
        ("eval", evaluating, "generate"),
        ("eval", judge, "unjudged_rows"),
        ("release", bundle, "write_card"),
        ("export", export, "_load_merged"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_stage_ends_with_75_and_leaves_nothing_half_written(
    verb: str,
    owner: Any,
    function: str,
    number: int,
    finished: Config,
    trained: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = trained if verb == "eval" else finished
    given = [verb, *words(config, f"{KEYS.get(verb)}={tmp_path / 'out'}")]
    if verb == "export":
        folder, base = built()
        given = ["export", "merged", str(folder), "--base", str(base)]
        given += ["--out", str(tmp_path / "out")]

    def work() -> None:
        monkeypatch.setattr("sys.argv", ["fintune", *given])
        try:
            cli.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    outcome = harmed(work, at_call(owner, function, 1, lambda: send(number)))
    assert outcome.code == 75, outcome.text
    assert f"continue with: fintune {verb}" in outcome.text
    assert not [*tmp_path.glob(".staging-*"), *tmp_path.glob("out/done.json")]
    assert verb == "eval" or not (tmp_path / "out").exists()


def test_a_stopped_judge_is_a_stop(tmp_path: Path, finished: Config) -> None:
    from fake_judge import FakeJudge, serve
    from test_evals_judge import config, items

    from fintune.stop import STOP

    with serve(FakeJudge()) as server:
        settings = config(server.url)
        plan = judge.plan(items(4), settings, 1)

        def work() -> None:
            with STOP.listening():
                judge.ask(tmp_path, plan, settings)

        outcome = harmed(work, at_call(judge, "_row", 2, lambda: send(signal.SIGTERM)))
    assert outcome.code == 75, outcome.text
    assert json.loads((tmp_path / judge.LOG).read_text().splitlines()[-1])


# Releases, modes


def test_an_old_release_moves_when_the_new_one_stands(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, Path(str(finished.model.path)))
    folder = bundle.release(config)
    before, real = tree(folder), bundle.write_card
    monkeypatch.setattr(bundle, "write_card", None)
    with pytest.raises(TypeError):
        bundle.release(config, fresh=True)
    assert tree(folder) == before and not (tmp_path / "release.old-1").exists()
    monkeypatch.setattr(bundle, "write_card", real)
    assert bundle.release(config, fresh=True) == folder
    assert tree(folder) == tree(tmp_path / "release.old-1") == before
    left = [".release.lock", "data", "eval", "release", "release.old-1", "run"]
    assert sorted(os.listdir(tmp_path)) == left


def test_what_holds_rows_is_private_under_a_private_umask(
    finished: Config, trained: Config, tmp_path: Path, prepared: Path, tiny_base: Path
) -> None:
    """Only a release and the forms of an export are for others to read."""
    section = trained.eval.model_copy(update={"out": tmp_path / "out" / "eval"})
    before = os.umask(0o077)
    try:
        prepare(load_config("nano", [rows(tmp_path), f"out={tmp_path / 'out'}"]))
        train(settings(tmp_path / "out", prepared, tiny_base, "train.max_steps=6"))
        evaluating.evaluate(trained.model_copy(update={"eval": section}))
        config = tiny_run(tmp_path / "tiny", Path(str(finished.model.path)))
        released = bundle.release(config)
        merged = export.merged(released, tmp_path / "merged", base=config.model.path)
        single = export.gguf(released, tmp_path / "adapter.gguf", base=config.model.path)
    finally:
        os.umask(before)
    public = [released, *released.iterdir(), merged, *merged.iterdir(), single]
    written = [*(tmp_path / "out").rglob("*")]
    assert {
        ".run.lock",
        "metrics.jsonl",
        "predictions.jsonl",
        "ledger.parquet",
        "checkpoint-5",
    } <= {path.name for path in written}
    for path in written:
        assert path.stat().st_mode & 0o077 == 0, path
    for path in public:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
