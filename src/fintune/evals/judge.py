"""The LLM judge: its prompts, its calls, and how its replies are parsed.

A candidate's text may be a prompt injection. It is quoted line by line between fences that carry
a nonce, and a verdict counts only as the last JSON object of the reply that carries the same
nonce, which no candidate can know. Control items, whose verdict is known, are part of every run.

A finished call is a line of `judge_calls.jsonl` and is never made again. One that fails after its
retries (`endpoint`) is made again by the next run of the same command; one whose reply is no
completion does not keep the others from being made.
"""

import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fintune.config import JudgeConfig
from fintune.console import meter, say
from fintune.errors import DataError, GateRefused
from fintune.evals.endpoint import LIMITS, SCHEMA, Endpoint, NoCompletion
from fintune.evals.grading import PHRASES, VARIANTS, Item, Pair
from fintune.evals.numbers import compare
from fintune.files import FORMAT, JsonlLog, read_jsonl, sha256_bytes, sha256_json
from fintune.judgings import RUBRIC

Json = dict[str, Any]
NAME = "eval_50_gpt_judged_raw.jsonl"
"""The raw file: a line per judge call, or without a judge a line per item of the judged set."""
SCORE = {"adapter": 1.0, "tie": 0.5, "base": 0.0}
"""What an outcome counts in the adapter's win rate."""
MOST_OBJECTS = 1000
"""JSON objects of a reply that are parsed; a reply of braces alone would take minutes."""
_ANGLES = str.maketrans({"<": "‹", ">": "›", "＜": "‹", "＞": "›", "﹤": "‹", "﹥": "›"})
_BAD_ANSWERS: dict[str, str] = PHRASES["bad_answers"]
"""Control items: an empty answer, boilerplate and a prompt injection, which must lose."""
LOG = "judge_calls.jsonl"
CONCURRENCY = 8
KEPT_CHARACTERS = 20_000
"""Characters of a reply that are stored; the verdict is parsed from the whole reply."""
NUMERIC = ("digit", "scale")
"""Control items: references with one digit or their scale changed, which must lose."""


class Call(NamedTuple):
    """One call of the judge.

    Attributes:
        key: hash of everything that the verdict depends on; a finished key is not called again.
        item: id of the item.
        positions: the variants whose answers are candidates A and B.
        nonce: marks fences and verdict of this call.
        control: the kind of a control item, else None.
        expect: the outcome of a control item, else None.
    """

    key: str
    item: str
    positions: tuple[str, str]
    nonce: str
    messages: list[dict[str, str]]
    control: str | None = None
    expect: str | None = None


def plan(pairs: Sequence[Pair], config: JudgeConfig, seed: int) -> list[Call]:
    """Every call: each item in both orders of its answers, then the control items.

    Args:
        pairs: the judged set.
        seed: chooses the items of the control items.

    Returns:
        The calls; an empty list without a judge.
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
    # The nonce depends on every text of the prompt, so no text can contain it.
    nonce = sha256_bytes(f"nonce {key}".encode())[:32]
    prompt = "\n".join(f"{role}: {content}" for role, content in asked)
    shown = [fence("question", nonce, prompt), fence("reference", nonce, item.reference)]
    shown += [fence(f"candidate {at}", nonce, text) for at, text in zip("AB", answers, strict=True)]
    messages = [
        {"role": "system", "content": f"{RUBRIC.strip()}\n\nThe schema\n{json.dumps(SCHEMA)}"},
        {"role": "user", "content": "\n\n".join([*shown, f"id: {nonce}"])},
    ]
    return Call(key, item.id, positions, nonce, messages, *control)


def fence(name: str, nonce: str, text: str) -> str:
    """Quote a text line by line between fences; angle brackets in it are replaced."""
    lines = text.translate(_ANGLES).splitlines() or [""]
    return "\n".join([f"<{name} {nonce}>", *(f"| {line}" for line in lines), f"</{name} {nonce}>"])


def _controls(items: Sequence[Item], config: JudgeConfig, seed: int) -> list[Call]:
    """Calls whose outcome is known: bad answers must lose, two equal answers must tie."""
    order = sorted(items, key=lambda item: sha256_bytes(f"control {seed} {item.id}".encode()))
    calls: list[Call] = []
    for at, kind in enumerate((*_BAD_ANSWERS, *NUMERIC, "same")):
        choices = [(item, _bad_answer(kind, item.reference)) for item in order]
        if kind in NUMERIC:  # "three" has no digit to change
            numbers = [(item, bad) for item, bad in choices if item.kind == "number"]
            choices = [(i, bad) for i, bad in numbers if not compare(i.reference, bad).lenient]
        if choices:
            item, bad = choices[at % len(choices)]
            positions = ("good", "bad") if at % 2 else ("bad", "good")
            expect = "tie" if kind == "same" else "good"
            answers = {"good": item.reference, "bad": bad}
            calls.append(_call(item, positions, answers, config, kind, expect))
    return calls


def _bad_answer(kind: str, text: str) -> str:
    """The bad answer of a control item; the reference itself for kind `same`."""
    if kind == "digit":
        return re.sub("[0-9]", lambda at: str((int(at[0]) + 4) % 9 + 1), text, count=1)
    if kind == "scale":
        number = r"[0-9][0-9,]*(?:\.[0-9]+)?"
        scaled = lambda at: f"{float(at[0].replace(',', '')) * 1000:,.6g}"  # noqa: E731
        return re.sub(number, scaled, text, count=1)
    return _BAD_ANSWERS.get(kind, text)


def read_verdict(call: Call, reply: str) -> Json | None:
    """The last JSON object of a reply whose `id` is the nonce; None where it breaks the schema."""
    decoder, starts = json.JSONDecoder(), [match.start() for match in re.finditer("{", reply)]
    for start in reversed(starts[-MOST_OBJECTS:]):
        with suppress(ValueError, RecursionError):
            verdict: Json = decoder.raw_decode(reply, start)[0]
            if verdict.get("id") == call.nonce:
                valid = verdict.get("winner") in ("A", "B", "tie")
                return verdict if valid and isinstance(verdict.get("rationale", ""), str) else None
    return None


def outcome(call: Call, verdict: Json) -> str:
    """The variant that won: `base`, `adapter` (of a control item `good`, `bad`), or `tie`."""
    winner = verdict["winner"]
    return "tie" if winner == "tie" else call.positions["AB".index(winner)]


def raw_rows(
    pairs: Sequence[Pair],
    calls: Sequence[Call] = (),
    done: dict[str, Json] | None = None,
    model: str | None = None,
    labels: Path | None = None,
) -> list[Json]:
    """The rows of the raw file: one per call, or one per item where no judge was asked.

    Args:
        done: the rows of the finished calls by key (see `ask`).
        model: of the config, which an endpoint may serve under another name.
        labels: human verdicts, JSON Lines of `id` and `verdict` (base, adapter or tie).

    Raises:
        DataError: `labels` is no such file.
    """
    by_item = {
        pair.item.id: {
            "format": FORMAT,
            "id": pair.item.id,
            "task": pair.item.task,
            "question": pair.item.question,
            "reference": pair.item.reference,
            "answers": pair.texts,
            "deterministic": {name: g and asdict(g) for name, g in pair.graded.items()},
        }
        for pair in pairs
    }
    if not done:
        unjudged = {"status": "unscored", "unscored_reason": "no_judge"}
        return [{**row, **unjudged} for row in by_item.values()]
    human, rubric = _read_labels(labels) if labels else {}, sha256_bytes(RUBRIC.encode())
    return [
        {
            **by_item[call.item],
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


def _read_labels(path: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, KeyError, TypeError):
        labels = {row["id"]: row["verdict"] for row in read_jsonl(path)}
        if set(labels.values()) <= SCORE.keys():
            return labels
    what = f"--labels {path}: no file of human verdicts"
    raise DataError(what, fix='lines such as {"id": "...", "verdict": "adapter"}; or base, or tie')


def finished(folder: Path) -> dict[str, Json]:
    """The rows of the finished calls by key; none where the folder has no log."""
    if not (folder / LOG).is_file():
        return {}
    with JsonlLog(folder / LOG) as log:
        return {row["key"]: row for row in log.rows() if row.pop("row") == "done"}


def ask(
    folder: Path, calls: Sequence[Call], config: JudgeConfig, judge_host: str = ""
) -> dict[str, Json]:
    """Make every call that is not finished yet: the first alone (`Endpoint.ask`), then CONCURRENCY
    at once. After the first error no further call starts; those in flight end and are logged. A
    reply that is no completion fails its call alone, unless CONCURRENCY come and no completion.

    Args:
        folder: of the judging; its `judge_calls.jsonl` gets a line per finished call.
        judge_host: another host that may get the key (see `endpoint.api_key`).

    Returns:
        The rows of finished calls by key.

    Raises:
        ConfigError: no key, a key of another host, or the `openai` package is not installed.
        ModelError: the endpoint refuses the key, the account or the model, or does not answer.
        GateRefused: the next call could pass `max_usd`.
    """
    done = finished(folder)
    todo = [call for call in calls if call.key not in done]
    if not todo:
        return done
    most = sum(_most_usd(call, config, LIMITS) for call in todo)
    say(f"judge {config.model}: {len(todo)} of {len(calls)} calls to make; at most ${most:.2f}")
    spent = sum(row["usage"]["usd"] for row in done.values())  # with the most of calls under way
    lock, before, endpoint = threading.Lock(), len(done), Endpoint(config, judge_host)
    errors: list[BaseException] = []

    def make(call: Call) -> None:
        nonlocal spent
        most = _most_usd(call, config, endpoint.limits)
        try:
            with lock:
                if _hopeless(errors) or len(errors) >= CONCURRENCY and len(done) == before:
                    return
                if config.max_usd is not None and spent + most > config.max_usd:
                    what = f"judge: the next call may pass the limit of ${config.max_usd}"
                    raise GateRefused(what, fix=PHRASES["judge_fixes"]["budget"])
                spent += most
            row = _row(call, endpoint.ask(call.key, call.messages), endpoint, config)
            with lock:
                log.append({"row": "done", **row})
                done[call.key] = row
                spent += row["usage"]["usd"] - most
                progress.advance()
        except BaseException as error:
            errors.append(error)

    with (
        endpoint.client,
        JsonlLog(folder / LOG) as log,
        meter("judge", len(todo)) as progress,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):
        make(todo[0])
        list(pool.map(make, todo[1:]))
    if errors:
        raise (_hopeless(errors) or errors)[0]
    return done


def _hopeless(errors: list[BaseException]) -> list[BaseException]:
    """Those that concern every further call."""
    return [error for error in errors if not isinstance(error, NoCompletion)]


def _most_usd(call: Call, config: JudgeConfig, limits: dict[str, int]) -> float:
    """Upper bound of the price of one call: a prompt has at most as many tokens as bytes."""
    prompt = sum(len(message["content"].encode()) + 16 for message in call.messages)
    price_in, price_out = config.usd_per_million
    return (prompt * price_in + max(limits.values()) * price_out) / 1e6


def _row(call: Call, body: str, endpoint: Endpoint, config: JudgeConfig) -> Json:
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        text = str(choice["message"].get("content") or choice["message"].get("refusal") or "")
        usage = value.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise endpoint.failure("no completion", body, NoCompletion) from None
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
        "response_format": endpoint.forms[0],
        "served_model": str(value.get("model") or "")[:200],
    }
