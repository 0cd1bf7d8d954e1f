"""Which questions are about the same document: related passages, and documents named by rows."""

from typing import Any

import numpy as np
from scipy.sparse import bmat, coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from fintune.example import Example
from fintune.ngrams import Integers, asked, hash64, passage, sequences, words

RELATED_WORDS = 8
"""Words of a sequence that relates two rows: long enough that two authors rarely share one by
chance."""

INSTRUCTION_SPREAD = 16
"""A sequence in more passages than this is an instruction or a set phrase, not a shared text."""

RELATED_SHARE = 0.75
"""Share of the smaller passage's sequences that makes two passages related."""


def components(examples: list[Example], passage_of: Integers, count: int) -> Integers:
    """Connected components of passages that share sequences.

    Args:
        passage_of: the passage of every example, as a number below `count`.

    Returns:
        For every passage the smallest one of its component, shape (count,).
    """
    # 32 bits of a sequence's hash and a passage in one number: tens of millions of them at the
    # caps. A chance meeting of two hashes relates nothing, as most of a passage must be shared.
    low = np.uint64(2**32 - 1)
    keyed = [
        sequences(words(asked(example)), RELATED_WORDS) & ~low | np.uint64(at)
        for example, at in zip(examples, passage_of.tolist(), strict=True)
    ]
    pairs = np.concatenate(keyed)
    del keyed
    pairs.sort()  # in place: each copy of the pairs is 0.1 GB at the caps
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
    where = (pairs & low).astype(np.int32)
    what = np.append(False, (pairs[1:] ^ pairs[:-1]) > low).cumsum(dtype=np.int32)
    del pairs
    spread = np.bincount(what).astype(np.int32)[what]
    size = np.bincount(where[spread <= INSTRUCTION_SPREAD], minlength=count)
    shared = (spread > 1) & (spread <= INSTRUCTION_SPREAD)
    ones = np.ones(int(shared.sum()), np.int32)
    matrix: Any = csr_matrix(
        (ones, (where[shared], what[shared])), shape=(count, int(what.max()) + 1)
    )
    common: Any = (matrix @ matrix.T).tocoo()  # sequences that two passages have in common
    row, column = common.row, common.col
    near = common.data >= RELATED_SHARE * np.minimum(size[row], size[column])
    links = coo_matrix((common.data[near], (row[near], column[near])), shape=(count, count))
    _, labels = connected_components(links, directed=False)
    smallest = np.full(labels.max() + 1, count)
    np.minimum.at(smallest, labels, np.arange(count))
    return smallest[labels]


def document_keys(examples: list[Example], named: list[str]) -> list[str]:
    """The document of every question, one key for all tasks.

    Two questions are about the same one where they name the same, or where their passages are
    related, and so are those that a chain of such pairs joins.

    Args:
        named: the document that each question names; one by itself names a text of its own.

    Returns:
        What the first question of each document names.
    """
    if not examples:
        return []
    hashes = np.array([hash64(passage(example)) for example in examples], np.uint64)
    passages, of = np.unique(hashes, return_inverse=True)
    related = components(examples, of, len(passages))[of]
    _, name = np.unique(np.array(named), return_inverse=True)
    shape = (len(passages), int(name.max()) + 1)
    links: Any = csr_matrix((np.ones(len(name)), (related, name)), shape=shape)
    both = bmat([[None, links], [links.T, None]])
    _, labels = connected_components(both, directed=False)
    first: dict[int, str] = {}
    return [
        first.setdefault(at, key) for at, key in zip(labels[related].tolist(), named, strict=True)
    ]
