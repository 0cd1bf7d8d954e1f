"""Rows that repeat a benchmark's questions, verbatim or reworded.

A question is compared by its own words: instructions and option lists, which many questions of
the file or many passages of the rows share, are stripped first. A row is out when

- it holds half of the question's sequences of 13 words (of a short one 0.9 of those of 8), or
- it gives the question's answer and, for a long question, holds a quarter of its word triples,
  for a short one has nearly all its words (clauses put in another order), or so many unlikely
  ones in their places that a copy with words replaced explains it better than chance. What is
  likely is learnt from the rows themselves, so the trade's set phrases say little.

A question asked again in wholly other words, or with another answer, is found by none of these.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from fintune.console import warn
from fintune.data.raw import parse_block
from fintune.data.rows import Rejected, to_messages
from fintune.data.sources import Source
from fintune.data.text import Hashes, Integers, asked, normal, sequences, words
from fintune.errors import DataError
from fintune.example import Example

LONG_WORDS, LONG, SHORT = 40, 13, 8
"""A question of at least 40 own words is compared by sequences of 13, a shorter one of 8."""

TEMPLATE_WORDS = 5
TEMPLATE_QUESTIONS = 12
"""A sequence of 5 words in more questions of one benchmark than this is its template; a document
of TAT-QA or ConvFinQA carries fewer questions."""

TEMPLATE_PASSAGES = 8
"""A sequence in more passages of the rows than this is an instruction or a set phrase."""

COVERED, COVERED_SHORT = 0.5, 0.9
"""Share of a question's sequences that a row of any answer must hold. Short questions of one
benchmark are often siblings that share most of their words."""

TRIPLES = 0.15
"""Share of a long question's word triples that a row of the same answer must hold. With 30 % of
the words replaced 34 % of the triples are left."""

SAME_WORDS = 0.92
"""Share of a short question's words, by weight, that says: the same, in another order."""

CANDIDATE = 0.25
"""Share of the words by weight below which places are not compared."""

KEPT = 0.7
"""Share of words that a rewording keeps in their places (the rule tested: 30 % replaced)."""

EVIDENCE = 16.0
"""Log likelihood ratio (natural) of `reworded` against `alike by chance` that decides. Chosen on
one half of the sample and of the questions; `bench/prepare.py contamination` reports the other."""

OTHER_NUMBER = 4.0
"""Taken off for a number of the question with another number in its place: so siblings look."""

ANSWER_WORDS, ANSWER_WORD, ANSWER_MOST = 4, 4.0, 30.0
"""An answer of at least 4 words, such as a definition, is the question's own: evidence a word, and
at most. Labels and numbers say nothing here; they follow from the words or are often equal."""

CONTEXT = 3
"""Words of the longest sequences from which a word's likelihood is learnt."""

DRIFT = 2
"""Words by which a place may shift, because a replaced token may have been two words."""

FEWEST_WORDS = 3
CHUNK = 2000


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


def read_benchmarks(sources: list[Source]) -> list[Question]:
    """Questions of the benchmarks; a number is read as its text.

    Raises:
        DataError: a benchmark without one readable question.
    """
    questions: list[Question] = []
    read: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for source in sources:
        path = source.config.path
        for line, raw in (row for batch in source.batches() for row in parse_block(batch)):
            row = raw
            if isinstance(raw, dict):  # answers are compared as text: 42 for 42.0, True
                numbers = {name: n for name, n in raw.items() if isinstance(n, int | float)}
                row = raw | {name: str(n).removesuffix(".0") for name, n in numbers.items()}
            try:
                messages = to_messages(row, source.config.columns, inline_turns=False)
            except Rejected:
                messages = ()
            text = asked(Example(source.name, line, "", messages))
            if not text.strip():
                unread[path] += 1
                continue
            answer = messages[-1].content or str(row.get("answer", ""))
            read[path] += 1
            questions.append(Question(source.name, line, text, answer))
    for path in dict.fromkeys(source.config.path for source in sources):
        if not read[path]:
            raise DataError(
                f"benchmark {path} holds no readable question",
                fix="its rows need a column prompt, question, user or messages, or name theirs:"
                " data.benchmarks: [{path: ..., columns: {user: QUESTION, assistant: ANSWER}}]",
            )
        if unread[path]:
            warn(f"benchmark {path}: {unread[path]} rows hold no readable question: not sought")
    return questions


def contaminated(
    examples: list[Example], passages: Hashes, questions: list[Question]
) -> dict[int, Hit]:
    """Index of every contaminated row with its nearest question.

    Args:
        passages: one number a row, equal where rows share their longest passage.
    """
    if not examples or not questions:
        return {}
    return _Comparison(examples, passages, questions).hits


class _Comparison:
    def __init__(
        self, examples: list[Example], passages: Hashes, questions: list[Question]
    ) -> None:
        self.questions = questions
        self.rows = [words(asked(example)) for example in examples]
        self.asked = [words(question.text) for question in questions]
        template = self._templates(passages)
        self.places = [_own_places(hashed, template) for hashed in self.asked]
        self.own = [h[places] for h, places in zip(self.asked, self.places, strict=True)]
        self.long = np.array([len(own) >= LONG_WORDS for own in self.own])
        answers = [normal(question.answer) for question in questions]
        given = [normal(example.messages[-1].content) for example in examples]
        numbered = {text: number for number, text in enumerate(dict.fromkeys(answers))}
        self.answers = np.array([numbered[text] for text in answers])
        self.given = np.array([numbered.get(text, -1) for text in given])
        size = np.array([len(words(text)) for text in numbered])
        size[size < ANSWER_WORDS] = 0
        self.answer_evidence = np.minimum(ANSWER_WORD * size, ANSWER_MOST)[self.answers]
        self.hits: dict[int, Hit] = {}
        bare = np.array([len(p) == len(h) for p, h in zip(self.places, self.asked, strict=True)])
        self._sequences(LONG, self.long, COVERED, any_answer=True)
        self._sequences(SHORT, ~self.long & ~bare, COVERED_SHORT, any_answer=True)
        self._sequences(SHORT, ~self.long & bare, 1.0, any_answer=True)
        self._sequences(3, self.long, TRIPLES, any_answer=False)
        self._words()

    def _templates(self, passages: Hashes) -> Hashes:
        """Sequences of 5 words in many questions of one file, or in many passages of the rows."""
        of_file: dict[str, list[Hashes]] = {}
        for question, hashed in zip(self.questions, self.asked, strict=True):
            own = np.unique(sequences(hashed, TEMPLATE_WORDS))
            of_file.setdefault(question.benchmark, []).append(own)
        template = []
        for found in of_file.values():
            what, often = np.unique(np.concatenate(found), return_counts=True)
            template.append(what[often > TEMPLATE_QUESTIONS])
        wanted = np.unique(np.concatenate([own for file in of_file.values() for own in file]))
        where, places = _places([sequences(row, TEMPLATE_WORDS) for row in self.rows], wanted)
        _, passage_of = np.unique(passages, return_inverse=True)
        width = len(self.rows) + 1
        pairs = np.unique(places * width + passage_of[where]) // width
        spread = np.bincount(pairs, minlength=len(wanted))
        return np.unique(np.concatenate([*template, wanted[spread > TEMPLATE_PASSAGES]]))

    def _sequences(self, length: int, of: Any, least: float, *, any_answer: bool) -> None:
        """Rows that hold at least a share of the sequences of the questions `of`.

        A question's sequences are those of which at least half the words are its own.
        """
        found = [
            np.unique(_own_sequences(hashed, places, length)) if chosen else hashed[:0]
            for hashed, places, chosen in zip(self.asked, self.places, of, strict=True)
        ]
        held = [np.unique(sequences(row, length)) for row in self.rows]
        matrix = _matrix([*held, *found], np.unique(np.concatenate(found)))
        size = np.array([len(f) for f in found])
        for row, question, shared in _products(matrix, len(self.rows)):
            score = shared / size[question]
            enough = score >= least
            if not any_answer:
                enough &= self.given[row] == self.answers[question]
            for index in np.flatnonzero(enough):
                self._hit(row[index], question[index], f"{length}-grams", score[index])

    def _words(self) -> None:
        """Rows of the same answer whose words are those of a short question."""
        short = [
            np.unique(own) if len(own) >= FEWEST_WORDS and not long else own[:0]
            for own, long in zip(self.own, self.long, strict=True)
        ]
        held = [np.unique(row) for row in self.rows]
        matrix = _matrix([*held, *short], np.unique(np.concatenate(short)))
        count = len(self.rows)
        seen = np.bincount(matrix[:count].indices, minlength=matrix.shape[1])
        matrix.data *= np.sqrt(np.log((1 + count) / (1 + seen)))[matrix.indices]
        weight = np.asarray(matrix[count:].multiply(matrix[count:]).sum(axis=1)).ravel()
        lengths = np.array([len(row) for row in self.rows])
        reach = np.array([2 * len(hashed) + 20 for hashed in self.asked])
        far = max((reach[at] for at in np.flatnonzero(~self.long)), default=0)
        self.surprise = _surprise([row if len(row) <= far else row[:0] for row in self.rows])
        for row, question, shared in _products(matrix, count):
            held_share = shared / np.maximum(weight[question], 1e-9)
            candidate = (held_share >= CANDIDATE) & (self.given[row] == self.answers[question])
            candidate &= lengths[row] <= reach[question]
            for index in np.flatnonzero(candidate):
                at, which = int(row[index]), int(question[index])
                if held_share[index] >= SAME_WORDS:
                    self._hit(at, which, "same words", held_share[index])
                elif (evidence := self._evidence(at, which)) >= EVIDENCE:
                    self._hit(at, which, "reworded", evidence)

    def _evidence(self, row: int, question: int) -> float:
        """Log likelihood ratio that the row is the question with words replaced.

        A word found in its place counts log(0.7 / its likelihood in the row), one not found
        log(0.3), and the answer what it says by itself.
        """
        places, own, theirs = self.places[question], self.own[question], self.rows[row]
        mine, other = np.nonzero(own[:, None] == theirs[None, :])
        if not len(mine):
            return -math.inf
        shift = other - places[mine]
        best = int(_around(np.bincount(shift - shift.min())).argmax()) + shift.min()
        there = np.abs(shift - best) <= DRIFT
        kept, first = np.unique(mine[there], return_index=True)
        missing = np.delete(np.arange(len(own)), kept)
        facing = places[missing[own[missing] & np.uint64(1) == 1]] + best
        facing = facing[(facing >= 0) & (facing < len(theirs))]
        others = np.count_nonzero(_around((theirs & np.uint64(1)).astype(int))[facing])
        return float(
            self.surprise[row][other[there][first]].sum()
            + len(kept) * math.log(KEPT)
            + len(missing) * math.log(1 - KEPT)
            - OTHER_NUMBER * others
            + self.answer_evidence[question]
        )

    def _hit(self, row: int, question: int, measure: str, score: float) -> None:
        """Keep a row's nearest question of the first measure that found it."""
        old = self.hits.get(int(row))
        if old is None or (old.measure == measure and score > old.score):
            found = Hit(self.questions[question], measure, round(float(score), 3))
            self.hits[int(row)] = found


def _around(counts: Integers) -> Integers:
    """The sum of every element and its neighbours up to `DRIFT` away."""
    summed: Integers = np.convolve(counts, np.ones(2 * DRIFT + 1, int))
    return summed[DRIFT : DRIFT + len(counts)]


def _surprise(rows: list[Hashes]) -> list[Any]:
    """Minus the log likelihood (natural) of every word of every row, given the two before it.

    Word sequences of all rows but the one occurrence itself, interpolated from short to long
    after Witten and Bell (1991): a sequence counts against the distinct words that follow its
    context.
    """
    lengths = np.array([len(row) for row in rows])
    _, word, often = np.unique(np.concatenate(rows), return_inverse=True, return_counts=True)
    total, width = len(word), len(often) + 1
    offset = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    likely = (often[word] - 0.5) / max(1, total)
    context = np.zeros(total, np.int64)
    for back in range(1, CONTEXT):
        before = np.where(offset >= back, np.roll(word, back) + 1, 0)
        _, context = np.unique(context * width + before, return_inverse=True)
        what, found, count = np.unique(
            context * width + word, return_inverse=True, return_counts=True
        )
        seen, kinds = count[found] - 1, np.bincount(what // width)[context]
        kinds = kinds - (seen == 0)
        all_seen = np.bincount(context)[context] - 1
        weight = np.maximum(1, all_seen + kinds)
        likely = np.where(all_seen > 0, (seen + kinds * likely) / weight, likely)
    return np.split(-np.log(np.maximum(likely, 1e-12)), np.cumsum(lengths)[:-1])


def _own_places(hashed: Hashes, template: Hashes) -> Integers:
    """Places of the words that no template sequence covers; of all where that leaves too few."""
    if len(hashed) < TEMPLATE_WORDS:
        return np.arange(len(hashed))
    is_template = _found(sequences(hashed, TEMPLATE_WORDS), template)[1]
    covered = np.convolve(is_template, np.ones(TEMPLATE_WORDS, int))[: len(hashed)] > 0
    places = np.flatnonzero(~covered)
    return places if len(places) >= FEWEST_WORDS else np.arange(len(hashed))


def _own_sequences(hashed: Hashes, places: Integers, length: int) -> Hashes:
    """Sequences of a question of which at least half, or else any, of the words are its own."""
    own = np.zeros(len(hashed), int)
    own[places] = 1
    size = min(length, len(hashed))
    count = np.convolve(own, np.ones(size, int), "valid")
    chosen: Hashes = sequences(hashed, size)[count >= min(size / 2, count.max())]
    return chosen


def _found(what: Hashes, wanted: Hashes) -> tuple[Integers, Any]:
    """Place of every element among the sorted wanted ones, and whether it is there."""
    if not len(wanted):
        return np.zeros(len(what), np.int64), np.zeros(len(what), bool)
    places = np.minimum(np.searchsorted(wanted, what), len(wanted) - 1)
    return places, wanted[places] == what


def _places(sets: list[Hashes], wanted: Hashes) -> tuple[Integers, Integers]:
    """The elements of all sets that are wanted: number of their set, place among the wanted."""
    where = np.repeat(np.arange(len(sets)), [len(hashed) for hashed in sets])
    places, known = _found(np.concatenate(sets), wanted)
    return where[known], places[known]


def _matrix(sets: list[Hashes], wanted: Hashes) -> Any:
    """A sparse row of ones for every set, a column for every wanted element."""
    where, places = _places(sets, wanted)
    shape = (len(sets), max(1, len(wanted)))
    return csr_matrix((np.ones(len(where)), (where, places)), shape=shape)


def _products(matrix: Any, rows: int) -> Iterator[tuple[Integers, Integers, Any]]:
    """What every row (the first `rows`) shares with every question (the others), in chunks."""
    questions = matrix[rows:].T.tocsr()
    for start in range(0, rows, CHUNK):
        shared = (matrix[start : min(start + CHUNK, rows)] @ questions).tocoo()
        yield start + shared.row, shared.col, shared.data
