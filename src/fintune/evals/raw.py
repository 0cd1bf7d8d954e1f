"""`eval_50_gpt_judged_raw.jsonl`: a line a judge call, or a line an item without a judge."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fintune.config import JudgeConfig
from fintune.errors import DataError
from fintune.evals import calls, judge
from fintune.evals.results import WHO, Pair
from fintune.files import FORMAT, read_jsonl, sha256_bytes

NAME = "eval_50_gpt_judged_raw.jsonl"


def pending(folder: Path, pairs: Sequence[Pair], config: JudgeConfig, seed: int) -> bool:
    """Whether a judge is configured that has calls still to make."""
    if config.model is None:
        return False
    done, _ = calls.history(folder)
    return any(call.key not in done for call in _plan(pairs, config, seed))


def judged_rows(
    folder: Path, pairs: Sequence[Pair], config: JudgeConfig, seed: int, judge_host: str
) -> Iterable[dict[str, Any]]:
    """The lines of the raw file; asks the judge what it was not asked yet.

    Raises:
        ConfigError, ModelError, GateRefused: see `calls.ask`.
    """
    facts = {pair.item.id: _facts(pair) for pair in pairs}
    if config.model is None:
        none = {"status": "unscored", "unscored_reason": "no_judge"}
        return [{**fact, **none} for fact in facts.values()]
    human = _labels(config.labels)
    planned = _plan(pairs, config, seed)
    done = calls.ask(folder, planned, config, judge_host)
    rubric = sha256_bytes(judge.RUBRIC.encode())
    missing: dict[str, Any] = {
        "status": "error",
        "unscored_reason": "unreachable",
        **dict.fromkeys(("outcome", "verdict", "usage", "served_model", "system_fingerprint")),
        "replies": [],
        "retries": [],
        "possibly_paid": 0,
    }
    rows = []
    for call in planned:
        answered = done.get(call.key, missing)
        label = call.mode if call.mode == "pairwise" else f"pointwise:{call.slots[0]}"
        rows.append(
            {
                **facts[call.item],
                "key": call.key,
                "model": config.model,
                "rubric_sha256": rubric,
                "mode": call.mode,
                "slots": call.slots,
                "canary": call.canary,
                "expect": call.expect,
                "human": None if call.canary else human.get((call.item, label)),
                **{name: answered[name] for name in missing},
            }
        )
    return rows


def _plan(pairs: Sequence[Pair], config: JudgeConfig, seed: int) -> list[judge.Call]:
    items = [(pair.item, {who: pair.answers[who]["text"] for who in WHO}) for pair in pairs]
    return judge.plan(items, config, seed=seed)


def _facts(pair: Pair) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "id": pair.item.id,
        "task": pair.item.task,
        "question": pair.item.question,
        "reference": pair.item.reference,
        "answers": {who: pair.answers[who]["text"] for who in WHO},
        "lengths": {who: len(pair.answers[who]["text"]) for who in WHO},
        "deterministic": {
            who: asdict(graded) if (graded := pair.graded[who]) else None for who in WHO
        },
    }


def _labels(path: Path | None) -> dict[tuple[str, str], str]:
    """Human verdicts by item and mode (`pairwise`, `pointwise:base`, `pointwise:adapter`)."""
    if path is None:
        return {}
    try:
        return {(row["id"], row["mode"]): row["verdict"] for row in read_jsonl(path)}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"eval.judge.labels: {path} is no file of human verdicts",
            fix='lines such as {"id": "...", "mode": "pairwise", "verdict": "adapter"}',
        ) from None
