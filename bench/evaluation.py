"""Figures of the stage `eval`, each beside its goal.

    python bench/evaluation.py numbers|controls|human|faults|wall|kills|rescore|generation ...
    or: all

numbers     the grader on the case table and on the benchmarks' gold answers, reworded and spoilt
controls    replies that know nothing (babble, the last 18 amounts, all labels) on every benchmark
            file, beside chance: 1/k of k labels, one amount of the passage drawn at random
human       the grader beside human labels: 832 answers of FinanceBench, a checkout of which
            (patronus-ai/financebench) is named by the variable FINANCEBENCH; `all` leaves it out
            without
faults      the judge: 24 kinds of fault met by the first request of each of 50 items
wall        the judge: 50 items in both orders, 8 at once, answers of 2 seconds
kills       the judge: a run of 400 calls killed (-9) at 100 random moments
rescore     `fintune eval --rescore` on 400 questions with a judged set of 200
generation  the batched greedy loop against `generate` one by one: SmolLM2-135M, fp32, 64 tokens

Prints every figure and writes it to bench/results/evaluation.json with the machine described.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "evaluation.json"
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests", "bench", "tools")]

import test_numbers  # noqa: E402
from controls import controls  # noqa: E402
from controls import human as agreement  # noqa: E402
from fake_judge import ASKED_AGAIN, FINE, RETRIED, STOPPED, UNSCORED, FakeJudge, serve  # noqa: E402
from prepare import BENCHMARKS, machine  # noqa: E402
from tiny_eval import eval_config  # noqa: E402
from victims import harmed  # noqa: E402

from fintune import model, sample  # noqa: E402
from fintune.chat import ChatFormat  # noqa: E402
from fintune.config import JudgeConfig, load_config  # noqa: E402
from fintune.console import result  # noqa: E402
from fintune.errors import ModelError  # noqa: E402
from fintune.evals import judge  # noqa: E402
from fintune.evals.evaluate import evaluate  # noqa: E402
from fintune.evals.grading import Item, Pair  # noqa: E402
from fintune.evals.numbers import compare, is_number_answer  # noqa: E402
from fintune.example import Message  # noqa: E402
from fintune.files import read_json, write_json  # noqa: E402
from fintune.generation import Request, generate  # noqa: E402
from fintune.sample import local_base  # noqa: E402
from fintune.untrusted.probe import stop_token_ids  # noqa: E402

PAID_AGAIN = ("timeout", "drip")
"""The server made a completion that did not arrive, so the repeated request makes another."""
LIMIT, BATCH = 64, 64


def numbers() -> dict[str, Any]:
    """The grader on our case table, and on the benchmarks' gold answers, reworded and spoilt."""
    failed = 0
    for case in test_numbers.CASES:
        try:
            test_numbers.test_case(case)
        except AssertionError:
            failed += 1
    lines = [
        line
        for name in test_numbers.FILES
        for line in (BENCHMARKS / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    golds = [gold for line in lines if is_number_answer(gold := json.loads(line)["answer"])]
    asked, right = Counter[str](), Counter[str]()
    for gold in golds:
        asked["gold_answers"] += 1
        right["gold_answers"] += compare(gold, gold).correct
        for _, reply in test_numbers.rewordings(gold):
            asked["rewordings"] += 1
            right["rewordings"] += compare(gold, reply).correct
        for _, reply in test_numbers.corruptions(gold):
            asked["corruptions"] += 1
            right["corruptions"] += not compare(gold, reply).correct
    cases = len(test_numbers.CASES)
    return {
        "cases": {"n": cases, "right": cases - failed},
        **{name: {"n": asked[name], "right": right[name]} for name in asked},
    }


def items(count: int) -> list[Pair]:
    """Questions whose adapter answer is right and whose base answer is not."""
    found = []
    for at in range(count):
        asked = (Message("user", f"What is {at} plus one?"),)
        item = Item(f"i{at}", "sum", "number", f"i{at}", asked, str(at + 1))
        found.append(Pair(item, {"base": "I do not know.", "adapter": str(at + 1)}, {}))
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
            plan = judge.plan(items(50), config, 42)
            start, runs, done = time.monotonic(), 0, {}
            while len(done) < len(plan) and runs < (1 if kind in STOPPED else len(plan)):
                runs += 1
                with contextlib.suppress(ModelError):
                    judge.ask(Path(folder), plan, config)
                done = judge.finished(Path(folder))
            seconds = time.monotonic() - start
            scored = sum(row["status"] == "scored" for row in done.values())
            asked, twice = sum(server.asked.values()), sum(n > 1 for n in server.paid.values())
            wanted = asked <= judge.CONCURRENCY if kind in STOPPED else scored == len(plan)
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
    import openai  # noqa: F401 - seconds to import: kills should meet calls, not the start

    rng = random.Random(7)
    killed = lost = runs = paid = 0
    while killed < rounds:
        folder, keys, code = Path(tempfile.mkdtemp()), set[str](), -1
        with serve(FakeJudge(delay=0.25)) as server:
            config = JudgeConfig(model="fake", base_url=server.url)
            plan = [call for call in judge.plan(items(200), config, 42) if not call.control]
            while code != 0 and killed < rounds:
                asking = partial(judge.ask, folder, plan, config)
                outcome = harmed(asking, kill_after=rng.uniform(0.0, 3.0))
                code = outcome.code
                assert code in (0, -signal.SIGKILL), outcome.text
                killed += code != 0
                done = judge.finished(folder)
                lost += len(keys - done.keys())
                keys = set(done)
            time.sleep(0.5)
            runs += code == 0
            paid += sum(count - 1 for count in server.paid.values())
        shutil.rmtree(folder)
    return {
        "kills": killed,
        "runs_of_400_completed": runs,
        "done_rows_lost": lost,
        "calls_made_again": paid,
        "most_possible": killed * judge.CONCURRENCY,
    }


def wall() -> dict[str, Any]:
    """Wall time with a slow judge, and of the same run again."""
    with tempfile.TemporaryDirectory() as folder, serve(FakeJudge(delay=2.0)) as server:
        config = JudgeConfig(model="fake", base_url=server.url)
        plan = judge.plan(items(50), config, 42)
        start = time.monotonic()
        judge.ask(Path(folder), plan, config)
        seconds = time.monotonic() - start
        allowed = 1.15 * len(plan) * 2 / 8 + 2
        asked, before = sum(server.asked.values()), (Path(folder) / judge.LOG).read_bytes()
        judge.ask(Path(folder), plan, config)
        again = sum(server.asked.values()) - asked
        same = before == (Path(folder) / judge.LOG).read_bytes()
        return {
            "calls": len(plan),
            "seconds": round(seconds, 1),
            "allowed_seconds": round(allowed, 1),
            "calls_of_the_same_run_again": again,
            "the_same_bytes": same,
        }


def rescore() -> dict[str, Any]:
    """Seconds of a rescoring, and what a second run does."""
    with tempfile.TemporaryDirectory() as folder, serve(FakeJudge()) as server:
        judge = {"model": "fake", "base_url": server.url}
        config = eval_config(
            Path(folder) / "run", train=600, test=420, judge=judge, judged_items=200,
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


def generation(count: int = 300) -> dict[str, Any]:
    """Time both on the same prompts."""
    torch.set_num_threads(2)
    config = load_config("demo", local_base())
    base = model.find_base(config.model)
    tokenizer = model.load_tokenizer(base)
    loaded = model.load_base(base, "none", "fp32").eval()
    chat = ChatFormat(tokenizer, config.chat, stop_token_ids(base.folder, tokenizer))
    prompts = _prompts(chat, count)
    warm = [Request("", prompts[0].prompt_ids, 4)]
    list(generate(loaded, chat, warm, batch_size=1))

    start = time.perf_counter()
    ours: dict[str, list[int]] = {}
    for part in generate(loaded, chat, prompts, batch_size=BATCH):
        ours |= {answer.id: answer.token_ids for answer in part}
    batched = time.perf_counter() - start

    start, same = time.perf_counter(), 0
    for prompt in prompts:
        ids = torch.tensor([prompt.prompt_ids])
        out = loaded.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LIMIT,
            do_sample=False,
        )
        same += out[0, ids.shape[1] :].tolist() == ours[prompt.id]
    single = time.perf_counter() - start
    tokens = sum(map(len, ours.values()))
    return {
        "base": base.about,
        "answers": count,
        "tokens": tokens,
        "batched_seconds": round(batched, 1),
        "one_by_one_seconds": round(single, 1),
        "ratio": round(single / batched, 1),
        "the_same_answers": same,
    }


def _prompts(chat: ChatFormat, count: int) -> list[Request]:
    found: dict[str, Request] = {}
    for line in sample.rows_path().read_text(encoding="utf-8").split("\n"):
        try:
            text = json.loads(line)["user"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        ids = chat.prompt_ids([Message("user", text)])
        if len(ids) < 500:
            found.setdefault(text, Request(str(len(found)), ids, LIMIT))
        if len(found) == count:
            break
    return list(found.values())


def human() -> dict[str, Any]:
    """Agreement with FinanceBench's human labels."""
    return agreement(Path(os.environ["FINANCEBENCH"]))


MEASURED = (numbers, controls, human, faults, wall, kills, rescore, generation)
FIGURES = {f.__name__: f for f in MEASURED}


def main(wanted: list[str]) -> None:
    """Measure the figures named, or all; print each and keep them in the results file."""
    every = [name for name in FIGURES if name != "human" or "FINANCEBENCH" in os.environ]
    for name in every if wanted == ["all"] else wanted:
        found = {**FIGURES[name](), "machine": machine()}
        result(f"{name}: {json.dumps(found, indent=1)}")
        kept = read_json(RESULTS) if RESULTS.is_file() else {}
        kept.pop("format", None)
        write_json(RESULTS, {**kept, name: found})


if __name__ == "__main__":
    if not sys.argv[1:] or set(sys.argv[1:]) - {*FIGURES, "all"}:
        sys.exit(__doc__)
    else:
        main(sys.argv[1:])
