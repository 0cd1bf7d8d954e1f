"""What the first page of each client shows, against `fintune serve`.

    python bench/clients.py FOLDER [--release RELEASE --base BASE] [--only NAME ...]

The clients and what is run of them are in clients.toml. Every client gets an environment of its own
below FOLDER (a venv with packages of PyPI, by uv where there is one, or npm's node_modules), which
later runs use again.
A mode works where the client ends without an error and its answer is the one that a plain request
gets: decoding is greedy, so a longer answer begins with a shorter one. Structured output and tools
must be refused in the server's own words. Without RELEASE one of a tiny base is made.
Prints a table and writes bench/results/clients.json after each client; exit code 1 where a mode
fails or the server wrote a traceback.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src"), str(ROOT / "bench")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tiny  # noqa: E402
from prepare import machine  # noqa: E402

from fintune.console import say  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "clients.json"
CLIENTS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
ASK = "What is EBITDA?"
REFUSALS = {
    "no structured output": "this server has no structured output",
    "no tools": "this server calls no tools",
    "no path": "no such path",
}
LIMIT_S = 300
"""Of one mode."""
INSTALL_LIMIT_S = 1800
SHOWN = 300
"""Characters of what a failed mode said."""
PYTHON = """import json, os
URL, SERVER, BASE, ASK = (os.environ[key] for key in ("URL", "SERVER", "BASE", "ASK"))
answer = lambda text: print("\\nANSWER " + json.dumps(text))
"""
NODE = """const URL_ = process.env.URL, ASK = process.env.ASK;
const answer = text => console.log("\\nANSWER " + JSON.stringify(text));
"""
QUIET = {
    "PROMPTFOO_DISABLE_TELEMETRY": "1",
    "PROMPTFOO_DISABLE_UPDATE": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


class Environment:
    """Where a client's packages are, and how its code is run there."""

    def __init__(self, client: dict[str, Any], place: Path) -> None:
        self._node, self._packages = client.get("node", False), client["packages"]
        self._start, self._place = client.get("start", "") + "\n", place
        self._python = str(place / "bin" / "python")

    def install(self) -> str:
        """Install the packages where they are not yet; what went wrong, empty if nothing."""
        mark, wanted = self._place / "installed.json", json.dumps(self._packages)
        if mark.is_file() and mark.read_text() == wanted:
            return ""
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True)
        if self._node:
            (self._place / "package.json").write_text('{"type": "module", "private": true}')
            words = ["npm", "install", "--no-audit", "--no-fund", *self._packages]
        elif uv := shutil.which("uv"):
            venv.create(self._place)
            words = [uv, "pip", "install", "-q", "--python", self._python, *self._packages]
        else:
            venv.create(self._place, with_pip=True)
            words = [self._python, "-m", "pip", "install", "-q", *self._packages]
        code, said = _run(words, self._place, {}, INSTALL_LIMIT_S)
        if code:
            return f"cannot be installed here: {said[-SHOWN:]}"
        mark.write_text(wanted)
        return ""

    def version(self) -> str:
        """Of the first package."""
        name = re.sub(r"\[.*", "", self._packages[0])
        if self._node:
            path = self._place / "node_modules" / name / "package.json"
            return str(json.loads(path.read_text())["version"])
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        return _run([self._python, "-c", code], self._place, {})[1].strip()

    def run(self, code: str, given: dict[str, str]) -> tuple[int, str]:
        """Exit code and output of a mode's code."""
        name = "mode.mjs" if self._node else "mode.py"
        head = (NODE if self._node else PYTHON) + self._start
        (self._place / name).write_text(head + code)
        return _run(["node" if self._node else self._python, name], self._place, given)


def _run(
    words: list[str], place: Path, given: dict[str, str], limit: int = LIMIT_S
) -> tuple[int, str]:
    kept = {key: os.environ[key] for key in os.environ if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**kept, **QUIET, **given, "PATH": path}
    try:
        made = subprocess.run(words, cwd=place, env=environment, timeout=limit, **both)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        return 124, f"no end within {limit} s"
    return made.returncode, made.stdout.decode("utf-8", "replace")


def judged(wants: str, code: int, said: str, plain: dict[str, str]) -> tuple[str, str]:
    """`works`, `refused` or `fails`, and what was said."""
    if wants in REFUSALS:
        refused = code != 0 and REFUSALS[wants] in said
        return ("refused", REFUSALS[wants]) if refused else ("fails", _end(said))
    found = re.findall(r"^ANSWER (.+)$", said, re.MULTILINE)
    if code or not found:
        return "fails", _end(said)
    text = str(json.loads(found[-1]) or "").strip()
    if not text:
        return "fails", "an empty answer"
    other = plain.get(wants, text).strip()
    if not (other.startswith(text) or text.startswith(other)):
        return "fails", f"another answer than the plain request's: {text[:80]!r}"
    return "works", ""


def _end(said: str) -> str:
    """The last words of an output, without machine paths."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return re.sub(r"(/[\w.+-]+){2,}/", ".../", " ".join(lines))[-SHOWN:]


def tried(name: str, folder: Path, server: tiny.Server, given: dict[str, str]) -> dict[str, Any]:
    """The row of a client: its version, and how each mode ended."""
    client = CLIENTS[name]
    environment = Environment(client, folder / re.sub(r"\W+", "-", name))
    row: dict[str, Any] = {"client": name, "date": datetime.now(UTC).date().isoformat()}
    if fault := environment.install():
        return {**row, "version": None, "modes": {"install": {"status": "fails", "what": fault}}}
    head = {"model": "adapter"}
    asked = {"messages": [{"role": "user", "content": ASK}]}
    chat = server.get("/v1/chat/completions", head | asked)["choices"][0]["message"]["content"]
    text = server.get("/v1/completions", head | {"prompt": ASK})["choices"][0]["text"]
    modes = {}
    for mode, (wants, code) in client["modes"].items():
        begun = time.monotonic()
        status, what = judged(wants, *environment.run(code, given), {"chat": chat, "text": text})
        modes[mode] = {"status": status, "what": what}
        seconds = time.monotonic() - begun
        say(f"{name:24} {mode:42} {status} {what} ({seconds:.0f} s)")
    return {**row, "version": environment.version(), "modes": modes}


def main() -> int:
    """Try the clients, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the environments")
    parser.add_argument("--release", type=Path)
    parser.add_argument("--base", type=Path, help="folder of the release's base")
    parser.add_argument("--only", nargs="+", choices=[*CLIENTS], default=[*CLIENTS])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        release = options.release or tiny.make_chain(Path(scratch) / "chain").release
        base, log = (options.base or tiny.base()).resolve(), Path(scratch) / "log"
        server = tiny.Server(release, log, on=base)
        given = {"URL": f"{server.url}/v1", "SERVER": server.url, "BASE": str(base), "ASK": ASK}
        rows = {}
        if RESULTS.is_file():
            rows = {row["client"]: row for row in json.loads(RESULTS.read_text("utf-8"))["clients"]}
        try:
            for name in options.only:
                rows[name] = tried(name, options.folder.resolve(), server, given)
                kept = [rows[name] for name in CLIENTS if name in rows]
                counts = [mode["status"] for row in kept for mode in row["modes"].values()]
                tree = {
                    "format": 1,
                    "machine": machine(),
                    "modes": {status: counts.count(status) for status in sorted({*counts})},
                    "server_tracebacks": log.read_text().count("Traceback"),
                    "clients": kept,
                }
                RESULTS.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", "utf-8")
        finally:
            server.stop()
    say(f"{tree['modes']}, {tree['server_tracebacks']} tracebacks of the server")
    return int("fails" in counts or tree["server_tracebacks"] != 0)


if __name__ == "__main__":
    sys.exit(main())
