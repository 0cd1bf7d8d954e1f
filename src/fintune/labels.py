"""Labels that are what they say: does another assignment of a task's labels fit its texts better?

Two independent signs. *Words*: a text has a tone of -1, 0 or 1 by the words of `labels.toml` (with
a question answered by Yes or No: whether its words say what is asked). A label of the score c (-1
if negative) gives the tone t with a probability proportional to exp(a|t| + bt + gct + d|ct|), where
g and d are not below 0; the evidence of an assignment is its likelihood averaged over these four.
*Likelihoods* by a base: the label that it finds likeliest, each against its own mean, is the right
one with a probability that is fitted, else a guess; the evidence is the greatest likelihood.

An assignment is better where its evidence is more than (assignments compared) / LEVEL times that of
the one given. With right labels that happens to at most LEVEL of all tasks, where the model holds;
words or a base that have nothing to do with the labels give all assignments the same evidence.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from heapq import nsmallest
from itertools import combinations, permutations
from math import log
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from fintune.console import warn
from fintune.example import Example
from fintune.files import read_toml
from fintune.ngrams import normal, passage

LEVEL = 0.001
"""Most of the tasks with right labels that may be called permuted."""
MOST_ROWS, FEWEST_ROWS, FEWEST_OF_FORM = 4000, 20, 100
"""Rows of a source that are read, by hash; fewer are not tested, nor is one form of question."""
SHARED_ROWS = 5
"""A sentence that so many prompts have belongs to an instruction."""
MOST_ORDERED, MOST_LABELS = 4, 20
"""Of more labels exchanges of two and the reversed order are compared; of still more, nothing."""
CHARACTERS, LABEL_CHARACTERS = 2000, 40
"""Most characters of a text that are read, and of a label."""
LOOK_AT, SHOWN = 10, 100
"""Rows that a warning names, and characters of each."""

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
Order = tuple[int, ...]
_LEXICON = read_toml(__file__, "labels.toml")
_SCORES: dict[str, int] = _LEXICON["scores"]
_QUESTIONS = [(re.compile(q["asks"]), {*q["yes"]}, {*q["no"]}) for q in _LEXICON["questions"]]
_WORDS = {
    name: re.compile("|".join(re.escape(word).replace(r"\*", ".*") for word in words.split()))
    for name, words in _LEXICON["words"].items()
}
_TOKEN = re.compile(r"(?<![^\s(])[+-]\$?\d[\d.,]*%?|\$?\d[\d.,]*%?|[^\W\d_][\w'-]*")
_SENTENCE = re.compile(r"(?<=[.?!:}])\s+|\n+")


class Row(NamedTuple):
    """A row as it is compared: its label, the form of its question, its stratum (rows of one a and
    b), and its sign: the tone, or the number of the likeliest label."""

    id: str
    label: str
    form: str
    stratum: int
    sign: int


def by_words(examples: Iterable[Example]) -> list[Json]:
    """Better assignments by the words of the texts, a finding (`_findings`) each.

    Args:
        examples: rows whose last message is the label, of any sources; others are passed over.
    """
    tasks = defaultdict[tuple[str, bool], list[Example]](list)
    for example in examples:
        short = len(example.messages[-1].content) <= LABEL_CHARACTERS
        if short and _score(label := _label(example.messages[-1].content)) is not None:
            tasks[example.source, label in ("yes", "no")].append(example)
    found = []
    for (source, yes_no), rows in tasks.items():
        chosen = nsmallest(MOST_ROWS, rows, key=attrgetter("row_sha256"))
        found += _findings(source, "words", [*_rows(chosen, yes_no)])
    return found


def by_likelihood(
    task: str, choices: tuple[str, ...], asked: list[tuple[str, str, list[float]]]
) -> list[Json]:
    """Better assignments by a base's likelihoods of the labels.

    Args:
        asked: of each question its id, its label and the log-probabilities of the choices.
    """
    labels = (*map(_label, choices),)
    scores = np.array([likely for *_, likely in asked])
    scores -= np.logaddexp.reduce(scores, 1, keepdims=True)  # whether it answers at all is no sign
    picked = ((scores - scores.mean(0)) / (scores.std(0) + 1e-9)).argmax(1).tolist()
    rows = [
        Row(key, _label(label), "", 0, pick)
        for (key, label, _), pick in zip(asked, picked, strict=True)
        if _label(label) in labels
    ]
    return _findings(task, "likelihoods", rows, labels) if len(labels) <= MOST_LABELS else []


def tell(found: list[Json], examples: Iterable[Example]) -> None:
    """Warn of findings, with the beginnings of the texts to look at."""
    wanted = {key for finding in found for key in finding["look_at"]}
    shown = {
        key: f"  {key} ({_label(row.messages[-1].content)}): {passage(row)[:SHOWN]}"
        for row in examples
        if (key := _key(row)) in wanted
    }
    for finding in found:
        rows = (shown.get(key, f"  {key}") for key in finding["look_at"])
        warn("\n".join([f"{finding['says']} No label is changed; look at:", *rows]))


def _key(example: Example) -> str:
    return example.place if example.line else example.row_sha256


def _label(text: str) -> str:
    return normal(text).strip(" .!\"'")


@cache
def _score(label: str) -> int | None:
    """-1, 0 or 1 of a label of tone, whatever its degree, and of Yes and No; else None."""
    *degrees, name = re.split(r"[ _-]+", label)
    return _SCORES.get(name) if {*degrees} <= {*_LEXICON["degrees"].split()} else None


def _side(label: str) -> int:
    return _score(label.split("/")[0]) or 0


def _rows(examples: list[Example], yes_no: bool) -> Iterator[Row]:
    labels = [_label(row.messages[-1].content) for row in examples]
    prompts = [normal("\n".join(m.content for m in row.messages[:-1])) for row in examples]
    parts = [_SENTENCE.split(prompt[-CHARACTERS:]) for prompt in prompts]
    often = Counter(part for each in parts for part in {*each})
    for example, label, prompt, sentences in zip(examples, labels, prompts, parts, strict=True):
        form = " ".join(part for part in sentences if often[part] >= SHARED_ROWS)
        text = passage(example)[:CHARACTERS] if yes_no else ""
        own = _SENTENCE.split(text) if yes_no else sentences
        words = " ".join(part for part in own if often[part] < SHARED_ROWS).replace("’", "'")
        said = [_kind(token) for token in _TOKEN.findall(words)]
        if not yes_no:
            yield Row(_key(example), label, form, 0, _tone(said))
            continue
        question = prompt.replace(text, " ") + form
        for stratum, (asks, yes, no) in enumerate(_QUESTIONS):
            if asks.search(question):
                signs = (bool(kind & yes) - bool(kind & no) for kind in said)
                yield Row(_key(example), label, "", stratum, next(filter(None, signs), 0))
                break


@cache
def _kind(token: str) -> frozenset[str]:
    """The lists of words that a token stands in."""
    if token[0] in "+-":
        return frozenset({"up" if token[0] == "+" else "down"})
    token = "figure" if token.lstrip("$")[0].isdigit() else token
    return frozenset(name for name, words in _WORDS.items() if words.fullmatch(token))


def _tone(kinds: list[frozenset[str]]) -> int:
    """1 where more words are good or of a rise than bad or of a fall, -1 where fewer."""
    total = 0
    for at, kind in enumerate(kinds):
        before = frozenset[str]().union(*kinds[max(0, at - 3) : at])
        near = before.union(kind, *kinds[at + 1 : at + 4])
        way = ("up" in kind) - ("down" in kind)
        if "reversed" in near:
            way = -way
        if not way and not ("reversed" in kind and near & {"up", "down"}):
            way = ("good" in kind) - ("bad" in kind)
        total += -way if "negation" in before else way
    return (total > 0) - (total < 0)


def _findings(task: str, sign: str, rows: list[Row], names: tuple[str, ...] = ()) -> list[Json]:
    """A finding for each better assignment: every form of question is tested by itself, then what
    is left together; all rows of one assignment are one finding."""
    forms, found = (defaultdict[Any, list[Row]](list) for _ in range(2))
    for row in rows:
        forms[row.form].append(row)
    large = [part for part in forms.values() if FEWEST_OF_FORM <= len(part) < len(rows)]
    parts, left = [*large, []], {*rows}
    for part in parts:
        part = part or sorted(left)
        if (one := _compared(part, names, len(parts))) and one["log_odds"] > one["limit"]:
            found[tuple(one["assignment"].items())] += part
            left -= {*part}
    return [
        {"task": task, "sign": sign, **one, "says": _says(task, sign, one)}
        for part in found.values()
        if (one := _compared(part, names, len(parts)))
    ]


def _compared(rows: list[Row], names: tuple[str, ...], tests: int) -> Json | None:
    """The best assignment other than the one given, its log odds against it, and their limit; by
    words, all labels of one side are one ("mildly positive/strong positive").

    Args:
        names: of the choices that signs are numbers of; none for tones.
        tests: as many are made of this task.
    """
    known = {row.label for row in rows}
    side = {a: "/".join(sorted(b for b in known if _score(b) == _score(a))) for a in known}
    side = {name: name for name in names} or side
    labels = names or sorted({*side.values()}, key=_side)
    if len(rows) < FEWEST_ROWS or len({side[label] for label in known}) == 1:
        return None
    counts = np.zeros((1 + max(row.stratum for row in rows), len(labels), len(names) or 3), int)
    for row in rows:
        counts[row.stratum, labels.index(side[row.label]), row.sign + (not names)] += 1
    given, *orders = _orders(len(labels))
    scores = tuple(map(_side, labels))
    evidence = {
        order: _knowing(counts[0], order) if names else _ordinal(counts, scores, order)
        for order in (given, *orders)
    }
    best = max(orders, key=lambda order: evidence[order])
    moved = {labels[at]: labels[to] for at, to in enumerate(best) if at != to}

    def off(row: Row) -> tuple[float, int]:
        """How far a row's sign is from the better label rather than from its own."""
        to = moved[side[row.label]]
        if names:
            return names[row.sign] != to, 0
        own, better = (abs(row.sign - _side(label)) for label in (row.label, to))
        return better - own, -abs(row.sign)

    shown = nsmallest(LOOK_AT, (row for row in rows if side[row.label] in moved), key=off)
    return {
        "assignment": moved,
        "rows": len(rows),
        "log_odds": round(evidence[best] - evidence[given], 1),
        "limit": round(log(tests * len(orders) / LEVEL), 1),
        "counts": dict(zip(labels, counts.sum(0).tolist(), strict=True)),
        "look_at": [row.id for row in shown],
    }


def _says(task: str, sign: str, one: Json) -> str:
    arrows = ", ".join(f"{label} -> {to}" for label, to in one["assignment"].items())
    counts = ", ".join(f"{label} {row}" for label, row in one["counts"].items())
    columns = "-, 0, +" if sign == "words" else ", ".join(one["counts"])
    return (
        f"{task}: another assignment of the labels fits the texts better: {arrows}. By the {sign} "
        f"of {one['rows']} rows it is e^{one['log_odds']} times as likely (the limit is "
        f"e^{one['limit']}); rows that say {columns}: {counts}."
    )


def _orders(count: int) -> list[Order]:
    """The assignment given, then those compared with it: label `at` should be label `order[at]`."""
    given = tuple(range(count))
    if count <= MOST_ORDERED:
        return [*permutations(given)]
    swaps = ({a: b, b: a} for a, b in combinations(given, 2))
    return [given, *(tuple(swap.get(at, at) for at in given) for swap in swaps), given[::-1]]


@cache
def _grid(scores: tuple[int, ...]) -> tuple[Array, Array]:
    """Log-probabilities of the tones, [a and b, g and d, label, tone], and of a and b a priori."""
    steps = [0, 0.25, 0.5, 1, 1.5, 2, 3]
    ab = np.meshgrid(np.linspace(-3, 2, 11), np.linspace(-3, 3, 25))
    a, b = (each.reshape(-1, 1, 1, 1) for each in ab)
    g, d = (each.reshape(1, -1, 1, 1) for each in np.meshgrid(steps, steps))
    c, t = np.array(scores).reshape(-1, 1), np.array([-1, 0, 1])
    logits = a * abs(t) + b * t + g * c * t + d * abs(c * t)
    # Neutral texts are about as often good as bad; without any, nothing is known of b.
    prior = -2 * b.ravel() ** 2 if 0 in scores else 0 * b.ravel()
    logs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return logs, prior - np.logaddexp.reduce(prior)


def _ordinal(counts: Array, scores: tuple[int, ...], order: Order) -> float:
    """Log evidence of an assignment by `counts` of tones, [stratum, label, tone]."""
    logs, prior = _grid(scores)
    turned = counts[:, np.argsort(order)]  # a label's counts stand where its new score does
    each = np.tensordot(logs, turned, ((2, 3), (1, 2))) + prior[:, None, None]
    return float(np.logaddexp.reduce(np.logaddexp.reduce(each, 0).sum(-1)))


def _knowing(counts: Array, order: Order) -> float:
    """Greatest log-likelihood of an assignment by `counts`, [label, label picked] (EM)."""
    right, guess, known = np.eye(len(order))[list(order)], counts.sum(0) / counts.sum(), 0.5
    for _ in range(50):
        likely = known * right + (1 - known) * guess + 1e-12
        guessed = counts * (1 - known) * guess / likely
        known = 1 - guessed.sum() / counts.sum()
        guess = guessed.sum(0) / max(guessed.sum(), 1e-300)  # none where the base knows all
    return float((counts * np.log(likely)).sum())
