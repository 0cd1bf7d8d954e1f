"""SmolLM2-135M-Instruct on real finance rows, held against public tasks: the result in README.md.

    python bench/finance.py [--seeds 42 43 44] [--rows N] [--epochs N] [--quick]

Rows and questions are those of ../shared/data. A row of a label task is also asked in the words of
that task's questions (`ask` in evals/suite), as a task whose rows and questions differ in words is
else lost: the adapter takes such a question for another task. Every row is decontaminated against
all of the questions, and no setting was chosen by them. A seed is a run of the product
(`fintune prepare`, `train`, `eval`); a killed run continues. Writes bench/results/finance.json,
which keeps the seeds of the same recipe that were run before; --quick writes to --out alone.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from fintune import sample  # noqa: E402
from fintune.console import table  # noqa: E402
from fintune.evals.grading import VARIANTS  # noqa: E402
from fintune.evals.tasks import TASKS  # noqa: E402
from fintune.files import sha256_file  # noqa: E402

Row = dict[str, Any]
DATA = ROOT.parent / "shared" / "data"
ROWS, ORIGINS = DATA / "finance_instruct_sample.jsonl", "finance_instruct_sample.provenance.csv"
RESULTS = ROOT / "bench" / "results" / "finance.json"
LONGEST = 700
"""Tokens of a row: a question of BANKING77, which lists 77 intents, has up to 660. Tasks of which
most questions are longer than any row are left out."""
TOO_LONG = ("convfinqa", "financebench", "finer", "pacific", "xbrl_extract", "xbrl_term")
"""The last is graded by a judge only; PACIFIC asks of TAT-QA's documents."""
FILES = {"finqa": "finqa_test_evidence.jsonl"}
"""FinQA over its gold evidence; a whole page is longer than any row."""
BANKING_SHARE = 0.5
"""Of the rows of BANKING77 that are also asked with all intents, ten times as long."""
SEVEN = [
    f"{how} {tone}"
    for tone in ("negative", "positive")
    for how in ("strong", "moderately", "mildly")
]
WORDINGS = (
    "Is this {options} for an investor?\n{text}\nAnswer: ",
    "Classify the tone of the text as {options}.\nText: {text}\nTone: ",
    "{text}\nTone ({options}): ",
)
"""More ways to ask for a tone. A text is then seen five times in an epoch, a page of a report once:
a label is a token or two of the loss, an answer in prose hundreds."""
INTENT = "A customer of a bank writes: {text}\nIn a word, what about?"
HEADS = 2
"""More ways in which a question about a headline of gold is asked, each of another row's."""
NAMES = {"fiqasa": "fiqa_sa"}
"""Tasks whose rows have another name in the provenance file."""
PUBLISHED = {
    "FinBERT, 110M (weighted F1; FPB is its training set)": [0.88, 0.596, 0.733, 0.538],
    "Llama 3.1 8B Instruct, base (FinLoRA)": [0.6873, 0.4655, None, 0.4386],
    "Llama 3.1 8B Instruct with LoRA (FinLoRA)": [0.8564, 0.8128, None, 0.5416],
}
"""Accuracy, or where it says so weighted F1, on FPB, FiQA-SA, TFNS and NWGI, as their authors
publish it on the whole test sets. FinLoRA's TFNS labels are permuted: its figures are left out."""
RATE = "useful_tokens_per_second"
ENTITIES = {"PER": "person", "ORG": "organization", "LOC": "location"}


def main() -> None:
    """Prepare once, then train and evaluate each seed; print and write the table."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--seeds", type=int, nargs="+", default=[42])
    asked.add_argument("--rows", type=int, default=12_063, help="of the sample's, by hash")
    asked.add_argument("--epochs", type=int, default=2)
    asked.add_argument("--processes", type=int, default=1, help="that train, by torchrun")
    asked.add_argument("--quick", action="store_true", help="2,000 rows, one epoch, 100 questions")
    asked.add_argument("--out", type=Path, default=ROOT / "runs" / "finance")
    options = asked.parse_args()
    if options.quick:
        options.rows, options.epochs = 2_000, 1
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    rows = list(training_rows(options.rows))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "rows.jsonl").write_text(text, encoding="utf-8")
    (out / "config.yaml").write_text(config(out, options), encoding="utf-8")
    run(out, "prepare", seed=42)
    for seed in options.seeds:
        for stage in ("train", "eval"):
            run(out, stage, seed=seed, processes=options.processes if stage == "train" else 1)
    write(out, options)


def training_rows(most: int) -> Iterator[Row]:
    """The sample's rows, `most` of them by hash, those of label tasks in both wordings."""
    with (DATA / ORIGINS).open(encoding="utf-8", newline="") as file:
        origins = [row["source"] for row in csv.DictReader(file)]
    lines = ROWS.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    numbered = list(zip(lines, origins, strict=True))
    numbered.sort(key=lambda line: sha256(line[0].encode()).digest())
    intents = sorted({json.loads(line)["assistant"] for line, of in numbered if of == "banking77"})
    rows = [(json.loads(line), origin) for line, origin in numbered[:most]]
    heads = heads_of([row["user"] for row, origin in rows if origin == "headline"])
    for at, (row, origin) in enumerate(rows):
        name = NAMES.get(origin, origin)
        # A text and its wordings are one document, so that they fall into one part.
        one = {"context_id": text_of(row)} if name in TASKS and TASKS[name].kind == "label" else {}
        yield {**row, "source": origin, **one}
        asked = as_asked(name, row, intents if at % 10 < 10 * BANKING_SHARE else [])
        for question, answer in (*asked, *other_heads(name, row, heads)):
            said = {"user": question, "assistant": answer, "source": f"{origin} as asked"}
            yield {**said, **one}


def text_of(row: Row) -> str:
    """What a row asks about: all of its question, or what stands behind an instruction in it."""
    user = str(row.get("user") or "")
    if "\nText: " in user:
        user = user.split("\nText: ")[-1]
    elif not (row.get("system") or "").strip():
        user = user.split("\n", maxsplit=1)[-1]
    return user.removesuffix("\nAnswer:")


def heads_of(questions: list[str]) -> dict[str, list[str]]:
    """Ways in which each thing about a headline is asked, by their first sentence."""
    heads = sorted({question.split("\nText: ")[0] for question in questions})
    return {
        head.split("..")[0]: [h for h in heads if h.startswith(head.split("..")[0])]
        for head in heads
    }


def other_heads(name: str, row: Row, heads: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """A question about a headline in the words of other rows."""
    if name == "headline" and row["assistant"]:
        mine, _, text = row["user"].partition("\nText: ")
        others = [head for head in heads[mine.split("..")[0]] if head != mine]
        others.sort(key=lambda head: sha256(f"{head}{text}".encode()).digest())
        yield from ((f"{head}\nText: {text}", row["assistant"]) for head in others[:HEADS])


def as_asked(name: str, row: Row, intents: list[str]) -> Iterator[tuple[str, str]]:
    """A row of a label task in the words of the task's questions and in others, with its answer.

    Args:
        intents: of BANKING77; none: not in the words that list them.
    """
    task, text, said = TASKS.get(name), text_of(row), str(row.get("assistant") or "")
    if task is None or not task.ask or not said:
        return
    if name == "ner":
        for entity, kind in re.findall(r"^(.+), (PER|ORG|LOC)$", said, re.MULTILINE):
            yield task.prompt({"text": text, "entity": entity}), ENTITIES[kind]
        return
    answer = said if name in ("banking77", "nwgi") else said.lower()
    options = intents if name == "banking77" else task.choices or ["neutral", *SEVEN]
    values = {"text": text, "options": ", ".join(options)}
    if options:
        yield task.prompt(values), answer
    for words in [INTENT] if name == "banking77" else WORDINGS:
        yield words.format(**values), answer


def config(out: Path, options: argparse.Namespace) -> str:
    """The run's settings, as a file of the product."""
    named = {name: FILES.get(name, task.file) for name, task in TASKS.items() if task.file}
    asked = {name: str(DATA / "benchmarks" / file) for name, file in named.items()}
    tasks = {name: {"path": path} for name, path in asked.items() if name not in TOO_LONG}
    tree = {
        "name": "smollm2-finance",
        "out": str(out),
        "model": {
            "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "path": sample.local_base()[0].partition("=")[2],
        },
        "data": {
            "source": str(out / "rows.jsonl"),
            "max_length": LONGEST,
            "near_duplicates": 1,  # of a label row the two wordings are alike
            "filter_english_only": False,
            "pii": "off",
            "validation_share": 0.03,
            "test_share": 0.05,
            "benchmarks": [*asked.values()],
        },
        "train": {
            "num_train_epochs": options.epochs,
            "loss_aggregation": "example",  # a label is a token or two, an answer in prose hundreds
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1.3e-3,
            "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
            "eval_steps": 100,
            "save_steps": 100,
            "max_eval_samples": 200,
        },
        "eval": {"max_items": 100 if options.quick else 400, "max_new_tokens": 32, "tasks": tasks},
    }
    return json.dumps(tree, indent=1)  # JSON is YAML


def run(out: Path, stage: str, seed: int, processes: int = 1) -> None:
    """One stage as a user runs it; its time and memory (of all its processes together) go into
    times.jsonl."""
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    words = [sys.executable, *(several if processes > 1 else []), "-m", "fintune", stage]
    words += ["-c", str(out / "config.yaml")]
    words += ["--set", f"seed={seed}", "--set", f"data.out={out / 'data'}"]
    for name in ("train", "eval"):
        words += ["--set", f"{name}.out={out / f'{name}-{seed}'}"]
    path, started = str(ROOT / "src"), time.monotonic()
    stage_process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": path})
    _, status, used = os.wait4(stage_process.pid, 0)
    if status:
        sys.exit(f"{stage} ended with exit code {os.waitstatus_to_exitcode(status)}")
    line = {"stage": stage, "seed": seed, "seconds": round(time.monotonic() - started, 1)}
    line |= {"peak_gb": round(used.ru_maxrss / 1e6 * processes, 2), "processes": processes}
    with (out / "times.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write(out: Path, options: argparse.Namespace) -> None:
    """Write and print the table: of the first seed the paired interval, of all the accuracies.

    Seeds of the same recipe that stand in the file already stay: each may be of another day.
    """
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = re.sub(r'"[^"]*/', '"', config(Path(), options))  # no folder of this machine
    recipe = sha256(f"{names}{sha256_file(out / 'rows.jsonl')}".encode()).hexdigest()
    runs = known["runs"] if known.get("recipe") == recipe else {}
    runs |= {str(seed): found(out, seed) for seed in options.seeds}
    first, *_ = runs = dict(sorted(runs.items()))
    facts: Row = {
        "format": 2,
        "recipe": recipe,
        "base": runs[first]["base"],
        "rows": options.rows,
        "epochs": options.epochs,
        "tasks": {
            name: {**one, **spread(name, runs)} for name, one in runs[first]["tasks"].items()
        },
        "runs": runs,
        "published": {"tasks": ["fpb", "fiqa_sa", "tfns", "nwgi"], "figures": PUBLISHED},
    }
    path = out / "finance.json" if options.quick else RESULTS
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    table(
        f"seeds {', '.join(runs)}: {', '.join(run['verdict'] for run in runs.values())}",
        ["task", "base", "adapter"],
        [
            [name, f"{one['base']:.1%}", ", ".join(f"{share:.1%}" for share in one["seeds"])]
            for name, one in facts["tasks"].items()
        ],
    )


def found(out: Path, seed: int) -> Row:
    """What a seed's run came to."""
    results = json.loads((out / f"eval-{seed}/test_results.json").read_text())
    trained = json.loads((out / f"train-{seed}/environment.json").read_text())
    lines = map(json.loads, (out / f"train-{seed}/metrics.jsonl").read_text().splitlines())
    stages, cores = spent(out), trained["processes"] * trained["threads"]
    return {
        "base": results["provenance"]["base_about"],
        "verdict": results["verdict"],
        "difference": results["accuracy"]["difference"],
        "loss": {name: results["loss"][name] for name in VARIANTS},
        "machine": {"processor": trained["processor"], "cores_used": cores},
        "precision": trained["precision"],
        "tokens_per_second": median(line[RATE] for line in lines if RATE in line),
        "stages": {
            stage: stages[key]
            for stage in ("prepare", "train", "eval")
            if (key := f"{stage} {seed}") in stages
        },
        "tasks": {name: task(one) for name, one in results["tasks"].items()},
    }


def spent(out: Path) -> dict[str, Row]:
    """Seconds of each stage, of a killed one's parts together, and the most memory."""
    stages: dict[str, Row] = {}
    for line in map(json.loads, (out / "times.jsonl").read_text().splitlines()):
        one = stages.setdefault(f"{line['stage']} {line['seed']}", {**line, "seconds": 0})
        one["seconds"] = round(one["seconds"] + line["seconds"], 1)
        one["peak_gb"] = max(one["peak_gb"], line["peak_gb"])
    return stages


def task(one: Row) -> Row:
    """A task's row: base, adapter, majority class and paired interval."""
    return {
        "n": one["n"],
        **{name: round(one[name]["correct"] / one["n"], 4) for name in VARIANTS},
        "majority": one["majority_class"]["value"],
        "gain": one["difference"]["value"],
        "ci95": one["difference"]["ci95"],
        "mde80": one["difference"]["mde80"],
        "lost": one["lost"],
        "weighted_f1": one.get("weighted_f1"),
    }


def spread(name: str, runs: Row) -> Row:
    """A task's accuracy under each seed, and the largest difference between two."""
    seeds = [run["tasks"][name]["adapter"] for run in runs.values()]
    return {"seeds": seeds, "spread": round(max(seeds) - min(seeds), 4)}


if __name__ == "__main__":
    main()
