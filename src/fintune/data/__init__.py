"""Rows in, prepared data out: every row accounted for, nothing leaked, nothing cut in silence."""

from fintune.files import read_toml

WORDS = read_toml(__file__, "words.toml")
