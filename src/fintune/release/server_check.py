"""Does a running OpenAI-compatible server put the trained prompt before the adapter?

Where the server shows its token ids (/tokenize, /apply-template), they decide. Elsewhere the
number of prompt tokens, then the greedy answer, held against /v1/completions on the golden text.
"""

import json
import os
import re
import urllib.error
import urllib.request
from typing import Any

from fintune.errors import ModelError
from fintune.untrusted.checks import Check

TIMEOUT_S = 120.0
ANSWER_TOKENS = 16
MAX_BYTES = 4 << 20
KEY_VARIABLE = "FINTUNE_API_KEY"
CONTROL = "control"
"""The golden prompt whose text spells control tokens; reported, and no part of the rest."""

Row = dict[str, Any]


def check_server(golden: dict[str, Any], tokenizer: Any, url: str, names: list[str]) -> list[Check]:
    """One check that says equal, different or undecided, and a note on spelled control tokens.

    Args:
        golden: golden prompts of the release. tokenizer: the release's own.
        url: the server's address, with or without /v1.
        names: model names to look for on the server, best first; else its only model.

    Raises:
        ModelError: no server there, or none of the models.
    """
    server = _Server(url, names)
    rows = [row for row in golden["conversations"] if row["name"] != CONTROL]
    verdict, reason = _compare(server, rows, tokenizer)
    # Undecided is no proof, and a gate that asked for proof says no.
    checks = [Check("server", "ok" if verdict == "equal" else "failed", f"{verdict}: {reason}")]
    for row in golden["conversations"]:
        if row["name"] == CONTROL:
            count, _ = server.chat(row)
            as_control = len(tokenizer.encode(row["prompt"], add_special_tokens=False))
            read = {len(row["prompt_ids"]): "stay text", as_control: "act as control tokens"}
            how = read.get(count, "are read in another way")
            checks.append(Check("server", "note", f"control tokens in a user's text {how} there"))
    return checks


def _compare(server: "_Server", rows: list[Row], tokenizer: Any) -> tuple[str, str]:
    shown = [server.prompt_ids(row, tokenizer) for row in rows]
    if all(ids is not None for ids in shown):
        other = [r["name"] for r, ids in zip(rows, shown, strict=True) if ids != r["prompt_ids"]]
        if other:
            return "different", f"other ids in {', '.join(other)}"
        return "equal", f"the same ids in {len(rows)} conversations"
    answers = [server.chat(row) for row in rows]
    extra = [n - len(row["prompt_ids"]) for (n, _), row in zip(answers, rows, strict=True)]
    if any(extra):
        return "different", f"prompt tokens {extra} against the golden prompts"
    for row, (_, text) in zip(rows, answers, strict=True):
        completed = server.complete(row["prompt"], len(row["prompt_ids"]))
        if completed is None:
            return "undecided", "the counts agree; no /v1/completions on the same ids to compare"
        if completed != text:
            if server.chat(row)[1] != text:
                return "undecided", "the counts agree; the server's greedy answers do not repeat"
            return "different", f"{row['name']}: the same count, another answer to the golden text"
    return "equal", f"the same counts and greedy answers in {len(rows)} conversations"


class _Server:
    """The few requests that are sent, each answered or known to be unsupported."""

    def __init__(self, url: str, names: list[str]) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = ""
        listed = self._ask("/v1/models", None)
        try:
            found = [str(row["id"]) for row in (listed or {})["data"]]
        except (KeyError, TypeError):
            fix = "is it OpenAI-compatible?"
            raise ModelError(f"{url} lists no models at /v1/models", fix=fix) from None
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
        tree = self._ask("/v1/chat/completions", body) or {}
        try:
            text = tree["choices"][0]["message"]["content"]
            return int(tree["usage"]["prompt_tokens"]), text or ""
        except (KeyError, IndexError, TypeError, ValueError):
            raise ModelError(f"{self._url} gives no chat answer with usage") from None

    def complete(self, prompt: str, tokens: int) -> str | None:
        """Greedy continuation of a text read as exactly `tokens` ids, or None."""
        # Many servers put BOS before any text: then the text goes without its own.
        for text in (prompt, re.sub(r"^(<\|[^|]+\|>|<s>)", "", prompt)):
            body = {"prompt": text, "max_tokens": ANSWER_TOKENS, "temperature": 0}
            tree = self._ask("/v1/completions", body) or {}
            try:
                if tree["usage"]["prompt_tokens"] == tokens:
                    return str(tree["choices"][0]["text"])
            except (KeyError, IndexError, TypeError):
                return None
        return None

    def prompt_ids(self, row: Row, tokenizer: Any) -> list[int] | None:
        """The server's own ids of a conversation's prompt, where it shows them."""
        messages = row["messages"][:-1]
        tree = self._ask("/tokenize", {"messages": messages, "add_generation_prompt": True})
        tree = tree or self._ask("/tokenize", {"messages": messages}) or {}
        if isinstance(tree.get("tokens"), list) and tree["tokens"]:
            return list(tree["tokens"])
        rendered = self._ask("/apply-template", {"messages": messages}) or {}
        if not isinstance(rendered.get("prompt"), str):
            return None
        ids: list[int] = tokenizer.encode(rendered["prompt"], add_special_tokens=False)
        # llama.cpp leaves BOS out of the text that it shows and adds it when it tokenises.
        bos = tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any] | None:
        """The JSON object of an answer; None for one that the server refuses or does not have."""
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = None if body is None else json.dumps({"model": self._model, **body}).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                tree = json.loads(response.read(MAX_BYTES))
                return tree if isinstance(tree, dict) else None
        except urllib.error.HTTPError as error:
            if error.code in {401, 403}:
                fix = f"set {KEY_VARIABLE}"
                raise ModelError(f"{self._url} refused the key", fix=fix) from None
            return None
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no answer from {self._url}{path} ({type(error).__name__})",
                fix="start the server, or check the address",
            ) from None
