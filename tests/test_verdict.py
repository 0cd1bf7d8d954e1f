"""What the verdict says of documents, lost tasks, constants and repeated looks."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fintune.data.split import split
from fintune.documents import document_keys
from fintune.evals import history, results
from fintune.evals.grading import Item, load_pairs
from fintune.evals.verdict import summary
from fintune.example import Example, Message

LABELS = ("positive", "negative", "neutral")
RIGHT, WRONG = "positive", "negative"


def evaluated(
    folder: Path, rows: list[tuple[str, str, bool, bool]], looks: int = 1, primary: str = "accuracy"
) -> dict[str, Any]:
    """Results of an evaluation: of every question its task, its document, and whether base and
    adapter are right."""
    folder.mkdir(exist_ok=True)
    run = {"primary": primary, "seed": 1, "judged": [], "contaminated": [], "provenance": {}}
    run |= {"max_task_drop": 0.05, "looks": looks}
    (folder / "run.json").write_text(json.dumps({"format": 1, **run}))
    loss = {"source": "x", "rows": 1, "tokens": 1, "base": 2.0, "adapter": 1.0}
    (folder / "heldout.jsonl").write_text(json.dumps(loss) + "\n")
    (folder / "eval_50_gpt_judged_raw.jsonl").write_text("")
    lines = []
    for at, (task, document, base, adapter) in enumerate(rows):
        asked = (Message("user", f"Question {at}"),)
        reference = LABELS[at % 2]
        item = Item(f"q{at}", task, "label", document, asked, reference, LABELS)
        for who, right in (("base", base), ("adapter", adapter)):
            said = {"text": reference if right else "neutral", "tokens": 1, "finish": "stop"}
            line = {"model": who, **said, "prompt_sha256": "0", "item": asdict(item)}
            lines.append(json.dumps(line) + "\n")
    (folder / "predictions.jsonl").write_text("".join(lines))
    return results.compute_results(folder, load_pairs(folder))


def task(name: str, n: int, base: int, adapter: int) -> list[tuple[str, str, bool, bool]]:
    """Questions that stand alone, of which the first ones are right."""
    return [(name, f"{name}{at}", at < base, at < adapter) for at in range(n)]


def test_a_gain_over_many_documents_is_better(tmp_path: Path) -> None:
    found = evaluated(tmp_path, task("fpb", 200, 60, 160))
    assert (found["verdict"], found["n"]["deciding"]) == ("better", 200)
    assert "200 questions of 200 documents" in " ".join(summary(found))


def test_the_same_gain_within_one_document_decides_nothing(tmp_path: Path) -> None:
    rows = [(name, "the report", *right) for name, _, *right in task("fpb", 200, 60, 160)]
    found = evaluated(tmp_path, rows)
    assert (found["verdict"], found["n"]["deciding"]) == ("invalid", 10)
    assert "documents" not in found["invalid_reasons"][0]  # ten questions are too few first
    few = [(name, f"report {at % 12}", *right) for at, (name, _, *right) in enumerate(rows)]
    found = evaluated(tmp_path, few)
    assert found["invalid_reasons"] == ["12 effective documents; fewer than 20 decide nothing"]


def test_a_large_document_cannot_decide_alone(tmp_path: Path) -> None:
    rows = task("fpb", 120, 60, 60)
    rows += [("fpb", "annual report", False, True) for _ in range(400)]
    found = evaluated(tmp_path, rows)
    assert (found["n"]["checkable"], found["n"]["deciding"]) == (520, 130)
    assert found["verdict"] == "no_detectable_difference"


def test_a_lost_task_is_named_although_the_others_gain(tmp_path: Path) -> None:
    rows = [row for at in range(9) for row in task(f"t{at}", 100, 40, 70)]
    found = evaluated(tmp_path, rows + task("ner", 100, 70, 30))
    assert (found["verdict"], found["lost_tasks"]) == ("better_with_losses", ["ner"])
    assert "Worse on ner (-40)." in summary(found)[0]
    assert found["tasks"]["ner"]["lost"] and not found["tasks"]["t0"]["lost"]
    macro = evaluated(tmp_path, rows + task("ner", 100, 70, 30), primary="macro_accuracy")
    assert macro["primary"]["measure"] == "macro_accuracy"
    assert macro["primary"]["value"] == pytest.approx(0.23)


def test_a_small_task_is_named_as_too_small_to_guard(tmp_path: Path) -> None:
    found = evaluated(tmp_path, task("fpb", 200, 60, 160) + task("ner", 20, 12, 9))
    assert (found["verdict"], found["small_tasks"]) == ("better", ["ner"])
    assert "Too small to see a loss of 10 points: ner." in summary(found)


def test_an_adapter_that_says_one_constant_is_never_better(tmp_path: Path) -> None:
    rows = [("fpb", f"d{at}", False, at % 2 == 0) for at in range(300)]
    found = evaluated(tmp_path, rows)
    assert found["accuracy"]["majority_class"]["value"] == 0.5
    assert (found["verdict"], found["guards"]["majority_class"]) == (
        "no_detectable_difference",
        False,
    )
    said = summary(found)
    assert "a guard failed" in said[0] and "commonest answer" in said[1]
    assert "No difference" not in " ".join(said)


def test_looks_stand_in_the_sentence_with_a_wider_interval(tmp_path: Path) -> None:
    once, often = (evaluated(tmp_path, task("fpb", 200, 60, 160), looks) for looks in (1, 4))
    assert "Evaluation 4 of these questions" in " ".join(summary(often))
    assert "Evaluation" not in " ".join(summary(once))


def test_other_evaluations_of_the_same_questions_are_counted(tmp_path: Path) -> None:
    first = {"test": "a", "tasks": {}, "adapter": "1"}
    second, other = first | {"adapter": "2"}, {"test": "b", "tasks": {"fpb": ["c"]}, "adapter": "3"}
    assert history.looks(tmp_path, first) == 1
    for inputs in (first, first, other):
        history.note(tmp_path, inputs, "better")
    assert history.looks(tmp_path, first) == history.looks(tmp_path, other) == 1
    assert history.looks(tmp_path, second) == 2
    assert history.looks(tmp_path, {"test": "d", "tasks": {"fpb": ["c"]}, "adapter": "2"}) == 2


def test_a_damaged_line_of_the_log_is_passed_over(tmp_path: Path) -> None:
    first, second = ({"test": "a", "tasks": {}, "adapter": each} for each in "12")
    history.note(tmp_path, first, "better")
    with (tmp_path / "evaluations.jsonl").open("ab") as file:
        file.write(b'{"inputs": "x"}\n[1]\n{"date": "\xff", "inputs": 1, "questions": 2}\n{"dat')
    assert history.looks(tmp_path, second) == 2


def test_a_judging_more_of_one_evaluation_is_a_look_more(tmp_path: Path) -> None:
    inputs = {"test": "a", "tasks": {}, "adapter": "1"}
    judgings = [{"judge": {"model": model}} for model in ("one", "two")]
    assert [history.looks(tmp_path, inputs, each) for each in (None, *judgings)] == [1, 1, 1]
    for each in (None, *judgings):
        history.note(tmp_path, inputs, "better", each)
    assert [history.looks(tmp_path, inputs, each) for each in (None, *judgings)] == [2, 2, 2]
    assert history.looks(tmp_path, inputs | {"adapter": "2"}) == 3


def made_up(rng: random.Random, count: int) -> list[str]:
    return [f"word{rng.randrange(3000)}" for _ in range(count)]


def question(at: int, words: list[str], answer: str = "12.5") -> Example:
    asked = Message("user", f"Read the report.\n{' '.join(words)}\nQuestion {at}?")
    return Example("rows", at, str(at), (asked, Message("assistant", answer)))


def test_questions_of_two_tasks_about_one_page_are_one_document() -> None:
    rng = random.Random(3)
    page, other = made_up(rng, 120), made_up(rng, 120)
    asked = [
        question(0, page),
        question(1, page[:110]),
        question(2, other),
        question(3, other[::-1]),
    ]
    assert document_keys(asked, ["a", "b", "c", "d"]) == ["a", "a", "c", "d"]
    assert document_keys(asked, ["a", "b", "c", "c"]) == ["a", "a", "c", "c"]
    assert document_keys(asked, ["a", "c", "c", "d"]) == ["a", "a", "a", "d"]


@pytest.mark.parametrize("excerpts", [3, 6, 10])
def test_overlapping_excerpts_of_a_report_are_one_group(excerpts: int) -> None:
    rng, rows = random.Random(excerpts), []
    for report in range(60):
        text = made_up(rng, 200 + 10 * excerpts)
        rows += [question(at, text[10 * at :][:200]) for at in range(excerpts)]
        assert len(rows) == (report + 1) * excerpts
    placed = split(rows, {"validation": 0.1, "test": 0.2})
    for report in range(60):
        groups = {group for group, _ in placed[report * excerpts :][:excerpts]}
        parts = {part for _, part in placed[report * excerpts :][:excerpts]}
        assert len(groups) == 1 and ("test" not in parts or parts == {"test"})
