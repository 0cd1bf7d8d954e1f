"""Adapter against adapter on the same questions, from the kept answers of two evaluations.

The statistics are the verdict's: in pairs, the first run (`a`) takes the base's place, the second
(`b`) the adapter's. There are no guards.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fintune import seal
from fintune.console import say
from fintune.errors import DataError
from fintune.evals import results, verdict
from fintune.evals.grading import PHRASES, VARIANTS, Pair, load_pairs
from fintune.files import read_json, read_jsonl

Json = dict[str, Any]
TRAINED = "the adapter as trained"


@dataclass(frozen=True)
class Side:
    """A finished evaluation.

    Attributes:
        name: as the user calls its run.
        facts: test_results.json and run.json in one.
        inputs: what it was made from; `run`, the config of the run beside it.
        pairs: its questions by id, with the answers of base and adapter.
        prompts: by question the hash of the prompt's token ids.
    """

    name: str
    facts: Json
    inputs: Json
    pairs: dict[str, Pair]
    prompts: dict[str, str]


def read_side(name: str, folder: Path) -> Side:
    """Read an evaluation. Raises OutputError where it is unfinished or changed."""
    inputs = dict(results.read_evaluation(folder)["inputs"])
    del inputs["adapter"]
    inputs["run"] = seal.recorded_inputs(folder.with_name("run")).get("config")
    facts = read_json(folder / results.RESULTS) | read_json(folder / "run.json")
    rows = read_jsonl(folder / "predictions.jsonl")
    prompts = {row["item"]["id"]: row["prompt_sha256"] for row in rows}
    return Side(name, facts, inputs, {p.item.id: p for p in load_pairs(folder)}, prompts)


def compare(a: Side, b: Side) -> tuple[Json, list[Pair]]:
    """Compare two adapters: the result, as `fintune compare --json` prints it, and the pairs.

    Raises:
        DataError: the questions or their prompts differ.
    """
    differs = seal.differences(a.inputs, b.inputs)
    _check_questions(a, b, [line for line in differs if not line.startswith("run")])
    pairs, tasks, accuracy = _joined(a, b, "adapter")
    macro = a.facts["primary"] == b.facts["primary"] == "macro_accuracy"
    run = {
        "primary": "macro_accuracy" if macro else "accuracy",
        "contaminated": {*a.facts["contaminated"], *b.facts["contaminated"]},
        "looks": max(a.facts["looks"], b.facts["looks"]),
    }
    found = verdict.decide(run, None, accuracy, tasks, None)
    words = {key: text.format(a=a.name, b=b.name) for key, text in PHRASES["comparisons"].items()}
    sentences = verdict.summary({**found, "tasks": tasks}, words)
    for task in tasks.values():
        task["a"], task["b"] = task.pop("base"), task.pop("adapter")
    other_base = any(line.startswith(("base", "quantization")) for line in differs)
    losses = [side.facts["loss"]["adapter"] for side in (a, b)]
    same_rows = a.inputs["test"] == b.inputs["test"] is not None and None not in losses
    return {
        "names": {"a": a.name, "b": b.name},
        "sentences": sentences,
        **found,
        "accuracy": {"a": accuracy["base"], "b": accuracy["adapter"]},
        "loss": losses if same_rows else None,
        "tasks": dict(sorted(tasks.items(), key=lambda task: task[1]["difference"]["value"])),
        "bases": _joined(a, b, "base")[2]["difference"] if other_base else None,
        "differs": differs,
    }, pairs


def _check_questions(a: Side, b: Side, differs: list[str]) -> None:
    """Args: differs: what the two evaluations differ in."""
    every = a.pairs.keys() | b.pairs.keys()
    both = a.pairs.keys() & b.pairs.keys()
    same = [key for key in both if _asked(a, key) == _asked(b, key)]
    what, fix = "questions", "evaluate both over one data folder: fintune eval --data DIR"
    if len(same) == len(every):
        same = [key for key in every if a.prompts[key] == b.prompts[key]]
        what, fix = "prompts", "evaluate both with the same base and chat settings"
    if count := len(every) - len(same):
        why = f"what they were made from differs: {'; '.join(differs)}"
        what = f"{count} of the {len(every)} {what} of {a.name} and {b.name} differ"
        raise DataError(what, why=why, fix=f"{fix}; or read each by itself: fintune show RUN")


def _asked(side: Side, key: str) -> tuple[object, ...]:
    item = side.pairs[key].item
    return item.messages, item.reference, item.kind


def _joined(a: Side, b: Side, variant: str) -> tuple[list[Pair], Json, Json]:
    """The answers of the same variant of both, by task and overall.

    What other training rows change, the labels offered and the documents, is taken of both: all
    labels, and the documents of the side that tells fewer apart.
    """
    coarser = min((a, b), key=lambda side: len({p.item.group for p in side.pairs.values()}))
    pairs = []
    for key, ours in a.pairs.items():
        theirs, group = b.pairs[key], coarser.pairs[key].item.group
        choices = tuple(dict.fromkeys((*ours.item.choices, *theirs.item.choices)))
        item = replace(ours.item, choices=choices, group=group)
        texts = dict(zip(VARIANTS, (ours.texts[variant], theirs.texts[variant]), strict=True))
        pairs.append(Pair(item, texts, {name: item.grade(text) for name, text in texts.items()}))
    checked = [pair for pair in pairs if pair.item.kind in results.CHECKED]
    deciding = results.deciding_pairs(checked)
    drop = min(a.facts["max_task_drop"], b.facts["max_task_drop"])
    tasks = results.by_task(checked, deciding, drop)
    return pairs, tasks, results.overall(deciding, len(tasks))


def tell_form(place: Path, line: Callable[[str], None] = say) -> None:
    """Print what was found of a form that an adapter is served in (`forms`)."""
    found = read_json(place / results.RESULTS)
    low, high = (f"{end:.1%}" for end in found["equal"]["ci95"])
    share = f"{found['equal']['value']:.1%} ({low} to {high})"
    line(f"{place.name}: {share} of the answers equal to those of {TRAINED}")
    for sentence in found["sentences"]:
        line(sentence)


def tell_forms(folder: Path, line: Callable[[str], None]) -> None:
    """Print what was found of every finished form of an evaluation."""
    for done in sorted(folder.glob(f"{seal.FORMS}/*/{seal.DONE}")):
        tell_form(done.parent, line)
