"""The prompts of a running OpenAI-compatible server, held against the golden ones of a release.

Nothing here imports torch, so that a wrong address is told before anything is loaded.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fintune.console import printable
from fintune.errors import ConfigError, ModelError
from fintune.untrusted.checks import FIXTURE, Check

KEY_VARIABLE = "FINTUNE_API_KEY"
"""Holds the key of whatever server is asked."""
TIMEOUT_S = 120.0
MAX_BYTES = 4 << 20
"""Bytes read of a server's answer."""
SHOWN = 300
"""Characters that are shown of a refusal."""
CONTROL = "control"
"""The golden prompt whose user's text spells control tokens: plain characters here, while a server
that tokenises the rendered prompt reads them as control tokens. Reported, never a failure."""


class Server:
    """The few requests that are sent to an OpenAI-compatible server."""

    def __init__(self, url: str, release: Path) -> None:
        """Ask for its models and choose one.

        Args:
            url: address of the server, with or without /v1.
            release: `adapter` is chosen, or the name of this folder; else the only model. None is
                named to a server that lists none (`transformers serve` of one folder).

        Raises:
            ConfigError: `url` is no address.
            ModelError: no server there, or none of the models.
        """
        if not url.startswith(("http://", "https://")):
            what = f"--server {url}: no address of a server"
            raise ConfigError(what, fix=f"http://{url}, or https://{url}")
        self.url, self._head = url.rstrip("/").removesuffix("/v1"), dict[str, str]()
        rows = self._ask("/v1/models", None).get("data")
        listed = rows if isinstance(rows, list) else [None]
        served = [str(row["id"]) for row in listed if isinstance(row, dict) and "id" in row]
        names = ["adapter", release.resolve().name]
        chosen = [name for name in names if name in served] or (served if len(served) == 1 else [])
        if listed and not chosen:
            raise ModelError(
                f"{url} lists {', '.join(served) or 'no models'}, none called {' or '.join(names)}",
                fix="serve the adapter under the name of its release folder, OpenAI-compatible",
            )
        self._head = {"model": chosen[0]} if chosen else {}

    def prompt(self, messages: Any, tokenizer: Any) -> tuple[list[int] | None, int]:
        """Ids of a conversation's prompt, None where the server shows none, and their number.

        Raises:
            ModelError: no such answer, or it does not count its prompt's tokens.
        """
        asked = {"messages": messages}
        ids = self._ask("/tokenize", asked, needed=False).get("tokens")
        text = "" if ids else self._ask("/apply-template", asked, needed=False).get("prompt")
        if text and isinstance(text, str):
            ids = tokenizer.encode(text, add_special_tokens=False)
            # llama.cpp leaves BOS out of the text that it shows and adds it when it tokenises.
            bos = tokenizer.bos_token_id
            ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        if ids and isinstance(ids, list):
            return ids, len(ids)
        body = asked | {"max_tokens": 1, "temperature": 0}
        usage = self._ask("/v1/chat/completions", body).get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if not isinstance(count, int):
            raise ModelError(f"{self.url} does not count prompt tokens")
        return None, count

    def _ask(
        self, path: str, asked: dict[str, Any] | None, *, needed: bool = True
    ) -> dict[str, Any]:
        """The JSON object of an answer; empty where the server refuses and it is not `needed`."""
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = None if asked is None else json.dumps(self._head | asked).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            try:
                response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
            except urllib.error.HTTPError as error:  # an answer too
                response = error
            with response:
                status, body = response.status, response.read(MAX_BYTES)
            tree = json.loads(body) if status == 200 else {}
        except (OSError, ValueError, HTTPException, RecursionError) as error:
            if not needed and isinstance(error, ValueError | RecursionError):  # a page, not JSON
                return {}
            what = f"no answer from {self.url}{path} ({type(error).__name__})"
            raise ModelError(what, fix="start the server, or check the address") from None
        if status in (401, 403) or needed and status != 200:
            # A server may give back the key that it was sent.
            said = body.decode("utf-8", "replace").replace(key or "\0", "[redacted]")
            what = f"{self.url}{path} refused the request (HTTP {status}): "
            what += printable(" ".join(said.split())[:SHOWN])
            raise ModelError(what, fix=f"see the server's log, or set {KEY_VARIABLE} to its key")
        return tree if isinstance(tree, dict) else {}


def check_server(server: Server, golden: dict[str, Any], tokenizer: Any) -> Iterator[Check]:
    """The server's prompts are the golden ones: by ids where it shows them.

    Equal numbers of tokens alone decide nothing, since another prompt may have the same length.

    Args:
        golden: the golden prompts of the release.
        tokenizer: of the release.
    """
    if not golden:
        raise ModelError(f"the release has no {FIXTURE} to hold a server against")
    rows, shown, differing = golden["conversations"], True, dict[str, str]()
    for row in rows:
        name, expected = row["name"], row["prompt_ids"]
        ids, count = server.prompt(row["messages"][:-1], tokenizer)
        shown = shown and ids is not None
        if count != len(expected) or ids not in (None, expected):
            differing[name] = f"{name} ({count - len(expected):+} tokens)"
    how = "are changed" if differing.pop(CONTROL, "") else "stay text"
    compared = f"in {sum(row['name'] != CONTROL for row in rows)} conversations"
    if differing:
        said = f"different: other prompts in {', '.join(differing.values())}"
        yield Check("server", "failed", said)
    elif shown:
        yield Check("server", "ok", f"equal: the same ids {compared}")
    else:
        said = f"undecided: the same number of prompt tokens {compared}, and no ids are shown there"
        said += "; an address that answers /tokenize or /apply-template would decide it: the one"
        yield Check("server", "failed", f"{said} behind a proxy, or that of another kind of server")
    yield Check("server", "note", f"control tokens in a user's text {how} there")
