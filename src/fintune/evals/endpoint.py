"""The judge's endpoint: its key, what it takes, and what it says when it refuses.

The openai client retries 408, 409, 429, 5xx and broken connections after `Retry-After` or with
exponential backoff and jitter.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fintune.config import Config, JudgeConfig
from fintune.console import printable, say, warn
from fintune.errors import ConfigError, ModelError
from fintune.evals.grading import PHRASES
from fintune.files import read_json
from fintune.judgings import results_dir

SCHEMA = read_json(Path(__file__).with_name("verdict_schema.json"))
_STRICT = {"name": "verdict", "strict": True, "schema": SCHEMA}
FORMS: dict[str, dict[str, Any]] = {
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": _STRICT}},
    "json_object": {"response_format": {"type": "json_object"}},
    "text": {},
}
"""How JSON is asked for, in the order in which it is tried; the prompt asks for it in any case."""
REFUSES_FIELDS = (400, 415, 422, 500, 501)
"""Statuses of endpoints that do not take a field: llama-cpp-python answers an unknown form with
500."""
RETRIES = 5
TIMEOUT_S = 300.0
LIMITS = {"max_tokens": 600, "temperature": 0, "seed": 7}
REASONING_LIMITS = {"max_completion_tokens": 8_000}
"""For a model that refuses LIMITS: its reasoning counts towards the completion tokens."""
KEY_HOSTS: dict[str, str] = PHRASES["key_hosts"]
"""Environment variable of a key -> the host it may be sent to. OPENAI_API_KEY may also be sent to
a server on this machine, as every client of such a server does."""


class NoCompletion(ModelError):
    """A reply with status 200 holds no completion."""


class Endpoint:
    """The endpoint of a config.

    Attributes:
        client: whose context closes its connections.
        limits: of a reply, as the endpoint takes them.
        forms: names of FORMS that it has not refused; the first is asked for.
    """

    def __init__(self, config: JudgeConfig, judge_host: str) -> None:
        """Make no connection yet.

        Raises:
            ConfigError: no key, a key of another host, or the `openai` package is not installed.
        """
        try:
            import openai
        except ImportError:
            what = "a judge needs the openai client, which is not installed"
            raise ConfigError(what, fix="pip install 'fintune[judge]'") from None
        # No redirect, which could send key and rows to another host; no proxy for this machine.
        proxies = not _is_loopback(config)
        if proxies and "FINTUNE_OFFLINE" in os.environ:
            raise ConfigError(f"--offline, and the judge is at {config.base_url}")
        self._config, self._key = config, api_key(config, judge_host)
        self.limits, self.forms, self._settled = dict(LIMITS), [*FORMS], False
        self.client: Any = openai.OpenAI(
            api_key=self._key,
            base_url=config.base_url,
            max_retries=RETRIES,
            timeout=TIMEOUT_S,
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=proxies),
        )

    def ask(self, key: str, messages: list[dict[str, str]]) -> str:
        """The body of the reply to a prompt, without the key.

        Until the first reply a refusal leaves out what the endpoint says it does not take, then
        goes on to the next of FORMS. What worked is kept: a judging's first call is made alone.

        Args:
            key: of the call, by which an endpoint may know a request that was sent again.

        Raises:
            ModelError: the call stays without a reply.
        """
        import openai

        while True:
            try:
                raw = self.client.chat.completions.with_raw_response.create(
                    model=self._config.model,
                    messages=messages,
                    extra_headers={"Idempotency-Key": key},
                    **FORMS[self.forms[0]],
                    **self.limits,
                )
            except openai.APIStatusError as error:
                status, body = error.status_code, error.response.text
                body = body.replace(self._key, "[redacted]")
                if self._settled or status not in REFUSES_FIELDS or not self._give_way(body):
                    raise self.failure(f"HTTP {status}", body) from None
                said = " ".join(printable(body).split())[:200]
                say(f"judge: refused ({said}); asked for {self.forms[0]} with {self.limits}")
            except openai.APIConnectionError as error:
                raise self.failure("no reply", str(error)) from None
            else:
                self._settled = True
                # A reply is written to a file; a server may have echoed the key in it.
                return str(raw.http_response.text.replace(self._key, "[redacted]"))

    def _give_way(self, body: str) -> bool:
        """Ask for less after a refusal; False where nothing is left to leave out."""
        named = [name for name in ("seed", "temperature") if re.search(rf"\b{name}\b", body)]
        if "max_completion_tokens" in body and "max_tokens" in self.limits:
            self.limits = dict(REASONING_LIMITS)
        elif left := [name for name in named if name in self.limits]:
            self.limits = {name: self.limits[name] for name in self.limits if name not in left}
        else:
            self.forms = self.forms[1:]
        return bool(self.forms)

    def failure(self, what: str, said: str, kind: type[ModelError] = ModelError) -> ModelError:
        """The error of a call that failed after its retries, or that no retry helps.

        Args:
            said: by the endpoint.
        """
        fixes: dict[str, str] = PHRASES["judge_fixes"]
        config, fix = self._config, fixes.get(what) or fixes.get(what[:6] + "xx") or fixes["other"]
        fix = fix.format(key_variable=config.key_variable, model=config.model)
        failed = f"judge: {config.base_url} failed ({what}): {' '.join(said.split())[:300]}"
        return kind(failed, fix=f"{fix}, and run the same command again; no call is made twice")


def api_key(config: JudgeConfig, judge_host: str = "") -> str:
    """The key from the environment variable `key_variable`; a server on this machine needs none.

    Args:
        judge_host: a host that may get the key besides that of KEY_HOSTS.

    Raises:
        ConfigError: the key is of another host, would be sent without TLS, or is not set.
    """
    url, loopback, variable = urlsplit(config.base_url), _is_loopback(config), config.key_variable
    key = os.environ.get(variable, "").strip()
    if loopback and not key:
        return "no-key-is-needed"
    if url.scheme != "https" and not loopback:
        why = "key and rows would travel where others can read them"
        raise ConfigError(f"judge: {config.base_url} is not https", why=why)
    key_host = KEY_HOSTS.get(variable)
    openai_here = loopback and variable == "OPENAI_API_KEY"
    if url.hostname not in (key_host, judge_host.lower()) and not openai_here:
        why = f"it goes to {key_host or 'no host'} unless another is named outside the config"
        fix = f"if that host is to have it: --judge-host {url.hostname}"
        what = f"judge: the key in {variable} is not for {url.hostname}"
        raise ConfigError(what, why=why, fix=fix)
    if not key:
        what = f"judge: the environment variable {variable} is not set"
        raise ConfigError(what, fix=f"export {variable}=..., or evaluate without a judge")
    return key


def keyless(config: JudgeConfig, judge_host: str) -> str:
    """The variable that lacks a judge's key; empty where it can be asked, or there is none."""
    with suppress(ConfigError):
        if config.model is None or api_key(config, judge_host):
            return ""
    return "" if os.environ.get(config.key_variable, "").strip() else config.key_variable


def shown_dir(config: Config, judge_host: str = "") -> Path:
    """Folder of the results that count: of the judging, but the evaluation's where there is none
    and the judge cannot be asked."""
    folder = results_dir(config)
    unasked = keyless(config.eval.judge, judge_host) and not folder.exists()
    return config.eval_dir if unasked else folder


def tell_unjudged(config: JudgeConfig, judge_host: str, results: dict[str, Any]) -> None:
    """Say that a judge is configured, and that it was not asked as there is no key."""
    if (variable := keyless(config, judge_host)) and not results.get("judge"):
        warn(f"nothing was judged: {variable} is not set; with a key: fintune judge")


def _is_loopback(config: JudgeConfig) -> bool:
    return urlsplit(config.base_url).hostname in ("localhost", "127.0.0.1", "::1")
