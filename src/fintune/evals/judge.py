"""The judge: what it is asked, how its reply is read, and the calls.

A candidate's text is hostile input. It is quoted line by line between fences that carry a nonce,
nothing in it can look like a fence, and a verdict counts only as the last JSON object of the
reply that carries the same nonce, which no candidate can know. Control items, whose verdict is
known, are part of every run.

A call is one line of `judge_calls.jsonl` when it is finished, and is then never made again. The
openai client repeats what a network or a busy server spoils (408, 409, 429, 5xx, a connection
that breaks) after `Retry-After` or a growing, jittered wait. A call that stays without an answer
is asked again by the next run of the same command.
"""

import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fintune.config import JudgeConfig
from fintune.console import meter, say
from fintune.errors import ConfigError, DataError, GateRefused, ModelError
from fintune.evals.grading import PHRASES, VARIANTS, Item, Pair
from fintune.evals.numbers import compare
from fintune.files import FORMAT, JsonlLog, read_json, read_jsonl, sha256_bytes, sha256_json

Json = dict[str, Any]
NAME = "eval_50_gpt_judged_raw.jsonl"
"""A line a judge call, or a line an item of the judged set without a judge."""
RUBRIC = Path(__file__).with_name("rubric.md").read_text("utf-8")
SCHEMA = read_json(Path(__file__).with_name("verdict_schema.json"))
SCORE = {"adapter": 1.0, "tie": 0.5, "base": 0.0}
"""What an outcome of a pair counts in the adapter's win rate."""
MOST_OBJECTS = 1000
"""JSON objects of a reply that are looked at; a reply of braces alone would take minutes."""
_ANGLES = str.maketrans({"<": "‹", ">": "›", "＜": "‹", "＞": "›", "﹤": "‹", "﹥": "›"})
_SPOILT: dict[str, str] = PHRASES["spoilt"]
"""Answers that must lose: nothing, phrases that fit any question, and an attack."""
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
NUMERIC = ("digit", "scale")
"""References that must lose with another digit or scale."""


class Call(NamedTuple):
    """One question to the judge.

    `positions` names who wrote candidates A and B. `key` hashes everything that the verdict
    depends on; a call with a known key is never made again. `control` is the kind of a control
    item and `expect` its verdict.
    """

    key: str
    item: str
    positions: tuple[str, str]
    nonce: str
    messages: list[dict[str, str]]
    control: str | None = None
    expect: str | None = None


def plan(pairs: Sequence[Pair], config: JudgeConfig, seed: int) -> list[Call]:
    """Every call over the judged set: each item in both orders, then the control items.

    None without a judge.
    """
    if config.model is None:
        return []
    orders = (VARIANTS, VARIANTS[::-1])
    calls = [_call(pair.item, order, pair.texts, config) for pair in pairs for order in orders]
    return calls + _controls([pair.item for pair in pairs], config, seed)


def _call(
    item: Item,
    positions: tuple[str, str],
    texts: dict[str, str],
    config: JudgeConfig,
    *control: str,
) -> Call:
    answers = [texts[name] for name in positions]
    asked = [[message.role, message.content] for message in item.messages]
    kind = control[0] if control else None
    material = [config.model, config.base_url, RUBRIC, positions, kind]
    key = sha256_json([*material, item.id, asked, item.reference, answers])
    # The nonce depends on every text shown, so no text can contain its own.
    nonce = sha256_bytes(f"nonce {key}".encode())[:32]
    prompt = "\n".join(f"{role}: {content}" for role, content in asked)
    shown = [fence("question", nonce, prompt), fence("reference", nonce, item.reference)]
    shown += [fence(f"candidate {at}", nonce, text) for at, text in zip("AB", answers, strict=True)]
    messages = [
        {"role": "system", "content": RUBRIC.strip()},
        {"role": "user", "content": "\n\n".join([*shown, f"id: {nonce}"])},
    ]
    return Call(key, item.id, positions, nonce, messages, *control)


def fence(name: str, nonce: str, text: str) -> str:
    """Text as data: quoted line by line, with nothing in it that could be read as a fence."""
    lines = text.translate(_ANGLES).splitlines() or [""]
    return "\n".join([f"<{name} {nonce}>", *(f"| {line}" for line in lines), f"</{name} {nonce}>"])


def _controls(items: Sequence[Item], config: JudgeConfig, seed: int) -> list[Call]:
    """Calls whose verdict is known: spoilt references must lose, two equal answers must tie."""
    order = sorted(items, key=lambda item: sha256_bytes(f"control {seed} {item.id}".encode()))
    calls: list[Call] = []
    for at, kind in enumerate((*_SPOILT, *NUMERIC, "same")):
        spoilt = [(item, _spoil(kind, item.reference)) for item in order]
        if kind in NUMERIC:  # "three" has no digit
            numbers = [(item, bad) for item, bad in spoilt if item.kind == "number"]
            spoilt = [(i, bad) for i, bad in numbers if not compare(i.reference, bad).lenient]
        if spoilt:
            item, bad = spoilt[at % len(spoilt)]
            positions = ("good", "bad") if at % 2 else ("bad", "good")
            expect = "tie" if kind == "same" else "good"
            answers = {"good": item.reference, "bad": bad}
            calls.append(_call(item, positions, answers, config, kind, expect))
    return calls


def _spoil(kind: str, text: str) -> str:
    """A reference made wrong; as it is for kind `same`."""
    if kind == "digit":
        return re.sub("[0-9]", lambda at: str((int(at[0]) + 4) % 9 + 1), text, count=1)
    if kind == "scale":
        number = r"[0-9][0-9,]*(?:\.[0-9]+)?"
        more = lambda at: f"{float(at[0].replace(',', '')) * 1000:,.6g}"  # noqa: E731
        return re.sub(number, more, text, count=1)
    return _SPOILT.get(kind, text)


def read_verdict(call: Call, reply: str) -> Json | None:
    """The last JSON object of a reply that carries the call's nonce, if it fits the schema."""
    decoder, starts = json.JSONDecoder(), [match.start() for match in re.finditer("{", reply)]
    for start in reversed(starts[-MOST_OBJECTS:]):
        with suppress(ValueError, RecursionError):
            found: Json = decoder.raw_decode(reply, start)[0]
            if found.get("id") == call.nonce:
                fits = found.get("winner") in ("A", "B", "tie")
                return found if fits and isinstance(found.get("rationale", ""), str) else None
    return None


def outcome(call: Call, verdict: Json) -> str:
    """Who won: `base`, `adapter` (of a control item `good`, `bad`), or `tie`."""
    winner = verdict["winner"]
    return "tie" if winner == "tie" else call.positions["AB".index(winner)]


def raw_rows(
    pairs: Sequence[Pair],
    calls: Sequence[Call] = (),
    done: dict[str, Json] | None = None,
    model: str | None = None,
    labels: Path | None = None,
) -> list[Json]:
    """The lines of the raw file: one a call, or one an item where no judge was asked.

    Args:
        done: the finished calls by key; see `calls.ask`.
        labels: human verdicts, JSON Lines of id and verdict.

    Raises:
        DataError: `labels` is no such file.
    """
    facts = {pair.item.id: _facts(pair) for pair in pairs}
    if not done:
        unjudged = {"status": "unscored", "unscored_reason": "no_judge"}
        return [{**row, **unjudged} for row in facts.values()]
    human, rubric = _labels(labels), sha256_bytes(RUBRIC.encode())
    return [
        {
            **facts[call.item],
            **done[call.key],
            "model": model,
            "rubric_sha256": rubric,
            "positions": call.positions,
            "control": call.control,
            "expect": call.expect,
            "human": None if call.control else human.get(call.item),
        }
        for call in calls
    ]


def _facts(pair: Pair) -> Json:
    graded = {name: asdict(found) if found else None for name, found in pair.graded.items()}
    return {
        "format": FORMAT,
        "id": pair.item.id,
        "task": pair.item.task,
        "question": pair.item.question,
        "reference": pair.item.reference,
        "answers": pair.texts,
        "deterministic": graded,
    }


def _labels(path: Path | None) -> dict[str, str]:
    """Human verdicts (`base`, `adapter`, `tie`) by item."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        labels = {row["id"]: row["verdict"] for row in read_jsonl(path)} if path else {}
        if set(labels.values()) <= SCORE.keys():
            return labels
    what = f"--labels {path}: no file of human verdicts"
    raise DataError(what, fix='lines such as {"id": "...", "verdict": "adapter"}; or base, or tie')


def finished(folder: Path) -> dict[str, Json]:
    """The rows of the finished calls by key."""
    if not (folder / LOG).is_file():
        return {}
    with JsonlLog(folder / LOG) as log:
        return {row["key"]: row for row in log.rows() if row.pop("row") == "done"}


def ask(
    folder: Path, calls: Sequence[Call], config: JudgeConfig, judge_host: str = ""
) -> dict[str, Json]:
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
    if proxies and "FINTUNE_OFFLINE" in os.environ:
        raise ConfigError(f"--offline, and the judge is at {config.base_url}")
    return openai.OpenAI(
        api_key=api_key(config, judge_host),
        base_url=config.base_url,
        max_retries=RETRIES,
        timeout=TIMEOUT_S,
        http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=proxies),
    )


def _ask(client: Any, call: Call, config: JudgeConfig, limits: dict[str, int]) -> Json:
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


def _row(call: Call, body: str, config: JudgeConfig) -> Json:
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
    failed = f"judge: {config.base_url} failed ({what}): {' '.join(said.split())[:300]}"
    return ModelError(failed, fix=f"{fix}, and run the same command again; no call is made twice")


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
        why = f"it goes to {own or 'no host'} unless another is named outside the config"
        fix = f"if that host is to have it: --judge-host {url.hostname}"
        what = f"judge: the key in {variable} is not for {url.hostname}"
        raise ConfigError(what, why=why, fix=fix)
    if not key:
        what = f"judge: the environment variable {variable} is not set"
        raise ConfigError(what, fix=f"export {variable}=..., or evaluate without a judge")
    return key


def _is_loopback(config: JudgeConfig) -> bool:
    return urlsplit(config.base_url).hostname in ("localhost", "127.0.0.1", "::1")
