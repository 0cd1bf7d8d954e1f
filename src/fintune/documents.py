"""Which questions are about the same document: related passages, and documents named by rows."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from scipy.sparse.csgraph import connected_components

from fintune.example import Example
from fintune.ngrams import Integers, asked, document, passage, sequences, words

RELATED_WORDS, INSTRUCTION_SPREAD = 8, 4
"""Words of a sequence that relates two passages, long enough that two authors rarely share one by
chance; in more passages than this it is an instruction or a set phrase, not a shared text."""

EXCERPT_WORDS, EXCERPTS, MOST_SHARED = 24, 64, 0.25
"""Longer sequences, of the passage without its instruction, tell excerpts of one report from rows
of one template, whose names and figures break every long sequence. So they count in as many
passages, up to this share of all."""

RELATED_SHARE = 0.75
"""Share of the smaller passage's sequences that makes two passages related."""


def components(examples: list[Example], passage_of: Integers, count: int) -> Integers:
    """Connected components of passages that share most of the smaller one's sequences.

    Args:
        passage_of: the passage of every example, as a number below `count`.

    Returns:
        For every passage the smallest one of its component, shape (count,).
    """
    excerpts = max(INSTRUCTION_SPREAD, min(EXCERPTS, int(MOST_SHARED * count)))
    links = _links(map(asked, examples), passage_of, count, RELATED_WORDS, INSTRUCTION_SPREAD)
    links += _links(map(passage, examples), passage_of, count, EXCERPT_WORDS, excerpts)
    _, labels = connected_components(links, directed=False)
    smallest = np.full(labels.max() + 1, count)
    np.minimum.at(smallest, labels, np.arange(count))
    return smallest[labels]


def _links(texts: Iterable[str], passage_of: Integers, count: int, length: int, most: int) -> Any:
    """The pairs of passages that share at least RELATED_SHARE of the smaller one's sequences of
    `length` words, of which those in more than `most` passages do not count: a sparse matrix."""
    # 32 bits of a sequence's hash and a passage in one number: tens of millions of them at the
    # caps. A chance meeting of two hashes relates nothing, as most of a passage must be shared.
    low = np.uint64(2**32 - 1)
    numbered = zip(texts, passage_of.tolist(), strict=True)
    keyed = (sequences(words(text), length) & ~low | np.uint64(at) for text, at in numbered)
    pairs = np.concatenate([*keyed])
    pairs.sort()  # in place: each copy of the pairs is 0.1 GB at the caps
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
    where = (pairs & low).astype(np.int32)
    what = np.append(False, (pairs[1:] ^ pairs[:-1]) > low).cumsum(dtype=np.int32)
    del pairs
    spread = np.bincount(what).astype(np.int32)[what]
    size = np.bincount(where[spread <= most], minlength=count)
    shared = (spread > 1) & (spread <= most)
    ones = np.ones(int(shared.sum()), np.int32)
    shape = (count, int(what.max()) + 1)
    matrix: Any = csr_matrix((ones, (where[shared], what[shared])), shape=shape)
    common: Any = (matrix @ matrix.T).tocoo()  # sequences that two passages have in common
    row, column = common.row, common.col
    near = common.data >= RELATED_SHARE * np.minimum(size[row], size[column])
    return csr_matrix((common.data[near], (row[near], column[near])), shape=(count, count))


def document_keys(examples: list[Example], named: list[str]) -> list[str]:
    """The document of every question, one key for all tasks.

    Two questions are about the same one where they name the same, have one passage or related
    texts, and so are those that a chain of such pairs joins. A passage of more questions than
    EXCERPTS, or than MOST_SHARED of all, is an instruction.

    Args:
        named: the document that each question names; one by itself names a text of its own.

    Returns:
        What the first question of each document names.
    """
    if not examples:
        return []
    most = max(INSTRUCTION_SPREAD, min(EXCERPTS, int(MOST_SHARED * len(examples))))
    hashes = np.array([*map(document, examples)], np.uint64)
    _, of, often = np.unique(hashes, return_inverse=True, return_counts=True)
    alone = np.arange(len(examples))
    passages = np.where(often[of] <= most, of, len(often) + alone)
    _, names = np.unique(np.array(named), return_inverse=True)
    keys, ones = (passages, names, components(examples, alone, len(alone))), np.ones(len(alone))
    joined = hstack([csr_matrix((ones, (alone, key))) for key in keys])
    _, labels = connected_components(joined @ joined.T, directed=False)
    _, first, which = np.unique(labels, return_index=True, return_inverse=True)
    return [named[at] for at in first[which]]
