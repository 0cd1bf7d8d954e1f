"""The words of `words.toml`, typed.

Company names are put together from syllables (about 70,000 stems), so that a figure can only be
found in the text at hand and never in the weights.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from fintune.files import read_toml

Kind = Literal["money", "percent", "per_share", "count"]
Tone = Literal["positive", "negative", "neutral"]
TONES: Final[tuple[Tone, ...]] = get_args(Tone)


@dataclass(frozen=True, slots=True)
class Metric:
    """A reported figure: its usual name, its unit, and the name it is asked for by at times."""

    name: str
    kind: Kind
    alias: str

    @property
    def was(self) -> str:
        """The verb that agrees with the name: "revenue was", "total assets were"."""
        plural = self.name.endswith("s") and self.name != "cost of sales"
        plural = plural or self.name == "dividends paid"
        return "were" if self.kind == "money" and plural else "was"


WORDS: Final = read_toml(__file__, "words.toml")
_KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

METRICS: Final = tuple(
    Metric(name, kind, alias) for kind in _KINDS for name, alias in WORDS["metrics"][kind]
)
NAME_HEADS: Final[tuple[str, ...]] = tuple(WORDS["names"]["heads"].split())
# Every other name has no middle syllable.
_MIDDLES: Final[list[str]] = WORDS["names"]["middles"].split()
NAME_MIDDLES: Final[tuple[str, ...]] = ("",) * len(_MIDDLES) + tuple(_MIDDLES)
NAME_TAILS: Final[tuple[str, ...]] = tuple(WORDS["names"]["tails"].split())
SECTORS: Final[tuple[str, ...]] = tuple(WORDS["names"]["sectors"].split())
CITIES: Final[tuple[str, ...]] = tuple(WORDS["names"]["cities"])
LEGAL_FORMS: Final[tuple[str, ...]] = tuple(WORDS["names"]["legal_forms"].split())
MONTHS: Final[tuple[str, ...]] = tuple(WORDS["names"]["months"].split())
# (term, meaning, reason) and (name, top, bottom)
TERMS: Final[list[tuple[str, str, str]]] = WORDS["terms"]["all"]
RATIOS: Final[list[tuple[str, str, str]]] = WORDS["ratios"]["all"]
