"""Rows in, prepared data out: every row accounted for, nothing leaked, nothing cut in silence."""

import importlib
from typing import Any

from fintune.errors import ConfigError
from fintune.files import read_toml

WORDS = read_toml(__file__, "words.toml")


def optional(module: str, key: str, off: str) -> Any:
    """Import a module of the extra `data`.

    Args:
        key: the config key that asks for it.
        off: the value of the key that does without.

    Raises:
        ConfigError: it is not installed. There is no silent fallback: rows that one machine
            drops and another keeps would be two data sets under one name.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ConfigError(
            f"{key} needs the package of {module.split('.')[0]}, which is not installed",
            fix=f"pip install 'fintune[data]', or set {key}={off}",
        ) from None
