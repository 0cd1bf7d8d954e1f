"""Labels against their texts: permuted ones are found and named, right and unknown ones pass."""

import json
import random
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import tiny
from preparing import write

from fintune.config import DatasetConfig
from fintune.evals.grading import as_example
from fintune.evals.tasks import find_questions, task_items
from fintune.example import Example, Message
from fintune.labels import by_likelihood, by_words

BENCHMARKS = Path(__file__).parents[2] / "shared" / "data" / "benchmarks"
TONES = ("negative", "neutral", "positive")
ASKED = "What is the sentiment of this news?"
TEXTS = {
    "negative": ["{} warns that its orders fall", "Shares of {} slump on a weak quarter"],
    "neutral": ["{} names a finance chief", "{} holds its annual meeting in Oslo"],
    "positive": ["{} beats forecasts and lifts its margin", "Sales of {} rose, losses narrowed"],
}


def rows(count: int = 120, asked: str = ASKED, seed: int = 0) -> list[tuple[str, str]]:
    """Questions and right labels; a fifth of the texts are another label's."""
    rng, found = random.Random(seed), []
    for number in range(count):
        label = rng.choice(TONES)
        said = label if rng.random() < 0.8 else rng.choice(TONES)
        text = rng.choice(TEXTS[said]).format(f"Company {number}")
        found.append((f"{asked}\nText: {text}\nAnswer:", label))
    return found


def examples(pairs: list[tuple[str, str]], task: str = "news") -> list[Example]:
    turns = [(Message("user", asked), Message("assistant", label)) for asked, label in pairs]
    return [Example(task, at + 1, f"{at:04}", each) for at, each in enumerate(turns)]


def relabelled(pairs: list[tuple[str, str]], order: dict[str, str]) -> list[tuple[str, str]]:
    return [(asked, order[label]) for asked, label in pairs]


@pytest.mark.parametrize("given", [*permutations(TONES)][1:])
def test_every_order_of_three_labels_is_named(given: tuple[str, ...]) -> None:
    order = dict(zip(TONES, given, strict=True))
    (found,) = by_words(examples(relabelled(rows(), order)))
    assert found["assignment"] == {to: label for label, to in order.items() if label != to}
    assert found["log_odds"] > found["limit"] and found["rows"] == 120
    assert len({*found["look_at"]}) == 10 and found["look_at"][0].startswith("news:")


def test_right_labels_pass_and_so_do_labels_that_have_nothing_to_do_with_the_texts() -> None:
    for seed in range(20):
        assert by_words(examples(rows(seed=seed))) == []
        rng, pairs = random.Random(seed), rows(seed=seed)
        dealt = [(asked, rng.choice(("negative", *["positive"] * 4))) for asked, _ in pairs]
        assert by_words(examples(dealt)) == []


@pytest.mark.parametrize(
    "label",
    [
        lambda right: "positive",
        lambda right: {"negative": "lost_card", "neutral": "top_up", "positive": "refund"}[right],
        lambda right: {"negative": "0", "neutral": "1", "positive": "2"}[right],
        lambda right: {"negative": "organization", "neutral": "none", "positive": "person"}[right],
    ],
)
def test_one_label_and_labels_that_name_no_tone_are_left_alone(label: Callable[[str], str]) -> None:
    assert by_words(examples([(asked, label(right)) for asked, right in rows()])) == []
    assert (
        by_words(examples(relabelled(rows(15), dict(zip(TONES, TONES[::-1], strict=True))))) == []
    )


def test_of_two_forms_of_question_in_one_source_the_permuted_one_is_named() -> None:
    exchange = {"negative": "negative", "neutral": "positive", "positive": "neutral"}
    tweets = rows(100, "What is the sentiment of this tweet?", seed=1)
    (found,) = by_words(examples(rows(300) + relabelled(tweets, exchange)))
    assert found["rows"] == 100
    assert found["assignment"] == {"neutral": "positive", "positive": "neutral"}


def test_levels_are_compared_too() -> None:
    levels = {"negative": "strong negative", "neutral": "neutral", "positive": "mildly positive"}
    more = {"negative": "mildly negative", "neutral": "neutral", "positive": "strong positive"}
    pairs = relabelled(rows(150), levels) + relabelled(rows(150, seed=1), more)
    assert by_words(examples(pairs)) == []
    order = {"strong negative": "mildly positive", "mildly positive": "strong negative"}
    order |= {"mildly negative": "strong positive", "strong positive": "mildly negative"}
    (found,) = by_words(examples([(asked, order.get(label, label)) for asked, label in pairs]))
    down, up = (f"mildly {side}/strong {side}" for side in ("negative", "positive"))
    assert found["assignment"] == {down: up, up: down}


def test_yes_and_no_are_held_against_what_is_asked() -> None:
    rng, pairs = random.Random(0), []
    for number in range(90):
        rises, way = rng.random() < 0.5, rng.choice(("increasing", "decreasing"))
        text = f"gold {'gains' if rises else 'slips'} to ${1000 + number} an ounce"
        right = "Yes" if rises == (way == "increasing") else "No"
        pairs.append((f"Is the price of gold {way}? Yes or No.\nText: {text}\nAnswer:", right))
    assert by_words(examples(pairs)) == []
    (found,) = by_words(examples(relabelled(pairs, {"Yes": "No", "No": "Yes"})))
    assert found["assignment"] == {"no": "yes", "yes": "no"}


def test_a_base_that_knows_shows_permuted_labels_of_any_kind() -> None:
    names, rng = ("location", "organization", "person"), random.Random(0)
    right = [rng.choice(names) for _ in range(100)]

    def asked(given: dict[str, str], knows: float) -> list[tuple[str, str, list[float]]]:
        likely = [
            [rng.gauss(-3, 1) - 4 * (name == "person") + knows * (name == label) for name in names]
            for label in right
        ]
        return [(f"q{n}", given[label], likely[n]) for n, label in enumerate(right)]

    exchange = {"location": "person", "organization": "organization", "person": "location"}
    same = dict(zip(names, names, strict=True))
    assert by_likelihood("ner", names, asked(same, 2)) == []
    assert by_likelihood("ner", names, asked(exchange, 0)) == []
    (found,) = by_likelihood("ner", names, asked(exchange, 2))
    assert found["assignment"] == {"location": "person", "person": "location"}
    assert found["sign"] == "likelihoods"


def test_prepare_warns_and_changes_no_label(tmp_path: Path) -> None:
    exchange = {"negative": "negative", "neutral": "positive", "positive": "neutral"}
    given = relabelled(rows(300), exchange)
    path = write(tmp_path / "tweets.jsonl", [{"user": u, "assistant": a} for u, a in given])
    words = ("-c", "demo", "-s", f"out={tmp_path}", "-s", f"model.path={tiny.base()}")
    words += ("-s", f"data.source={path}", "-s", "data.near_duplicates=1")
    said = " ".join(tiny.done("prepare", *words).err.split())
    assert "tweets.jsonl: another assignment of the labels fits the texts better: " in said
    assert "neutral -> positive, positive -> neutral" in said and "No label is changed" in said
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    (found,) = manifest["labels"]
    for key in found["look_at"]:
        label = given[int(key.removeprefix("tweets.jsonl:")) - 1][1]
        assert f"{key} ({label}): " in said
    assert "neutral -&gt; positive" in (tmp_path / "data" / "report.html").read_text()
    assert "company" not in json.dumps(found), "the texts stay where the rows are"


def test_eval_warns_and_keeps_its_findings(chain: tiny.Chain, tmp_path: Path) -> None:
    copy = chain.copy(tmp_path, "data", "run")
    order = dict(zip(TONES, TONES[::-1], strict=True))
    lines = [
        {"id": at, "prompt": asked, "answer": label, "choices": [*TONES]}
        for at, (asked, label) in enumerate(relabelled(rows(60), order))
    ]
    asked = tiny.words(tasks={"fpb": str(write(tmp_path / "fpb.jsonl", lines))}, max_new_tokens=2)
    asked += ["-s", "eval.max_items=60"]
    words = (*copy.words(), *asked, "-s", "eval.label_scoring=likelihood")
    said = tiny.done("eval", *words)
    results = json.loads((copy.eval / "test_results.json").read_text())
    (found,) = (each for each in results["labels"] if each["sign"] == "words")
    assert (found["task"], found["assignment"]) == (
        "fpb",
        {"negative": "positive", "positive": "negative"},
    )
    assert f"  {found['look_at'][0]} (positive): " in said.err and "company" in said.err
    assert "negative -&gt; positive" in (copy.eval / "report.html").read_text()


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs ../shared/data")
def test_the_order_in_which_tweets_were_published_is_found() -> None:
    path = DatasetConfig(path=str(BENCHMARKS / "tfns_test.jsonl"))
    items = task_items("tfns", find_questions({"tfns": path}, {})["tfns"], 300)
    right = [*map(as_example, items)]
    assert by_words(right) == []
    exchange = {"negative": "negative", "neutral": "positive", "positive": "neutral"}
    pairs = [(row.messages[0].content, exchange[row.messages[1].content]) for row in right]
    (found,) = by_words(examples(pairs))
    assert found["assignment"] == {"neutral": "positive", "positive": "neutral"}
