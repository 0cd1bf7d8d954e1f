"""Which prompts are answered together: those of one prefix, of like lengths, of few tokens."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

SHARED_TOKENS, SHARED_ROWS = 48, 4
"""Tokens of a common prefix, and prompts that have it, from which on they are a group."""
PART_SHARE = 0.75
"""Rows behind a shared prefix are prefilled with those that are at least as long a share."""
PREFILL_TOKENS = 2048
"""Most tokens of prompts in one forward pass; a longer prompt is one by itself. On two cores 8,192
were a fifth slower."""


class Prompt(Protocol):
    """What has an id and a prompt."""

    @property
    def id(self) -> str: ...
    @property
    def prompt_ids(self) -> list[int]: ...


P = TypeVar("P", bound=Prompt)


def by_prefix(prompts: Iterable[P], kind: Callable[[P], Hashable]) -> deque[deque[P]]:
    """Groups of prompts with a common prefix, and of each kind one of those that have none; the
    longest prompt first, of groups and within each."""
    alike = defaultdict[Hashable, list[P]](list)
    for prompt in sorted(prompts, key=lambda prompt: (-len(prompt.prompt_ids), prompt.id)):
        alike[kind(prompt), *prompt.prompt_ids[:SHARED_TOKENS]].append(prompt)
    groups = defaultdict[Hashable, list[P]](list)
    for key, group in alike.items():
        groups[key if len(group) >= SHARED_ROWS else kind(group[0])] += group
    longest = sorted(groups.values(), key=lambda group: -len(group[0].prompt_ids))
    return deque(map(deque, longest))


def of_like_lengths(prompts: Sequence[P], shared: int) -> list[list[P]]:
    """Cut prompts, the longest first, where they are much shorter behind what they share."""
    parts: list[list[P]] = []
    for prompt in prompts:
        own = len(prompt.prompt_ids) - shared
        if not parts or own < PART_SHARE * (len(parts[-1][0].prompt_ids) - shared):
            parts.append([])
        parts[-1].append(prompt)
    return parts


def of_few_tokens(prompts: Sequence[P], shared: int) -> list[list[P]]:
    """Cut prompts so that no part has more than PREFILL_TOKENS behind what they share, padding
    included."""
    parts: list[list[P]] = [[]]
    longest = 0
    for prompt in prompts:
        own = len(prompt.prompt_ids) - shared
        longest = max(longest, own)
        if parts[-1] and longest * (len(parts[-1]) + 1) > PREFILL_TOKENS:
            parts.append([])
            longest = own
        parts[-1].append(prompt)
    return parts
