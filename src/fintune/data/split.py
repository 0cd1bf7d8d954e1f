"""Near-duplicates, groups of related rows, and the split into train, validation and test.

*Near-duplicate*: question and answer are each near another row's. What the two questions say
besides instructions must be near too, and numbers, names and words of direction equal.

*Related*: the same longest passage, or most word sequences of the smaller one shared. Sequences
that many different passages share are instructions and are left out.

A row's part is a function of the hash of the document that it names (`context_id`), else of its
longest passage, so adding rows never moves a row.
Related rows of different passages may therefore fall into two parts. None is dropped; those held
out choose the checkpoint (validation), and only groups wholly held out for it decide the verdict.
"""

import re

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


def part_of(passage_hash: int, validation: float, test: float) -> str:
    """`validation`, `test` or `train`, by the shares of all passages that the first two get."""
    at = hash64("split", str(passage_hash)) / 2**64
    return "validation" if at < validation else "test" if at < validation + test else "train"


def split(examples: list[Example], validation: float, test: float) -> list[tuple[str, str]]:
    """The key of every row's group of related rows, and its part.

    A test row of a group that has rows in other parts goes to validation.
    """
    if not examples:
        return []
    hashes = np.array([document(example) for example in examples], np.uint64)
    passages, passage_of = np.unique(hashes, return_inverse=True)
    groups = components(examples, passage_of, len(passages))
    parts = [part_of(int(each), validation, test) for each in passages]
    of_group: dict[int, set[str]] = {}
    for at in passage_of:
        of_group.setdefault(groups[at], set()).add(parts[at])
    placed = []
    for at in passage_of:
        mixed = parts[at] == "test" and len(of_group[groups[at]]) > 1
        part = "validation" if mixed else parts[at]
        placed.append((f"{passages[groups[at]]:016x}", part))
    return placed


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
