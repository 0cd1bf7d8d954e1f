"""Made-up news of one tone. Sentences are put together from parts, so that a held-out text is
hardly ever one that was trained: a thing, where it went, and by what or for whom."""

from random import Random
from typing import Final

from sample_rows.facts import capital
from sample_rows.words import CITIES, MONTHS, WORDS, Tone

_NEWS: Final = WORDS["news"]
_GOOD_WAY: Final = {"positive": "up", "negative": "down"}


def _moved(rng: Random, tone: Tone) -> str:
    """Something that is good when it grows, or bad when it grows, going the way of the tone."""
    good = rng.randrange(8) > 0
    way = _GOOD_WAY[tone] if good else {"up": "down", "down": "up"}[_GOOD_WAY[tone]]
    thing = rng.choice(_NEWS["good" if good else "bad"])
    verb = rng.choice(_NEWS[way])
    much = rng.choice(("", "", f" by {rng.randrange(3, 60)}%", " more than planned"))
    return f"{thing} at {{c}} {verb}{much}"


def _happened(rng: Random, tone: Tone) -> str:
    """An event: who did what, with a body drawn for it."""
    text: str = rng.choice(_NEWS["events"][tone])
    body, thing = rng.choice(_NEWS["bodies"]), rng.choice(_NEWS["objects"])
    return text.replace("{b}", body).replace("{o}", thing)


def _sentence(rng: Random, tone: Tone) -> str:
    moving = tone != "neutral" and rng.randrange(3) == 0
    text = _moved(rng, tone) if moving else _happened(rng, tone)
    return f"{text}{rng.choice(('', '', *_NEWS['tails']))}"


def news(rng: Random, tone: Tone, num_sentences: int, company: str) -> str:
    """A news text of a tone: a dateline, and sentences that all point the same way."""
    texts: list[str] = []
    while len(texts) < num_sentences:
        if (text := _sentence(rng, tone)) not in texts:
            texts.append(text)
    said = []
    for text in texts:
        values = {
            "n": rng.randrange(3, 60),
            "v": f"${rng.randrange(10, 1000)} million",
            "m": rng.choice(MONTHS),
        }
        said.append(capital(text.format(c=company, **values)))
        company = rng.choice((company, "the company", "the group"))
    head = rng.choice(_NEWS["datelines"]).format(
        city=rng.choice(CITIES),
        d=rng.randrange(1, 29),
        m=rng.choice(MONTHS)[:3],
        y=rng.randrange(2006, 2025),
    )
    return f"{head}{'. '.join(said)}."
