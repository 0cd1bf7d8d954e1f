"""Near-duplicates, groups of related rows, and the split into train, validation and test.

*Near-duplicate*: question and answer are each near another row's. What the two questions say
besides instructions must be near too, and numbers, names and words of direction equal.

*Related*: the same longest passage, or most word sequences of the smaller one shared. Sequences
that many different passages share are instructions and are left out.

A group goes into one part as a whole, by the smallest hash of its documents: those that its rows
name (`context_id`), else its longest passages. So adding a row moves no other one, but where it is
related to them. A group with more rows than a held-out part should have is never held out as a
whole: its rows choose the checkpoint (validation) or are trained on, one passage by one.
"""

import re
from itertools import accumulate

import numpy as np
from datasketch import MinHash, MinHashLSH

from fintune.documents import components
from fintune.example import Example
from fintune.ngrams import asked, document, fixed, hash64, jaccard, sequences, words

NEAR_WORDS = 3
PERMUTATIONS = 128
INSTRUCTION_ROWS = 4
"""A sentence in more rows than this is an instruction."""

TEST_SHARES, LEAST_TEST_SHARE = {500: 0.4, 1000: 0.3, 2000: 0.2, 4000: 0.1}, 0.05
"""Share of the test part where the config says none, below so many rows and beyond: about 200 of
them are tested, which find a gain of some 13 points. In steps, as a step moves rows."""

_SENTENCE = re.compile(r"\n+|(?<=[.?!:;])\s+")


def share_of_test(rows: int) -> float:
    """The share of the test part where the config says none."""
    return next((share for most, share in TEST_SHARES.items() if rows < most), LEAST_TEST_SHARE)


def split(examples: list[Example], shares: dict[str, float]) -> list[tuple[str, str]]:
    """The key of every row's group of related rows, and its part.

    Args:
        shares: the share of all rows that each held-out part gets; the others are `train`.
    """
    if not examples:
        return []
    hashes = np.array([document(example) for example in examples], np.uint64)
    passages, passage_of = np.unique(hashes, return_inverse=True)
    group_of = components(examples, passage_of, len(passages))[passage_of]
    fits = np.bincount(group_of) <= max(1, len(examples) * max(shares.values()))
    placed = []
    for passage, group in zip(passage_of, group_of, strict=True):
        part = part_of(int(passages[group if fits[group] else passage]), shares)
        if part != "validation" and not fits[group]:
            part = "train"
        placed.append((f"{passages[group]:016x}", part))
    return placed


def part_of(document_hash: int, shares: dict[str, float]) -> str:
    """The part of a document by its hash: the shares of all documents that held-out parts get."""
    at = hash64("split", str(document_hash)) / 2**64
    ends = zip(shares, accumulate(shares.values()), strict=True)
    return next((part for part, end in ends if at < end), "train")


def near_duplicates(examples: list[Example], threshold: float) -> dict[int, int]:
    """Index of every row that nearly repeats an earlier one, and that one's index.

    Args:
        examples: rows in hash order; of two near ones the first stays.
        threshold: least Jaccard similarity of word triples, of the questions and of the answers.
    """
    if threshold >= 1:
        return {}
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    texts = [(asked(example), example.messages[-1].content) for example in examples]
    said = [hash64(part) for text, _ in texts for part in set(_SENTENCE.split(text))]
    parts, often = np.unique(np.array(said, np.uint64), return_counts=True)
    instructions = set(parts[often > INSTRUCTION_ROWS].tolist())
    repeats: dict[int, int] = {}
    template = MinHash(PERMUTATIONS, hashfunc=int)
    for at, (question, answer) in enumerate(texts):
        sketch = template.copy()
        triples = sequences(words(f"{question}\n{answer}"), NEAR_WORDS)
        sketch.update_batch((triples >> np.uint64(32)).tolist())
        for other in sorted(index.query(sketch)):
            if _near(texts[at], texts[other], threshold, instructions):
                repeats[at] = other
                break
        else:
            index.insert(at, sketch)
    return repeats


def _near(
    one: tuple[str, str], other: tuple[str, str], threshold: float, instructions: set[int]
) -> bool:
    """Whether answers, the questions' last lines, whole questions and their differing lines are
    near; compared in this order, the cheapest first.

    Args:
        one, other: question and answer.
        instructions: hashes of sentences that do not count in the differing lines: 60 words of
            them would outweigh a short text that says the opposite.
    """
    last = (one[0].rstrip().rsplit("\n", 1)[-1], other[0].rstrip().rsplit("\n", 1)[-1])
    lines = (one[0].split("\n"), other[0].split("\n"))
    left = ([line for line in mine if line not in theirs] for mine, theirs in (lines, lines[::-1]))
    sentences = (_SENTENCE.split("\n".join(kept)) for kept in left)
    differing = [
        " ".join(part for part in parts if hash64(part) not in instructions) for parts in sentences
    ]
    return all(
        fixed(a) == fixed(b)
        and jaccard(sequences(words(a), NEAR_WORDS), sequences(words(b), NEAR_WORDS)) >= threshold
        for a, b in ((one[1], other[1]), last, (one[0], other[0]), differing)
    )
