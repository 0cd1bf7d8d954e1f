"""Personal data: found by form and checksum, then masked or a reason to drop the row.

Cards carry Luhn's check digit and an issuer's prefix, accounts IBAN's, US routing numbers theirs;
social security numbers exclude what was never issued. Only the kind and the row are ever recorded,
never the value. CUSIP, ISIN, CIK, amounts and dates do not look like any of these: a run of
digits counts only in the grouping people write, or beside a word that says what it is.
"""

import re
from collections.abc import Callable
from functools import cache
from itertools import product
from string import ascii_uppercase

from fintune.data import optional
from fintune.example import Message

# Where a value may begin: also after an escape left in a text, as after a line end (`\n4111 ...`).
_AFTER, _WORD = r"(?<![\w.,$/-](?<!\\[nrt]))", r"(?<!\w(?<!\\[nrt]))"
_CARD = re.compile(
    _AFTER + r"(?:4\d{3}|5[1-5]\d{2}|2[2-7]\d{2}|6011|65\d{2}|3[47]\d{2}|3(?:0[0-5]|[689]\d)\d)"
    r"(?:[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}|[ -]?\d{6}[ -]?\d{4,5}|\d{9,12})(?![\w%]|[.,]\d)"
)
_SSN = re.compile(_AFTER + r"\d{3}([- ])\d{2}\1\d{4}(?![\w/-]|[.,]\d)")
_NINE = r"\W{0,3}(?:is|was|of|:|#)?\W{0,3}(\d{9})(?!\d)"
_BARE_SSN = re.compile(_WORD + r"(?:SSN|social security (?:number|no\.?))" + _NINE, re.I)
_ROUTE = r"(?:routing|ABA|RTN|transit)(?: (?:transit|routing|number|no\.?|code|#)){0,3}"
_ROUTING = re.compile(_WORD + _ROUTE + _NINE, re.I)
_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9-]*\.)+[A-Za-z]{2,24}(?![\w-])"
)
_YEARS = r"\(?(?:19|20)\d\d(?: |[/-](?:19|20)?\d\d(?!\d))|\d\d?[/-]\d\d?[/-](?:19|20)\d\d(?!\d)"
_PHONE = re.compile(
    r"(?=[\d(+cfmpt])(?:"  # a third of the time, as most letters begin none
    rf"{_AFTER}(?:\+?1[ .-]?)?(?:\(\d{{3}}\) ?|\d{{3}}[.-])\d{{3}}[ .-]\d{{4}}(?![\w%/-]|[.,]\d)"
    rf"|{_AFTER}\+(?!1[ .-]?\d{{3}})[1-9]\d{{0,2}}(?:[ .-]\(?\d{{1,8}}\)?){{2,5}}(?![\w%/-]|[.,]\d)"
    rf"|(?<!\+){_AFTER}\+[1-9]\d{{9,14}}(?!\d)"
    rf"|{_WORD}(?:call|phone|ph|tel|telephone|mobile|cell|fax)\b"
    r"(?: (?:number|no\.?|me at|us at|at|is))*[ .:\\\"']{1,5}(\+?\d{10,13})(?!\d)"
    rf"|{_WORD}(?:phone|ph|tel|telephone|fax)(?:\.:?|[\\\"']{{0,2}}:) ?[\\\"']{{0,2}}(?!{_YEARS})"
    r"(\+?\(?\d[\d ()/-]{6,16}\d)(?![\d%]|[.,]\d))",
    re.I,
)


def _valid_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    luhn = optional("stdnum.luhn", "data.pii", "off")
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and bool(luhn.is_valid(digits))


def _valid_phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2


def _iban() -> re.Pattern[str]:
    """An account number has its country's length: what follows it may look like more of it."""
    registry = optional("stdnum.numdb", "data.pii", "off").get("iban")
    forms = []
    for code in map("".join, product(ascii_uppercase, repeat=2)):
        structure = registry.info(code)[0][1].get("bban", "")  # such as 4!a14!n
        if length := sum(map(int, re.findall(r"(\d+)!", structure))):
            forms.append(rf"{code}\d\d(?: ?[A-Z0-9]){{{length}}}")
    return re.compile(rf"{_WORD}(?=[A-Z]{{2}}\d\d)(?:{'|'.join(forms)})(?!\w)")


@cache
def _kinds() -> tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...]:
    key = ("data.pii", "off")
    iban, ssn = optional("stdnum.iban", *key), optional("stdnum.us.ssn", *key)
    return (
        ("email", _EMAIL, bool),
        ("iban", _iban(), lambda text: bool(iban.is_valid(text, check_country=False))),
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
        for found in [*pattern.finditer(text)][::-1]:
            groups = (group for group in found.groups() if group and group.strip(" -"))
            value = next(groups, found[0])
            if valid(value):
                kinds.add(kind)
                masked = found[0].replace(value, f"[{kind.upper()}]")
                text = text[: found.start()] + masked + text[found.end() :]
    return text, kinds


def mask_messages(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], set[str]]:
    """All messages masked, and the kinds found in any."""
    masked = [mask(message.content) for message in messages]
    kinds = set().union(*(found for _, found in masked))
    texts = zip(messages, masked, strict=True)
    return tuple(Message(message.role, text) for message, (text, _) in texts), kinds
