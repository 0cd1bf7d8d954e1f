"""Near duplicates: question and answer both near another row's, so that one of them is dropped.

What the two questions say besides instructions must be near too, and numbers, names and words of
direction equal.
"""

import re

import numpy as np

from fintune.data import optional
from fintune.data.ngrams import asked, fixed, hash64, jaccard, sequences, words
from fintune.example import Example

NEAR_WORDS = 3
PERMUTATIONS = 128
INSTRUCTION_ROWS = 4
"""A sentence in more rows than this is an instruction."""

_SENTENCE = re.compile(r"\n+|(?<=[.?!:;])\s+")


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
    instructions = set(parts[often > INSTRUCTION_ROWS].tolist())
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
