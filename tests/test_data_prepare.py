"""The whole stage: every row accounted for, the same bytes out, nothing leaked or half-made."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from victims import harmed

from fintune import nano, seal
from fintune.chat import ChatFormat
from fintune.config import Config, DataConfig, SourceConfig, load_config
from fintune.data import readers as readers_module
from fintune.data import scan as scan_module
from fintune.data.decontaminate import Question, contaminated, read_benchmarks
from fintune.data.filters import first_rejection
from fintune.data.inspect import find, inspect, why_dropped
from fintune.data.ledger import Ledger
from fintune.data.pii import mask
from fintune.data.prepare import PARTS, prepare
from fintune.data.sources import find_sources, named
from fintune.data.split import near_duplicates, split
from fintune.data.tokenize import adaptive_max_length, fit, tokenize
from fintune.errors import DataError, OutputError
from fintune.example import IGNORE_INDEX, Example, Message
from fintune.files import read_json, sha256_file
from fintune.model import Base, load_tokenizer

TERMS = ["revenue", "net income", "free cash flow", "gross margin", "working capital", "equity"]
TABLE = "| year | {0} |\n| --- | --- |\n| 2020 | {1} |\n| 2021 | {2} |"


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Made-up rows: documents with several questions, a few bad ones."""
    rng, found = random.Random(seed), []
    for number in range(count // 3):
        term, before, after = rng.choice(TERMS), rng.randrange(10**6), rng.randrange(10**6)
        text = TABLE.format(term, before, after)
        text += f"\nThe {term} of company number {rng.randrange(10**9)} moved as the table shows."
        for ask, reply in (("2020", before), ("2021", after), ("the change", after - before)):
            question = f"Read the table.\n{text}\nWhat is the {term} in {ask}, taken as reported?"
            answer = f"Looking at the table, the {term} asked for comes to {reply}."
            found.append({"system": "\n", "user": question, "assistant": answer})
        if number % 10 == 0:
            found.append({"user": "no answer", "assistant": None})
    return found


def write(path: Path, found: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def config(out: Path, source: Path | str, **data: Any) -> Config:
    return Config.model_validate({"out": str(out), "data": {"source": str(source), **data}})


def sides(folder: Path) -> dict[str, str]:
    """example_id -> train, validation or test."""
    return {
        name: part
        for part in PARTS
        for name in pq.read_table(folder / f"{part}.parquet")["example_id"].to_pylist()
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("prepared")
    source = write(folder / "rows.jsonl", [*rows(600), *rows(600)[:3], "not a row"])
    settings = config(folder / "out", source)
    return settings, prepare(settings)


def test_every_row_is_in_exactly_one_count(prepared: tuple[Config, dict[str, Any]]) -> None:
    settings, manifest = prepared
    counts = manifest["rows"]
    assert counts["read"] == 600 + 20 + 3 + 1
    assert counts["read"] == sum(counts[part] for part in PARTS) + sum(counts["dropped"].values())
    assert counts["dropped"]["duplicate"] == 3
    assert counts["dropped"]["no_assistant"] == 20
    assert counts["dropped"]["not_an_object"] == 1
    ledger = pq.read_table(settings.data_dir / "ledger.parquet").to_pylist()
    assert len(ledger) == sum(counts["dropped"].values())
    assert len({(row["source"], row["line"]) for row in ledger}) == len(ledger)
    names = "done.json ledger.parquet manifest.json report.html test.parquet train.parquet"
    names += " validation.parquet"
    assert sorted(path.name for path in settings.data_dir.iterdir()) == names.split()


def test_rows_keep_ids_labels_and_messages(prepared: tuple[Config, dict[str, Any]]) -> None:
    settings, manifest = prepared
    for name in PARTS:
        for row in pq.read_table(settings.data_dir / f"{name}.parquet").to_pylist():
            assert len(row["input_ids"]) == len(row["labels"]) == row["length"]
            assert row["length"] <= manifest["max_length"]
            assert any(label != IGNORE_INDEX for label in row["labels"])
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"]


def test_rows_of_one_document_stay_on_one_side(prepared: tuple[Config, dict[str, Any]]) -> None:
    found: dict[str, set[str]] = {}
    for name in PARTS:
        for row in pq.read_table(prepared[0].data_dir / f"{name}.parquet").to_pylist():
            document = row["messages"][0]["content"].split("company number ")[1].split()[0]
            found.setdefault(document, set()).add(name)
    assert len(found) == 200 and set(PARTS) <= set().union(*found.values())
    assert all(len(parts) == 1 for parts in found.values())


def test_same_inputs_are_kept_and_others_refused(prepared: tuple[Config, dict[str, Any]]) -> None:
    settings, manifest = prepared
    before = sha256_file(settings.data_dir / "done.json")
    assert prepare(settings)["rows"] == manifest["rows"]
    assert sha256_file(settings.data_dir / "done.json") == before
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"min_tokens": 9})})
    with pytest.raises(OutputError, match="min_tokens"):
        prepare(other)


def test_a_folder_that_another_run_writes_is_left_alone(tmp_path: Path) -> None:
    settings = config(tmp_path / "out", write(tmp_path / "rows.jsonl", rows(300)))
    under_way = tmp_path / "out" / ".staging-data-other" / "train.parquet"
    write(under_way, [])
    with seal.lock(settings.data_dir), pytest.raises(OutputError, match=f"{os.getpid()} since"):
        prepare(settings, fresh=True)
    assert under_way.exists() and not settings.data_dir.exists()
    prepare(settings)
    (settings.data_dir / "ledger.parquet").unlink()
    with pytest.raises(OutputError, match=r"ledger\.parquet is missing"):
        prepare(settings)


def test_inspect_shows_what_is_trained(prepared: tuple[Config, dict[str, Any]]) -> None:
    text = inspect(prepared[0])[0]
    row = pq.read_table(prepared[0].data_dir / "train.parquet").slice(0, 1).to_pylist()[0]
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "green"]
    assert "".join(green) == row["messages"][-1]["content"] + "<|eot_id|>"
    assert row["messages"][0]["content"] in text.plain.removesuffix(green[-1])
    assert f"{sum(label != IGNORE_INDEX for label in row['labels'])} trained" in text.plain
    assert [row["line"] for row in why_dropped(prepared[0], reason="not_an_object")] == [624]


def test_inspect_names_what_there_is(prepared: tuple[Config, dict[str, Any]]) -> None:
    for look in (inspect, why_dropped, partial(find, line=1)):
        with pytest.raises(DataError, match="no source nosuch\n.*rows.jsonl"):
            look(prepared[0], source="nosuch")
    with pytest.raises(DataError, match="no reason nosuch\n.*no_assistant"):
        why_dropped(prepared[0], reason="nosuch")


def test_inspect_finds_a_line_wherever_it_went(prepared: tuple[Config, dict[str, Any]]) -> None:
    settings, manifest = prepared
    went = {}
    for line in range(1, 625):
        if line < 30 or line > 615:
            kept, dropped = find(settings, line, "rows.jsonl")
            assert len(kept) + len(dropped) == 1
            went[line] = kept[0].plain.split()[2] if kept else dropped[0]["reason"]
            assert not kept or kept[0].plain.split()[1] == f"rows.jsonl:{line}"
    assert set(went.values()) >= {"train", "no_assistant", "duplicate", "not_an_object"}
    assert len(inspect(settings, source="rows.jsonl", count=5)) == 5
    with pytest.raises(DataError, match="no row at rows.jsonl:625"):
        find(settings, 625, "rows.jsonl")


def test_file_order_and_workers_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "PARALLEL_BYTES", 0)
    found = rows(300)
    for name, part in (("a.jsonl", found[:150]), ("b.jsonl", found[150:])):
        write(tmp_path / name, part)
    paths = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl")}]
    written = []
    for number, (sources, workers) in enumerate(((paths, 1), (paths[::-1], 4))):
        monkeypatch.setattr(scan_module, "workers", lambda workers=workers: workers)
        tree = {"out": tmp_path / str(number), "data": {"sources": sources}}
        settings = Config.model_validate(tree)
        prepare(settings)
        written.append({p.name: sha256_file(p) for p in settings.data_dir.iterdir()})
    assert written[0] == written[1]


class Inline:
    """A pool that works at once: a batch is scanned under the limit of when it was handed in."""

    def __init__(self, *words: Any, **named: Any) -> None: ...

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *words: Any) -> None: ...

    def submit(self, work: Callable[..., Any], *given: Any) -> SimpleNamespace:
        done = work(*given)
        return SimpleNamespace(result=lambda: done)


def test_workers_change_nothing_where_few_rows_keep_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small caps, small blocks and many duplicates: the limit falls while batches are under way."""
    monkeypatch.setattr(scan_module, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(scan_module, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(readers_module, "BLOCK_BYTES", 1 << 12)
    draw = random.Random(3)
    found = rows(900)
    path = write(tmp_path / "rows.jsonl", [draw.choice(found) for _ in range(1_500)])
    outcomes = []
    for workers in (1, 2, 4):
        monkeypatch.setattr(scan_module, "workers", lambda workers=workers: workers)
        data = DataConfig(source=str(path))
        scanned = scan_module.scan(find_sources(data), data, 0, 40)
        dropped = sorted((row.line, row.reason, row.detail) for row in scanned.ledger.rows)
        outcomes.append(([row.line for row in scanned.candidates], dropped))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_benchmark_that_changed_is_read_again(tmp_path: Path) -> None:
    """Also where another benchmark's file has the same name."""
    source = write(tmp_path / "rows.jsonl", rows(300))
    named = [write(tmp_path / name / "test.jsonl", [{"question": f"Who is {name}?", "answer": "x"}])
             for name in ("a", "b")]  # fmt: skip
    settings = config(tmp_path / "out", source, benchmarks=[str(path) for path in named])
    prepare(settings)
    write(named[0], [{"question": "Who was it?", "answer": "y"}])
    with pytest.raises(OutputError, match="benchmarks"):
        prepare(settings)


def test_no_personal_value_in_the_ledger_and_masked_rows_are_listed(tmp_path: Path) -> None:
    told = "My card is 4111 1111 1111 1111, what does the company do for me about the fee?"
    holder = "I cannot provide what was asked of us by the holder of card number"
    refused = {"user": told, "assistant": f"{holder} 4111 1111 1111 1111, john.doe@acme.com."}
    kept = {"user": told, "assistant": "The fee is returned within thirty days of the complaint."}
    number = "5500 0000 0000 0004"
    asked = f"Which of the fees that {number} paid in March did the bank take twice?"
    tested = {"user": asked, "assistant": "The fee for a payment abroad was taken twice in March."}
    source = write(tmp_path / "rows.jsonl", [*rows(300), refused, kept, tested])
    benchmark = write(tmp_path / "bench.jsonl", [{"question": asked, "answer": "abroad"}])
    settings = config(tmp_path / "out", source, pii="mask", benchmarks=[str(benchmark)])
    prepare(settings)
    (hit,) = read_json(settings.data_dir / "contamination.json")["contaminated"]
    assert hit["row_text"] == hit["benchmark_text"] == asked.replace(number, "[CARD]")
    for path in settings.data_dir.iterdir():
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content = str(pq.read_table(path).to_pylist()).encode()
        assert not [v for v in (b"4111", b"5500", b"john.doe") if v in content], path.name
    assert read_json(settings.data_dir / "manifest.json")["personal_data"] == {"card": 2}


def test_the_report_shows_duplicates_and_torn_labels_without_personal_values(
    tmp_path: Path,
) -> None:
    text = "Alder Bank sells its stake after a weak quarter, says jane.doe@example.com of the bank"
    ask = "Is the tone of this headline positive, negative or neutral?\n"
    torn = [{"user": ask + text, "assistant": label} for label in ("Negative", "neutral")]
    found = [*rows(300), *rows(300)[:5], *torn]
    settings = config(tmp_path / "out", write(tmp_path / "rows.jsonl", found))
    prepare(settings)
    page = (settings.data_dir / "report.html").read_text(encoding="utf-8")
    folds = {part.split(" ")[0]: part for part in page.split("<summary>")[1:]}
    assert folds["duplicate"].count("user: Read the table.") == 3  # no more than that
    assert "(of rows.jsonl:" in folds["duplicate"]
    assert "assistant: Negative" in folds["contradictory_labels"]
    assert "[EMAIL]" in folds["contradictory_labels"] and "jane.doe" not in page


def test_adding_rows_moves_none_across() -> None:
    def placed(found: list[dict[str, Any]]) -> dict[str, str]:
        examples = [
            Example("s", 1, str(n), (Message("user", r["user"]), Message("assistant", "x")))
            for n, r in enumerate(found)
            if r["assistant"]
        ]
        places = split(examples, 0.15, 0.15)
        return {e.messages[0].content: part for e, (_, part) in zip(examples, places, strict=True)}

    before, after = placed(rows(300)), placed([*rows(300), *rows(300, seed=1)])
    assert len(set(before.values())) == 3
    assert all((after[text] == "train") == (side == "train") for text, side in before.items())


def test_a_truncated_row_is_cut_at_its_end_counted_and_where_it_was(tmp_path: Path) -> None:
    draw = random.Random(0)
    found = []
    for number in range(120):
        terms = " ".join(f"{draw.choice(TERMS)} of unit {draw.randrange(10**6)}" for _ in range(20))
        reply = f"In list {number} it is, as the reader finds it there, {terms}"
        found.append({"user": f"What stands in list {number}, as it is read?", "assistant": reply})
    source = write(tmp_path / "rows.jsonl", found)
    placed, cut = [], []
    for cap in (128, 4096):
        more = {"max_length": cap, "validation_share": 0.2, "test_share": 0.2}
        settings = config(tmp_path / str(cap), source, over_length="truncate", **more)
        manifest = prepare(settings)
        cut.append(manifest["truncated"])
        placed.append(sides(settings.data_dir))
    assert placed[0] == placed[1] and len(placed[0]) == 120
    assert cut[0]["rows"] == 120 and cut[1]["rows"] <= 2
    rows_ = pq.read_table(tmp_path / "128" / "data" / "train.parquet").to_pylist()
    assert {row["length"] for row in rows_} == {128}
    full = tmp_path / "4096" / "data" / "train.parquet"
    whole = {row["example_id"]: row for row in pq.read_table(full).to_pylist()}
    for row in rows_:
        for name in ("input_ids", "labels"):
            assert row[name] == whole[row["example_id"]][name][:128]


def test_related_rows_of_another_passage_are_no_test_rows() -> None:
    examples = []
    for at in range(60):
        table = ", ".join(f"item {n} of list {at} is {n * at} now" for n in range(40))
        examples += [example(f"Read.\n{table}\n{str(n) * 2000}{at}", "x") for n in range(3)]
    places = split(examples, 0.25, 0.25)
    of_group: dict[str, set[str]] = {}
    for group, part in places:
        of_group.setdefault(group, set()).add(part)
    assert len(of_group) == 60 and any(len(sides) > 1 for sides in of_group.values())
    assert set(PARTS) == {part for _, part in places}
    assert all(sides == {"test"} for sides in of_group.values() if "test" in sides)


def test_one_prompt_with_two_labels_is_dropped(tmp_path: Path) -> None:
    ask = "Is the tone of this headline positive, negative or neutral?\n"
    text = ask + "Alder Bank sells its stake in Birch Foods after a weak third quarter of the year"
    found = [
        {"user": text, "assistant": "Negative"},
        {"user": text.replace(" ", "  "), "assistant": "neutral"},
        {"system": "Of the buyer.", "user": text, "assistant": "positive"},
        {"user": f"{text}?", "assistant": "positive"},
    ]
    settings = config(tmp_path / "out", write(tmp_path / "rows.jsonl", [*rows(300), *found]))
    prepare(settings)
    torn = why_dropped(settings, reason="contradictory_labels")
    assert [row["line"] for row in torn] == [311, 312]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([{"a": 1}] * 5, "no row fits a known format"),
        ([{"user": "hi", "assistant": "ho"}] * 5, "no train row is left"),
        (["x", 1], "no train row is left"),
    ],
)
def test_nothing_left_says_why(tmp_path: Path, found: list[Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        prepare(config(tmp_path / "out", write(tmp_path / "rows.jsonl", found)))
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize("text", ["[]", "\n\n \n"])
def test_sources_without_a_row_say_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match="0 rows read: the sources are empty"):
        prepare(config(tmp_path / "out", tmp_path / "rows.json"))


def test_a_system_without_cpu_affinity_prepares_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    prepare(config(tmp_path / "out", write(tmp_path / "rows.jsonl", rows(300))))


def killed_in_writing(folder: Path, wait: float) -> None:
    """Let this process kill itself so many seconds after its first file is begun."""

    def watch() -> None:
        while not [*folder.glob(".staging-data/*")]:
            time.sleep(0.001)
        time.sleep(wait)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def test_killed_at_any_moment_nothing_stands_under_the_final_name(tmp_path: Path) -> None:
    settings = config(tmp_path / "out", write(tmp_path / "rows.jsonl", rows(1500)))
    started = time.time()
    assert harmed(lambda: prepare(settings)).code == 0
    written = [path.stat().st_mtime - started for path in settings.data_dir.iterdir()]
    draw, landed = random.Random(0), 0
    for _ in range(5):
        for harm, after in (
            (lambda: None, draw.uniform(0, max(written))),
            (partial(killed_in_writing, settings.out, draw.uniform(0, np.ptp(written))), None),
        ):
            shutil.rmtree(settings.out, ignore_errors=True)
            harmed(lambda: prepare(settings), harm, kill_after=after)
            landed += bool([*settings.out.glob(".staging-data/*")])
            if settings.data_dir.exists():
                seal.read_seal(settings.data_dir, stage="data", make="x")
    assert landed, "none while files were written"
    prepare(settings)
    assert {path.name for path in settings.out.iterdir()} == {"data", ".data.lock"}


def example(user: str, answer: str) -> Example:
    return Example("s", 1, "", (Message("user", user), Message("assistant", answer)))


def test_near_duplicates_need_the_same_numbers_and_names() -> None:
    long = "Summarise the annual report of Alder Bank for the fiscal year 2021 in one sentence"
    reply = "Alder Bank earned more interest and set less aside for bad loans than the year before"
    found = near_duplicates(
        [
            example(f"{long}, please, and keep it short for the reader", reply),
            example(f"{long}, please, and keep it short for a reader", reply),
            example(
                f"{long.replace('2021', '2022')}, please, and keep it short for the reader", reply
            ),
            example(
                f"{long.replace('Alder', 'Birch')}, please, and keep it short for the reader", reply
            ),
        ],
        0.7,
    )
    assert found == {1: 0}


def test_a_shared_instruction_does_not_make_two_texts_near() -> None:
    ask = (
        "You are an analyst who reads the news of listed companies with great care. Read the text"
        " that follows, think about what a long-term holder of the shares would make of it, and say"
        " whether it matters for the holder at all; answer with one word, yes or no, and give no"
        " reasons, no advice and no figures of your own, as the answer is read by a program."
    )
    texts = ("the outlook brightened", "the outlook darkened", "orders rose", "orders fell",
             "the plant was reopened", "the plant was closed")  # fmt: skip
    tail = "Does it matter, given all that is said in the text above and nothing else?"
    assert len(ask.split()) > 60
    # In a line with its text an instruction is known by the rows that share it.
    for form, rows_at_least in (
        ("{ask}\n{text}", 2), ("{text}\n\n{ask}", 2), ("{ask}\nText: {text}\n{tail}", 2),
        ("{ask} {text}", 6),
    ):  # fmt: skip
        asked = [form.format(ask=ask, text=text, tail=tail) for text in texts]
        for at in range(0, 6, rows_at_least):
            some = [example(question, "yes") for question in asked[at : at + rows_at_least]]
            assert near_duplicates(some, 0.8) == {}, form
        again = asked[0].replace("reasons, no", "reason, no").replace(",", " ,")
        found = near_duplicates([example(text, "yes") for text in (asked[0], again)], 0.8)
        assert found == {1: 0}, form


def test_benchmark_questions_are_found(tmp_path: Path) -> None:
    texts = [
        f"Answer briefly. Question: how did the {term} of company {n} develop in the quarter that"
        f" ended in month {n % 12}, and which single cause did the management of {n * 7} name?"
        for n, term in enumerate(TERMS * 3)
    ]
    path = write(tmp_path / "bench.jsonl", [{"prompt": t, "answer": "a loss"} for t in texts])
    clean = [example(row["user"], str(row["assistant"])) for row in rows(300) if row["assistant"]]
    planted = [*clean, example(texts[3], "anything")]
    hits = contaminated(planted, questions_of(str(path)))
    assert set(hits) == {len(clean)} and hits[len(clean)].question.line == 4


def questions_of(path: str, **more: Any) -> list[Question]:
    return read_benchmarks(named([SourceConfig(path=path, **more)]))


def test_a_benchmark_is_a_path_or_names_its_split_and_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", [{"Q": "What did the bank earn in that year?", "A": 42.0}])
    entry = f"{{path: {path}, split: dev, columns: {{user: Q, assistant: A}}}}"
    found = load_config("nano", [f"data.benchmarks=[{path}, {entry}]"]).data.benchmarks
    assert [(item.path, item.split) for item in found] == [(str(path), "test"), (str(path), "dev")]
    mapped = questions_of(str(path), columns=found[1].columns)
    assert [(q.text, q.answer) for q in mapped] == [("What did the bank earn in that year?", "42")]
    with pytest.raises(DataError, match="columns"):
        questions_of(str(path))
    source = write(tmp_path / "rows.jsonl", rows(300))
    plain = config(
        tmp_path / "out", source, benchmarks=[{"path": str(path), "columns": {"user": "Q"}}]
    )
    prepare(plain)
    both = {"user": "Q", "assistant": "A"}
    with pytest.raises(OutputError, match="benchmarks"):
        prepare(config(tmp_path / "out", source, benchmarks=[{"path": str(path), "columns": both}]))


def test_a_number_is_an_answer_of_a_benchmark(tmp_path: Path) -> None:
    answers = [42, 4.5, "x", True]
    found = [{"question": "How many?", "answer": answer} for answer in answers]
    path = write(tmp_path / "b.jsonl", [*found, {"messages": []}])
    assert [q.answer for q in questions_of(str(path))] == ["42", "4.5", "x", "True"]


def test_a_hub_benchmark_is_read_at_its_revision_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[object] = []

    def load(path: str, *, revision: str, split: str) -> datasets.Dataset:
        asked.append((path, revision, split))
        return datasets.Dataset.from_list([{"question": "How much?", "answer": 7}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (found,) = questions_of("someone/bench", revision="a" * 40, split="dev")
    assert (found.benchmark, found.answer) == ("someone/bench", "7")
    assert asked == [("someone/bench", "a" * 40, "dev")]


def test_the_report_counts_the_rows_that_a_benchmark_took(tmp_path: Path) -> None:
    found = rows(300)
    taken = [{"question": row["user"], "answer": row["assistant"]} for row in found[:2]]
    path = write(tmp_path / "bench.jsonl", taken)
    source = write(tmp_path / "rows.jsonl", found)
    settings = config(tmp_path / "out", source, benchmarks=[str(path)])
    count = prepare(settings)["contamination"]["bench.jsonl"]
    page = (settings.data_dir / "report.html").read_text(encoding="utf-8")
    assert count >= 2 and f"<td>bench.jsonl</td><td class=n>{count}</td>" in page


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("card 4111 1111 1111 1111 on file", "card"),
        ("IBAN DE89 3704 0044 0532 0130 00", "iban"),
        ("US0378331005 GB82 WEST 1234 5698 7654 32 PLEASE", "iban"),
        ("BE68 5390 0754 7034 PAID IN 2024", "iban"),
        ("his SSN is 536-90-4399.", "ssn"),
        (r"a\nDE89370400440532013000", "iban"),
        (r"on file\n4111 1111 1111 1111\n", "card"),
        (r"told\nSSN 536904399", "ssn"),
        (r"me:\tcall 2125550143", "phone"),
        ("Tel. 2012-3456", "phone"),
        ('{"tel": "020 7946 0958", "x": 1}', "phone"),
        ("{'phone': 2125550143}", "phone"),
        ("routing number 021000021", "routing_number"),
        ("write to jane.doe@example.com", "email"),
        ("call (212) 555-0143 today", "phone"),
        ("reach me on +442079460958", "phone"),
        ("Tel. 2125550143", "phone"),
        ("tel.: 020 7946 0958.", "phone"),
        ("Tel.: (030) 123456-78", "phone"),
        ("ph. 2125550143, ask for Jane", "phone"),
    ],
)
def test_personal_data_is_masked(text: str, kind: str) -> None:
    masked, kinds = mask(text)
    assert kinds == {kind} and f"[{kind.upper()}]" in masked


@pytest.mark.parametrize(
    "text",
    [
        "CUSIP 037833100, ISIN US0378331005, CIK 0000320193",
        "net income of $4,111,111,111 in 2019-2020, up 12.5% from 3,704,004,405",
        "tel. 2015: revenue of 1,234; fax: 12 of 340", "Tel: 2015 2016 and 2017 were good",
        "Telephone: 2019-2020", "tel. 2019/2020", "Tel: (2019-2020)", "fax: 2019-20 1234",
        "phone: 2019-12-31", "ph. 31/12/2019 and on", "MWh: 12 BE68 5390 0754 7035 BIC",
        "card 4111 1111 1111 1112", "between 1998-12-31 and 2001-01-15", "10-K 001-36743",
    ],
)  # fmt: skip
def test_financial_identifiers_are_not_personal(text: str) -> None:
    assert mask(text) == (text, set())


@pytest.mark.parametrize(
    ("user", "answer", "reason"),
    [
        ("", "x", "no_user"),
        ("x", "", "no_assistant"),
        (
            "¿Cómo puedo ahorrar para la universidad?",
            "Empiece con un presupuesto mensual.",
            "not_english",
        ),
        ("What is your name?", "I am {{name}}, an assistant.", "placeholder"),
        ("What was the dividend of the year?", "I'm sorry, but I cannot provide that.", "refusal"),
        ("What was the dividend of the year?", "I am sorry, I can't assist with that.", "refusal"),
        ("What was the dividend of the year?", "I apologize, but I cannot help.", "refusal"),
        ("What was the dividend?", "I cannot provide advice, but here it is. " * 12, None),
        ("What was the dividend of the year?", "nan", "boilerplate"),
        ("Did it rise — “strongly” — to €5 or £4 per share?", "Yes, to €5.", None),
    ],
)
def test_filters_name_their_reason(user: str, answer: str, reason: str | None) -> None:
    found = first_rejection((Message("user", user), Message("assistant", answer)), DataConfig())
    assert (found[0] if found else None) == reason


def test_adaptive_length_is_the_smallest_multiple_that_keeps_the_share() -> None:
    lengths = [*range(1, 101)]
    assert adaptive_max_length([*[60] * 99, 500], 2048, "drop") == 64
    assert adaptive_max_length([*[60] * 98, 65, 500], 2048, "truncate") == 128
    assert adaptive_max_length([*[60] * 99, 500], 2048, "fail") == 512
    assert adaptive_max_length(lengths, 64, "fail") == 64
    assert adaptive_max_length([], 512, "drop") == 512


def test_policies_for_long_rows() -> None:
    chat = ChatFormat(load_tokenizer(Base(nano.NANO_ID, "", nano.base_dir())), "26 Jul 2024")
    ledger = Ledger(redact=True)
    long = "Read this. " + "The revenue of the company rose again. " * 30 + "What rose?"
    answer = "The revenue rose. " * 30
    examples = [example(long, "The revenue rose."), example("What rose?", answer)]
    examples += [example("What is it?", "It is so.")] * 20
    found = tokenize(examples, chat, 0, ledger)
    assert len(fit(found, 128, "drop", ledger)) == 20
    assert [row.reason for row in ledger.rows] == ["too_long", "too_long"]
    kept = fit(found, 128, "truncate", ledger)
    assert len(kept) == 21 and ledger.counts() == {"too_long": 3}, "no token to train is left"
    assert kept[0].length == 128 == found[1].length - kept[0].truncated
    with pytest.raises(DataError, match="2 of 22 rows .* longer than 128"):
        fit(found, 128, "fail", ledger)
    with pytest.raises(DataError, match="longer than 128"):
        fit(found[:10], 128, "drop", ledger)
