"""Texts as sets of numbers: words, word sequences and their hashes, for every comparison.

A sequence of `n` words is one 64-bit hash, computed for a whole text at once. Comparing texts is
then comparing sorted integers, which numpy does for millions a second.
"""

import re
from collections import Counter
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np

from fintune.example import Example

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
OPENING_CHARACTERS = 40
"""A shorter first turn is a greeting: what follows it makes conversations differ."""

SAME_FACTS = 0.7
"""A twin of which 15 % of the words were changed keeps more; rows of one template keep less."""

Integers = np.ndarray[Any, np.dtype[np.int64]]
_WORD = re.compile(r"\w+")
_KEPT_WORDS = """
one two three four five six seven eight nine ten first second third fourth fifth not no never
increase increases increased decrease decreases decreased more less highest lowest most least
before after above below over under up down higher lower
rise rises rose risen fall falls fell fallen gain gains gained loss losses lost
profit profits beat beats miss misses missed buy sell bought sold positive negative
"""
_FIXED = re.compile(
    r"-?\d[\d,]*(?:\.\d+)?%?|\b[A-Z][\w&.-]*|\b(?:" + "|".join(_KEPT_WORDS.split()) + r")\b"
)
_LABEL = re.compile(r"^(?:context|text|input|question|sentence|headline|tweet|news)\s*:\s*", re.I)
_ODD = np.random.default_rng(0).integers(1, 2**63, 64, np.uint64) * np.uint64(2) + np.uint64(1)


def normal(text: str) -> str:
    """A text as it is compared: case and white space do not count."""
    return " ".join(text.casefold().split())


def hash64(*parts: str) -> int:
    """64 bits of BLAKE2b of the parts, kept apart."""
    return int.from_bytes(blake2b("\x1f".join(parts).encode(), digest_size=8).digest(), "big")


_word_hash = cache(hash64)


def fixed(text: str) -> list[str]:
    """What no rewording changes: numbers, names, negations, words of direction; sorted."""
    return sorted(part.replace(",", "").casefold() for part in _FIXED.findall(text))


def same_facts(one: Example, other: Example) -> bool:
    """Whether two questions have SAME_FACTS of the numbers, names and words of direction of the one
    that has more; where neither has any, they have the same."""
    a, b = (Counter(fixed(asked(each))) for each in (one, other))
    return (a & b).total() >= SAME_FACTS * max(a.total(), b.total())


def words(text: str) -> Hashes:
    """Hash of every word of a text, in order."""
    return np.array(list(map(_word_hash, _WORD.findall(text.casefold()))), np.uint64)


def sequences(hashed: Hashes, size: int) -> Hashes:
    """Hash of every run of `size` words, in order; a shorter text is one run."""
    size = min(size, len(hashed))
    if size == 0:
        return hashed
    count = len(hashed) - size + 1
    mixed = np.zeros(count, np.uint64)
    for at in range(size):
        mixed += hashed[at : at + count] * _ODD[at]
    mixed ^= mixed >> np.uint64(29)
    mixed *= _ODD[-1]
    return mixed


def jaccard(one: Hashes, other: Hashes) -> float:
    """Shared elements over all elements, of two arrays taken as sets; empty ones are alike."""
    a, b = np.unique(one), np.unique(other)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared) if len(a) or len(b) else 1.0


def asked(example: Example) -> str:
    """Everything the user says."""
    return "\n".join(message.content for message in example.messages if message.role == "user")


def passage(example: Example) -> str:
    """The row's longest passage, normalised: a document's body, or the sentence to classify.

    Of the first user turns up to one that says something (not only a greeting), as a longer
    conversation opens like a shorter one. A text's first line is left out where others follow,
    because instructions stand there; so the same sentence under two wordings of an instruction
    has one passage. A pure function of the row.
    """
    opening = ""
    for message in example.messages:
        if message.role == "user" and len(opening) < OPENING_CHARACTERS:
            opening += "\n" + message.content
    lines = [line for line in opening.split("\n") if line.strip()]
    best = max(lines[1:] or lines, key=lambda line: (len(line), line))
    return normal(_LABEL.sub("", best))


def document(example: Example) -> int:
    """Hash of the document that a row names, else of its passage."""
    return hash64("document", example.document) if example.document else hash64(passage(example))
