"""The suite of public tasks: where their questions come from, and how lm-eval is given them."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from fintune.evals.calibration import calibration
from fintune.evals.lm_eval import weighted_f1
from fintune.evals.tasks import TASKS

HUB = {"text": "Shares fall after the profit warning", "label": 0}
"""A row as the data set of the hub has it: a text and an integer."""


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_every_task_says_where_its_questions_come_from() -> None:
    rows = {row["name"]: row for row in tiny.answer_json("tasks", "--json")}
    assert rows.keys() == TASKS.keys() and len(rows) >= 15
    assert all(row["source"] and row["licence"] for row in rows.values())
    assert all(row["file"] or row["questions"] for row in rows.values())


def test_a_folder_of_the_suite_is_asked_as_the_tasks_say(tmp_path: Path) -> None:
    suite = write(tmp_path / "suite", "tfns_test.jsonl", HUB, {**HUB, "text": "Up", "label": 1})
    write(suite, "fpb_test.jsonl", {"prompt": "Is it good?", "answer": "neutral"})
    other = write(tmp_path, "mine.jsonl", {"prompt": "Mine?", "answer": "positive"}) / "mine.jsonl"
    out = tmp_path / "exported"
    words = ("-s", f"eval.suite={suite}", "-s", f"eval.tasks.fpb={other}")
    said = tiny.done("tasks", "export", out, *words)
    assert "has no file of banking77, " in said.err and "fintune_tfns" in said.out.split()
    asked = tiny.read_lines(out / "tfns.jsonl")
    prompt = "Input: Shares fall after the profit warning\nAnswer: "
    assert asked[0]["question"].endswith(prompt) and "{negative/neutral/positive}" in str(asked[0])
    assert {row["item"]["reference"] for row in asked} == {"negative", "positive"}
    assert tiny.read_lines(out / "fpb.jsonl")[0]["question"] == "Mine?"


def test_lm_eval_grades_as_the_evaluation_does(tmp_path: Path) -> None:
    suite = write(tmp_path / "suite", "tfns_test.jsonl", HUB)
    out = tmp_path / "exported"
    tiny.done("tasks", "export", out, "-s", f"eval.suite={suite}")
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda load, node: load.construct_scalar(node))
    tree = yaml.load((out / "tfns.yaml").read_text(), loader)
    module, function = tree["process_results"].split(".")
    spec = importlib.util.spec_from_file_location(module, out / f"{module}.py")
    assert spec and spec.loader
    spec.loader.exec_module(loaded := importlib.util.module_from_spec(spec))
    document = tiny.read_lines(Path(tree["dataset_kwargs"]["data_files"]["test"]))[0]
    grades = [getattr(loaded, function)(document, [text]) for text in ("It is negative.", "Up?")]
    assert [one["correct"] for one in grades] == [1.0, 0.0]
    assert [one["weighted_f1"] for one in grades] == [("negative", "negative"), ("negative", "")]


def test_a_folder_without_a_task_is_refused(tmp_path: Path) -> None:
    said = tiny.fintune("tasks", "export", tmp_path / "x", "-s", f"eval.suite={tmp_path}")
    assert said.code == 1 and "eval.suite: no task's file in" in said.err


def test_a_file_is_never_taken_for_the_folder_of_an_export(tmp_path: Path) -> None:
    suite = write(tmp_path / "suite", "tfns_test.jsonl", HUB)
    (tmp_path / "there").write_text("mine")
    said = tiny.fintune("tasks", "export", tmp_path / "there", "-s", f"eval.suite={suite}")
    assert said.code == 1 and "name a new folder" in said.err
    assert (tmp_path / "there").read_text() == "mine"


def test_weighted_f1_is_that_of_the_field() -> None:
    pairs = [("a", "a"), ("a", "b"), ("a", "a"), ("b", "b"), ("b", "")]
    assert weighted_f1(pairs) == pytest.approx(0.6 * 0.8 + 0.4 * 0.5)


def test_calibration_of_known_confidences() -> None:
    """At 0.9 nine of ten are right; at 0.6 three of ten: an error of 0.15, all of it there."""
    sure, unsure = ([math.log(p), math.log(1 - p)] for p in (0.9, 0.6))
    answers = [(sure, at > 0) for at in range(10)] + [(unsure, at < 3) for at in range(10)]
    found = calibration(answers)
    assert found and found["n"] == 20 and found["accuracy"] == 0.6
    assert found["expected_calibration_error"] == pytest.approx(0.15)
    assert [one["n"] for one in found["reliability"]] == [10, 10]
    assert found["risk_coverage"] == [[0.5, 0.1], [1.0, 0.4]] and found["threshold"] is None


def test_the_threshold_keeps_to_few_wrong_answers() -> None:
    certain, guess = [0.0, -20.0], [0.0, -0.1]
    found = calibration([(certain, at > 0) for at in range(100)] + [(guess, False)] * 100)
    assert found and found["threshold"]["coverage"] == 0.5 and found["threshold"]["wrong"] == 0.01
    assert 0.05 < found["threshold"]["at_most"] < 0.06  # Clopper-Pearson of 1 in 100: 0.0545
    assert calibration([]) is None
