"""The terminal chat: who answers, what is remembered, and only the answer on standard output."""

import io
from unittest import mock

import tiny


def test_chat_answers_as_adapter_base_or_both(chain: tiny.Chain) -> None:
    def talk(*lines: str) -> tiny.Said:
        typed = io.StringIO("".join(f"{line}\n" for line in lines))
        with mock.patch("sys.stdin", typed):
            return tiny.fintune("chat", chain.release, "--base", tiny.base())

    ask = "What is EBITDA?"
    adapter = talk(ask, "/quit", "never read").out
    plain = talk("/base", ask).out
    assert adapter and plain and adapter != plain
    assert talk("/both", ask).out == plain + adapter
    assert talk(ask, "/reset", "/nonsense", ask).out == adapter * 2
    assert talk(ask, ask).out != adapter * 2  # it remembers
    long = talk("EBITDA " * 3000)
    assert (long.code, "no space in the context of 2048" in long.err) == (1, True), long.err
