"""The error tree. Every error that a user can meet says what happened, why it matters, what to do.

Each class below names its exit code, 1 where it names none. The command line catches FintuneError
and nothing else: any other exception is a defect of ours and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class FintuneError(Exception):
    """A problem the user can act on.

    Args:
        what: what happened, with the values concerned.
        why: why it matters, where that is not plain from `what`.
        fix: what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n  ".join(part for part in (what, why, fix) if part))


class ConfigError(FintuneError):
    """A config file, key or value cannot be used."""


class UsageError(FintuneError):
    """An option of a command cannot be used, as with what the command line itself refuses."""

    exit_code = 2


class DataError(FintuneError):
    """Rows, files or columns cannot be used."""


class ModelError(FintuneError):
    """A base model, tokenizer, chat template or adapter cannot be used."""


class OutputError(FintuneError):
    """An output folder is taken, unfinished, damaged or belongs to another run."""


class GateRefused(FintuneError):
    """A release gate, a verification or a budget refused."""

    exit_code = 3


class NotFinite(FintuneError):
    """A loss, gradient or weight is NaN or infinite."""

    exit_code = 65


class NoSpace(FintuneError):
    """The output volume is full."""

    exit_code = 74


class Stopped(FintuneError):
    """Stopped on request; the same command continues."""

    exit_code = 75


@contextmanager
def failing(what: str, *kinds: type[Exception], fix: str = "") -> Iterator[None]:
    """Raise what a library raises in the block as a ModelError, with the library's own words.

    Args:
        what: what happened.
        kinds: exceptions of the library.
    """
    try:
        yield
    except kinds as error:
        raise ModelError(f"{what}: {str(error)[:200]}", fix=fix) from None


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Say how to install an extra where the block imports a package of it that is not there.

    Args:
        what: what needs it, such as "serving".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        lacks = f"{what} needs {error.name}, which is not installed"
        raise ConfigError(lacks, fix=f"pip install 'fintune[{extra}]'") from None
