"""How long `fintune eval --rescore` takes on 400 questions with a judged set of 200.

A tiny random base and adapter, so that the answers come fast; the files have the size of real
ones. The command runs in a process of its own, imports included. Also runs the whole evaluation
again and compares every byte.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from fake_judge import FakeJudge, serve  # noqa: E402
from tiny_eval import eval_config  # noqa: E402

from fintune.evals.evaluate import evaluate  # noqa: E402


def rescore() -> dict[str, Any]:
    """Seconds of a rescoring, and what a second run does."""
    with tempfile.TemporaryDirectory() as folder, serve(FakeJudge()) as server:
        judge = {"model": "fake", "base_url": server.url}
        config = eval_config(
            Path(folder) / "run", train=600, decide=420, judge=judge, judged_items=200,
            max_new_tokens=48,
        )  # fmt: skip
        found = evaluate(config)
        asked = sum(server.asked.values())
        before = {path.name: path.read_bytes() for path in config.eval_dir.iterdir()}
        evaluate(config)
        command = [str(Path(sys.executable).with_name("fintune")), "eval", "--rescore"]
        start, cpu = time.perf_counter(), sum(os.times()[2:4])
        subprocess.run([*command, str(config.eval_dir)], check=True)
        seconds, cpu = time.perf_counter() - start, sum(os.times()[2:4]) - cpu
        after = {path.name: path.read_bytes() for path in config.eval_dir.iterdir()}
        return {
            "questions": found["n"]["items"],
            "judge_calls": found["judge"]["calls"],
            "seconds_of_the_command": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "calls_of_a_second_run": sum(server.asked.values()) - asked,
            "the_same_bytes": before == after,
        }
