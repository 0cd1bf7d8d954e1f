"""Does a running OpenAI-compatible server put the trained prompt before the adapter?

Where the server shows its ids (/tokenize, /apply-template), they decide. Elsewhere the evidence
is what every server reports: the number of prompt tokens, held against the fixture and against
known wrong prefixes, and the greedy answer, held against /v1/completions on the fixture's text.
Two prompts of one length can still give one answer, so every known prefix of the same length
must be ruled out by an answer of its own before the word `equal` is said.
"""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import date
from typing import Any

from fintune.errors import ModelError
from fintune.untrusted.checks import Check

TIMEOUT_S = 120.0
ANSWER_TOKENS = 16
MOST_BYTES = 4 << 20
KEY_VARIABLE = "FINTUNE_API_KEY"
CONTROL = "control"
"""The fixture conversation whose text spells control tokens; reported, and no part of the rest."""
_DATES = re.compile(r"Cutting Knowledge Date: [^\n]*\nToday Date: ([^\n]*)\n\n")
_EMPTY_SYSTEM = re.compile(r"<\|start_header_id\|>system<\|end_header_id\|>\n\n\s*<\|eot_id\|>")

Row = dict[str, Any]


def check_server(
    fixture: dict[str, Any], tokenizer: Any, url: str, names: list[str]
) -> list[Check]:
    """One check that says equal, different or undecided, and a note on spelled control tokens.

    Args:
        tokenizer: the release's own.
        url: the server's address, with or without /v1.
        names: model names to look for on the server, best first; else its only model.

    Raises:
        ModelError: no server there, or none of the models.
    """
    server = _Server(url, names)
    rows = [row for row in fixture["conversations"] if row["name"] != CONTROL]
    status, said = _compare(server, rows, tokenizer)
    # Undecided is no proof, and a gate that asked for proof says no.
    checks = [Check("server", "ok" if status == "equal" else "failed", f"{status}: {said}")]
    for row in fixture["conversations"]:
        if row["name"] == CONTROL:
            count, _ = server.chat(row)
            as_control = len(tokenizer.encode(row["prompt"], add_special_tokens=False))
            read = {len(row["prompt_ids"]): "stay text", as_control: "act as control tokens"}
            told = read.get(count, "are read in another way")
            checks.append(Check("server", "note", f"control tokens in a user's text {told} there"))
    return checks


def _compare(server: "_Server", rows: list[Row], tokenizer: Any) -> tuple[str, str]:
    shown = [server.ids(row, tokenizer) for row in rows]
    if all(ids is not None for ids in shown):
        other = [r["name"] for r, ids in zip(rows, shown, strict=True) if ids != r["prompt_ids"]]
        if not other:
            return "equal", f"the same ids in {len(rows)} conversations"
        return "different", f"other ids in {', '.join(other)}"
    answers = [server.chat(row) for row in rows]
    counts = [count for count, _ in answers]
    expected = [len(row["prompt_ids"]) for row in rows]
    variants = {
        name: [_variant(change, row, tokenizer) for row in rows]
        for name, change in VARIANTS.items()
    }
    if counts != expected:
        fits = [n for n, found in variants.items() if counts == [len(ids) for _, ids in found]]
        if len(fits) > 1:  # counts alone cannot tell these apart; an answer may
            said = [text for _, text in answers]
            alike = {
                n: [server.complete(text, len(ids)) for text, ids in variants[n]] for n in fits
            }
            fits = [name for name in fits if alike[name] == said] or fits
        named = f"fits {' or '.join(fits)}" if fits else "no known prefix fits"
        extra = [count - own for count, own in zip(counts, expected, strict=True)]
        return "different", f"prompt tokens {extra} against the fixture; {named}"
    same_length = {
        name: [text for text, _ in found]
        for name, found in variants.items()
        if [len(ids) for _, ids in found] == expected
        and any(text != row["prompt"] for (text, _), row in zip(found, rows, strict=True))
    }
    return _compare_answers(server, rows, [text for _, text in answers], same_length)


def _compare_answers(
    server: "_Server", rows: list[Row], said: list[str], alike: dict[str, list[str]]
) -> tuple[str, str]:
    """Equal counts: the same greedy answer as on the fixture's text, and no other text gives it."""
    for row, text in zip(rows, said, strict=True):
        completed = server.complete(row["prompt"], len(row["prompt_ids"]))
        if completed is None:
            return "undecided", "the counts agree; no /v1/completions on the same ids to compare"
        if completed != text:
            if server.chat(row)[1] != text:
                return "undecided", "the counts agree; the server's greedy answers do not repeat"
            other = f"{row['name']}: the same count, another answer to the fixture's text"
            return "different", other
    for name, texts in alike.items():
        others = [
            server.complete(text, len(row["prompt_ids"]))
            for row, text in zip(rows, texts, strict=True)
        ]
        if others == said:
            return "undecided", f"counts and answers agree, but {name} would give the same"
    return "equal", f"the same counts and greedy answers in {len(rows)} conversations"


class _Server:
    """The few requests that are asked, each answered or known to be unsupported."""

    def __init__(self, url: str, names: list[str]) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        listed = self._ask("/v1/models", None)
        if listed is None:
            raise ModelError(f"{url} lists no models at /v1/models", fix="is it OpenAI-compatible?")
        found = [str(row["id"]) for row in listed["data"]]
        chosen = [name for name in names if name in found] or (found if len(found) == 1 else [])
        if not chosen:
            raise ModelError(
                f"{url} serves {', '.join(found)}, none called {' or '.join(names)}",
                fix="serve the adapter under the name of its release folder",
            )
        self._model = chosen[0]

    def chat(self, row: Row) -> tuple[int, str]:
        """Prompt tokens and greedy answer of a conversation."""
        body = {"messages": row["messages"][:-1], "max_tokens": ANSWER_TOKENS, "temperature": 0}
        found = self._ask("/v1/chat/completions", body)
        try:
            if found is None:
                raise KeyError
            text = found["choices"][0]["message"]["content"]
            return int(found["usage"]["prompt_tokens"]), text or ""
        except (KeyError, IndexError, TypeError):
            raise ModelError(f"{self._url} gives no chat answer with usage") from None

    def complete(self, prompt: str, tokens: int) -> str | None:
        """Greedy continuation of a text read as exactly `tokens` ids, or None."""
        bos = re.match(r"<\|[^|]+\|>|<s>", prompt)
        # Many servers put BOS before any text: then the text goes without its own.
        for text in (prompt, prompt[bos.end() :] if bos else prompt):
            body = {"prompt": text, "max_tokens": ANSWER_TOKENS, "temperature": 0}
            found = self._ask("/v1/completions", body)
            if found is None:
                return None
            if found.get("usage", {}).get("prompt_tokens") == tokens:
                return str(found["choices"][0]["text"])
        return None

    def ids(self, row: Row, tokenizer: Any) -> list[int] | None:
        """The server's own ids of a conversation's prompt, where it shows them."""
        messages = row["messages"][:-1]
        found = self._ask("/tokenize", {"messages": messages, "add_generation_prompt": True})
        found = found or self._ask("/tokenize", {"messages": messages})
        if found and found.get("tokens"):
            return list(found["tokens"])
        rendered = self._ask("/apply-template", {"messages": messages})
        if not rendered or not isinstance(rendered.get("prompt"), str):
            return None
        own: list[int] = tokenizer.encode(rendered["prompt"], add_special_tokens=False)
        # llama.cpp leaves BOS out of the text that it shows and adds it when it tokenises.
        bos = tokenizer.bos_token_id
        return own if bos is None or own[:1] == [bos] else [bos, *own]

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any] | None:
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = None if body is None else json.dumps({"model": self._model, **body}).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                found = json.loads(response.read(MOST_BYTES))
                return found if isinstance(found, dict) else None
        except urllib.error.HTTPError as error:
            if error.code in {401, 403}:
                raise ModelError(
                    f"{self._url} refused the key", fix=f"set {KEY_VARIABLE}"
                ) from None
            return None
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no answer from {self._url}{path} ({type(error).__name__})",
                fix="start the server, or check the address",
            ) from None


def _variant(
    change: Callable[[str, Row, str], str], row: Row, tokenizer: Any
) -> tuple[str, list[int]]:
    text = change(row["prompt"], row, tokenizer.bos_token or "")
    return text, tokenizer.encode(text, add_special_tokens=False)


def _no_dates(text: str) -> str:
    return _DATES.sub("", text)


def _dated(text: str, day: str) -> str:
    return _DATES.sub(lambda found: found.group().replace(found.group(1), day), text)


def _chatml(row: Row) -> str:
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"][:-1]]
    return "".join(turns) + "<|im_start|>assistant\n"


VARIANTS: dict[str, Callable[[str, Row, str], str]] = {
    "a second BOS": lambda text, row, bos: bos + text,
    "no BOS": lambda text, row, bos: text.removeprefix(bos),
    "today's date": lambda text, row, bos: _dated(text, f"{date.today():%d %b %Y}"),
    "the template's own date": lambda text, row, bos: _dated(text, "26 Jul 2024"),
    "another date": lambda text, row, bos: _dated(text, "01 Jan 2025"),
    "no date lines": lambda text, row, bos: _no_dates(text),
    "no date lines and a second BOS": lambda text, row, bos: bos + _no_dates(text),
    "no date lines and no empty system turn": lambda text, row, bos: _EMPTY_SYSTEM.sub(
        "", _no_dates(text)
    ),
    "no header of the answer": lambda text, row, bos: (
        text[: text.rindex("<|start_header_id|>")] if "<|start_header_id|>" in text else text
    ),
    "ChatML": lambda text, row, bos: _chatml(row),
    "plain text": lambda text, row, bos: (
        bos + "\n".join(m["content"] for m in row["messages"][:-1])
    ),
}
"""Prefixes that servers were seen to write in place of the trained one, made from its text."""
