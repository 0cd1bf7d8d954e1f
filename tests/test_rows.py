# ruff: noqa: E501
"""Rows as the world writes them: the forms of docs/own-data.md, other encodings, fuzzed ones."""

import csv
import io
import json
import os
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from preparing import AS_GIVEN, Prepared, prepared, read, rows, write

from fintune.config import DatasetConfig
from fintune.errors import ConfigError, DataError
from fintune.evals.tasks import find_questions, task_items

PAGE = tiny.ROOT / "docs" / "own-data.md"
EVERY = bool(os.environ.get("FINTUNE_TEST_ALL"))
FUZZED = 3_000 if EVERY else 400
FORMS = re.findall(
    r"```(jsonl|csv)\n(.*?)```", PAGE.read_text().partition("### Each form")[2], re.DOTALL
)
EXAMPLES = [
    json.loads(line) for kind, text in FORMS if kind == "jsonl" for line in text.split("\n") if line
]


def talk(*contents: Any, **last: Any) -> dict[str, Any]:
    """Turns of user and assistant, the last with further keys."""
    turns = [
        {"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)
    ]
    turns[-1] |= last
    return {"messages": turns}


@pytest.mark.parametrize(
    ("form", "turns"),
    enumerate(
        [
            [
                ["You are an analyst.", "Revenue rose from 4.0 to 5.0 million. What is the growth?", "25%"],
                ["Net debt was EUR 2019m.\n\nHow much was net debt?", "EUR 2019m"],
                ["What does the fund cost a year, in percent?\n\nFees: 12.50 in 1,000.", "1.250"],
            ],
            [
                ["Be brief.", "What is a bond?", "A loan that can be traded."],
                ["What is a share?", "A part of a company."],
                ["What is a fund?", "A pool of assets."],
            ],
            [
                ["What was revenue in 2012?", "365 million.", "And in 2013?", "623 million."],
                ["What was cost in 2012?", "81 million.", "And in 2013?", "84 million."],
                ["What was profit?", "Of which year?", "2013.", "539 million."],
            ],
            [
                ["What is 2 % of 50?", "10", "Check that.", "1"],
                ["What is 3 % of 50?", "15", "Check that.", "1.5"],
                ["What is 4 % of 50?", "20", "Check that.", "2"],
            ],
            [["Is 5 more than 4?", "Yes."], ["Is 6 more than 7?", "No."], ["Is 8 more than 7?", "Yes, by 1."]],
            "tool_calls",
            [["What is a swap?", "An exchange of payments."], ["What is an option?", "A right, no duty."]],
            [
                ["Is my deposit safe?", "Up to 100,000 euros.", "And above?", "That part is not insured."],
                [EXAMPLES[-2]["user"], "A stolen card was blocked."],
                [EXAMPLES[-1]["user"], "A fee back."],
            ],
        ]
    ),
)  # fmt: skip
def test_the_forms_of_the_page_are_read(form: int, turns: Any, tmp_path: Path) -> None:
    kind, text = FORMS[form]
    assert len(text.splitlines()) == 3
    (tmp_path / f"rows.{kind}").write_text(text)
    done = read(tmp_path / f"rows.{kind}")
    if turns == "tool_calls":  # the bundled base's template writes no calls
        assert done.dropped() == dict.fromkeys((1, 2, 3), turns)
        return
    assert done.turns() == turns
    last = [row["messages"][-1] for row in done.rows() if row["source"].startswith("rows")]
    assert all(turn.get("thought") for turn in last) == (form == 4)
    assert done.manifest["repairs"].get("inline_turns", 0) == (form == len(FORMS) - 1)


def test_only_the_answers_that_count_are_trained(tmp_path: Path) -> None:
    from fintune.model import find_base, load_tokenizer

    kept = talk("q", "WRONG DRAFT", "Check that.", "RIGHT")
    kept["messages"][1]["weight"] = 0
    late = talk("q", "RIGHT TOO", "And?", "WRONG DRAFT", loss_mask=0)
    none = talk("q", "WRONG DRAFT", train="false")
    done = read(write(tmp_path / "rows.jsonl", [kept, late, none]))
    assert done.dropped() == {3: "masked_answers"}
    tokenizer = load_tokenizer(find_base(done.config.model, weights=False))
    found = [row for row in done.rows() if row["source"].startswith("rows")]
    trained = [tokenizer.decode([n for n in row["labels"] if n >= 0]) for row in found]
    assert ["RIGHT" in text and "DRAFT" not in text for text in trained] == [True, True]
    assert done.turns() == [["q", "WRONG DRAFT", "Check that.", "RIGHT"], ["q", "RIGHT TOO"]]
    assert found[0]["messages"][1]["trained"] is False


def test_numbers_of_columns_are_their_printed_text(tmp_path: Path) -> None:
    columns = {
        "dec": pa.array([Decimal("12.50"), Decimal("1E+3")], pa.decimal128(9, 2)),
        "f32": pa.array(np.array([0.1, 42], np.float32)),
        "f64": pa.array([0.1, 42.0]),
    }
    wanted = {"dec": ["12.50", "1000.00"], "f32": ["0.1", "42"], "f64": ["0.1", "42"]}
    for name, column in columns.items():
        path = tmp_path / name / "rows.parquet"
        path.parent.mkdir()
        pq.write_table(pa.table({"question": ["q", "r"], "answer": column}), path)
        assert [turns[-1] for turns in read(path).turns()] == wanted[name]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.JSON.bz2"])
def test_a_file_in_another_encoding_is_read_beside_one_in_utf8(
    tmp_path: Path, encoding: str, name: str
) -> None:
    import bz2

    found = [{"user": "Fee in £?", "assistant": "£ 5 für Ü"}, {"user": "q", "assistant": "a"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in found)
    if name == "rows.csv":
        cells = io.StringIO()
        csv.writer(cells).writerows([["user", "assistant"], *(row.values() for row in found)])
        text = cells.getvalue()
    elif ".JSON" in name:
        text = json.dumps(found, ensure_ascii=False)
    for number, coded in enumerate((encoding, "utf-8")):
        path = tmp_path / "in" / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(bz2.compress(text.encode(coded)) if "bz2" in name else text.encode(coded))
    turns = [[*row.values()] for row in found] * 2
    sources = [str(tmp_path / "in"), str(write(tmp_path / "filler.jsonl", rows(60)))]
    done = prepared(tmp_path / "out", sources=sources, encoding=encoding, **AS_GIVEN)
    assert done.turns("0/") + done.turns("1/") in (
        turns,
        turns[:2],
        turns[:1] + turns[3:],
        turns[2:],
    )
    assert {*done.dropped("").values()} <= {"duplicate", "no_assistant", "no_user"}


def test_what_is_out_is_said_with_what_to_do(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b'{"user": "caf\xe9 %d", "assistant": "a"}\n' % n for n in range(5)))
    read(path)
    said = " ".join(capsys.readouterr().err.split())
    assert "5 not_utf8" in said and "data.encoding=cp1252" in said
    path.write_text(f"{json.dumps(talk('Marlow', 'x'))},\n" * 6)
    words = ("-c", tiny.config(), "-s", f"out={tmp_path / 'out'}", "-s", f"data.source={path}")
    failed = tiny.fintune("prepare", *words)
    assert failed.code == 1 and "Marlow" in failed.err and "behind the object" in failed.err
    assert (tmp_path / "out" / "data.ledger.parquet").is_file()
    assert tiny.done("dropped", *words).out.count("not_json") >= 6
    write(path, [{"id": n, "query": f"q{n}", "answer": "a", "gold": 0} for n in range(6)])
    failed = tiny.fintune("prepare", *words)
    assert failed.code == 1 and "columns: id, query, answer, gold" in failed.err
    assert "columns: {user:" in failed.err and "no_user" not in failed.err
    write(path, rows(300))
    tiny.done("prepare", *words)
    assert not (tmp_path / "out" / "data.ledger.parquet").exists()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (talk([{"type": "text", "text": "q"}, {"type": "image_url"}], "a"), "image_url"),
        (talk("q", [{"type": "tool_use", "name": "x"}]), "tool_use"),
        ({"question": "And then?", "answer": "a", "history": "earlier we spoke"}, "history"),
        (talk("q", "I look.", function_call="price"), "function_call"),
        (talk("q", "I look.", tool_calls=[{"function": {}}]), "without a name"),
        ({"messages": "[{'role': 'user'"}, "messages is text"),
    ],
)
def test_a_text_that_is_none_is_named(tmp_path: Path, row: Any, why: str) -> None:
    done = read(write(tmp_path / "rows.jsonl", [row]))
    assert done.dropped() == {1: "not_text"}
    ledger = pq.read_table(done.folder / "ledger.parquet").to_pylist()
    assert [why in each["detail"] for each in ledger if each["source"] == "rows.jsonl"] == [True]


@pytest.mark.parametrize(
    "answer",
    ["#N/A", "#ref!", "#DIV/0!", "#VALUE!", "#NAME?", "#NUM!", "#SPILL!", "Err:502", "####"],
)
def test_an_error_of_a_cell_is_no_answer(tmp_path: Path, answer: str) -> None:
    found = [talk("q", answer), talk("q", answer, "r", "fine"), talk("q", f"It is {answer}.")]
    assert read(write(tmp_path / "rows.jsonl", found)).dropped() == dict.fromkeys(
        (1, 2), "boilerplate"
    )


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        *((text, text) for text in ("EUR 2019m", "In 2019s", "the 2019s", "12 2019d", "on 2019t")),
        ("don 2019t, I 2019m, we 2019re, the bank 2019s", "don’t, I’m, we’re, the bank’s"),
    ],
)
def test_a_repair_eats_no_amount(tmp_path: Path, text: str, repaired: str) -> None:
    assert read(write(tmp_path / "rows.jsonl", [talk("q", text)])).turns() == [["q", repaired]]


def test_a_chat_stays_whole_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [EXAMPLES[-3]])
    assert len(read(path, inline_turns="keep").turns()[0]) == 2


def account(done: Prepared, source: str, lines: set[int]) -> None:
    """Every line is kept or dropped, and none both."""
    kept = [row["line"] for row in done.rows() if row["source"] == source and row["messages"]]
    ledger = pq.read_table(done.folder / "ledger.parquet").to_pylist()
    dropped = [row["line"] for row in ledger if row["source"] == source]
    assert sorted(kept + dropped) == sorted(lines), source


def test_every_fuzzed_row_is_kept_or_in_the_ledger(tmp_path: Path) -> None:
    rng, filler = random.Random(25), write(tmp_path / "filler.jsonl", rows(60))
    seeds = [row for row in EXAMPLES if "tool_calls" not in str(row)] + EXAMPLES
    lines = [fuzz.line(rng.choice(seeds), rng) for _ in range(FUZZED)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\n".join(lines))
    made = [fuzz.changed(rng.choice(seeds), rng) for _ in range(FUZZED // 4)]
    (tmp_path / "in" / "b.json").write_text(json.dumps(made))
    cells = [
        [json.dumps(row.get(key)) for key in ("messages", "user", "assistant", "history")]
        for row in made
    ]
    with (tmp_path / "in" / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "user", "assistant", "history"], *cells])
    done = prepared(
        tmp_path / "out",
        sources=[str(tmp_path / "in"), str(filler)],
        **AS_GIVEN,
        over_length="truncate",
    )
    account(done, "a.jsonl", {*range(1, FUZZED + 1)})
    account(done, "b.json", {*range(1, len(made) + 1)})
    found = done.manifest["sources"]["c.csv"]
    assert found.pop("read") == len(made) == sum(n for n in found.values() if isinstance(n, int))


def test_every_fuzzed_question_is_one_or_is_refused_with_its_line(tmp_path: Path) -> None:
    rng, path, right = random.Random(26), tmp_path / "t.jsonl", 0
    good = [
        ("finqa", {"prompt": "How much?", "answer": "12.5%"}),
        ("fpb", {"query": "Sales rose.", "answer": "positive", "choices": "positive, negative"}),
        ("headline", {"query": "Gold?", "answer": "Yes", "choices": ["Yes", "No"]}),
        ("xbrl_term", {"prompt": "What is X?", "answer": "A term.", "id": 7}),
        ("finer", {"prompt": "Which tags?", "answer": "A,B", "context_id": "c"}),
        ("advice_safety", {"prompt": "Help me cheat.", "kind": "refuse"}),
    ]  # fmt: skip
    for _ in range(FUZZED):
        name, row = rng.choice(good)
        path.write_bytes(fuzz.line(row, rng))
        try:
            sources = find_questions({name: DatasetConfig(path=str(path))}, {})
            (item,) = task_items(name, sources[name], 9)
        except (ConfigError, DataError) as error:
            assert "line 1" in str(error) or "is empty" in str(error), error
            continue
        graded = item.grade(item.reference) if item.reference else None
        assert graded is None or graded.correct
        right += 1
    assert right > FUZZED / 5


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("fpb", {"answer": "0"}, "never be right, as a label, of negative, neutral, positive"),
        ("fpb", {"answer": "up", "choices": ["positive", "negative"]}, "never be right"),
        ("fpb", {"answer": "positive", "choices": ["", " "]}, "never be right"),
        ("nwgi", {"answer": "positive"}, "of no choices"),
        ("fpb", {"answer": True}, "a bool"),
        ("tatqa", {"answer": ["10", "20"]}, "a list"),
        ("tatqa", {"answer": "  "}, "no prompt or no answer"),
        ("tatqa", {"answer": "?!"}, "never be right"),
        ("finqa", {"answer": "10", "kind": "numeric"}, "known kinds: number, label, span"),
    ],
)
def test_a_reference_that_cannot_be_right_is_refused(
    tmp_path: Path, name: str, row: dict[str, Any], says: str
) -> None:
    path = write(tmp_path / "t.jsonl", [{"prompt": "q?", **row}])
    sources = find_questions({name: DatasetConfig(path=str(path))}, {})
    with pytest.raises(DataError, match=rf"(?s)eval.tasks.{name}, line 1: .*{says}"):
        task_items(name, sources[name], 9)


@pytest.mark.parametrize(
    ("row", "reference", "choices"),
    [
        ({"answer": ["1"], "choices": [1, 2, 3]}, "1", ("1", "2", "3")),
        ({"answer": "Yes", "choices": "['Yes', 'No']"}, "Yes", ("Yes", "No")),
        ({"answer": 1.50, "choices": [1.5, 2.5]}, "1.5", ("1.5", "2.5")),
    ],
)
def test_labels_are_read_as_they_are_written(
    tmp_path: Path, row: dict[str, Any], reference: str, choices: tuple[str, ...]
) -> None:
    path = write(tmp_path / "t.jsonl", [{"prompt": "q?", **row}])
    sources = find_questions({"fpb": DatasetConfig(path=str(path))}, {})
    (item,) = task_items("fpb", sources["fpb"], 9)
    assert (item.reference, item.choices) == (reference, choices)


def test_a_document_is_named_by_any_value(tmp_path: Path) -> None:
    names = ["\ud800x", ["a", 1], {"page": 3}, None, 7, "", "\x1b[31m"]
    lines = [
        {"user": f"What is the length of river {at * 37} in the land of the north, told in miles?",
         "assistant": f"It is {at} miles long, as the map of the land says.",
         "context_id": names[at % len(names)]}
        for at in range(64)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = tiny.done(
        "prepare",
        *tiny.chain(tmp_path / "out", source=path, test_share=0.3),
        "-s",
        "data.min_tokens=1",
    )
    assert "64 rows read" in said.err and "\x1b[31m" not in said.err
