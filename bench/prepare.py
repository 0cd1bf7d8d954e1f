"""Figures of the stage `prepare`, each beside its goal.

    python bench/prepare.py NAME     of FIGURES, or `all`

Reads the real rows, benchmarks and tokenizer of `../shared`, which are not part of the project.
Every figure is printed and written to bench/results/data.json with the machine described.
"""

import contextlib
import csv
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from stdnum import luhn
from stdnum.us import rtn, ssn

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
SAMPLE = SHARED / "data" / "finance_instruct_sample.jsonl"
BENCHMARKS = SHARED / "data" / "benchmarks"
RESULTS = ROOT / "bench" / "results" / "data.json"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import tiny_made  # noqa: E402

from fintune.chat import ChatFormat  # noqa: E402
from fintune.config import ChatConfig, Config, DataConfig, SourceConfig, dump_yaml  # noqa: E402
from fintune.console import result  # noqa: E402
from fintune.data.decontaminate import read_benchmarks  # noqa: E402
from fintune.data.filters import not_english  # noqa: E402
from fintune.data.prepare import prepare  # noqa: E402
from fintune.data.texts import mask  # noqa: E402
from fintune.example import IGNORE_INDEX, Example, Message  # noqa: E402
from fintune.files import read_json, sha256_file, sha256_json, write_json  # noqa: E402
from fintune.model import Base, load_tokenizer  # noqa: E402
from fintune.ngrams import asked, hash64, normal, passage  # noqa: E402
from fintune.rewording import contaminated  # noqa: E402
from fintune.sources import named  # noqa: E402

SCALE_ROWS, KILLS, HUB_RUNS = 518_185, 20, 2
PLANTED, ROWS_UNDER_PLANTS = 50, 20_000
DATE = "26 Jul 2024"
MAX_LENGTH = 2048


def sample() -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The real rows and their provenance."""
    rows = [json.loads(line) for line in SAMPLE.read_bytes().split(b"\n") if line]
    with SAMPLE.with_suffix(".provenance.csv").open(encoding="utf-8", newline="") as file:
        return rows, list(csv.DictReader(file))


def text_of(row: dict[str, Any]) -> tuple[str, str]:
    """User and assistant text, empty where missing."""
    return row.get("user") or "", row.get("assistant") or ""


def vary(row: dict[str, Any], number: int, rng: random.Random) -> dict[str, Any]:
    """A real row with other digits and a name, so that it is new but as long and as dirty."""
    new, (user, _) = dict(row), text_of(row)
    if user.strip():
        digits = re.sub(r"\d", lambda _: str(rng.randrange(10)), user)
        new["user"] = f"{digits} ({rng.choice('ABCDEFGH')}{number})"
    return new


def llama(folder: Path) -> Path:
    """A base folder of the Llama 3 tokenizer and a small config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (SHARED / "tokenizers" / "llama3").glob("*.json"):
        shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def config(out: Path, source: Path, **data: Any) -> Config:
    """A config on the Llama 3 tokenizer."""
    model = {"id": "meta-llama/Llama-3.1-8B-Instruct", "path": str(llama(out / "base"))}
    tree = {"out": str(out), "model": model, "data": {"source": str(source), **data}}
    return Config.model_validate(tree)


def language(_: Path) -> dict[str, Any]:
    """Recall of non-English rows, English rows lost, rows a second of one process."""
    rows, facts = sample()
    settings = DataConfig()
    start = time.perf_counter()
    texts = map(text_of, rows)
    out = [not_english([user], [answer], settings) is not None for user, answer in texts]
    rate = len(rows) / (time.perf_counter() - start)
    foreign = [fact["lang"] != "en" for fact in facts]
    found: dict[str, Any] = {
        "non_english_rows": sum(foreign),
        "recall": round(sum(o for o, f in zip(out, foreign, strict=True) if f) / sum(foreign), 4),
        "english_rows": len(rows) - sum(foreign),
        "english_lost": sum(o for o, f in zip(out, foreign, strict=True) if not f),
        "rows_per_second_one_process": round(rate),
    }
    joined = ["".join(text_of(row)) for row in rows]
    ratios = [sum(sign.isascii() for sign in text) / max(1, len(text)) for text in joined]
    for least in (0.7, 0.9, 0.98):
        plain = sum(r < least for r, f in zip(ratios, foreign, strict=True) if f) / sum(foreign)
        found[f"plain_ascii_recall_{least}"] = round(plain, 3)
    return found


def related(folder: Path) -> dict[str, Any]:
    """Near duplicates across the split, and document rows dropped as duplicates, after a run."""
    rows, facts = sample()
    prepare(config(folder, SAMPLE))
    sides: dict[int, str] = {}
    by_hash: dict[str, list[int]] = {}
    for line, row in enumerate(rows):
        by_hash.setdefault(sha256_json(row)[:16], []).append(line)
    for name in ("train", "validation", "test"):
        for example_id in pq.read_table(folder / "data" / f"{name}.parquet")["example_id"]:
            sides.update(dict.fromkeys(by_hash[example_id.as_py()], name))
    pairs = [(line, int(f["related_to"])) for line, f in enumerate(facts) if f["related_to"]]
    both = [(a, b) for a, b in pairs if a in sides and b in sides]
    split = sum(sides[a] != sides[b] for a, b in both)
    texts = [tuple(" ".join(t.split()).casefold() for t in text_of(row)) for row in rows]
    exact: dict[tuple[str, ...], set[str]] = {}
    for line, side in sides.items():
        exact.setdefault(texts[line], set()).add(side)
    ledger = pq.read_table(folder / "data" / "ledger.parquet").to_pylist()
    documents = {"tatqa", "finqa", "convfinqa", "pacific"}
    dropped = [r for r in ledger if r["reason"] in ("duplicate", "near_duplicate")]
    wrong = [
        r
        for r in dropped
        if facts[r["line"] - 1]["source"] in documents
        and texts[r["line"] - 1] != texts[int(r["detail"].rsplit(":", 1)[1]) - 1]
    ]
    total = sum(fact["source"] in documents for fact in facts)
    return {
        "related_pairs": len(pairs),
        "both_kept": len(both),
        "on_both_sides": split,
        "never_on_both_sides": round(1 - split / len(pairs), 4),
        "exact_on_both_sides": sum(len(found) > 1 for found in exact.values()),
        "groups": read_json(folder / "data" / "manifest.json")["related"],
        "document_rows": total,
        "document_rows_wrongly_dropped": len(wrong),
        "rows": read_json(folder / "data" / "manifest.json")["rows"],
    }


def reorder(text: str, rng: random.Random, _: list[str]) -> str:
    """Cut at every comma, semicolon, stop and line end, and shuffle the clauses."""
    parts = [part for part in re.split(r"(?<=[,;.:?!\n|])\s*", text) if part.strip()]
    if len(parts) < 2:
        words = text.split()
        cut = rng.randrange(1, len(words))
        return " ".join([*words[cut:], *words[:cut]])
    rng.shuffle(parts)
    return " ".join(parts)


def replace_words(text: str, rng: random.Random, vocabulary: list[str]) -> str:
    """Replace 30 % of the words by words of other rows."""
    parts = re.split(r"(\s+)", text)
    at = [index for index in range(0, len(parts), 2) if parts[index]]
    for index in rng.sample(at, round(0.3 * len(at))):
        parts[index] = rng.choice(vocabulary)
    return "".join(parts)


def change_numbers(text: str, rng: random.Random, _: list[str]) -> str:
    """Replace every digit by a random one."""
    return re.sub(r"\d", lambda _: str(rng.randrange(10)), text)


def benchmark_questions() -> list[Example]:
    """The questions of all benchmark files."""
    return read_benchmarks(
        named([SourceConfig(path=str(BENCHMARKS), split=None)], "data.benchmarks", {})
    )


def contamination(_: Path) -> dict[str, Any]:
    """Recall by rule of planted benchmark questions, and false hits among 20,000 rows.

    The thresholds were chosen on the first half of rows and questions (by hash); each half is
    planted with four seeds and reported by itself.
    """
    questions = benchmark_questions()
    halves = ("chosen_on", "held_out")
    found = {name: [_planted(half, seed, questions) for seed in range(4)]
             for half, name in enumerate(halves)}  # fmt: skip
    return {
        "rows": ROWS_UNDER_PLANTS,
        "questions": len(questions),
        "planted_per_rule_and_seed": PLANTED,
        **{
            name: {
                "recall": {r: sum(run["recall"][r] for run in runs) / len(runs) for r in RULES},
                "false_share": [run["false"] / ROWS_UNDER_PLANTS for run in runs],
                "false_by_measure": dict(sum((run["by"] for run in runs), Counter())),
            }
            for name, runs in found.items()
        },
        "seconds": max(run["seconds"] for runs in found.values() for run in runs),
    }


RULES: dict[str, Callable[[str, random.Random, list[str]], str]] = {
    "verbatim": lambda text, *_: text,
    "clauses_reordered": reorder,
    "words_replaced_30_percent": replace_words,
    "numbers_changed": change_numbers,
}


def siblings(_: Path) -> dict[str, Any]:
    """Rows of the sample alone that decontamination drops, without plants and varied copies.

    The sample's makers took out every row that repeats a benchmark's prompt, so these are
    siblings: sentences of one template or of one set that ask nearly the same.
    """
    rows, facts = sample()
    chosen = [
        (_example(*text_of(row)), fact["source"])
        for row, fact in zip(rows, facts, strict=True)
        if fact["lang"] == "en" and all(text_of(row))
    ]
    examples = [example for example, _ in chosen]
    hits = contaminated(examples, benchmark_questions())
    return {
        "rows": len(examples),
        "dropped": len(hits),
        "share": round(len(hits) / len(examples), 4),
        "by_measure": dict(Counter(hit["measure"] for hit in hits.values())),
        "by_source": dict(Counter(chosen[at][1] for at in hits)),
    }


def _half(text: str) -> int:
    return hash64("half", normal(text)) & 1


def _planted(half: int, seed: int, questions: list[Example]) -> dict[str, Any]:
    """One world: rows of one half, with questions of that half planted in them."""
    rng = random.Random(f"{half} {seed}")
    rows, facts = sample()
    mine = [
        row
        for row, fact in zip(rows, facts, strict=True)
        if fact["lang"] == "en"
        and all(text_of(row))
        and _half(passage(_example(*text_of(row)))) == half
    ]
    clean = [*mine, *(vary(rng.choice(mine), n, rng) for n in range(ROWS_UNDER_PLANTS))]
    base = [_example(*text_of(row)) for row in clean[:ROWS_UNDER_PLANTS]]
    vocabulary = [w for e in rng.sample(base, 2000) for w in re.findall("[a-z]{3,}", asked(e))]
    pool = [question for question in questions if _half(asked(question)) == half]
    planted = [
        (name, _example(rule(asked(question), rng, vocabulary), question.messages[-1].content))
        for name, rule in RULES.items()
        for question in rng.sample(pool, PLANTED)
    ]
    everything = [*base, *(example for _, example in planted)]
    start = time.perf_counter()
    hits = contaminated(everything, questions)
    seconds = time.perf_counter() - start
    found = Counter(name for at, (name, _) in enumerate(planted, len(base)) if at in hits)
    false = [hit for at, hit in hits.items() if at < len(base)]
    return {
        "recall": {name: found[name] / PLANTED for name in RULES},
        "false": len(false),
        "by": Counter(hit["measure"] for hit in false),
        "seconds": round(seconds, 1),
    }


def _example(user: str, answer: str) -> Example:
    return Example("row", 0, "", (Message("user", user), Message("assistant", answer)))


def personal(_: Path) -> dict[str, Any]:
    """Recall of 500 planted values, and real rows flagged."""

    rng = random.Random(2026)
    texts = ["\n".join(text_of(row)) for row in sample()[0]]
    missed = Counter[str]()
    for kind, value in personal_values(rng, 500):
        text = f"{rng.choice(texts)[:500]} {rng.choice(['Mine is', 'Use', 'Contact:'])} {value}."
        missed[kind] += kind not in mask(text)[1]
    flagged = sum(bool(mask(text)[1]) for text in texts)
    return {
        "planted": 500,
        "recall": 1 - missed.total() / 500,
        "missed": {kind: count for kind, count in missed.items() if count},
        "clean_rows": len(texts),
        "clean_rows_flagged": flagged,
        "clean_share_flagged": round(flagged / len(texts), 5),
    }


def tokens(folder: Path) -> dict[str, Any]:
    """Our tokenising and masking beside TRL's, the same rows, one process each."""
    seconds = {}
    for name in ("ours", "trl"):
        command = [sys.executable, __file__, "tokenize", name, str(folder)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds[name] = json.loads(run.stdout.strip().split("\n")[-1])
    ours = np.load(folder / "ours.npy", allow_pickle=False)
    trl = np.load(folder / "trl.npy", allow_pickle=False)
    return {
        **{f"{name}_seconds": facts["seconds"] for name, facts in seconds.items()},
        "ratio": round(seconds["trl"]["seconds"] / seconds["ours"]["seconds"], 2),
        "rows": seconds["ours"]["rows"],
        "rows_compared": int((trl != 0).sum()),
        "rows_with_other_labels": int(((trl != 0) & (trl != ours)).sum()),
    }


class Peak:
    """Samples the resident memory of all processes below this one but `apart`, twice a second."""

    def __init__(self, *apart: int) -> None:
        self.bytes, self._apart, self._over = 0, apart, threading.Event()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            total = 0
            for process in psutil.Process().children(recursive=True):
                if process.pid in self._apart:
                    continue
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
            self.bytes = max(self.bytes, total)

    def __enter__(self) -> "Peak":
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def large() -> Iterator[dict[str, Any]]:
    """As many rows as the published data set has: the real ones, then varied ones."""
    rng, rows = random.Random(7), sample()[0]
    for number in range(SCALE_ROWS):
        row = rows[number % len(rows)]
        yield row if number < len(rows) else vary(row, number, rng)


def timed(settings: Config, *apart: int, **env: str) -> dict[str, Any]:
    """`fintune prepare` in a process of its own: seconds, and the memory of it and its workers."""
    (settings.out / "config.yaml").write_text(dump_yaml(settings), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("fintune")), "prepare"]
    command += ["--config", str(settings.out / "config.yaml")]
    start, before = time.perf_counter(), sum(os.times()[2:4])
    with Peak(*apart) as peak:
        subprocess.run(command, check=True, env=os.environ | env)
    return {
        "rows": read_json(settings.data_dir / "manifest.json")["rows"],
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds_of_all_processes": round(sum(os.times()[2:4]) - before, 1),
        "peak_gigabytes_of_all_processes": round(peak.bytes / 1e9, 2),
    }


def scale(folder: Path) -> dict[str, Any]:
    """The whole of `prepare` on 518,185 rows with the recipe's caps: seconds, peak memory."""
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in large())
    return timed(config(folder, path)) | {"megabytes": round(path.stat().st_size / 1e6)}


def hub(folder: Path) -> dict[str, Any]:
    """The same rows as Parquet, from a hub on loopback with an empty cache and as a local file."""
    path = folder / "served" / "datasets" / "acme" / "rows" / "data"
    path.mkdir(parents=True)
    path /= "train-00000-of-00001.parquet"
    rows, names = large(), ("system", "user", "assistant")
    with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in names])) as file:
        while chunk := [{n: row.get(n) for n in names} for row in islice(rows, 20_000)]:
            file.write_table(pa.Table.from_pylist(chunk, file.schema))
    command = [sys.executable, str(ROOT / "tests" / "hub" / "server.py"), str(folder / "served")]
    found: dict[str, list[dict[str, Any]]] = {"file": [], "hub": []}
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        known = {"HF_ENDPOINT": server.stdout.readline().strip(), "HF_HUB_DISABLE_XET": "1"}
        for at in range(HUB_RUNS):
            for name, source in (("file", path), ("hub", Path("acme/rows"))):
                out = folder / f"{name}{at}"
                known["HF_HOME"] = str(out / "home")
                found[name].append(timed(config(out, source), server.pid, **known))
                assert found[name][-1].pop("rows")["read"] == SCALE_ROWS
        server.kill()
    least = {name: min(run["seconds"] for run in runs) for name, runs in found.items()}
    return {
        "megabytes": round(path.stat().st_size / 1e6),
        "runs": found,
        "ratio": round(least["hub"] / least["file"], 2),
        "peak_gigabytes": max(run["peak_gigabytes_of_all_processes"] for run in found["hub"]),
    }


def kill(folder: Path) -> dict[str, Any]:
    """kill -9 at 20 random moments of a run: the folder is whole or absent, a rerun completes."""
    rng = random.Random(2026)
    command = [str(Path(sys.executable).with_name("fintune")), "prepare", "--config", "demo"]

    def started(name: str) -> tuple[subprocess.Popen[bytes], Path]:
        out = folder / name
        run = subprocess.Popen(
            [*command, "--set", f"out={out}", "--set", f"model.path={tiny_made.base()}"],
            stderr=subprocess.DEVNULL,
        )
        return run, out / "data"

    start = time.perf_counter()
    whole, _ = started("whole")
    whole.wait()
    seconds = time.perf_counter() - start
    runs = kills = partial = 0
    while kills < KILLS:
        run, data = started(str(runs))
        time.sleep(rng.uniform(0.2, 1.0) * seconds)
        kills += run.poll() is None  # else it had ended by itself
        run.kill()
        run.wait()
        runs += 1
        partial += data.exists() and not (data / "done.json").is_file()
    again, data = started("0")
    again.wait()
    same = {p.name: sha256_file(p) for p in data.iterdir()} == {
        p.name: sha256_file(p) for p in (folder / "whole" / "data").iterdir()
    }
    return {
        "kills": kills,
        "runs": runs,
        "partial_under_the_final_name": partial,
        "rerun_gives_the_same_bytes": same,
        "seconds_of_a_whole_run": round(seconds, 1),
    }


def machine() -> dict[str, Any]:
    """The machine without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    load = round(os.getloadavg()[0], 1)
    return {
        "cores": cores,
        "memory_gigabytes": round(memory / 1e9),
        "architecture": platform.machine(),
        "load_when_started": load,
    }


def conversations() -> list[tuple[Message, ...]]:
    """Every row of the sample as system, user, assistant; turns inside a text stay inside."""
    found = []
    for row in sample()[0]:
        turns = zip(("user", "assistant"), text_of(row), strict=True)
        lead = (row.get("system") or "").strip()
        head = [Message("system", lead)] if lead else []
        found.append((*head, *(Message(role, text.strip()) for role, text in turns)))
    return found


def fingerprint(ids: list[int], labels: list[int]) -> int:
    """A number for ids and labels, never 0; rows over the length are 0 in both."""
    if len(ids) >= MAX_LENGTH or all(label == IGNORE_INDEX for label in labels):
        return 0
    return hash64(str(ids), str(labels)) | 1


def _ours(tokenizer: Any, rows: list[tuple[Message, ...]]) -> tuple[float, list[int]]:
    """ChatFormat.encode_many, with all its checks."""
    chat = ChatFormat(tokenizer, ChatConfig(date_string=DATE))
    start = time.perf_counter()
    encoded = [
        e[-1] for at in range(0, len(rows), 512) for e in chat.encode_many(rows[at : at + 512])
    ]
    seconds = time.perf_counter() - start
    return seconds, [fingerprint(e.input_ids, e.labels) for e in encoded]


def _trl(tokenizer: Any, rows: list[tuple[Message, ...]]) -> tuple[float, list[int]]:
    """TRL's own preparation, up to ids and labels."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    def turns(messages: tuple[Message, ...]) -> list[dict[str, str]]:
        return [{"role": m.role, "content": m.content} for m in messages]

    table = Dataset.from_list(
        [
            {
                "prompt": turns(row[:-1]),
                "completion": turns(row[-1:]),
                "chat_template_kwargs": {"date_string": DATE},
            }
            for row in rows
        ]
    )
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = LlamaForCausalLM(shape).to(torch.float32)
    args = SFTConfig(
        output_dir="/tmp/trl", max_length=None, report_to=[], use_cpu=True, bf16=False,
        dataset_num_proc=None, 
    )  # fmt: skip
    start = time.perf_counter()
    trainer = SFTTrainer(model, args, train_dataset=table, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    found = []
    for row in trainer.train_dataset:
        found.append(fingerprint(list(row["input_ids"]), list(row["labels"])))
    return seconds, found


def tokenize(name: str, folder: Path) -> None:
    """Measure one of the two in this process: seconds as JSON; one number a row (a hash of its ids
    and labels, 0 where the row was not kept) to FOLDER/NAME.npy, so that the two are compared."""
    tokenizer = load_tokenizer(Base("llama", "", SHARED / "tokenizers" / "llama3"))
    rows = conversations()
    seconds, found = (_ours if name == "ours" else _trl)(tokenizer, rows)
    np.save(folder / f"{name}.npy", np.array(found, np.uint64))
    cpu = round(sum(os.times()[:2]), 2)
    facts = {"seconds": round(seconds, 2), "process_cpu_seconds": cpu, "rows": len(found)}
    sys.stdout.write(json.dumps(facts) + "\n")


def _digits(rng: random.Random, count: int) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(count))


def card(rng: random.Random) -> str:
    """A card number of four issuers, plain or grouped."""
    prefix = rng.choice(["4", "51", "55", "34", "37", "6011", "2221"])
    size = 15 if prefix in ("34", "37") else 16
    body = prefix + _digits(rng, size - len(prefix) - 1)
    number = body + luhn.calc_check_digit(body)
    cuts = (0, 4, 8, 12, 16) if size == 16 else (0, 4, 10, 15)
    groups = [number[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    return rng.choice(["", " ", "-"]).join(groups)


def iban(rng: random.Random) -> str:
    """An account of three countries, plain or grouped by four."""
    country, bank, size = rng.choice([("DE", "", 18), ("GB", "NWBK", 14), ("NL", "ABNA", 10)])
    body = bank + _digits(rng, size)
    remainder = int("".join(str(int(sign, 36)) for sign in f"{body}{country}00")) % 97
    text = f"{country}{98 - remainder:02d}{body}"
    return rng.choice([text, " ".join(text[at : at + 4] for at in range(0, len(text), 4))])


def social(rng: random.Random) -> str:
    """A social security number that could have been issued."""
    while not ssn.is_valid(text := f"{_digits(rng, 3)}-{_digits(rng, 2)}-{_digits(rng, 4)}"):
        continue
    return text


def routing(rng: random.Random) -> str:
    """A bank's routing number with the words around it."""
    while not rtn.is_valid(text := _digits(rng, 9)):
        continue
    return rng.choice(["routing number ", "ABA routing number: ", "RTN "]) + text


def email(rng: random.Random) -> str:
    """An address."""
    name = rng.choice(["john.doe", "a_b", "mary+x", "k-lee"])
    return f"{name}{rng.randrange(99)}@{rng.choice(['example.com', 'bank.co.uk', 'mail.fin.org'])}"


def phone(rng: random.Random) -> str:
    """A number of three countries in common spellings."""
    area, local = rng.randrange(200, 999), f"{rng.randrange(200, 999)}-{_digits(rng, 4)}"
    forms = [f"({area}) {local}", f"{area}-{local}", f"+1 {area}-{local}"]
    forms += [f"{area}.{local.replace('-', '.')}", f"+44 20 7946 {_digits(rng, 4)}"]
    return rng.choice([*forms, f"+49 30 {_digits(rng, 6)}"])


PERSONAL = {
    "card": card, "iban": iban, "ssn": social,
    "routing_number": routing, "email": email, "phone": phone,
}  # fmt: skip


def personal_values(rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """`count` values with their kinds."""
    for _ in range(count):
        kind = rng.choice(sorted(PERSONAL))
        yield kind, PERSONAL[kind](rng)


FIGURES = {
    f.__name__: f
    for f in (language, related, contamination, siblings, personal, tokens, kill, scale, hub)
}


def main(wanted: str) -> None:
    """Measure one figure or all, print each, and keep them in the results file."""
    for name, figure in FIGURES.items():
        if wanted in (name, "all"):
            with tempfile.TemporaryDirectory() as folder:
                found = {**figure(Path(folder)), "machine": machine()}
            result(f"{name}: {json.dumps(found, indent=1)}")
            # Read after the measurement: another process may have written its figure meanwhile.
            kept = read_json(RESULTS) if RESULTS.is_file() else {}
            kept.pop("format", None)
            write_json(RESULTS, {**kept, name: found})


if __name__ == "__main__":
    if sys.argv[1:2] == ["tokenize"]:
        tokenize(sys.argv[2], Path(sys.argv[3]))
    elif len(sys.argv) != 2 or sys.argv[1] not in {*FIGURES, "all"}:
        sys.exit(__doc__)
    else:
        main(sys.argv[1])
