"""What an evaluation says of its label tasks alone: F1, calibration, labels that fit badly."""

from typing import Any

from fintune import labels
from fintune.evals import stats
from fintune.evals.calibration import calibration
from fintune.evals.grading import VARIANTS, Pair, as_example, label_key

Json = dict[str, Any]


def weighted_f1(pairs: list[Pair], variant: str) -> float:
    """Of a label task, the classes as references and answers name them."""
    read = (pair.graded[variant] for pair in pairs)
    said = [label_key(graded.read) if graded and graded.read else None for graded in read]
    return stats.weighted_f1([label_key(pair.item.reference) for pair in pairs], said)


def calibrations(answers: list[Json], pairs: list[Pair]) -> Json:
    """By variant, of the labels whose choices were compared by their likelihoods."""
    right = {
        (pair.item.id, name): pair.passes(name, lambda graded: graded.correct)
        for pair in pairs
        for name in VARIANTS
    }
    known: dict[str, list[tuple[list[float], bool]]] = {name: [] for name in VARIANTS}
    for row in answers:
        if likely := row.get("choice_logprobs"):
            passed = right[row["item"]["id"], row["model"]]
            known[row["model"]].append(([*likely.values()], passed))
    return {name: found for name, each in known.items() if (found := calibration(each))}


def findings(checked: list[Pair], answers: list[Json]) -> list[Json]:
    """Better assignments of the tasks' labels, by words and by the base's likelihoods."""
    items = {pair.item.id: pair.item for pair in checked if pair.item.kind == "label"}
    found = labels.by_words(map(as_example, items.values()))
    asked: dict[tuple[str, tuple[str, ...]], list[tuple[str, str, list[float]]]] = {}
    for row in answers:
        if (known := row.get("choice_logprobs")) and row["model"] == VARIANTS[0]:
            item = items[row["item"]["id"]]
            line = (item.id, item.reference, [known[choice] for choice in item.choices])
            asked.setdefault((item.task, item.choices), []).append(line)
    return found + [
        one for key, lines in asked.items() for one in labels.by_likelihood(*key, lines)
    ]
