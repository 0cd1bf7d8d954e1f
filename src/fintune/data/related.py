"""Duplicates, which are dropped, and related rows, which stay on one side of the split.

*Duplicate*: question and answer both near another row's, and so is what the question says besides
instructions, with the same numbers, names and words of direction.
*Related*: the same longest passage, or most word sequences of the smaller one shared.
Sequences that many different passages share are instructions and are left out of both.

The side of a row follows from the hash of its own longest passage and nothing else: any rule
that keeps every row where it is, whatever rows are added, can look at that row alone. Related
rows of different passages may then fall on both sides. None is dropped; those held out choose
the checkpoint and never decide the verdict.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from fintune.data import optional
from fintune.data.text import Integers, asked, fixed, hash64, jaccard, passage, sequences, words
from fintune.example import Example

RELATED_WORDS = 8
"""Words of a sequence that relates two rows, as long as one that two authors rarely both write."""

INSTRUCTION_SPREAD = 4
"""A sequence in more passages than this is an instruction or a set phrase, not a shared text."""

RELATED_SHARE = 0.75
"""Share of the smaller passage's sequences that makes two passages related."""

NEAR_WORDS = 3
_SENTENCE = re.compile(r"\n+|(?<=[.?!:;])\s+")
PERMUTATIONS = 128


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the split puts a row: its group of related rows, and train, select or decide."""

    group: str
    side: str


def side(group: int, share: float) -> str:
    """`select`, `decide` or `train` by a passage's hash; `share` of all passages are held out."""
    at = hash64("split", str(group)) / 2**64
    return "train" if at >= share else "select" if at < share / 2 else "decide"


def split(examples: list[Example], share: float) -> list[Placed]:
    """Group related rows and put each on its side; only groups wholly held out may decide."""
    own = np.array([hash64(passage(example)) for example in examples], np.uint64)
    passages, at = np.unique(own, return_inverse=True)
    component = _components(examples, at, len(passages))
    sides = [side(int(group), share) for group in passages]
    of_group: dict[int, set[str]] = {}
    for index in at:
        of_group.setdefault(component[index], set()).add(sides[index])
    return [
        Placed(
            f"{passages[component[index]]:016x}",
            "select"
            if sides[index] == "decide" and len(of_group[component[index]]) > 1
            else sides[index],
        )
        for index in at
    ]


def _components(examples: list[Example], at: Integers, count: int) -> Integers:
    """For every passage the smallest passage it is connected to through shared sequences."""
    # A passage and 32 bits of a sequence's hash in one number: tens of millions of them at the
    # caps. A chance meeting of two hashes relates nothing, as most of a passage must be shared.
    found = [
        sequences(words(asked(example)), RELATED_WORDS) >> np.uint64(32) | np.uint64(own << 32)
        for example, own in zip(examples, at.tolist(), strict=True)
    ]
    pairs = np.unique(np.concatenate(found))
    del found
    where = (pairs >> np.uint64(32)).astype(np.int32)
    _, what = np.unique(pairs.astype(np.uint32), return_inverse=True)
    del pairs
    what = what.astype(np.int32)
    spread = np.bincount(what)[what]
    size = np.bincount(where[spread <= INSTRUCTION_SPREAD], minlength=count)
    shared = (spread > 1) & (spread <= INSTRUCTION_SPREAD)
    ones = np.ones(int(shared.sum()), np.int32)
    matrix: Any = csr_matrix(
        (ones, (where[shared], what[shared])), shape=(count, int(what.max()) + 1)
    )
    both: Any = (matrix @ matrix.T).tocoo()
    near = both.data >= RELATED_SHARE * np.minimum(size[both.row], size[both.col])
    links = coo_matrix((both.data[near], (both.row[near], both.col[near])), shape=(count, count))
    _, labels = connected_components(links, directed=False)
    smallest = np.full(labels.max() + 1, count)
    np.minimum.at(smallest, labels, np.arange(count))
    return smallest[labels]


def near_duplicates(examples: list[Example], threshold: float) -> dict[int, int]:
    """Index of every row that nearly repeats an earlier one, and that one's index.

    Args:
        examples: rows in hash order; of two near ones the first stays.
        threshold: Jaccard similarity of word triples that question and answer must both reach.
    """
    if threshold >= 1:
        return {}
    library = optional("datasketch", "data.near_duplicates", "1")
    index = library.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    texts = [(asked(example), example.messages[-1].content) for example in examples]
    said = [hash64(part) for text, _ in texts for part in set(_SENTENCE.split(text))]
    parts, often = np.unique(np.array(said, np.uint64), return_counts=True)
    instructions = set(parts[often > INSTRUCTION_SPREAD].tolist())
    repeats: dict[int, int] = {}
    template = library.MinHash(PERMUTATIONS, hashfunc=int)
    for at, (question, answer) in enumerate(texts):
        sketch = template.copy()
        both = sequences(words(f"{question}\n{answer}"), NEAR_WORDS)
        sketch.update_batch((both >> np.uint64(32)).tolist())
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
    """Answers, the questions' last lines, whole questions and own parts near, cheapest first.

    A question's own part is its lines that the other has not, without sentences that are
    `instructions`: 60 words of them would outweigh a short text that says the opposite.
    """
    last = (one[0].rstrip().rsplit("\n", 1)[-1], other[0].rstrip().rsplit("\n", 1)[-1])
    lines = (one[0].split("\n"), other[0].split("\n"))
    left = ([line for line in mine if line not in theirs] for mine, theirs in (lines, lines[::-1]))
    sentences = (_SENTENCE.split("\n".join(kept)) for kept in left)
    own = [
        " ".join(part for part in found if hash64(part) not in instructions) for found in sentences
    ]
    return all(
        fixed(a) == fixed(b)
        and jaccard(sequences(words(a), NEAR_WORDS), sequences(words(b), NEAR_WORDS)) >= threshold
        for a, b in ((one[1], other[1]), last, (one[0], other[0]), own)
    )
