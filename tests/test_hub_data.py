"""Data sets by id: rows, benchmarks and tasks of a hub on loopback, through the command line.

The real clients of this process ask that hub alone; `main` moves between commands wherever a
command could take it for what it was before.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hub.server import Hub
from huggingface_hub import constants

import fintune.console
import fintune.hub
from fintune.errors import DataError

ROWS = [line for line in tiny.rows().read_text().splitlines() if line.startswith("{")][:120]
SET, TASK = "acme/rows", "acme/tones"
NUMBER = count()


def text(rows: list[Any]) -> bytes:
    """JSON Lines of rows, or of lines as they are."""
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()


A, B = text(ROWS[:90]), text(ROWS[30:])


@contextlib.contextmanager
def client_of(hub: Hub, cache: Path, **others: Any) -> Iterator[None]:
    """The clients of this process know that hub, and keep what it sends in that folder."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    known = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    known |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    with mock.patch.multiple(constants, **{**known, **others}):
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(fintune.hub, "WAITS_S", (0, 0))
    monkeypatch.setattr(fintune.hub, "_warn_once", fintune.console.warn)  # many commands here
    at_once = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    for name in ("utils._http", "file_download"):  # the client's own waits: 25 s
        monkeypatch.setattr(f"huggingface_hub.{name}.time", at_once)
    with Hub(tmp_path / "hub") as hub, client_of(hub, tmp_path / "cache"):
        hub.tokens |= {"hf_acme": ["alice", "acme"], "hf_bob": ["bob"]}
        yield hub


def publish(hub: Hub, files: dict[str, Any], name: str = SET) -> str:
    """Make `main` hold these files and no others; its commit, the only one of that id."""
    there = hub.repos[key].at("main").files if (key := ("dataset", name)) in hub.repos else {}
    return hub.commit("dataset", name, {**dict.fromkeys(there), **files}, f"commit {next(NUMBER)}")


def prepare(source: Any = SET, *words: str, out: str = "out", **settings: Any) -> tiny.Said:
    given = [source] if isinstance(source, dict | str) else source
    base = ["prepare", "-c", tiny.config(), *words]
    said = tiny.fintune(*base, *tiny.words(out=out, sources=given, **{"min_tokens": 5, **settings}))
    assert "Traceback" not in said.err, said.err
    return said


def prepared(*given: Any, **settings: Any) -> tiny.Said:
    said = prepare(*given, **settings)
    assert said.code == 0, said.err
    return said


def refused(said: tiny.Said, *parts: str, code: int = 1) -> None:
    """One message of that exit code, with these parts."""
    assert said.code == code and said.err.count("error:") == 1, said.err
    for part in parts:
        assert part in said.err, said.err


def table(name: str, out: str = "out") -> Any:
    return pq.read_table(f"{out}/data/{name}.parquet").to_pylist()


def rows_of(out: str = "out") -> set[str]:
    """Hashes of the raw rows of all parts."""
    return {
        row["example_id"] for part in ("train", "validation", "test") for row in table(part, out)
    }


def identity(out: str = "out", name: str = SET) -> str:
    """The commit that the manifest and the seal name, the same in both."""
    manifest = json.loads(Path(out, "data/manifest.json").read_text())
    sealed = json.loads(Path(out, "data/done.json").read_text())["inputs"]["sources"][name]
    assert manifest["sources"][name]["identity"] == sealed["identity"]
    return str(sealed["identity"])


# ---- rows ----------------------------------------------------------------------------------------
def test_rows_of_the_hub_are_those_of_the_same_files(hub: Hub, tmp_path: Path) -> None:
    """Mixed columns, a broken line, shards: read by the readers of local files."""
    found = [json.loads(line) for line in ROWS]
    columns = sorted({key for row in found for key in row})
    tables = [
        pa.Table.from_pylist([{"user": "", **r} for r in found[at : at + 40]]) for at in (0, 40)
    ]
    files: dict[str, Any] = {"README.md": b"# Rows\n", "broken.jsonl": text([*ROWS[80:], "{no"])}
    for at, each in enumerate(tables):
        pq.write_table(each, tmp_path / "shard.parquet")
        files[f"shard-{at}.parquet"] = (tmp_path / "shard.parquet").read_bytes()
    commit = publish(hub, files)
    assert len(columns) > 3
    said = prepared()
    assert f"{SET}, train split: broken.jsonl, shard-0.parquet, shard-1.parquet\n" in said.err
    assert identity() == commit
    for name, data in files.items():
        (tmp_path / "clone").mkdir(exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(data)
    prepared(str(tmp_path / "clone"), out="local")
    assert rows_of() == rows_of("local") and len(rows_of()) > 60
    (broken,) = [row for row in table("ledger") if row["reason"] == "not_json"]
    assert (broken["source"], broken["line"]) == (SET, 41)
    lines = {row["line"] for row in table("train")}
    assert max(lines) > 41 and {row["source"] for row in table("train")} == {SET}


def test_large_sets_are_scanned_by_several_processes(hub: Hub) -> None:
    publish(hub, {"a.jsonl": A})
    with (
        mock.patch("fintune.data.scan.PARALLEL_BYTES", len(A)),
        mock.patch("fintune.data.scan.PROCESSES", 2),
        mock.patch("fintune.data.scan.ProcessPoolExecutor", side_effect=DataError("a pool of 2")),
    ):
        refused(prepare(), "a pool of 2")


def test_a_prepared_folder_keeps_its_commit_when_main_moves(hub: Hub) -> None:
    first = publish(hub, {"rows.jsonl": A})
    prepared()
    before = tiny.tree_sha256(Path("out/data"))
    second = publish(hub, {"rows.jsonl": B})
    said = prepared()
    assert "unchanged, kept" in said.err and said.err.count("main has moved to") == 1
    assert second[:12] in said.err and first[:12] in said.err
    assert tiny.tree_sha256(Path("out/data")) == before and identity() == first
    refused(prepare({"path": SET, "revision": second}), f"{first} -> {second}", "--fresh")
    prepared(SET, "--fresh")
    assert identity() == second and rows_of() != set(before)


@pytest.mark.parametrize("name", ["tag", "commit", "branch"])
def test_a_revision_is_what_it_names(hub: Hub, name: str) -> None:
    first = publish(hub, {"rows.jsonl": A})
    hub.repos["dataset", SET].refs |= {"refs/tags/tag": first, "refs/heads/branch": first}
    second = publish(hub, {"rows.jsonl": B})
    prepared({"path": SET, "revision": first if name == "commit" else name})
    assert identity() == first
    prepared(out="main")
    assert identity("main") == second and rows_of() != rows_of("main")


@pytest.mark.parametrize("pinned", [False, True])
def test_rows_of_another_commit_are_never_taken(hub: Hub, pinned: bool) -> None:
    """A is in the cache; B cannot be read: no rows, rather than those of A."""
    publish(hub, {"rows.jsonl": A})
    prepared(out="a")
    second = publish(hub, {"rows.jsonl": B})
    hub.repos["dataset", SET].gated = "auto"
    source = {"path": SET, "revision": second} if pinned else SET
    refused(prepare(source), "gated")
    hub.repos["dataset", SET].gated = False
    hub.fault("GET", "/resolve/", close=True, times=-1)
    refused(prepare(source), "cannot be reached")
    assert not Path("out/data").exists()
    hub.faults.clear()
    prepared(source)
    assert identity() == second


def test_a_name_is_resolved_once_for_all_sources(hub: Hub) -> None:
    """`main` moves as soon as it was asked for: both sources and the benchmark are one commit."""
    first = publish(hub, {"train.jsonl": text(ROWS[:60]), "test.jsonl": text(ROWS[60:70])})
    hub.fault("GET", f"/api/datasets/{SET}", skip=1, call=lambda: publish(hub, {"b.jsonl": B}))
    parts = [{"path": SET}, {"path": SET, "split": "test"}]
    prepared(parts, benchmarks=[SET])
    sealed = json.loads(Path("out/data/done.json").read_text())["inputs"]
    found = {**sealed["sources"], **{f"b {n}": each for n, each in sealed["benchmarks"].items()}}
    assert {each["identity"] for each in found.values()} == {first} and len(found) == 3


def test_a_prepared_folder_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    publish(hub, {"train.jsonl": A, "test.jsonl": B[:3000]})
    prepared(benchmarks=[SET])
    shutil.rmtree(tmp_path / "cache")
    hub.stop()
    assert "unchanged, kept" in prepared(benchmarks=[SET]).err
    with client_of(hub, tmp_path / "cache", HF_HUB_OFFLINE=True):
        assert "unchanged, kept" in prepared(benchmarks=[SET]).err


def test_what_is_cached_is_read_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    first = publish(hub, {"train.jsonl": A, "test.jsonl": B})
    prepared(out="a")
    publish(hub, {"train.jsonl": B})
    hub.stop()
    said = prepared(out="b")
    assert f"the hub does not answer: {SET} is the cached commit {first[:12]}" in said.err
    with client_of(hub, tmp_path / "cache", HF_HUB_OFFLINE=True):
        prepared(out="c")
        assert identity("c") == identity("b") == first
        refused(
            prepare({"path": SET, "split": "test"}),
            SET,
            "or not whole (missing of main: test.jsonl)",
            "--offline",
        )
        refused(prepare("acme/other"), "acme/other", "offline")
    refused(prepare({"path": SET, "split": "test"}), "cannot be reached", "check the network")


def test_a_cache_without_the_list_of_files_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    """Another program fetched one of two shards: which there are is not known without the hub."""
    commit = publish(hub, {"a.jsonl": A, "b.jsonl": B})
    place = tmp_path / "cache" / "datasets--acme--rows"
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "snapshots" / commit / "a.jsonl").write_bytes(A)
    with client_of(hub, tmp_path / "cache", HF_HUB_OFFLINE=True):
        refused(prepare({"path": SET, "revision": commit}), "no list of the files", commit[:12])
    prepared({"path": SET, "revision": commit})
    assert len(hub.requests("GET", "/resolve/.*b.jsonl")) == 1


def test_two_processes_fetch_once(hub: Hub, tmp_path: Path) -> None:
    publish(hub, {"rows.jsonl": A})
    hub.fault("GET", "/resolve/.*rows", delay=0.5, times=1)
    words = ["prepare", "-c", tiny.config(), *tiny.words(source=SET, min_tokens=5)]
    runs = [
        tiny.Forked(*words, *tiny.words(out=tmp_path / str(at)), log=tmp_path / f"log{at}")
        for at in range(2)
    ]
    assert [run.wait() for run in runs] == [0, 0], [run.text() for run in runs]
    assert len(hub.requests("GET", "/resolve/.*rows")) == 1
    assert rows_of("0") == rows_of("1")


# ---- which files ---------------------------------------------------------------------------------
def card(configs: str) -> bytes:
    return f"---\nlicense: mit\nconfigs:\n{configs}dataset_info:\n  x: 1\n---\n# Rows\n".encode()


TWO = "- config_name: one\n  data_files: one/*.jsonl\n- config_name: two\n  data_files: two/**\n"
PARTS = """\
- config_name: "2024"
  default: true
  data_files:
  - split: train
    path: [x/a-*.jsonl, "x/b?[0-9].jsonl"]
  - split: dev
    path: x/v.jsonl
- config_name: other
  data_dir: y
"""
LAYOUTS: list[tuple[str, list[str], str, dict[str, str], str]] = [
    # what, files besides README.md, the card's configurations, the source, the files read or said
    ("names", ["train.jsonl", "test.jsonl", "dev.jsonl"], "", {}, "train.jsonl"),
    ("validation", ["train.jsonl", "valid_1.jsonl"], "", {"split": "validation"}, "valid_1.jsonl"),
    ("alias", ["train.jsonl", "val.jsonl"], "", {"split": "dev"}, "val.jsonl"),
    ("words", ["f_train_1.jsonl", "f-TEST.jsonl", "pretest.jsonl"], "", {}, "f_train_1.jsonl"),
    ("shards", ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
                "data/test-00000-of-00001.jsonl"], "", {},
     "data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl"),
    ("own shards", ["data/train_sft-00000-of-00001.jsonl", "data/x-00000-of-00001.jsonl"], "",
     {"split": "train_sft"}, "data/train_sft-00000-of-00001.jsonl"),
    ("own shards", ["data/train_sft-00000-of-00001.jsonl", "data/x-00000-of-00001.jsonl"], "", {},
     "error: no split train; there are: train_sft, x"),
    ("shards alone", ["data/train-00000-of-00001.jsonl", "train.jsonl", "a.jsonl"], "", {},
     "data/train-00000-of-00001.jsonl"),
    ("folders", ["train/a.jsonl", "test/train.jsonl", "dev/c.jsonl"], "", {}, "train/a.jsonl"),
    ("no names", ["b.jsonl", "a/c.csv", "notes.txt"], "", {}, "a/c.csv b.jsonl"),
    ("no train", ["a.jsonl", "test.jsonl"], "", {}, "a.jsonl"),
    ("test alone", ["test.jsonl"], "", {}, "error: no split train; there are: test"),
    ("no such split", ["a.jsonl"], "", {"split": "test"}, "error: no split test; there are: train"),
    ("endings", ["a.NDJSON", "b.JSONL", "c.txt", ".d.jsonl", "config.json"], "", {},
     "a.NDJSON b.JSONL"),
    ("one config", ["one/a.jsonl", "two/b.jsonl"], TWO[: TWO.index("- config_name: two")], {},
     "one/a.jsonl"),
    ("subset", ["one/a.jsonl", "two/b.jsonl", "two/x/c.jsonl"], TWO, {"subset": "two"},
     "two/b.jsonl two/x/c.jsonl"),
    ("no subset", ["one/a.jsonl", "two/b.jsonl"], TWO, {},
     "error: several configurations; there are: one, two data.sources.subset: {"),
    ("no such subset", ["one/a.jsonl", "two/b.jsonl"], TWO, {"subset": "three"},
     "error: no configuration three; there are: one, two"),
    ("default", ["x/a-1.jsonl", "x/b11.jsonl", "x/v.jsonl", "y/train.jsonl"], PARTS, {},
     "x/a-1.jsonl x/b11.jsonl"),
    ("its split", ["x/a-1.jsonl", "x/v.jsonl", "y/z.jsonl"], PARTS, {"split": "dev"}, "x/v.jsonl"),
    ("no such split of it", ["x/a-1.jsonl", "x/v.jsonl"], PARTS, {"split": "test"},
     "error: (2024) has no split test; there are: dev, train"),
    ("data_dir", ["x/a-1.jsonl", "y/train.jsonl", "y/test.jsonl", "train.jsonl"], PARTS,
     {"subset": "other"}, "y/train.jsonl"),
    ("files that are not there", ["a.jsonl"], TWO, {"subset": "one"}, "error: holds no data file"),
    ("folders as subsets", ["one/train.jsonl", "two/train.jsonl"], "", {"subset": "two"},
     "two/train.jsonl"),
    ("the hub's conversion", ["one/train/0000.jsonl"], "", {}, "one/train/0000.jsonl"),
    ("no list", ["[z-a].jsonl"], "  x\n", {}, "[z-a].jsonl"),
    ("brackets", ["[z-a].jsonl", "b.jsonl"], "- data_files: '[z-a]*'\n", {}, "[z-a].jsonl"),
    ("wildcards", ["x" * 200 + ".jsonl", "b.jsonl"], f"- data_files: ['{'*x' * 12}*y', b*]\n", {},
     "b.jsonl"),
    ("folders without end", ["a.jsonl"], f"- data_files: '{'**/' * 2000}*'\n", {},
     "error: holds no data file"),
    ("True", ["a.jsonl", "b.jsonl"], "- config_name: a\n  data_files: [a*]\n  default: True\n"
     "- config_name: b\n  data_files: [b*]\n", {}, "a.jsonl"),
    ("an alias", ["a.jsonl"], "- &a\n  config_name: x\n- *a\n", {},
     "error: README.md is not readable YAML"),
    ("no data", ["a.txt"], "", {}, "error: holds no data file"),
    ("a script", ["rows.py", "x.txt"], "", {}, "error: a loading script (rows.py)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "configs", "source", "expected"),
    [each[1:] for each in LAYOUTS],
    ids=[each[0] for each in LAYOUTS],
)
def test_a_folder_and_the_hub_have_one_layout(
    hub: Hub, files: list[str], configs: str, source: dict[str, str], expected: str
) -> None:
    """The files that are read, of a clone and by id; or the same message of both."""
    made: dict[str, Any] = {"README.md": card(configs) if configs else b"# Rows\n"}
    size = len(ROWS) // len(files)
    for at, name in enumerate(files):
        lines = ROWS[at * size : (at + 1) * size]
        made[name] = text(lines) if not name.endswith(".csv") else b"user,assistant\nq,a\n"
    publish(hub, made)
    for name, data in made.items():
        Path("clone", name).parent.mkdir(parents=True, exist_ok=True)
        Path("clone", name).write_bytes(data)
    wanted = expected.split()
    for path, out in ((SET, "out"), ("clone", "local")):
        said = prepare({"path": path, **source}, out=out)
        if expected.startswith("error:"):
            refused(said, *expected.removeprefix("error: ").split(" has ")[-1].split(" data."))
            continue
        assert said.code == 0, said.err
        (line,) = [each for each in said.err.splitlines() if " split: " in each]
        read, _, left = line.partition(" split: ")[2].partition("; left out: ")
        assert read.split(", ") == wanted, line
        told = {*left.split(", ")} - {""}
        assert told == {name for name in files if name[0] != "."} - {*wanted}, line
    if not expected.startswith("error:"):
        assert rows_of() == rows_of("local")
        fetched = {
            unquote(request.path).rpartition("/resolve/")[2]
            for request in hub.requests("GET", "/resolve/")
        }
        small = {"README.md", "config.json"}
        assert {name.partition("/")[2] for name in fetched} <= {*wanted, *small}


def test_a_benchmark_is_its_test_rows_or_all_of_its_configuration(hub: Hub) -> None:
    names = ["one/a.jsonl", "one/b.jsonl", "two/train.jsonl", "two/test.jsonl"]
    made: dict[str, Any] = {name: text(ROWS[at * 9 :][:9]) for at, name in enumerate(names)}
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("one", "two"))
    publish(hub, {"README.md": card(configs), **made}, TASK)
    publish(hub, {"rows.jsonl": A})
    for subset, read in (
        ("one", "every split: one/a.jsonl, one/b.jsonl;"),
        ("two", "test split: two/test.jsonl;"),
    ):
        said = prepared(benchmarks=[{"path": TASK, "subset": subset}], out=subset)
        assert f"{TASK} ({subset}), {read}" in said.err, said.err


def test_configurations_of_the_hubs_conversion_are_its_folders(hub: Hub, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([json.loads(line) for line in ROWS if '"user"' in line])
    pq.write_table(table, tmp_path / "rows.parquet")
    data = (tmp_path / "rows.parquet").read_bytes()
    hub.commit("dataset", SET, {"rows.py": b"raise SystemExit"})
    branch = "refs/convert/parquet"
    files = {f"{name}/{split}/0000.parquet": data for name in "ab" for split in ("train", "test")}
    made = hub.commit("dataset", SET, files, branch=branch)
    hub.repos["dataset", SET].refs[branch] = made
    refused(prepare(), "rows.py", "never run", branch)
    converted = {"path": SET, "revision": branch}
    refused(prepare(converted), "several configurations; there are: a, b")
    assert "b/train/0000.parquet; left out" in prepared({**converted, "subset": "b"}).err


# ---- what a hub answers --------------------------------------------------------------------------
def test_every_refusal_is_one_message(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, {"rows.jsonl": A})
    repo = hub.repos["dataset", SET]
    refused(prepare("acme/none"), "knows no data set acme/none", "data.sources")
    refused(prepare({"path": SET, "revision": "v9"}), f"{SET} has no revision v9")
    refused(prepare({"path": SET, "revision": "0" * 40}), f"{SET} has no revision 0000")
    repo.gated = "manual"
    refused(prepare(), f"{SET} is gated", f"{hub.url}/datasets/{SET}", "set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    refused(prepare(), f"{SET} is gated", "licence", "account of the token (HF_TOKEN)")
    repo.gated, repo.private = False, True
    refused(prepare(), f"knows no data set {SET}", "private")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    refused(prepare(), f"refuses the token for {SET} (HTTP 401)", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_acme")
    said = prepared()
    assert "hf_acme" not in said.err and identity() == repo.at("main").id
    assert "hf_" not in "".join(p.read_text("latin-1") for p in Path("out/data").glob("*.json"))


@pytest.mark.parametrize(
    "path", ["/api/datasets/acme/rows(/revision/[a-z]+)?$", "/tree/", "/resolve/"]
)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_waited_for(hub: Hub, path: str, status: int) -> None:
    publish(hub, {"rows.jsonl": A})
    hub.fault("", path, status=status, headers={"Retry-After": "0"}, times=2)
    prepared()
    assert [request.status for request in hub.requests("", path)][:2] == [status] * 2


def test_a_hub_that_stays_busy_is_said(hub: Hub) -> None:
    publish(hub, {"rows.jsonl": A})
    hub.fault("", "/", status=503, times=-1)
    refused(prepare(), "answers 503", "continues later")
    hub.faults.clear()
    prepared()


def test_a_hub_that_is_not_there_is_said(hub: Hub) -> None:
    hub.stop()
    refused(prepare(), f"{SET} is not on this machine", "and the hub cannot be reached", hub.url)
    refused(prepare(benchmarks=[SET], source=str(tiny.rows())), "data.", "cannot be reached")


def test_too_little_disk_is_said_before_the_download(hub: Hub) -> None:
    publish(hub, {"rows.jsonl": A})
    hub.repos["dataset", SET].at("main").files["rows.jsonl"].size = 10**15
    refused(prepare(), "1,000,000,000.0 MB needed", SET.replace("/", "--"), "HF_HOME", code=74)
    assert not hub.requests("GET", "/resolve/.*rows")


def test_damage_is_fetched_again_and_then_said(hub: Hub) -> None:
    publish(hub, {"rows.jsonl": A})
    hub.fault("GET", "/resolve/.*rows", flip=100)
    prepared(out="again")
    shutil.rmtree("cache")
    hub.fault("GET", "/resolve/.*rows", flip=100, times=-1)
    refused(prepare(), "rows.jsonl is damaged", "mirror")
    hub.faults.clear()
    hub.fault("GET", "/resolve/.*rows", cut=500)
    prepared()
    assert rows_of() == rows_of("again")


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1\noid"])
def test_files_that_hold_no_rows_are_named(hub: Hub, data: bytes) -> None:
    publish(hub, {"rows.jsonl": data})
    refused(prepare(), "rows.jsonl is ", "empty" if not data else "Git LFS pointer")


# ---- questions -----------------------------------------------------------------------------------


def asked(line: str, count: int = 6, **others: bytes) -> dict[str, bytes]:
    """A benchmark of tones, in the columns of its task on the hub; `line` tells versions apart."""
    rows = [
        {"query": f"{line} {n} thousand units were sold in May.", "answer": "positive"}
        for n in range(count)
    ]
    return {"test.jsonl": text(rows), "train.jsonl": text(rows * 2), **others}


@pytest.fixture
def run(hub: Hub, chain: tiny.Chain, tmp_path: Path) -> tiny.Chain:
    """A finished run to evaluate."""
    return chain.copy(tmp_path / "run", "data", "run")


def evaluate(run: tiny.Chain, *words: str, task: Any = TASK) -> tiny.Said:
    given = tiny.words(tasks={"fpb": task}, max_new_tokens=2, judged_items=1)
    said = tiny.fintune("eval", *run.words(), *given, "-s", "eval.max_items=6", *words)
    assert "Traceback" not in said.err, said.err
    return said


def questions(run: tiny.Chain) -> set[str]:
    """The first words of what was asked of the task."""
    lines = tiny.read_lines(run.eval / "predictions.jsonl")
    items = [line["item"] for line in lines if line["item"]["task"] == "fpb"]
    return {item["messages"][0]["content"].split()[0] for item in items}


def asked_commit(run: tiny.Chain) -> str:
    found = json.loads((run.eval / "done.json").read_text())["inputs"]["tasks"]["fpb"]
    provenance = json.loads((run.eval / "run.json").read_text())["provenance"]["tasks"]["fpb"]
    assert found == provenance and found["path"] == TASK
    return str(found["identity"])


def test_an_evaluation_keeps_the_questions_it_began_with(hub: Hub, run: tiny.Chain) -> None:
    first = publish(hub, asked("Old"), TASK)
    said = evaluate(run)
    assert said.code == 0 and f"{TASK}, test split: test.jsonl; left out: train.jsonl" in said.err
    assert questions(run) == {"Old"} and asked_commit(run) == first
    second = publish(hub, asked("New"), TASK)
    said = evaluate(run)
    assert said.code == 0 and "unchanged, kept" in said.err, said.err
    assert said.err.count(f"{TASK}: main has moved to {second[:12]}") == 1
    (run.eval / "done.json").unlink()  # as a kill before the last step leaves it
    lines = (run.eval / "predictions.jsonl").read_text().splitlines()
    (run.eval / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines[:3]))
    (run.eval / "inputs.json").write_text(json.dumps({"format": 1, "inputs": begun(run)}))
    assert evaluate(run).code == 0
    assert questions(run) == {"Old"} and asked_commit(run) == first
    refused(evaluate(run, task={"path": TASK, "revision": second}), "tasks.fpb", "--fresh")
    assert evaluate(run, "--fresh").code == 0
    assert questions(run) == {"New"} and asked_commit(run) == second
    hub.stop()
    assert "unchanged, kept" in evaluate(run).err


def begun(run: tiny.Chain) -> Any:
    return json.loads((run.eval / "inputs.json").read_text())["inputs"]


def test_questions_are_those_that_rows_were_compared_with(hub: Hub, tmp_path: Path) -> None:
    """The benchmark moves between `prepare` and `eval`: what is asked is what was looked for."""
    first = publish(hub, asked("Old"), TASK)
    made = tiny.Chain(tmp_path / "made", {})
    known = {"path": TASK, "columns": {"user": "query", "assistant": "answer"}}
    words = tiny.chain(made.out, benchmarks=[known], max_steps=2, eval_steps=2, save_steps=2)
    tiny.done("prepare", *words)
    publish(hub, asked("New"), TASK)
    tiny.done("train", *words)
    given = tiny.words(tasks={"fpb": TASK}, max_new_tokens=2, judged_items=1)
    said = tiny.done("eval", *words, *given, "-s", "eval.max_items=6")
    assert questions(made) == {"Old"} and asked_commit(made) == first
    assert f"{TASK}: main has moved" in said.err


def test_a_task_names_its_revision_configuration_and_split(hub: Hub, run: tiny.Chain) -> None:
    configs = "- config_name: a\n  data_dir: a\n- config_name: b\n  data_dir: b\n"
    parts = {"a/test.jsonl": "A", "b/test.jsonl": "B", "b/dev.jsonl": "D"}
    files = {name: asked(line)["test.jsonl"] for name, line in parts.items()}
    first = publish(hub, {"README.md": card(configs), **files}, TASK)
    publish(hub, asked("New"), TASK)
    task = {"path": TASK, "revision": first}
    refused(evaluate(run, task=task), "there are: a, b", "eval.tasks.fpb.subset")
    wrong = {**task, "subset": "b", "split": "train"}
    refused(
        evaluate(run, "--fresh", task=wrong), "there are: test, validation", "eval.tasks.fpb.split"
    )
    for split, line in (("test", "B"), ("validation", "D")):
        task = {"path": TASK, "revision": first, "subset": "b", "split": split}
        assert evaluate(run, "--fresh", task=task).code == 0
        assert questions(run) == {line}


def test_every_refusal_of_a_benchmark_is_one_message(hub: Hub, run: tiny.Chain) -> None:
    publish(hub, {"test.jsonl": b'{"query": "a", "answer": "neutral"}\n{no\n'}, TASK)
    refused(evaluate(run), "eval.tasks.fpb", f"{TASK}, line 2", "not_json")
    hub.repos["dataset", TASK].gated = "auto"
    shutil.rmtree("cache")
    refused(evaluate(run), f"{TASK} is gated", f"datasets/{TASK}", "HF_TOKEN")
    refused(evaluate(run, task="acme/none"), "knows no data set acme/none", "eval.tasks.fpb")
    hub.commit("dataset", "acme/script", {"script.py": b"raise SystemExit"})
    refused(evaluate(run, task="acme/script"), "script.py", "never run")
    with client_of(hub, Path("cache"), HF_HUB_OFFLINE=True):
        refused(evaluate(run), TASK, "offline")
    hub.stop()
    refused(evaluate(run), "cannot be reached")


def test_a_benchmark_that_rows_repeat_is_found_by_id(hub: Hub) -> None:
    """Of a set with a train split the test rows alone are compared, and a commit of its own."""
    first = publish(hub, {"train.jsonl": B, "test.jsonl": text(ROWS[:6])}, TASK)
    publish(hub, {"rows.jsonl": A})
    prepared(benchmarks=[TASK])
    found = json.loads(Path("out/data/contamination.json").read_text())["contaminated"]
    assert {hit["benchmark"] for hit in found} == {TASK} and 0 < len(found) <= 6
    publish(hub, {"test.jsonl": text(ROWS[50:60])}, TASK)
    publish(hub, {"rows.jsonl": B})
    said = prepared(benchmarks=[TASK])
    assert said.err.count("main has moved") == 2 and "unchanged, kept" in said.err
    sealed = json.loads(Path("out/data/done.json").read_text())["inputs"]["benchmarks"]
    assert sealed[TASK]["identity"] == first
    refused(prepare(benchmarks=[{"path": TASK, "split": "dev"}], out="x"), "there are: test")
