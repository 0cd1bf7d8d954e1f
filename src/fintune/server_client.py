"""The client of an OpenAI-compatible server, through which `verify` and `eval` ask, and whose
answers a server gives.

Prompts go as token ids to /v1/completions, so what is asked is ours to the token. The standard
library is enough; nothing here imports torch.
"""

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from http.client import HTTPException
from os.path import commonprefix
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fintune.console import printable
from fintune.errors import ConfigError, ModelError

KEY_VARIABLE = "FINTUNE_API_KEY"
"""Holds the key of whatever server is asked."""
HOST_VARIABLE = "FINTUNE_API_HOST"
"""Names the host beyond this machine that gets the key though only a config names it."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TIMEOUT_S = 300.0
MAX_BYTES = 16 << 20
"""Bytes read of a server's answer."""
SHOWN = 300
"""Characters that are shown of a refusal."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
"""Before the first repetition, doubled each time; and the longest `Retry-After` that is kept."""
NO_ANSWER = 0
BUSY = (NO_ANSWER, 408, 409, 429, 500, 502, 503, 504)
REFUSES_FIELDS = (400, 415, 422, 500, 501)
OPTIONAL = ("return_token_ids", "return_tokens_as_token_ids", "logprobs")
"""Fields that a server may refuse: all of OpenAI's but the last are vLLM's."""
LOGPROBS: dict[str, Any] = {"logprobs": 5, "return_tokens_as_token_ids": True}
"""Asks for log-probabilities of the answer and of the likeliest tokens; OpenAI shows at most 5."""
RECORDED = {"adapter": "answer", "base": "base_answer"}
"""Who answered -> key of the answer in a golden prompt."""
NEAR = 0.1
"""Mean gap (nats a token) up to which answers are the recorded ones: `verify`'s own of bf16."""
FAR = 5.0
"""Largest gap (nats) that a token counts, and that of one which the server does not show."""


class Refused(ModelError):
    """The server answered with a status other than 200."""

    status = 0


class Step(NamedTuple):
    """A generated token: its name, its log-probability (nats), those of the likeliest by name.

    A name is `token_id:` and the id, or the token's text where the server shows no ids.
    """

    token: str
    logprob: float
    top: dict[str, float]


class Completion(NamedTuple):
    """An answer; `ids`, `steps` and `prompt_logprobs` (from the second token on) are empty where
    the server shows none."""

    text: str
    finish_reason: str = "stop"
    ids: Sequence[int] = ()
    steps: Sequence[Step] = ()
    prompt_logprobs: Sequence[float] = ()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could send key and rows to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """An OpenAI-compatible server.

    Attributes:
        url: without /v1.
        models: the rows of /v1/models by id.
        lists: not an empty list (`transformers serve` of one folder lists no model).
        retries: of a request where the server is busy or gone.
    """

    def __init__(self, url: str, option: str = "--server") -> None:
        """Ask for its models, once.

        Args:
            option: where the address was given.

        Raises:
            ConfigError: `url` is no address, or no local one under --offline.
            ModelError: no server there.
        """
        if not url.startswith(("http://", "https://")):
            what, place = f"{option} {url}: no address of a server", url.rpartition("://")[2]
            raise ConfigError(what, fix=f"http://{place}, or https://{place}")
        handlers: list[Any] = [_NoRedirect]
        if urlsplit(url).hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        elif "FINTUNE_OFFLINE" in os.environ:
            raise ConfigError(f"--offline, and {option} is at {url}")
        self._open = urllib.request.build_opener(*handlers).open
        self._left_out, self._settled = 0, False
        self.url, self.retries = url.rstrip("/").removesuffix("/v1"), 0
        rows = self.ask("/v1/models").get("data")
        listed, self.lists = rows if isinstance(rows, list) else [], rows != []
        self.models = {str(r["id"]): r for r in listed if isinstance(r, dict) and "id" in r}

    def complete(self, model: str, ids: Sequence[int], limit: int, **shown: Any) -> Completion:
        """The greedy continuation of token ids.

        Args:
            model: its name there; empty: none is named.
            limit: most tokens of the answer.
            shown: fields that ask for more; until the first reply those of OPTIONAL are left out
                where the server refuses them.

        Raises:
            Refused: the server refuses it. ModelError: no answer, no completion, or another
            number of prompt tokens than were sent.
        """
        body = {"prompt": [*ids], "max_tokens": limit, "temperature": 0}
        body |= {"model": model} if model else {}
        while True:
            taken = {k: v for k, v in shown.items() if k not in OPTIONAL[: self._left_out]}
            try:
                tree = self.ask("/v1/completions", body | taken)
            except Refused as error:
                last = self._settled or self._left_out == len(OPTIONAL)
                if last or error.status not in REFUSES_FIELDS:
                    raise
                self._left_out = 3 if self._left_out else 2
            else:
                self._settled = True
                return self._completion(tree, ids)

    def whose(
        self, model: str, rows: Sequence[dict[str, Any]], decode: Callable[[int], str]
    ) -> tuple[str, str]:
        """Ask a model the golden prompts `rows`: see the function `whose`."""
        most = max(len(row[key]["ids"]) for row in rows for key in RECORDED.values())
        heard = [self.complete(model, row["prompt_ids"], most, **LOGPROBS) for row in rows]
        return whose(heard, rows, decode)

    def _completion(self, tree: dict[str, Any], ids: Sequence[int]) -> Completion:
        try:
            choice, usage = tree["choices"][0], tree.get("usage") or {}
            read, rows = usage.get("prompt_tokens", len(ids)), choice.get("prompt_logprobs")
            likely = zip((rows or [])[1:], ids[1:], strict=bool(rows))
            found = Completion(
                str(choice["text"]),
                str(choice.get("finish_reason")),
                [int(token) for token in choice.get("token_ids") or ()],
                _steps(choice.get("logprobs") or {}),
                [float(row[str(token)]["logprob"]) for row, token in likely],
            )
        except (LookupError, TypeError, ValueError, AttributeError):
            raise ModelError(f"{self.url}/v1/completions: the answer is no completion") from None
        if read != len(ids):
            what = f"{self.url} read {read} prompt tokens where {len(ids)} were sent"
            why = "it cuts prompts or adds to them, so its answers are to other questions"
            raise ModelError(what, why=why, fix="raise its context; its log says more")
        return found

    def ask(
        self, path: str, asked: dict[str, Any] | None = None, *, needed: bool = True
    ) -> dict[str, Any]:
        """The JSON object of an answer; empty where the server refuses and it is not `needed`.

        Raises:
            Refused: a status other than 200. ModelError: no answer.
        """
        for made in range(self.retries + 1):
            status, said, pause, tree = self._send(path, asked)
            if status not in BUSY or made == self.retries:
                break
            pause = pause or PAUSE_S * 2**made * random.uniform(0.75, 1.0)
            time.sleep(min(pause, LONGEST_PAUSE_S))
        if status == NO_ANSWER or (status == 200 and needed and tree is None):
            what = f"no answer from {self.url}{path} ({said})"
            raise ModelError(what, fix="start the server, or check the address")
        if status in (401, 403) or (needed and status != 200):
            what = f"{self.url}{path} refused the request (HTTP {status}): {said}"
            error = Refused(what, fix=f"see the server's log, or set {KEY_VARIABLE} to its key")
            error.status = status
            raise error
        return tree if isinstance(tree, dict) else {}

    def _send(self, path: str, asked: dict[str, Any] | None) -> tuple[int, str, float, Any]:
        """Status, what was said or went wrong, `Retry-After` in seconds, and the JSON."""
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = None if asked is None else json.dumps(asked).encode()
        request, status, after = urllib.request.Request(self.url + path, data, headers), 0, ""
        try:
            try:
                response = self._open(request, timeout=TIMEOUT_S)
            except urllib.error.HTTPError as error:  # an answer too
                response = error
            with response:
                body, after = response.read(MAX_BYTES), response.headers.get("Retry-After") or ""
                status = response.status
            tree = json.loads(body) if status == 200 else None
        except (OSError, ValueError, HTTPException, RecursionError) as error:
            return status, type(error).__name__, 0.0, None
        # A server may give back the key that it was sent.
        said = body.decode("utf-8", "replace").replace(key or "\0", "[redacted]")
        said = printable(" ".join(said.split())[:SHOWN])
        return status, said, float(after) if after.isdecimal() else 0.0, tree


def check_key(url: str, option: str) -> None:
    """Whether the key may go to the address of a config, which may be of somebody else.

    Raises:
        ConfigError: beyond this machine, to a host that HOST_VARIABLE does not name or without TLS.
    """
    host, named = urlsplit(url).hostname, os.environ.get(HOST_VARIABLE)
    meant = host == named and url.startswith("https://")
    if KEY_VARIABLE in os.environ and host not in LOOPBACK and not meant:
        what = f"{option}: the key in {KEY_VARIABLE} is not for {host}"
        why = "a config may be of somebody else, so the host is named outside of it, and has https"
        raise ConfigError(what, why=why, fix=f"export {HOST_VARIABLE}={host}, or unset the key")


def _steps(shown: dict[str, Any]) -> list[Step]:
    """The log-probabilities of a completion; llama.cpp writes them in the form of a chat."""
    columns = [shown.get(key) or () for key in ("tokens", "token_logprobs", "top_logprobs")]
    if rows := shown.get("content"):
        named = [
            [(f"token_id:{t['id']}", t["logprob"]) for t in (r, *r["top_logprobs"])] for r in rows
        ]
        columns = [*zip(*(likely[0] for likely in named), strict=True), map(dict, named)]
    return [Step(name, float(own), top or {}) for name, own, top in zip(*columns, strict=True)]


def whose(
    heard: Sequence[Completion], rows: Sequence[dict[str, Any]], decode: Callable[[int], str]
) -> tuple[str, str]:
    """Whose recorded answers a model gives: adapter, base, other or undecided; and the evidence.

    With log-probabilities the smaller mean gap decides, if it is at most NEAR and below half of the
    larger one. Else it takes more than half of the answers in which adapter and base differ.

    Args:
        heard: its answers to the golden prompts, with log-probabilities where shown.
        rows: the golden prompts.
        decode: text of a token.
    """
    pairs = [*zip(heard, rows, strict=True)]
    if all(each.steps for each in heard):
        mean = {}
        for who, key in RECORDED.items():
            gaps = [gap for each, row in pairs for gap in _gaps(each.steps, row[key], decode)]
            mean[who] = sum(gaps) / max(1, len(gaps))
        near, far = sorted(mean, key=mean.__getitem__)
        known = "undecided" if 2 * mean[near] >= mean[far] else near
        said = "{adapter:.2g} nats a token from the adapter's recorded answers, {base:.2g} from"
        return "other" if mean[near] > NEAR else known, f"{said} the base's".format(**mean)
    found: Counter[str] = Counter()
    for each, row in pairs:
        texts = {who: row[key]["text"].strip() for who, key in RECORDED.items()}
        text, alike = each.text.strip(), len(commonprefix([*texts.values()]))
        same = {who: len(commonprefix([said, text])) for who, said in texts.items()}
        like = [who for who in texts if same[who] > alike or texts[who] == text]
        if texts["adapter"] != texts["base"]:
            found[like[0] if like else "other"] += 1
    who, most = max(found.items(), key=lambda pair: pair[1], default=("undecided", 1))
    said = f"no log-probabilities are shown; where adapter and base differ {found['adapter']} of "
    said += f"{found.total()} answers are the adapter's and {found['base']} the base's"
    return who if 2 * most > found.total() else "undecided", said


def _gaps(
    steps: Sequence[Step], answer: dict[str, Any], decode: Callable[[int], str]
) -> list[float]:
    """Gap (nats) of each recorded token up to the first that the server did not choose.

    It is the larger one of what the token lacks to the server's choice, and what its
    log-probability there differs from the recorded one. A near tie that flips is a small gap.
    llama.cpp shows a character of several tokens at its last one: the others are left out.
    """
    found, waiting = list[float](), list(reversed(steps))
    for token, recorded in zip(answer["ids"], answer["logprobs"], strict=True):
        if not waiting:
            break
        names, step = (f"token_id:{token}", decode(token)), waiting[-1]
        chosen = step.token in names
        if not chosen and "\ufffd" in names[1]:
            continue
        there = [step.logprob] if chosen else [step.top[name] for name in names if name in step.top]
        gap = max(step.logprob - there[0], abs(there[0] - recorded)) if there else FAR
        found.append(gap if gap <= FAR else FAR)  # NaN too
        if not chosen:
            break
        waiting.pop()
    return found
