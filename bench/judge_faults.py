"""The judge against a hostile network: faults over real HTTP, kills, wall time.

faults: kinds met by the first request of each of 50 items; done, requests, made twice.
kills: a run of 400 calls, 8 at once, killed (-9) at 100 random moments; done rows lost, made twice.
wall: 50 items in both orders with control items, 8 at once, a judge that takes 2 seconds.
"""

import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from fake_judge import ASKED_AGAIN, FINE, RETRIED, STOPPED, UNSCORED, FakeJudge, serve  # noqa: E402

from fintune.config import JudgeConfig  # noqa: E402
from fintune.errors import ModelError  # noqa: E402
from fintune.evals import calls, judge  # noqa: E402
from fintune.evals.items import Item  # noqa: E402
from fintune.example import Message  # noqa: E402

PAID_AGAIN = ("timeout", "drip")
"""The server made a completion that did not arrive, so the repeated request makes another."""


def items(count: int) -> list[tuple[Item, dict[str, str]]]:
    """Questions whose adapter answer is right and whose base answer is not."""
    found = []
    for at in range(count):
        asked = (Message("user", f"What is {at} plus one?"),)
        item = Item(f"i{at}", "sum", "number", f"i{at}", asked, str(at + 1))
        found.append((item, {"base": "I do not know.", "adapter": str(at + 1)}))
    return found


def faults() -> dict[str, Any]:
    """Each kind on its own run of 106 calls: 50 items in both orders, 6 control items.

    As wanted: every call is scored, after the same command again where a body was no completion;
    replies without a verdict are unscored; a refusal stops the run.
    """
    kinds = (*RETRIED, *ASKED_AGAIN, *UNSCORED, *FINE, *STOPPED)
    found: dict[str, Any] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder, serve(FakeJudge(kind)) as server:
            config = JudgeConfig(model="fake", base_url=server.url)
            plan = judge.plan(items(50), config, seed=42)
            start, runs, done = time.monotonic(), 0, {}
            while len(done) < len(plan) and runs < (1 if kind in STOPPED else len(plan)):
                runs += 1
                with contextlib.suppress(ModelError):
                    calls.ask(Path(folder), plan, config)
                done = calls.finished(Path(folder))
            seconds = time.monotonic() - start
            scored = sum(row["status"] == "scored" for row in done.values())
            asked, twice = sum(server.asked.values()), sum(n > 1 for n in server.paid.values())
            wanted = asked <= calls.CONCURRENCY if kind in STOPPED else scored == len(plan)
            wanted = wanted or (kind in UNSCORED and len(done) == len(plan) and not scored)
            found[kind] = {
                "scored": scored,
                "requests": asked,
                "commands": runs,
                "made_twice": twice,
                "seconds": round(seconds, 1),
                "as_wanted": wanted and (twice == 0 or kind in PAID_AGAIN),
            }
    return {"kinds": len(kinds), "as_wanted": sum(f["as_wanted"] for f in found.values()), **found}


def kills(rounds: int = 100) -> dict[str, Any]:
    """Kill -9 the asking process until 100 kills are done; count what was lost and made twice."""
    rng = random.Random(7)
    killed = lost = runs = paid = 0
    while killed < rounds:
        folder, keys = Path(tempfile.mkdtemp()), set[str]()
        with serve(FakeJudge(delay=0.25)) as server:
            code = None
            while code != 0 and killed < rounds:
                code = _one_child(folder, server.url, rng.uniform(0.0, 3.0))
                killed += code != 0
                done = calls.finished(folder)
                lost += len(keys - done.keys())
                keys = set(done)
            time.sleep(0.5)
            runs += code == 0
            paid += sum(count - 1 for count in server.paid.values())
    return {
        "kills": killed,
        "runs_of_400_completed": runs,
        "done_rows_lost": lost,
        "calls_made_again": paid,
        "most_possible": killed * calls.CONCURRENCY,
    }


def _one_child(folder: Path, url: str, seconds: float) -> int:
    """Start the asking process and kill it after a while; 0 where it was done before."""
    command = [sys.executable, __file__, "child", str(folder), url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout
        child.stdout.readline()  # it is about to ask
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            return child.wait()


def child(folder: str, url: str) -> None:
    """A run of 400 calls, as the killed process makes it."""
    config = JudgeConfig(model="fake", base_url=url)
    plan = [call for call in judge.plan(items(200), config, seed=42) if not call.control]
    calls._openai()  # seconds to import: kills should meet calls, not the start
    print("ready", flush=True)  # noqa: T201
    calls.ask(Path(folder), plan, config)


def wall() -> dict[str, Any]:
    """Wall time with a slow judge, and of the same run again."""
    with tempfile.TemporaryDirectory() as folder, serve(FakeJudge(delay=2.0)) as server:
        config = JudgeConfig(model="fake", base_url=server.url)
        plan = judge.plan(items(50), config, seed=42)
        start = time.monotonic()
        calls.ask(Path(folder), plan, config)
        seconds = time.monotonic() - start
        allowed = 1.15 * len(plan) * 2 / 8 + 2
        asked, before = sum(server.asked.values()), (Path(folder) / calls.LOG).read_bytes()
        calls.ask(Path(folder), plan, config)
        again = sum(server.asked.values()) - asked
        same = before == (Path(folder) / calls.LOG).read_bytes()
        return {
            "calls": len(plan),
            "seconds": round(seconds, 1),
            "allowed_seconds": round(allowed, 1),
            "calls_of_the_same_run_again": again,
            "the_same_bytes": same,
        }


if __name__ == "__main__":
    child(*sys.argv[2:])
