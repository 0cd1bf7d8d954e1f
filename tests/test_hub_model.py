"""Bases by their id of the hub, through the command line and the real clients.

One commit for a whole run, the cache without a hub, every answer of the hub, kills in downloads.
"""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from accelerate.state import AcceleratorState
from fake_judge import FakeJudge, serve
from hub.machine import Machine
from hub.server import Hub
from huggingface_hub import close_session, constants
from rich.console import Console
from safetensors.numpy import load_file, save_file
from victims import can_mount, small_volume

from fintune import console
from fintune import hub as client

EVERY = bool(os.environ.get("FINTUNE_TEST_ALL"))
BASE = "acme/Llama-3.1-tiny"
WEIGHTS = "model.safetensors"
NOT_LOADED: dict[str, bytes | None] = {
    "consolidated.safetensors": b"other format",
    "model.fp16.safetensors": b"a variant",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "modeling_tiny.py": b"raise SystemExit(9)",
    "trainer_state.json": b"{}",
    "README.md": b"---\nlicense: llama3.1\n---\n",
}
LICENCES: dict[str, bytes | None] = {"LICENSE": b"the licence", "USE_POLICY.md": b"the policy"}
LOADED = {path.name for path in tiny.base().iterdir()}


def files(seed: int = 0) -> dict[str, bytes | None]:
    """The tiny base as a repository; of another seed with other weights of the same size."""
    found: dict[str, bytes | None] = {p.name: p.read_bytes() for p in tiny.base().iterdir()}
    weights = bytearray(found[WEIGHTS] or b"")
    for at in range(seed):  # mantissas at the end of the last tensor
        weights[-4096 + 4 * at] ^= 0xFF
    return {**found, **NOT_LOADED, **LICENCES, WEIGHTS: bytes(weights)}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub that has the base."""
    with Hub(tmp_path / "served") as hub:
        hub.tokens |= {"hf_alice": ["alice"], "hf_bob": ["bob"]}
        hub.commit("model", BASE, files(), "first")
        yield hub


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(hub, tmp_path / "home")


def head(hub: Hub) -> str:
    return hub.repos["model", BASE].refs["refs/heads/main"]


def move(hub: Hub) -> str:
    """Another commit of the base on main, with other weights."""
    made = len(hub.repos["model", BASE].commits)
    return hub.commit("model", BASE, files(made), f"commit {made}")


def chain(out: Path, **changes: Any) -> list[str]:
    """The tiny chain, shorter and with its base by id."""
    short: dict[str, Any] = {"base": BASE, "base_path": None, "max_steps": 4, "eval_steps": 2}
    short |= {"save_steps": 1, "max_new_tokens": 4}
    return tiny.chain(out, **{**short, **changes})


def inputs(folder: Path) -> dict[str, Any]:
    """What a stage depends on, of a finished folder or of an unfinished one."""
    mark = next(path for name in ("done", "inputs") if (path := folder / f"{name}.json").is_file())
    found: dict[str, Any] = json.loads(mark.read_text())["inputs"]
    return found


class Whole(NamedTuple):
    """A chain that main moved away from before every command but the first.

    Attributes:
        first: the commit that it began with.
        said: what each command said.
    """

    hub: Hub
    machine: Machine
    out: Path
    first: str
    said: dict[str, str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    root = tmp_path_factory.mktemp("whole")
    with Hub(root / "served") as hub:
        first = hub.commit("model", BASE, files(), "first")
        machine, out, said = Machine(hub, root / "home"), root / "out", {}
        accept = ["--accept", "a test"]
        for verb in tiny.VERBS:
            words = [verb, *chain(out), *(accept if verb == "release" else [])]
            said[verb] = machine.done(*words).text
            move(hub)
        said["verify"] = machine.done("verify", out / "release").text
        yield Whole(hub, machine, out, first, said)


@pytest.fixture
def weights(whole: Whole, tmp_path: Path) -> Iterator[tuple[Hub, Machine, list[str]]]:
    """A hub, a machine that has nothing of it, and a command that fetches base and weights: the
    training of a finished run, which is kept."""
    whole.hub.log.clear()
    yield whole.hub, Machine(whole.hub, tmp_path / "home"), ["train", *chain(whole.out)]
    whole.hub.faults.clear()


Weights = tuple[Hub, Machine, list[str]]


# ---- one commit for a run --------------------------------------------------------------------


def test_main_moves_between_all_commands_and_every_seal_names_the_first_commit(
    whole: Whole,
) -> None:
    out, first = whole.out, whole.first
    assert inputs(out / "data")["base"]["revision"] == first
    assert inputs(out / "run")["base"]["revision"] == first
    assert inputs(out / "eval")["base_revision"] == first
    adapter = json.loads((out / "release" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (BASE, first)
    snapshots = whole.machine.snapshot(BASE, first).parent
    assert [path.name for path in snapshots.iterdir()] == [first]
    for verb in ("train", "eval", "release"):
        assert whole.said[verb].count("main has moved to") == 1, whole.said[verb]
        assert f"this run keeps {first[:12]}" in whole.said[verb]
    assert "has moved" not in whole.said["prepare"] + whole.said["verify"]


def test_finished_stages_are_kept_and_other_readers_take_the_same_commit(whole: Whole) -> None:
    asked = len(whole.hub.requests("GET", "/resolve/|/cdn/"))
    for verb in ("prepare", "train", "eval"):
        assert "kept" in whole.machine.done(verb, *chain(whole.out)).text
    whole.machine.done("plan", *chain(whole.out))
    whole.machine.done("inspect", *chain(whole.out))
    snapshots = whole.machine.snapshot(BASE, whole.first).parent
    assert [path.name for path in snapshots.iterdir()] == [whole.first]
    assert len(whole.hub.requests("GET", "/resolve/|/cdn/")) == asked


def test_the_recorded_commit_by_name_is_no_other_input(whole: Whole) -> None:
    for verb in ("prepare", "train", "eval"):
        said = whole.machine.done(verb, *chain(whole.out), "-s", f"model.revision={whole.first}")
        assert "kept" in said.text
    assert not said.asked  # a commit and its files are known


def test_a_killed_run_continues_on_its_commit(whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole.out / "data", tmp_path / "data")
    process = whole.machine.start("train", *chain(tmp_path))
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    tiny.until(lambda: (checkpoint / "done.json").is_file(), process)
    process.send(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "done.json").exists()
    move(whole.hub)
    said = whole.machine.done("train", *chain(tmp_path))
    assert "continuing from" in said.text and "main has moved to" in said.text
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = (root / "run" / "best" / name for root in (tmp_path, whole.out))
        assert ours.read_bytes() == theirs.read_bytes()


def test_no_option_puts_other_weights_under_a_half_trained_adapter(
    whole: Whole, tmp_path: Path
) -> None:
    for part in ("data", "run"):
        shutil.copytree(whole.out / part, tmp_path / part)
    (tmp_path / "run" / "done.json").unlink()
    other = ["-s", f"model.revision={move(whole.hub)}"]
    refused = whole.machine.run("train", *chain(tmp_path), *other)
    assert refused.code == 1 and "base.revision" in refused.text
    forced = whole.machine.run("train", *chain(tmp_path), *other, "--force-resume", "I want it")
    assert forced.code == 1 and "half-trained adapter" in forced.text
    assert f"base.revision: {whole.first} -> " in forced.text
    assert inputs(tmp_path / "run")["base"]["revision"] == whole.first
    named = whole.machine.done("train", *chain(tmp_path), "-s", f"model.revision={whole.first}")
    assert "train:" in named.text
    judged = whole.machine.run("eval", *chain(tmp_path), *other)
    assert judged.code == 1 and "the run was trained on" in judged.text
    assert not (tmp_path / "eval").exists()


def test_a_tag_stays_what_it_was_and_another_one_is_another_base(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    refs = hub.repos["model", BASE].refs
    refs["refs/tags/v1"] = first = head(hub)
    refs["refs/tags/v2"] = second = move(hub)
    given = chain(tmp_path / "out", max_steps=2)
    machine.done("prepare", *given, "-s", "model.revision=v1")
    refs["refs/tags/v1"] = second
    said = machine.done("train", *given, "-s", "model.revision=v1")
    assert f"v1 has moved to {second[:12]}; this run keeps {first[:12]}" in said.text
    assert inputs(tmp_path / "out" / "run")["base"]["revision"] == first
    refused = machine.run("train", *given, "-s", "model.revision=v2")
    assert refused.code == 1 and f"base.revision: {first}" in refused.text
    machine.done("train", *given, "-s", f"model.revision={first}")


def test_fresh_data_take_the_new_main_and_a_fresh_run_that_of_its_data(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    given, first = chain(tmp_path / "out", max_steps=2), head(hub)
    machine.done("prepare", *given)
    second = move(hub)
    machine.done("train", *given)
    assert inputs(tmp_path / "out" / "run")["base"]["revision"] == first
    machine.done("prepare", *given, "--fresh")
    machine.done("train", *given)  # finished: its own commit
    assert inputs(tmp_path / "out" / "run")["base"]["revision"] == first
    machine.done("train", *given, "--fresh")
    assert inputs(tmp_path / "out" / "run")["base"]["revision"] == second


def test_data_prepared_from_a_local_base_serve_a_run_of_the_hub_and_back(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    given = chain(tmp_path / "out", max_steps=2)
    local = ["-s", f"model.path={tiny.base()}"]
    machine.done("prepare", *given, *local)
    machine.done("train", *given)
    assert inputs(tmp_path / "out" / "run")["base"]["revision"] == head(hub)
    assert "kept" in machine.done("prepare", *given).text
    assert "kept" in machine.done("prepare", *given, *local).text


def test_several_processes_resolve_once(whole: Whole, tmp_path: Path) -> None:
    """main moves at every look at it; every rank has the weights of one commit."""
    shutil.copytree(whole.out / "data", tmp_path / "data")
    tiny.reseal(tmp_path / "data", base={"id": "none"})  # nothing recorded
    machine = Machine(whole.hub, tmp_path / "home")
    before, port = len(whole.hub.log), tiny.free_port()
    rule = whole.hub.fault("GET", "/revision/main", times=-1, call=lambda: move(whole.hub))

    def rank(number: int) -> Callable[[], None]:
        here = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def change() -> None:
            AcceleratorState._reset_state(True)  # of earlier tests in the process that forks
            os.environ.update({name: str(value) for name, value in here.items()})

        return change

    words = ["train", *chain(tmp_path, max_steps=2, batch_size=2)]
    ranks = [machine.start(*words, change=rank(number)) for number in (0, 1)]
    assert [each.wait() for each in ranks] == [0, 0], "".join(each.text() for each in ranks)
    rule.times = 0
    asked = [each.path for each in whole.hub.log[before:]]
    assert sum("/revision/main" in path for path in asked) == 1
    assert sum("/cdn/" in path for path in asked) == 1
    snapshots = list(machine.snapshot(BASE, "x").parent.iterdir())
    assert [path.name for path in snapshots] == [inputs(tmp_path / "run")["base"]["revision"]]


# ---- what is fetched -------------------------------------------------------------------------


def fetched(machine: Machine, commit: str) -> set[str]:
    folder = machine.snapshot(BASE, commit)
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_only_what_is_loaded_is_fetched_and_the_licence_with_it(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    machine.done("prepare", *chain(tmp_path / "out"))
    assert fetched(machine, head(hub)) - {"README.md"} == {*LOADED, *LICENCES} - {WEIGHTS}
    machine.done("train", *chain(tmp_path / "out", max_steps=2))
    assert fetched(machine, head(hub)) - {"README.md"} == {*LOADED, *LICENCES}
    assert len(hub.requests("GET", "/cdn/")) == 1


def test_a_licence_that_does_not_come_stops_nothing_but_a_release(weights: Weights) -> None:
    hub, machine, words = weights
    hub.fault("", "/resolve/.*/LICENSE$", times=-1, status=404)
    machine.done(*words)
    hub.faults.clear()
    machine.done(*words)
    assert hub.requests("GET", "/LICENSE$")[-1].status == 200


def test_shards_are_those_of_the_index(hub: Hub, machine: Machine, tmp_path: Path) -> None:
    tensors = load_file(tiny.base() / WEIGHTS)
    names, shards = sorted(tensors), {}
    for at, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, tmp_path / "shard", {"format": "pt"})
        shards[f"model-{at:05}-of-00002.safetensors"] = (tmp_path / "shard").read_bytes()
    index = {name: [*shards][names.index(name) % 2] for name in names}
    text = json.dumps({"metadata": {}, "weight_map": index}).encode()
    parts: dict[str, bytes | None] = {**shards, "model.safetensors.index.json": text}
    commit = hub.commit("model", BASE, {**files(), **parts, WEIGHTS: None}, "shards")
    machine.done("prepare", *chain(tmp_path / "out"))
    assert not fetched(machine, commit) & {*shards}
    machine.done("train", *chain(tmp_path / "out", max_steps=2))
    assert fetched(machine, commit) - {"README.md"} == {*LOADED, *parts, *LICENCES} - {WEIGHTS}
    (machine.snapshot(BASE, commit) / [*shards][0]).unlink()  # stopped between two shards
    machine.done("inspect", *chain(tmp_path / "out"))
    machine.done("prepare", *chain(tmp_path / "out"))


def test_pickled_weights_are_no_weights(weights: Weights) -> None:
    hub, machine, words = weights
    commit = hub.commit("model", BASE, {**files(), WEIGHTS: None}, "no", "pickles")
    said = machine.run(*words, "-s", f"model.revision={commit}")
    assert said.code == 1 and "holds no weights model.safetensors" in said.text
    assert "pickled weights" in said.text and not hub.requests("GET", "/cdn/")


# ---- without a hub ---------------------------------------------------------------------------


def test_the_cache_serves_every_command_without_a_hub(whole: Whole, tmp_path: Path) -> None:
    machine = Machine(whole.hub, whole.machine.home, offline=True)
    out, given = tmp_path / "out", chain(tmp_path / "out", max_steps=2)
    machine.done("run", *given, "--accept", "a test")
    for verb in ("plan", "inspect"):
        machine.done(verb, *given)
    machine.done("verify", out / "release")
    machine.done("export", "merged", out / "release", "--out", out / "merged")
    serving = machine.start("serve", out / "release", "--port", tiny.free_port())
    tiny.until(lambda: "http://127.0.0.1" in serving.text(), serving)
    serving.send(signal.SIGTERM)
    assert serving.wait(30) == 0
    revision = head(whole.hub)  # what the cache knows as main
    assert inputs(out / "run")["base"]["revision"] == whole.first != revision


def at_once() -> None:
    """The waits between tries are none."""
    client.WAITS_S = (0,) * 6  # type: ignore[assignment]


@pytest.mark.parametrize("state", ["gone", "busy", "behind a login"])
def test_the_cache_serves_where_the_hub_does_not_answer(
    state: str, whole: Whole, tmp_path: Path
) -> None:
    """Connections are refused; 503 to everything; a page of a network that wants a login."""
    given = chain(tmp_path / "out", max_steps=2)
    if state == "gone":
        whole.hub.stop()
    elif state == "busy":
        whole.hub.fault(times=-1, status=503)
    else:
        whole.hub.fault(times=-1, status=200, body=b"<html>login</html>")
    try:
        said = whole.machine.done("prepare", *given, change=at_once)
        assert f"the hub does not answer: {BASE} is the cached commit" in said.text
        if state == "gone":
            whole.machine.done("train", *given)
            whole.machine.done("verify", whole.out / "release")
    finally:
        whole.hub.faults.clear()
        if state == "gone":
            whole.hub.__enter__()


@pytest.mark.parametrize("state", ["off", "gone"])
def test_what_is_missing_is_named(state: str, hub: Hub, machine: Machine, tmp_path: Path) -> None:
    given = chain(tmp_path / "out")
    machine.done("prepare", *given)
    machine.offline = state == "off"
    why = "the hub is off (offline)" if state == "off" else "the hub cannot be reached"
    if state == "gone":
        hub.stop()
    said = machine.run("train", *given)
    assert said.code == 1 and f"{BASE} is not on this machine" in said.text
    assert WEIGHTS in said.text and why in said.text and "model.path" in said.text
    empty = Machine(hub, tmp_path / "empty", offline=machine.offline)
    said = empty.run("prepare", *chain(tmp_path / "other"))
    assert said.code == 1 and f"{BASE} is not on this machine" in said.text and why in said.text


RUNNER = """
import io, json, sys
log = sys.argv[1]
def hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        with open(log, "a") as file:
            print(event, args[1:] if event == "socket.connect" else args, file=file)
sys.addaudithook(hook)
plan = json.loads(sys.stdin.read())
from fintune import cli
for words, typed in plan:
    sys.argv, sys.stdin, code = ["fintune", *words], io.StringIO(typed), 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    print("\\n$", *words[:2], "exit", code, file=sys.stderr)
"""


def test_offline_opens_no_connection_but_to_the_judge_on_this_machine(
    whole: Whole, tmp_path: Path
) -> None:
    """The whole path in a process of its own, whose connections an audit hook writes down."""
    out, log = tmp_path / "out", tmp_path / "connections"
    with serve(FakeJudge()) as judge:
        asks = tiny.words(judge="judge-1", judge_url=judge.url, judge_prices=[0, 0])
        given, release = [*chain(out, max_steps=2), *asks], str(out / "release")
        elsewhere = tiny.words(judge_url="https://judge.example/v1")
        plan = [
            (["--offline", "prepare", *given], ""),
            (["train", "--offline", *given], ""),
            (["--offline", "eval", *given], ""),
            (["--offline", "release", *given, "--accept", "a test"], ""),
            (["--offline", "verify", release], ""),
            (["--offline", "plan", *given], ""),
            (["--offline", "inspect", *given], ""),
            (["--offline", "export", "merged", release, "--out", str(out / "merged")], ""),
            (["--offline", "chat", release], "What is EBITDA?\n/quit\n"),
            (["--offline", "doctor"], ""),
            (["--offline", "eval", "--fresh", *given, *elsewhere], ""),
        ]
        environment = {**whole.hub.env(whole.machine.home, "hf_alice"), "OPENAI_API_KEY": "sk-x"}
        before = len(whole.hub.log)
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, str(log)],
            input=json.dumps(plan),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    ends = [line[-1] for line in done.stderr.splitlines() if line.startswith("$ ")]
    assert "".join(ends) == "0" * 10 + "1", done.stderr
    assert "--offline, and the judge is at https://judge.example/v1" in done.stderr
    assert len(whole.hub.log) == before
    host = judge.url.removeprefix("http://").partition("/")[0].split(":")
    lines = log.read_text().splitlines()
    assert lines and all(all(part in line for part in host) for line in lines), lines


# ---- every answer of the hub -----------------------------------------------------------------


class Answer(NamedTuple):
    """What the hub is, who asks, and what has to be said."""

    change: Callable[[Hub], object]
    words: tuple[str, ...]
    token: str = ""
    given: tuple[str, ...] = ()


def repo(**switches: Any) -> Callable[[Hub], None]:
    return lambda hub: vars(hub.repos["model", BASE]).update(switches)


DISABLED = "Access to this resource is disabled."
ANSWERS = {
    "gated, no token": Answer(
        repo(gated="manual"), ("is gated", f"/{BASE}", "no token: set HF_TOKEN")
    ),
    "gated, licence not accepted": Answer(
        repo(gated="manual"), ("is gated", "accept it at http", "(HF_TOKEN)"), "hf_bob"
    ),
    "private": Answer(
        repo(private=True), ("the hub knows no model", "a private one needs its token"), "hf_bob"
    ),
    "missing": Answer(
        bool, ("the hub knows no model acme/none", "model.path"), "", ("model.id=acme/none",)
    ),
    "no id of the hub": Answer(
        bool, ("the hub knows no model", "model.path"), "", ("model.id=./some/folder/of/mine",)
    ),
    "refused token": Answer(bool, ("refuses the token", "HTTP 401", "set HF_TOKEN"), "hf_old"),
    "no such branch": Answer(
        bool, (f"{BASE} has no revision v9", BASE), "", ("model.revision=v9",)
    ),
    "no such commit": Answer(
        bool, (f"has no revision {'0' * 40}",), "", (f"model.revision={'0' * 40}",)
    ),
    "a path for a revision": Answer(
        bool, ("is no revision of",), "", ("model.revision=../../../etc/passwd",)
    ),
    "busy for ever": Answer(
        lambda hub: hub.fault(times=-1, status=503, headers={"Retry-After": "0"}),
        ("answers 503", "after 7 tries", "the same command continues later"),
    ),
    "an answer that is no JSON": Answer(
        lambda hub: hub.fault("GET", "/api/models", times=-1, status=200, body=b"<html>login"),
        (f"the hub and {BASE}", "no JSON"),
    ),
    "JSON that is no hub's": Answer(
        lambda hub: hub.fault("GET", "/api/models", times=-1, status=200, body=b"{}"),
        (f"the hub and {BASE}", "no JSON of a hub"),
    ),
    "an answer without a commit": Answer(
        lambda hub: hub.fault("GET", "/revision/", times=-1, status=200, body=b'{"id": "a/b"}'),
        (f"the hub and {BASE}", "no JSON of a hub"),
    ),
    "a listing that is none": Answer(
        lambda hub: hub.fault("GET", "/tree/", times=-1, status=200, body=b'{"error": "x"}'),
        (f"the hub and {BASE}", "no JSON of a hub"),
    ),
    "a gateway's own status for ever": Answer(
        lambda hub: hub.fault(times=-1, status=521), ("the hub answers 521", "continues later")
    ),
    "disabled": Answer(
        lambda hub: hub.fault(times=-1, status=403, headers={"X-Error-Message": DISABLED}),
        (f"the hub has disabled access to {BASE}",),
    ),
    "a token that no header can hold": Answer(
        bool,
        (f"the hub and {BASE}: UnicodeEncodeError", "check HF_HOME, HF_ENDPOINT, HF_TOKEN"),
        "hf_\u00e9t\u00e9",
    ),
    "a proxy that wants a password": Answer(
        lambda hub: hub.fault(times=-1, status=407), (f"the hub and {BASE}: HTTP 407",)
    ),
    "gone": Answer(
        lambda hub: hub.stop(), ("cannot be reached", "Connection refused", "check the network")
    ),
    "closes every connection": Answer(
        lambda hub: hub.fault(times=-1, close=True), ("cannot be reached", "check the network")
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_is_one_message(
    name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fintune.hub.WAITS_S", (0,) * 6)
    answer = ANSWERS[name]
    answer.change(hub)
    machine = Machine(hub, tmp_path / "home", answer.token)
    sets = [word for each in answer.given for word in ("-s", each)]
    said = machine.run("prepare", *chain(tmp_path / "out"), *sets, change=at_once)
    assert said.code == 1 and said.text.count("error:") == 1, said.text
    for word in answer.words:
        assert word in said.text, said.text
    assert not answer.token or answer.token not in said.text
    assert not (tmp_path / "out" / "data").exists()


def test_the_accepted_and_the_members_get_it(hub: Hub, tmp_path: Path) -> None:
    hub.repos["model", BASE].gated = "manual"
    hub.repos["model", BASE].accepted.add("bob")
    Machine(hub, tmp_path / "home", "hf_bob").done("prepare", *chain(tmp_path / "out"))


@pytest.mark.parametrize("status", [408, 429, 500, 520])
def test_a_busy_hub_is_waited_for(status: int, weights: Weights) -> None:
    hub, machine, words = weights
    for path in (f"/api/models/{BASE}/tree/", "/resolve/.*/config.json", "/cdn/"):
        hub.fault("GET", path, status=status, headers={"Retry-After": "1"})
    start = time.monotonic()
    machine.done(*words)
    assert time.monotonic() - start > 2
    assert not any(rule.times for rule in hub.faults)


def test_a_busy_hub_is_waited_for_before_a_name_is_resolved(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    hub.fault("GET", "/revision/main", status=429, times=2, headers={"Retry-After": "1"})
    said = machine.done("prepare", *chain(tmp_path / "out"))
    assert said.text.count("the hub answers 429: trying again in 1 s") == 2


def test_too_little_disk_is_said_before_a_byte_comes(weights: Weights, whole: Whole) -> None:
    hub, machine, words = weights
    blob = hub.repos["model", BASE].commits[whole.first].files[WEIGHTS]
    size, blob.size = blob.size, 10**15
    said = machine.run(*words)
    blob.size = size
    assert said.code == 74 and "1,000,000,000.0 MB needed" in said.text, said.text
    assert BASE.replace("/", "--") in said.text and "HF_HOME" in said.text
    assert not hub.requests("GET", "/cdn/")


@pytest.mark.skipif(not can_mount(), reason="needs a volume of its own")
def test_a_disk_that_fills_in_the_middle_is_74_too(weights: Weights, tmp_path: Path) -> None:
    hub, _, words = weights
    with small_volume(tmp_path / "small", 2 << 20) as volume:
        machine = Machine(hub, volume / "home")
        hub.fault("GET", "/cdn/", call=lambda: (volume / "other").write_bytes(bytes(1 << 20)))
        said = machine.run(*words)
    assert said.code == 74 and "HF_HOME" in said.text, said.text


@pytest.mark.skipif(not can_mount(), reason="needs a volume of its own")
def test_a_cache_that_cannot_be_written_serves_what_it_has(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    """A shared cache, read-only for its users: with the hub, without it, and one that is empty."""
    (tmp_path / "empty").mkdir()
    machine.done("prepare", *chain(tmp_path / "out"))
    for place, states in ((machine.cache, (False, True)), (tmp_path / "empty", (False,))):
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        try:
            for off in states:
                machine.offline = off
                use = lambda: setattr(constants, "HF_HUB_CACHE", str(place))  # noqa: B023, E731
                said = machine.run("prepare", *chain(tmp_path / f"{place.name}{off}"), change=use)
                if place == machine.cache:
                    assert said.code == 0, said.text
                else:
                    assert said.code == 1 and f"Read-only file system: '{place}" in said.text
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


def test_a_process_that_waits_for_another_says_so(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    hub.fault("GET", "/resolve/.*tokenizer.json", delay=3)
    first = machine.start("prepare", *chain(tmp_path / "first"))
    tiny.until(lambda: hub.requests("GET", "/resolve/.*tokenizer.json"), first)
    soon = lambda: setattr(client, "NOTICE_S", 0.2)  # noqa: E731
    said = machine.done("prepare", *chain(tmp_path / "second"), change=soon)
    assert said.text.count(f"another process fetches {BASE}: waiting for it") == 1
    assert first.wait() == 0, first.text()


@pytest.mark.parametrize("state", ["a folder for a token", "a proxy that nothing speaks to"])
def test_what_the_client_cannot_use_is_named(
    state: str, hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    """The message has the client's words; `doctor` goes on."""
    hub.tokens["hf_alice"] = ["alice"]

    def change() -> None:
        if state == "a folder for a token":
            constants.HF_TOKEN_PATH = str(tmp_path)
        else:
            os.environ |= {"HF_TOKEN": "hf_alice", "NO_PROXY": "", "no_proxy": ""}
            os.environ |= dict.fromkeys(("ALL_PROXY", "all_proxy"), "socks5://127.0.0.1:1")
            close_session()

    named = str(tmp_path) if state == "a folder for a token" else "SOCKS proxy"
    said = machine.run("prepare", *chain(tmp_path / "out"), change=change)
    assert said.code == 1 and said.text.count("error:") == 1 and named in said.text, said.text
    assert "check HF_HOME, HF_ENDPOINT, HF_TOKEN and the proxy settings" in said.text
    assert "hub token" in machine.done("doctor", change=change).text


@pytest.mark.parametrize("path", ["/cdn/", "/resolve/.*/tokenizer.json"])
def test_damage_is_fetched_again_and_said_where_it_stays(path: str, weights: Weights) -> None:
    hub, machine, words = weights
    hub.fault("GET", path, flip=90)
    machine.done(*words)
    assert len(hub.requests("GET", path)) == 2
    hub.fault("GET", path, times=-1, flip=90)
    other = Machine(hub, machine.home.with_name("other"))
    said = other.run(*words)
    assert said.code == 1 and "is damaged: its hash is not the one the hub names" in said.text
    hub.faults.clear()
    other.done(*words)


def test_over_xet(hub: Hub, tmp_path: Path) -> None:
    """The client's store of all repositories, whose files have names of another hash."""
    (tmp_path / "new").write_bytes(files(7)[WEIGHTS] or b"")
    code = f"""
from huggingface_hub import upload_file
upload_file(path_or_fileobj="{tmp_path}/new", path_in_repo="{WEIGHTS}", repo_id="{BASE}")
"""
    hub.tokens["hf_acme"] = ["alice", "acme"]
    environment = hub.env(tmp_path / "pusher", "hf_acme", xet=True)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    machine, given = Machine(hub, tmp_path / "home", xet=True), chain(tmp_path / "out", max_steps=2)
    hub.fault("GET", "/v1/xorbs/", flip=5_000)
    machine.done("prepare", *given)
    machine.done("train", *given)
    assert len(hub.requests("GET", "/v1/xorbs/")) == 2 and not hub.requests("GET", "/cdn/")
    weights = machine.snapshot(BASE, head(hub)) / WEIGHTS
    assert weights.resolve().is_relative_to(machine.cache / "blobs"), "the client's own store"
    assert weights.read_bytes() == files(7)[WEIGHTS]
    machine.hub.stop()
    machine.done("eval", *given)
    hub.__enter__()


def test_a_cut_body_is_gone_on_with(weights: Weights) -> None:
    hub, machine, words = weights
    hub.fault("GET", "/cdn/", cut=100_000, times=2)
    machine.done(*words)
    assert len(hub.requests("GET", "/cdn/")) == 3


def test_a_hub_that_says_nothing_is_not_waited_for_for_ever(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    hub.fault("GET", "/revision/", times=-1, delay=30)
    start = time.monotonic()
    limit = lambda: setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)  # noqa: E731
    said = machine.run("prepare", *chain(tmp_path / "out"), change=limit)
    assert said.code == 1 and "TimeoutError" in said.text
    assert time.monotonic() - start < 20


# ---- doctor ----------------------------------------------------------------------------------


def test_doctor_asks_whether_the_token_is_good(hub: Hub, machine: Machine, tmp_path: Path) -> None:
    def token(name: str, *, offline: bool = False) -> str:
        asker = Machine(hub, tmp_path / "home", name, offline=offline)
        said = asker.done("doctor")
        assert not name or name not in said.text
        return next(line for line in said.text.splitlines() if "hub token" in line)

    assert "good, of alice" in token("hf_alice") and token("hf_alice").startswith("ok")
    assert "refused by the hub" in token("hf_old") and "/settings/tokens" in token("hf_old")
    before = len(hub.log)
    assert "not set" in token("") and "offline" in token("hf_alice", offline=True)
    assert len(hub.log) == before
    hub.fault("GET", "/whoami", times=-1, delay=30)
    start = time.monotonic()
    assert "the hub was not reached (TimeoutError)" in token("hf_alice")
    assert time.monotonic() - start < 12
    hub.stop()
    assert "was not reached (ConnectionRefusedError)" in token("hf_alice")


# ---- progress --------------------------------------------------------------------------------


def slowly(weights: Weights, then: Callable[[], object]) -> tuple[Machine, list[str], Any]:
    """Weights that take three seconds; the client writes to disk what comes in 64 KiB."""
    hub, machine, words = weights
    hub.fault("GET", "/cdn/", rate=(tiny.base() / WEIGHTS).stat().st_size // 3)

    def change() -> None:
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
        then()

    return machine, words, change


def test_a_log_gets_a_line_a_minute(weights: Weights) -> None:
    """The minute is made a second."""
    each = lambda: setattr(console, "DOWNLOAD_INTERVAL_S", 1.0)  # noqa: E731
    machine, words, change = slowly(weights, each)
    said = machine.done(*words, change=change)
    lines = [line for line in said.text.splitlines() if f"fetching {BASE}" in line]
    assert f"fetching {BASE}: 1.5 MB" in lines
    rates = [line for line in lines if "%" in line and "B/s" in line]
    assert 2 <= len(rates) <= 4, said.text


def test_a_terminal_gets_a_bar(weights: Weights) -> None:
    ours, theirs = os.openpty()

    def on_terminal() -> None:
        os.environ.update({"TERM": "xterm", "COLUMNS": "120"})
        os.dup2(theirs, 2)
        console.err = Console(stderr=True, highlight=False, soft_wrap=True)

    machine, words, change = slowly(weights, on_terminal)
    process, shown = machine.start(*words, change=change), b""
    while process.running() or select_ready(ours):
        shown += os.read(ours, 65536) if select_ready(ours) else b""
    assert process.wait() == 0, shown
    text = shown.decode(errors="replace")
    assert "━" in text and "B/s" in text and f"fetching {BASE}" in text, text


def select_ready(handle: int) -> bool:
    return bool(select.select([handle], [], [], 0.05)[0])


# ---- kills -----------------------------------------------------------------------------------


def test_kill_9_in_a_download_and_the_same_command_again(
    weights: Weights, whole: Whole, tmp_path: Path
) -> None:
    """At random moments: the cache is whole in the end, no half file is left, bytes are equal."""
    hub, _, words = weights
    moments, size = random.Random(3), (tiny.base() / WEIGHTS).stat().st_size
    for number in range(20 if EVERY else 3):
        machine, began = Machine(hub, tmp_path / f"home-{number}"), len(hub.log)
        hub.faults.clear()
        hub.fault("GET", "/cdn/", rate=size // 2)
        process = machine.start(
            *words, change=lambda: setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
        )
        tiny.until(lambda began=began: len(hub.log) > began, process)  # type: ignore[misc]
        time.sleep(moments.random() * 1.8)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        machine.done(*words)
        folder = machine.snapshot(BASE, whole.first)
        for path in tiny.base().iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
        assert not list(machine.cache.rglob("*.incomplete"))
