"""The stage `prepare`, and `inspect` and `dropped`, which read its folder."""

from fintune.files import read_toml

WORDS = read_toml(__file__, "words.toml")
