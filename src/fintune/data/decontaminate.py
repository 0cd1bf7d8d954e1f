"""Rows that repeat a benchmark's questions, verbatim or reworded.

A question is compared by its own words: instructions and option lists, which many questions of
the file or many passages of the rows share, are stripped first. A row is contaminated when it holds

- with any answer: half of a long question's sequences of 13 words, or 0.9 of a short one's
  sequences of 8;
- with the question's answer: 0.15 of a long question's word triples, nearly all words of a short
  one in any order, or so many of its words in place that chance does not explain them (`reworded`).

`reworded` is a sum in nats: for every word found in its place minus the log of its likelihood
after the two words before it, learnt from all rows, so that set phrases of the trade count little;
less a cost for every word not found. A question in wholly other words is not found by any of these.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from fintune.console import warn
from fintune.data.ngrams import Hashes, Integers, asked, hash64, normal, passage, sequences, words
from fintune.data.schema import Rejected, to_messages
from fintune.data.texts import mask_messages
from fintune.errors import DataError
from fintune.example import Example, Message
from fintune.formats import parse
from fintune.sources import Source

LONG_WORDS, LONG, SHORT = 40, 13, 8
"""A question of at least 40 own words is compared by sequences of 13, a shorter one of 8."""

TEMPLATE_WORDS, TEMPLATE_QUESTIONS, TEMPLATE_PASSAGES = 5, 12, 8
"""A sequence of 5 words is a template in more than 12 questions of one benchmark (a document of
TAT-QA or ConvFinQA carries fewer), or in more than 8 passages of the rows."""

COVERED, COVERED_SHORT, TRIPLES = 0.5, 0.9, 0.15
"""Least share of a question's sequences. Of a long question's triples 0.34 are left where 30 % of
its words were replaced; short questions of one benchmark share most of their words anyway."""

CANDIDATE, SAME_WORDS = 0.25, 0.92
"""Share of a short question's words, by inverse document frequency, from which places are compared,
and from which the row is the question in another order."""

REWORDED, MISSING, ANSWER, ANSWER_WORDS = 32.0, 3.0, 20.0, 4
"""Nats that make a row a rewording; cost of a word not found; an answer of at least 4 words, such
as a definition, is the question's own and counts 20. Chosen on the real sample, so that it loses
under 0.5 % of its rows, and on planted rewordings; see bench/prepare.py siblings, contamination."""

DRIFT = 2
"""Words by which a place may shift, because a replaced token may have been two words."""

UNSEEN = 2.0
"""Weight of the shorter context's likelihood, in occurrences of the longer one."""

FEWEST_WORDS = 3
ROWS_A_PRODUCT = 2000
Found = tuple[Integers, Integers, Any]
"""Indices of rows, indices of questions and scores of all pairs, equally long."""


def read_benchmarks(sources: list[Source], *, redact: bool = False) -> list[Example]:
    """Questions of the benchmarks, with their answers.

    Args:
        redact: mask personal data, as in the rows that they are compared with.

    Raises:
        DataError: a benchmark without one readable question.
    """
    questions: list[Example] = []
    for source in sources:
        rows = [row for batch in source.batches() for row in batch]
        found = [each for row in rows if asked(each := _question(source, *row, redact)).strip()]
        if not found:
            raise DataError(
                f"benchmark {source.name} holds no readable question",
                fix="name its columns: data.benchmarks: [{path: ..., columns: {user: QUESTION}}]",
            )
        if unread := len(rows) - len(found):
            warn(f"benchmark {source.name}: {unread} rows hold no readable question: not compared")
        questions += found
    return questions


def _question(source: Source, line: int, given: Any, redact: bool) -> Example:
    raw, messages = parse(given), tuple[Message, ...]()
    if isinstance(raw, dict):  # a yes or no is an answer here
        raw = {name: str(cell) if isinstance(cell, bool) else cell for name, cell in raw.items()}
    with contextlib.suppress(Rejected):
        messages = to_messages(raw, source.config.columns)
    return Example(source.name, line, "", mask_messages(messages)[0] if redact else messages)


def contaminated(examples: list[Example], questions: list[Example]) -> dict[int, dict[str, Any]]:
    """Index of every contaminated row -> it and its nearest question by the first measure that hit.

    The keys: source, line, row_sha256, measure, score, benchmark, benchmark_line, and the ends of
    both texts.
    """
    hits: dict[int, dict[str, Any]] = {}
    if not examples or not questions:
        return hits
    rows = [words(asked(example)) for example in examples]
    texts = [words(asked(question)) for question in questions]
    own = [*zip(texts, _own_places(rows, examples, texts), strict=True)]
    long = np.array([len(places) >= LONG_WORDS for _, places in own])
    answers, row_answers = (
        _hashes(each.messages[-1].content for each in texts) for texts in (questions, examples)
    )

    def same_answer(found: Found) -> Found:
        return _where(found, row_answers[found[0]] == answers[found[1]])

    similar = same_answer(_sequences(rows, own, 1, ~long, CANDIDATE))
    sizes, most = np.array(list(map(len, rows))), np.array([2 * len(text) + 20 for text in texts])
    similar = _where(similar, sizes[similar[0]] <= most[similar[1]])
    evidence = [ANSWER * (len(q.messages[-1].content.split()) >= ANSWER_WORDS) for q in questions]
    for measure, found in (
        (f"{LONG}-grams", _sequences(rows, own, LONG, long, COVERED)),
        (f"{SHORT}-grams", _sequences(rows, own, SHORT, ~long, COVERED_SHORT)),
        ("3-grams", same_answer(_sequences(rows, own, 3, long, TRIPLES))),
        ("same words", _where(similar, similar[2] >= SAME_WORDS)),
        ("reworded", _reworded(rows, own, similar, evidence)),
    ):
        for at, of, score in sorted(zip(*found, strict=True), key=lambda pair: -pair[2]):
            row, question = examples[at], questions[of]
            hit = {name: getattr(row, name) for name in ("source", "line", "row_sha256")}
            hit |= {"benchmark": question.source, "benchmark_line": question.line}
            hit |= {"measure": measure, "score": round(float(score), 3)}
            hit |= {"row_text": asked(row)[-300:], "benchmark_text": asked(question)[-300:]}
            hits.setdefault(int(at), hit)
    return hits


def _hashes(texts: Iterable[str]) -> Hashes:
    return np.array([hash64(normal(text)) for text in texts], np.uint64)


def _where(found: Found, chosen: Any) -> Found:
    row, question, score = found
    return row[chosen], question[chosen], score[chosen]


def _own_places(rows: list[Hashes], examples: list[Example], texts: list[Hashes]) -> list[Integers]:
    """Places of the words of each question that no template covers; of all if they are too few.

    A template is a sequence of 5 words in many questions, or in many passages of the rows.
    """
    found = [np.unique(sequences(text, TEMPLATE_WORDS)) for text in texts]
    wanted, often = np.unique(np.concatenate(found), return_counts=True)
    where, what = _places([sequences(row, TEMPLATE_WORDS) for row in rows], wanted)
    _, passages = np.unique(_hashes(map(passage, examples)), return_inverse=True)
    pairs = np.unique(what * len(rows) + passages[where]) // len(rows)
    spread = np.bincount(pairs, minlength=len(wanted))
    template = {*wanted[(often > TEMPLATE_QUESTIONS) | (spread > TEMPLATE_PASSAGES)].tolist()}
    own = []
    for text in texts:
        is_template = [each in template for each in sequences(text, TEMPLATE_WORDS).tolist()]
        covered = np.convolve(is_template, np.ones(min(TEMPLATE_WORDS, len(text))))
        places = np.flatnonzero(covered == 0)
        own.append(places if len(places) >= FEWEST_WORDS else np.arange(len(text)))
    return own


def _sequences(rows: list[Hashes], own: list[Any], length: int, chosen: Any, least: float) -> Found:
    """Rows that hold at least a share of the sequences of the `chosen` questions.

    A question's sequences are those of which at least half, or else any, of the words are its own.
    """
    wanted = []
    for (text, places), is_chosen in zip(own, chosen, strict=True):
        size = min(length, len(text))
        count = np.convolve(np.bincount(places, minlength=len(text)), np.ones(size), "valid")
        found = sequences(text, size)[count >= min(size / 2, count.max())]
        wanted.append(np.unique(found) if is_chosen else found[:0])
    return _overlaps([np.unique(sequences(row, length)) for row in rows], wanted, least)


def _reworded(rows: list[Hashes], own: list[Any], pairs: Found, answer: list[float]) -> Found:
    """Pairs whose words in place chance does not explain; the score is in nats."""
    surprise, scores = _surprise(rows), []
    for row, question in zip(*pairs[:2], strict=True):
        text, places = own[question]
        mine, other = np.nonzero(text[places][:, None] == rows[row])
        shift = other - places[mine]
        # The shift of most words, give or take DRIFT.
        near = np.convolve(np.bincount(shift - shift.min()), np.ones(2 * DRIFT + 1), "same")
        there = np.abs(shift - shift.min() - near.argmax()) <= DRIFT
        kept, first = np.unique(mine[there], return_index=True)
        found = surprise[row][other[there][first]].sum()
        scores.append(found + answer[question] - MISSING * (len(places) - len(kept)))
    score = np.array(scores)
    return _where((*pairs[:2], score), score >= REWORDED)


def _surprise(rows: list[Hashes]) -> list[Any]:
    """Minus the log likelihood (nats) of every word of every row, given the two before it.

    Learnt from all rows but the occurrence itself, interpolated from short to long contexts.
    """
    _, word, often = np.unique(np.concatenate(rows), return_inverse=True, return_counts=True)
    likely, context = (often[word] - 0.5) / len(word), np.zeros_like(word)
    for back in (1, 2):
        _, context = np.unique(context * len(often) + np.roll(word, back), return_inverse=True)
        what = context * len(often) + word
        _, found, count = np.unique(what, return_inverse=True, return_counts=True)
        others = np.bincount(context)[context] - 1
        likely = (count[found] - 1 + UNSEEN * likely) / (others + UNSEEN)
    return np.split(-np.log(likely), np.cumsum([len(row) for row in rows])[:-1])


def _places(sets: list[Hashes], wanted: Hashes) -> tuple[Integers, Integers]:
    """The elements of all sets that are wanted: number of their set, place among the wanted."""
    where = np.repeat(np.arange(len(sets)), [len(hashed) for hashed in sets])
    elements = np.concatenate(sets)
    places = np.searchsorted(wanted, elements)
    known = np.append(wanted, np.uint64(0))[places] == elements
    return where[known], places[known]


def _overlaps(rows: list[Hashes], questions: list[Hashes], least: float) -> Found:
    """Pairs of a row and a question that share at least `least` of the question's elements.

    Elements weigh their inverse document frequency over the rows.
    """
    wanted, count = np.unique(np.concatenate(questions)), len(rows)
    where, places = _places([*rows, *questions], wanted)
    seen = np.bincount(places[where < count], minlength=len(wanted))
    weights = np.sqrt(np.log((2 + count) / (1 + seen)))[places]
    shape = (count + len(questions), len(wanted))
    matrix: Any = csr_matrix((weights, (where, places)), shape=shape)
    columns = matrix[count:].T.tocsr()
    size = np.asarray(columns.multiply(columns).sum(axis=0)).ravel()
    found = []
    for start in range(0, count, ROWS_A_PRODUCT):
        shared = (matrix[start : min(start + ROWS_A_PRODUCT, count)] @ columns).tocoo()
        share = shared.data / size[shared.col]
        enough = share >= least
        found.append((start + shared.row[enough], shared.col[enough], share[enough]))
    row, question, share = map(np.concatenate, zip(*found, strict=True))
    return row, question, share
