"""Folders of the user: what is never written, moved or shared, and how a signal leaves them."""

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from victims import at_call, harmed, send

from fintune import cli
from fintune.config import load_config
from fintune.data import prepare as preparing
from fintune.errors import ConfigError, OutputError
from fintune.evals import evaluate as evaluating
from fintune.evals import judge
from fintune.evals.results import rescore
from fintune.releasing import bundle, export

KEYS = {"prepare": "data.out", "train": "train.out", "eval": "eval.out", "release": "release.out"}


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
    verb: str, name: str, chain: tiny.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "user"
    root.mkdir()
    spelled = place(root, name)
    monkeypatch.setenv("HOME", str(root if "home" in name else tmp_path / "elsewhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))  # remembered hashes
    monkeypatch.chdir(root / "photos" if name in (".", "above") else "/proc")
    before = tree(tmp_path)
    for fresh in ([], ["--fresh"]):
        said = tiny.fintune(verb, *chain.words(), "-s", f"{KEYS[verb]}={spelled}", *fresh)
        assert (said.code, "Traceback" in said.err) == (1, False), said.err
        named = root / ".out.lock" if "lock" in name else spelled
        ways = (f"{named} is ", f"{named} holds ", f"{named} cannot be ", f" ({named})")
        assert any(way in said.err for way in ways) and "--fresh)" not in said.err, said.err
        assert tree(tmp_path) == before


@pytest.mark.parametrize("done", [None, "{}", '{"format": 1, "files": {}}', "[" * 100_000, "\xff"])
@pytest.mark.parametrize("verb", KEYS)
def test_fresh_moves_no_folder_without_our_mark(
    verb: str, done: str | None, chain: tiny.Chain, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "rows.jsonl").write_text("mine")
    if done is not None:
        for name in ("done.json", "inputs.json", "training_config.json"):
            (tmp_path / "thesis" / name).write_text(done, encoding="latin-1")
    before = tree(tmp_path)
    for fresh in ([], ["--fresh"]):
        thesis = f"{KEYS[verb]}={tmp_path / 'thesis'}"
        said = tiny.fintune(verb, *chain.words(), "-s", thesis, *fresh)
        foreign = "not of this stage" in said.err or "was changed or damaged" in said.err
        assert (said.code, foreign, "--fresh" in said.err) == (1, True, False), said.err
        (tmp_path / ".thesis.lock").unlink(missing_ok=True)  # a seal is read before the lock
        assert tree(tmp_path) == before


def test_fresh_moves_what_is_ours_and_takes_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["prepare", *tiny.chain(tmp_path / "out"), "--fresh"]
    others = [".staging-a", ".staging-data-x", ".staging-data-12345678"]
    for folder in ["data", *others]:
        (tmp_path / "out" / folder).mkdir(parents=True)
    tiny.done(*given)
    first = tree(tmp_path / "out" / "data")
    monkeypatch.chdir(tmp_path / "out" / "data")
    said = tiny.fintune(*given)
    assert (said.code, "holds the current directory" in said.err) == (1, True), said.err
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        tiny.done(*given)
    for number in (1, 2):
        assert tree(tmp_path / "out" / f"data.old-{number}") == first
    left = [".data.lock", "data", "data.old-1", "data.old-2", *others]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(left)


def test_a_later_stage_reads_only_what_was_finished(chain: tiny.Chain, tmp_path: Path) -> None:
    copy, words = chain.copy(tmp_path / "out", "data"), tiny.chain(tmp_path / "out")
    rows = copy.data / "train.parquet"
    (copy.data / ".hidden").write_text("")  # nobody reads it
    tiny.done("plan", *words)
    data = rows.read_bytes()
    for changed, says in (
        (data[:-1], "train.parquet was changed"),
        (data[:9] + bytes([data[9] ^ 1]) + data[10:], "train.parquet was changed"),
        (None, "train.parquet is missing"),
    ):
        rows.unlink()
        if changed is not None:
            rows.write_bytes(changed)
        said = tiny.fintune("train", *words)
        assert (said.code, says in said.err) == (1, True), said.err
    rows.write_bytes(data)
    (copy.data / "more.json").write_text("{}")
    said = tiny.fintune("train", *words)
    assert (said.code, "more.json was not there" in said.err) == (1, True), said.err
    assert not copy.run.exists()


def test_the_hash_of_a_base_is_kept_for_the_same_file_alone(
    chain: tiny.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed weights of the same size and time of change: finished training is of another base."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = Path(shutil.copytree(tiny.base(), tmp_path / "base"))
    words = ["train", *chain.words(base_path=str(base))]
    for _ in range(2):
        assert "unchanged, kept" in tiny.done(*words).err
    (kept,) = (p for p in (tmp_path / "cache" / "fintune").iterdir() if p.is_file())
    weights = base / "model.safetensors"
    assert kept.read_text() == tiny.file_sha256(weights)
    times, data = weights.stat(), weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    said = tiny.fintune(*words)
    assert (said.code, "base.revision" in said.err) == (1, True), said.err
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))  # no folder: nothing can be kept
    weights.write_bytes(data)
    assert "unchanged, kept" in tiny.done(*words).err


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
        load_config("demo", changes)
    assert says in str(caught.value) and len(str(caught.value)) < 400


def test_a_run_is_refused_before_its_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = tiny.fintune("run", "-c", "demo", "-s", "out=out", "-s", "release.out=.")
    assert (said.code, os.listdir(tmp_path)) == (1, []), said.err


@pytest.mark.parametrize("out", ["2024", "010", "a: b", "x #y", "~/[z]", "true"])
def test_a_demo_goes_where_it_is_told(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr("fintune.pipeline.run", lambda config, **_: taken.append(config))
    monkeypatch.setattr("fintune.demo.show", lambda config: None)
    tiny.done("demo", "--out", out, "-s", f"model.path={tiny.base()}")
    assert taken[0].out == Path(out).expanduser()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """As another process holds it."""
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 77 since then")
        file.flush()
        yield


WRITES = ("prepare", "train", "eval", "rescore", "judge", "release", "merged", "gguf", "ollama")


@pytest.mark.parametrize("name", WRITES)
def test_every_verb_that_writes_takes_the_lock(
    name: str, chain: tiny.Chain, tmp_path: Path
) -> None:
    taken, base = tmp_path / "taken", tiny.base()
    if name in ("rescore", "judge"):
        shutil.copytree(chain.eval, taken)
    out = ["-s", f"{KEYS.get(name, 'eval.out')}={taken}"]
    given: list[object] = [name, *chain.words(), *out, *tiny.words(judge="m") * (name == "judge")]
    if name == "rescore":
        given = ["eval", "--rescore", taken]
    if name in ("merged", "gguf", "ollama"):
        given = ["export", name, chain.release, "--base", base, "--out", taken]
    with locked(taken):
        before = tree(tmp_path)
        said = tiny.fintune(*given)
        assert (said.code, "written by process 77" in said.err) == (1, True), said.err
        assert tree(tmp_path) == before


def test_a_volume_that_takes_no_file_is_named(
    chain: tiny.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(chain.eval, tmp_path / "eval")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OutputError, match="eval cannot be written: Read-only file system"):
        rescore(folder)


@pytest.mark.parametrize("words", [["eval", "--rescore", "no/eval"], ["judge", "-c", "demo"]])
def test_what_is_not_there_gets_no_lock(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tiny.fintune(*words).code == 1
    assert os.listdir(tmp_path) == []


# Signals

IMPORTS = """
import os, signal, sys
number = getattr(signal, sys.argv[1])
signal.signal(number, signal.SIG_DFL)  # a shell's background process ignores SIGINT
if number == signal.SIGINT:
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
sys.argv = ["fintune", *sys.argv[2:]]
from fintune import cli
cli.main()
"""


def in_imports(root: Path, number: str, *given: str) -> subprocess.CompletedProcess[str]:
    """A command that gets a signal when it imports torch."""
    command = [sys.executable, "-c", IMPORTS, number, *given]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", ["prepare", "train", "eval", "release", "run", "demo", "export"])
def test_a_signal_in_the_imports_ends_with_75(verb: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "o ut")]
    others = {"demo": out, "export": ["merged", "release", *out]}
    given = others.get(verb, ["-c", "demo", "--fresh"])
    for number in ("SIGTERM", "SIGHUP", "SIGINT")[: 3 if verb == "train" else 1]:
        done = in_imports(tmp_path, number, verb, *given)
        assert done.returncode == 75, done.stderr
        again = shlex.join(["fintune", verb, *given])
        assert f"continue with: {again}\n" in done.stderr
        assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_readers_end_as_ever(tmp_path: Path) -> None:
    assert in_imports(tmp_path, "SIGTERM", "doctor").returncode == -signal.SIGTERM


def test_nohup_keeps_working(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        words = ("prepare", *tiny.chain(tmp_path / "out"))
        process = tiny.Forked(*words, log=tmp_path / "log")
        while process.running():
            process.send(signal.SIGHUP)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.wait() == 0, process.text()


@pytest.mark.parametrize(
    ("verb", "owner", "function"),
    [
        ("prepare", preparing, "_write_rows"),
        ("eval", evaluating, "generate"),
        ("eval", judge, "raw_rows"),
        ("release", bundle, "write_card"),
        ("export", export, "_load_merged"),
    ],
)
def test_a_signal_in_a_stage_ends_with_75_and_leaves_nothing_half_written(
    verb: str,
    owner: Any,
    function: str,
    chain: tiny.Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [verb, *chain.words(), "-s", f"{KEYS.get(verb)}={tmp_path / 'out'}"]
    if verb == "export":
        given = ["export", "merged", str(chain.release), "--base", str(tiny.base())]
        given += ["--out", str(tmp_path / "out")]
    given += ["--accept", tiny.REASON] if verb == "release" else []

    def work() -> None:
        monkeypatch.setattr("sys.argv", ["fintune", *given])
        try:
            cli.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    number = signal.SIGHUP if verb == "prepare" else signal.SIGTERM
    outcome = harmed(work, at_call(owner, function, 1, lambda: send(number)))
    assert outcome.code == 75, outcome.text
    assert f"continue with: fintune {verb}" in outcome.text
    assert not [*tmp_path.glob(".staging-*"), *tmp_path.glob("out/done.json")]
    assert verb == "eval" or not (tmp_path / "out").exists()


# Releases, modes


def test_what_holds_rows_is_private_under_a_private_umask(tmp_path: Path) -> None:
    """Only a release and the forms of an export are for others to read."""
    words = [*tiny.chain(tmp_path / "out", max_steps=2, eval_steps=2, save_steps=2)]
    release, base = tmp_path / "out" / "release", tiny.base()
    before = os.umask(0o077)
    try:
        for verb in ("prepare", "train", "eval"):
            tiny.done(verb, *words)
        tiny.done("release", *words, "--accept", "a test")
        first = tree(release)
        tiny.done("release", *words, "--accept", "a test", "--fresh")
        for form, name in (("merged", "merged"), ("gguf", "adapter.gguf")):
            given = (release, "--base", base, "--out", tmp_path / name)
            tiny.done("export", form, *given)
    finally:
        os.umask(before)
    assert tree(release) == tree(tmp_path / "out" / "release.old-1") == first
    written = [
        path for part in ("data", "run", "eval") for path in (tmp_path / "out" / part).rglob("*")
    ]
    written += (tmp_path / "out").glob(".*.lock")
    public = [release, *release.iterdir(), tmp_path / "merged", *(tmp_path / "merged").iterdir()]
    names = {".run.lock", "metrics.jsonl", "predictions.jsonl", "ledger.parquet", "checkpoint-2"}
    assert names <= {path.name for path in written}
    for path in written:
        assert path.stat().st_mode & 0o077 == 0, path
    for path in [*public, tmp_path / "adapter.gguf"]:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
