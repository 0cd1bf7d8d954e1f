"""Personal data: found by form and checksum, then masked or a reason to drop the row.

Cards carry Luhn's check digit and an issuer's prefix, accounts IBAN's, US routing numbers theirs;
social security numbers exclude what was never issued. Only the kind and the row are ever recorded,
never the value. CUSIP, ISIN, CIK, amounts and dates do not look like any of these: a run of
digits counts only in the grouping people write, or beside a word that says what it is.
"""

import re
from collections.abc import Callable
from functools import cache

from fintune.data import optional
from fintune.example import Message

_CARD = re.compile(
    r"(?<![\w.,$/-])(?:4\d{3}|5[1-5]\d{2}|2[2-7]\d{2}|6011|65\d{2}|3[47]\d{2}|3(?:0[0-5]|[689]\d)\d)"
    r"(?:[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}|[ -]?\d{6}[ -]?\d{4,5}|\d{9,12})(?![\w%]|[.,]\d)"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?!\w)")
_SSN = re.compile(r"(?<![\w.,$/-])\d{3}([- ])\d{2}\1\d{4}(?![\w/-]|[.,]\d)")
_BARE_SSN = re.compile(
    r"\b(?:SSN|social security (?:number|no\.?))\W{0,3}(?:is|was|of|:|#)?\W{0,3}(\d{9})(?!\d)", re.I
)
_ROUTING = re.compile(
    r"\b(?:routing|ABA|RTN|transit)(?: (?:transit|routing|number|no\.?|code|#)){0,3}"
    r"\W{0,3}(?:is|was|of|:|#)?\W{0,3}(\d{9})(?!\d)",
    re.I,
)
_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9-]*\.)+[A-Za-z]{2,24}(?![\w-])"
)
_PHONE = re.compile(
    r"(?<![\w.,$/-])(?:\+?1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[ .-]\d{4}(?![\w%/-]|[.,]\d)"
    r"|(?<![\w.,$/-])\+(?!1[ .-]?\d{3})[1-9]\d{0,2}(?:[ .-]\(?\d{1,8}\)?){2,5}(?![\w%/-]|[.,]\d)"
    r"|(?<![\w+.,$/-])\+[1-9]\d{9,14}(?!\d)"
    r"|\b(?:call|phone|ph|tel|telephone|mobile|cell|fax)\b(?: (?:number|no\.?|me at|us at|at|is))*"
    r"[ .:]{1,3}(\+?\d{10,13})(?!\d)"
    r"|\b(?:phone|ph|tel|telephone|fax)(?:\.:?|:) ?(?!(?:19|20)\d\d )"
    r"(\+?\(?\d[\d ()/-]{6,16}\d)(?![\d%]|[.,]\d)",
    re.I,
)


def _luhn(digits: str) -> bool:
    return bool(optional("stdnum.luhn", "data.personal_data", "off").is_valid(digits))


def _valid_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and _luhn(digits)


def _valid_phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2


@cache
def _kinds() -> tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...]:
    key = ("data.personal_data", "off")
    iban, ssn = optional("stdnum.iban", *key), optional("stdnum.us.ssn", *key)
    return (
        ("email", _EMAIL, bool),
        ("iban", _IBAN, iban.is_valid),
        ("card", _CARD, _valid_card),
        ("ssn", _SSN, ssn.is_valid),
        ("ssn", _BARE_SSN, ssn.is_valid),
        ("routing_number", _ROUTING, optional("stdnum.us.rtn", *key).is_valid),
        ("phone", _PHONE, _valid_phone),
    )


def mask(text: str) -> tuple[str, set[str]]:
    """A text with every personal value replaced by its kind, such as `[EMAIL]`; and the kinds."""
    kinds: set[str] = set()
    for kind, pattern, valid in _kinds():

        def replace(
            found: re.Match[str], kind: str = kind, valid: Callable[[str], bool] = valid
        ) -> str:
            groups = (group for group in found.groups() if group and group.strip(" -"))
            value = next(groups, found[0])
            if not valid(value):
                return found[0]
            kinds.add(kind)
            return found[0].replace(value, f"[{kind.upper()}]")

        text = pattern.sub(replace, text)
    return text, kinds


def mask_messages(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], set[str]]:
    """All messages masked, and the kinds found in any."""
    masked = [mask(message.content) for message in messages]
    kinds = set().union(*(found for _, found in masked))
    if not kinds:
        return messages, kinds
    texts = zip(messages, masked, strict=True)
    return tuple(Message(message.role, text) for message, (text, _) in texts), kinds
