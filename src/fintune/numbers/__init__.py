"""Amounts read out of prose, and compared."""

from fintune.numbers.answers import answer_amounts, is_number_answer
from fintune.numbers.compare import NumberVerdict, compare, ungrounded
from fintune.numbers.parse import Amount, read_amounts

__all__ = [
    "Amount",
    "NumberVerdict",
    "answer_amounts",
    "compare",
    "is_number_answer",
    "read_amounts",
    "ungrounded",
]
