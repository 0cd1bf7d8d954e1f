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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from fintune.config import DataConfig, SourceConfig
from fintune.console import warn
from fintune.data.ngrams import Hashes, Integers, asked, hash64, normal, passage, sequences, words
from fintune.data.pii import mask
from fintune.data.schema import Rejected, to_messages
from fintune.data.sources import Source, named
from fintune.errors import DataError
from fintune.example import Example

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

REWORDED, MISSING, ANSWER, ANSWER_WORDS = 25.0, 3.0, 20.0, 4
"""Nats that make a row a rewording; cost of a word not found; an answer of at least 4 words, such
as a definition, is the question's own and counts 20. Chosen on the real sample, so that it loses
under 0.5 % of its rows, and on planted rewordings; see bench/prepare.py siblings, contamination."""

DRIFT = 2
"""Words by which a place may shift, because a replaced token may have been two words."""

FEWEST_WORDS = 3
ROWS_A_PRODUCT = 2000


@dataclass(frozen=True, slots=True)
class Question:
    """One benchmark question: where it is from, its text and answer."""

    benchmark: str
    line: int
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Hit:
    """The nearest question of a contaminated row, and how near by which measure."""

    question: Question
    measure: str
    score: float


Found = tuple[Integers, Integers, Any]
"""Indices of rows, indices of questions and scores of all pairs, equally long."""


def find_benchmarks(config: DataConfig) -> list[Source]:
    """Every file and hub id of `data.benchmarks`; errors as of `find_sources`."""
    return named([SourceConfig(**item.model_dump()) for item in config.benchmarks])


def read_benchmarks(sources: list[Source], *, redact: bool = False) -> list[Question]:
    """Questions of the benchmarks.

    Args:
        redact: mask personal data, as in the rows that they are compared with.

    Raises:
        DataError: a benchmark without one readable question.
    """
    questions: list[Question] = []
    for source in sources:
        found = [_question(source, line, raw, redact) for line, raw in source.rows()]
        readable = [question for question in found if question]
        if not readable:
            raise DataError(
                f"benchmark {source.name} holds no readable question",
                fix="its rows need a column prompt, question, user or messages, or name theirs:"
                " data.benchmarks: [{path: ..., columns: {user: QUESTION, assistant: ANSWER}}]",
            )
        if unread := len(found) - len(readable):
            warn(f"benchmark {source.name}: {unread} rows hold no readable question: not compared")
        questions += readable
    return questions


def _question(source: Source, line: int, raw: Any, redact: bool) -> Question | None:
    if isinstance(raw, dict):  # a yes or no is an answer here
        raw = {name: str(cell) if isinstance(cell, bool) else cell for name, cell in raw.items()}
    try:
        messages = to_messages(raw, source.config.columns)
    except Rejected:
        return None
    text = asked(Example(source.name, line, "", messages))
    if not text.strip():
        return None
    texts = (text, messages[-1].content or str(raw.get("answer", "")))
    return Question(source.name, line, *(mask(each)[0] if redact else each for each in texts))


def contaminated(examples: list[Example], questions: list[Question]) -> dict[int, Hit]:
    """Index of every contaminated row with its nearest question, of the first measure that hit."""
    hits: dict[int, Hit] = {}
    if not examples or not questions:
        return hits
    texts = _texts(examples, questions)
    similar = _same_answer(texts, _words(texts))
    for measure, found in (
        (f"{LONG}-grams", _sequences(texts, LONG, texts.long, COVERED)),
        (f"{SHORT}-grams", _sequences(texts, SHORT, ~texts.long, COVERED_SHORT)),
        ("3-grams", _same_answer(texts, _sequences(texts, 3, texts.long, TRIPLES))),
        ("same words", _where(similar, similar[2] >= SAME_WORDS)),
        ("reworded", _reworded(texts, similar)),
    ):
        for row, question, score in zip(*found, strict=True):
            old = hits.get(int(row))
            if old is None or (old.measure == measure and score > old.score):
                hits[int(row)] = Hit(questions[question], measure, round(float(score), 3))
    return hits


@dataclass(frozen=True, slots=True)
class _Texts:
    """Hashes of the words of all rows and questions, and of their answers."""

    rows: list[Hashes]
    questions: list[Hashes]
    places: list[Integers]
    """Places of a question's own words."""
    long: Any
    row_answers: Hashes
    answers: Hashes
    long_answers: Any


def _texts(examples: list[Example], questions: list[Question]) -> _Texts:
    rows = [words(asked(example)) for example in examples]
    hashed = [words(question.text) for question in questions]
    template = _templates(rows, _hashes(map(passage, examples)), hashed)
    places = [_own_places(each, template) for each in hashed]
    answers = [question.answer for question in questions]
    return _Texts(
        rows=rows,
        questions=hashed,
        places=places,
        long=np.array([len(own) >= LONG_WORDS for own in places]),
        row_answers=_hashes(normal(example.messages[-1].content) for example in examples),
        answers=_hashes(map(normal, answers)),
        long_answers=np.array([len(answer.split()) >= ANSWER_WORDS for answer in answers]),
    )


def _hashes(texts: Iterable[str]) -> Hashes:
    return np.array(list(map(hash64, texts)), np.uint64)


def _templates(rows: list[Hashes], passages: Hashes, questions: list[Hashes]) -> Hashes:
    """Sequences of 5 words in many questions, or in many passages of the rows."""
    found = [np.unique(sequences(each, TEMPLATE_WORDS)) for each in questions]
    wanted, often = np.unique(np.concatenate(found), return_counts=True)
    where, what = _places([sequences(row, TEMPLATE_WORDS) for row in rows], wanted)
    _, passage = np.unique(passages, return_inverse=True)
    pairs = np.unique(what * len(rows) + passage[where]) // len(rows)
    spread = np.bincount(pairs, minlength=len(wanted))
    return wanted[(often > TEMPLATE_QUESTIONS) | (spread > TEMPLATE_PASSAGES)]


def _own_places(hashed: Hashes, template: Hashes) -> Integers:
    """Places of the words that no template sequence covers; of all where that leaves too few."""
    is_template = _find(sequences(hashed, TEMPLATE_WORDS), template)[1]
    covered = np.convolve(is_template, np.ones(min(TEMPLATE_WORDS, len(hashed)))) > 0
    places = np.flatnonzero(~covered)
    return places if len(places) >= FEWEST_WORDS else np.arange(len(hashed))


def _sequences(texts: _Texts, length: int, chosen: Any, least: float) -> Found:
    """Rows that hold at least a share of the sequences of the `chosen` questions.

    A question's sequences are those of which at least half, or else any, of the words are its own.
    """
    wanted = [hashed[:0] for hashed in texts.questions]
    for at in np.flatnonzero(chosen):
        hashed, own = texts.questions[at], np.zeros(len(texts.questions[at]))
        own[texts.places[at]] = 1
        size = min(length, len(hashed))
        count = np.convolve(own, np.ones(size), "valid")
        wanted[at] = np.unique(sequences(hashed, size)[count >= min(size / 2, count.max())])
    held = [np.unique(sequences(row, length)) for row in texts.rows]
    return _overlaps(held, wanted, least)


def _words(texts: _Texts) -> Found:
    """Rows that hold `CANDIDATE` of a short question's words and are not much longer."""
    wanted = [
        np.unique(hashed[places]) if FEWEST_WORDS <= len(places) < LONG_WORDS else hashed[:0]
        for hashed, places in zip(texts.questions, texts.places, strict=True)
    ]
    rows, questions = (np.array(list(map(len, each))) for each in (texts.rows, texts.questions))
    found = _overlaps(list(map(np.unique, texts.rows)), wanted, CANDIDATE)
    return _where(found, rows[found[0]] <= 2 * questions[found[1]] + 20)


def _where(found: Found, chosen: Any) -> Found:
    row, question, score = found
    return row[chosen], question[chosen], score[chosen]


def _same_answer(texts: _Texts, found: Found) -> Found:
    return _where(found, texts.row_answers[found[0]] == texts.answers[found[1]])


def _reworded(texts: _Texts, candidates: Found) -> Found:
    """Candidates whose words in place chance does not explain; the score is the evidence."""
    surprise = _surprise(texts.rows)
    pairs = zip(*candidates[:2], strict=True)
    score = np.array([_evidence(texts, surprise, *pair) for pair in pairs])
    return _where((*candidates[:2], score), score >= REWORDED)


def _evidence(texts: _Texts, surprise: list[Any], row: int, question: int) -> float:
    """Nats for the row being the question with words replaced; see the module."""
    places = texts.places[question]
    mine, other = np.nonzero(texts.questions[question][places][:, None] == texts.rows[row])
    shift = other - places[mine]
    # The shift of most words, give or take DRIFT.
    near = np.convolve(np.bincount(shift - shift.min()), np.ones(2 * DRIFT + 1), "same")
    there = np.abs(shift - shift.min() - near.argmax()) <= DRIFT
    kept, first = np.unique(mine[there], return_index=True)
    evidence = surprise[row][other[there][first]].sum() - MISSING * (len(places) - len(kept))
    return float(evidence + ANSWER * texts.long_answers[question])


def _surprise(rows: list[Hashes]) -> list[Any]:
    """Minus the log likelihood (nats) of every word of every row, given the two before it.

    Learnt from all rows but the occurrence itself, interpolated from short to long contexts after
    Witten and Bell (1991): a context counts against the distinct words that follow it.
    """
    lengths = np.array([len(row) for row in rows])
    _, word, often = np.unique(np.concatenate(rows), return_inverse=True, return_counts=True)
    width, context = len(often) + 1, np.zeros(len(word), np.int64)
    offset = np.arange(len(word)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    likely = (often[word] - 0.5) / max(1, len(word))
    for back in (1, 2):
        before = np.where(offset >= back, np.roll(word, back) + 1, 0)
        _, context = np.unique(context * width + before, return_inverse=True)
        what, found, count = np.unique(
            context * width + word, return_inverse=True, return_counts=True
        )
        seen = count[found] - 1
        kinds = np.bincount(what // width)[context] - (seen == 0)
        all_seen = np.bincount(context)[context] - 1
        weight = np.maximum(1, all_seen + kinds)
        likely = np.where(all_seen > 0, (seen + kinds * likely) / weight, likely)
    return np.split(-np.log(np.maximum(likely, 1e-12)), np.cumsum(lengths)[:-1])


def _find(what: Hashes, wanted: Hashes) -> tuple[Integers, Any]:
    """Place of every element among the sorted wanted ones, and whether it is one of them."""
    places = np.searchsorted(wanted, what)
    return places, np.append(wanted, np.uint64(0))[places] == what


def _places(sets: list[Hashes], wanted: Hashes) -> tuple[Integers, Integers]:
    """The elements of all sets that are wanted: number of their set, place among the wanted."""
    where = np.repeat(np.arange(len(sets)), [len(hashed) for hashed in sets])
    places, known = _find(np.concatenate(sets), wanted)
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
