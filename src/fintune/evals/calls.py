"""Asking the judge: an append-only log of finished calls, and a limit on what they may cost.

A call is one line of `judge_calls.jsonl` when it is finished, and is then never made again. The
openai client repeats what a network or a busy server spoils (408, 409, 429, 5xx, a connection
that breaks) after `Retry-After` or a growing, jittered wait. A call that stays without an answer
is asked again by the next run of the same command.
"""

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fintune.config import JudgeConfig
from fintune.console import meter, say
from fintune.errors import ConfigError, GateRefused, ModelError
from fintune.evals.grading import PHRASES
from fintune.evals.judge import SCHEMA, Call, outcome, read_verdict
from fintune.files import JsonlLog

LOG = "judge_calls.jsonl"
CONCURRENCY = 8
RETRIES = 5
TIMEOUT_S = 300.0
LIMITS = {"max_tokens": 600, "temperature": 0, "seed": 7}
REASONING_LIMITS = {"max_completion_tokens": 8_000}
"""For a model that refuses the first: its reasoning counts as part of the reply."""
KEPT_CHARACTERS = 20_000
"""Characters of a reply that are stored; a verdict is read from all of it."""
KEY_HOSTS: dict[str, str] = PHRASES["key_hosts"]
"""The host that the key of a variable is for. OpenAI's also goes to a server on this machine, where
any client sends it."""


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the finished calls by key."""
    if not (folder / LOG).is_file():
        return {}
    with JsonlLog(folder / LOG) as log:
        return {row["key"]: row for row in log.rows() if row.pop("row") == "done"}


def ask(
    folder: Path, calls: Sequence[Call], config: JudgeConfig, judge_host: str = ""
) -> dict[str, dict[str, Any]]:
    """Make every call that is not finished yet, a few at once; return the finished rows by key.

    The first error stops those that wait; those under way end and are logged.

    Args:
        judge_host: a host that may get the key besides the variable's own.

    Raises:
        ConfigError: no key, one for another host, or the `openai` package is not installed.
        ModelError: the endpoint refuses the key, the account or the model, or does not answer.
        GateRefused: the next call could pass `max_usd`.
    """
    done, limits = finished(folder), dict(LIMITS)
    todo = [call for call in calls if call.key not in done]
    if not todo:
        return done
    most = sum(_most_usd(call, config, limits) for call in todo)
    made = len(calls) - len(todo)
    say(f"judge {config.model}: {len(todo)} calls to make, {made} done; at most ${most:.2f}")
    spent = sum(row["usage"]["usd"] for row in done.values())  # with the most of calls under way
    lock, stopped = threading.Lock(), threading.Event()

    def make(call: Call) -> None:
        nonlocal spent
        most = _most_usd(call, config, limits)
        try:
            with lock:
                if stopped.is_set():
                    return
                if config.max_usd is not None and spent + most > config.max_usd:
                    raise GateRefused(
                        f"judge: the next call may pass the limit of ${config.max_usd}",
                        fix="the same command with a higher limit continues; no call is made twice",
                    )
                spent += most
            row = _ask(client, call, config, limits)
            with lock:
                log.append({"row": "done", **row})
                done[call.key] = row
                spent += row["usage"]["usd"] - most
                progress.advance()
        except BaseException:
            stopped.set()
            raise

    with (
        _client(config, judge_host) as client,
        JsonlLog(folder / LOG) as log,
        meter("judge", len(todo)) as progress,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):
        list(pool.map(make, todo))
    return done


def _most_usd(call: Call, config: JudgeConfig, limits: dict[str, int]) -> float:
    """Upper bound of one call: a token is at least one byte of the prompt."""
    prompt = sum(len(message["content"].encode()) + 16 for message in call.messages)
    price_in, price_out = config.usd_per_million
    return (prompt * price_in + max(limits.values()) * price_out) / 1e6


def _client(config: JudgeConfig, judge_host: str) -> Any:
    try:
        import openai
    except ImportError:
        what = "a judge needs the openai client, which is not installed"
        raise ConfigError(what, fix="pip install 'fintune[judge]'") from None
    # No redirect takes key and rows to another host, no proxy what is for this machine.
    proxies = not _is_loopback(config)
    return openai.OpenAI(
        api_key=api_key(config, judge_host),
        base_url=config.base_url,
        max_retries=RETRIES,
        timeout=TIMEOUT_S,
        http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=proxies),
    )


def _ask(client: Any, call: Call, config: JudgeConfig, limits: dict[str, int]) -> dict[str, Any]:
    """The row of one call; `limits` are changed for all calls where the model refuses them.

    Raises:
        ModelError: the call stays without a completion.
    """
    import openai

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
        said = error.response.text.replace(client.api_key, "[redacted]")
        if "max_completion_tokens" in said and "max_tokens" in limits:
            limits.clear()
            limits.update(REASONING_LIMITS)
            return _ask(client, call, config, limits)
        raise _failure(f"HTTP {error.status_code}", said, config) from None
    except openai.APIConnectionError as error:
        raise _failure("no reply", str(error), config) from None
    # A server that writes the key into its reply must not bring it into a file.
    return _row(call, raw.http_response.text.replace(client.api_key, "[redacted]"), config)


def _row(call: Call, body: str, config: JudgeConfig) -> dict[str, Any]:
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        text = str(choice["message"].get("content") or choice["message"].get("refusal") or "")
        used = value.get("usage") or {}
        tokens = [int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _failure("no completion", body, config) from None
    priced = zip(tokens, config.usd_per_million, strict=True)
    usd = sum(count * price for count, price in priced) / 1e6
    verdict = read_verdict(call, text)
    finish = str(choice.get("finish_reason"))[:40]
    return {
        "key": call.key,
        "status": "scored" if verdict else "unscored",
        "unscored_reason": None if verdict else "parse_failure" if finish == "stop" else finish,
        "outcome": outcome(call, verdict) if verdict else None,
        "verdict": verdict,
        "reply": text[:KEPT_CHARACTERS],
        "usage": {"in": tokens[0], "out": tokens[1], "usd": round(usd, 8)},
        "served_model": str(value.get("model") or "")[:200],
        "system_fingerprint": str(value.get("system_fingerprint") or "")[:200],
    }


def _failure(what: str, said: str, config: JudgeConfig) -> ModelError:
    """A call that the client repeated in vain, or that no repeating helps."""
    fixes: dict[str, str] = PHRASES["judge_fixes"]
    fix = fixes.get(what) or fixes.get(what[:6] + "xx") or fixes["other"]
    fix = fix.format(key_variable=config.key_variable, model=config.model)
    return ModelError(
        f"judge: {config.base_url} failed ({what}): {' '.join(said.split())[:300]}",
        fix=f"{fix}, and run the same command again; no call is made twice",
    )


def api_key(config: JudgeConfig, judge_host: str = "") -> str:
    """The key from the environment, if the host may have it; a server on this machine needs none.

    Raises:
        ConfigError: the key is not for this host, would travel in clear, or is not set.
    """
    url, loopback, variable = urlsplit(config.base_url), _is_loopback(config), config.key_variable
    key = os.environ.get(variable, "").strip()
    if loopback and not key:
        return "no-key-is-needed"
    if url.scheme != "https" and not loopback:
        why = "key and rows would travel where others can read them"
        raise ConfigError(f"judge: {config.base_url} is not https", why=why)
    own = KEY_HOSTS.get(variable)
    openai_here = loopback and variable == "OPENAI_API_KEY"
    if url.hostname not in (own, judge_host.lower()) and not openai_here:
        raise ConfigError(
            f"judge: the key in {variable} is not for {url.hostname}",
            why=f"it goes to {own or 'no host'} unless another is named outside the config",
            fix=f"if that host is to have it: --judge-host {url.hostname}",
        )
    if not key:
        what = f"judge: the environment variable {variable} is not set"
        raise ConfigError(what, fix=f"export {variable}=..., or evaluate without a judge")
    return key


def _is_loopback(config: JudgeConfig) -> bool:
    return urlsplit(config.base_url).hostname in ("localhost", "127.0.0.1", "::1")
