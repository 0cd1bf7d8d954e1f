"""The split: groups of related rows, and each row in train, validation or test.

*Related*: the same longest passage, or most word sequences of the smaller one shared. Sequences
that many different passages share are instructions and are left out.

A row's part is a function of the hash of its own longest passage, so adding rows never moves a row.
Related rows of different passages may therefore fall into two parts. None is dropped; those held
out choose the checkpoint (validation), and only groups wholly held out for it decide the verdict.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from fintune.data.ngrams import Integers, asked, hash64, passage, sequences, words
from fintune.example import Example

RELATED_WORDS = 8
"""Words of a sequence that relates two rows, as long as one that two authors rarely both write."""

INSTRUCTION_SPREAD = 4
"""A sequence in more passages than this is an instruction or a set phrase, not a shared text."""

RELATED_SHARE = 0.75
"""Share of the smaller passage's sequences that makes two passages related."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a row goes: the key of its group of related rows, and train, validation or test."""

    group: str
    part: str


def part_of(passage_hash: int, validation: float, test: float) -> str:
    """`validation`, `test` or `train`, by the shares of all passages that the first two get."""
    at = hash64("split", str(passage_hash)) / 2**64
    return "validation" if at < validation else "test" if at < validation + test else "train"


def split(examples: list[Example], validation: float, test: float) -> list[Placed]:
    """Group related rows and place each; a test row of a group with others goes to validation."""
    hashes = np.array([hash64(passage(example)) for example in examples], np.uint64)
    passages, own = np.unique(hashes, return_inverse=True)
    groups = _components(examples, own, len(passages))
    parts = [part_of(int(each), validation, test) for each in passages]
    of_group: dict[int, set[str]] = {}
    for at in own:
        of_group.setdefault(groups[at], set()).add(parts[at])
    placed = []
    for at in own:
        mixed = parts[at] == "test" and len(of_group[groups[at]]) > 1
        part = "validation" if mixed else parts[at]
        placed.append(Placed(f"{passages[groups[at]]:016x}", part))
    return placed


def _components(examples: list[Example], own: Integers, count: int) -> Integers:
    """For every passage the smallest passage it is connected to through shared sequences.

    Args:
        own: the passage of every example, as a number below `count`.
    """
    # A passage and 32 bits of a sequence's hash in one number: tens of millions of them at the
    # caps. A chance meeting of two hashes relates nothing, as most of a passage must be shared.
    found = [
        sequences(words(asked(example)), RELATED_WORDS) >> np.uint64(32) | np.uint64(at << 32)
        for example, at in zip(examples, own.tolist(), strict=True)
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
