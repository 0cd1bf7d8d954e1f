"""Asking the judge: an append-only log of finished calls, and a limit on what they may cost.

A call is one line of `judge_calls.jsonl` when it is finished, and is then never made again. The
openai client repeats what a network or a busy server spoils (408, 409, 429, 5xx, a connection
that breaks) after `Retry-After` or a growing, jittered wait. A call that stays without an answer
is asked again by the next run of the same command.
"""

import ipaddress
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fintune.config import JudgeConfig
from fintune.console import Meter, meter, say
from fintune.errors import ConfigError, GateRefused, ModelError
from fintune.evals.judge import SCHEMA, Call, outcome, read_verdict
from fintune.files import JsonlLog, read_jsonl

LOG = "judge_calls.jsonl"
CONCURRENCY = 8
RETRIES = 5
TIMEOUT_S = 300.0
MAX_TOKENS, MAX_REASONING_TOKENS = 600, 8_000
"""Longest reply; a reasoning model's thoughts count as part of it."""
NO_KEY = "no-key-is-needed"
KEPT_CHARACTERS = 20_000
"""Characters of a reply that are stored; a verdict is read from all of it."""
UNSCORED = {"length": "truncated", "content_filter": "content_filter"}
"""Why a reply whose end the endpoint names holds no verdict."""
OPENAI = "api.openai.com"
KEY_HOSTS = {
    "OPENAI_API_KEY": OPENAI,
    "ANTHROPIC_API_KEY": "api.anthropic.com",
    "DEEPSEEK_API_KEY": "api.deepseek.com",
    "GEMINI_API_KEY": "generativelanguage.googleapis.com",
    "GROQ_API_KEY": "api.groq.com",
    "MISTRAL_API_KEY": "api.mistral.ai",
    "OPENROUTER_API_KEY": "openrouter.ai",
    "TOGETHER_API_KEY": "api.together.xyz",
    "XAI_API_KEY": "api.x.ai",
}
"""The host that the key of a variable is for. OpenAI's also goes to a server on this machine, where
any client sends it."""


class _Unanswered(Exception):
    """A call that stayed without a completion; the message says why."""


@dataclass(slots=True)
class _Session:
    """What the threads of one run share; `lock` guards all of it but the client."""

    client: Any
    config: JudgeConfig
    log: JsonlLog
    progress: Meter
    queue: Iterator[Call]
    done: dict[str, dict[str, Any]]
    spent: float
    reserved: float = 0.0
    answered: int = 0
    unanswered: list[str] = field(default_factory=list)
    stop: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        """Make calls until none is left or the run has to stop."""
        try:
            while (call := self._next()) is not None:
                self._make(call)
        except BaseException as error:
            self.stop = self.stop or error

    def _make(self, call: Call) -> None:
        row, why = None, ""
        try:
            row = _ask(self.client, call, self.config)
        except _Unanswered as error:
            why = str(error)
        with self.lock:
            self.reserved -= most_usd(call, self.config)
            if row is None:
                self.unanswered.append(why)
                if not self.answered:  # the others would wait in vain
                    raise _no_reply(self)
                return
            self.log.append(row)
            self.done[call.key] = row
            self.answered += 1
            self.spent += row["usage"]["usd"]
            self.progress.advance(note=f"${self.spent:.3f}")

    def _next(self) -> Call | None:
        with self.lock:
            call = next(self.queue, None) if self.stop is None else None
            if call is None:
                return None
            bound, budget = most_usd(call, self.config), self.config.max_usd
            if budget is not None and self.spent + self.reserved + bound > budget:
                self.stop = GateRefused(
                    f"judge: ${self.spent:.4f} spent, and the next call may pass ${budget}",
                    fix="the same command with a higher limit continues; no call is made twice",
                )
                return None
            self.reserved += bound
            return call


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the finished calls by key."""
    path = folder / LOG
    return {row["key"]: row for row in read_jsonl(path)} if path.is_file() else {}


def most_usd(call: Call, config: JudgeConfig) -> float:
    """Upper bound of one call: a token is at least one byte of the prompt."""
    prompt = sum(len(message["content"].encode()) + 16 for message in call.messages)
    reply = MAX_REASONING_TOKENS if config.reasoning else MAX_TOKENS
    return (prompt * config.usd_per_million_in + reply * config.usd_per_million_out) / 1e6


def ask(
    folder: Path, calls: Sequence[Call], config: JudgeConfig, judge_host: str = ""
) -> dict[str, dict[str, Any]]:
    """Make every call that is not finished yet; return the finished rows by key.

    Args:
        judge_host: a host that may get the key besides the variable's own.

    Raises:
        ConfigError: no key, one for another host, or the `openai` package is not installed.
        ModelError: the endpoint refuses the key, the account or the model, or does not answer.
        GateRefused: the next call could pass `max_usd`.
    """
    with JsonlLog(folder / LOG) as log:
        done = {row["key"]: row for row in log.rows()}
        todo = [call for call in calls if call.key not in done]
        if not todo:
            return done
        most = sum(most_usd(call, config) for call in todo)
        say(
            f"judge {config.model}: {len(todo)} calls to make, {len(calls) - len(todo)} done;"
            f" at most ${most:.2f} at the config's prices (a repeated request comes on top)"
        )
        spent = sum(row["usage"]["usd"] for row in done.values())
        with _client(config, judge_host) as client, meter("judge", len(todo)) as progress:
            session = _Session(client, config, log, progress, iter(todo), done, spent)
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                try:
                    wait([pool.submit(session.work) for _ in range(CONCURRENCY)])
                except BaseException as error:  # a signal: calls under way end and are logged
                    session.stop = error
                    raise
        if session.stop is not None:
            raise session.stop
        if session.unanswered:
            raise _no_reply(session)
        return done


def _no_reply(session: _Session) -> ModelError:
    return ModelError(
        f"judge: {len(session.unanswered)} calls got no reply from {session.config.base_url}"
        f" ({session.unanswered[0]}, {1 + RETRIES} tries each)",
        why=f"{session.answered} calls of this run were answered and are kept",
        fix="check eval.judge.base_url and the server, then run the same command again",
    )


def _client(config: JudgeConfig, judge_host: str) -> Any:
    openai, key = _openai(), api_key(config, judge_host)
    return openai.OpenAI(
        api_key=key,
        base_url=config.base_url,
        max_retries=RETRIES,
        timeout=TIMEOUT_S,
        # No redirect takes key and rows to another host, no proxy what is for this machine.
        http_client=openai.DefaultHttpxClient(
            follow_redirects=False, trust_env=not _is_loopback(config)
        ),
    )


def _ask(client: Any, call: Call, config: JudgeConfig) -> dict[str, Any]:
    """The row of one call. Raises _Unanswered, or ModelError where no other call can succeed."""
    openai = _openai()
    if config.reasoning:
        limits: dict[str, Any] = {"max_completion_tokens": MAX_REASONING_TOKENS}
    else:
        limits = {"max_tokens": MAX_TOKENS, "temperature": 0, "seed": 7}
    schema = {"name": "verdict", "strict": True, "schema": SCHEMA}
    try:
        raw = client.chat.completions.with_raw_response.create(
            model=config.model,
            messages=call.messages,
            response_format={"type": "json_schema", "json_schema": schema},
            extra_headers={"Idempotency-Key": call.key},
            **limits,
        )
    except openai.APIStatusError as error:
        raise _refusal(error.status_code, config) from None
    except openai.APIConnectionError as error:
        why = "timeout" if isinstance(error, openai.APITimeoutError) else "connection"
        raise _Unanswered(why) from None
    # A server that writes the key into its reply must not bring it into a file.
    return _row(call, raw.http_response.text.replace(client.api_key, "[key]"), config)


def _row(call: Call, body: str, config: JudgeConfig) -> dict[str, Any]:
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        text = str(choice["message"].get("content") or choice["message"].get("refusal") or "")
        used = value.get("usage") or {}
        tokens = [int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Unanswered("no completion in the reply") from None
    prices = (config.usd_per_million_in, config.usd_per_million_out)
    usd = sum(count * price for count, price in zip(tokens, prices, strict=True)) / 1e6
    verdict = read_verdict(call, text)
    reason = UNSCORED.get(str(choice.get("finish_reason")), "parse_failure")
    return {
        "key": call.key,
        "status": "scored" if verdict else "unscored",
        "unscored_reason": None if verdict else reason,
        "outcome": outcome(call, verdict) if verdict else None,
        "verdict": verdict,
        "reply": text[:KEPT_CHARACTERS],
        "usage": {"in": tokens[0], "out": tokens[1], "usd": round(usd, 8)},
        "served_model": str(value.get("model") or "")[:200],
        "system_fingerprint": str(value.get("system_fingerprint") or "")[:200],
    }


def _refusal(status: int, config: JudgeConfig) -> Exception:
    """What a status means that the client did not repeat, or repeated in vain."""
    if status in (408, 409, 429) or status >= 500:
        return _Unanswered(f"HTTP {status}")
    what = {
        401: f"does not accept the key in {config.key_variable}",
        402: "asks for payment: the account has no credit left",
        403: "forbids this key the use of the model",
        404: f"knows no model {config.model}, or has no chat completions there",
    }.get(status, "rejects the request")
    fix = "correct eval.judge or the key, then run the same command again"
    if 300 <= status < 400:
        what = "redirects to another address, and key and rows go to no host but the configured one"
        fix = "set eval.judge.base_url to the address where it answers"
    elif what == "rejects the request":
        fix = "use an endpoint and a model with structured output (response_format)"
    return ModelError(
        f"judge: the endpoint {what} (HTTP {status})",
        why="everything judged so far is kept",
        fix=fix,
    )


def api_key(config: JudgeConfig, judge_host: str = "") -> str:
    """The key from the environment, if the host may have it; a server on this machine needs none.

    Raises:
        ConfigError: the key is not for this host, would travel in clear, or is not set.
    """
    url, loopback = urlsplit(config.base_url), _is_loopback(config)
    key = os.environ.get(config.key_variable, "").strip()
    if loopback and not key:
        return NO_KEY
    if url.scheme != "https" and not loopback:
        raise ConfigError(
            f"judge: {config.base_url} is not https",
            why="key and rows would travel where others can read them",
            fix="use https; http is for a server on this machine",
        )
    own = KEY_HOSTS.get(config.key_variable)
    if url.hostname not in (own, judge_host.lower()) and not (loopback and own == OPENAI):
        raise ConfigError(
            f"judge: the key in {config.key_variable} is not for {url.hostname}",
            why=f"it goes to {own or 'no host'} unless another is named outside the config, which"
            " may be of somebody else",
            fix=f"if that host is to have it: --judge-host {url.hostname}",
        )
    if not key:
        raise ConfigError(
            f"judge: the environment variable {config.key_variable} is not set",
            why="the key is read from the environment only",
            fix=f"export {config.key_variable}=..., or evaluate without a judge",
        )
    return key


def _is_loopback(config: JudgeConfig) -> bool:
    host = urlsplit(config.base_url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ConfigError(
            "a judge needs the openai client, which is not installed",
            fix="pip install 'fintune[judge]'",
        ) from None
    return openai
