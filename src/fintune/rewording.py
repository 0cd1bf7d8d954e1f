"""Rows that repeat a benchmark's questions, verbatim or reworded.

A question is compared by its distinctive words: templates (instructions and option lists, which
many questions of the file or many passages of the rows share) are left out. A row is contaminated
when it holds

- with any answer: half of a long question's sequences of 13 words, or 0.9 of a short one's
  sequences of 8;
- with the question's answer: 0.15 of a long question's word triples, nearly all words of a short
  one in any order, or so many of its words in order that chance does not explain them (`reworded`).

`reworded` is a log likelihood ratio in nats: the sum, over the question's words that the row has in
order, of minus the log of their likelihood after the two words before them (estimated from all
rows, so that set phrases of finance count little), less a cost for every word that it lacks. A
question in wholly other words is detected by none of these.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from fintune.example import Example
from fintune.ngrams import Hashes, Integers, asked, hash64, normal, passage, sequences, words

LONG_WORDS, LONG, SHORT = 40, 13, 8
"""A question of 40 distinctive words or more is compared by sequences of 13, a shorter one of 8."""

TEMPLATE_WORDS, TEMPLATE_QUESTIONS, TEMPLATE_PASSAGES = 5, 12, 8
"""A sequence of 5 words is a template in more than 12 questions of one benchmark (a document of
TAT-QA or ConvFinQA carries fewer), or in more than 8 passages of the rows."""

COVERED, COVERED_SHORT, TRIPLES = 0.5, 0.9, 0.15
"""Least share of a question's sequences. Of a long question's triples 0.34 are left where 30 % of
its words were replaced; short questions of one benchmark share most of their words anyway."""

CANDIDATE, SAME_WORDS = 0.25, 0.92
"""Share of a short question's words, by inverse document frequency, from which their order is
compared, and from which the row is the question in another order."""

REWORDED, MISSING, ANSWER, ANSWER_WORDS = 32.0, 3.0, 20.0, 4
"""Nats that make a row a rewording; cost of a word that is missing; an equal answer of at least 4
words, such as a definition, rarely answers another question and counts 20. Chosen on the real
sample, so that it loses under 0.5 % of its rows, and on planted rewordings; see bench/prepare.py
siblings, contamination."""

MOST_SHIFT = 2
"""Words by which a word's offset may differ from the mode of all: a replaced token may have been
two words."""

UNSEEN = 2.0
"""Weight of the shorter context's likelihood, in occurrences of the longer one."""

FEWEST_WORDS = 3
ROWS_A_PRODUCT = 2000
Texts = list[Hashes]
"""The words of many texts."""

Questions = list[tuple[Hashes, Integers]]
"""The words of every question, and the positions of its distinctive ones."""

Pairs = tuple[Integers, Integers, Any]
"""Pairs of a row and a question: index of the row, of the question, and score, each (pairs,)."""


def contaminated(
    examples: list[Example], questions: list[Example], *, same_answer: bool = False
) -> dict[int, dict[str, Any]]:
    """Compare rows with the questions of benchmarks.

    Args:
        same_answer: compare with each other what has one answer alone, and not by the same words
            in any order.

    Returns:
        Index of every contaminated row -> what it repeats, by the first measure that applies and of
        its questions the one of the highest score: source, line, row_sha256 of the row; measure,
        score; benchmark, benchmark_line; row_text, benchmark_text: the ends of their texts.
    """
    hits: dict[int, dict[str, Any]] = {}
    questions = [each for each in questions if len(words(asked(each)))]  # "?" repeats nothing
    if not examples or not questions:
        return hits
    rows = [words(asked(example)) for example in examples]
    texts = [words(asked(question)) for question in questions]
    compared = [*zip(texts, _distinctive(rows, examples, texts), strict=True)]
    long = np.array([len(positions) >= LONG_WORDS for _, positions in compared])
    answers, row_answers = (
        _hashes(each.messages[-1].content for each in texts) for texts in (questions, examples)
    )

    def answered_so(pairs: Pairs) -> Pairs:
        return _where(pairs, row_answers[pairs[0]] == answers[pairs[1]])

    similar = answered_so(_sequences(rows, compared, 1, ~long, CANDIDATE))
    sizes, most = np.array(list(map(len, rows))), np.array([2 * len(text) + 20 for text in texts])
    similar = _where(similar, sizes[similar[0]] <= most[similar[1]])
    evidence = [ANSWER * (len(q.messages[-1].content.split()) >= ANSWER_WORDS) for q in questions]
    measured = [
        (f"{LONG}-grams", _sequences(rows, compared, LONG, long, COVERED)),
        (f"{SHORT}-grams", _sequences(rows, compared, SHORT, ~long, COVERED_SHORT)),
        ("3-grams", answered_so(_sequences(rows, compared, 3, long, TRIPLES))),
        ("reworded", _reworded(rows, compared, similar, evidence)),
    ]
    if same_answer:
        measured = [(measure, answered_so(pairs)) for measure, pairs in measured]
    else:
        measured.insert(3, ("same words", _where(similar, similar[2] >= SAME_WORDS)))
    for measure, pairs in measured:
        for at, of, score in sorted(zip(*pairs, strict=True), key=lambda pair: -pair[2]):
            row, question = examples[at], questions[of]
            hit = {name: getattr(row, name) for name in ("source", "line", "row_sha256")}
            hit |= {"benchmark": question.source, "benchmark_line": question.line}
            hit |= {"benchmark_sha256": question.row_sha256}
            hit |= {"measure": measure, "score": round(float(score), 3)}
            hit |= {"row_text": asked(row)[-300:], "benchmark_text": asked(question)[-300:]}
            hits.setdefault(int(at), hit)
    return hits


def _hashes(texts: Iterable[str]) -> Hashes:
    return np.array([hash64(normal(text)) for text in texts], np.uint64)


def _where(pairs: Pairs, chosen: Any) -> Pairs:
    row, question, score = pairs
    return row[chosen], question[chosen], score[chosen]


def _distinctive(rows: Texts, examples: list[Example], texts: Texts) -> list[Integers]:
    """Positions of the words of each question that no template covers; of all if they are too few.

    A template is a sequence of 5 words in many questions, or in many passages of the rows.

    Args:
        rows, texts: words of every row and of every question.
        examples: the rows.
    """
    of_questions = [np.unique(sequences(text, TEMPLATE_WORDS)) for text in texts]
    wanted, often = np.unique(np.concatenate(of_questions), return_counts=True)
    where, what = _occurrences([sequences(row, TEMPLATE_WORDS) for row in rows], wanted)
    _, passages = np.unique(_hashes(map(passage, examples)), return_inverse=True)
    pairs = np.unique(what * len(rows) + passages[where]) // len(rows)
    spread = np.bincount(pairs, minlength=len(wanted))
    template = {*wanted[(often > TEMPLATE_QUESTIONS) | (spread > TEMPLATE_PASSAGES)].tolist()}
    distinctive = []
    for text in texts:
        is_template = [each in template for each in sequences(text, TEMPLATE_WORDS).tolist()]
        covered = np.convolve(is_template, np.ones(min(TEMPLATE_WORDS, len(text))))
        positions = np.flatnonzero(covered == 0)
        distinctive.append(positions if len(positions) >= FEWEST_WORDS else np.arange(len(text)))
    return distinctive


def _sequences(rows: Texts, questions: Questions, length: int, chosen: Any, least: float) -> Pairs:
    """Rows that hold at least a share of the sequences of the `chosen` questions.

    A question's sequences are those of which at least half of the words are distinctive, or where
    there is none those with the most.

    Args:
        length: words of a sequence.
        chosen: for every question whether it is compared, shape (questions,).
        least: share of a question's sequences, see `_overlaps`.
    """
    wanted = []
    for (text, positions), is_chosen in zip(questions, chosen, strict=True):
        size = min(length, len(text))
        count = np.convolve(np.bincount(positions, minlength=len(text)), np.ones(size), "valid")
        distinctive = sequences(text, size)[count >= min(size / 2, count.max())]
        wanted.append(np.unique(distinctive) if is_chosen else distinctive[:0])
    return _overlaps([np.unique(sequences(row, length)) for row in rows], wanted, least)


def _reworded(rows: Texts, questions: Questions, pairs: Pairs, answer: list[float]) -> Pairs:
    """Pairs whose words in the same order chance does not explain.

    Args:
        answer: nats that an equal answer counts, of every question.

    Returns:
        The pairs of at least REWORDED nats, which are their scores.
    """
    surprisal, scores = _surprisal(rows), []
    for row, question in zip(*pairs[:2], strict=True):
        text, positions = questions[question]
        in_question, in_row = np.nonzero(text[positions][:, None] == rows[row])
        offset = in_row - positions[in_question]
        # Words whose offset is the mode of all, give or take MOST_SHIFT.
        near = np.convolve(np.bincount(offset - offset.min()), np.ones(2 * MOST_SHIFT + 1), "same")
        aligned = np.abs(offset - offset.min() - near.argmax()) <= MOST_SHIFT
        kept, first = np.unique(in_question[aligned], return_index=True)
        nats = surprisal[row][in_row[aligned][first]].sum()
        scores.append(nats + answer[question] - MISSING * (len(positions) - len(kept)))
    score = np.array(scores)
    return _where((*pairs[:2], score), score >= REWORDED)


def _surprisal(rows: Texts) -> list[Any]:
    """Minus the log likelihood (nats) of every word of every row, given the two before it.

    A trigram model of all rows but the occurrence itself, interpolated from short to long contexts.
    """
    _, word, often = np.unique(np.concatenate(rows), return_inverse=True, return_counts=True)
    likely, context = (often[word] - 0.5) / len(word), np.zeros_like(word)
    for back in (1, 2):
        _, context = np.unique(context * len(often) + np.roll(word, back), return_inverse=True)
        what = context * len(often) + word
        _, sequence, count = np.unique(what, return_inverse=True, return_counts=True)
        others = np.bincount(context)[context] - 1
        likely = (count[sequence] - 1 + UNSEEN * likely) / (others + UNSEEN)
    return np.split(-np.log(likely), np.cumsum([len(row) for row in rows])[:-1])


def _occurrences(sets: Texts, wanted: Hashes) -> tuple[Integers, Integers]:
    """Where the sets have wanted elements.

    Args:
        wanted: sorted, without repetitions.

    Returns:
        For every occurrence the index of its set and of its element in `wanted`.
    """
    where = np.repeat(np.arange(len(sets)), [len(hashed) for hashed in sets])
    elements = np.concatenate(sets)
    index = np.searchsorted(wanted, elements)
    known = np.append(wanted, np.uint64(0))[index] == elements
    return where[known], index[known]


def _overlaps(rows: Texts, questions: Texts, least: float) -> Pairs:
    """Pairs of a row and a question that share at least `least` of the question's elements.

    Elements weigh their inverse document frequency over the rows.
    """
    wanted, count = np.unique(np.concatenate(questions)), len(rows)
    where, index = _occurrences([*rows, *questions], wanted)
    seen = np.bincount(index[where < count], minlength=len(wanted))
    weights = np.sqrt(np.log((2 + count) / (1 + seen)))[index]
    shape = (count + len(questions), len(wanted))
    matrix: Any = csr_matrix((weights, (where, index)), shape=shape)
    columns = matrix[count:].T.tocsr()
    size = np.asarray(columns.multiply(columns).sum(axis=0)).ravel()
    blocks = []
    for start in range(0, count, ROWS_A_PRODUCT):
        shared = (matrix[start : min(start + ROWS_A_PRODUCT, count)] @ columns).tocoo()
        share = shared.data / size[shared.col]
        enough = share >= least
        blocks.append((start + shared.row[enough], shared.col[enough], share[enough]))
    row, question, share = map(np.concatenate, zip(*blocks, strict=True))
    return row, question, share
