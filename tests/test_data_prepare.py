"""The whole stage: every row accounted for, the same bytes out, nothing leaked or half-made."""

import gzip
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from preparing import AS_GIVEN, PARTS, TERMS, Prepared, prepared, read, rows, write

from fintune import prepare
from fintune.errors import DataError, OutputError


def files(done: Prepared) -> dict[str, str]:
    return {path.name: tiny.file_sha256(path) for path in done.folder.iterdir()}


DEMO = ("-c", "demo", "-s", f"model.path={tiny.base()}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    source = write(folder / "rows.jsonl", [*rows(600), *rows(600)[:3], "not a row"])
    return prepared(folder / "out", source=source, pii="off")


def test_every_row_is_in_exactly_one_count_and_documents_in_one_part(whole: Prepared) -> None:
    counts = whole.manifest["rows"]
    assert counts["read"] == 600 + 20 + 3 + 1
    assert counts["read"] == sum(counts[part] for part in PARTS) + sum(counts["dropped"].values())
    assert (
        counts["dropped"].items()
        >= {"duplicate": 3, "no_assistant": 20, "not_an_object": 1}.items()
    )
    assert len(whole.rows()) + len(whole.dropped()) == counts["read"]
    names = "done.json ledger.parquet manifest.json report.html test.parquet train.parquet"
    assert sorted(files(whole)) == [*names.split(), "validation.parquet"]
    documents: dict[str, set[str]] = {}
    for row in whole.rows():
        assert row["length"] == len(row["input_ids"]) <= whole.manifest["max_length"]
        document = row["messages"][0]["content"].split("company number ")[1].split()[0]
        documents.setdefault(document, set()).add(row["part"])
    assert len(documents) == 200 and all(len(parts) == 1 for parts in documents.values())


def test_inspect_finds_a_line_wherever_it_went(whole: Prepared) -> None:
    words = (*DEMO, "-s", f"out={whole.folder.parent}", "-s", "data.pii=off")
    words += ("-s", f"data.source={whole.folder.parent.parent / 'rows.jsonl'}")
    kept = {row["line"]: row["part"] for row in whole.rows()}
    for line in (1, 31, 621, 624, *[line for line, part in kept.items() if part == "test"][:1]):
        said = tiny.done("inspect", "--source", "rows.jsonl", "--line", line, *words).out
        went = kept.get(line) or whole.dropped()[line]
        assert f"rows.jsonl:{line}" in said.split("\n")[0] if line in kept else went in said
        assert went in said
    for wrong, says in (
        (("--line", 1, "--source", "nosuch"), "no source nosuch"),
        (("--line", 625), "no such row in train, validation, test of "),
        (("--row", "nosuch"), "no such row in train of "),
    ):
        said = tiny.fintune("inspect", *wrong, *words)
        assert (said.code, says in said.err) == (1, True), said.err


def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    done = prepared(tmp_path / "out", source=write(tmp_path / "rows.jsonl", rows(300)))
    (done.folder / "ledger.parquet").unlink()
    with pytest.raises(OutputError, match=r"ledger\.parquet is missing"):
        prepare(done.config)


def test_file_order_and_processes_change_no_row(tmp_path: Path) -> None:
    """27 MB are scanned by several processes, packed they are few bytes and scanned by one."""
    draw, found, padding = random.Random(3), rows(900), "x" * 60_000
    lines = [draw.choice(found) | {"padding": padding} for _ in range(460)]
    paths = [write(tmp_path / f"{at}.jsonl", lines[at::4]) for at in range(4)]
    packed = [path.with_suffix(".jsonl.gz") for path in paths]
    for path, target in zip(paths, packed, strict=True):
        target.write_bytes(gzip.compress(path.read_bytes(), 1))
    outcomes = []
    for sources in (paths, packed[::-1]):
        out, caps = (
            tmp_path / f"from{sources[0].suffix}",
            {"max_train_rows": 30, "max_held_out_rows": 10},
        )
        done = prepared(out, sources=list(map(str, sources)), **caps)
        kept = [{**row, "source": row["source"].removesuffix(".gz")} for row in done.rows()]
        outcomes.append((kept, [done.dropped(str(at)) for at in range(4)]))
    assert outcomes[0] == outcomes[1] and len(outcomes[0][0]) == 40


def test_a_benchmark_that_changed_is_read_again(tmp_path: Path) -> None:
    """Also where another benchmark's file has the same name."""
    source = write(tmp_path / "rows.jsonl", rows(300))
    named = [write(tmp_path / name / "test.jsonl", [{"question": f"Who is {name}?", "answer": "x"}])
             for name in ("a", "b")]  # fmt: skip
    done = prepared(tmp_path / "out", source=source, benchmarks=named)
    write(named[0], [{"question": "Who was it?", "answer": "y"}])
    with pytest.raises(OutputError, match="benchmarks"):
        prepare(done.config)


def test_no_personal_value_in_any_file_and_masked_rows_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "My card is 4111 1111 1111 1111, what does the company do for me about the fee?"
    holder = "I cannot provide what was asked of us by the holder of card number"
    refused = {"user": told, "assistant": f"{holder} 4111 1111 1111 1111, john.doe@acme.com."}
    kept = {"user": told, "assistant": "The fee is returned within thirty days of the complaint."}
    number = "5500 0000 0000 0004"
    asked = f"Which of the fees that {number} paid in March did the bank take twice?"
    tested = {"user": asked, "assistant": "The fee for a payment abroad was taken twice in March."}
    source = write(tmp_path / "rows.jsonl", [*rows(300), refused, kept, tested])
    benchmark = write(tmp_path / "bench.jsonl", [{"question": asked, "answer": "abroad"}])
    done = prepared(tmp_path / "out", source=source, benchmarks=[benchmark])
    (hit,) = json.loads((done.folder / "contamination.json").read_text())["contaminated"]
    assert hit["row_text"] == hit["benchmark_text"] == asked.replace(number, "[CARD]")
    for path in done.folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content = str(pq.read_table(path).to_pylist()).encode()
        assert not [v for v in (b"4111", b"5500", b"john.doe") if v in content], path.name
    assert done.manifest["personal_data"] == {"card": 2}
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert "<td>bench.jsonl</td><td class=n>1</td>" in page
    assert "Each was masked, such as [EMAIL]. Names and addresses are not looked for." in page
    assert "personal data masked: 2 card; names and addresses" in capsys.readouterr().err


def test_one_prompt_with_two_labels_is_dropped_and_shown(tmp_path: Path) -> None:
    ask = "Is the tone of this headline positive, negative or neutral?\n"
    text = ask + "Alder Bank sells its stake after a weak quarter, says jane.doe@example.com"
    found = [
        {"user": text, "assistant": "Negative"},
        {"user": text.replace(" ", "  "), "assistant": "neutral"},
        {"system": "Of the buyer.", "user": text, "assistant": "positive"},
        {"user": f"{text}?", "assistant": "positive"},
        *rows(300)[:5],
    ]
    done = prepared(tmp_path / "out", source=write(tmp_path / "rows.jsonl", [*rows(300), *found]))
    torn = [line for line, why in done.dropped().items() if why == "contradictory_labels"]
    assert torn == [311, 312]
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    folds = {part.split(" ")[0]: part for part in page.split("<summary>")[1:]}
    assert folds["duplicate"].count("user: Read the table.") == 3  # no more than that
    assert "(of rows.jsonl:" in folds["duplicate"]
    assert "assistant: Negative" in folds["contradictory_labels"]
    assert "[EMAIL]" in folds["contradictory_labels"] and "jane.doe" not in page


def test_adding_rows_moves_none_across(tmp_path: Path) -> None:
    placed = []
    for number, found in enumerate((rows(300), [*rows(300), *rows(300, seed=1)])):
        source = write(tmp_path / str(number) / "rows.jsonl", found)
        done = prepared(tmp_path / str(number) / "out", source=source)
        placed.append({row["example_id"]: row["part"] == "train" for row in done.rows()})
    assert len(set(placed[0].values())) == 2
    assert placed[0].items() <= placed[1].items()


def listed(at: int) -> dict[str, str]:
    """A row of over 128 tokens."""
    draw = random.Random(at)
    terms = " ".join(f"{draw.choice(TERMS)} of unit {draw.randrange(10**6)}" for _ in range(20))
    reply = f"In list {at} it is, as the reader finds it there, {terms}"
    return {"user": f"What stands in list {at}, as it is read?", "assistant": reply}


def test_a_truncated_row_is_cut_at_its_end_counted_and_where_it_was(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [listed(at) for at in range(120)])
    more = {"over_length": "truncate", "validation_share": 0.2, "test_share": 0.2}
    cut, uncut = (
        prepared(tmp_path / str(cap), source=source, max_length=cap, **more) for cap in (128, 4096)
    )
    assert cut.manifest["truncated"]["rows"] == len(cut.rows()) == len(uncut.rows()) == 120
    assert uncut.manifest["truncated"]["rows"] <= 2
    assert uncut.manifest["max_length"] % 64 == 0
    for row, full in zip(cut.rows(), uncut.rows(), strict=True):
        assert (row["example_id"], row["part"]) == (full["example_id"], full["part"])
        for name in ("input_ids", "labels"):
            assert row[name] == full[name][:128]


def test_rows_over_the_length_are_dropped_and_many_of_them_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"user": "Read this. " + "The revenue rose. " * 300, "assistant": "So it did, it says."}
    found = [*rows(120), asked, listed(1)]
    done = prepared(tmp_path / "a", source=write(tmp_path / "a.jsonl", found), max_length=384)
    assert {done.dropped("a")[line] for line in (125, 126)} == {"too_long"}
    many = write(tmp_path / "b.jsonl", [*rows(120), *(listed(at) for at in range(20))])
    assert "longer than 384 tokens" not in capsys.readouterr().err
    prepared(tmp_path / "b", source=many, max_length=384)
    assert "20 of 140 rows are longer than 384 tokens and dropped" in capsys.readouterr().err
    cut = prepared(
        tmp_path / "c", source=tmp_path / "a.jsonl", max_length=384, over_length="truncate"
    )
    assert cut.dropped("a")[125] == "too_long", "no token to train is left"


def test_related_rows_of_another_passage_are_no_test_rows(tmp_path: Path) -> None:
    found = []
    for at in range(60):
        table = ", ".join(f"item {n} of list {at} is {n * at} now" for n in range(40))
        for n in range(3):
            user = f"Read.\n{table}\n{str(n) * 2000}{at}"
            found.append({"user": user, "assistant": f"row {n} of {at}"})
    shares = {"validation_share": 0.25, "test_share": 0.25, "max_length": 8192}
    source = write(tmp_path / "rows.jsonl", found)
    done = prepared(tmp_path / "out", source=source, **{**AS_GIVEN, **shares, "pii": "off"})
    groups: dict[str, set[str]] = {}
    for row in done.rows():
        groups.setdefault(row["group"], set()).add(row["part"])
    assert len(groups) == 60 and all(len(parts) == 1 for parts in groups.values())
    assert set(PARTS) == set().union(*groups.values())
    tested = sum(row["part"] == "test" for row in done.rows())
    assert 0.1 < tested / len(done.rows()) < 0.4, "a quarter is asked for"


def test_a_group_of_most_rows_is_never_tested_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = [f"item {n} is {n * 37} now" for n in range(300)]
    one = [
        {"user": f"Read.\n{', '.join(text[n:][:50])}\nWhat is it?", "assistant": f"row {n}"}
        for n in range(200)
    ]
    source = write(tmp_path / "rows.jsonl", [*one, *rows(120)])
    shares = {"validation_share": 0.2, "test_share": 0.2, "max_length": 8192}
    done = prepared(tmp_path / "out", source=source, **{**AS_GIVEN, **shares, "pii": "off"})
    (most, _), *_ = Counter(row["group"] for row in done.rows()).most_common()
    assert {row["part"] for row in done.rows() if row["group"] == most} == {"train", "validation"}
    assert "rows are one group of related texts" in " ".join(capsys.readouterr().err.split())


def test_a_final_part_holds_whole_documents_of_its_own(tmp_path: Path) -> None:
    found = [{**row, "context_id": f"report {at % 60}"} for at, row in enumerate(rows(300))]
    source = write(tmp_path / "rows.jsonl", found)
    shares = {"test_share": 0.2, "final_share": 0.2}
    done = prepared(tmp_path / "out", source=source, **{**AS_GIVEN, **shares})
    kept_back = pq.read_table(done.folder / "final.parquet").to_pylist()
    assert done.manifest["rows"]["final"] == len(kept_back) > 20
    others = {row["group"] for row in done.rows()}
    assert not others & {row["group"] for row in kept_back}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.jsonl", '{"a": 1}\n' * 5, "no row fits a known format; the first one's columns: a"),
        ("rows.jsonl", '{"user": "hi", "assistant": "ho"}\n' * 5, "no train row is left"),
        ("rows.jsonl", '"x"\n1', "no train row is left"),
        ("rows.json", "[]", "0 rows read: the sources are empty"),
        ("rows.json", "\n\n \n", "0 rows read: the sources are empty"),
    ],
)
def test_nothing_left_says_why(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        prepared(tmp_path / "out", source=tmp_path / name)
    assert not (tmp_path / "out" / "data").exists()


def test_killed_at_any_moment_nothing_stands_under_the_final_name(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows(900))
    out = tmp_path / "out"
    words = ("prepare", *DEMO, "-s", f"out={out}", "-s", f"data.source={source}")
    landed = 0
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        process = tiny.Forked(*words, log=tmp_path / "log")
        tiny.until(lambda: [*out.glob(".staging-data/*")], process)
        landed += not (out / "data").exists()
        process.send(9)
        assert process.wait() in (0, -9), process.text()
        if (out / "data").exists():
            tiny.done("inspect", *words[1:])
    assert landed, "none while files were written"
    tiny.done(*words)
    assert {path.name for path in out.iterdir()} == {"data", ".data.lock"}


def near(tmp_path: Path, found: list[tuple[str, str]], threshold: float = 0.8) -> list[int]:
    """Lines that are dropped as near duplicates of an earlier line or of which one is."""
    made = [{"user": user, "assistant": answer} for user, answer in found]
    done = read(write(tmp_path / "rows.jsonl", made), near_duplicates=threshold)
    # So few rows have no templates that are known as such: some repeat what is held out.
    assert set(done.dropped().values()) <= {"near_duplicate", "repeats_test_row"}
    return [line for line, reason in done.dropped().items() if reason == "near_duplicate"]


def test_near_duplicates_need_the_same_numbers_and_names(tmp_path: Path) -> None:
    long = "Summarise the annual report of Alder Bank for the fiscal year 2021 in one sentence"
    reply = "Alder Bank earned more interest and set less aside for bad loans than the year before"
    end = ", please, and keep it short for {} reader"
    texts = [long + end.format("the"), long + end.format("a")]
    texts += [
        long.replace(*other) + end.format("the") for other in (("2021", "2022"), ("Alder", "Birch"))
    ]
    lines = near(tmp_path, [(text, reply) for text in texts], 0.7)
    assert lines in ([1], [2])


@pytest.mark.parametrize(
    "form", ["{ask}\n{text}", "{text}\n\n{ask}", "{ask}\nText: {text}\n{tail}", "{ask} {text}"]
)
def test_a_shared_instruction_does_not_make_two_texts_near(tmp_path: Path, form: str) -> None:
    ask = (
        "You are an analyst who reads the news of listed companies with great care. Read the text"
        " that follows, think about what a long-term holder of the shares would make of it, and say"
        " whether it matters for the holder at all; answer with one word, yes or no, and give no"
        " reasons, no advice and no figures of your own, as the answer is read by a program."
    )
    texts = ("the outlook brightened", "the outlook darkened", "orders rose", "orders fell",
             "the plant was reopened", "the plant was closed")  # fmt: skip
    tail = "Does it matter, given all that is said in the text above and nothing else?"
    asked = [(form.format(ask=ask, text=text, tail=tail), "yes") for text in texts]
    assert near(tmp_path, asked) == []


def hits(tmp_path: Path, found: list[dict[str, Any]], benchmark: Any) -> list[dict[str, Any]]:
    """What is said of contaminated rows."""
    source = write(tmp_path / "rows.jsonl", [*rows(300), *found])
    done = prepared(tmp_path / "out", source=source, benchmarks=[benchmark], **AS_GIVEN)
    said = json.loads((done.folder / "contamination.json").read_text())["contaminated"]
    assert len(said) == done.manifest["rows"]["dropped"].get("contaminated", 0)
    return list(said)


def test_benchmark_questions_are_found(tmp_path: Path) -> None:
    texts = [
        f"Answer briefly. Question: how did the {term} of company {n} develop in the quarter that"
        f" ended in month {n % 12}, and which single cause did the management of {n * 7} name?"
        for n, term in enumerate(TERMS * 3)
    ]
    path = write(tmp_path / "bench.jsonl", [{"prompt": t, "answer": "a loss"} for t in texts])
    verbatim = {"user": texts[3], "assistant": "anything"}
    turned = texts[9].replace("develop", "change").replace("single", "one").replace("name", "give")
    (one, two) = hits(tmp_path, [verbatim, {"user": turned, "assistant": "A loss"}], path)
    assert (one["line"], one["benchmark"], one["benchmark_line"]) == (311, "bench.jsonl", 4)
    assert (two["line"], two["benchmark_line"]) == (312, 10) and two["measure"] != one["measure"]


@pytest.mark.parametrize("answer", [42, 42.0, "42", True])
def test_a_benchmark_is_a_path_or_names_its_split_and_columns(tmp_path: Path, answer: Any) -> None:
    question = "What did the bank with the seven doors earn in that year of the flood?"
    path = write(tmp_path / "b.jsonl", [{"Q": question, "A": answer}, {"Q": "", "A": ""}])
    given = {"user": f"{question} Say so.", "assistant": "True" if answer is True else "42"}
    named = {"path": str(path), "columns": {"user": "Q", "assistant": "A"}}
    assert [hit["benchmark_line"] for hit in hits(tmp_path, [given], named)] == [1]
    with pytest.raises(DataError, match="columns"):
        prepared(tmp_path / "plain", source=tmp_path / "rows.jsonl", benchmarks=[path])
    wrong = {"path": str(path), "columns": {"user": "Question"}}
    with pytest.raises(DataError, match="b.jsonl has no column Question"):
        prepared(tmp_path / "wrong", source=tmp_path / "rows.jsonl", benchmarks=[wrong])


PERSONAL = [
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
]
IMPERSONAL = [
    "CUSIP 037833100, ISIN US0378331005, CIK 0000320193",
    "net income of $4,111,111,111 in 2019-2020, up 12.5% from 3,704,004,405",
    "tel. 2015: revenue of 1,234; fax: 12 of 340", "Tel: 2015 2016 and 2017 were good",
    "Telephone: 2019-2020", "tel. 2019/2020", "Tel: (2019-2020)", "fax: 2019-20 1234",
    "phone: 2019-12-31", "ph. 31/12/2019 and on", "MWh: 12 BE68 5390 0754 7035 BIC",
    "card 4111 1111 1111 1112", "between 1998-12-31 and 2001-01-15", "10-K 001-36743",
]  # fmt: skip


def test_personal_data_is_masked_and_financial_identifiers_are_not(tmp_path: Path) -> None:
    texts = [text for text, _ in PERSONAL] + IMPERSONAL
    found = [{"user": text, "assistant": f"answer {at}"} for at, text in enumerate(texts)]
    source = write(tmp_path / "rows.jsonl", found)
    masked = [turns[0] for turns in read(source).turns()]
    for text, (before, kind) in zip(masked, PERSONAL, strict=False):
        assert f"[{kind.upper()}]" in text and text.count("[") == before.count("[") + 1, text
    assert masked[len(PERSONAL) :] == IMPERSONAL


FILTERED = [
    ("¿Cómo puedo ahorrar para el retiro?", "Empiece con un presupuesto mensual.", "not_english"),
    ("What is your name?", "I am {{name}}, an assistant.", "placeholder"),
    ("What was the dividend of the year?", "I'm sorry, but I cannot provide that.", "refusal"),
    ("What was the dividend of the year?", "I am sorry, I can't assist with that.", "refusal"),
    ("What was the dividend of the year?", "I apologize, but I cannot help.", "refusal"),
    ("What was the dividend of the year?", "nan", "boilerplate"),
    ("What was it?", "x", "too_short"),
    ("What was the dividend?", "I cannot provide advice, but here it is. " * 12, None),
    ("Did it rise — “strongly” — to €5 or £4 per share?", "Yes, to €5, it did. " * 3, None),
]  # fmt: skip


def test_filters_name_their_reason(tmp_path: Path) -> None:
    found = [{"user": user, "assistant": answer} for user, answer, _ in FILTERED]
    reasons = {"filter_english_only": True, "min_tokens": 8}
    done = read(write(tmp_path / "rows.jsonl", found), **reasons)
    expected = {line: reason for line, (*_, reason) in enumerate(FILTERED, 1) if reason}
    assert done.dropped() == expected
