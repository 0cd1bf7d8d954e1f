"""The terminal chat: who answers, what is remembered, and only the answer on standard output."""

import io

import pytest
from tiny_release import built

from fintune.errors import ModelError
from fintune.serve.repl import chat


def test_chat_answers_as_adapter_base_or_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = built()

    def talk(*lines: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat(folder, base=base, max_new_tokens=8)
        return capsys.readouterr().out

    adapter = talk("What is EBITDA?", "/quit", "never read")
    plain = talk("/base", "What is EBITDA?")
    assert adapter and plain and adapter != plain
    assert talk("/both", "What is EBITDA?") == plain + adapter
    assert talk("What is EBITDA?", "/reset", "/nonsense", "What is EBITDA?") == adapter * 2
    assert talk("What is EBITDA?", "What is EBITDA?") != adapter * 2  # it remembers
    with pytest.raises(ModelError, match="no room in the context of 512"):
        talk("EBITDA " * 600)
