"""The finance tasks as tasks of lm-evaluation-harness, graded here.

`fintune tasks export DIR` writes a YAML file and the questions of each task. `process_results` of a
task is `process` below, so that an answer gets the grade that it gets here.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.errors import OutputError
from fintune.evals import stats
from fintune.evals.grading import Item, label_key
from fintune.evals.tasks import TASKS, find_questions, suite_tasks, task_items
from fintune.files import write_jsonl, write_text
from fintune.page import render

FUNCTIONS = "fintune_grading"
"""Module beside the YAML files that gives lm-eval the functions of this one."""
PREFIX = "fintune_"
"""Of the tasks' names, so that none is taken for lm-eval's own."""


def process(document: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The metrics of an answer, as lm-eval asks for them.

    Args:
        document: a line of the questions' file.
        results: the answer.
    """
    item = Item.from_json(document["item"])
    graded = item.grade(results[0])
    said = label_key(graded.read) if graded and graded.read else ""
    return {
        "correct": float(graded is not None and graded.correct),
        **({"weighted_f1": (label_key(item.reference), said)} if item.kind == "label" else {}),
    }


def weighted_f1(pairs: Sequence[tuple[str, str]]) -> float:
    """The weighted F1 of a task's references and answers."""
    return stats.weighted_f1([gold for gold, _ in pairs], [said or None for _, said in pairs])


def export(config: Config, folder: Path) -> list[str]:
    """Write every checkable task of `eval.suite` and `eval.tasks`; returns their names there.

    Raises:
        ConfigError, DataError: as of `find_questions` and `task_items`.
        OutputError: no task, or the folder is not empty.
    """
    found = find_questions(suite_tasks(config.eval), {})
    asked = {name: task_items(name, of, config.eval.max_items) for name, of in found.items()}
    asked = {name: items for name, items in asked.items() if TASKS[name].kind != "text"}
    if not asked:
        what = "no task to export"
        raise OutputError(what, fix="--set eval.suite=FOLDER, or --set eval.tasks.fpb=FILE")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder} is a file or not empty", fix="name a new folder")
    for name, items in asked.items():
        rows = [{"question": item.messages[-1].content, "item": asdict(item)} for item in items]
        path, task = folder / f"{name}.jsonl", TASKS[name]
        values = {"module": FUNCTIONS, "limit": config.eval.max_new_tokens}
        values |= {"name": PREFIX + name, "file": str(path.resolve())}
        values |= {"source": task.source, "licence": task.licence, "label": task.kind == "label"}
        write_jsonl(path, rows)
        write_text(folder / f"{name}.yaml", render("lm_eval.yaml.jinja", **values) + "\n")
    functions = f"from {__name__} import process, weighted_f1  # noqa: F401\n"
    write_text(folder / f"{FUNCTIONS}.py", functions)
    return [PREFIX + name for name in asked]
