"""The judge against a hostile network: faults over real HTTP, kills, wall time.

    python bench/judge_faults.py [faults|kills|wall]

faults: 20 kinds met by the first request of each of 50 items; done, lost, paid twice.
kills: a run of 400 calls, 8 at once, killed (-9) at 100 random moments; done rows lost, paid.
wall: 50 items in both orders with canaries, 8 at once, a judge that takes 2 seconds.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from fake_judge import FINE, REPAIRED, RETRIED, STOPPED, FakeJudge, serve  # noqa: E402

from fintune.config import JudgeConfig  # noqa: E402
from fintune.console import result  # noqa: E402
from fintune.errors import ModelError  # noqa: E402
from fintune.evals import calls, judge  # noqa: E402
from fintune.evals.tasks import Item  # noqa: E402
from fintune.example import Message  # noqa: E402

UNPAID_AGAIN = ("timeout", "drip")


def items(count: int) -> list[tuple[Item, dict[str, str]]]:
    """Questions whose adapter answer is right and whose base answer is not."""
    found = []
    for at in range(count):
        asked = (Message("user", f"What is {at} plus one?"),)
        item = Item(f"i{at}", "sum", "number", f"i{at}", asked, str(at + 1))
        found.append((item, {"base": "I do not know.", "adapter": str(at + 1)}))
    return found


def faults() -> None:
    """Each kind on its own run of 106 calls: 50 items in both orders, 6 canaries."""
    kinds = (*RETRIED, *REPAIRED, *FINE, *STOPPED)
    good = True
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder, serve(FakeJudge(kind)) as server:
            limit = 1.0 if kind in UNPAID_AGAIN else 30.0
            config = JudgeConfig(model="fake", base_url=server.url, timeout_s=limit)
            plan = judge.plan(items(50), config, seed=42)
            start = time.monotonic()
            try:
                done = calls.ask(Path(folder), plan, config)
            except ModelError:
                done = {}
            seconds = time.monotonic() - start
            scored = {row["key"] for row in done.values() if row["status"] == "scored"}
            whole = sum(
                all(
                    call.key in scored for call in plan if call.item == f"i{at}" and not call.canary
                )
                for at in range(50)
            )
            asked, twice = sum(server.asked.values()), sum(n > 1 for n in server.paid.values())
            stopped = kind in STOPPED
            good &= asked == 1 if stopped else whole == 50
            good &= twice == 0 or kind in UNPAID_AGAIN
            result(
                f"{kind:24} items done {whole:2}/50  requests {asked:3}  paid twice {twice:3}"
                f"  booked as possibly paid {sum(r['possibly_paid'] for r in done.values()):3}"
                f"  {seconds:5.1f} s"
            )
    result(f"{len(kinds)} kinds; all as wanted: {good}")


def kills(rounds: int = 100) -> None:
    """Kill -9 the asking process until 100 kills are done; count what was lost and paid."""
    rng = random.Random(7)
    killed = lost = most = runs = hidden = paid = 0
    while killed < rounds:
        folder, seen, keys = Path(tempfile.mkdtemp()), 0, set[str]()
        with serve(FakeJudge(delay=0.25)) as server:
            code = None
            while code != 0 and killed < rounds:
                code = _one_child(folder, server.url, rng.uniform(0.0, 3.0))
                killed += code != 0
                done, open_ = calls.history(folder)
                lost += len(keys - done.keys())
                keys = set(done)
                most, seen = max(most, len(open_) - seen), len(open_)
            time.sleep(0.5)
            runs += code == 0
            listed = {row["key"] for row in open_}
            twice = {call[:64] for call, count in server.paid.items() if count > 1}
            hidden += len(twice - listed)
            paid += len(twice)
    result(
        f"{killed} kills, {runs} runs of 400 completed: done rows lost {lost}; most possibly paid"
        f" calls of one kill {most}; paid twice {paid}, of which not listed {hidden}"
    )


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
    config = JudgeConfig(model="fake", base_url=url, modes=("pairwise", "pointwise"))
    plan = [call for call in judge.plan(items(100), config, seed=42) if not call.canary]
    calls._openai()  # seconds to import: kills should meet calls, not the start
    print("ready", flush=True)  # noqa: T201
    calls.ask(Path(folder), plan, config)


def wall() -> None:
    """Wall time with a slow judge, and of the same run again."""
    with tempfile.TemporaryDirectory() as folder, serve(FakeJudge(delay=2.0)) as server:
        config = JudgeConfig(model="fake", base_url=server.url)
        plan = judge.plan(items(50), config, seed=42)
        start = time.monotonic()
        calls.ask(Path(folder), plan, config)
        seconds = time.monotonic() - start
        allowed = 1.15 * len(plan) * 2 / 8 + 2
        result(f"{len(plan)} calls, 8 at once, 2 s each: {seconds:.1f} s (allowed {allowed:.1f} s)")
        asked, before = sum(server.asked.values()), (Path(folder) / calls.LEDGER).read_bytes()
        calls.ask(Path(folder), plan, config)
        again = sum(server.asked.values()) - asked
        same = before == (Path(folder) / calls.LEDGER).read_bytes()
        result(f"the same run again: {again} calls, same bytes: {same}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        for name in sys.argv[1:] or ["faults", "kills", "wall"]:
            {"faults": faults, "kills": kills, "wall": wall}[name]()
