"""Made-up personal values with right checksums, in the forms people write them."""

import random
from collections.abc import Iterator

from stdnum import luhn
from stdnum.us import rtn, ssn


def _digits(rng: random.Random, count: int) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(count))


def card(rng: random.Random) -> str:
    """A card number of four issuers, plain or grouped."""
    prefix = rng.choice(["4", "51", "55", "34", "37", "6011", "2221"])
    size = 15 if prefix in ("34", "37") else 16
    body = prefix + _digits(rng, size - len(prefix) - 1)
    number = body + luhn.calc_check_digit(body)
    cuts = (0, 4, 8, 12, 16) if size == 16 else (0, 4, 10, 15)
    groups = [number[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    return rng.choice(["", " ", "-"]).join(groups)


def iban(rng: random.Random) -> str:
    """An account of three countries, plain or grouped by four."""
    country, bank, size = rng.choice([("DE", "", 18), ("GB", "NWBK", 14), ("NL", "ABNA", 10)])
    body = bank + _digits(rng, size)
    remainder = int("".join(str(int(sign, 36)) for sign in f"{body}{country}00")) % 97
    text = f"{country}{98 - remainder:02d}{body}"
    return rng.choice([text, " ".join(text[at : at + 4] for at in range(0, len(text), 4))])


def social(rng: random.Random) -> str:
    """A social security number that could have been issued."""
    while not ssn.is_valid(text := f"{_digits(rng, 3)}-{_digits(rng, 2)}-{_digits(rng, 4)}"):
        continue
    return text


def routing(rng: random.Random) -> str:
    """A bank's routing number with the words around it."""
    while not rtn.is_valid(text := _digits(rng, 9)):
        continue
    return rng.choice(["routing number ", "ABA routing number: ", "RTN "]) + text


def email(rng: random.Random) -> str:
    """An address."""
    name = rng.choice(["john.doe", "a_b", "mary+x", "k-lee"])
    return f"{name}{rng.randrange(99)}@{rng.choice(['example.com', 'bank.co.uk', 'mail.fin.org'])}"


def phone(rng: random.Random) -> str:
    """A number of three countries in common spellings."""
    area, local = rng.randrange(200, 999), f"{rng.randrange(200, 999)}-{_digits(rng, 4)}"
    forms = [f"({area}) {local}", f"{area}-{local}", f"+1 {area}-{local}"]
    forms += [f"{area}.{local.replace('-', '.')}", f"+44 20 7946 {_digits(rng, 4)}"]
    return rng.choice([*forms, f"+49 30 {_digits(rng, 6)}"])


KINDS = {
    "card": card, "iban": iban, "ssn": social,
    "routing_number": routing, "email": email, "phone": phone,
}  # fmt: skip


def personal_values(rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """`count` values with their kinds."""
    for _ in range(count):
        kind = rng.choice(sorted(KINDS))
        yield kind, KINDS[kind](rng)
