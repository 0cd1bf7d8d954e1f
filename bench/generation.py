"""Answers a second on SmolLM2-135M: ours, transformers' `generate` in batches, and llama.cpp.

    python bench/generation.py [--questions N] [--rounds N] [--batch N] [--llama]

The base is the demo's (`make .venv/demo-base`), the questions are those of ../shared/data. Each
contestant answers the same questions greedily, with as many prompts at once and the same longest
answer; they take turns, a task each, and a rate is the median over rounds. transformers pads each
batch on the left, in the order of the file, as its documentation does. Outcomes are graded, and the
share that agrees is printed: a faster answer that is another one counts for nothing. `likelihood`
is `eval.label_scoring`. Where `auto` is bf16 on this processor, ours answers in bf16 too. llama.cpp
(llama-cpp-python, f32, one prompt at a time) is asked where it is installed. Results go to
bench/results/generation.json; a task that is left out keeps its figures.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src")]

from fintune import model, sample  # noqa: E402
from fintune.chat import ChatFormat  # noqa: E402
from fintune.config import load_config  # noqa: E402
from fintune.evals.grading import Item  # noqa: E402
from fintune.evals.likelihood import log_likelihoods, with_choices  # noqa: E402
from fintune.evals.tasks import find_questions, task_items  # noqa: E402
from fintune.files import read_json, write_json  # noqa: E402
from fintune.generation import Request, generate  # noqa: E402
from fintune.releasing import gguf  # noqa: E402
from fintune.training.metrics import processor  # noqa: E402

BENCHMARKS = ROOT.parent / "shared" / "data" / "benchmarks"
TASKS = {
    "banking77": ("banking77_test", 16),
    "fpb": ("fpb_test", 8),
    "headline": ("headline_valid", 8),
    "formula": ("formula_test", 32),
    "tatqa": ("tatqa_dev", 32),
}
"""File of questions and longest answer of each task."""
WARM_UP = 8
"""Questions that each contestant answers before it is timed."""
LABELS = ("banking77", "fpb", "headline")
Questions = list[tuple[Item, list[int]]]
Answers = dict[str, str]


def ours(loaded: Any, chat: ChatFormat, asked: Questions, limit: int, batch: int) -> Answers:
    """What `fintune eval` does."""
    requests = [Request(item.id, ids, limit) for item, ids in asked]
    parts = generate(loaded, chat, requests, batch_size=batch)
    return {each.id: each.text for part in parts for each in part}


def likelihood(loaded: Any, chat: ChatFormat, asked: Questions, limit: int, batch: int) -> Answers:
    """The likeliest choice."""
    questions = with_choices(chat, asked).values()
    scored = (pair for part in log_likelihoods(loaded, questions) for pair in part)
    return {one.id: one.choices[p.index(max(p))] for one, p in scored}


def peer(loaded: Any, chat: ChatFormat, asked: Questions, limit: int, batch: int) -> Answers:
    """transformers: batches padded on the left, `generate` until the last row of each ends."""
    found = {}
    for start in range(0, len(asked), batch):
        rows = asked[start : start + batch]
        longest = max(len(ids) for _, ids in rows)
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for _, ids in rows])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in rows])
        with torch.inference_mode():
            out = loaded.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=chat.stop_token_ids,
                pad_token_id=chat.stop_token_ids[0],
            )
        for (item, _), row in zip(rows, out[:, longest:].tolist(), strict=True):
            stops = [at for at, token in enumerate(row) if token in chat.stop_token_ids]
            found[item.id] = chat.answer(row[: stops[0]] if stops else row)[0]
    return found


def llama_cpp(base: model.Base, loaded: Any, chat: ChatFormat) -> Callable[..., Answers]:
    """llama.cpp on the same weights, with two threads and its own cache of the prompt before."""
    from llama_cpp import Llama

    with TemporaryDirectory() as folder:
        path = Path(folder) / "base.gguf"
        release = model.LoadedRelease(base, loaded, "fp32", chat)
        gguf.write_model(release, path, "f32", "SmolLM2-135M-Instruct")
        served = Llama(str(path), n_ctx=4096, n_threads=2, use_mmap=False, verbose=False)

    def answer(_: Any, chat: ChatFormat, asked: Questions, limit: int, batch: int) -> Answers:
        found = {}
        for item, ids in asked:
            made: list[int] = []
            for token in served.generate(ids, temp=0.0, repeat_penalty=1.0):
                if token in chat.stop_token_ids or len(made) == limit:
                    break
                made.append(token)
            found[item.id] = chat.answer(made)[0]
        return found

    return answer


def questions(name: str, count: int, chat: ChatFormat) -> Questions:
    """The first questions of a task by hash, in the order of its file."""
    path = BENCHMARKS / f"{TASKS[name][0]}.jsonl"
    config = load_config("demo", [f"eval.tasks.{name}={path}"])
    items = task_items(name, find_questions(config.eval.tasks, {})[name], count)
    return [(item, chat.prompt_ids(item.messages)) for item in items]


def race(
    contestants: dict[str, Callable[..., Answers]],
    given: tuple[Any, ChatFormat, Questions, int, int],
    rounds: int,
) -> dict[str, Any]:
    """Rates, ratios to ours, and shares of equal outcomes of one task."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    outcomes: dict[str, list[bool]] = {}
    loaded, chat, asked, limit, batch = given
    for answer in contestants.values():  # the first pass compiles products
        answer(loaded, chat, asked[:WARM_UP], limit, batch)
    for number in range(rounds):
        for name in contestants if number % 2 else reversed(contestants):
            start = time.perf_counter()
            answers = contestants[name](*given)
            seconds[name].append(time.perf_counter() - start)
            graded = [item.grade(answers[item.id]) for item, _ in given[2]]
            outcomes[name] = [bool(each and each.correct) for each in graded]
            _say(f"  {name:14} {len(graded) / seconds[name][-1]:8.2f} answers/s")
    found = {}
    for name, own in seconds.items():
        pairs = zip(own, seconds["transformers"], strict=True)
        same = [a == b for a, b in zip(outcomes[name], outcomes["transformers"], strict=True)]
        found[name] = {
            "answers_per_second": round(median(len(same) / each for each in own), 2),
            "times_transformers": round(median(other / each for each, other in pairs), 2),
            "right": round(sum(outcomes[name]) / len(same), 4),
            "same_outcome": round(sum(same) / len(same), 4),
        }
    return found


def main() -> None:
    """Every task in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=128, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--llama", action="store_true", help="also llama.cpp, where installed")
    options = parser.parse_args()
    config = load_config("demo", sample.local_base())
    base = model.find_base(config.model)
    chat = model.load_chat(base, config.chat)
    loaded = model.load_base(base, "none", "fp32").eval()
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    fast = model.precision("auto", torch.device("cpu")) == "bf16"
    half = model.load_base(base, "none", "bf16").eval() if fast else None
    results: dict[str, Any] = {}
    for name in options.tasks.split(","):
        asked, limit = questions(name, options.questions, chat), TASKS[name][1]
        _say(f"{name}: {len(asked)} questions, {sum(len(ids) for _, ids in asked):,} tokens")
        contestants: dict[str, Callable[..., Answers]] = {
            "ours": ours,
            "transformers": partial(_of, peer, plain),
        }
        if half is not None:
            contestants["ours, bf16"] = partial(_of, ours, half)
        if name in LABELS:
            contestants["likelihood"] = likelihood
        if options.llama and find_spec("llama_cpp"):
            contestants["llama.cpp"] = llama_cpp(base, loaded, chat)
        given = (loaded, chat, asked, limit, options.batch)
        results[name] = {"questions": len(asked), "longest_answer": limit} | {
            "sides": race(contestants, given, options.rounds)
        }
    machine = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__}
    facts = {"format": 1, "machine": machine, "base": base.about, "dtype": "fp32"}
    facts |= {"batch": options.batch, "rounds": options.rounds}
    path = ROOT / "bench" / "results" / "generation.json"
    known = read_json(path) if path.is_file() else {}
    before = known.pop("tasks", {}) if facts.items() <= known.items() else {}
    write_json(path, facts | {"tasks": before | results})


def _of(answer: Callable[..., Answers], of: Any, _: Any, *given: Any) -> Answers:
    """The answers of another model than the one that is given."""
    return answer(of, *given)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
