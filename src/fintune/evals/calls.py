"""Asking the judge: paid calls that are never lost and never paid twice.

`judge_calls.jsonl` is written ahead: a `started` line before a request leaves, a `done` line when
its verdict is in. A call that is done is not made again, whatever happens to the process. One
that was started and has no end is *possibly paid*; there are at most `concurrency` of them a kill.

The openai client's own retries are off, because it cannot tell what was paid. Ours: 408, 409,
429 and 5xx after `Retry-After` or a growing, jittered wait; a connection that breaks, or a body
that is no completion, likewise; a request that timed out after it was sent, once. 401, 402, 403
and 404 end the run; the first call has a head start, so a wrong key or model costs one request.
"""

import asyncio
import contextlib
import datetime
import email.utils
import ipaddress
import json
import os
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fintune.config import SECRET_NAME, JudgeConfig
from fintune.config import redacted as without_secrets
from fintune.console import Meter, meter, say
from fintune.errors import ConfigError, GateRefused, ModelError
from fintune.evals.judge import Call, outcome, read_verdict
from fintune.evals.lines import Lines

LEDGER = "judge_calls.jsonl"
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
HEAD_START_S = 1.0
"""Seconds that the first call goes alone. A refusal (wrong key, no credit, no such model) comes
sooner, because nothing is generated for it, and then no other call is made."""
LONGEST_WAIT_S = 600.0
"""Most seconds that the waits of one call may take together."""
KEPT_CHARACTERS = 20_000
"""Characters of a reply that are stored; a verdict is read from all of it."""
UNSCORED = {"length": "truncated", "content_filter": "content_filter"}
"""Why a reply whose end the endpoint names holds no verdict."""
_REPAIR = "That was not one JSON object of the schema with the id given. Send only that object."


@dataclass(slots=True)
class _State:
    """What is shared by the calls of one run."""

    file: Lines
    config: JudgeConfig
    progress: Meter
    spent: float
    reserved: float = 0.0
    answered: int = 0
    stop: Exception | None = None
    done: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class _Tried:
    """What became of one call so far."""

    attempt: str = ""
    possibly_paid: int = 0
    replies: list[str] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=lambda: {"in": 0, "out": 0, "usd": 0.0})
    served: dict[str, Any] = field(default_factory=dict)


class _Retry(Exception):
    """A try that failed in a way worth another: why, how long to wait, whether it may be paid."""

    def __init__(self, why: str, *, wait_s: float | None = None, paid: bool = False) -> None:
        super().__init__(why)
        self.why, self.wait_s, self.paid = why, wait_s, paid


def history(folder: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The done rows by key, and the started rows that have no end (possibly paid)."""
    if not (folder / LEDGER).is_file():
        return {}, []
    with Lines(folder / LEDGER) as file:
        return _history(file.rows())


def _history(rows: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    ended = {(row["key"], row["attempt"]) for row in rows if row["row"] != "started"}
    done = {row["key"]: row for row in rows if row["row"] == "done"}
    open_ = [
        row for row in rows if row["row"] == "started" and (row["key"], row["attempt"]) not in ended
    ]
    return done, open_


def most_usd(call: Call, config: JudgeConfig) -> float:
    """Upper bound of one call: a token is at least one byte of the prompt."""
    prompt = sum(len(message["content"].encode()) + 16 for message in call.messages)
    return (
        prompt * config.usd_per_million_in + config.max_tokens * config.usd_per_million_out
    ) / 1e6


def ask(
    folder: Path, calls: Sequence[Call], config: JudgeConfig, judge_host: str = ""
) -> dict[str, dict[str, Any]]:
    """Make every call that is not done yet; return the done rows by key.

    Args:
        judge_host: a host that may get the key besides the variable's own.

    Raises:
        ConfigError: no key, one for another host, or the `openai` package is not installed.
        ModelError: the endpoint refuses the key, the account or the model.
        GateRefused: the next call could pass `max_usd`.
    """
    with Lines(folder / LEDGER) as file:
        done, open_ = _history(file.rows())
        todo = [call for call in calls if call.key not in done]
        spent = sum(row["usage"]["usd"] for row in done.values())
        spent += sum(row["most_usd"] for row in open_)
        if not todo:
            return done
        most = sum(most_usd(call, config) for call in todo)
        say(
            f"judge {config.model}: {len(todo)} calls to make, {len(calls) - len(todo)} done;"
            f" at most ${most:.2f} at the config's prices (a repair or a retry comes on top)"
        )
        if open_:
            say(f"{len(open_)} earlier calls were cut off and may have been paid")
        with meter("judge", len(todo)) as progress:
            state = _State(file, config, progress, spent, done=done)
            asyncio.run(_ask_all(state, todo, api_key(config, judge_host)))
    if state.stop is not None:
        raise state.stop
    return state.done


async def _ask_all(state: _State, todo: list[Call], key: str) -> None:
    openai = _openai()
    client = openai.AsyncOpenAI(
        api_key=key,
        base_url=state.config.base_url,
        max_retries=0,
        timeout=state.config.timeout_s,
        # No redirect takes key and rows to another host, no proxy what is for this machine.
        http_client=openai.DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=not _is_loopback(state.config)
        ),
    )
    queue, answered = iter(todo), asyncio.Event()

    async def worker() -> None:
        for call in queue:
            if state.stop is None:
                await _ask_one(state, client, call)
            answered.set()
            if state.stop is not None:
                return

    async with client, asyncio.TaskGroup() as group:
        group.create_task(worker())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(answered.wait(), HEAD_START_S)
        for _ in range(state.config.concurrency - 1):
            group.create_task(worker())


async def _ask_one(state: _State, client: Any, call: Call) -> None:
    """One call from start to end: within the budget, booked, its verdict written."""
    bound, budget = most_usd(call, state.config), state.config.max_usd
    if budget is not None and state.spent + state.reserved + bound > budget:
        state.stop = GateRefused(
            f"judge: ${state.spent:.4f} spent, and the next call may pass the limit of ${budget}",
            fix="the same command with a higher limit continues; nothing is paid twice",
        )
        return
    state.reserved += bound
    tried = _Tried()
    try:
        verdict = await _try(state, client, call, tried)
    except ModelError as error:
        state.stop = state.stop or error
        return
    finally:
        state.reserved -= bound
        state.spent += tried.usage["usd"] + tried.possibly_paid * bound
    if not tried.replies:  # not done: the next run asks again
        if tried.failures and not state.answered:
            state.stop = state.stop or ModelError(
                f"judge: no reply from {state.config.base_url}"
                f" ({tried.failures[-1]['why']}, {len(tried.failures)} tries)",
                why="no call of this run was answered, so the others would wait in vain",
                fix="check eval.judge.base_url and the server, then run the same command again",
            )
        return
    state.answered += 1
    finish = tried.served["finish"]
    row = redacted(
        {
            "row": "done",
            "key": call.key,
            "attempt": tried.attempt,
            "status": "scored" if verdict else "unscored",
            "unscored_reason": None if verdict else UNSCORED.get(finish, "parse_failure"),
            "outcome": outcome(call, verdict) if verdict else None,
            "verdict": verdict,
            "replies": [reply[:KEPT_CHARACTERS] for reply in tried.replies],
            "retries": tried.failures,
            "possibly_paid": tried.possibly_paid,
            "usage": {**tried.usage, "usd": round(tried.usage["usd"], 8)},
            "served_model": tried.served["model"],
            "system_fingerprint": tried.served["fingerprint"],
        }
    )
    state.file.append(row)
    state.done[call.key] = row
    state.progress.advance(note=f"${state.spent:.3f}")


async def _try(state: _State, client: Any, call: Call, tried: _Tried) -> dict[str, Any] | None:
    """Send until a verdict is read; None when the tries or the one repair turn are used up."""
    messages, waited = call.messages, 0.0
    while len(tried.failures) + len(tried.replies) < state.config.tries and state.stop is None:
        mark = {"key": call.key, "attempt": (attempt := secrets.token_hex(6))}
        tried.attempt = attempt
        state.file.append({"row": "started", **mark, "most_usd": most_usd(call, state.config)})
        try:
            reply = await _send(client, call, messages, state.config, tried)
        except _Retry as failed:
            state.file.append({"row": "failed", **mark, "why": failed.why})
            tried.possibly_paid += failed.paid
            wait = failed.wait_s
            if wait is None:
                wait = random.uniform(0.5, 1.0) * min(0.5 * 2.0 ** len(tried.failures), 30.0)
            waited += wait
            tried.failures.append({"why": failed.why, "wait_s": round(wait, 2)})
            timeouts = sum(failure["why"] == "timeout" for failure in tried.failures)
            if waited > LONGEST_WAIT_S or timeouts > 1:
                return None
            await asyncio.sleep(wait)
            continue
        except ModelError:
            state.file.append({"row": "failed", **mark, "why": "refused"})
            raise
        tried.replies.append(reply)
        verdict = read_verdict(call, reply)
        if verdict is not None or len(tried.replies) > 1:
            return verdict
        state.file.append({"row": "failed", **mark, "why": "unreadable"})
        messages = [
            *call.messages,
            {"role": "assistant", "content": reply[:2000]},
            {"role": "user", "content": f"{_REPAIR} id: {call.nonce}"},
        ]
    return None


async def _send(
    client: Any, call: Call, messages: list[dict[str, str]], config: JudgeConfig, tried: _Tried
) -> str:
    """One request; the reply's text. Tokens and what served it are added to `tried`."""
    openai = _openai()
    if config.reasoning:
        limits: dict[str, Any] = {"max_completion_tokens": config.max_tokens}
    else:
        limits = {"max_tokens": config.max_tokens, "temperature": 0, "seed": 7}
    schema = {"name": call.mode, "strict": True, "schema": call.schema}
    try:
        async with asyncio.timeout(config.timeout_s):
            raw = await client.chat.completions.with_raw_response.create(
                model=config.model,
                messages=messages,
                response_format={"type": "json_schema", "json_schema": schema},
                extra_headers={"Idempotency-Key": f"{call.key}-{len(messages)}"},
                **limits,
            )
    except (TimeoutError, openai.APITimeoutError):
        raise _Retry("timeout", paid=True) from None
    except openai.APIStatusError as error:
        raise _refusal(error, config) from None
    except openai.APIConnectionError as error:
        # A connection that was never made cost nothing; one that broke later may have.
        sent = type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")
        raise _Retry("connection", paid=sent) from None
    return _read_body(raw.http_response.text, config, tried)


def _read_body(body: str, config: JudgeConfig, tried: _Tried) -> str:
    """The text of a completion, or _Retry where the body is none (HTML, empty, cut off)."""
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        message, used = choice["message"], value.get("usage") or {}
        text = message.get("content") or message.get("refusal") or ""
        tokens = [int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Retry("no completion in the reply") from None
    tried.usage["in"] += tokens[0]
    tried.usage["out"] += tokens[1]
    prices = (config.usd_per_million_in, config.usd_per_million_out)
    tried.usage["usd"] += sum(a * b for a, b in zip(tokens, prices, strict=True)) / 1e6
    tried.served = {
        "model": str(value.get("model") or "")[:200],
        "fingerprint": str(value.get("system_fingerprint") or "")[:200],
        "finish": choice.get("finish_reason"),
    }
    return str(text)


def _refusal(error: Any, config: JudgeConfig) -> Exception:
    """What a status means: another try, the end of the run, or the end of this call."""
    status = error.status_code
    if status in (401, 402, 403, 404):
        what = {
            401: f"does not accept the key in {config.key_variable}",
            402: "asks for payment: the account has no credit left",
            403: "forbids this key the use of the model",
            404: f"knows no model {config.model}, or has no chat completions there",
        }[status]
        return ModelError(
            f"judge: the endpoint {what} (HTTP {status})",
            why="no further call was made; everything judged so far is kept",
            fix="correct eval.judge or the key, then run the same command again",
        )
    if 300 <= status < 400:
        return ModelError(
            f"judge: the endpoint redirects to another address (HTTP {status})",
            why="a key and rows are sent to no host but the one that is configured",
            fix="set eval.judge.base_url to the address where it answers",
        )
    if status in (408, 409, 429) or status >= 500:
        return _Retry(f"HTTP {status}", wait_s=_retry_after(error.response.headers))
    return ModelError(
        f"judge: the endpoint rejects the request (HTTP {status})",
        why="it may not support JSON schemas (response_format), which the judge needs",
        fix="use an endpoint and a model with structured output",
    )


def _retry_after(headers: Any) -> float | None:
    """Seconds that Retry-After asks for, as a number or as a date; None without one."""
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            then = email.utils.parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        seconds = (then - datetime.datetime.now(datetime.UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT_S) if seconds == seconds else None


def api_key(config: JudgeConfig, judge_host: str = "") -> str:
    """The key from the environment, if the host may have it; a server on this machine needs none.

    Raises:
        ConfigError: the key is not for this host, would travel in clear, or is not set.
    """
    url, loopback = urlsplit(config.base_url), _is_loopback(config)
    key = os.environ.get(config.key_variable, "").strip()
    if loopback and not key:
        return "none"
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


def redacted(row: dict[str, Any]) -> dict[str, Any]:
    """A row without anything that looks like a secret or is one of this environment's."""
    values = [
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value.strip()) >= 8
    ]

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for secret in values:
                value = value.replace(secret, "[redacted]")
            return without_secrets(value)
        if isinstance(value, dict):
            return {key: entry if key == "key" else clean(entry) for key, entry in value.items()}
        return [clean(entry) for entry in value] if isinstance(value, list) else value

    cleaned: dict[str, Any] = clean(row)
    return cleaned


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ConfigError(
            "a judge needs the openai client, which is not installed",
            fix="pip install 'fintune[judge]'",
        ) from None
    return openai
