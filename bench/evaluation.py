"""Figures of the stage `eval`, each beside what is asked of it.

    python bench/evaluation.py numbers|power|faults|kills|wall|rescore|generation|all

Prints every figure and writes it to bench/results/evaluation.json with the machine described.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "evaluation.json"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import test_numbers  # noqa: E402
from evaluation_power import power  # noqa: E402
from generation import generation  # noqa: E402
from judge_faults import faults, kills, wall  # noqa: E402
from prepare import BENCHMARKS, machine  # noqa: E402
from rescore import rescore  # noqa: E402

from fintune.console import result  # noqa: E402
from fintune.files import read_json, write_json  # noqa: E402
from fintune.numbers import compare, is_number_answer  # noqa: E402


def numbers() -> dict[str, Any]:
    """The grader on our case table, and on the benchmarks' gold answers, reworded and spoilt."""
    failed = 0
    for case in test_numbers.CASES:
        try:
            test_numbers.test_case(case)
        except AssertionError:
            failed += 1
    lines = [
        line
        for name in test_numbers.FILES
        for line in (BENCHMARKS / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    golds = [gold for line in lines if is_number_answer(gold := json.loads(line)["answer"])]
    asked, right = Counter[str](), Counter[str]()
    for gold in golds:
        asked["gold_answers"] += 1
        right["gold_answers"] += compare(gold, gold).correct
        for _, reply in test_numbers.rewordings(gold):
            asked["rewordings"] += 1
            right["rewordings"] += compare(gold, reply).correct
        for _, reply in test_numbers.corruptions(gold):
            asked["corruptions"] += 1
            right["corruptions"] += not compare(gold, reply).correct
    cases = len(test_numbers.CASES)
    return {
        "cases": {"n": cases, "right": cases - failed},
        **{name: {"n": asked[name], "right": right[name]} for name in asked},
    }


FIGURES = {f.__name__: f for f in (numbers, power, faults, wall, kills, rescore, generation)}


def main(wanted: list[str]) -> None:
    """Measure the figures named, or all; print each and keep them in the results file."""
    for name, figure in FIGURES.items():
        if name in wanted or wanted == ["all"]:
            found = {**figure(), "machine": machine()}
            result(f"{name}: {json.dumps(found, indent=1)}")
            kept = read_json(RESULTS) if RESULTS.is_file() else {}
            kept.pop("format", None)
            write_json(RESULTS, {**kept, name: found})


if __name__ == "__main__":
    main(sys.argv[1:])
