"""Reading answers, and the tasks' own files."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fintune import grade
from fintune.config import DatasetConfig
from fintune.errors import DataError
from fintune.evals.amounts import scan
from fintune.evals.grading import HeldOutItems, Item, listed_choices
from fintune.evals.tasks import TASKS, Task, find_questions, task, task_items

BENCHMARKS = Path(__file__).parents[2] / "shared" / "data" / "benchmarks"
SENTIMENT = ("negative", "neutral", "positive")
SEVEN = ("strong negative", "mildly negative", "neutral", "mildly positive", "positive")


@pytest.mark.parametrize(
    ("answer", "choices", "read"),
    [
        ("Positive", SENTIMENT, "positive"),
        ("**positive**.", SENTIMENT, "positive"),
        ("The sentiment is negative because sales fell.", SENTIMENT, "negative"),
        ("neutral\nThis is not a positive text.", SENTIMENT, "neutral"),
        ("It is not positive but negative.", SENTIMENT, "negative"),
        ("positive or negative", SENTIMENT, None),
        ("unpositively", SENTIMENT, None),
        ("", SENTIMENT, None),
        ("mildly positive", SEVEN, "mildly positive"),
        ("I would say mildly positive.", SEVEN, "mildly positive"),
        ("NO", ("Yes", "No"), "No"),
    ],
)
def test_read_label(answer, choices, read):
    assert grade("label", "x", answer, choices).read == read


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ("Please choose an answer from {negative/neutral/positive}.\nInput: x", SENTIMENT),
        ("Your answer should be Yes or No.\nText: gold, silver or tin", ("Yes", "No")),
        ("Options: location, person\nInput: Bank", ("location", "person")),
        (
            "Classify the news as positive, negative or neutral.",
            ("positive", "negative", "neutral"),
        ),
        ("What was revenue in 2020?", ()),
    ],
)
def test_listed_choices(prompt, choices):
    assert listed_choices(prompt) == choices


def test_the_page_of_examples_is_graded_as_it_says():
    page = (Path(__file__).parents[1] / "docs" / "grading.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in page.splitlines()
            if line.startswith("| ") and not line.startswith("| kind")]  # fmt: skip
    assert len(rows) >= 20
    for kind, reference, reply, outcome in rows:
        name, _, choices = kind.partition(": ")
        offered = tuple(choices.split(", ")) if choices else ()
        assert grade(name, reference, reply.replace("`", ""), offered).outcome == outcome, reply


@pytest.mark.parametrize(
    ("reference", "answer", "outcome", "miss"),
    [
        ("12.5%", "The margin was 12.5 %.", "correct", None),
        ("12.5%", "The margin was 1250 %.", "wrong", "percent"),
        ("$412 million", "$412 billion", "wrong", "scale"),
        ("-3.4", "3.4", "wrong", "sign"),
        ("388", "This cannot be determined from the text.", "abstained", None),
        ("388", "It went up a lot.", "unparsed", None),
        ("388", "", "unparsed", None),
    ],
)
def test_numbers_have_four_outcomes(reference, answer, outcome, miss):
    graded = grade("number", reference, answer)
    assert (graded.outcome, graded.miss) == (outcome, miss)


def test_figures_out_of_nowhere_are_listed():
    question = "Revenue was 120 and cost was 80. What was profit?"
    good = grade("number", "40", question=question, answer="120 - 80 = 40")
    bad = grade("number", "40", question=question, answer="With 977.31 of tax it is 40.")
    assert good.correct and good.ungrounded == () and bad.ungrounded == ("977.31",)


def test_test_rows_are_checkable_by_number_or_by_label():
    def talk(user, answer):
        said = {"user": user, "assistant": answer}
        return [{"role": role, "content": content} for role, content in said.items()]

    train = [talk(f"Tone of {at}: positive or negative?", "positive") for at in range(6)]
    train += [talk(f"Tone of {at}: pick positive or negative", "negative") for at in range(5)]
    train += [talk(f"How much {at}?", "7") for at in range(3)] + [talk("Explain.", "A " * 40)]
    reader = HeldOutItems({"messages": messages, "group": "t"} for messages in train)

    def read(user, answer):
        row = {"example_id": "e", "source": "s", "group": "g"}
        return reader.item({**row, "messages": talk(user, answer)})

    label = read("pick positive or negative: x", "negative")
    assert label.kind == "label" and set(label.choices) == {"positive", "negative"}
    number = read("How much?", "$5.2 million")
    assert (number.kind, number.majority) == ("number", "7")
    assert read("Explain.", "Because of rates, as a rule.").kind == "text"
    assert read("Name it.", "Frankfurt").kind == "text", "a short answer alone is no label"
    asked = read("in thousands\nfiscal 2019\n\nQuestion: what was it in millions?", "5")
    assert asked.parts()[0] == asked.question == "Question: what was it in millions?"
    assert "in thousands" in asked.parts()[1] and "millions" not in asked.parts()[1]
    assert Item.from_json(json.loads(json.dumps(asdict(label)))) == label


@pytest.mark.parametrize(
    ("kind", "answer", "right"),
    [
        ("unanswerable", "The text does not say; it cannot be determined.", True),
        ("unanswerable", "It was $412 million.", False),
        ("refuse", "I cannot help with that: it is illegal.", True),
        ("refuse", "Sure, buy X, it will double.", False),
        ("comply", "A stop-loss order sells when a price is reached.", True),
        ("comply", "I can't help with that.", False),
        ("comply", "", False),
    ],
)
def test_abstention_and_advice(kind, answer, right):
    assert grade(kind, "", answer).correct == right


def items_of(name: str, path: str, limit: int) -> list[Item]:
    sources = find_questions({name: DatasetConfig(path=path)}, {})
    return task_items(name, sources[name], limit)


def test_bundled_questions_load():
    brought = {name for name, found in TASKS.items() if found.questions}
    found = [item.kind for name in brought for item in items_of(name, "", 1000)]
    counts = {kind: found.count(kind) for kind in found}
    assert counts["refuse"] == 60 and counts["comply"] == 30 and counts["unanswerable"] >= 30


def test_a_task_is_one_entry(tmp_path, monkeypatch):
    columns = {"prompt": "text", "answer": "tone"}
    monkeypatch.setitem(TASKS, "tone", Task("label", SENTIMENT, columns=columns))
    path = tmp_path / "t.jsonl"
    path.write_text(line := '{"text": "up", "tone": "positive"}\n')
    (found,) = items_of("tone", str(path), 1)
    assert (found.messages[0].content, found.kind, found.choices, found.reference) == (
        "up", "label", SENTIMENT, "positive"
    )  # fmt: skip
    path.write_text(line + '{"text": "down", "tone": ""}\n')
    with pytest.raises(DataError, match=r"tone, line 2: no prompt or no answer"):
        items_of("tone", str(path), 2)


def test_a_function_is_a_task_too(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(line := '{"text": "It rose.", "up": true}\n')

    @task("direction", "label", choices=("up", "down"))
    def direction(row):
        return {"prompt": f"Up or down? {row['text']}", "answer": "up" if row["up"] else "down"}

    try:
        (item,) = items_of("direction", str(path), 1)
        assert (item.messages[0].content, item.reference) == ("Up or down? It rose.", "up")
        path.write_text(line + '{"text": "It fell."}\n')
        with pytest.raises(DataError, match=r"direction: t.jsonl, line 2: columns are missing"):
            items_of("direction", str(path), 2)
    finally:
        del TASKS["direction"]


def test_the_printed_answer_counts_where_the_program_gives_none(tmp_path):
    lines = [{"answer": "1.7", "exe_answer": given} for given in (1.65246, 0, "", None)]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x", **line}) + "\n" for line in lines))
    found = [item.reference for item in items_of("convfinqa", str(path), 9)]
    assert found == ["1.65246", "0", "1.7", "1.7"]


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the shared benchmark files are not here")
def test_gold_answers_of_the_benchmarks_are_right():
    files = {
        "finqa": "finqa_dev", "convfinqa": "convfinqa_dev_turn", "tatqa": "tatqa_dev",
        "fpb": "fpb_test", "nwgi": "nwgi_test", "headline": "headline_valid", "ner": "ner_test",
        "banking77": "banking77_test", "finer": "finer_batched", "formula": "formula_test",
    }  # fmt: skip
    for name, file in files.items():
        found = items_of(name, str(BENCHMARKS / f"{file}.jsonl"), 60)
        wrong = [entry.id for entry in found if not entry.grade(entry.reference).correct]
        assert not wrong, f"{name}: {wrong[:3]}"


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the shared benchmark files are not here")
def test_a_list_of_all_amounts_or_labels_is_no_answer():
    """All files and more forms: bench/evaluation.py controls."""
    asked = items_of("convfinqa", str(BENCHMARKS / "convfinqa_dev_turn.jsonl"), 60)
    right = 0
    for item in asked:
        text = "\n".join(item.parts()[::-1])
        last = [text[one.start : one.end] for one in scan(text)[1] if not one.role][-18:]
        right += item.grade("".join(f"It was {one}. " for one in last)).correct
        right += item.grade(" and ".join(last)).correct
    assert right <= 0.03 * 2 * len(asked)
    for item in items_of("fpb", str(BENCHMARKS / "fpb_test.jsonl"), 60):
        assert not item.grade(", ".join(item.choices)).correct
        assert not item.grade("".join(f"{choice}.\n" for choice in item.choices)).correct


def test_a_folder_is_read_with_the_columns_of_its_task(tmp_path):
    lines = [{"query": f"Sales rose {n} %.", "answer": "positive"} for n in range(5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "train.jsonl").write_text("{}\n")
    found = items_of("fpb", str(tmp_path), 3)
    asked = [item.messages[-1].content for item in found]
    assert len(asked) == 3 and asked == sorted(asked), "by hash, in the order of the file"
    assert asked != [line["query"] for line in lines[:3]]
    assert {(item.kind, item.reference) for item in found} == {("label", "positive")}
