"""Frozen: what prepare and inspect do with raw rows, seen from the command line and the files."""

import csv
import gzip
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import frozen
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from transformers import AutoTokenizer


def test_the_base_is_the_same_on_every_machine() -> None:
    """Where this fails, everything after it does: another torch or tokenizers made other bytes."""
    assert frozen.of_base() == frozen.frozen()["base"]


def test_every_row_read_is_in_one_count_of_the_manifest(chain: tiny.Chain) -> None:
    manifest = frozen.read_json(chain.data / "manifest.json")
    rows = manifest["rows"]
    read = len(tiny.rows().read_text(encoding="utf-8").split("\n"))
    assert rows["read"] == sum(rows[part] for part in frozen.PARTS) + sum(rows["dropped"].values())
    assert rows["read"] == read
    expected = frozen.frozen()["data"]["manifest"]
    assert {key: manifest[key] for key in expected} == expected


def test_the_ledger_names_the_reason_of_each_line(chain: tiny.Chain) -> None:
    ledger = frozen.prepared(chain.data, "ledger")
    found = {row["line"]: row["reason"] for row in ledger}
    planted = tiny.planted()
    assert {line: found[line] for line in planted} == planted
    assert {reason for line, reason in found.items() if line not in planted} == {"over_cap"}
    details = {row["line"]: row["detail"] for row in ledger}
    assert [details[line] for line, reason in planted.items() if reason == "duplicate"] == [
        "of rows.jsonl:1",
        "of rows.jsonl:4",
        "of rows.jsonl:7",
    ]
    assert [[row["line"], row["reason"]] for row in ledger] == frozen.frozen()["data"]["ledger"]


def test_the_rows_are_the_frozen_ones(chain: tiny.Chain) -> None:
    assert frozen.rows_sha256(chain.data) == frozen.frozen()["data"]["rows_sha256"]


def test_ids_are_those_of_the_template_and_labels_those_of_the_answers(chain: tiny.Chain) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.base())
    rows = [row for part in frozen.PARTS for row in frozen.prepared(chain.data, part)]
    assert len(rows) == 90
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.encode(text, add_special_tokens=False) == row["input_ids"]
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1
        labels = [label for label in row["labels"] if label != -100]
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert tokenizer.decode(labels) == "".join(f"{answer}<|eot_id|>" for answer in answers)
        assert [a for a, b in zip(row["input_ids"], row["labels"], strict=True) if b != -100] == (
            labels
        )


def test_no_passage_is_trained_and_held_out(chain: tiny.Chain) -> None:
    groups = {
        part: {row["group"] for row in frozen.prepared(chain.data, part)} for part in frozen.PARTS
    }
    assert groups["test"]
    assert not groups["test"] & (groups["train"] | groups["validation"])


def test_the_same_command_keeps_the_folder(chain: tiny.Chain) -> None:
    before = {path: path.stat().st_mtime_ns for path in chain.data.iterdir()}
    said = tiny.done("prepare", *chain.words())
    assert "unchanged, kept" in said.err
    assert {path: path.stat().st_mtime_ns for path in chain.data.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"min_tokens": 40}, "min_tokens: 30 -> 40"), ({"seed": 7}, "seed: 42 -> 7")],
    ids=["setting", "seed"],
)
def test_another_setting_is_refused_by_name(
    chain: tiny.Chain, change: dict[str, Any], named: str
) -> None:
    before = tiny.tree_sha256(chain.data)
    said = tiny.fintune("prepare", *chain.words(**change))
    assert (said.code, named in said.err) == (1, True), said.err
    assert "--fresh" in said.err
    assert tiny.tree_sha256(chain.data) == before


def test_other_rows_are_refused_and_fresh_moves_the_old_folder_aside(
    chain: tiny.Chain, tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(tiny.rows().read_bytes() + b"\n[]\n")
    words = tiny.chain(chain.copy(tmp_path / "out", "data").out, source=source)
    said = tiny.fintune("prepare", *words)
    assert said.code == 1
    assert "sources.rows.jsonl.identity" in said.err
    tiny.done("prepare", "--fresh", *words)
    aside = tmp_path / "out" / "data.old-1"
    assert tiny.tree_sha256(aside) == tiny.tree_sha256(chain.data)
    rows = frozen.read_json(tmp_path / "out" / "data" / "manifest.json")["rows"]
    assert rows["dropped"]["not_an_object"] == 2


def plain_rows() -> list[dict[str, str]]:
    """Sixty rows of two columns."""
    made = []
    for line in tiny.rows().read_text(encoding="utf-8").splitlines()[:130]:
        row = json.loads(line)
        if set(row) == {"user", "assistant"} or set(row) == {"prompt", "completion"}:
            made.append(dict(zip(("user", "assistant"), row.values(), strict=True)))
    return made


def written(path: Path) -> Path:
    """The same rows in the format of a file's name."""
    rows = plain_rows()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_bytes(gzip.compress(lines.encode()) if ".gz" in path.name else lines.encode())
    return path


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"]
)
def test_a_file_of_any_format_is_the_same_rows(name: str, tmp_path: Path) -> None:
    small = {"max_train_rows": 500, "max_held_out_rows": 60, "validation_share": 0.25}
    small |= {"test_share": 0.25}
    tiny.done("prepare", *tiny.chain(tmp_path, source=written(tmp_path / name), **small))
    kept = [row for part in frozen.PARTS for row in frozen.prepared(tmp_path / "data", part)]
    texts = sorted(tuple(turn["content"] for turn in row["messages"]) for row in kept)
    assert texts == sorted((row["user"], row["assistant"]) for row in plain_rows())


def test_personal_data_is_masked_and_stands_nowhere(tmp_path: Path) -> None:
    tiny.done("prepare", *tiny.chain(tmp_path, personal_data="mask", max_train_rows=500))
    kept = [row for part in frozen.PARTS for row in frozen.prepared(tmp_path / "data", part)]
    asked = " ".join(row["messages"][-2]["content"] for row in kept)
    assert "[EMAIL]" in asked
    assert "[PHONE]" in asked
    manifest = frozen.read_json(tmp_path / "data" / "manifest.json")
    assert manifest["personal_data"] == {"email": 1, "phone": 1}
    assert "personal_data" not in manifest["rows"]["dropped"]
    everything = b"".join(path.read_bytes() for path in (tmp_path / "data").iterdir())
    assert b"jane.roe" not in everything
    assert b"202-555-0143" not in everything
    assert "jane.roe" not in str(kept)


def test_questions_of_a_benchmark_are_not_trained(chain: tiny.Chain, tmp_path: Path) -> None:
    chosen = frozen.prepared(chain.data, "train")[:3]
    benchmark = tmp_path / "bench.jsonl"
    turns = ([turn["content"] for turn in row["messages"]][-2:] for row in chosen)
    benchmark.write_text("".join(json.dumps({"user": u, "assistant": a}) + "\n" for u, a in turns))
    tiny.done("prepare", *tiny.chain(tmp_path / "out", benchmarks=[str(benchmark)]))
    ledger = frozen.prepared(tmp_path / "out" / "data", "ledger")
    found = {row["line"] for row in ledger if row["reason"] == "contaminated"}
    assert {row["line"] for row in chosen} <= found
    trained = frozen.prepared(tmp_path / "out" / "data", "train")
    assert not found & {row["line"] for row in trained}


def test_nothing_left_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"user": "Hi", "assistant": "Ho"}\nno JSON\n')
    said = tiny.fintune("prepare", *tiny.chain(tmp_path / "out", source=source))
    assert said.code == 1
    assert "1 not_json, 1 too_short" in said.err
    assert not (tmp_path / "out" / "data").exists()


def test_a_stopped_preparation_ends_with_75_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(400 * (tiny.rows().read_bytes() + b"\n"))
    words = tiny.chain(tmp_path / "out", source=source)
    process = tiny.Forked("prepare", *words, log=tmp_path / "log")
    tiny.until(lambda: (tmp_path / "out").is_dir(), process)
    process.send(signal.SIGTERM)
    assert process.wait() == 75, process.text()
    assert "continue with: fintune prepare" in process.text()
    assert not (tmp_path / "out" / "data").exists()


def test_inspect_shows_a_row_with_its_line_and_its_trained_tokens(chain: tiny.Chain) -> None:
    row = frozen.prepared(chain.data, "train")[5]
    trained = sum(label != -100 for label in row["labels"])
    said = tiny.done("inspect", "--row", row["example_id"], *chain.words())
    head, _, text = said.out.partition("\n")
    assert f"rows.jsonl:{row['line']}" in head
    assert f"{row['length']} tokens, {trained} trained" in head
    tokenizer = AutoTokenizer.from_pretrained(tiny.base())
    assert text.strip() == tokenizer.decode(row["input_ids"]).strip()
    by_line = tiny.done("inspect", "--line", row["line"], *chain.words())
    assert by_line.out == said.out


def test_inspect_tells_why_rows_were_dropped(chain: tiny.Chain) -> None:
    said = tiny.done("dropped", "--reason", "not_english", *chain.words())
    assert "dropped rows: 2" in said.out and "--count" not in said.out
    lines = [line for line, reason in tiny.planted().items() if reason == "not_english"]
    assert all(f" {line} " in said.out for line in lines)
    first = tiny.done("dropped", "--reason", "not_english", "--count", 1, *chain.words())
    assert "dropped rows: 2, the first 1 (more: --count)" in first.out
    assert "not_english: " in first.err
    assert "wrong_cells" not in frozen.read_json(chain.data / "manifest.json")["rows"]["dropped"]
    none = tiny.done("dropped", "--reason", "wrong_cells", *chain.words())
    assert none.out.strip() == "no row was dropped for the reason wrong_cells"
    other = tiny.fintune("dropped", "--reason", "bored", *chain.words())
    assert (other.code, "not_english" in other.err) == (1, True)


def test_every_stage_seals_its_files(chain: tiny.Chain) -> None:
    for folder in (chain.data, chain.run, chain.eval):
        done = frozen.read_json(folder / "done.json")
        found = tiny.tree_sha256(folder)
        del found["done.json"]
        found.pop("evaluations.jsonl", None)  # grows when the data are sealed
        found.pop(".accepted.json", None)  # written by a release
        assert {name: fact["sha256"] for name, fact in done["files"].items()} == found
        sizes = {name: (folder / name).stat().st_size for name in found}
        assert {name: fact["bytes"] for name, fact in done["files"].items()} == sizes


def test_a_changed_file_of_an_earlier_stage_is_refused(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path / "out", "data")
    with (copy.data / "train.parquet").open("ab") as file:
        file.write(b"x")
    said = tiny.fintune("train", *copy.words())
    assert (said.code, "train.parquet" in said.err) == (1, True), said.err
    assert not copy.run.exists()


@pytest.mark.parametrize("verb", ["train", "eval", "inspect", "plan", "release"])
def test_rows_prepared_in_two_parts_are_refused_by_name(
    chain: tiny.Chain, tmp_path: Path, verb: str
) -> None:
    """As 0.2.0 wrote them: no file of test rows."""
    copy = chain.copy(tmp_path / "out", "data", "run", "eval")
    (copy.data / "test.parquet").unlink()
    done = frozen.read_json(copy.data / "done.json")
    del done["files"]["test.parquet"]
    (copy.data / "done.json").write_text(json.dumps(done))
    said = tiny.fintune(verb, *copy.words())
    assert said.code == 1
    assert "test.parquet is missing" in said.err
    assert "fintune prepare --fresh" in said.err


def test_counts_by_reason_are_those_of_the_ledger(chain: tiny.Chain) -> None:
    manifest = frozen.read_json(chain.data / "manifest.json")
    ledger = Counter(row["reason"] for row in frozen.prepared(chain.data, "ledger"))
    assert manifest["rows"]["dropped"] == ledger
