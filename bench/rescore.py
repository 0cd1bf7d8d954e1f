"""How long `fintune eval --rescore` takes on 400 questions with a judged set of 200.

    python bench/rescore.py

A tiny random base and adapter, so that the answers come fast; the files have the size of real
ones. Also runs the whole evaluation again and compares every byte.
"""

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from fake_judge import FakeJudge, serve  # noqa: E402
from tiny_eval import eval_config  # noqa: E402

from fintune.console import result  # noqa: E402
from fintune.evals.evaluate import evaluate  # noqa: E402


def main() -> None:
    """Print the seconds of a rescoring, and what a second run does."""
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
        start = time.perf_counter()
        rescore(config.eval_dir)
        seconds = time.perf_counter() - start
        after = {path.name: path.read_bytes() for path in config.eval_dir.iterdir()}
        result(
            f"{found['n']['items']} questions, {found['judge']['calls']} judge calls: rescored in"
            f" {seconds:.2f} s; second run {sum(server.asked.values()) - asked} calls,"
            f" the same bytes: {before == after}"
        )


if __name__ == "__main__":
    main()
