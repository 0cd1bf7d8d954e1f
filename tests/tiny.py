"""The command line over the tiny base: settings, commands, processes, servers, a whole chain.

Nothing here names a module of the package: commands go through the installed entry point, results
are read from files. Every config key that a frozen test sets stands in `SETTINGS`, and only there.
"""

import contextlib
import gc
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import yaml
from tiny_made import ROOT, base, folder, planted, questions, rows

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("COLUMNS", "200")  # tables are cut to the width of the terminal

__all__ = ["ROOT", "base", "planted", "questions", "rows"]
SHARED = ROOT.parent / "shared"
SEVEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What the published recipe adapts."""

GATE = ("verdict", "accepted", "age")
"""Checks of `verify` that say what was found of an adapter: notes where it was not `better`."""

SETTINGS: dict[str, tuple[str, Any]] = {
    "out": ("out", "runs/x"),
    "seed": ("seed", 7),
    "base": ("model.id", "test/tiny"),
    "base_path": ("model.path", "base"),
    "source": ("data.source", "rows.jsonl"),
    "sources": ("data.sources", []),
    "data_out": ("data.out", "data"),
    "min_tokens": ("data.min_tokens", 5),
    "max_length": ("data.max_length", 256),
    "max_train_rows": ("data.max_train_rows", 64),
    "max_held_out_rows": ("data.max_held_out_rows", 30),
    "validation_share": ("data.validation_share", 0.15),
    "test_share": ("data.test_share", 0.15),
    "personal_data": ("data.pii", "mask"),
    "benchmarks": ("data.benchmarks", []),
    "epochs": ("train.num_train_epochs", 1),
    "max_steps": ("train.max_steps", 2),
    "batch_size": ("train.per_device_train_batch_size", 4),
    "accumulation": ("train.gradient_accumulation_steps", 1),
    "learning_rate": ("train.learning_rate", 0.001),
    "schedule": ("train.lr_scheduler_type", "cosine"),
    "optimizer": ("train.optim", "adamw_torch"),
    "precision": ("train.precision", "fp32"),
    "rank": ("train.lora.r", 4),
    "alpha": ("train.lora.lora_alpha", 8),
    "dropout": ("train.lora.lora_dropout", 0.0),
    "target_modules": ("train.lora.target_modules", ["q_proj"]),
    "log_steps": ("train.logging_steps", 1),
    "eval_steps": ("train.eval_steps", 1),
    "save_steps": ("train.save_steps", 1),
    "eval_rows": ("train.max_eval_samples", 8),
    "report_to": ("train.report_to", []),
    "eval_out": ("eval.out", "eval"),
    "tasks": ("eval.tasks", {}),
    "judged_items": ("eval.judged_items", 4),
    "max_new_tokens": ("eval.max_new_tokens", 8),
    "eval_batch_size": ("eval.per_device_eval_batch_size", 8),
    "server": ("eval.server", "http://127.0.0.1:1/v1"),
    "judge": ("eval.judge.model", "judge-1"),
    "judge_url": ("eval.judge.base_url", "http://127.0.0.1:1/v1"),
    "judge_key": ("eval.judge.key_variable", "OPENAI_API_KEY"),
    "judge_prices": ("eval.judge.usd_per_million", [1.0, 1.0]),
    "release_out": ("release.out", "release"),
    "training_args_bin": ("release.training_args_bin", True),
    "samples": ("release.samples", "none"),
}
"""Name of a setting in the tests -> the product's key, and a value that it takes. A renamed key is
changed here."""
KEYS = {name: key for name, (key, _) in SETTINGS.items()}

BASE_ID = "test/tiny"
CONFIG: dict[str, Any] = {
    "base": BASE_ID,
    "min_tokens": 30,
    "max_length": 2048,
    "validation_share": 0.125,
    "test_share": 0.125,
    "personal_data": "off",
    "batch_size": 4,
    "accumulation": 2,
    "learning_rate": 0.01,
    "rank": 8,
    "alpha": 16,
    "dropout": 0.1,
    "precision": "fp32",
    "log_steps": 1,
    "max_new_tokens": 8,
    "eval_batch_size": 64,
}
"""What the config file of the tiny base says; the cases run on it as it is."""
CHAIN: dict[str, Any] = {
    "max_length": 256,
    "max_train_rows": 64,
    "max_held_out_rows": 30,
    "validation_share": 0.15,
    "test_share": 0.15,
    "personal_data": "drop",
    "max_steps": 24,
    "samples": "text",
    "eval_steps": 6,
    "save_steps": 6,
    "judged_items": 4,
}
"""What the frozen tests add to it."""


@cache
def config() -> Path:
    """The config file of the tiny base; its name says what is in it, so none is ever stale."""
    tree: dict[str, Any] = {}
    for name, value in {**CONFIG, "base_path": str(base())}.items():
        *sections, last = KEYS[name].split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    text = yaml.safe_dump(tree, sort_keys=False)
    path = folder() / f"config-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    if not path.is_file():
        with tempfile.NamedTemporaryFile("w", dir=folder(), delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    return path


class Said(NamedTuple):
    """How a command ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def fintune(*words: object, env: dict[str, str] | None = None) -> Said:
    """Run a command in this process through the installed entry point, as the shell would.

    An exception that the command line does not turn into a message is its traceback and exit
    code 1, as Python has it.
    """
    out, err = io.StringIO(), io.StringIO()
    gc.freeze()  # a collection at each logged step would walk all of torch: 0.25 s each
    with (
        mock.patch.object(sys, "argv", ["fintune", *map(str, words)]),
        mock.patch.dict(os.environ, env or {}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            _entry_point()()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    return Said(code, out.getvalue(), err.getvalue())


def done(*words: object) -> Said:
    """Run a command that must end with exit code 0.

    The tiny base learns no task, so no release of it goes without a reason.
    """
    if words[0] in ("release", "run") and "--accept" not in words:
        words = (*words, "--accept", REASON)
    said = fintune(*words)
    assert said.code == 0, f"fintune {' '.join(map(str, words))}: exit code {said.code}\n{said.err}"
    return said


def answer_json(*words: object) -> Any:
    """The JSON document of a command that must end with exit code 0."""
    return json.loads(done(*words, "--json").out)


@cache
def _entry_point() -> Any:
    (found,) = metadata.entry_points(group="console_scripts", name="fintune")
    return found.load()


def program() -> str:
    """The installed `fintune`, for a process of its own."""
    return str(Path(sys.executable).with_name("fintune"))


class Forked:
    """A command in a fork of this process: real signals, without ten seconds of imports.

    Args:
        prepare: what the fork does first.
    """

    def __init__(
        self, *words: object, log: Path, prepare: Callable[[], object] = lambda: None
    ) -> None:
        _entry_point()
        self.log = log
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
                sys.argv = ["fintune", *map(str, words)]
                prepare()
                _entry_point()()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code is None

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
            time.sleep(0.01)
        return int(self.code or 0)

    def text(self) -> str:
        """What it wrote, both streams."""
        return self.log.read_text()


class Server:
    """`fintune serve` over a release, in a fork, on a free port of loopback.

    Args:
        on: folder of its base; absent: the tiny one.
    """

    def __init__(
        self, release: Path, log: Path, *, on: Path | None = None, **environment: str
    ) -> None:
        self.release, self.port = release, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        given = ("--base", on or base(), "--port", self.port)
        change = lambda: os.environ.update(environment)  # noqa: E731
        self.process = Forked("serve", release, *given, log=log, prepare=change)
        self.key = environment.get("FINTUNE_API_KEY")
        end = time.monotonic() + 60
        while self.process.running() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                if self.ask("/health")[0] == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.process.text()}")

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Status and text of the reply; a body is posted, as JSON unless it is bytes."""
        known = {"Content-Type": "application/json"}
        known |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = known | {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, sent)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path: str, body: Any = None, **headers: str) -> Any:
        """The JSON of a reply that must be 200."""
        status, text = self.ask(path, body, **headers)
        assert status == 200, text
        return json.loads(text)

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        if self.process.running():
            self.process.send(signal.SIGTERM)
        return self.process.wait(40)


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def words(**settings: Any) -> list[str]:
    """`-s KEY=VALUE` of each setting, by its name in `KEYS`."""
    made: list[str] = []
    for name, value in settings.items():
        text = str(value) if isinstance(value, str | Path) else json.dumps(value)
        if isinstance(value, str) and yaml.safe_load(value) != value:
            text = json.dumps(value)  # a text that YAML would read as a number
        made += ["-s", f"{KEYS[name]}={text}"]
    return made


def chain(out: Path, **changes: Any) -> list[str]:
    """The frozen chain's config and settings, with `out` as its root folder."""
    return ["-c", str(config()), *words(**{"out": out, "source": rows(), **CHAIN, **changes})]


class Chain(NamedTuple):
    """A finished chain: its root folder, and how each verb ended."""

    out: Path
    said: dict[str, Said]

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def run(self) -> Path:
        return self.out / "run"

    @property
    def eval(self) -> Path:
        return self.out / "eval"

    @property
    def release(self) -> Path:
        return self.out / "release"

    @property
    def judging(self) -> Path:
        """The folder of the one judging of the evaluation."""
        (folder,) = (self.eval / "judgings").iterdir()
        return folder

    def words(self, **changes: Any) -> list[str]:
        """The settings that made it."""
        return chain(self.out, tasks=tasks(), **changes)

    def copy(self, out: Path, *parts: str) -> "Chain":
        """The same folders elsewhere."""
        for part in parts:
            shutil.copytree(self.out / part, out / part)
        return Chain(out, self.said)


REASON = "a tiny base, for tests"
VERBS = ("prepare", "train", "eval", "release")


def tasks() -> dict[str, str]:
    """The benchmark that gives the chain's evaluation enough questions to decide."""
    return {"fpb": str(questions())}


def make_chain(out: Path) -> Chain:
    """Every verb of the chain, each of which must succeed."""
    made = Chain(out, {})
    for verb in VERBS:
        made.said[verb] = done(verb, *made.words())
    return made


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree_sha256(folder: Path) -> dict[str, str]:
    """Every file below a folder and its sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def rewrite_sums(release: Path) -> None:
    """SHA256SUMS of the folder as it is now; what the other files state stays."""
    names = sorted(p.name for p in release.iterdir() if p.name != "SHA256SUMS")
    lines = [f"{file_sha256(release / name)}  {name}\n" for name in names]
    (release / "SHA256SUMS").write_text("".join(lines))


def rewrite_stated(release: Path) -> None:
    """Every hash that the folder states of itself, as it is now: an attacker can do this too."""
    path = release / "training_config.json"
    tree = json.loads(path.read_text())
    for name, stated in tree["files"].items():
        if (release / name).exists() and (now := file_sha256(release / name)) != stated:
            tree["files"][name] = now
            facts = tree["provenance"]
            facts |= {key: now for key, digest in facts.items() if digest == stated}
    path.write_text(json.dumps(tree))
    card = release / "README.md"
    stated_in = r"(`training_config\.json` \(sha256 `)[0-9a-f]{64}"
    card.write_text(re.sub(stated_in, rf"\g<1>{file_sha256(path)}", card.read_text()))
    rewrite_sums(release)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def until(true: Callable[[], bool], process: Forked, seconds: float = 60) -> None:
    """Wait until something is so; fail where the process ends before, or time is over."""
    end = time.monotonic() + seconds
    while not true():
        assert process.running(), f"it ended too early: {process.text()}"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.002)


def reseal(stage: Path, **inputs: Any) -> None:
    """`done.json` of a stage's folder as it is now, with these inputs changed."""
    path = stage / "done.json"
    done = json.loads(path.read_text())
    done["inputs"] |= inputs
    spelled = json.dumps(done["inputs"], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    done["inputs_sha256"] = hashlib.sha256(spelled.encode()).hexdigest()
    done["files"] = {
        name: {"bytes": (stage / name).stat().st_size, "sha256": digest}
        for name, digest in tree_sha256(stage).items()
        if name != "done.json" and not name.startswith(".")
    }
    path.write_text(json.dumps(done))
