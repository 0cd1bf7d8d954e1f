"""Amounts read out of prose, and compared."""

from fintune.numbers.compare import answer_amounts, compare, is_number_answer, ungrounded
from fintune.numbers.parse import Amount, read_amounts

__all__ = ["Amount", "answer_amounts", "compare", "is_number_answer", "read_amounts", "ungrounded"]
